from itertools import combinations
from statistics import NormalDist

import numpy
import pytest
from scipy import stats

from recipes.intervals import (
    bootstrap_interval,
    expected_calibration_error,
    majority,
    mean_interval,
    paired_difference_interval,
    pass_at_k,
    wilson_interval,
)


@pytest.mark.parametrize("successes, trials", [(0, 1), (0, 10), (3, 10), (10, 10), (499, 1000), (1, 1)])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_wilson_equals_scipy(successes, trials, confidence):
    expected = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    assert wilson_interval(successes, trials, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def coverage(interval_of, truth, draws):
    inside = [low <= truth <= high for low, high in map(interval_of, draws)]
    return sum(inside) / len(inside)


def test_wilson_and_bootstrap_cover_the_truth_as_often_as_they_say():
    rng = numpy.random.default_rng(1)
    for share in (0.05, 0.4):
        draws = rng.binomial(40, share, 2000)
        assert coverage(lambda c: wilson_interval(c, 40), share, draws) == pytest.approx(0.95, abs=0.03)
    # 12 skewed values: the plain percentile interval covers in about 89 % here.
    draws = rng.beta(1, 3, (1000, 12))
    assert coverage(lambda v: bootstrap_interval(v, resamples=400), 0.25, draws) == pytest.approx(0.95, abs=0.03)


def test_bootstrap_resamples_groups_as_wholes():
    rng = numpy.random.default_rng(2)

    def clustered(count=25, size=8):  # samples of one problem are alike
        return rng.beta(0.5, 0.5, count).repeat(size), numpy.arange(count).repeat(size)

    draws = [clustered() for _ in range(400)]
    assert coverage(lambda d: bootstrap_interval(d[0], resamples=300, groups=d[1]), 0.5, draws) > 0.92
    assert coverage(lambda d: bootstrap_interval(d[0], resamples=300), 0.5, draws) < 0.7
    # Of equal sizes: the same as the bootstrap over the groups' means. Labels and their order are free.
    values, labels = draws[0]
    one = bootstrap_interval(values, groups=[f"problem {label}" for label in labels])
    assert one == pytest.approx(bootstrap_interval(values[::8]), abs=1e-12)
    # Of unequal sizes: the mean of all values, not of the groups' means.
    low, high = bootstrap_interval([1.0] * 99 + [0.0], groups=["a"] * 99 + ["b"])
    assert (low, high) == (0.0, 1.0)


def test_bootstrap_against_student_and_edge_cases():
    values = numpy.random.default_rng(3).normal(size=400)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    half = (expected.high - expected.low) / 2
    assert bootstrap_interval(values, resamples=4000) == pytest.approx(expected, abs=0.1 * half)
    wide, narrow = bootstrap_interval(values, 0.99), bootstrap_interval(values, 0.5)
    assert wide[0] < narrow[0] < values.mean() < narrow[1] < wide[1]
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1) != bootstrap_interval(values)
    assert bootstrap_interval([0.3]) == (0.3, 0.3)
    assert bootstrap_interval([0.5] * 7) == (0.5, 0.5)
    # More groups than one block holds in a row.
    low, high = bootstrap_interval(numpy.arange(300_000) % 2, resamples=20)
    assert 0.49 < low < 0.5 < high < 0.51


def test_mean_interval_chooses_by_the_values():
    assert mean_interval([True, False, True, True]) == wilson_interval(3, 4)
    assert mean_interval([1.0] * 5) == wilson_interval(5, 5)
    # As many zeros and ones as would vary alike, corrected by Student's quantile for 12 values.
    shares = [0.25, 0.75, 0.5, 0.25, 0.75, 0.5] * 2
    effective = 12 * 0.25 / numpy.var(shares, ddof=1) * (stats.norm.ppf(0.975) / stats.t.ppf(0.975, 11)) ** 2
    assert mean_interval(shares) == pytest.approx(wilson_interval(effective / 2, effective)) and effective > 40
    large = numpy.random.default_rng(7).beta(2, 3, 2000)
    assert mean_interval(large) == pytest.approx(bootstrap_interval(large), abs=1e-3)
    # One answer in 120 is right; the bootstrap would end at 0.025, Wilson's interval for none in 30 at 0.11.
    assert mean_interval([0.25] + [0.0] * 29)[1] > 0.04


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_few_or_equal_shares_never_look_certain(count):
    """The bootstrap cannot leave the range of its values: one problem, or equal ones, would have no interval."""
    assert mean_interval([0.25] * count) == wilson_interval(0.25 * count, count)
    difference, low, high = paired_difference_interval([0.5] * count, [0.25] * count)
    assert difference == 0.25 and high - low > 0.05 and (low < 0 or count == 40)
    assert paired_difference_interval([0.5] * count, [0.5] * count)[1] < 0

    rng = numpy.random.default_rng(count)
    draws = rng.binomial(4, rng.beta(6, 14, (500, count))) / 4  # mean 0.3, four samples of each problem
    assert coverage(mean_interval, 0.3, draws) > 0.93
    pairs = list(zip(draws[:250], draws[250:]))
    assert coverage(lambda p: paired_difference_interval(*p, resamples=300)[1:], 0, pairs) > 0.9


