"""The settings of runs on several processes: gradient compression, time-outs, checks."""

from dataclasses import dataclass

from recipes.gradient_compression import COMPRESSIONS, PowerSGDReduction, TopKReduction
from recipes.process_group import choose_interface, open_group_of_cpus
from recipes.process_watch import record_collectives, set_timeout
from recipes.run_settings import setting

LIBRARY_TIMEOUT = 1800  # ddp_timeout's default


@dataclass
class ProcessSettings:
    """Put in front of `transformers.TrainingArguments`, as recipes/optimizers.OptimizerSettings; for every stage.

    Sets the process group's time-out also on gloo, where the library leaves torch's 30 minutes.

    Raises:
        ValueError: for values that cannot work.
    """

    collective_timeout_s: int = setting(
        600, "A collective that waits this long ends the run; shortly before, it is said which rank waits for what."
    )
    dead_rank_s: float = setting(
        45.0, "End this process when another has given no sign of life for so many seconds (0: never)."
    )
    check_processes: bool = setting(True, "At start, compare config, code, data, model and versions of all ranks.")

    def __post_init__(self):
        rules = (
            ("collective_timeout_s", self.collective_timeout_s >= 1, "at least 1, in seconds"),
            ("dead_rank_s", self.dead_rank_s == 0 or self.dead_rank_s >= 5, "at least 5 seconds, or 0 for never"),
        )
        for name, holds, allowed in rules:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)} must be {allowed}")
        if self.ddp_timeout not in (LIBRARY_TIMEOUT, self.collective_timeout_s):
            raise ValueError(f"ddp_timeout={self.ddp_timeout}: set collective_timeout_s instead, it holds everywhere")
        self.ddp_timeout = self.collective_timeout_s
        record_collectives()  # before the process group exists, which TrainingArguments makes
        choose_interface()
        if self.use_cpu:
            open_group_of_cpus(self.collective_timeout_s)
        super().__post_init__()
        if self.world_size > 1:
            set_timeout(self.collective_timeout_s)


@dataclass
class DistributedSettings(ProcessSettings):
    """Put in front of `transformers.TrainingArguments`: `ProcessSettings`, and what DDP sends.

    Raises:
        ValueError: for values that cannot work, and for a compression beside FSDP, DeepSpeed or fp16.
    """

    gradient_compression: str = setting(
        "none",
        "What DDP sends: none (all gradients), bf16, powersgd (products of low rank), top_k (the largest, in 8 bits). "
        "All but none change numerics; see recipes/gradient_compression.py for the bytes of each.",
    )
    gradient_compression_start: int = setting(100, "Compress after this many optimizer steps.")
    powersgd_rank: int = setting(4, "Rank of PowerSGD's products.")
    top_k_fraction: float = setting(0.05, "Share of each gradient tensor that top_k sends.")
    top_k_bits: int = setting(8, "Bits of a value that top_k sends: 8, or 32 for what it is.")
    top_k_block: int = setting(256, "Values that share a scale in top_k's 8 bits.")

    def __post_init__(self):
        self._check_compression()
        super().__post_init__()
        kind = self.gradient_compression
        if kind != "none" and (self.fsdp_plugin_args or self.deepspeed):
            raise ValueError(
                f"gradient_compression={kind} is a hook of DistributedDataParallel; FSDP and DeepSpeed have their own "
                "reduction: use gradient_compression=none, or DDP"
            )
        if kind in ("powersgd", "top_k") and self.fp16:
            raise ValueError(
                f"gradient_compression={kind} keeps errors over steps, and fp16 changes the gradients' scale between "
                "them; use bf16=true, or gradient_compression=bf16"
            )

    def _check_compression(self):
        if self.gradient_compression not in COMPRESSIONS:
            raise ValueError(f"gradient_compression={self.gradient_compression!r} must be one of "
                             f"{', '.join(COMPRESSIONS)}")  # fmt: skip
        if self.gradient_compression_start < 0:
            raise ValueError(f"gradient_compression_start={self.gradient_compression_start} must be zero or more")
        TopKReduction(self.top_k_fraction, self.top_k_bits, self.top_k_block)  # they check their values
        if self.gradient_compression == "powersgd":
            PowerSGDReduction(self.powersgd_rank, self.gradient_compression_start)
