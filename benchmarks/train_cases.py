"""What the benchmark of training measures: sizes, models, the bare step, and the figures of a run of steps.

A job is a dict that one process measures (bench_train.py starts it): variant, device, fields (of the model's config),
batch, length, steps, warmup, seed, spawned (time.time() when its process was started). Variants are named
<who>-<weights>[-compiled][-clipped][-fused]: `fp32` means fp32 master weights, on CUDA with bf16 autocast; `bf16`
bf16 weights and optimizer states; `clipped`, gradient clipping at 1; `fused`, clipping inside the update, and bf16
copies of fp32 weights kept by it (recipes/optimizers.py).
"""

import contextlib
import statistics
import time
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
# 1.813 B parameters, 0.366 B active.
REFERENCE = dict(
    vocab_size=65536, hidden_size=1024, intermediate_size=4096, moe_intermediate_size=704, num_hidden_layers=12,
    num_attention_heads=16, n_shared_experts=2, n_routed_experts=64, num_experts_per_tok=6, kv_lora_rank=512,
    q_lora_rank=None, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, n_group=1, topk_group=1,
    first_k_dense_replace=1, routed_scaling_factor=2.5, max_position_embeddings=32768,
    pad_token_id=0, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
# As wide as the reference, quick enough for hundreds of steps.
SHALLOW = REFERENCE | dict(vocab_size=8192, num_hidden_layers=4)
TOY = REFERENCE | dict(
    vocab_size=128, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, n_shared_experts=1, n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=16,
    qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, max_position_embeddings=512,
)  # fmt: skip
OURS_ONLY = ("num_nextn_predict_layers", "mtp_loss_coef", "bias_update_speed", "seq_aux_loss_alpha")


def recipe_fields(name):
    """(model fields that both classes know, rows, row length) of recipes/configs/<name>.yaml, without MTP."""
    config = yaml.safe_load((ROOT / "recipes" / "configs" / f"{name}.yaml").read_text())
    fields = {key: value for key, value in config["model_config"].items() if key not in OURS_ONLY}
    return fields, config["per_device_train_batch_size"], config["sequence_length"]


# {name: (fields, rows, row length)}
SIZES = {
    "reference": lambda: (dict(REFERENCE), 4, 4096),
    "shallow": lambda: (dict(SHALLOW), 4, 2048),
    "tiny": lambda: recipe_fields("pretrain_tiny"),
    "toy": lambda: (dict(TOY), 2, 32),
}


def our_config(fields):
    from modeling_deepseek_r1 import DeepSeekR1Config

    return DeepSeekR1Config(**{"num_nextn_predict_layers": 0} | fields)


def our_model(fields):
    from modeling_deepseek_r1 import DeepSeekR1ForCausalLM

    return DeepSeekR1ForCausalLM(our_config(fields))


def library_model(fields):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM(
        DeepseekV3Config(**fields, num_key_value_heads=fields["num_attention_heads"], num_mtp_layers=0)
    )


def build_model(job):
    """The job's model on its device, in its weights' dtype; the library's with its fastest settings."""
    who, weights = job["variant"].split("-")[:2]
    if who not in ("bare", "library"):
        raise ValueError(f"variant={job['variant']} has no bare step; this measurement takes bare-* and library-*")
    torch.manual_seed(job.get("seed", 0))
    with torch.device(job["device"]):
        if who == "library":
            model = library_model(job["fields"])
            model.set_attn_implementation("sdpa")
            model.set_experts_implementation("grouped_mm")
        else:
            model = our_model(job["fields"])
    model = model.bfloat16() if weights == "bf16" else model
    if job.get("checkpointing"):
        model.activation_checkpointing_enable()
    return model.train()


def autocast(job):
    """bf16 compute on fp32 weights, on CUDA."""
    enabled = job["device"] == "cuda" and "-fp32" in job["variant"]
    return torch.autocast(job["device"], torch.bfloat16, enabled=enabled)


class BareStep:
    """Forward, backward, AdamW and (ours) the bias update: one call a step. Nothing waits for the device."""

    def __init__(self, job, model, learning_rate=1e-4):
        options = job["variant"].split("-")
        self.job, self.model = job, model
        self.forward = torch.compile(model) if "compiled" in options else model
        self.clips, self.fused = "clipped" in options, "fused" in options
        if self.fused:
            from recipes.optimizers import FusedAdamW

            copies = "fp32" in options and ("gradients" if job.get("checkpointing") else True)  # as recipes/pretrain.py
            self.optimizer = FusedAdamW(model.parameters(), lr=learning_rate, compute_copies=copies)
        else:
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)

    def __call__(self, ids):
        """ids (B, S) int64 -> the loss, left on the device."""
        with autocast(self.job):
            loss = self.forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if self.fused:
            self.optimizer.clip_gradients(self.model.parameters(), 1.0)
        elif self.clips:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if hasattr(self.model, "update_expert_bias"):
            self.model.update_expert_bias()
        return loss.detach()

    def load(self, ids):
        """Largest over mean expert load of the worst layer: ours of the last step, the library's of one forward."""
        return expert_load(self.model, ids, lambda: autocast(self.job))


