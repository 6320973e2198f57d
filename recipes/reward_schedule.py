"""Rewards that begin to count later: R1's second RL stage adds preference rewards for its last 400 of 1,700 steps only
(DeepSeek-R1, arXiv:2501.12948), since more of them invites the policy to deceive the reward model."""


def weights_at(step, weights, from_step=None):
    """{reward: weight} at an optimizer step: a reward weighs nothing before its first step.

    Args:
        step: finished optimizer steps (`state.global_step`); weights: {reward: weight}.
        from_step: {reward: first step that it counts at}; the others count from the first on.
    Raises:
        ValueError: for a name that is no reward, or a negative step.
    """
    from_step = from_step or {}
    unknown = [name for name in from_step if name not in weights]
    if unknown:
        raise ValueError(f"from_step names {unknown[0]!r}, which is not among the rewards {', '.join(weights)}")
    negative = [name for name, first in from_step.items() if first < 0]
    if negative:
        raise ValueError(f"from_step.{negative[0]}={from_step[negative[0]]} must be zero or more")
    return {name: weight if step >= from_step.get(name, 0) else 0.0 for name, weight in weights.items()}
