"""What one device holds in training under a layout of `launch_layouts`, in bytes.

Counted: parameters, gradients, optimizer states. Derived: activations, logits and a layer's backward
(`activation_memory`). From the frameworks' documentation and source: buffers, that is

    one GPU, mixed precision   the 16-bit copies of all weights but the embedding, kept for the backward (and, but for
                               full checkpointing, for the next step)
    ddp                        those, and the gradients, which lie in the buckets that are averaged all the time
    fsdp2                      two layers gathered in 16 bits, one layer's gradient, embedding and head with theirs
    fsdp2_ep                   the same of what is not an expert, the experts' 16-bit copies, the rows on their way
    zero2, zero3               DeepSpeed's buckets (its defaults) and, with zero3, its live parameters, at least a layer

and in all the joined gate and up matrices. Checked against peaks on one H100, not against several GPUs.
"""

from dataclasses import dataclass

from recipes.activation_memory import (
    activation_bytes,
    backward_bytes,
    layer_bytes,
    layer_kinds,
    loss_bytes,
    packed_weight_bytes,
)
from recipes.sizing import USABLE_SHARE, meta_model

# DeepSpeed's defaults, in elements: buckets to reduce and to gather, live and prefetched parameters of stage 3.
ZERO_BUCKET, ZERO_LIVE, ZERO_PREFETCH = 500_000_000, 1_000_000_000, 50_000_000
NARROW = 2  # bytes of bf16


@dataclass(frozen=True)
class ModelShape:
    """Parameter counts that decide what a layout holds."""

    config: object
    total: int
    experts: int  # routed experts of all layers
    largest_layer: int
    largest_dense: int  # the largest layer without its routed experts
    ends: int  # embedding and head


def model_shape(config):
    """The `ModelShape` of a deepseek_r1 config, from the model on the meta device."""
    model = meta_model(config)
    layers = [(sum(p.numel() for p in layer.parameters()),
               sum(p.numel() for name, p in layer.named_parameters() if ".experts." in name))
              for layer in model.base_model.layers]  # fmt: skip
    ends = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    return ModelShape(
        config, sum(p.numel() for p in model.parameters()), sum(experts for _, experts in layers),
        max(size for size, _ in layers), max(size - experts for size, experts in layers),
        sum(size for size in {id(weight): weight.numel() for weight in ends}.values()),
    )  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What each device does: `rows` of `length` tokens in a micro-batch; `masters`: fp32 weights with bf16 compute,
    else bf16 weights; `accumulates`: several micro-batches a step; `averages`: keeps `ema_decay`'s average."""

    rows: int
    length: int
    masters: bool = True
    checkpointing: bool = False
    accumulates: bool = False
    averages: bool = False

    @property
    def weight_bytes(self):
        return 4 if self.masters else NARROW


@dataclass(frozen=True)
class Footprint:
    """{part: bytes} of one device, the largest moment of a step, and bytes of host memory a device."""

    parts: dict
    peak: int
    host: int = 0

    def fits(self, device_bytes):
        return self.peak <= device_bytes * USABLE_SHARE


def _buffers(shape, layout, devices, work, tokens, expert_ranks):
    config, checkpointing = shape.config, work.checkpointing
    packed = packed_weight_bytes(config, NARROW, checkpointing) // _tensor_shards(layout, devices)
    if layout.deepspeed:
        buckets = min(ZERO_BUCKET, shape.total) * (1 if layout.gathers else 2)
        live = 0
        if layout.gathers:  # a layer with its gradient, however large it is
            live = max(min(ZERO_LIVE, shape.total), shape.largest_layer) + min(ZERO_PREFETCH, shape.total)
            buckets = max(buckets, shape.largest_layer)
        return packed + NARROW * (live + buckets)
    if layout.gathers:
        layer = shape.largest_dense if layout.name == "fsdp2_ep" else shape.largest_layer
        gathered = shape.total - shape.ends + layer if layout.keeps else 3 * layer
        size = packed + NARROW * (gathered + 2 * shape.ends)
        if layout.name == "fsdp2_ep":
            size += 2 * tokens * (config.num_experts_per_tok or 0) * config.hidden_size * NARROW
            size += NARROW * shape.experts // expert_ranks if work.masters and not checkpointing else 0
        return size
    buckets = work.weight_bytes * shape.total if layout.name == "ddp" and devices > 1 else 0
    if not work.masters:
        return packed + buckets
    copied = shape.total - shape.ends // 2  # the embedding is looked up
    if checkpointing:  # autocast keeps its copies; the experts' are made anew for each layer
        copied += shape.largest_layer - shape.largest_dense - shape.experts
    return packed + buckets + NARROW * copied // _tensor_shards(layout, devices)


