"""Settings that every trainer with rollouts shares: prompts' limit, expert balance, router replay."""

from dataclasses import dataclass

from recipes.run_settings import setting

BALANCE = ("update", "frozen")


@dataclass
class RolloutArguments:
    """Put before `trl.GRPOConfig` in the list of bases; `check_rollout_arguments` is called by `__post_init__`."""

    max_prompt_length: int | None = setting(None, "Longest prompt in tokens. Default: what the context leaves.")
    expert_balance: str = setting(
        "update",
        "Routing biases of a DeepSeek model: update (once a rollout, so that rollout and update route alike) or "
        "frozen.",
    )
    router_replay: bool | None = setting(
        None,
        "Train with the experts that were chosen while sampling (arXiv:2510.11370). Default: where the policy is a "
        "DeepSeek model with experts that samples through generate.",
    )
    route_probe_rows: int = setting(
        16,
        "Completions of a rollout on which routing and probabilities of sampler and trainer are compared, with and "
        "without replay; 0: none.",
    )

    def check_rollout_arguments(self):
        if self.expert_balance not in BALANCE:
            raise ValueError(f"expert_balance={self.expert_balance!r} must be one of {', '.join(BALANCE)}")
        rules = (
            ("max_prompt_length", self.max_prompt_length is None or self.max_prompt_length >= 1, "at least 1"),
            ("route_probe_rows", self.route_probe_rows >= 0, "zero (no comparison) or more"),
            ("temperature", self.temperature > 0, "positive: the policy learns from what it samples"),
        )
        for name, holds, allowed in rules:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)} must be {allowed}")
        others = [
            name for name in ("use_vllm", "use_transformers_continuous_batching") if getattr(self, name)
        ]
        if self.router_replay and others:
            raise ValueError(
                f"router_replay=true with {others[0]}=true: only generate records the experts it chose; leave one out"
            )
