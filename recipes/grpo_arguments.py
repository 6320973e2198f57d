"""`R1GRPOConfig`: the settings of `R1GRPOTrainer`."""

from dataclasses import dataclass, fields

from trl import GRPOConfig

from recipes.rollout_arguments import RolloutArguments
from recipes.run_settings import from_json, has_bf16, setting

# Fields of TRL's that do not work here: what takes their place.
REPLACED = {
    "router_aux_loss_coef": "the model's own balance: expert_balance and seq_aux_loss_alpha, or, of another model with "
    "experts, the router_aux_loss_coef of its config",
    "use_liger_kernel": "nothing: the head is fused already",
}
CURRICULA = ("none", "pass_rate")


def by_name(name, given):
    """A mapping from YAML or, on the command line, JSON. Raises ValueError for anything else."""
    found = from_json(name, given)
    if found is not None and not isinstance(found, dict):
        raise ValueError(f'{name}={given!r} must be a mapping, e.g. {{"reward_nano": 1300}}')
    return found


def divisors_near(number, wanted, least):
    """The divisors of `number`, `least` at least, next to `wanted` on either side."""
    found = [size for size in range(least, number + 1) if number % size == 0]
    below, above = [size for size in found if size < wanted], [size for size in found if size > wanted]
    return [*below[-1:], *above[:1]]


