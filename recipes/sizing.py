"""What a config costs, from the config alone: parameters, FLOPs, memory per device, expected time.

The model is built on the meta device (no memory, no weights), so every variant is counted as it is.

FLOPs of a training token (after PaLM, arXiv:2204.02311, App. B, with causal attention):

    6 * active matmul parameters + 6 * L * heads * (d_qk + d_v) * S / 2        (causal)

Active matmul parameters: all weights with two or more dimensions, the head included, the embedding
(a lookup) not, routed experts by the share `num_experts_per_tok / n_routed_experts`. With MTP every
depth adds its block, its projection, one more pass of the head and one more layer of attention.

Memory is an estimate; what it assumes stands at `ASSUMPTIONS`, which `--dry_run` prints.
"""

import copy
import dataclasses
import functools
import math
import os
import time

import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import set_zero3_state

from recipes.activation_memory import (
    activation_bytes,
    counts_exactly,
    layer_kinds,
    loss_bytes,
    packed_weight_bytes,
)

GIB = 2**30
LOSS_CHUNK_TOKENS = 1024
USABLE_SHARE = 0.92  # of a device's memory: CUDA context, fragmentation
# Dense bf16 (V100, T4: fp16) tensor-core peaks in TFLOP/s, from the vendors' data sheets.
DEVICE_PEAKS = {
    "B200": 2250, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362,
    "A10": 125, "RTX 4090": 165, "RTX 3090": 71, "V100": 125, "T4": 65,
}  # fmt: skip
ASSUMPTIONS = (
    "AdamW with two states and gradients in the weights' dtype; bf16/fp16 mixed precision keeps fp32 "
    "weights and one 2-byte copy; attention that never stores scores (flash/cuDNN); saved per layer: "
    "what the fused functions of our model keep (recipes/activation_memory.py), or for other models norm inputs and "
    "outputs, projections, gate/up/product of every expert a token visits; with "
    "activation checkpointing one residual per layer and one whole layer; the loss in chunks; "
    "fully sharded: states divided by the devices, two layers gathered; "
    f"{USABLE_SHARE:.0%} of a device usable"
)


@dataclasses.dataclass
class Parameters:
    """Counts. `total` and `active` include MTP; the released files also hold `mtp_copies`."""

    total: int
    active: int  # per token: without the embedding table, experts by their share
    matmul: int  # active weights that multiply, once each, head included
    head: int  # vocab x hidden
    mtp: int  # total of the MTP modules alone
    mtp_active: int
    mtp_copies: int  # embedding and head again under every MTP layer, on disk only
    largest_layer: int


def _text_config(config):
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def meta_model(config):
    """The causal language model of a config, without weights in memory."""
    config = copy.deepcopy(config)
    with set_zero3_state(), torch.device("meta"):  # DeepSpeed's ZeRO-3 would spread even this model
        return AutoModelForCausalLM.from_config(config)


def _expert_share(config):
    experts = getattr(config, "n_routed_experts", None)
    return config.num_experts_per_tok / experts if experts else 1.0


def _count(config):
    """(total, active, matmul, embedding, head) of one model."""
    model, share = meta_model(config), _expert_share(_text_config(config))
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    total = active = matmul = 0
    for name, parameter in model.named_parameters():  # shared tensors once
        size = parameter.numel()
        used = round(size * share) if ".experts." in name else size
        total += size
        if parameter is not embedding or parameter is head:
            active += used
            matmul += used if parameter.ndim >= 2 else 0
    return total, active, matmul, embedding.numel(), head.numel()


def count_parameters(config):
    """Parameter counts of the causal language model that `config` describes."""
    total, active, matmul, embedding, head = _count(config)
    text = _text_config(config)
    depth = getattr(text, "num_nextn_predict_layers", 0) or 0
    without = (total, active)
    if depth:
        plain = copy.deepcopy(config)
        _text_config(plain).num_nextn_predict_layers = 0
        without = _count(plain)
    layers = meta_model(config).base_model.layers
    largest = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
    mtp = total - without[0]
    return Parameters(
        total=total,
        active=active,
        matmul=matmul,
        head=head,
        mtp=mtp,
        mtp_active=active - without[1],
        mtp_copies=depth * (embedding + head) if mtp else 0,
        largest_layer=largest,
    )


