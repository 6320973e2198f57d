"""The equations of PPO on token sequences, as functions of tensors.

Sources: PPO (arXiv:1707.06347); GAE (arXiv:1506.02438); the token-level form with KL in the reward (arXiv:1909.08593,
InstructGPT, arXiv:2203.02155); clip-higher (DAPO, arXiv:2503.14476).

Shapes: B sequences, T completion tokens. `mask` (B, T) is 1 at tokens the policy chose and 0 elsewhere: padding on
either side, or text that a tool put in between. What stands at masked places never enters a result.
"""

import torch


def generalized_advantages(rewards, values, mask, gamma, lam, last_values=None):
    """Advantages by generalised advantage estimation (arXiv:1506.02438, Eqs. 11, 16), and returns.

        delta_t = r_t + gamma * V(s_t+1) - V(s_t),    A_t = delta_t + gamma * lam * A_t+1,    R_t = A_t + V(s_t)

    where t + 1 is the next token *of the policy*: the recursion steps over masked places.

    Args:
        rewards: (B, T) reward that follows each token.
        values: (B, T) value of the state in which each token was chosen.
        last_values: (B,) value of the state after the last token; None: 0, the sequences have ended.
    Returns:
        advantages (B, T), returns (B, T); 0 at masked places.
    """
    rewards, values, mask = rewards.float(), values.float(), mask.bool()
    following = torch.zeros_like(values[:, 0]) if last_values is None else last_values.float()
    advantage, advantages = torch.zeros_like(following), torch.zeros_like(values)
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * following - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        following = torch.where(mask[:, t], values[:, t], following)
        advantages[:, t] = advantage
    advantages = advantages.masked_fill(~mask, 0.0)
    return advantages, (advantages + values).masked_fill(~mask, 0.0)


def whiten(values, mask, reduce=None, shift_mean=True, eps=1e-8):
    """Values with mean 0 (or their own, without `shift_mean`) and variance 1 over the places where mask is 1.

    Args:
        reduce: adds a tensor up over all processes, so that all of them whiten with the same two numbers.
    """
    mask = mask.to(values.dtype)
    values = values.masked_fill(mask == 0, 0.0)
    sums = torch.stack([values.sum(), mask.sum()])
    mean, count = (sums if reduce is None else reduce(sums)).unbind()
    mean = mean / count.clamp(min=1)
    squares = ((values - mean).square() * mask).sum()  # around the mean: a large mean costs no digits
    variance = (squares if reduce is None else reduce(squares)) / count.clamp(min=1)
    whitened = (values - mean) * torch.rsqrt(variance + eps)
    return (whitened if shift_mean else whitened + mean) * mask


def kl_estimate(log_probs, ref_log_probs, kind):
    """(B, T) estimate of KL(policy || reference) from the tokens that the policy chose, in nats.

    k1 = log(p / q) is unbiased, of either sign; k3 = q/p - 1 - log(q / p) is unbiased as well, never negative and of
    lower variance. Source: Schulman, "Approximating KL divergence" (2020); k3 is the one of GRPO (arXiv:2402.03300).
    """
    log_ratio = log_probs - ref_log_probs
    if kind == "k1":
        return log_ratio
    if kind == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"kl_estimator={kind!r} must be k1 or k3")


def adapted_kl_coef(kl_coef, kl, target, episodes, horizon):
    """The KL coefficient after a rollout (arXiv:1909.08593, Sec. 2.2): it grows while KL is above its target.

    Args:
        kl, target: nats, in one unit.
        episodes, horizon: the coefficient changes by up to 20 % in `horizon` episodes.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * min(episodes / horizon, 1.0))


def policy_loss(log_probs, old_log_probs, advantages, clip_low, clip_high):
    """Clipped surrogate, negated (arXiv:1707.06347, Eq. 7; the two bounds apart: arXiv:2503.14476, Eq. 10).

    Returns:
        (B, T) loss, (B, T) probability ratio, (B, T) whether the clipped term is the one that counts.
    """
    ratio = torch.exp(log_probs - old_log_probs)
    free, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return -torch.minimum(free, clipped), ratio, clipped < free


def value_loss(values, old_values, returns, clip_range):
    """Half the squared error of the values, clipped around the old ones (the larger of the two errors counts).

    `clip_range` None leaves them free. Source: as in OpenAI's baselines and arXiv:1909.08593's code.
    Returns:
        (B, T) loss, (B, T) whether the clipped error is the one that counts.
    """
    free = (values - returns).square()
    if clip_range is None:
        return 0.5 * free, torch.zeros_like(free, dtype=torch.bool)
    change = values - old_values
    clipped = (old_values + change.clamp(-clip_range, clip_range) - returns).square()
    return 0.5 * torch.maximum(free, clipped), (change.abs() > clip_range) & (clipped > free)
