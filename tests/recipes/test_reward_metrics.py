"""Figures of reward models against scipy, direct computation and their definitions."""

import numpy
import pytest
from scipy.special import expit
from scipy.stats import mannwhitneyu, pearsonr, spearmanr

from recipes.intervals import wilson_interval
from recipes.reward_metrics import (
    calibration,
    preference_metrics,
    preferred,
    process_metrics,
    ranking_auc,
    share,
)


def figures(count=300, seed=0, **changes):
    rng = numpy.random.default_rng(seed)
    arguments = {
        "chosen": rng.normal(0.5, 1, count), "rejected": rng.normal(0, 1, count),
        "chosen_tokens": rng.integers(5, 50, count), "rejected_tokens": rng.integers(5, 50, count),
        "problems": [str(i) for i in range(count)], "sources": ["a" if i % 3 else "b" for i in range(count)],
    }  # fmt: skip
    arguments |= changes
    return arguments, preference_metrics(**arguments)


def test_accuracy_loss_and_margins():
    data, found = figures(margins=0.25, centring=0.01)
    chosen, rejected = data["chosen"], data["rejected"]
    right = int((chosen > rejected).sum())
    assert found["accuracy"]["value"] == right / 300
    assert (found["accuracy"]["low"], found["accuracy"]["high"]) == pytest.approx(wilson_interval(right, 300))
    loss = -numpy.log(expit(chosen - rejected - 0.25)) + 0.01 * (chosen + rejected) ** 2
    assert found["loss"] == pytest.approx(loss.mean())
    assert found["by_source"]["b"]["pairs"] == 100
    assert found["by_source"]["b"]["value"] == (chosen > rejected)[::3].mean()
    assert found["by_source"]["b"]["longer"]["value"] == preferred(data["chosen_tokens"], data["rejected_tokens"])[
        ::3].mean()
    assert found["by_kind"] == {}
    kinds = ["easy" if source == "a" else "b" for source in data["sources"]]
    _, split = figures(kinds=kinds)
    assert split["by_kind"] == {"a: easy": split["by_source"]["a"]}
    assert found["margin"]["mean"] == pytest.approx((chosen - rejected).mean())
    assert preferred([1, 2, 0], [0, 2, 1]).tolist() == [1, 0.5, 0]


def test_pairs_of_one_problem_count_as_what_they_are():
    """Every pair five times over says no more than each once; independent pairs lose nothing."""
    right = numpy.random.default_rng(0).random(200) < 0.7
    once, groups = share(right), numpy.repeat(range(200), 5)
    copies = share(numpy.repeat(right, 5), groups)
    assert copies["value"] == once["value"]
    assert copies["high"] - copies["low"] == pytest.approx(once["high"] - once["low"], rel=0.02)
    shuffled = numpy.random.default_rng(1).permutation(numpy.repeat(right, 5))
    naive = wilson_interval(int(shuffled.sum()), 1000)
    found = share(shuffled, groups)
    assert found["high"] - found["low"] == pytest.approx(naive[1] - naive[0], rel=0.15)
    sure = share([1.0] * 20, ["p"] * 10 + ["q"] * 10)
    assert sure["high"] == 1 and sure["low"] < 0.5


def test_calibration():
    rng = numpy.random.default_rng(0)
    difference = rng.normal(0, 2, 20_000)
    sign = numpy.where(rng.random(20_000) < expit(difference), 1, -1)  # a calibrated model's pairs, best side first
    found = calibration(sign * difference, numpy.zeros(20_000))
    assert found["ece"] < 0.01
    assert calibration(3 * sign * difference, numpy.zeros(20_000))["ece"] > 0.1
    low, high = found["table"][1], found["table"][-2]
    assert low[2] == high[2] and low[3] == pytest.approx(1 - high[3]) and low[4] == pytest.approx(1 - high[4])
    assert calibration([0.0], [0.0])["ece"] == 0 and calibration([0.0], [0.0])["brier"] == 0.25


def test_length_bias():
    data, found = figures()
    rewards = numpy.concatenate([data["chosen"], data["rejected"]])
    lengths = numpy.concatenate([data["chosen_tokens"], data["rejected_tokens"]])
    assert found["length"]["pearson"] == pytest.approx(pearsonr(rewards, lengths)[0])
    assert found["length"]["spearman"] == pytest.approx(spearmanr(rewards, lengths)[0])
    longer = data["chosen_tokens"] > data["rejected_tokens"]
    part = found["length"]["accuracy"]["chosen longer"]
    assert part["pairs"] == longer.sum() and part["value"] == (data["chosen"] > data["rejected"])[longer].mean()
    _, talker = figures(chosen=data["chosen_tokens"] / 8, rejected=data["rejected_tokens"] / 8)
    assert talker["length"]["pair_spearman"] == pytest.approx(1)
    assert talker["accuracy"]["value"] == pytest.approx(talker["baselines"]["longer"]["value"])
    _, flat = figures(chosen=numpy.zeros(300), rejected=numpy.zeros(300))
    assert flat["length"]["pearson"] is None and flat["accuracy"]["value"] == 0.5


def test_auc_is_the_rank_statistic():
    rng = numpy.random.default_rng(0)
    scores, right = rng.integers(0, 6, 200).astype(float), rng.random(200) < 0.4
    u = mannwhitneyu(scores[right], scores[~right]).statistic
    assert ranking_auc(scores, right) == pytest.approx(u / (right.sum() * (~right).sum()))
    assert ranking_auc([1, 2], [True, True]) is None


def test_process_figures_by_hand():
    labels = [[1, 1, 0], [1, 1], [0, 0], [1, 1, 1]]
    probabilities = [[0.9, 0.8, 0.2], [0.9, 0.4], [0.3, 0.9], [0.6, 0.6, 0.6]]
    found = process_metrics(probabilities, labels, ["p", "q", "r", "s"], ["x"] * 4)
    assert found["steps"] == 10 and found["accuracy"]["value"] == pytest.approx(0.8)
    assert found["first_error"]["wrong solutions"]["value"] == 1.0  # the second step of the third does not matter
    assert found["first_error"]["right solutions"]["value"] == 0.5
    assert found["first_error"]["f1"] == pytest.approx(2 / 3)
    assert found["solution_auc"] == {"min": 1.0, "product": 0.75}  # 0.144, 0.27 against 0.36, 0.216
    assert found["baselines"]["more frequent label"] == pytest.approx(0.7)