def _attention_sizes(config):
    """(heads, d_qk, d_v) for latent attention and for ordinary attention."""
    heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):
        return heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, size, size


def flops_per_token(config, sequence_length, parameters=None):
    """Training FLOPs of one token (forward and backward), by the formula above."""
    parameters, text = parameters or count_parameters(config), _text_config(config)
    depth = (getattr(text, "num_nextn_predict_layers", 0) or 0) if parameters.mtp else 0
    heads, d_qk, d_v = _attention_sizes(text)
    attention = (text.num_hidden_layers + depth) * heads * (d_qk + d_v) * sequence_length / 2
    return 6 * (parameters.matmul + depth * parameters.head + attention)


# ---------------------------------------------------------------- memory


def _layer_activations(config, sparse):
    """Saved values of one layer and one token."""
    hidden = config.hidden_size
    heads, d_qk, d_v = _attention_sizes(config)
    latent = 2 * ((getattr(config, "q_lora_rank", None) or 0) + (getattr(config, "kv_lora_rank", None) or 0))
    attention = 2 * hidden + latent + heads * (2 * d_qk + 2 * d_v)
    if not sparse:
        return attention + 2 * hidden + 3 * config.intermediate_size
    inner, top_k = config.moe_intermediate_size, config.num_experts_per_tok
    routed = top_k * (2 * hidden + 3 * inner) + 2 * config.n_routed_experts
    return attention + 2 * hidden + routed + 3 * inner * (config.n_shared_experts or 0)


def memory_per_device(config, args, devices=1, sharded=False, checkpointing=None, parameters=None, mixed=None):
    """{"weights", "gradients", "optimizer", "ema", "activations", "total"} in bytes, for one device.

    None: as `args` says; `mixed` means bf16 or fp16 compute on fp32 weights.
    """
    parameters, text = parameters or count_parameters(config), _text_config(config)
    checkpointing = args.activation_checkpointing if checkpointing is None else checkpointing
    mixed = args.bf16 or args.fp16 if mixed is None else mixed
    width = 2 if mixed else 4
    share = 1 / devices if sharded else 1.0
    gathered = 2 * parameters.largest_layer * width if sharded else 0
    tokens = args.per_device_train_batch_size * args.sequence_length
    if counts_exactly(text):
        residual = width if sharded else 4  # what is gathered in 16 bits takes its inputs so, too
        activations = activation_bytes(text, tokens, width, residual, checkpointing)
        activations += packed_weight_bytes(text, width, checkpointing) + loss_bytes(text, tokens, width)
    else:
        per_layer = [_layer_activations(text, sparse) for sparse in layer_kinds(text)]
        saved = len(per_layer) * text.hidden_size + max(per_layer) if checkpointing is True else sum(per_layer)
        loss = 2 * min(tokens, LOSS_CHUNK_TOKENS) * text.vocab_size * 4 + 2 * tokens * text.hidden_size * width
        activations = tokens * saved * width + loss
    memory = {
        "weights": (4 + (2 if mixed else 0)) * parameters.total * share + gathered,
        "gradients": 4 * parameters.total * share,
        "optimizer": 8 * parameters.total * share,
        "ema": 4 * parameters.total * share if getattr(args, "ema_decay", 0) else 0,
        "activations": activations,
    }
    return {name: int(value) for name, value in memory.items()} | {"total": int(sum(memory.values()))}


def fitting_devices(config, args, device_bytes, parameters):
    """Fewest devices of that size that bf16 training, fully sharded, with checkpointing fits on, or None."""
    for power in range(0, 14):
        memory = memory_per_device(config, args, 2**power, True, True, parameters, True)
        if memory["total"] <= device_bytes * USABLE_SHARE:
            return 2**power
    return None


# ---------------------------------------------------------------- devices


@functools.cache
def _measured_cpu_peak(threads):
    left, right = torch.ones(768, 768), torch.ones(768, 768)
    best = math.inf
    for _ in range(12):
        start = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return 2 * 768**3 / best


def device_peak_flops(device, override_tflops=None):
    """(FLOP/s or None, where the number is from) of one device."""
    if override_tflops:
        return override_tflops * 1e12, "device_peak_tflops"
    if torch.device(device).type == "cpu":
        return _measured_cpu_peak(torch.get_num_threads()), "measured fp32 matmul on this CPU"
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in DEVICE_PEAKS.items():
            if all(word in name for word in part.split()):
                return peak * 1e12, f"{name}, dense bf16 by its data sheet"
    return None, "unknown device: set device_peak_tflops to get MFU and times"


