"""The settings of `recipes/pretrain.py`: one typed dataclass, read from YAML and the command line."""

import dataclasses
import difflib
import json
import math
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import CONFIG_MAPPING, TrainingArguments
from trl import TrlParser

from recipes.distributed_settings import DistributedSettings
from recipes.optimizers import OptimizerSettings
from recipes.parallel_settings import ParallelSettings, data_parallel_size
from recipes.run_settings import RunSettings, setting


@dataclass
class PretrainConfig(DistributedSettings, ParallelSettings, OptimizerSettings, RunSettings, TrainingArguments):
    """Everything of `transformers.TrainingArguments`, with the defaults of the DeepSeek papers, and the fields below.

    Raises:
        ValueError: for settings that cannot work, naming the field, its value and the way out.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_config"]

    # -- model
    model_config: dict | str | None = setting(
        None,
        "Sizes of a new model, as fields of DeepSeekR1Config (YAML mapping or JSON). Single values also as "
        "--model_config.hidden_size 256. Beside model_name_or_path they override the loaded config.",
    )
    model_name_or_path: str | None = setting(
        None, "Continue from these weights: a folder or Hub name, deepseek_r1 or deepseek_v3 layout."
    )
    tokenizer_name_or_path: str | None = setting(
        None, "Folder or Hub name of the tokenizer. Default: that of a packed data set, else model_name_or_path."
    )
    attn_implementation: str | None = setting(
        None, "Attention, by the library's names. Default: sdpa (torch's). flash_attention_4 needs the package "
        "flash-attn-4 and a Hopper GPU or newer."
    )  # fmt: skip
    # -- data
    dataset_name: str | None = setting(None, "Hub name, folder, .jsonl or text file of training documents.")
    errors: str = setting("strict", "Unreadable files and lines: strict stops, skip leaves them out and counts them.")
    text_column: str = setting("text", "Column that holds a document's text.")
    sequence_length: int = setting(2048, "Tokens in a packed training row.")
    shuffle_rows: str = setting(
        "auto", "Shuffle the rows in each epoch: true, false (the order of the files) or auto: unless packed data "
        "were made with a curriculum."
    )  # fmt: skip
    streaming: bool = setting(False, "Read the data set as a stream (needs max_steps or max_train_tokens).")
    validation_fraction: float = setting(0.02, "Share of the documents held out where the data set has no split.")
    max_validation_tokens: int | None = setting(None, "Evaluate on this many held-out tokens at most. Default: all.")
    # -- length
    max_train_tokens: int | None = setting(None, "Train on this many tokens; sets max_steps, exclusive with it.")
    # -- optimisation: AdamW as in DeepSeek-V3 (arXiv:2412.19437), Sec. 4.2
    adam_beta2: float = setting(0.95, "Beta2 of AdamW (DeepSeek-V3, Sec. 4.2).")
    weight_decay: float = setting(0.1, "Weight decay (DeepSeek-V3, Sec. 4.2); never on norms and biases.")
    lr_scheduler_type: str = setting(
        "cosine",
        "warmup_stable_decay, cosine, cosine_with_min_lr, cosine_with_restarts, reduce_lr_on_plateau, constant, ...; "
        "their settings go in lr_scheduler_kwargs.",
    )
    ema_decay: float = setting(0.0, "Average the weights with this decay (0: off), e.g. 0.999.")
    # -- logs, samples, checkpoints
    logging_steps: float = setting(10, "Log every so many optimizer steps.")
    metric_for_best_model: str | None = setting("bits_per_byte", "What load_best_model_at_end and a plateau look at.")
    greater_is_better: bool | None = setting(False, "Whether a larger metric_for_best_model is better.")
    sample_prompts: list[str] = field(
        default_factory=list, metadata={"help": "Prompts that the model continues now and then, for the eye."}
    )
    sample_steps: int = setting(0, "Write samples every so many steps (0: only at the end).")
    sample_tokens: int = setting(64, "New tokens in a sample.")
    # -- what to do
    dry_run: bool = setting(False, "Print parameters, FLOPs, memory and expected time, then stop.")
    assumed_mfu: float = setting(
        0.2, "Share of the device's peak that --dry_run assumes (transformers' own DeepseekV3, bf16, H100: 0.20)."
    )

    def __post_init__(self):
        self.remove_unused_columns = False  # the collator needs the columns that the model does not
        super().__post_init__()
        self.shuffle_rows = str(self.shuffle_rows).lower()  # YAML reads true and false as such
        self._check_model()
        self._check_numbers()
        self._check_length()
        self._check_schedule()

    @property
    def equal_rows(self):
        """Rows are packed to one length, and a last batch that is not full is filled up, or left out."""
        return self.accelerator_config.even_batches or self.dataloader_drop_last

    @property
    def tokens_per_step(self):
        """Tokens in an optimizer step, over all processes."""
        rows = self.train_batch_size * self.gradient_accumulation_steps * data_parallel_size(self)
        return rows * self.sequence_length

    def _check_model(self):
        if self.model_config is None and self.model_name_or_path is None:
            raise ValueError(
                "model_config and model_name_or_path are both unset: give the sizes of a new model (model_config, see "
                "recipes/configs/pretrain_tiny.yaml) or weights to continue from (model_name_or_path)"
            )
        if isinstance(self.model_config, str):
            raise ValueError(f"model_config={self.model_config!r} must be a mapping, e.g. '{{\"hidden_size\": 256}}'")
        self.model_config = {name: _number(value) for name, value in (self.model_config or {}).items()}
        check_names(self.model_config, _model_fields(), "model_config")
        coefficient = self.model_config.get("mtp_loss_coef")
        if coefficient and self.model_config.get("num_nextn_predict_layers") == 0:
            raise ValueError(
                f"model_config.mtp_loss_coef={coefficient} needs multi-token-prediction layers, but "
                "num_nextn_predict_layers=0; set --model_config.mtp_loss_coef 0, or num_nextn_predict_layers to 1"
            )
        if "label_smoothing" in self.model_config:
            raise ValueError("model_config.label_smoothing is set by label_smoothing_factor; use that field")

    def _check_numbers(self):
        rules = (
            ("sequence_length", self.sequence_length >= 8, "at least 8"),
            ("shuffle_rows", self.shuffle_rows in ("auto", "true", "false"), "auto, true or false"),
            ("validation_fraction", 0 <= self.validation_fraction < 1, "in [0, 1)"),
            ("label_smoothing_factor", 0 <= self.label_smoothing_factor < 1, "in [0, 1)"),
            ("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1), e.g. 0.999, or 0 for none"),
            ("learning_rate", self.learning_rate > 0, "positive"),
            ("weight_decay", self.weight_decay >= 0, "zero or more"),
            ("sample_steps", self.sample_steps >= 0, "zero or more"),
            ("sample_tokens", self.sample_tokens >= 1, "at least 1"),
            ("timing_warmup_steps", self.timing_warmup_steps >= 0, "zero or more"),
            ("assumed_mfu", 0 < self.assumed_mfu <= 1, "in (0, 1]"),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps >= 1, "at least 1"),
            ("per_device_train_batch_size", self.per_device_train_batch_size >= 1, "at least 1"),
        )
        for name, holds, allowed in rules:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)} must be {allowed}")

    def _check_length(self):
        if self.max_train_tokens is not None:
            if self.max_steps > 0:
                raise ValueError(
                    f"max_train_tokens={self.max_train_tokens} and max_steps={self.max_steps} exclude each other: "
                    "keep one (--max_steps -1 switches a config file's value off)"
                )
            if self.max_train_tokens < 1:
                raise ValueError(f"max_train_tokens={self.max_train_tokens} must be positive")
            self.max_steps = math.ceil(self.max_train_tokens / self.tokens_per_step)
        if self.streaming and self.max_steps <= 0:
            raise ValueError("streaming=true has no end of its own: set max_steps or max_train_tokens")

    def _check_schedule(self):
        kind, options = self.lr_scheduler_type.value, self.lr_scheduler_kwargs or {}
        if isinstance(options, str):
            raise ValueError(f"lr_scheduler_kwargs={options!r} must be a mapping")
        self.lr_scheduler_kwargs = {name: _number(value) for name, value in options.items()}
        if kind == "warmup_stable_decay" and "num_decay_steps" not in options:
            raise ValueError(
                "lr_scheduler_type=warmup_stable_decay needs lr_scheduler_kwargs.num_decay_steps, the steps of the "
                "final decay, e.g. --lr_scheduler_kwargs.num_decay_steps 100"
            )
        if kind == "cosine_with_min_lr" and not {"min_lr", "min_lr_rate"} & set(options):
            raise ValueError("lr_scheduler_type=cosine_with_min_lr needs lr_scheduler_kwargs.min_lr or .min_lr_rate")
        if kind == "reduce_lr_on_plateau":
            if self.eval_strategy.value == "no":
                raise ValueError("lr_scheduler_type=reduce_lr_on_plateau needs evaluation: set eval_strategy=steps")
            if self.warmup_steps:
                raise ValueError(
                    f"warmup_steps={self.warmup_steps} has no effect with lr_scheduler_type=reduce_lr_on_plateau; set 0"
                )
        decay = self.lr_scheduler_kwargs.get("num_decay_steps") or 0
        if 0 < decay < 1:
            if self.max_steps <= 0:
                raise ValueError(
                    f"lr_scheduler_kwargs.num_decay_steps={decay} is a share of max_steps, which is not set; give steps"
                )
            decay = self.lr_scheduler_kwargs["num_decay_steps"] = round(decay * self.max_steps)
        stable = self.lr_scheduler_kwargs.get("num_stable_steps") or 0
        used = self.get_warmup_steps(self.max_steps) + int(stable) + int(decay)
        if self.max_steps > 0 and used > self.max_steps:
            raise ValueError(
                f"warmup_steps, num_stable_steps and num_decay_steps together take {used} steps, more than max_steps="
                f"{self.max_steps}; a value below 1 is a share of max_steps"
            )


# ---------------------------------------------------------------- names and values


def _number(value):
    """YAML reads 1e-4 (without a dot) as text: make it the number that was meant."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", value):
        return int(value) if re.fullmatch(r"[-+]?\d+", value) else float(value)
    return value


