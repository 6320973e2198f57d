"""A training step on n GPUs under a layout of recipes/launch/: its parts in seconds, and the best of its settings.

What each layout sends (docs/launch.md; recipes/sharding.py, modeling_deepseek_r1/expert_parallel.py):

    ddp              gradients, all-reduced once a step, beside the last backward
    fsdp2            each layer's 16-bit weights gathered twice and its gradients reduced and scattered in fp32, in
                     every micro-batch: 8 bytes a weight; and copied on the GPU, into and out of what is sent
    fsdp2_ep         that for what is no expert; a token's state once to each GPU with an expert for it and back,
                     forward and backward; with replicas of the experts, their gradients all-reduced after the backward
    tensor_parallel  four all-reduces of all states in a layer (six with checkpointing), waited for
    context_parallel as fsdp2, and keys and values of each layer to the other GPU of the pair, their gradients back

Assumed: experts are chosen evenly but for `imbalance`; `overlap` of what can run beside computation does, if there is
enough of it, and slows it down by nothing; the two exchanges that run beside the shared experts hide behind these
alone; other exchanges, sums of experts' gradients and the update are waited for; every micro-batch's gradients are
reduced. Not in it: reading data, saving, stragglers, failures.
"""

from dataclasses import dataclass, replace

from benchmarks.scale_compute import NARROW, WIDE, compute_seconds, optimizer_seconds
from benchmarks.scale_network import shares_a_token
from recipes.launch_layouts import LAYOUTS, check_divides, check_global_batch
from recipes.launch_memory import Work, footprint
from recipes.launch_plan import micro_batches
from recipes.parallel_settings import divisors

NAMES = ("one_gpu", "ddp", "fsdp2", "fsdp2_ep", "tensor_parallel", "context_parallel")
BUCKET = 64 * 2**20  # of experts' gradients, in fp32


@dataclass(frozen=True)
class Constants:
    """What the model takes from two GPUs where they were measured (benchmarks/scale_fit.py). `ddp_overlap`,
    `fsdp_overlap`: the share of the traffic that runs beside computation; `layer_wait`: seconds for which a GPU stands
    still in each layer of experts until the host knows how many rows come; `imbalance`: rows of the busiest GPU's
    experts over the mean; `speed`: seconds of computation over those of the profile."""

    ddp_overlap: float = 0.8
    fsdp_overlap: float = 0.8
    layer_wait: float = 150e-6
    imbalance: float = 1.1
    speed: float = 1.0

    def __post_init__(self):
        for name, least, most in (("ddp_overlap", 0, 1), ("fsdp_overlap", 0, 1), ("layer_wait", 0, 1),
                                  ("imbalance", 1, 100), ("speed", 0.01, 100)):  # fmt: skip
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [{least}, {most}]")


@dataclass(frozen=True)
class Setting:
    """A layout on `devices` GPUs: `group` GPUs share the experts (fsdp2_ep) or the rows; `rows` in a micro-batch."""

    layout: str
    devices: int
    rows: int
    accumulation: int = 1
    masters: bool = True
    checkpointing: bool = False
    group: int = 1

    @property
    def ranks(self):
        """Micro-batches that are computed at a time."""
        return self.devices // (self.group if self.layout in ("tensor_parallel", "context_parallel") else 1)

    @property
    def global_rows(self):
        return self.rows * self.accumulation * self.ranks

    @property
    def sharded(self):
        return LAYOUTS[self.layout].gathers

    def memory(self, model):
        """The `Footprint` by recipes/launch_memory.py."""
        work = Work(self.rows, model.length, self.masters, self.checkpointing, self.accumulation > 1)
        experts = self.group if self.layout == "fsdp2_ep" else None
        return footprint(model.shape, LAYOUTS[self.layout], self.devices, work, experts)

    def weights(self, shape):
        """(those gathered for a pass, those that this GPU updates)."""
        if self.layout == "fsdp2_ep":
            dense = shape.total - shape.experts
            return dense, dense / self.devices + shape.experts / self.group
        return (shape.total if self.sharded else 0), shape.total / (1 if self.layout in ("one_gpu", "ddp")
                                                                    else self.devices)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """`parts`: {what: seconds} of a whole step, what runs beside computation left out."""

    setting: Setting
    parts: dict
    tokens: int
    flops: float

    @property
    def seconds(self):
        return sum(self.parts.values())

    @property
    def waits(self):
        """Seconds for which the GPUs wait for each other."""
        return sum(seconds for name, seconds in self.parts.items() if name.startswith("wait"))

    @property
    def tokens_per_gpu(self):
        return self.tokens / self.seconds / self.setting.devices

    def mfu(self, peak):
        return self.tokens_per_gpu * self.flops / peak