def device_memory(device):
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ---------------------------------------------------------------- the table of --dry_run


def _amount(number):
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.3f} {unit}"
    return str(int(number))


def _with_mtp(total, mtp):
    return f"{_amount(total - mtp)} + MTP {_amount(mtp)}" if mtp else _amount(total)


def format_duration(seconds):
    if seconds < 90:
        return f"{seconds:.0f}s"
    if seconds < 5400:
        return f"{seconds / 60:.0f}m"
    return f"{seconds / 3600:.1f}h" if seconds < 172800 else f"{seconds / 86400:,.0f}d"


def layouts(config, args, parameters):
    """[(name, fits this host or not, memory)] in the order of preference."""
    count = torch.cuda.device_count() if args.device.type == "cuda" else 1
    names = [(f"one {args.device.type}", 1, False, None)]
    if count > 1:
        names += [(f"ddp x{count}", count, False, None), (f"fsdp2 x{count}", count, True, None)]
        names += [(f"fsdp2 x{count} + activation checkpointing", count, True, True)]
    elif args.activation_checkpointing is not True:
        names += [(f"one {args.device.type} + activation checkpointing", 1, False, True)]
    usable = device_memory(args.device) * USABLE_SHARE
    rows = [(n, memory_per_device(config, args, d, s, c, parameters)) for n, d, s, c in names]
    return [(name, memory["total"] <= usable, memory) for name, memory in rows]


def _time_rows(config, args, parameters, flops):
    tokens_per_step = args.tokens_per_step
    peak, source = device_peak_flops(args.device, args.device_peak_tflops)
    rows = [("tokens per optimizer step", f"{tokens_per_step:,}")]
    if args.max_steps > 0:
        rows.append(("tokens in all", f"{_amount(args.max_steps * tokens_per_step)} in {args.max_steps:,} steps"))
    rows.append(("device peak", f"{peak / 1e12:.2f} TFLOP/s ({source})" if peak else source))
    if peak:
        speed = peak * args.assumed_mfu * args.world_size / flops
        assumed = f"at {args.assumed_mfu:.0%} MFU (assumed), {args.world_size} device(s)"
        rows.append(("expected tokens/s", f"{speed:,.{0 if speed > 99 else 3}f} {assumed}"))
        if args.max_steps > 0:
            rows.append(("expected time", format_duration(args.max_steps * tokens_per_step / speed)))
    if args.device.type != "cuda":
        speed = DEVICE_PEAKS["H100"] * 1e12 * args.assumed_mfu / flops
        rows.append(("one H100 at that MFU", f"{speed:,.0f} tokens/s"))
    return rows


def sizing_table(config, args):
    """The text that `--dry_run` prints."""
    parameters = count_parameters(config)
    flops = flops_per_token(config, args.sequence_length, parameters)
    rows = [
        ("parameters", _with_mtp(parameters.total, parameters.mtp)),
        ("active per token (no embedding)", _with_mtp(parameters.active, parameters.mtp_active)),
        ("stored, MTP copies included", _amount(parameters.total + parameters.mtp_copies)),
        ("FLOPs per training token", f"{flops / 1e9:.3f} G at sequence length {args.sequence_length:,}"),
        *_time_rows(config, args, parameters, flops),
    ]
    candidates = layouts(config, args, parameters)
    for name, fits, memory in candidates:
        parts = ", ".join(f"{part} {size / GIB:.2f}" for part, size in memory.items() if part != "total" and size)
        rows.append(
            (f"memory, {name}", f"{memory['total'] / GIB:.2f} GiB {'fits' if fits else 'does NOT fit'} ({parts})")
        )
    best = next((name for name, fits, _ in candidates if fits), None)
    rows.append(("layout for this host", best or "none of the above"))
    needed = fitting_devices(config, args, 80e9, parameters)
    rows.append(("80 GB devices (bf16, fsdp2, checkpointing)", str(needed) if needed else "more than 8,192"))
    width = max(len(label) for label, _ in rows)
    lines = [f"{label.ljust(width)}  {value}" for label, value in rows]
    return "\n".join([*lines, f"assumptions: {ASSUMPTIONS}"])
