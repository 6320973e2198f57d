"""Figures of reward models as functions of lists: pairs (accuracy, calibration, length) and steps (process rewards).

A share is {"value", "low", "high"} with a 95 % interval over problems: pairs of one problem are alike.
"""

import numpy
from scipy.special import expit, log_expit, stdtrit
from scipy.stats import pearsonr, rankdata, spearmanr

from recipes.intervals import expected_calibration_error, mean_interval, wilson_interval

BINS = 10
Z = 1.959963984540054  # two-sided 95 % of the standard normal


def share(values, groups=None):
    """{"value", "low", "high"} of the mean of numbers in [0, 1]: Wilson's interval, also where groups are alike.

    The mean over all values is a ratio of sums over groups (problems); its variance by linearisation gives the number
    of independent values that would vary as much, and Wilson's interval is taken for that number.
    Source: Korn and Graubard, Survey Methodology 24 (1998), 193, as in `intervals.mean_interval`.
    """
    values = numpy.asarray(values, dtype=float)
    mean = float(values.mean())
    labels = list(range(len(values))) if groups is None else list(groups)
    places = numpy.unique(labels, return_inverse=True)[1]
    count = int(places.max()) + 1
    if count == len(values):
        low, high = mean_interval(values)
    else:
        residuals = numpy.bincount(places, values - mean)
        variance = (residuals**2).sum() / len(values) ** 2 * count / max(count - 1, 1)
        effective = float(count)  # nothing varies, or there is one problem: as if its values were one
        if variance > 0 and count > 1:
            student = -float(stdtrit(count - 1, 0.025))
            effective = min(max(mean * (1 - mean) / variance * (Z / student) ** 2, 1.0), float(len(values)))
        low, high = wilson_interval(min(mean * effective, effective), effective)
    return {"value": mean, "low": float(low), "high": float(high)}


def correlation(function, x, y):
    """Pearson's or Spearman's coefficient; None where one of the two does not vary."""
    if len(x) < 2 or len(set(map(float, x))) < 2 or len(set(map(float, y))) < 2:
        return None
    return float(function(x, y).statistic)


def preferred(chosen, rejected):
    """1 where the chosen side has the larger reward, 1/2 where both are equal, 0 else."""
    difference = numpy.asarray(chosen, dtype=float) - numpy.asarray(rejected, dtype=float)
    return (numpy.sign(difference) + 1) / 2


def calibration(chosen, rejected, bins=BINS):
    """Predicted probability sigmoid(r_c - r_r) that a side is the better one, against how often it is.

    Each pair counts in both orders, as its order carries nothing: the table is symmetric about 1/2.
    """
    probability = expit(numpy.asarray(chosen, dtype=float) - numpy.asarray(rejected, dtype=float))
    both = numpy.concatenate([probability, 1 - probability])
    error, table = expected_calibration_error(both, numpy.repeat([1.0, 0.0], len(probability)), bins)
    return {"ece": error, "brier": float(((1 - probability) ** 2).mean()), "table": table}


def length_bias(rewards, lengths, right, groups):
    """How far reward follows length: `rewards` and `lengths` (2, N) of chosen and rejected, `right` (N,).

    `pair_*`: of the differences inside a pair, which share their problem. "longer": the accuracy of preferring the
    longer side.
    """
    rewards, lengths, groups = numpy.asarray(rewards, float), numpy.asarray(lengths, float), numpy.asarray(groups)
    difference = lengths[0] - lengths[1]
    found = {
        "pearson": correlation(pearsonr, rewards.ravel(), lengths.ravel()),
        "spearman": correlation(spearmanr, rewards.ravel(), lengths.ravel()),
        "pair_pearson": correlation(pearsonr, rewards[0] - rewards[1], difference),
        "pair_spearman": correlation(spearmanr, rewards[0] - rewards[1], difference),
        "mean_tokens": {"chosen": float(lengths[0].mean()), "rejected": float(lengths[1].mean())},
        "accuracy": {},
    }
    parts = (("chosen longer", difference > 0), ("chosen shorter", difference < 0), ("equal", difference == 0))
    for name, kept in parts:
        if kept.any():
            found["accuracy"][name] = {"pairs": int(kept.sum())} | share(right[kept], groups[kept])
    return found


def bradley_terry_loss(chosen, rejected, margins, centring=0.0):
    """Mean loss in nats per pair, as the trainer's: -log sigmoid(r_c - r_r - margin) + centring (r_c + r_r)^2."""
    chosen, rejected = numpy.asarray(chosen, float), numpy.asarray(rejected, float)
    losses = -log_expit(chosen - rejected - numpy.asarray(margins)) + centring * (chosen + rejected) ** 2
    return float(losses.mean())


def by_group(groups, unit, right, problems, longer=None):
    """{group: its number of `unit`, accuracy with interval, and that of preferring the longer side}."""
    groups, found = numpy.asarray(groups), {}
    for group in sorted(set(groups.tolist())):
        kept = groups == group
        found[group] = {unit: int(kept.sum())} | share(right[kept], problems[kept])
        if longer is not None:
            found[group]["longer"] = share(longer[kept], problems[kept])
    return found