def test_paired_difference():
    a, b = [1, 1, 1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 0, 1, 0]
    difference, low, high = paired_difference_interval(a, b)
    # Agresti and Min by hand: 4 gained, 1 lost, n = 8.
    centre, half = 3 / 10, 1.959963985 * ((6 - 9 / 10) ** 0.5 / 10)
    assert (difference, low, high) == pytest.approx((3 / 8, centre - half, centre + half))
    assert paired_difference_interval(b, a) == pytest.approx((-difference, -high, -low))
    none, low, high = paired_difference_interval([1, 0] * 5, [1, 0] * 5)
    assert none == 0 and low < 0 < high
    assert paired_difference_interval([1] * 4, [0] * 4)[::2] == (1.0, 1.0)

    rng = numpy.random.default_rng(4)
    hard = rng.uniform(size=(400, 60))  # the same problem is hard for both
    first, second = (rng.uniform(size=hard.shape) < hard**power for power in (1.0, 1.5))
    pairs = list(zip(first.astype(float), second.astype(float)))
    assert coverage(lambda p: paired_difference_interval(*p)[1:], 0.1, pairs) == pytest.approx(0.95, abs=0.03)
    means = list(zip(hard + rng.uniform(-0.2, 0.2, hard.shape) * hard * (1 - hard), hard))
    assert coverage(lambda p: paired_difference_interval(*p, resamples=300)[1:], 0, means) == pytest.approx(
        0.95, abs=0.035)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = [min(subset) < c for subset in combinations(range(n), k)]  # the first c are right
            assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)
    assert pass_at_k(10_000, 1, 10) == pytest.approx(0.001)
    assert isinstance(pass_at_k(n, 0, 1), float)


def test_majority():
    assert majority(["4", "5", "5", None]) == ("5", 0.5)
    assert majority(["b", "a", "a", "b"]) == ("b", 0.5)
    assert majority([None, None, None, "7"]) == ("7", 0.25)
    assert majority([None, None]) == (None, 0.0)
    assert majority([0, 0, ""])[0] == 0  # what is false in Python is an answer all the same


def test_expected_calibration_error_by_hand():
    ece, table = expected_calibration_error([0.0, 0.2, 0.2, 0.95, 1.0], [0, 1, 0, 1, 1], bins=5)
    assert table[0] == (0.0, 0.2, 1, 0.0, 0.0)
    assert table[1] == pytest.approx((0.2, 0.4, 2, 0.2, 0.5))  # 0.2 lies in the bin that it opens
    assert table[2] == pytest.approx((0.8, 1.0, 2, 0.975, 1.0))
    assert ece == pytest.approx((2 * 0.3 + 2 * 0.025) / 5)
    rng = numpy.random.default_rng(5)
    sure = rng.uniform(size=20_000)
    right = rng.uniform(size=20_000) < sure
    ece, table = expected_calibration_error(sure, right)
    assert ece < 0.02 and sum(row[2] for row in table) == 20_000
    assert expected_calibration_error(sure, ~right)[0] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("call, message", [
    (lambda: wilson_interval(3, 2), "successes=3 of trials=2"),
    (lambda: wilson_interval(0, 0), "trials >= 1"),
    (lambda: wilson_interval(1, 2, confidence=95), "confidence=95 must lie between 0 and 1"),
    (lambda: bootstrap_interval([]), "non-empty"),
    (lambda: bootstrap_interval([0.0, float("nan")]), r"values\[1\] is not a finite number"),
    (lambda: bootstrap_interval([0.1, 0.2], groups=["a"]), "1 labels for 2 values"),
    (lambda: bootstrap_interval([0.1, 0.2], resamples=0), "resamples=0"),
    (lambda: pass_at_k(4, 5, 1), "c=5 right samples of n=4"),
    (lambda: pass_at_k(4, 2, 5), r"k=5 must lie in \[1, n=4\]"),
    (lambda: pass_at_k(4, 2, 0), "k=0"),
    (lambda: majority([]), "empty"),
    (lambda: mean_interval([]), "non-empty"),
    (lambda: mean_interval([0.5, 1.5]), "per_problem_values holds 0.5 to 1.5"),
    (lambda: paired_difference_interval([1, 0], [1]), "a has 2 and b 1"),
    (lambda: paired_difference_interval([1, 0], [1, -1]), "b holds -1 to 1"),
    (lambda: expected_calibration_error([1.2], [1]), r"confidences\[0\]=1.2"),
    (lambda: expected_calibration_error([0.2], [0.5]), "truth values"),
    (lambda: expected_calibration_error([0.2, 0.3], [1]), "2 confidences for 1"),
    (lambda: expected_calibration_error([0.2], [1], bins=0), "bins=0"),
])  # fmt: skip
def test_bad_input_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_quantile_of_the_intervals_is_the_normal_one():
    # At a large n Wilson's interval is p +- z sqrt(p (1 - p) / n).
    low, high = wilson_interval(500_000, 1_000_000, 0.9)
    assert (high - low) / 2 == pytest.approx(NormalDist().inv_cdf(0.95) * 0.0005, rel=1e-4)
