"""What a run of reinforcement learning will hold in a device's memory, before its first step.

    plan = memory_plan(trainer.args, trainer.model, trainer.ref_model, [model_reward])
    print(plan.table())
    for line in plan.check(): ...      # warnings; ValueError where the weights alone do not fit

Weights are counted as they are; activations come from `recipes/sizing.py`, whose assumptions hold here too. A rollout
and an update follow each other: the peak is the larger of the two.
"""

import inspect
from dataclasses import dataclass
from types import SimpleNamespace

from transformers.integrations import is_deepspeed_zero3_enabled

from recipes.eval_tables import aligned
from recipes.optimizers import muon_kinds
from recipes.rl_setup import causal_lm
from recipes.router_replay import bytes_per_token
from recipes.sizing import GIB, USABLE_SHARE, device_memory, memory_per_device
from recipes.zero_setup import whole_size

ALWAYS, SAMPLING, TRAINING = "always", "sampling", "training"
# Bytes a trained value of the optimizers that transformers knows; the others keep two states in the weights' dtype.
OPTIMIZER_BYTES = {"adafactor": 0.1, "sgd": 0, "8bit": 2, "4bit": 1, "lion": None, "rmsprop": None, "adagrad": None}


@dataclass(frozen=True)
class MemoryRow:
    """One entry: `bytes` on one device, during `phase`; `way_out`: the field to lower, "" where there is none."""

    name: str
    bytes: int
    phase: str
    way_out: str = ""


@dataclass(frozen=True)
class MemoryPlan:
    """The rows, and the device's `limit` in bytes; it iterates over its rows."""

    rows: list
    limit: int

    def __iter__(self):
        return iter(self.rows)

    def peak(self, *phases):
        """Bytes while sampling, while training, or (default) the larger of the two."""
        return max(sum(row.bytes for row in self.rows if row.phase in (ALWAYS, phase))
                   for phase in phases or (SAMPLING, TRAINING))  # fmt: skip

    @property
    def usable(self):
        return int(self.limit * USABLE_SHARE)

    def table(self):
        rows = [(row.name, f"{row.bytes / GIB:.3f}", row.phase) for row in self.rows if row.bytes]
        rows += [(f"peak while {phase}", f"{self.peak(phase) / GIB:.3f}", "") for phase in (SAMPLING, TRAINING)]
        rows.append((f"this device, {USABLE_SHARE:.0%} of {self.limit / GIB:.1f} GiB", f"{self.usable / GIB:.3f}", ""))
        return aligned(["memory of one device", "GiB", "held"], rows)

    def check(self):
        """[warning] where the estimate does not fit.

        Raises:
            ValueError: where weights, gradients and optimizer, which are counted and not estimated, do not fit.
        """
        fixed = [row for row in self.rows if row.phase == ALWAYS or row.name == "gradients"]
        total = sum(row.bytes for row in fixed)
        if total > self.limit:
            raise ValueError(
                f"weights, gradients and optimizer take {total / GIB:.2f} GiB, the device has "
                f"{self.limit / GIB:.2f}: {_ways_out(fixed)}"
            )
        phase = max((SAMPLING, TRAINING), key=self.peak)
        if self.peak(phase) <= self.usable:
            return []
        held = [row for row in self.rows if row.phase in (ALWAYS, phase)]
        return [
            f"{phase} is expected to take {self.peak(phase) / GIB:.2f} GiB of {self.usable / GIB:.2f} usable ones: "
            f"{_ways_out(held)}"
        ]

    def to_dict(self):
        """JSON values, sizes in GiB."""
        rows = {row.name: round(row.bytes / GIB, 4) for row in self.rows}
        peaks = {f"peak while {phase}": round(self.peak(phase) / GIB, 4) for phase in (SAMPLING, TRAINING)}
        return {"GiB": rows | peaks, "usable GiB": round(self.usable / GIB, 4)}


def _ways_out(rows):
    """What to do about the two largest rows about which something can be done."""
    largest = sorted((row for row in rows if row.way_out and row.bytes), key=lambda row: -row.bytes)[:2]
    return "; or ".join(f"{row.way_out} ({row.name}: {row.bytes / GIB:.2f} GiB)" for row in largest)


def _weight_bytes(model):
    return sum(whole_size(each) * each.element_size() for each in [*model.parameters(), *model.buffers()])


def _optimizer_bytes(name, trained):
    """Bytes of the states of `trained`, [(values, bytes of each)]."""
    values = sum(count for count, _ in trained)
    for part, size in OPTIMIZER_BYTES.items():
        if part in name:
            return sum(count * width for count, width in trained) if size is None else int(values * size)
    return sum(2 * count * width for count, width in trained)


def _muon_bytes(model):
    """Of one state a value in Muon's matrices, two in what AdamW trains."""
    kinds, named = muon_kinds(model), dict(model.named_parameters())
    return sum((2 if kind == "adamw" else 1) * whole_size(named[name]) * named[name].element_size()
               for name, kind in kinds.items())  # fmt: skip


def cache_bytes_per_token(config, width):
    """Bytes that generation keeps a token: latents (our models), or keys and values, of all layers."""
    if config.model_type == "deepseek_r1" and config.kv_lora_rank:
        return config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * width
    heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):  # the library's class expands the latents
        return config.num_hidden_layers * heads * (
            config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        ) * width  # fmt: skip
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    heads = getattr(config, "num_key_value_heads", None) or heads
    return config.num_hidden_layers * heads * 2 * size * width


