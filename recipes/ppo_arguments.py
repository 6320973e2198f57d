"""`PPOConfig`: the settings of `PPOTrainer`."""

from dataclasses import dataclass, field, fields

from trl import GRPOConfig

from recipes.rollout_arguments import RolloutArguments
from recipes.run_settings import has_bf16

# Fields of GRPO's that PPO does not use: what takes their place.
REPLACED = {
    "beta": "kl_coef", "num_iterations": "num_ppo_epochs", "steps_per_generation": "num_mini_batches",
    "generation_batch_size": "per_device_train_batch_size, gradient_accumulation_steps and num_mini_batches",
    "loss_type": "nothing: the loss is a mean over tokens", "scale_rewards": "whiten_rewards and whiten_advantages",
    "multi_objective_aggregation": "reward_weights", "importance_sampling_level": "nothing: ratios are per token",
    "delta": "epsilon_high", "mask_truncated_completions": "truncated_completions: mask",
    "top_entropy_quantile": "entropy_coef", "use_adaptive_entropy": "entropy_coef",
    "use_bias_correction_kl": "kl_estimator", "off_policy_mask_threshold": "epsilon", "sync_ref_model": "kl_coef",
    "ref_model_mixup_alpha": "kl_coef", "ref_model_sync_steps": "kl_coef", "entropy_target": "entropy_coef",
    "entropy_coef_min": "entropy_coef", "entropy_coef_max": "entropy_coef", "entropy_coef_delta": "entropy_coef",
    **{
        name: "nothing: the loss is PPO's"
        for name in ("sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos",
                     "vespo_lambda_neg")
    },
    "router_aux_loss_coef": "the model's own balance: expert_balance, seq_aux_loss_alpha",
    "use_liger_kernel": "nothing: the head is fused already",
}  # fmt: skip
CHOICES = {
    "kl_estimator": ("k1", "k3"),
    "truncated_completions": ("score", "bootstrap", "mask"),
    "value_function": ("shared", "separate"),
}


