"""The equations of PPO against plain Python, one sequence and one token at a time."""

import math

import pytest
import torch

from recipes.ppo_losses import (
    adapted_kl_coef,
    generalized_advantages,
    kl_estimate,
    policy_loss,
    value_loss,
    whiten,
)


def random_masks(rows=40, length=9, seed=0):
    """Right padding, left padding, gaps, and empty rows."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    mask[:10] = torch.arange(length) < torch.randint(0, length + 1, (10, 1), generator=generator)
    mask[10:20] = torch.arange(length) >= torch.randint(0, length + 1, (10, 1), generator=generator)
    return mask


def plain_advantages(rewards, values, mask, gamma, lam, last):
    """GAE as in arXiv:1506.02438, Eq. 16: the discounted sum of the residuals of the chosen tokens."""
    chosen = [place for place, keep in enumerate(mask) if keep]
    following = [values[place] for place in chosen[1:]] + [last]
    deltas = [rewards[place] + gamma * after - values[place] for place, after in zip(chosen, following)]
    advantages = [0.0] * len(mask)
    for start, place in enumerate(chosen):
        advantages[place] = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[start:]))
    return advantages


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8), (0.99, 0.0)])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_generalised_advantages(gamma, lam, bootstrap):
    torch.manual_seed(0)
    mask = random_masks()
    rewards, values, last = torch.randn(40, 9), torch.randn(40, 9), torch.randn(40)
    advantages, returns = generalized_advantages(rewards, values, mask, gamma, lam, last if bootstrap else None)
    for row in range(40):
        end = last[row].item() if bootstrap else 0.0
        expected = plain_advantages(rewards[row].tolist(), values[row].tolist(), mask[row].tolist(), gamma, lam, end)
        assert advantages[row].tolist() == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(returns, (advantages + values) * mask)


def test_without_values_advantages_are_rewards_to_go():
    mask, rewards = random_masks(), torch.randn(40, 9, generator=torch.Generator().manual_seed(1))
    advantages, returns = generalized_advantages(rewards, torch.zeros(40, 9), mask, 1.0, 1.0)
    expected = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected)


def test_masked_places_do_not_matter():
    mask, (rewards, values) = random_masks(), torch.randn(2, 40, 9)
    noisy = [torch.where(mask, part, torch.full_like(part, 1e6)) for part in (rewards, values)]
    pairs = (generalized_advantages(*given, mask, 1.0, 0.9) for given in ((rewards, values), noisy))
    for one, other in zip(*pairs):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(whiten(values, mask), whiten(noisy[1], mask))


def test_whitening():
    mask, values = random_masks(), 1e3 + 5 * torch.randn(40, 9, generator=torch.Generator().manual_seed(2))
    chosen = [value for row, keep in zip(values.tolist(), mask.tolist()) for value, k in zip(row, keep) if k]
    mean = sum(chosen) / len(chosen)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in chosen) / len(chosen))
    torch.testing.assert_close(whiten(values, mask), (values - mean) / deviation * mask, atol=1e-3, rtol=1e-3)
    scaled = (values - mean) / deviation + mean
    torch.testing.assert_close(whiten(values, mask, shift_mean=False), scaled * mask, atol=1e-3, rtol=1e-5)


def test_two_halves_whitened_together_equal_the_whole():
    mask, values = random_masks(), torch.randn(40, 9)
    halves = [slice(0, 15), slice(15, 40)]
    stage, kept = [0], {}

    def reduce_for(part):
        def reduce(sums):  # what all-reduce would give: the same sum for both, taken from the whole
            stage[0] += 1
            if sums.ndim:
                return torch.stack([(values * mask).sum(), mask.sum().float()])
            mean = (values * mask).sum() / mask.sum()
            return ((values - mean).square() * mask).sum()

        return reduce

    for name, part in enumerate(halves):
        kept[name] = whiten(values[part], mask[part], reduce_for(part))
    torch.testing.assert_close(torch.cat([kept[0], kept[1]]), whiten(values, mask))


def test_a_constant_added_to_all_rewards_leaves_whitened_advantages_unchanged():
    """With gamma = lambda = 1 a constant at the end raises all advantages of a sequence alike."""
    mask = torch.arange(9) < torch.tensor([[3], [9], [5], [1]])
    rewards, values = torch.randn(4, 9) * mask, torch.randn(4, 9) * mask
    shifted = rewards.clone()
    shifted[torch.arange(4), mask.sum(1) - 1] += 7.0
    one, other = (whiten(generalized_advantages(r, values, mask, 1.0, 1.0)[0], mask) for r in (rewards, shifted))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_kl_estimators():
    """Both are the exact KL in the mean over what the policy samples; k3 is never negative."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    exact = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist()))
    for kind in ("k1", "k3"):
        assert (p * kl_estimate(p.log(), q.log(), kind)).sum().item() == pytest.approx(exact, rel=1e-5)
    log_p, log_q = -torch.rand(100) * 9, -torch.rand(100) * 9
    k3 = kl_estimate(log_p, log_q, "k3").tolist()
    assert min(k3) >= 0
    expected = [math.exp(b - a) - 1 - (b - a) for a, b in zip(log_p.tolist(), log_q.tolist())]
    assert k3 == pytest.approx(expected, rel=1e-3, abs=1e-5)
    with pytest.raises(ValueError, match="kl_estimator='k2' must be k1 or k3"):
        kl_estimate(log_p, log_q, "k2")