def _prompt_width(args, config):
    """Tokens of the longest prompt: as set, or what the context leaves; at most as long as a completion."""
    if args.max_prompt_length:
        return args.max_prompt_length
    context = getattr(config, "max_position_embeddings", None) or 2 * args.max_completion_length
    return max(1, min(context - args.max_completion_length, args.max_completion_length))


def memory_plan(args, policy, reference=None, rewards=(), limit=None):
    """The `MemoryPlan` of one device.

    Args:
        args: the trainer's settings.
        policy, reference: models (reference None: none, or the policy without its adapter).
        rewards: reward functions; those with a `model` (`ModelReward`), and models, are counted.
        limit: bytes of the device. Default: what it has.
    """
    config, mixed = causal_lm(policy).config.get_text_config(), bool(args.bf16 or args.fp16)
    shards = args.world_size if getattr(args, "fsdp", None) or is_deepspeed_zero3_enabled() else 1
    trained = [(whole_size(each), each.element_size()) for each in policy.parameters() if each.requires_grad]
    first = next(policy.parameters())
    width = 2 if mixed else first.element_size()
    rows = [MemoryRow("weights of the policy", _weight_bytes(policy) // shards, ALWAYS, "take a smaller model, or more "
                      "devices with FSDP")]  # fmt: skip
    if mixed and first.element_size() > 2:
        copied = 2 * sum(count for count, _ in trained) // shards
        rows.append(MemoryRow("16-bit copy of the weights", copied, ALWAYS))
    rows.append(
        MemoryRow("gradients", sum(count * size for count, size in trained) // shards, TRAINING, "set lora_rank")
    )
    if args.world_size > 1 and shards == 1:
        copied = sum(count * size for count, size in trained)
        rows.append(MemoryRow("gradients in buckets (DDP)", copied, TRAINING, "set lora_rank"))
    name = str(getattr(args.optim, "value", args.optim))
    states = _optimizer_bytes(name, trained)
    if getattr(args, "optimizer", None) == "muon":
        name, states = "muon", _muon_bytes(policy)
    rows.append(
        MemoryRow(f"optimizer ({name})", states // shards, ALWAYS, "set lora_rank, or "
                  "optim=adafactor")
    )  # fmt: skip
    if getattr(args, "ema_decay", 0):
        rows.append(MemoryRow("average of the weights", 4 * sum(count for count, _ in trained), ALWAYS, "ema_decay=0"))
    if reference is not None:
        rows.append(
            MemoryRow("reference", _weight_bytes(reference) // shards, ALWAYS, "train without KL (beta=0), or with "
                      "lora_rank, whose base is the reference")
        )  # fmt: skip
    rewards = map(inspect.unwrap, rewards)  # `reward_functions.checked` wraps them
    models = [each.model if hasattr(each, "model") else each for each in rewards]
    size = sum(_weight_bytes(each) for each in models if hasattr(each, "parameters"))
    rows.append(MemoryRow("reward models", size, ALWAYS, "take a smaller reward model"))
    rows += _rollout_rows(args, policy, config, width) + _update_rows(args, config, first.element_size())
    sharing = args.world_size if args.device.type == "cpu" else 1  # processes of one host share its memory
    return MemoryPlan(rows, limit or device_memory(args.device) // sharing)


def _rollout_rows(args, policy, config, width):
    count = args.generation_batch_size // args.world_size
    tokens = _prompt_width(args, config) + args.max_completion_length
    field = "lower steps_per_generation or generation_batch_size"
    if getattr(args, "use_vllm", False) and args.vllm_mode == "colocate":
        share = args.vllm_gpu_memory_utilization
        cache = MemoryRow("vLLM", int(share * device_memory(args.device)), ALWAYS, "lower vllm_gpu_memory_utilization")
    else:
        size = count * (tokens * cache_bytes_per_token(config, width) + 4 * config.vocab_size)
        cache = MemoryRow("cache and logits of the rollout", size, SAMPLING, f"{field}, or max_completion_length")
    # Token numbers and masks of 8 bytes; three log-probabilities a token of the completion.
    kept = count * (16 * tokens + 12 * args.max_completion_length)
    rows = [cache, MemoryRow("rollout", kept, ALWAYS, field)]
    if getattr(args, "router_replay", None) is not False and getattr(causal_lm(policy), "routers", None):
        rows.append(
            MemoryRow("recorded routes", count * tokens * bytes_per_token(causal_lm(policy)), ALWAYS, field)
        )
    return rows


def _update_rows(args, config, weight_width):
    tokens = _prompt_width(args, config) + args.max_completion_length
    batch = SimpleNamespace(
        per_device_train_batch_size=args.per_device_train_batch_size, sequence_length=tokens, bf16=args.bf16,
        fp16=args.fp16, ema_decay=0,
    )  # fmt: skip
    counts = SimpleNamespace(total=0, largest_layer=0)  # weights are counted elsewhere
    checkpointing = bool(args.gradient_checkpointing) or getattr(args, "activation_checkpointing", None) or False
    halved = bool(args.bf16 or args.fp16) or weight_width == 2
    size = memory_per_device(config, batch, checkpointing=checkpointing, parameters=counts, mixed=halved)["activations"]
    way_out = "lower max_completion_length"
    if args.per_device_train_batch_size > 1:
        way_out = (
            f"lower per_device_train_batch_size={args.per_device_train_batch_size} and raise "
            "gradient_accumulation_steps by the same factor"
        )
    elif checkpointing is not True:
        way_out = "set gradient_checkpointing=true"
    return [MemoryRow("activations of a micro-batch", size, TRAINING, way_out)]