def _tensor_shards(layout, devices):
    return devices if layout.name == "tensor_parallel" else 1


def _room(layout, expert_ranks):
    """Rows of experts that memory is taken for, in times of their mean: two processes of pretraining that share the
    experts take room for any routing, and wait for nothing (modeling_deepseek_r1/expert_parallel.py)."""
    return 2 if layout.name == "fsdp2_ep" and expert_ranks == 2 else 1


def _activations(shape, layout, devices, work, tokens, room):
    config = shape.config
    residual = 4 if work.masters and not (layout.gathers or layout.deepspeed) else NARROW
    whole = activation_bytes(config, tokens, NARROW, residual, work.checkpointing, room)
    if layout.name != "tensor_parallel":
        return whole
    # Residual sums and normed states are on every device, what lies between the matrices is cut.
    kinds = layer_kinds(config)
    each = 2 * config.hidden_size * (residual + NARROW)
    layers = [kinds[-1]] if work.checkpointing else kinds
    cut = sum(layer_bytes(config, sparse, NARROW, residual) - each for sparse in layers)
    return int(whole - tokens * cut * (1 - 1 / devices))


def _gradient_bytes(shape, layout, devices, work):
    """Of all parameters; none under DDP, whose buffers hold them. In one process those that bf16 products give stay
    bf16 where nothing is added to them (recipes/optimizer_copies.py); embedding and head have theirs in fp32."""
    if layout.name == "one_gpu" and work.masters and not work.accumulates:
        return NARROW * (shape.total - shape.ends) + work.weight_bytes * shape.ends
    if layout.name == "ddp" and devices > 1:
        return 0
    return work.weight_bytes * shape.total


def _shares(shape, layout, devices, expert_ranks):
    """{part: share of all weights that one device holds}."""
    split = shape.experts / shape.total if layout.name == "fsdp2_ep" else 0.0
    share = (1 - split) / devices + split / expert_ranks
    return {part: share if part in layout.sharded else 1.0 for part in ("weights", "gradients", "optimizer")}


def footprint(shape, layout, devices, work, expert_ranks=None):
    """The `Footprint` of one of `devices` devices under `layout`, with AdamW: two states of the weights' dtype.

    `expert_ranks`: under fsdp2_ep, the devices that hold each expert once (`expert_parallel_size`); None: all.
    """
    config, expert_ranks = shape.config, expert_ranks or devices
    if devices % expert_ranks or (expert_ranks != devices and layout.name != "fsdp2_ep"):
        raise ValueError(f"expert_ranks={expert_ranks} must divide the {devices} devices of {layout.name}, and is for "
                         "fsdp2_ep alone; leave it out elsewhere")  # fmt: skip
    shares = _shares(shape, layout, devices, expert_ranks)
    width = work.weight_bytes
    parts = {
        "parameters": width * shape.total * shares["weights"],
        "gradients": _gradient_bytes(shape, layout, devices, work) * shares["gradients"],
        "optimizer states": 2 * width * shape.total * shares["optimizer"],
        "weights' average": 4 * shape.total * shares["weights"] if work.averages else 0,
    }
    if layout.deepspeed:  # 16-bit weights and gradients, fp32 masters and states beside them
        parts |= {
            "parameters": NARROW * shape.total * shares["weights"] + 4 * shape.total / devices,
            "gradients": NARROW * shape.total * shares["gradients"], "optimizer states": 8 * shape.total / devices,
        }  # fmt: skip
    host = 0
    if layout.offloads:
        host = sum(parts.values())
        parts = dict.fromkeys(parts, 0)
    tokens = work.rows * work.length // (layout.group or 1)
    shards = _tensor_shards(layout, devices)
    experts_here, room = 1 / expert_ranks if layout.name == "fsdp2_ep" else 1, _room(layout, expert_ranks)
    parts |= {
        "buffers": _buffers(shape, layout, devices, work, tokens, expert_ranks),
        "activations": _activations(shape, layout, devices, work, tokens, room),
        "logits": loss_bytes(config, tokens, NARROW),
        "backward of a layer": backward_bytes(config, tokens, NARROW, experts_here, room) // shards,
    }
    parts = {name: int(size) for name, size in parts.items()}
    return Footprint(parts, _peak(parts, work.accumulates), int(host))


def _peak(parts, accumulates):
    """The forward's end or the step: activations go as gradients come, unless gradients of a micro-batch are kept."""
    held = sum(parts[name] for name in ("parameters", "optimizer states", "weights' average", "buffers"))
    moving = parts["activations"] + max(parts["logits"], parts["backward of a layer"])
    return held + (moving + parts["gradients"] if accumulates else max(moving, parts["gradients"]))