def _model_fields():
    """Names that model_config may hold: the fields of the model's config class and its released aliases."""
    import modeling_deepseek_r1  # noqa: F401  (registers the model type)

    known = {f.name for f in dataclasses.fields(CONFIG_MAPPING["deepseek_r1"])}
    return known | {"rope_theta", "rope_scaling", "dtype"}


def check_names(given, known, where):
    """ValueError for the first name of `given` that is not `known`, with the closest known ones."""
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else "see --help for the known ones"
            raise ValueError(f"unknown key {name!r} in {where}: {hint}")


def _read_yaml(path):
    if not Path(path).is_file():
        raise ValueError(f"--config {path}: no such file; the shipped ones are in recipes/configs/")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} must hold a mapping of settings, got {type(values).__name__}")
    return values


def apply_dotted(values, args):
    """Move `--model_config.hidden_size 64` from the command line into `values`; returns the other arguments.

    A whole group given as well (`--model_config '{}'`) is the start that the single values are laid over.
    """
    groups = {match[1] for arg in args if (match := re.match(r"--(\w+)\.\w+", arg))}
    rest, position = [], 0
    for name in sorted(groups & {arg[2:] for arg in args}):
        index = args.index(f"--{name}")
        values[name] = yaml.safe_load(args[index + 1]) or {}
        args = args[:index] + args[index + 2 :]
    while position < len(args):
        match = re.match(r"--(\w+)\.(\w+)(?:=(.*))?$", args[position], re.DOTALL)
        if not match:
            rest.append(args[position])
            position += 1
            continue
        group, name, inline = match.groups()
        if inline is None and position + 1 >= len(args):
            raise ValueError(f"{args[position]} needs a value")
        text = args[position + 1] if inline is None else inline
        nested = values.get(group)
        nested = json.loads(nested) if isinstance(nested, str) else dict(nested or {})
        values[group] = nested | {name: _number(yaml.safe_load(text))}
        position += 2 if inline is None else 1
    return rest


