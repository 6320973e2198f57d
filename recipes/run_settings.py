"""The settings that every stage's config shares: precision, the run folder, resuming."""

import copy
import json
from dataclasses import dataclass, field

import torch


def setting(default, text):
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": text})


def from_json(name, given):
    """A value from YAML as it is, or from the command line as JSON. Raises ValueError for a text that is none."""
    try:
        return json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}={given!r} is not JSON: {error}") from error


def has_bf16(args):
    """Whether bf16 compute is what these training arguments want by default: on a GPU that has it, without fp16."""
    return not args.use_cpu and not args.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def checkpointing_mode(value):
    """What `activation_checkpointing` may say -> False, True (which is what the library calls full) or "selective".

    Raises:
        ValueError: for anything else.
    """
    known = {"none": False, "false": False, "selective": "selective", "full": True, "true": True}
    if str(value).lower() not in known:
        raise ValueError(f"activation_checkpointing={value!r} must be none, selective or full")
    return known[str(value).lower()]


@dataclass
class RunSettings:
    """Put before `transformers.TrainingArguments` (or a config of TRL's) in the list of bases.

    Raises:
        ValueError: for an unknown `weights_dtype` or `activation_checkpointing`, and a negative `gc_steps`.
    """

    weights_dtype: str = setting(
        "float32",
        "float32 (master weights; bf16 or fp16 compute through bf16/fp16) or bfloat16 (pure, half the memory).",
    )
    activation_checkpointing: str | None = field(
        default=None,
        metadata={
            "help": "What the backward pass computes again, to save memory: none, selective (the inside of "
            "experts and MLPs) or full, also true (whole layers, but for the routers' choices). Default: "
            "gradient_checkpointing, whose true is full.",
            "nargs": "?", "const": "full",
        },
    )  # fmt: skip
    label_smoothing_factor: float = setting(
        0.0, "Label smoothing inside the model's own loss (its config field label_smoothing)."
    )
    bf16: bool | None = setting(
        None, "bf16 compute with fp32 weights. Default: where the GPU has bf16 and fp16 is off."
    )
    ddp_find_unused_parameters: bool | None = setting(False, "Not needed: what gets no gradient is frozen.")
    dataloader_drop_last: bool = setting(
        True, "Leave out the few rows at the end of an epoch that fill no batch: they would be a noisy step."
    )
    output_dir: str | None = setting(None, "Run folder: config.yaml, metrics.jsonl, checkpoints, model, report.html.")
    logging_nan_inf_filter: bool = setting(False, "Hide NaN losses from the log. Off: a run with a NaN loss stops.")
    max_shard_size: str | None = setting(
        None, "Largest weight file of a checkpoint, e.g. 2GB. Default: the library's."
    )
    timing_warmup_steps: int = setting(3, "First steps of a process that tokens/s and MFU leave out.")
    gc_steps: int = setting(
        50, "Collect Python's garbage at every so many steps, on all processes at once (0: when Python likes)."
    )
    device_peak_tflops: float | None = setting(
        None, "Peak of one device for MFU. Default: by its name; CPU: measured."
    )
    resume_from_checkpoint: str | None = setting(
        None, "true: newest complete checkpoint of output_dir; auto: that or a fresh start; or a checkpoint folder."
    )
    allow_config_change: bool = setting(False, "Resume although settings that shape the run have changed.")
    async_save: bool = setting(
        False,
        "Write checkpoints beside training, which waits only until weights and states are copied to the host's memory "
        "(12 bytes a parameter with fp32 AdamW, over all processes). They are in shards: see docs/launch.md.",
    )
    overwrite_output_dir: bool = setting(False, "Start afresh in an output_dir with checkpoints, deleting them.")

    def __post_init__(self):
        if self.weights_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"weights_dtype={self.weights_dtype!r} must be float32 or bfloat16")
        if self.gc_steps < 0:
            raise ValueError(f"gc_steps={self.gc_steps} must be 0 (when Python likes) or more steps")
        if self.weights_dtype == "bfloat16":
            self.bf16 = False  # nothing is left to cast
        if self.bf16 is None:
            self.bf16 = has_bf16(self)
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False
        elif self.accelerator_config is None and self.dataloader_pin_memory:
            self.accelerator_config = {"non_blocking": True}  # else each batch's copy waits for the whole last step
        if self.activation_checkpointing == "full" and isinstance(self.activation_checkpointing_kwargs, dict):
            self.activation_checkpointing_kwargs.pop("mode", None)  # said in the config of a run that was selective
        if self.activation_checkpointing is not None:  # else the library looks at its older name
            self.activation_checkpointing = checkpointing_mode(self.activation_checkpointing)
        if self.activation_checkpointing == "selective":
            self._check_selective()
        super().__post_init__()  # that of the library's config, next in the order of bases

    def _check_selective(self):
        """Puts the mode where trainers hand it to `model.activation_checkpointing_enable`."""
        given = from_json("activation_checkpointing_kwargs", self.activation_checkpointing_kwargs) or {}
        others = {name: value for name, value in given.items() if (name, value) != ("mode", "selective")}
        if others:
            raise ValueError(
                f"activation_checkpointing_kwargs={others} have no effect with activation_checkpointing=selective; "
                "leave them out, or set full"
            )
        self.activation_checkpointing_kwargs = {"mode": "selective"}

    def __copy__(self):
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)  # the token too, which `__getstate__` leaves out
        return twin

    def __deepcopy__(self, memo):
        memo[id(self)] = twin = object.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __getstate__(self):
        """What is pickled, in training_args.bin of every checkpoint: not the access token of the Hub."""
        return self.__dict__ | {"hub_token": None}
