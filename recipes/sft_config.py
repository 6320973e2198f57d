"""The settings of `recipes/sft.py`: one typed dataclass, read from YAML and the command line."""

from dataclasses import dataclass, field, fields

import torch
from trl import SFTConfig

from recipes.adapters import LORA_GROUPS
from recipes.evaluation import EvaluationSettings
from recipes.run_settings import RunSettings, setting
from recipes.sampling import SamplingSettings
from recipes.sft_data import MULTI_TURN, OVERLONG

# Fields of TRL's that prepare data or model in its own way, too late here: what takes their place.
REPLACED = {
    "chat_template_path": "chat_template", "completion_only_loss": "assistant_only_loss", "truncation_mode": "overlong",
    "dataset_text_field": "a column called text", "dataset_kwargs": "the fields listed under data by --help",
    "eos_token": "tokenizer_name_or_path with that token",
}  # fmt: skip


@dataclass
class SFTRecipeConfig(RunSettings, SFTConfig):
    """Everything of `trl.SFTConfig`, and the fields below.

    Raises:
        ValueError: for settings that cannot work, naming the field, its value and the way out.
    """

    # -- model
    model_name_or_path: str | None = setting(
        None, "Weights to start from: a folder or Hub name; deepseek_r1, deepseek_v3 or any causal LM."
    )
    tokenizer_name_or_path: str | None = setting(None, "Tokenizer. Default: that of model_name_or_path.")
    chat_template: str | None = setting(
        None,
        "deepseek_r1, deepseek_r1_zero or a .jinja file; it is saved with the tokenizer. Default: the tokenizer's own.",
    )
    mtp_loss_coef: float | None = setting(
        None, "Weight of the multi-token-prediction loss. Default: the model's own; 0 freezes these layers."
    )
    seq_aux_loss_alpha: float | None = setting(None, "Weight of the balance loss. Default: the model's own.")
    bias_update_speed: float | None = setting(None, "Step of the routing biases. Default: the model's own.")
    # -- adapters
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
    # -- data
    dataset_name: str | None = setting(
        None, "Folder with train.jsonl (and test.jsonl), a .jsonl or .parquet file, or a Hub name[:configuration]."
    )
    validation_fraction: float = setting(0.02, "Share of the problems held out where the data set has no test split.")
    max_length: int | None = setting(1024, "Tokens of an example, and of a packed row.")
    multi_turn: str = setting("split", f"Conversations of several turns: {', '.join(MULTI_TURN)}; see sft_data.py.")
    overlong: str = setting("shorten", f"Examples longer than max_length: {', '.join(OVERLONG)}; see sft_data.py.")
    errors: str = setting("strict", "Bad conversations: strict stops at the first, skip leaves them out and counts.")
    assistant_only_loss: bool = setting(True, "Train on reasoning, answer and end token only.")
    packing: bool = setting(
        True, "Several examples a row, which do not see each other (under packing_strategy wrapped they do)."
    )
    # -- optimisation
    adam_beta2: float = setting(0.999, "Beta2 of AdamW.")
    weight_decay: float = setting(0.01, "Weight decay; never on norms and biases.")
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass, to save memory.")
    # -- evaluation on tasks, before and after training
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
    # -- logs, checkpoints
    # -- what to do
    dry_run: bool = setting(False, "Print what the data become, then stop.")

    def __post_init__(self):
        if self.activation_checkpointing is None:  # the field's new name in transformers
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()
        self._check_choices()
        self._check_of_trl()
        self._check_numbers()
        self._check_adapters()
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

    def _check_choices(self):
        for name, allowed in (("multi_turn", MULTI_TURN), ("overlong", OVERLONG), ("errors", ("strict", "skip"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        for name in ("model_name_or_path", "dataset_name", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name} is unset; give it in the YAML file or as --{name}")
        if self.loss_type != "nll" and self.label_smoothing_factor:
            raise ValueError(f"loss_type={self.loss_type} has no label smoothing; set label_smoothing_factor to 0")

    def _check_of_trl(self):
        defaults = {field.name: field.default for field in fields(SFTConfig)}
        for name, instead in REPLACED.items():
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect here; leave it out and use {instead}")
        if self.padding_free and not self.packing:
            raise ValueError("padding_free=true needs packing=true here, which is free of padding by itself")
        if self.eval_packing and not self.packing:
            raise ValueError("eval_packing=true needs packing=true: else examples of a row would see each other")
        if self.fp16 and (self.use_cpu or not torch.cuda.is_available()):
            raise ValueError("fp16=true needs a GPU; on a CPU leave it out, or take bf16=true")

    def _check_numbers(self):
        rules = (
            ("max_length", self.max_length is not None and self.max_length >= 8, "at least 8"),
            ("validation_fraction", 0 <= self.validation_fraction < 1, "in [0, 1)"),
            ("label_smoothing_factor", 0 <= self.label_smoothing_factor < 1, "in [0, 1)"),
            ("learning_rate", self.learning_rate > 0, "positive"),
            ("weight_decay", self.weight_decay >= 0, "zero or more"),
            ("lora_rank", self.lora_rank >= 0, "zero (no adapters) or more"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)"),
            ("mtp_loss_coef", self.mtp_loss_coef is None or self.mtp_loss_coef >= 0, "zero or more"),
            ("eval_problems", self.eval_problems >= 1, "at least 1"),
            ("eval_samples", self.eval_samples >= 1, "at least 1"),
            ("eval_generation_batch_size", self.eval_generation_batch_size >= 1, "at least 1"),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps >= 1, "at least 1"),
        )
        for name, holds, allowed in rules:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)} must be {allowed}")
        if self.eval_samples > 1 and not self.eval_temperature:
            raise ValueError(
                f"eval_samples={self.eval_samples} with eval_temperature=0 would give the same answer each time; "
                "set eval_temperature, e.g. 0.6"
            )

    def _check_adapters(self):
        unknown = [name for name in self.lora_groups if name not in LORA_GROUPS]
        if unknown:
            raise ValueError(f"lora_groups holds {unknown[0]!r}; known groups are {', '.join(LORA_GROUPS)}")
        quantised = [name for name in ("load_in_4bit", "load_in_8bit") if getattr(self, name)]
        if len(quantised) == 2:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other; keep one")
        if self.merge_adapter is None:
            self.merge_adapter = bool(self.lora_rank) and not quantised
        if not quantised:
            return
        if self.merge_adapter:
            raise ValueError(
                f"merge_adapter=true with {quantised[0]}=true would round the merged weights; leave it out and merge "
                "the saved adapter into the full-precision base (PeftModel.from_pretrained, merge_and_unload)"
            )
        if not self.lora_rank:
            raise ValueError(f"{quantised[0]}=true freezes the linear layers; set lora_rank, e.g. 16, for adapters")
        if self.use_cpu or not torch.cuda.is_available():
            raise ValueError(f"{quantised[0]}=true needs a CUDA device; leave it out on this machine")