def _setting(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class PPOConfig(RolloutArguments, GRPOConfig):
    """Settings of proximal policy optimisation on token sequences; everything of `trl.GRPOConfig` that has a meaning
    here (sampling, vLLM, clipping by `epsilon` and `epsilon_high`, `reward_weights`, logging), and the fields below.

    One rollout: `num_mini_batches` x `gradient_accumulation_steps` x `per_device_train_batch_size` completions on each
    process, trained `num_ppo_epochs` times in `num_mini_batches` optimizer steps.

    Raises:
        ValueError: for settings that cannot work, naming the field, its value and the way out.
    """

    num_ppo_epochs: int = _setting(4, "Times that a rollout is trained on.")
    num_mini_batches: int = _setting(1, "Optimizer steps an epoch of a rollout.")
    num_generations: int | None = _setting(1, "Completions of each prompt in a rollout.")
    gamma: float = _setting(1.0, "Discount a token.")
    lam: float = _setting(0.95, "Lambda of generalised advantage estimation; 1.0 for long reasoning (DeepSeek-R1).")
    value_function: str = _setting("shared", "shared: a head on the policy's trunk; separate: a model of its own.")
    value_model_name_or_path: str | None = _setting(
        None,
        "separate: the model to start from, e.g. the reward model (default: a copy of the policy); shared: a folder "
        "with value_head.safetensors.",
    )
    value_learning_rate: float | None = _setting(
        None,
        "Learning rate of the value function. Default: ten times learning_rate for a head on the policy's trunk, "
        "learning_rate for a model of its own.",
    )
    value_trunk_gradient: bool = _setting(
        False,
        "Whether the value loss trains the policy's trunk as well (value_function=shared). It may disturb a "
        "policy that is good already (benchmarks/LOG.md).",
    )
    vf_coef: float = _setting(0.5, "Weight of the value loss.")
    cliprange_value: float | None = _setting(
        None,
        "How far values may move from those of the rollout (0.2 in the first implementations). Default: freely, which "
        "reached more (benchmarks/LOG.md).",
    )
    epsilon: float = _setting(0.2, "Clip range of the probability ratio.")
    entropy_coef: float = _setting(0.01, "Weight of the entropy bonus, nats per token.")
    kl_coef: float = _setting(0.05, "Weight of the KL to the reference, taken from each token's reward; 0: none.")
    kl_estimator: str = _setting("k1", "Estimator of that KL: k1 or k3.")
    kl_target: float | None = _setting(
        None, "KL, in nats per token, towards which kl_coef adapts (arXiv:1909.08593). Default: kl_coef is fixed."
    )
    kl_horizon: int = _setting(10_000, "Episodes in which an adaptive kl_coef changes by up to a fifth.")
    max_kl: float | None = _setting(10.0, "Stop, with an error, where a rollout's KL exceeds this: nats per token.")
    whiten_rewards: bool = _setting(False, "Divide the tokens' rewards by their standard deviation over all processes.")
    whiten_advantages: bool = _setting(True, "Advantages with mean 0 and variance 1 over all processes' tokens.")
    truncated_completions: str = _setting(
        "score",
        "Completions cut off at max_completion_length: score (as if they had ended), bootstrap (the value of their "
        "last state in place of a score) or mask (left out of the loss).",
    )
    missing_eos_penalty: float | None = _setting(None, "Taken from the score of a completion that was cut off.")
    # TRL's defaults that mean something else for GRPO
    loss_type: str = _setting("bnpo", "Has no effect: the loss is a mean over tokens.")
    scale_rewards: str = _setting("none", "Has no effect: see whiten_advantages.")

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = has_bf16(self)  # TRL's default is an error without a GPU
        self._check_choices()
        self.check_rollout_arguments()
        self._check_numbers()
        self._check_replaced()
        self.num_iterations = self.num_ppo_epochs
        self.steps_per_generation = self.num_mini_batches * self.gradient_accumulation_steps
        rollout = self.per_device_train_batch_size * self.steps_per_generation
        if rollout < 2:
            raise ValueError(
                "a rollout of 1 completion a process leaves nothing to compare: raise per_device_train_batch_size="
                f"{self.per_device_train_batch_size}, gradient_accumulation_steps or num_mini_batches"
            )
        if self.value_learning_rate is None:
            self.value_learning_rate = self.learning_rate * (10 if self.value_function == "shared" else 1)
        if self.num_generations_eval is None:
            self.num_generations_eval = 1
        generations, self.num_generations = self.num_generations, rollout  # GRPO's own check asks for groups
        try:
            super().__post_init__()
        finally:
            self.num_generations = generations
        if self.generation_batch_size % generations:
            raise ValueError(
                f"num_generations={generations} must divide the {self.generation_batch_size} completions of a rollout "
                "(per_device_train_batch_size x gradient_accumulation_steps x num_mini_batches x processes)"
            )

    def _check_choices(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")

    def _check_numbers(self):
        rules = (
            ("num_ppo_epochs", self.num_ppo_epochs >= 1, "at least 1"),
            ("num_mini_batches", self.num_mini_batches >= 1, "at least 1"),
            ("num_generations", self.num_generations is not None and self.num_generations >= 1, "at least 1"),
            ("gamma", 0 <= self.gamma <= 1, "in [0, 1]"),
            ("lam", 0 <= self.lam <= 1, "in [0, 1]"),
            ("vf_coef", self.vf_coef >= 0, "zero or more"),
            ("cliprange_value", self.cliprange_value is None or self.cliprange_value > 0, "positive, or null"),
            ("epsilon", 0 < self.epsilon < 1, "in (0, 1)"),
            ("epsilon_high", self.epsilon_high is None or self.epsilon_high > 0, "positive"),
            ("entropy_coef", self.entropy_coef >= 0, "zero or more"),
            ("kl_coef", self.kl_coef >= 0, "zero (no reference) or more"),
            ("kl_target", self.kl_target is None or self.kl_target > 0, "positive"),
            ("kl_horizon", self.kl_horizon >= 1, "at least 1"),
            ("max_kl", self.max_kl is None or self.max_kl > 0, "positive, or null"),
            ("value_learning_rate", self.value_learning_rate is None or self.value_learning_rate > 0, "positive"),
            ("reward_weights", not self.reward_weights or any(self.reward_weights), "other than 0, one at least"),
        )
        for name, holds, allowed in rules:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)} must be {allowed}")
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError(f"kl_target={self.kl_target} needs a kl_coef above 0 to start from")
        if self.missing_eos_penalty and self.truncated_completions != "score":
            raise ValueError(
                f"missing_eos_penalty={self.missing_eos_penalty} has no effect with truncated_completions="
                f"{self.truncated_completions}, where a completion that was cut off has no score; use score"
            )

    def _check_replaced(self):
        # What `__post_init__` has set itself may be there already where a config is made from another one.
        derived = {
            "num_iterations": self.num_ppo_epochs,
            "steps_per_generation": self.num_mini_batches * self.gradient_accumulation_steps,
        }
        if self.steps_per_generation == derived["steps_per_generation"]:
            self.generation_batch_size = None
        defaults = {item.name: item.default for item in fields(type(self))}
        for name, instead in REPLACED.items():
            value = getattr(self, name)
            if value != defaults[name] and value != derived.get(name, defaults[name]):
                raise ValueError(f"{name}={value!r} has no effect in PPO; leave it out and use {instead}")
