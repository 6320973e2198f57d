"""The settings of `recipes/reward.py`: one typed dataclass, read from YAML and the command line."""

import math
from dataclasses import dataclass, fields

from trl import RewardConfig

from recipes.reward_data import OVERLONG
from recipes.reward_models import KINDS
from recipes.run_settings import RunSettings, setting
from recipes.stage_settings import AdapterSettings, ModelSettings, check_rules

# Fields of TRL's and transformers' that have no effect here: what takes their place.
REPLACED = {
    "chat_template_path": "chat_template", "eos_token": "tokenizer_name_or_path with that token",
    "pad_token": "tokenizer_name_or_path with that token", "load_in_4bit": "lora_rank, with the base in 16 or 32 bit",
    "load_in_8bit": "lora_rank, with the base in 16 or 32 bit",
    "label_smoothing_factor": "rows of your own with a margin",
}  # fmt: skip


@dataclass
class RewardRecipeConfig(AdapterSettings, ModelSettings, RunSettings, RewardConfig):
    """Everything of `trl.RewardConfig`, and the fields below.

    Raises:
        ValueError: for settings that cannot work, naming the field, its value and the way out.
    """

    spreads = ("expert_parallel_size",)

    kind: str = setting(
        "preference", "preference (one reward a completion, from pairs) or process (one a step, from labelled steps)."
    )
    # -- data
    dataset_name: str | None = setting(
        None, "Folder with train.jsonl (and test.jsonl), a .jsonl or .parquet file, or a Hub name[:configuration]."
    )
    validation_fraction: float = setting(0.02, "Share of the problems held out where the data set has no test split.")
    max_length: int | None = setting(1024, "Tokens of a prompt and completion.")
    overlong: str = setting(
        "drop", f"Rows longer than max_length: {', '.join(OVERLONG)}. A completion is never cut: its end is judged."
    )
    errors: str = setting("strict", "Bad rows: strict stops at the first, skip leaves them out and counts.")
    use_margin: bool = setting(True, "Subtract the column margin, where there is one, in the loss.")
    step_separator: str = setting("\n", "What stands between two steps of a process set.")

    def __post_init__(self):
        super().__post_init__()
        for name, allowed in (("kind", tuple(KINDS)), ("overlong", OVERLONG), ("errors", ("strict", "skip"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        defaults = {field.name: field.default for field in fields(type(self))}
        for name, instead in REPLACED.items():
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect here; leave it out and use {instead}")
        centring = self.center_rewards_coefficient
        check_rules(
            self,
            (
                ("max_length", self.max_length is not None and self.max_length >= 8, "at least 8"),
                ("validation_fraction", 0 <= self.validation_fraction < 1, "in [0, 1)"),
                ("per_device_eval_batch_size", self.per_device_eval_batch_size >= 1, "at least 1"),
                (
                    "center_rewards_coefficient",
                    centring is None or (math.isfinite(centring) and centring >= 0),
                    "zero or more, e.g. 0.01",
                ),
            ),
        )
        if self.kind == "process" and centring:
            raise ValueError(
                f"center_rewards_coefficient={centring} is for kind=preference: a step's probability has a zero of its "
                "own; leave it out"
            )
