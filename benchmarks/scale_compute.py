"""The time that one GPU computes for, from a model's shape and one profiled step: the first half of plan_scale.py.

Every kernel is one of these, with a rate that the profile of the reference config gives (rates are not taken to rise
with wider matrices, although they may):

    dense matmul    6 FLOPs a token and weight that every token visits, the head once a prediction
    grouped matmul  6 a token and weight of the experts it visits; half a tile of rows is lost at each expert; at least
                    the time to read and write the weights
    attention       6 L H (d_qk + d_v) S / 2 a token
    elementwise     everything between them: bytes, counted below, at the rate that they were seen to move at
    optimizer       28 bytes a weight in fp32 and 14 in bf16 (recipes/kernels_adamw.py), and a read of the gradients
    gaps            between launches, as many for each layer as there were

Full activation checkpointing computes the layers' forward parts again, not the head's.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from recipes.activation_memory import layer_kinds, trained_depths
from recipes.launch_memory import model_shape
from recipes.sizing import count_parameters, flops_per_token

ROOT = Path(__file__).resolve().parents[1]
PROFILE = ROOT / "benchmarks" / "results" / "2026-11-23_bench_train" / "profile.jsonl"
HALF_TILE = 64  # rows
NARROW, WIDE = 2, 4  # bytes
# The library's step at the reference config without our kernels: of 241 ms 101 are matmuls, attention and optimizer
# (PEERS.md), of which ours has 25 for the rest: what tensor parallelism, which takes plain torch, pays.
PLAIN_TORCH = (241 - 101) / 25


@dataclass(frozen=True)
class Model:
    """A config with its counts. `length`: tokens a row."""

    name: str
    config: object
    length: int

    @cached_property
    def shape(self):
        return model_shape(self.config)

    @cached_property
    def parameters(self):
        return count_parameters(self.config)

    @cached_property
    def kinds(self):
        """[sparse?] of the layers that a step runs, those of multi-token prediction included."""
        return layer_kinds(self.config)[: self.config.num_hidden_layers + trained_depths(self.config)]

    @property
    def predictions(self):
        return 1 + trained_depths(self.config)

    @cached_property
    def flops(self):
        """{kind: training FLOPs of a token}, and "head", the part of the dense ones that is not computed again."""
        routed = 6 * self.shape.experts * self.config.num_experts_per_tok / self.config.n_routed_experts
        total = flops_per_token(self.config, self.length, self.parameters)
        config = self.config
        attention = 3 * len(layer_kinds(config)) * config.num_attention_heads * self.length
        attention *= config.qk_head_dim + config.v_head_dim
        head = 6 * self.parameters.head * self.predictions
        return {"dense": total - attention - routed, "grouped": routed, "attention": attention, "head": head}

    @property
    def flops_per_token(self):
        return flops_per_token(self.config, self.length, self.parameters)

    @property
    def shared_flops(self):
        """Of a token in one layer's shared experts, forward."""
        config = self.config
        return 6 * config.hidden_size * config.moe_intermediate_size * (config.n_shared_experts or 0)


def elementwise_bytes(model, residual=NARROW, shards=1):
    """(forward, backward) of all layers and (of the loss), bytes a token, read and written between the matrix
    products. `residual`: bytes of a value of the residual stream; `shards`: GPUs that heads and inner widths are cut
    over."""
    config = model.config
    hidden, choices = config.hidden_size, config.num_experts_per_tok
    heads, inner = config.num_attention_heads / shards, config.moe_intermediate_size / shards
    keys, values, rope = config.qk_head_dim, config.v_head_dim, config.qk_rope_head_dim
    latents = config.kv_lora_rank + (config.q_lora_rank or 0)
    forward = backward = 0
    for sparse in model.kinds:
        # Two norms with the residual sum before them, and those of the latents.
        forward += 2 * hidden * (2 * residual + 2 * NARROW) + 2 * latents * NARROW
        backward += 2 * hidden * (3 * residual + NARROW) + 3 * latents * NARROW
        # Queries and keys put together and rotated, and taken apart.
        forward += NARROW * (heads * (3 * keys + config.qk_nope_head_dim) + rope)
        backward += NARROW * (heads * (3 * keys + 2 * values + config.qk_nope_head_dim) + rope)
        wide = inner * (config.n_shared_experts or 0) if sparse else config.intermediate_size / shards
        forward, backward = forward + 3 * wide * NARROW, backward + 6 * wide * NARROW
        if sparse:  # gathered, gated, summed up; logits of the router in fp32
            rows = (2 * choices + 4) * hidden
            forward += NARROW * (rows + 3 * inner * choices) + 2 * WIDE * config.n_routed_experts
            backward += NARROW * (rows + 6 * inner * choices) + 2 * WIDE * config.n_routed_experts
    return forward, backward, 2 * NARROW * config.vocab_size * model.predictions