def step(model, setting, rates, network, constants):
    """The `Step` of `model` under `setting`."""
    tokens = setting.rows * model.length
    busy = _micro_batch(model, setting, rates, network, constants, tokens)
    parts = {name: seconds * setting.accumulation for name, seconds in busy.items()}
    # Gradients of DDP go beside the backward of the last micro-batch, two thirds of it.
    last = sum(seconds for name, seconds in busy.items() if not name.startswith("wait")) * 2 / 3
    parts |= _once_a_step(model, setting, rates, network, constants, last)
    return Step(setting, parts, setting.global_rows * model.length, model.flops_per_token)


def _micro_batch(model, setting, rates, network, constants, tokens):
    residual = WIDE if setting.masters and not setting.sharded else NARROW
    experts = setting.group if setting.layout == "fsdp2_ep" else 1
    here = tokens // (setting.group if setting.layout == "context_parallel" else 1)
    busy = compute_seconds(model, rates, here, setting.checkpointing, residual, experts,
                           constants.imbalance if experts > 1 else 1.0,
                           setting.group if setting.layout == "tensor_parallel" else 1)  # fmt: skip
    busy["copies of weights"] = _copied_bytes(model, setting) / rates.elementwise
    busy = {name: seconds * constants.speed for name, seconds in busy.items()}
    computing = sum(busy.values())
    gathered, layers = _gathers(model, setting, network), len(model.kinds)
    if gathered:
        busy["wait: weights and gradients"] = gathered - min(constants.fsdp_overlap * gathered, computing)
    again = 1 if setting.checkpointing else 0
    if experts > 1:
        shared = model.shared_flops / 3 * here / rates.dense
        busy["wait: tokens to experts"] = sum(model.kinds) * _exchange(model, setting, network, constants, here, shared)
        busy["wait: counts of rows"] = sum(model.kinds) * (1 + again) * constants.layer_wait
    if setting.layout == "tensor_parallel":
        states = here * model.config.hidden_size * NARROW
        busy["wait: states"] = layers * (4 + 2 * again) * network.all_reduce(states, setting.group, bucket=states)
    if setting.layout == "context_parallel":
        width = model.config.num_attention_heads * (model.config.qk_head_dim + model.config.v_head_dim)
        sent = network.all_to_all(here * width * NARROW, setting.group)
        busy["wait: keys and values"] = layers * (3 + again) * sent * (1 - constants.fsdp_overlap)
    return busy


def _copied_bytes(model, setting):
    """Casts and copies of weights and gradients in a micro-batch, beside what optimizer and matmuls touch."""
    shape, experts = model.shape, 0
    if setting.layout in ("ddp", "tensor_parallel"):
        return 12 * shape.total / (setting.group if setting.layout == "tensor_parallel" else 1) * setting.masters
    gathered, _ = setting.weights(shape)
    if setting.layout == "fsdp2_ep":
        added = 12 if setting.accumulation > 1 else 0
        cast = (6 + 6 + (6 if setting.checkpointing else 0)) if setting.masters else 0
        experts = (cast + added * (1 if setting.masters else 0.5)) * shape.experts / setting.group
    return 14 * gathered + experts  # out of two gathers, 16 bits each, and 16 bits into fp32


