"""The settings that `recipes/ppo.py` and `recipes/grpo.py` share: prompts, rewards, logs."""

import math
from dataclasses import dataclass, field

from recipes.run_settings import RunSettings, from_json, setting
from recipes.stage_settings import (
    AdapterSettings,
    ModelSettings,
    TaskSettings,
    check_rules,
)


def _settings_by_name(given):
    """`reward_kwargs` as {name: {argument: value}}, from YAML or, on the command line, JSON."""
    settings = from_json("reward_kwargs", given)
    if settings is not None and not (
        isinstance(settings, dict) and all(isinstance(value, dict) for value in settings.values())
    ):
        raise ValueError(f'reward_kwargs={given!r} must hold settings by name, e.g. {{"length": {{"buffer": 64}}}}')
    return settings


@dataclass
class RLRecipeSettings(ModelSettings, AdapterSettings, TaskSettings, RunSettings):
    """Put before the trainer's own config in the list of bases.

    Raises:
        ValueError: for settings that cannot work, naming the field, its value and the way out.
    """

    spreads = ("expert_parallel_size",)

    # -- models
    ref_model_name_or_path: str | None = setting(
        None, "Reference of the KL penalty. Default: the model as it was at the start; with LoRA, its base."
    )
    # -- data
    dataset_name: str | None = setting(
        None,
        "Prompts: folder with train.jsonl (and test.jsonl), a .jsonl or .parquet file, or a Hub name[:configuration].",
    )
    validation_fraction: float = setting(0.02, "Share of the prompts held out where the data set has no test split.")
    max_eval_prompts: int = setting(64, "Held-out prompts that an evaluation during training takes at most.")
    gc_steps: int = setting(1, "Collect Python's garbage at every so many steps (0: when Python likes).")
    dataloader_drop_last: bool = setting(
        False, "Leave out held-out prompts that fill no batch; rollouts always take whole batches."
    )
    # -- rewards
    rewards: list[str] = field(
        default_factory=lambda: ["accuracy", "format"],
        metadata={"help": "Names in recipes/rewards.py, path/to/file.py:function, or reward models: folder, Hub name."},
    )
    track_rewards: list[str] = field(
        default_factory=list, metadata={"help": "Further rewards that are only logged, e.g. accuracy beside a model's."}
    )
    reward_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Settings of rewards by name, e.g. {length: {buffer: 64}}."}
    )
    normalise_rewards: bool = setting(
        False, "Rewards of models with mean 0 and variance 1 over the completions that they were evaluated on."
    )
    reward_batch_size: int = setting(64, "Completions that a reward model scores at a time.")
    # -- optimisation
    ema_decay: float = setting(0.0, "Decay of an average of the weights, saved in output_dir/ema; 0: none.")
    # -- logs
    sample_steps: int = setting(
        0, "Completions with their rewards go into metrics.jsonl every so many steps, and at the end; 0: at the end."
    )
    # -- what to do
    dry_run: bool = setting(False, "Print what the data become and what the rewards weigh, then stop.")

    # Read by recipes/model_loading.py: rollouts train no such layers (recipes/rollouts.py).
    mtp_loss_coef = None

    def __post_init__(self):
        super().__post_init__()
        self.reward_kwargs = _settings_by_name(self.reward_kwargs)
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} has no effect in reinforcement learning; leave "
                "it out"
            )
        self._check_rewards()
        check_rules(
            self,
            (
                ("validation_fraction", 0 <= self.validation_fraction < 1, "in [0, 1)"),
                ("max_eval_prompts", self.max_eval_prompts >= 1, "at least 1"),
                ("reward_batch_size", self.reward_batch_size >= 1, "at least 1"),
                ("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)"),
                ("sample_steps", self.sample_steps >= 0, "zero or more"),
            ),
        )

    def _check_rewards(self):
        if not self.rewards:
            raise ValueError("rewards is empty; name at least one, e.g. accuracy")
        repeated = {name for name in self.all_rewards if self.all_rewards.count(name) > 1}
        if repeated:
            raise ValueError(f"rewards and track_rewards name {', '.join(sorted(repeated))} twice; keep one")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.rewards):
            raise ValueError(
                f"reward_weights={self.reward_weights} must hold one weight for each of rewards="
                f"{', '.join(self.rewards)}"
            )
        if self.reward_weights and not all(map(math.isfinite, self.reward_weights)):
            raise ValueError(f"reward_weights={self.reward_weights} must be finite")

    @property
    def all_rewards(self):
        """Names of the rewards in the trainer's order: those that count, then those that are tracked."""
        return [*self.rewards, *self.track_rewards]

    @property
    def all_weights(self):
        """A weight for each of `all_rewards`."""
        return [*(self.reward_weights or [1.0] * len(self.rewards)), *[0.0] * len(self.track_rewards)]