@dataclass
class R1GRPOConfig(RolloutArguments, GRPOConfig):
    """Settings of group relative policy optimisation: everything of `trl.GRPOConfig`, and the fields below.

    One rollout: `steps_per_generation` x `per_device_train_batch_size` completions on each process, in groups of
    `num_generations`; with `steps_per_generation` = n x `gradient_accumulation_steps` it is trained in n mini-batches.
    Variants by TRL's fields: Dr. GRPO (loss_type=dr_grpo, scale_rewards=none), DAPO (loss_type=dapo, epsilon_high,
    dynamic_sampling, the reward `length`), GSPO (importance_sampling_level=sequence), CISPO (loss_type=cispo).
    With `sync_ref_model` the reference becomes `ref_model_mixup_alpha` of the policy every `ref_model_sync_steps`
    steps, routing biases included, and checkpoints hold it.

    Raises:
        ValueError: for settings that cannot work, naming the field, its value and the way out.
    """

    dynamic_sampling: bool = setting(
        False,
        "Train on groups whose rewards differ only: groups without variance are replaced by further ones (DAPO, "
        "arXiv:2503.14476, Eq. 11).",
    )
    dynamic_sampling_rounds: int = setting(
        3, "Rounds of sampling that a rollout takes at most; then groups without variance fill it."
    )
    curriculum: str = setting(
        "none",
        "Which prompts are asked: none (shuffled epochs), or pass_rate (problems weighted by how often the policy "
        "solves them now).",
    )
    curriculum_reward: str = setting("accuracy", "The reward, from 0 to 1, that the pass rate is taken from.")
    curriculum_target: float = setting(0.5, "Pass rate of the problems that are asked most.")
    curriculum_half_life: float = setting(
        20.0, "Rollouts after which what is known of a problem counts half: the policy moves on."
    )
    prompts_from_step: int = setting(
        0, "Step from which prompts without a verifier (no task) are asked too, as in DeepSeek-R1's last stage."
    )
    reward_from_step: dict | str | None = setting(
        None, 'Steps from which rewards count, by name, e.g. {"reward_small": 1300}; before, they are only logged.'
    )
    preflight_prompts: int = setting(
        16, "Prompts sampled and scored before the first step, to see whether anything can be learned; 0: none."
    )

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = has_bf16(self)  # TRL's default is an error without a GPU
        self.reward_from_step = by_name("reward_from_step", self.reward_from_step)
        self.check_rollout_arguments()
        self._check_numbers()
        self._check_replaced()
        if self.num_generations_eval is None:
            self.num_generations_eval = 1
        generations, self.num_generations = self.num_generations, self._local_rollout()  # our check says more
        try:
            super().__post_init__()
        finally:
            self.num_generations = generations
        self._check_groups()

    def _local_rollout(self):
        """The completions of a rollout on one process, a group size that TRL's own check lets pass; of one, ours."""
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        local = self.generation_batch_size or self.per_device_train_batch_size * steps
        return local if local > 1 else self.num_generations

    def _check_numbers(self):
        rules = (
            ("num_generations", (self.num_generations or 0) >= 2, "at least 2: groups are compared within"),
            ("epsilon", self.epsilon > 0, "positive"),
            ("epsilon_high", self.epsilon_high is None or self.epsilon_high > 0, "positive"),
            ("reward_weights", not self.reward_weights or any(self.reward_weights), "other than 0, one at least"),
            ("beta", self.beta >= 0, "zero (no reference) or more"),
            ("num_iterations", self.num_iterations >= 1, "at least 1"),
            ("dynamic_sampling_rounds", self.dynamic_sampling_rounds >= 1, "at least 1"),
            ("curriculum", self.curriculum in CURRICULA, f"one of {', '.join(CURRICULA)}"),
            ("curriculum_target", 0 < self.curriculum_target < 1, "between 0 and 1"),
            ("curriculum_half_life", self.curriculum_half_life > 0, "positive"),
            ("prompts_from_step", self.prompts_from_step >= 0, "zero or more"),
            ("preflight_prompts", self.preflight_prompts >= 0, "zero (no pre-flight) or more"),
            ("ref_model_mixup_alpha", 0 < self.ref_model_mixup_alpha <= 1, "in (0, 1]"),
            ("ref_model_sync_steps", self.ref_model_sync_steps >= 1, "at least 1"),
        )
        for name, holds, allowed in rules:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)} must be {allowed}")
        for name, step in (self.reward_from_step or {}).items():
            if not isinstance(step, int) or isinstance(step, bool) or step < 0:
                raise ValueError(f"reward_from_step.{name}={step!r} must be a step, zero or more")
        if self.sync_ref_model and not self.beta:
            raise ValueError("sync_ref_model=true with beta=0: there is no reference; raise beta or leave it out")
        whole = self.scale_rewards == "batch" or self.multi_objective_aggregation != "sum_then_normalize"
        if self.dynamic_sampling and whole:
            raise ValueError(
                f"dynamic_sampling=true with scale_rewards={self.scale_rewards}, multi_objective_aggregation="
                f"{self.multi_objective_aggregation}: advantages over a whole rollout change with the groups that are "
                "kept; use scale_rewards=group or none, and sum_then_normalize"
            )

    def _check_replaced(self):
        defaults = {item.name: item.default for item in fields(type(self))}
        for name, instead in REPLACED.items():
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect here; leave it out and use {instead}")

    def _check_groups(self):
        steps, accumulated = self.steps_per_generation, self.gradient_accumulation_steps
        if steps % accumulated and accumulated % (steps * self.num_iterations):
            raise ValueError(
                f"steps_per_generation={steps} and gradient_accumulation_steps={accumulated}: an optimizer step would "
                "take completions of two rollouts; make one a multiple of the other"
            )
        size, group = self.generation_batch_size, self.num_generations
        if size % group:
            near = divisors_near(size, group, 2)
            sizes = [size // group * group, (size // group + 1) * group]
            raise ValueError(
                f"num_generations={group} does not divide the {size} completions of a rollout "
                "(per_device_train_batch_size x processes x steps_per_generation, by default "
                f"gradient_accumulation_steps); the nearest group sizes that do are {' and '.join(map(str, near))}, "
                f"the nearest rollouts {' and '.join(str(s) for s in sizes if s)} completions"
            )
        local = self.per_device_train_batch_size * self.steps_per_generation
        if self.dynamic_sampling and local % group:
            raise ValueError(
                f"dynamic_sampling=true keeps whole groups on each process: num_generations={group} must divide its "
                f"{local} completions (per_device_train_batch_size x steps_per_generation)"
            )
