"""The settings of how a model is spread over processes: experts, tensors; and what they cannot be combined with."""

import os
from dataclasses import dataclass

from recipes.run_settings import setting
from recipes.zero_setup import zero_stage


def launched_with(args, kind):
    """Whether the launch file or the training arguments ask for `kind`, FSDP or DEEPSPEED."""
    given = args.fsdp_plugin_args if kind == "FSDP" else args.deepspeed
    return bool(given) or os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true"


def divisors(number, *others):
    """The numbers that divide all."""
    return [each for each in range(1, number + 1) if not any(other % each for other in (number, *others))]


def context_parallel_size(args):
    """Processes that share each row, as the launch file (or `parallelism_config`) says."""
    if getattr(args, "parallelism_config", None) is not None:
        return args.parallelism_config.cp_size
    wanted = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true"
    return int(os.environ.get("PARALLELISM_CONFIG_CP_SIZE", "1")) if wanted else 1


def data_parallel_size(args):
    """Processes that have rows of their own: all, but for those that compute the same rows or parts of them."""
    return args.world_size // getattr(args, "tensor_parallel_size", 1) // context_parallel_size(args)


@dataclass
class ParallelSettings:
    """Put in front of `transformers.TrainingArguments`, as recipes/optimizers.OptimizerSettings.

    Raises:
        ValueError: for sizes that do not divide the processes, and for what cannot be combined with them.
    """

    expert_parallel_size: int = setting(
        1,
        "Processes that share the routed experts of each layer, so that tokens travel to them (1: each has all). The "
        "rest is as the launch file says: whole (ddp.yaml) or sharded (fsdp2_ep.yaml).",
    )
    tensor_parallel_size: int = setting(
        1, "Processes that compute the same rows, each with a part of every matrix (tensor_parallel.yaml)."
    )

    # Those of the sizes that the stage can do with; others are refused.
    spreads = ("expert_parallel_size", "tensor_parallel_size")
    # Whether all processes have equally many tokens in every micro-batch of training.
    equal_rows = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("expert_parallel_size", "tensor_parallel_size"):
            size = getattr(self, name)
            if size < 1 or self.world_size % size:
                raise ValueError(f"{name}={size} must divide the {self.world_size} processes of this run; use one of "
                                 f"{divisors(self.world_size)}, or launch more")  # fmt: skip
            if size > 1 and name not in self.spreads:
                raise ValueError(f"{name}={size}: this stage is not made for it; use 1, with ddp.yaml or fsdp2.yaml")
        if self.expert_parallel_size > 1:
            self._check_alone("expert_parallel_size", self._obstacles_of_experts())
        if self.tensor_parallel_size > 1:
            self._check_alone("tensor_parallel_size", self._obstacles_of_tensors())

        self.check_tasks()

    def check_tasks(self):
        """ValueError for tasks in a run whose weights are spread over processes."""
        tasks = getattr(self, "eval_tasks", None)
        spread = self.expert_parallel_size * self.tensor_parallel_size > 1 or launched_with(self, "FSDP")
        spread = spread or zero_stage(self) == 3
        if tasks and spread:
            raise ValueError(f"eval_tasks={tasks}: each process answers problems of its own, with a whole model, and "
                             "this one is spread over processes; leave it out, and evaluate the saved folder with "
                             "recipes/eval.py")  # fmt: skip

    def _check_alone(self, name, obstacles):
        for present, why in obstacles:
            if present:
                raise ValueError(f"{name}={getattr(self, name)} with {why}")

    def _obstacles_of_experts(self):
        adapters = getattr(self, "lora_rank", 0) or getattr(self, "load_in_4bit", False)
        return (
            (self.tensor_parallel_size > 1, f"tensor_parallel_size={self.tensor_parallel_size}: use one of the two"),
            (launched_with(self, "DEEPSPEED"), "DeepSpeed, which moves the parameters itself: use ddp.yaml or "
             "fsdp2_ep.yaml"),
            (self.fp16, "fp16=true, whose loss scale each process would set by its own experts: use bf16=true"),
            (getattr(self, "ema_decay", 0.0), f"ema_decay={getattr(self, 'ema_decay', 0.0)}, which averages whole "
             "models: use ema_decay=0"),
            (adapters, "adapters or a quantised model, which wrap the experts: use expert_parallel_size=1"),
        )  # fmt: skip

    def _obstacles_of_tensors(self):
        adapters = getattr(self, "lora_rank", 0) or getattr(self, "load_in_4bit", False)
        resumes = str(getattr(self.save_strategy, "value", self.save_strategy)) != "no" and not self.save_only_model
        return (
            (launched_with(self, "DEEPSPEED") or launched_with(self, "FSDP"), "DeepSpeed or FSDP, which shard the "
             "model once more: use tensor_parallel.yaml"),
            (resumes or getattr(self, "async_save", False), "checkpoints to resume from, which neither the library nor "
             "these recipes write of such a model: set save_only_model=true, or save_strategy=no"),
            (getattr(self, "ema_decay", 0.0), f"ema_decay={getattr(self, 'ema_decay', 0.0)}, which averages whole "
             "models: use ema_decay=0"),
            (adapters, "adapters or a quantised model: use tensor_parallel_size=1"),
        )  # fmt: skip
