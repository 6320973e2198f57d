"""Tables and the figure of reinforcement learning runs: accuracy by stage, gains with intervals, curves over seeds.

A run is {"before", "after": results of `recipes.evaluation`, "records": of metrics.jsonl, "seconds"}. Runs of one label
differ in their seed. Every interval is over problems: each problem's share of right answers, averaged over the seeds,
is one observation; differences are paired by problem. What the seeds do is said apart, as lowest and highest.
"""

import json
import math
import statistics
from pathlib import Path

from matplotlib import pyplot as plt

from recipes.eval_scores import macro_average
from recipes.eval_tables import percent, with_interval
from recipes.intervals import mean_interval, paired_difference_interval
from recipes.logging_callbacks import read_metrics
from recipes.report_page import COLORS, figure_svg

POINTS = 0.10  # a gain that counts for a task


def read_run(folder):
    """A finished run's folder as this module's run, or None while there is no eval.json."""
    path = Path(folder) / "eval.json"
    if not path.is_file():
        return None
    tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
    records = [record for record in read_metrics(Path(folder) / "metrics.jsonl") if record["kind"] == "train"]
    times = Path(folder) / "seconds.json"
    seconds = json.loads(times.read_text(encoding="utf-8")) if times.is_file() else None
    return {"before": tasks.get("before"), "after": tasks["after"], "records": records, "seconds": seconds}


# ---------------------------------------------------------------- accuracy


def shares(results, task):
    """{problem: share of right answers, mean over the results of several seeds}.

    Raises:
        ValueError: where the results do not answer the same problems.
    """
    columns = [result["per_problem"][task] for result in results]
    if any(column.keys() != columns[0].keys() for column in columns):
        raise ValueError(f"{task}: the runs were evaluated on different problems; evaluate them with one config")
    return {problem: statistics.fmean(column[problem] for column in columns) for problem in columns[0]}


def accuracy(results, task):
    """{"value", "low", "high"} of a stage on a task, over problems."""
    values = list(shares(results, task).values())
    low, high = mean_interval(values)
    return {"value": statistics.fmean(values), "low": low, "high": high}


def mean_accuracy(results):
    """The same as the mean over tasks."""
    return macro_average([accuracy(results, task) for task in results[0]["tasks"]])


def seed_range(results, task=None):
    """(lowest, highest) accuracy of the seeds, of a task or of the mean over tasks."""
    values = [(result["overall"] if task is None else result["tasks"][task])["pass@1"]["value"] for result in results]
    return min(values), max(values)


def accuracy_cell(figure, results, task=None):
    low, high = seed_range(results, task)
    return with_interval(figure) + (f" ({percent(low)} to {percent(high)})" if len(results) > 1 else "")


def stage_table(stages):
    """(header, rows) of [(name, results, one a seed)]: a row a task, then the mean; "-" where a stage was not asked."""
    tasks = list(dict.fromkeys(task for _, results in stages for task in results[0]["tasks"]))
    rows = [[task, *(accuracy_cell(accuracy(results, task), results, task) if task in results[0]["tasks"] else "-"
                     for _, results in stages)] for task in tasks]  # fmt: skip
    rows.append(["mean of tasks", *(accuracy_cell(mean_accuracy(results), results) for _, results in stages)])
    return ["pass@1 %", *(f"{name} ({len(results)})" if len(results) > 1 else name for name, results in stages)], rows


def difference(after, before, task):
    """{"value", "low", "high"} of after - before on the same problems."""
    own, base = shares(after, task), shares(before, task)
    if own.keys() != base.keys():
        raise ValueError(f"{task}: the two sides were evaluated on different problems; evaluate them with one config")
    value, low, high = paired_difference_interval(list(own.values()), [base[problem] for problem in own])
    return {"value": value, "low": low, "high": high}


def mean_difference(parts):
    """Mean of differences of several tasks; squared distances of the bounds add up (`eval_scores.macro_average`)."""
    count, value = len(parts), statistics.fmean(part["value"] for part in parts)
    below = math.hypot(*(part["value"] - part["low"] for part in parts)) / count
    above = math.hypot(*(part["high"] - part["value"] for part in parts)) / count
    return {"value": value, "low": value - below, "high": value + above}


def difference_cell(figure):
    return f"{100 * figure['value']:+.1f} [{100 * figure['low']:+.1f}, {100 * figure['high']:+.1f}]"


def gain_table(pairs):
    """(header, rows) of [(name, after, before)]: points gained on each task, their mean, tasks with POINTS or more."""
    found = {name: {task: difference(after, before, task) for task in after[0]["tasks"] if task in before[0]["tasks"]}
             for name, after, before in pairs}  # fmt: skip
    tasks = list(dict.fromkeys(task for gains in found.values() for task in gains))
    rows = [[task, *(difference_cell(gains[task]) if task in gains else "-" for gains in found.values())]
            for task in tasks]  # fmt: skip
    rows.append(["mean of tasks", *(difference_cell(mean_difference(list(g.values()))) for g in found.values())])
    counts = (f"{sum(gain['value'] >= POINTS for gain in g.values())} of {len(g)}" for g in found.values())
    rows.append([f"tasks with {100 * POINTS:g} points or more", *counts])
    return ["points", *found], rows


