"""The settings that stages after pretraining share: weights to start from, adapters, optimiser, tasks evaluated."""

from dataclasses import dataclass, field

import torch

from recipes.adapters import LORA_GROUPS
from recipes.distributed_settings import ProcessSettings
from recipes.evaluation import EvaluationSettings
from recipes.optimizers import OptimizerSettings
from recipes.parallel_settings import ParallelSettings
from recipes.run_settings import setting
from recipes.sampling import SamplingSettings


def check_rules(args, rules):
    """ValueError for the first of [(field, whether it holds, what is allowed)] that does not hold."""
    for name, holds, allowed in rules:
        if not holds:
            raise ValueError(f"{name}={getattr(args, name)} must be {allowed}")


@dataclass
class ModelSettings(ProcessSettings, ParallelSettings, OptimizerSettings):
    """Weights, tokenizer and template that a stage starts from; how it is optimised."""

    model_name_or_path: str | None = setting(
        None, "Weights to start from: a folder or Hub name; deepseek_r1, deepseek_v3 or any causal LM."
    )
    tokenizer_name_or_path: str | None = setting(None, "Tokenizer. Default: that of model_name_or_path.")
    chat_template: str | None = setting(
        None,
        "deepseek_r1, deepseek_r1_zero or a .jinja file; it is saved with the tokenizer. Default: the tokenizer's own.",
    )
    seq_aux_loss_alpha: float | None = setting(None, "Weight of the balance loss. Default: the model's own.")
    bias_update_speed: float | None = setting(None, "Step of the routing biases. Default: the model's own.")
    adam_beta2: float = setting(0.999, "Beta2 of AdamW.")
    weight_decay: float = setting(0.01, "Weight decay; never on norms and biases.")
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass, to save memory.")

    def __post_init__(self):
        if self.activation_checkpointing is None:  # the field's new name in transformers
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()
        for name in ("model_name_or_path", "dataset_name", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name} is unset; give it in the YAML file or as --{name}")
        if self.fp16 and (self.use_cpu or not torch.cuda.is_available()):
            raise ValueError("fp16=true needs a GPU; on a CPU leave it out, or take bf16=true")
        check_rules(
            self,
            (
                ("learning_rate", self.learning_rate > 0, "positive"),
                ("weight_decay", self.weight_decay >= 0, "zero or more"),
                ("gradient_accumulation_steps", self.gradient_accumulation_steps >= 1, "at least 1"),
            ),
        )


@dataclass
class AdapterSettings:
    """LoRA (recipes/adapters.py) and quantised bases."""

    lora_rank: int = setting(0, "Rank of LoRA adapters (arXiv:2106.09685); 0 trains all weights.")
    lora_alpha: float | None = setting(None, "LoRA's scale is lora_alpha / lora_rank. Default: twice the rank.")
    lora_dropout: float = setting(0.0, "Dropout on the adapters' input; 0 where routed experts are adapted.")
    lora_groups: list[str] = field(
        default_factory=lambda: ["attention", "shared_experts", "dense_mlp"],
        metadata={"help": f"What is adapted in a DeepSeek model: {', '.join(LORA_GROUPS)}."},
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of linear layers to adapt, or all-linear, for other models."}
    )
    merge_adapter: bool | None = setting(
        None, "Also save the model with the adapter merged in, in output_dir/merged. Default: unless it is quantised."
    )
    load_in_4bit: bool = setting(False, "Frozen linear layers in 4-bit NF4 (needs LoRA, a GPU and bitsandbytes).")
    load_in_8bit: bool = setting(False, "Frozen linear layers in 8-bit (needs LoRA, a GPU and bitsandbytes).")

    def __post_init__(self):
        super().__post_init__()
        check_rules(
            self,
            (
                ("lora_rank", self.lora_rank >= 0, "zero (no adapters) or more"),
                ("lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)"),
            ),
        )
        unknown = [name for name in self.lora_groups if name not in LORA_GROUPS]
        if unknown:
            raise ValueError(f"lora_groups holds {unknown[0]!r}; known groups are {', '.join(LORA_GROUPS)}")
        quantised = [name for name in ("load_in_4bit", "load_in_8bit") if getattr(self, name)]
        if len(quantised) == 2:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other; keep one")
        if self.merge_adapter is None:
            self.merge_adapter = bool(self.lora_rank) and not quantised
        if quantised:
            self._check_quantised(quantised[0])

    def _check_quantised(self, name):
        if self.merge_adapter:
            raise ValueError(
                f"merge_adapter=true with {name}=true would round the merged weights; leave it out and merge "
                "the saved adapter into the full-precision base (PeftModel.from_pretrained, merge_and_unload)"
            )
        if not self.lora_rank:
            raise ValueError(f"{name}=true freezes the linear layers; set lora_rank, e.g. 16, for adapters")
        if self.use_cpu or not torch.cuda.is_available():
            raise ValueError(f"{name}=true needs a CUDA device; leave it out on this machine")


@dataclass
class TaskSettings:
    """Evaluation on held-out problems of recipes/tasks.py, before and after training."""

    eval_tasks: list[str] = field(
        default_factory=list, metadata={"help": "Tasks of recipes/tasks.py: name or name:levels, e.g. chain_sum:1-2."}
    )
    eval_tasks_folder: str | None = setting(None, "Where fetched tasks have their files. Default: data/tasks.")
    eval_problems: int = setting(100, "Held-out problems a task.")
    eval_samples: int = setting(1, "Answers a problem.")
    eval_temperature: float = setting(0.0, "Sampling temperature of the answers; 0 is greedy.")
    eval_max_new_tokens: int = setting(256, "Longest answer, reasoning included.")
    eval_generation_batch_size: int = setting(64, "Answers generated at a time; halved where memory runs out.")
    eval_before: bool = setting(True, "Evaluate the tasks before training too.")

    def __post_init__(self):
        super().__post_init__()
        names = ("eval_problems", "eval_samples", "eval_generation_batch_size")
        check_rules(self, [(name, getattr(self, name) >= 1, "at least 1") for name in names])
        if self.eval_samples > 1 and not self.eval_temperature:
            raise ValueError(
                f"eval_samples={self.eval_samples} with eval_temperature=0 would give the same answer each time; "
                "set eval_temperature, e.g. 0.6"
            )
        if self.eval_tasks:
            self.task_evaluation()  # a mistyped task is said now, not after training

    def task_evaluation(self):
        """What is asked before and after training: the same problems, the same sampling."""
        sampling = SamplingSettings(
            max_new_tokens=self.eval_max_new_tokens, temperature=self.eval_temperature, samples=self.eval_samples,
            seed=self.seed, batch_size=self.eval_generation_batch_size,
        )  # fmt: skip
        return EvaluationSettings(
            tasks=list(self.eval_tasks), problems=self.eval_problems, sampling=sampling,
            tasks_folder=self.eval_tasks_folder,
        )  # fmt: skip