def expert_load(model, ids, context=contextlib.nullcontext):
    if hasattr(model, "expert_load_max_over_mean"):
        return max(model.expert_load_max_over_mean().values(), default=None)
    loads = []

    def count(module, arguments):
        loads.append(torch.bincount(arguments[1].flatten(), minlength=module.num_experts))

    hooks = [layer.mlp.experts.register_forward_pre_hook(count)
             for layer in model.model.layers if hasattr(layer.mlp, "experts")]  # fmt: skip
    try:
        with torch.no_grad(), context():
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return max((float(load.max() * load.numel() / load.sum()) for load in loads), default=None)


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


class StepClock:
    """Times between marks without waiting for the device: CUDA events, on a CPU the host's clock."""

    def __init__(self, device):
        self.device, self.marks = device, []

    def mark(self):
        if self.device == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self):
        """Of each step between two marks."""
        synchronize(self.device)
        pairs = zip(self.marks, self.marks[1:])
        return [a.elapsed_time(b) if self.device == "cuda" else (b - a) * 1e3 for a, b in pairs]


def token_batches(job, count=8):
    """`count` batches of random tokens on the device: routing is real, not the same in each step."""
    generator = torch.Generator().manual_seed(job.get("seed", 0))
    shape = (count, job["batch"], job["length"])
    return torch.randint(2, job["fields"]["vocab_size"], shape, generator=generator).to(job["device"])


def time_steps(job, step, batches):
    """(milliseconds of the timed steps, seconds of the first step) of `step(ids)`."""
    synchronize(job["device"])
    start = time.perf_counter()
    step(batches[0])
    synchronize(job["device"])
    first = time.perf_counter() - start
    for index in range(1, job["warmup"]):
        step(batches[index % len(batches)])
    from recipes.garbage import collecting_at_steps

    clock = StepClock(job["device"])
    clock.mark()
    with collecting_at_steps(not job.get("collects")):  # as the recipes' trainers
        for index in range(job["steps"]):
            step(batches[index % len(batches)])
            clock.mark()
    return clock.milliseconds(), first


def step_figures(job, milliseconds):
    """Speed from the steps' times: median, 10 and 90 % quantiles, mean; MFU by the formula of recipes/sizing.py."""
    from recipes.sizing import device_peak_flops, flops_per_token

    tokens, median = job["batch"] * job["length"], statistics.median(milliseconds)
    deciles = statistics.quantiles(milliseconds, n=10, method="inclusive") if len(milliseconds) > 1 else [median] * 9
    peak, _ = device_peak_flops(job["device"])
    flops = flops_per_token(our_config(job["fields"]), job["length"])
    speed = tokens / median * 1e3
    return {
        "tokens_per_second": round(speed), "step_ms": round(median, 2), "step_ms_10": round(deciles[0], 2),
        "step_ms_90": round(deciles[-1], 2), "mean_ms": round(statistics.mean(milliseconds), 2),
        "mfu_percent": round(100 * speed * flops / peak, 2) if peak else None, "tokens_per_step": tokens,
    }  # fmt: skip


def memory_figures(job):
    if job["device"] != "cuda":
        return {}
    gib = 2**30
    return {"peak_gib": round(torch.cuda.max_memory_allocated() / gib, 2),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / gib, 2)}  # fmt: skip


def first_step_figures(job, ready, first):
    """Seconds of the first step alone, and from the start of the process to its end. ready: time.time() before it."""
    return {"first_step_s": round(first, 2), "process_to_first_step_s": round(ready - job["spawned"] + first, 1)}


def measure_bare(job):
    """One line of results of a bare loop."""
    model = build_model(job)
    step, batches = BareStep(job, model), token_batches(job)
    synchronize(job["device"])
    ready = time.time()
    milliseconds, first = time_steps(job, step, batches)
    load = None if "compiled" in job["variant"] and job["device"] != "cuda" else step.load(batches[0])
    return {
        **step_figures(job, milliseconds), **memory_figures(job), **first_step_figures(job, ready, first),
        "load_max_over_mean": None if load is None else round(load, 3),
        "experts": getattr(model.config, "_experts_implementation", None),
    }  # fmt: skip


def table_rows(lines, name, columns):
    """A headline and a row for each of `lines`, dicts: `name`'s value, then `columns`, (key, label, width, format), or
    the error in their place."""
    rows = [f"{name:22} " + " ".join(f"{label:>{width}}" for _, label, width, _ in columns)]
    for line in lines:
        cells = [" " * width if line.get(key) is None else f"{line[key]:{width}{form}}"
                 for key, _, width, form in columns]  # fmt: skip
        rows.append(f"{line[name]:22} " + (f"error: {line['error']}" if "error" in line else " ".join(cells)))
    return rows