# ---------------------------------------------------------------- curves


def value_of(record, name):
    """A number of a training record: a reward as "rewards/accuracy", anything else by its name; None without it."""
    group, slash, part = name.partition("/")
    return record.get("rewards", {}).get(part) if slash and group == "rewards" else record.get(name)


def curve(records, name, smooth=1):
    """(steps, values), each a running mean of up to `smooth` logged values."""
    points = [(record["step"], value_of(record, name)) for record in records]
    points = [(step, value) for step, value in points if isinstance(value, (int, float))]
    values = [value for _, value in points]
    means = [statistics.fmean(values[max(0, place - smooth + 1) : place + 1]) for place in range(len(values))]
    return [step for step, _ in points], means


def band(runs, name, smooth=3):
    """(steps, mean, lowest, highest) over the runs, at the steps that all of them have; four empty lists for none."""
    curves = [dict(zip(*curve(run["records"], name, smooth))) for run in runs]
    curves = [found for found in curves if found]
    if not curves:
        return [], [], [], []
    steps = sorted(set.intersection(*map(set, curves)))
    columns = [[found[step] for found in curves] for step in steps]
    return steps, *([function(column) for column in columns] for function in (statistics.fmean, min, max))


def ends_cell(runs, name, form="{:.3f}"):
    """`0.312 -> 0.541 (0.520 to 0.560)`: means over the first and the last fifth of a run; the seeds' range."""
    ends = []
    for run in runs:
        values = curve(run["records"], name)[1]
        fifth = max(1, len(values) // 5)
        ends += [(statistics.fmean(values[:fifth]), statistics.fmean(values[-fifth:]))] if values else []
    if not ends:
        return "none"
    first, last = (statistics.fmean(column) for column in zip(*ends))
    text = f"{form.format(first)} -> {form.format(last)}"
    finals = [end for _, end in ends]
    return text + (f" ({form.format(min(finals))} to {form.format(max(finals))})" if len(ends) > 1 else "")


def curve_table(found, columns):
    """(header, rows) of {label: {seed: run}}; columns: [(heading, name in the records, format)]. Then the seconds."""
    rows = []
    for label, seeds in found.items():
        runs = list(seeds.values())
        times = [run["seconds"] for run in runs if run["seconds"] is not None]
        seconds = f"{statistics.fmean(times):.0f}" if times else "none"
        rows.append([label, len(runs), *(ends_cell(runs, name, form) for _, name, form in columns), seconds])
    return ["setting", "seeds", *(heading for heading, _, _ in columns), "seconds"], rows


# ---------------------------------------------------------------- figure


def _stage_panel(axis, branches):
    """Mean accuracy by stage: one line a branch, the interval as a bar, the seeds as dots."""
    for place, ((label, stages), color) in enumerate(zip(branches.items(), COLORS)):
        figures = [mean_accuracy(results) for _, results in stages]
        values = [100 * figure["value"] for figure in figures]
        bars = [[100 * (f["value"] - f["low"]) for f in figures], [100 * (f["high"] - f["value"]) for f in figures]]
        spots = [position + 0.06 * place for position in range(len(stages))]
        axis.errorbar(spots, values, yerr=bars, color=color, label=label, marker="o", markersize=4, capsize=3)
        for spot, value, (name, results) in zip(spots, values, stages):
            if place == 0 or name != "base":  # where branches begin together, it is written once
                axis.annotate(name, (spot, value), textcoords="offset points", xytext=(6, -10), fontsize=7, color=color)
            seeds = [100 * result["overall"]["pass@1"]["value"] for result in results]
            axis.plot([spot] * len(seeds), seeds, ".", color=color, alpha=0.5, markersize=4)
    longest = max(map(len, branches.values()), default=1)
    axis.set_xticks(range(longest), [f"stage {number}" for number in range(longest)])
    axis.set_xlim(-0.3, longest - 0.4)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("strict accuracy, mean of tasks, %")


def _band_panel(axis, found, name, label):
    for (setting, seeds), color in zip(found.items(), COLORS * 3):
        steps, mean, low, high = band(list(seeds.values()), name)
        if steps:
            axis.plot(steps, mean, color=color, label=f"{setting} ({len(seeds)})", linewidth=1.5)
            axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel(label)


def draw(branches, found, path, panels):
    """Writes an SVG: accuracy by stage of {branch: [(stage, results)]}, then [(name, label)] with bands over seeds."""
    figure, axes = plt.subplots(1, 1 + len(panels), figsize=(4.6 * (1 + len(panels)), 3.8), layout="constrained")
    _stage_panel(axes[0], branches)
    for axis, (name, label) in zip(axes[1:], panels):
        _band_panel(axis, found, name, label)
    for axis in axes:
        axis.grid(alpha=0.25)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    for axis in axes[:2]:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
    Path(path).write_text(figure_svg(figure), encoding="utf-8")