def preference_metrics(
    chosen, rejected, chosen_tokens, rejected_tokens, problems, sources, kinds=None, margins=0.0, centring=0.0
):
    """Everything about held-out pairs; the first seven arguments are lists of one entry a pair.

    "by_kind": the kinds of a source, as "source: kind"; pairs whose kind is their source are not there.
    """
    right, problems = preferred(chosen, rejected), numpy.asarray(problems)
    rewards = numpy.asarray([chosen, rejected], dtype=float)
    lengths = numpy.asarray([chosen_tokens, rejected_tokens], dtype=float)
    difference = rewards[0] - rewards[1]
    longer = preferred(*lengths)
    names = [None if kind == source else f"{source}: {kind}" for source, kind in zip(sources, kinds or sources)]
    kept = numpy.asarray([name is not None for name in names])
    own = [name for name in names if name is not None]
    return {
        "pairs": len(right), "problems": len(set(problems.tolist())),
        "loss": bradley_terry_loss(chosen, rejected, margins, centring),
        "accuracy": share(right, problems), "by_source": by_group(sources, "pairs", right, problems, longer),
        "by_kind": by_group(own, "pairs", right[kept], problems[kept], longer[kept]),
        "baselines": {"longer": share(longer, problems), "shorter": share(1 - longer, problems)},
        "calibration": calibration(chosen, rejected),
        "length": length_bias(rewards, lengths, right, problems),
        "margin": {"mean": float(difference.mean()), "std": float(difference.std())}
        | {f"p{q}": float(numpy.percentile(difference, q)) for q in (5, 25, 50, 75, 95)},
        "reward": {"mean": float(rewards.mean()), "std": float(rewards.std()), "chosen": float(rewards[0].mean()),
                   "rejected": float(rewards[1].mean())},
    }  # fmt: skip


# ---------------------------------------------------------------- steps


def ranking_auc(scores, right):
    """Probability that a right one has a larger score than a wrong one, ties half; None without both kinds."""
    scores, right = numpy.asarray(scores, float), numpy.asarray(right, bool)
    positives, negatives = int(right.sum()), int((~right).sum())
    if not positives or not negatives:
        return None
    ranks = rankdata(scores)
    return float((ranks[right].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def first_wrong(right):
    """Place of the first step that is wrong; -1 if none is."""
    return next((place for place, value in enumerate(right) if not value), -1)


def process_metrics(probabilities, labels, problems, sources, threshold=0.5):
    """Everything about held-out solutions; each argument a list of one entry a solution, the first two of lists.

    `first_error`: accuracy of the place of the first wrong step on solutions that have one, of finding none on those
    that are right, and the harmonic mean of both. Source: ProcessBench (arXiv:2412.06559), Sec. 3.
    `solution_auc`: of the smallest, and of the product of the steps' probabilities, for solutions without a wrong step.
    """
    flat = [p for row in probabilities for p in row]
    truth = [bool(value) for row in labels for value in row]
    groups = numpy.repeat(numpy.asarray(problems), [len(row) for row in labels])
    correct = numpy.asarray([float((p >= threshold) == value) for p, value in zip(flat, truth)])
    found = [first_wrong([p >= threshold for p in row]) for row in probabilities]
    wanted = [first_wrong(row) for row in labels]
    hits, problems = numpy.asarray([float(a == b) for a, b in zip(found, wanted)]), numpy.asarray(problems)
    wrong = numpy.asarray(wanted) >= 0
    parts = by_group(numpy.where(wrong, "wrong solutions", "right solutions"), "solutions", hits, problems)
    values = [part["value"] for part in parts.values()]
    f1 = None if len(values) < 2 else (2 * values[0] * values[1] / sum(values) if sum(values) else 0.0)
    clipped = numpy.clip(flat, 1e-7, 1 - 1e-7)
    error, table = expected_calibration_error(flat, numpy.asarray(truth, float), BINS)
    always = max(numpy.mean(truth), 1 - numpy.mean(truth))
    of_steps = [source for source, row in zip(sources, labels) for _ in row]
    return {
        "solutions": len(labels), "steps": len(flat), "problems": len(set(problems.tolist())),
        "loss": float(-numpy.mean(numpy.where(truth, numpy.log(clipped), numpy.log(1 - clipped)))),
        "accuracy": share(correct, groups), "by_source": by_group(of_steps, "steps", correct, groups),
        "baselines": {"more frequent label": float(always)},
        "first_error": {"f1": f1, **parts}, "calibration": {"ece": error, "table": table},
        "step_auc": ranking_auc(flat, truth),
        "solution_auc": {name: ranking_auc([f(row) for row in probabilities], ~wrong)
                         for name, f in (("min", min), ("product", numpy.prod))},
    }  # fmt: skip
