"""Confidence intervals and the estimators that evaluations quote them for.

    from recipes.intervals import mean_interval, pass_at_k
    mean_interval([1, 0, 1, 1])          # accuracy over problems: Wilson's interval
    mean_interval([0.75, 0.0, 1.0])      # pass@1 as a mean over samples: the same for the effective number of problems

The problem is the unit of chance: samples of one problem are alike, so an interval over samples as if they
were independent would be too narrow. Everything here is a function of numbers; a seed makes the bootstrap
repeatable, and its result does not depend on the order of the calls.
"""

import math
from statistics import NormalDist

import numpy
from scipy.special import stdtrit

BLOCK = 2_000_000  # numbers drawn at once by the bootstrap: bounds its memory
FEW = 10  # problems; of 2 to 5 the bootstrap covered the truth in 48 to 95 % of trials only


def _numbers(name, values):
    """`values` as a one-dimensional float array; ValueError if it is empty or holds what is no finite number."""
    array = numpy.asarray(values, dtype=float)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} has shape {array.shape}: a non-empty list of numbers is needed")
    if not numpy.isfinite(array).all():
        raise ValueError(f"{name}[{numpy.flatnonzero(~numpy.isfinite(array))[0]}] is not a finite number; "
                         "leave such entries out before averaging")
    return array


def _shares(name, values):
    """`_numbers` that lie in [0, 1]."""
    array = _numbers(name, values)
    if array.min() < 0 or array.max() > 1:
        raise ValueError(f"{name} holds {array.min():g} to {array.max():g}: shares of right answers lie in [0, 1]; "
                         "bootstrap_interval takes any numbers")
    return array


def _quantile(confidence):
    """Two-sided standard normal quantile: 1.96 for 0.95."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, for instance 0.95")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _is_binary(values):
    return bool(numpy.isin(values, (0.0, 1.0)).all())


def _tells_its_spread(values):
    """Whether the bootstrap may be trusted: enough values, which differ. Otherwise its interval may have no width."""
    return len(values) >= FEW and bool((values != values[0]).any())


def wilson_interval(successes, trials, confidence=0.95):
    """Interval of a proportion. It has a width at 0 and at 1 as well, unlike the normal approximation.

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927), 209.

    Raises:
        ValueError: unless 0 <= successes <= trials and trials >= 1.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"successes={successes} of trials={trials}: need 0 <= successes <= trials and trials >= 1")
    z, share = _quantile(confidence), successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # The ends at 0 and 1 are exact; rounding would put the bound just beside the observed share.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == trials else centre + half)


def bootstrap_interval(values, confidence=0.95, resamples=2000, seed=0, groups=None):
    """Percentile bootstrap of the mean, with tails widened for small samples.

    The plain percentile interval is too narrow by sqrt((n - 1) / n) and by the normal quantile standing for
    Student's; the expanded one takes the percentiles at Phi(-sqrt(n / (n - 1)) t), n the number of groups.
    Source: Hesterberg (arXiv:1411.5279), "expanded percentile interval".

    Args:
        groups: label of each value (its problem, say); groups are drawn as wholes. Default: each value its own.
    Returns:
        (low, high). Without variation, or with one group, both equal the mean: nothing can be said about chance.
    Raises:
        ValueError: for no values, values that are not finite, or `groups` of another length.
    """
    values = _numbers("values", values)
    _quantile(confidence)
    if resamples < 1:
        raise ValueError(f"resamples={resamples} must be at least 1; 2000 is usual")
    if groups is None:
        sums, counts = values, numpy.ones(len(values))
    else:
        if len(groups) != len(values):
            raise ValueError(f"groups has {len(groups)} labels for {len(values)} values: one for each is needed")
        numbers = {label: number for number, label in enumerate(dict.fromkeys(groups))}
        places = [numbers[label] for label in groups]
        sums, counts = numpy.bincount(places, values), numpy.bincount(places)
    size, rng = len(sums), numpy.random.default_rng(seed)
    if size == 1 or (values == values[0]).all():
        return float(values.mean()), float(values.mean())
    means, rows = [], max(1, BLOCK // size)
    for start in range(0, resamples, rows):
        drawn = rng.integers(size, size=(min(rows, resamples - start), size))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    tail = NormalDist().cdf(math.sqrt(size / (size - 1)) * float(stdtrit(size - 1, 0.5 - confidence / 2)))
    low, high = numpy.quantile(numpy.concatenate(means), (tail, 1 - tail))
    return float(low), float(high)


def mean_interval(per_problem_values, confidence=0.95):
    """Interval of a mean of shares, one a problem: Wilson's for the effective number of problems.

    That is the number of zeros and ones whose mean would vary as this mean does, corrected for the uncertainty of
    the spread itself: p (1 - p) n / s^2 * (z / t)^2; at least n, as no shares of a given mean vary more than zeros and
    ones do. So it is Wilson's own interval where all values are 0 or 1, and never without width.
    Source: Korn and Graubard, Survey Methodology 24 (1998), 193, for the number; Dean and Pagano, J. Surv. Stat.
    Methodol. 3 (2015), 484, for Wilson's interval with it.

    Raises:
        ValueError: for no values, or values outside of [0, 1].
    """
    values = _shares("per_problem_values", per_problem_values)
    count, share, effective = len(values), float(values.mean()), float(len(values))
    if (values != values[0]).any():
        student = -float(stdtrit(count - 1, 0.5 - confidence / 2))
        effective *= share * (1 - share) / float(values.var(ddof=1)) * (_quantile(confidence) / student) ** 2
    effective = max(effective, count)
    # The sum itself where the number is: then the ends are exact at 0 and 1.
    return wilson_interval(float(values.sum()) if effective == count else share * effective, effective, confidence)


def paired_difference_interval(a, b, confidence=0.95, resamples=2000, seed=0):
    """Mean of a - b of shares on the same problems, with an interval: two models, or one before and after training.

    The pairing takes out what is hard about the problems. For values 0 and 1 the interval is the adjusted Wald
    one of Agresti and Min (Stat. Med. 24 (2005), 729: half a pair added to each of the four outcomes), which has
    a width also where both models agree everywhere; otherwise the bootstrap over problems. Few problems and equal
    differences get the first one as well: its pairs more are differences of 1 and of -1, half of each, and 0.

    Returns:
        (difference, low, high); an interval without 0 in it speaks for a difference.
    Raises:
        ValueError: if a and b differ in length or hold values outside of [0, 1].
    """
    a, b = _shares("a", a), _shares("b", b)
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} and b {len(b)} values: they must belong to the same problems, in one order")
    difference = a - b
    if not (_is_binary(a) and _is_binary(b)) and _tells_its_spread(difference):
        return (float(difference.mean()), *bootstrap_interval(difference, confidence, resamples, seed))
    total = len(a) + 2
    centre, square = difference.sum() / total, ((difference ** 2).sum() + 1) / total
    half = _quantile(confidence) * math.sqrt((square - centre ** 2) / total)
    return float(difference.mean()), float(max(centre - half, -1.0)), float(min(centre + half, 1.0))