def _gathers(model, setting, network):
    """Seconds in which a micro-batch's weights are gathered twice and its gradients scattered: a group a layer, and
    embedding and head."""
    gathered, _ = setting.weights(model.shape)
    if not gathered:
        return 0.0
    ends, count = model.shape.ends, len(model.kinds)
    sizes = [((gathered - ends) / count, count), (ends / 2, 2)]
    return sum(many * (2 * network.ring(NARROW * size, setting.devices) + network.ring(WIDE * size, setting.devices))
               for size, many in sizes)  # fmt: skip


def _exchange(model, setting, network, constants, tokens, shared):
    """Seconds that a layer of experts waits for its exchanges. Two of them, and with checkpointing a third, run beside
    the shared experts, `shared` seconds forward and twice as many backward."""
    config, ranks = model.config, setting.group
    rows = tokens * shares_a_token(config, ranks) * constants.imbalance
    row = config.hidden_size * NARROW
    there = network.all_to_all(rows * (row + 8 * config.num_experts_per_tok), ranks)
    back = network.all_to_all(rows * row, ranks)
    hidden = (1 + setting.checkpointing) * max(0.0, there - shared) + max(0.0, there - 2 * shared)
    return 2 * back + hidden


def _once_a_step(model, setting, rates, network, constants, last):
    """The update, and sums of gradients; `last`: seconds of the last backward."""
    shape, width = model.shape, WIDE if setting.masters else NARROW
    _, own = setting.weights(shape)
    parts = {"optimizer": constants.speed * optimizer_seconds(
        model, rates, own, setting.masters, setting.layout == "one_gpu" and setting.accumulation == 1)}  # fmt: skip
    if setting.layout == "ddp":
        sent = network.all_reduce(width * shape.total, setting.devices)
        parts["wait: gradients"] = sent - min(constants.ddp_overlap * sent, last)
    replicas = setting.devices // setting.group if setting.layout == "fsdp2_ep" else 1
    if replicas > 1:
        size = width * shape.experts / setting.group
        sent = network.all_reduce(size, replicas, setting.group, BUCKET)
        parts["wait: experts' gradients"] = sent + 4 * size / rates.elementwise  # joined and taken apart
    return parts


# ---------------------------------------------------------------- the best setting


def groups(model, layout, devices, node):
    """The sizes of groups to try. Raises ValueError where the layout does not suit the devices or the model."""
    if layout == "fsdp2_ep":  # the planner's check is for experts over all devices
        sizes = [size for size in divisors(devices, model.config.n_routed_experts or 1) if size > 1]
        if not sizes:
            check_divides("n_routed_experts", model.config.n_routed_experts, "gpus", devices)
        return sizes
    if layout == "tensor_parallel":
        if devices > node:
            raise ValueError(f"gpus={devices}: tensor_parallel all-reduces in every layer; use at most {node}")
        LAYOUTS[layout].check(model.config, devices)
        return [devices]
    LAYOUTS[layout].check(model.config, devices)
    return [LAYOUTS[layout].group or 1]


def best(model, layout, devices, rows, rates, network, constants, device_bytes, masters=True):
    """The quickest `Step` that fits, of all groups, micro-batches and with or without checkpointing.

    With fewer rows than ranks each takes one, so that the batch is larger.
    Raises:
        ValueError: if the layout does not suit the devices, they cannot share the rows, or nothing fits.
    """
    found, least = [], None
    for size in groups(model, layout, devices, network.node):
        whole = Setting(layout, devices, 1, 1, masters, False, size)
        each = max(rows, whole.ranks)
        check_global_batch(each, whole.ranks)
        one_row = replace(whole, checkpointing=True).memory(model)  # the least that it takes
        least = min(least or one_row.peak, one_row.peak)
        if not one_row.fits(device_bytes):
            continue
        for micro in micro_batches(each // whole.ranks, model.length):
            for checkpointing in (False, True):
                setting = replace(whole, rows=micro, accumulation=each // whole.ranks // micro,
                                  checkpointing=checkpointing)  # fmt: skip
                if setting.memory(model).fits(device_bytes):
                    found.append(step(model, setting, rates, network, constants))
    if not found:
        raise ValueError(f"gpus={devices}: {layout} does not fit, one row takes {least / 2**30:.0f} GiB a GPU")
    return max(found, key=lambda each: each.tokens_per_gpu)