def parse_config(config_class, argv=None):
    """(instance of `config_class`) from `--config FILE.yaml` and `--key value` overrides; for every stage.

    Unknown keys in either place are a ValueError that names the closest known ones. `--help` exits.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    parser = TrlParser([config_class], allow_abbrev=False)
    known = {f.name for f in dataclasses.fields(config_class) if f.init}
    values, source = {}, "the command line"
    while "--config" in args or any(a.startswith("--config=") for a in args):
        index = next(i for i, a in enumerate(args) if a == "--config" or a.startswith("--config="))
        taken = args.pop(index)
        if taken == "--config" and index >= len(args):
            raise ValueError("--config needs the path of a YAML file")
        path = taken.partition("=")[2] or args.pop(index)
        values, source = values | _read_yaml(path), path
    os.environ.update({name: str(value) for name, value in (values.pop("env", None) or {}).items()})
    args = apply_dotted(values, args)
    check_names(values, known, source)
    flags = set(parser._option_string_actions)
    given = [a.partition("=")[0] for a in args if a.startswith("--")]
    check_names([a[2:] for a in given if a not in flags], known, "the command line")
    for name, value in values.items():  # argparse converts text only; a mapping stays one
        values[name] = str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
    parser.set_defaults_with_config(**values)
    (config,) = parser.parse_args_into_dataclasses(args=args, look_for_args_file=False)
    return config