@dataclass(frozen=True)
class Rates:
    """FLOP/s of the matmuls and attention, bytes/s of what is elementwise and of the optimizer, launches and gaps."""

    dense: float
    grouped: float
    attention: float
    elementwise: float
    optimizer: float
    gap: float
    layer_launches: float
    step_launches: float


def read_profile(path=PROFILE):
    """{kind: ms} and launches of a line of `bench_train.py --profile`; attention with what cuDNN runs around it.

    Raises:
        ValueError: for a file without such a line.
    """
    lines = [json.loads(line) for line in Path(path).read_text().splitlines() if line.startswith("{")]
    line = next((line for line in lines if "kinds_ms" in line), None)
    if line is None:
        raise ValueError(f"profile={str(path)!r} has no line with kinds_ms; write one with "
                         "python benchmarks/bench_train.py --profile --variants bare-bf16-fused")  # fmt: skip
    kinds = line["kinds_ms"]
    around = sum(each["ms"] for each in line["top"] if each["kind"] == "other" and "cudnn" in each["kernel"])
    main = {"dense": kinds["dense matmul"], "grouped": kinds["grouped matmul"],
            "attention": kinds["attention"] + around, "optimizer": kinds["optimizer"]}  # fmt: skip
    step_launches = line["kinds_launches"]["optimizer"]
    return main | {"elementwise": line["busy_ms"] - sum(main.values()), "idle": line["idle_ms"],
                   "span": line["span_ms"], "launches": line["launches"], "step_launches": step_launches}  # fmt: skip


def tile_factor(rows):
    return 1 + HALF_TILE / rows


def calibrate(model, tokens=16_384, path=PROFILE):
    """The `Rates` at which `model`, in bf16 with `tokens` tokens a step, takes the profile's times."""
    seen = read_profile(path)
    rows = tokens * model.config.num_experts_per_tok / model.config.n_routed_experts
    speed = lambda kind, work: work * tokens / seen[kind] * 1e3
    return Rates(
        dense=speed("dense", model.flops["dense"]), attention=speed("attention", model.flops["attention"]),
        grouped=speed("grouped", model.flops["grouped"]) * tile_factor(rows),
        elementwise=speed("elementwise", sum(elementwise_bytes(model))),
        optimizer=(14 + 2) * model.shape.total / seen["optimizer"] * 1e3,
        gap=seen["idle"] / seen["launches"] / 1e3,
        layer_launches=(seen["launches"] - seen["step_launches"]) / len(model.kinds),
        step_launches=seen["step_launches"] / len(model.kinds),
    )  # fmt: skip


def compute_seconds(
    model, rates, tokens, checkpointing=False, residual=NARROW, expert_ranks=1, imbalance=1.0, shards=1
):
    """{part: seconds} of forward and backward of `tokens` tokens of one GPU; with `expert_ranks`, of as many from
    elsewhere as leave, `imbalance` times as many at the busiest. `shards`: tensor parallel, which takes plain torch."""
    flops, again = model.flops, 4 / 3 if checkpointing else 1.0
    config = model.config
    rows = max(1.0, tokens * config.num_experts_per_tok * expert_ranks / config.n_routed_experts)
    grouped = again * flops["grouped"] * tokens * imbalance * tile_factor(rows) / rates.grouped
    moved = (3 if checkpointing else 2) * NARROW * model.shape.experts / expert_ranks  # read; gradients written
    moved += NARROW * model.shape.experts / expert_ranks
    forward, backward, loss = elementwise_bytes(model, residual, shards)
    between = forward * (2 if checkpointing else 1) + backward + loss
    return {
        "dense matmul": ((flops["dense"] - flops["head"]) * again + flops["head"]) * tokens / rates.dense / shards,
        "grouped matmul": max(grouped, moved / rates.elementwise) / shards,
        "attention": flops["attention"] * again * tokens / rates.attention / shards,
        "elementwise": between * tokens / rates.elementwise * (PLAIN_TORCH if shards > 1 else 1),
        "gaps": rates.gap * rates.layer_launches * len(model.kinds) * again,
    }


def optimizer_seconds(model, rates, weights, masters, narrow_gradients=False):
    """The update of `weights` weights of one GPU with the norm of their gradients. `narrow_gradients`: those of fp32
    weights are bf16 until it (one process, recipes/optimizer_copies.py)."""
    norm = NARROW if narrow_gradients or not masters else WIDE
    moved = (28 if masters else 14) + norm
    return moved * weights / rates.optimizer + rates.gap * rates.step_launches * len(model.kinds)
