"""The figures of evaluation reports, as SVG text; legends stand beside the plots."""

from matplotlib import pyplot as plt
from matplotlib.ticker import FormatStrFormatter, MaxNLocator

from recipes.eval_scores import OUTCOMES
from recipes.eval_tables import task_names
from recipes.report_page import COLORS, figure_svg

OUTCOME_COLORS = dict(zip(OUTCOMES, ("#2f8a57", "#c8502e", "#8257a8", "#a8842a", "#4a9aa8", "#8a939c")))
RIGHT, WRONG = OUTCOME_COLORS["correct"], OUTCOME_COLORS["wrong"]


def _axes(rows=0):
    """A figure that grows with its number of horizontal bars."""
    figure, axes = plt.subplots(figsize=(6.2, max(3.2, 1.2 + 0.3 * rows)), layout="constrained")
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _finish(figure, axes, xlabel, ylabel, legend=True):
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if legend:
        figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure_svg(figure)


def _distances(figures):
    """[[below], [above]] in per cent: what error bars take."""
    return [[100 * (f["value"] - f["low"]) for f in figures], [100 * (f["high"] - f["value"]) for f in figures]]


def _horizontal(names, results, values, xlabel, errors=None):
    """Bars of several results a name, the first on top."""
    figure, axes = _axes(len(names) * len(results))
    height = 0.8 / len(results)
    for place, (result, color) in enumerate(zip(results, COLORS * 8)):
        own = [name for name in names if name in result["tasks"]]
        heights = [names.index(name) + (place - (len(results) - 1) / 2) * height for name in own]
        bars = None if errors is None else errors(result, own)
        axes.barh(heights, [values(result, name) for name in own], height * 0.9, xerr=bars, color=color,
                  label=result["name"], error_kw={"ecolor": "#1d2329", "elinewidth": 1, "capsize": 2})
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    return _finish(figure, axes, xlabel, "", legend=len(results) > 1)


def accuracy_bars(results):
    """pass@1 by task with error bars, a colour for each model."""
    names = task_names(results)
    return _horizontal(names, results, lambda r, name: 100 * r["tasks"][name]["pass@1"]["value"], "pass@1, %",
                       lambda r, own: _distances([r["tasks"][name]["pass@1"] for name in own]))


def length_bars(results):
    """Mean tokens of a completion by task."""
    return _horizontal(task_names(results), results, lambda r, name: r["tasks"][name]["tokens"]["mean"],
                       "tokens of a completion, mean")


def outcome_bars(result):
    """Shares of the outcomes by task, stacked."""
    names = list(result["tasks"])
    figure, axes = _axes(len(names))
    left = [0.0] * len(names)
    for outcome in OUTCOMES:
        shares = [100 * result["tasks"][name]["outcomes"][outcome] / sum(result["tasks"][name]["outcomes"].values())
                  for name in names]
        if any(shares):
            axes.barh(names, shares, 0.7, left=left, color=OUTCOME_COLORS[outcome], label=outcome)
        left = [a + b for a, b in zip(left, shares)]
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    return _finish(figure, axes, "completions, %", "")


def _curves(result, series, xlabel, ylabel, log=False):
    """Lines with error bars, a colour a task; shifted a little so that bars at one x are told apart."""
    figure, axes = _axes()
    names = list(result["tasks"])
    for place, (name, color) in enumerate(zip(names, COLORS * 8)):
        points = [(float(x), figure_) for x, figure_ in series(result["tasks"][name])]
        shift = (place - (len(names) - 1) / 2) * min(0.06, 0.4 / len(names))
        places = [x * (1 + shift) if log else x + shift for x, _ in points]
        axes.errorbar(places, [100 * f["value"] for _, f in points], yerr=_distances([f for _, f in points]),
                      color=color, label=name, marker="o", markersize=3, linewidth=1.4, elinewidth=0.8, capsize=2)
    axes.set_ylim(-3, 103)
    if log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FormatStrFormatter("%d"))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _finish(figure, axes, xlabel, ylabel, legend=len(names) > 1)


def difficulty_curves(result):
    return _curves(result, lambda task: [(level, part["pass@1"]) for level, part in task["difficulties"].items()],
                   "difficulty", "pass@1, %")


def pass_at_k_curves(result):
    return _curves(result, lambda task: list(task["pass@k"].items()), "k samples", "pass@k, %", log=True)


def length_histogram(rows):
    """Tokens of right and of wrong completions, stacked."""
    figure, axes = _axes()
    groups = [[row["tokens"] for row in rows if row["correct"]], [row["tokens"] for row in rows if not row["correct"]]]
    labels = [f"{label} ({len(group):,})" for label, group in zip(("right", "wrong"), groups)]
    axes.hist(groups, bins=24, stacked=True, color=[RIGHT, WRONG], label=labels)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return _finish(figure, axes, "tokens of a completion", "completions")


def reliability(calibration):
    """Accuracy over confidence in bins, beside the diagonal of a calibrated model."""
    figure, axes = _axes()
    axes.plot([0, 1], [0, 1], color="#8a939c", linewidth=1, linestyle="--", label="calibrated")
    points = [(confidence, right, count) for _, _, count, confidence, right in calibration["table"]]
    axes.plot([p[0] for p in points], [p[1] for p in points], color=COLORS[0], marker="o", markersize=5, linewidth=1.2,
              label="this model")
    for confidence, right, count in points:
        axes.annotate(f"{count:,}", (confidence, right), textcoords="offset points", xytext=(5, -10), fontsize=7)
    axes.set_xlim(-0.03, 1.05)
    axes.set_ylim(-0.05, 1.05)
    return _finish(figure, axes, "confidence", "share that is right")