def pass_at_k(n, c, k):
    """Probability that at least one of k samples is right, from n samples of which c were: 1 - C(n-c, k) / C(n, k).

    Source: Chen et al. 2021 (arXiv:2107.03374), Eq. 1; unbiased, unlike 1 - (1 - c/n)^k.

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n:
        raise ValueError(f"c={c} right samples of n={n}: need 0 <= c <= n")
    if not 1 <= k <= n:
        raise ValueError(f"k={k} must lie in [1, n={n}]: draw more samples or ask for a smaller k")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def majority(answers):
    """The most frequent answer and its share of all answers; None (unparsable) counts below the line only.

    Ties go to the answer that came first, so the result depends on the samples' order alone.

    Returns:
        (answer, share); (None, 0.0) where none could be read.
    """
    if not len(answers):
        raise ValueError("answers is empty: a majority needs at least one sample")
    votes = {}
    for answer in answers:
        if answer is not None:
            votes[answer] = votes.get(answer, 0) + 1
    if not votes:
        return None, 0.0
    best = max(votes, key=votes.get)  # the first of equals: dicts keep the order of arrival
    return best, votes[best] / len(answers)


def expected_calibration_error(confidences, corrects, bins=10):
    """Mean distance between confidence and accuracy, over bins of equal width weighted by their content.

    Source: Guo et al. 2017 (arXiv:1706.04599), Eqs. 2, 3 and 5.

    Args:
        confidences: in [0, 1]; a bin holds its lower edge, the last one also 1.
        corrects: truth values of the same length.
    Returns:
        (ece, table) with rows (low, high, count, mean confidence, accuracy), empty bins left out.
    """
    confidences, corrects = _numbers("confidences", confidences), _numbers("corrects", corrects)
    if len(confidences) != len(corrects):
        raise ValueError(f"{len(confidences)} confidences for {len(corrects)} corrects: one for each is needed")
    outside = numpy.flatnonzero((confidences < 0) | (confidences > 1))
    if len(outside):
        raise ValueError(f"confidences[{outside[0]}]={confidences[outside[0]]} must lie in [0, 1]; "
                         "a log-probability needs exp first")
    if not _is_binary(corrects):
        raise ValueError("corrects must hold truth values (True or False, 1 or 0)")
    if bins < 1:
        raise ValueError(f"bins={bins} must be at least 1")
    edges = numpy.linspace(0.0, 1.0, bins + 1)
    places = numpy.clip(numpy.searchsorted(edges, confidences, side="right") - 1, 0, bins - 1)
    table, error = [], 0.0
    for place in range(bins):
        inside = places == place
        if inside.any():
            sure, right = float(confidences[inside].mean()), float(corrects[inside].mean())
            table.append((float(edges[place]), float(edges[place + 1]), int(inside.sum()), sure, right))
            error += inside.mean() * abs(right - sure)
    return float(error), table