def test_policy_loss():
    torch.manual_seed(0)
    old, advantages = -torch.rand(6, 5), torch.randn(6, 5)
    new = (old + 0.5 * torch.randn(6, 5)).requires_grad_()
    loss, ratio, clipped = policy_loss(new, old, advantages, 0.2, 0.3)
    for place in [(i, j) for i in range(6) for j in range(5)]:
        r, a = math.exp(new[place].item() - old[place].item()), advantages[place].item()
        assert loss[place].item() == pytest.approx(-min(r * a, min(max(r, 0.8), 1.3) * a), abs=1e-5)
        assert ratio[place].item() == pytest.approx(r, rel=1e-5)
        outside = (r > 1.3 and a > 0) or (r < 0.8 and a < 0)
        assert clipped[place].item() == outside
    loss.sum().backward()
    assert torch.equal(new.grad == 0, clipped)  # a clipped token teaches nothing


def test_policy_loss_on_policy_is_reinforce():
    old, advantages = -torch.rand(4, 5), torch.randn(4, 5)
    new = old.clone().requires_grad_()
    loss, ratio, _ = policy_loss(new, old, advantages, 0.2, 0.2)
    assert torch.equal(ratio, torch.ones(4, 5))
    loss.sum().backward()
    torch.testing.assert_close(new.grad, -advantages)


def test_value_loss():
    values, old, returns = torch.randn(3, 30).unbind()
    loss, clipped = value_loss(values, old, returns, 0.5)
    for v, o, r, found, was_clipped in zip(*(x.tolist() for x in (values, old, returns, loss, clipped))):
        near = o + min(max(v - o, -0.5), 0.5)
        assert found == pytest.approx(0.5 * max((v - r) ** 2, (near - r) ** 2), rel=1e-5)
        assert was_clipped == (abs(v - o) > 0.5 and (near - r) ** 2 > (v - r) ** 2)
    free, never = value_loss(values, old, returns, None)
    torch.testing.assert_close(free, 0.5 * (values - returns) ** 2)
    assert not never.any()


def test_the_kl_coefficient_adapts():
    """arXiv:1909.08593, Sec. 2.2: proportional control with the error clipped at a fifth."""
    assert adapted_kl_coef(0.1, 6.6, 6.0, 1_000, 10_000) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert adapted_kl_coef(0.1, 60.0, 6.0, 1_000, 10_000) == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    assert adapted_kl_coef(0.1, 0.0, 6.0, 1_000, 10_000) == pytest.approx(0.1 * (1 - 0.2 * 0.1))
    assert adapted_kl_coef(0.1, -5.0, 6.0, 10**9, 10_000) == pytest.approx(0.08)  # never below a fifth less
