"""The losses of distillation against plain ones, their chunks, and the choice of layers."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from recipes.distill_features import FeatureProjections, even_pairs, layer_pairs
from recipes.distill_losses import combined_loss, distillation_sums, feature_loss, teacher_divergence
from recipes.distill_students import chosen_layers
from tests.recipes.tiny_ppo import one_thread  # noqa: F401  (a fixture)

TOKENS, VOCABULARY = 23, 37


class Counting(nn.Linear):
    """A head that keeps the largest number of rows it was asked for at once."""

    most = 0

    def forward(self, states):
        self.most = max(self.most, len(states))
        return super().forward(states)


def case(seed=0, student_width=11, teacher_width=7):
    torch.manual_seed(seed)
    heads = [Counting(width, VOCABULARY, bias=False) for width in (student_width, teacher_width)]
    states = [3 * torch.randn(TOKENS, width) for width in (student_width, teacher_width)]
    return states, heads, torch.randint(VOCABULARY, (TOKENS,))


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_chunks_give_values_and_gradients_of_the_plain_loss(temperature, alpha):
    (student, teacher), heads, targets = case()
    student.requires_grad_()
    p = (heads[1](teacher).detach() / temperature).softmax(-1)
    logits = heads[0](student)
    q = (logits / temperature).softmax(-1)
    divergence = (p * (p / q).log()).sum()
    cross_entropy = -logits.softmax(-1)[range(TOKENS), targets].log().sum()
    expected = alpha * temperature**2 * divergence + (1 - alpha) * cross_entropy
    wanted = gradients(expected, student, heads[0].weight)
    for tokens in (1, 5, 1000):
        heads[0].most = heads[1].most = 0
        sums = distillation_sums(student, teacher, targets, *heads, temperature, tokens)
        loss = combined_loss(sums.divergence, sums.cross_entropy, alpha, temperature)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        for found, value in zip(gradients(loss, student, heads[0].weight), wanted):
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6 * temperature**2 * value.abs().max().item())
        assert int(sums.correct) == int((logits.argmax(-1) == targets).sum())
        assert max(heads[0].most, heads[1].most) <= tokens  # in the forward and in the backward pass
    assert heads[1].weight.grad is None


def test_no_trained_token_is_a_zero_that_reaches_every_weight():
    (student, teacher), heads, targets = case()
    none = student[:0].requires_grad_()
    sums = distillation_sums(none, teacher[:0], targets[:0], *heads, 2.0)
    gradient, = gradients(sums.divergence + sums.cross_entropy, heads[0].weight)
    assert sums.divergence.item() == 0 and gradient.abs().sum() == 0


def test_a_teacher_that_is_certain_is_the_cross_entropy():
    (student, _), heads, targets = case()
    logits = heads[0](student)
    certain = 1e4 * F.one_hot(targets, VOCABULARY)
    found = teacher_divergence(logits, certain)
    torch.testing.assert_close(found, F.cross_entropy(logits, targets, reduction="none"), rtol=1e-5, atol=1e-5)


def test_divergence_is_zero_between_equals_and_ignores_shifts():
    logits, other = torch.randn(2, TOKENS, VOCABULARY)
    assert teacher_divergence(logits, logits + 3.0, 2.0).abs().max() < 1e-5
    assert (teacher_divergence(logits, other, 2.0) > 0).all()


def test_hot_divergence_becomes_a_squared_distance():
    """Hinton et al., Sec. 2.1: T^2 KL -> half the mean squared distance of the centred logits."""
    logits, other = torch.randn(2, TOKENS, VOCABULARY, dtype=torch.float64)
    centred = [each - each.mean(-1, keepdim=True) for each in (logits, other)]
    expected = (centred[0] - centred[1]).square().mean(-1) / 2
    temperature = 50.0  # fp32: the difference of two nearly equal distributions
    found = temperature**2 * teacher_divergence(logits, other, temperature)
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.02)


def test_feature_loss_looks_at_directions_alone():
    one, two = torch.randn(2, TOKENS, 9)
    found = feature_loss(one, two)
    torch.testing.assert_close(found, 2 - 2 * F.cosine_similarity(one, two), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(feature_loss(5 * one, 0.1 * two), found)
    assert feature_loss(one, one).abs().max() < 1e-6 and feature_loss(one, -one).sub(4).abs().max() < 1e-5


def test_projections_only_between_different_widths():
    torch.manual_seed(0)
    states = [torch.randn(TOKENS, 6) for _ in range(2)], [torch.randn(TOKENS, 9) for _ in range(2)]
    maps = FeatureProjections([(0, 0), (1, 3)], 6, 9)
    expected = sum(feature_loss(s @ m.weight.T, t).sum() for m, s, t in zip(maps.maps, *states)) / 2
    torch.testing.assert_close(maps(*states), expected)
    assert not list(FeatureProjections([(0, 0)], 6, 6).parameters())


def test_layers_are_spread_evenly_and_end_at_the_last():
    assert even_pairs(2, 2, 6) == [(0, 2), (1, 5)] and even_pairs(1, 4, 8) == [(3, 7)]
    for student in range(1, 9):
        for teacher in range(student, 20):
            pairs = layer_pairs(None, student, teacher)
            assert len(pairs) == student and pairs[-1] == (student - 1, teacher - 1)
            assert [s for s, _ in pairs] == list(range(student)) and len({t for _, t in pairs}) == student
    assert layer_pairs(["0:1", "1:3"], 2, 4) == [(0, 1), (1, 3)] and layer_pairs(["1"], 3, 5) == [(2, 4)]


@pytest.mark.parametrize("given, reason", [
    (["0:4"], "the student has layers 0 to 1, the teacher 0 to 3"), (["3"], r"must lie in \[1, 2\]"),
    (["a:1"], "pairs student:teacher"),
])  # fmt: skip
def test_layers_that_are_not_there(given, reason):
    with pytest.raises(ValueError, match=reason):
        layer_pairs(given, 2, 4)


def test_kept_layers_reach_from_the_first_to_the_last():
    assert chosen_layers([3], 6) == [0, 2, 5] and chosen_layers([0, 4], 6) == [0, 4] and chosen_layers([6], 6) == [
        *range(6)
    ]
    for given in ([7], [0], [2, 1], [0, 6], [1, 1]):
        with pytest.raises(ValueError, match="student_layers"):
            chosen_layers(given, 6)
    assert math.isclose(float(combined_loss(2.0, 3.0, 0.25, 2.0)), 0.25 * 4 * 2 + 0.75 * 3)
