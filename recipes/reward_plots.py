"""The part of a run's report that is about a reward model: rows, curves, calibration, length bias, margins."""

import json
from pathlib import Path

import numpy

from recipes.eval_plots import RIGHT, WRONG, _axes, _finish, reliability
from recipes.eval_report import figures_grid, grid
from recipes.eval_tables import with_interval
from recipes.report_page import plot

REWARDS_FILE = "held_out_rewards.jsonl"
UNITS = {"reward": "nats per pair", "process_reward": "nats per step"}  # of the loss, by stage
RULES = {"unigram": "words alone", "first": "stands first"}  # of data_scripts/preferences/preference_baselines.py
SHOWN = 1_000  # points of a scatter plot: each is an element of the page


def _number(value, form="{:+.2f}"):
    return "not defined" if value is None else form.format(value)


def _same(label, found):
    return [(f"{label}, {name}", f"{with_interval(part)} %") for name, part in found.items()]


def _preference_rows(found):
    length, margin, reward = found["length"], found["margin"], found["reward"]
    correlations = [length[name] for name in ("pearson", "spearman", "pair_pearson", "pair_spearman")]
    number = f"{found['pairs']:,} pairs, {found['problems']:,} problems"
    rows = [("accuracy", f"{with_interval(found['accuracy'])} % of {number}")]
    if len(found["by_source"]) > 1:
        rows += _same("accuracy", found["by_source"])
    rows += _same("baseline", {f"the {name} one": part for name, part in found["baselines"].items()})
    rows += [
        ("loss", f"{found['loss']:.4f} nats per pair"),
        ("calibration", f"ECE {found['calibration']['ece']:.3f}, Brier score {found['calibration']['brier']:.3f}"),
        ("reward and length", "Pearson {}, Spearman {}; inside a pair {}, {}".format(*map(_number, correlations))),
        *_same("accuracy", length["accuracy"]),
        ("margin", f"mean {margin['mean']:.3f}, standard deviation {margin['std']:.3f}"),
        ("reward", f"chosen {reward['chosen']:+.3f}, rejected {reward['rejected']:+.3f}, standard deviation "
                   f"{reward['std']:.3f}"),
    ]  # fmt: skip
    return rows


def _process_rows(found):
    first, auc = found["first_error"], found["solution_auc"]
    number = f"{found['steps']:,} steps in {found['solutions']:,} solutions"
    rows = [
        ("step accuracy", f"{with_interval(found['accuracy'])} % of {number}"),
        ("baseline, the more frequent label", f"{found['baselines']['more frequent label']:.1%}"),
        ("first wrong step, F1", _number(first["f1"], "{:.1%}")),
    ]  # fmt: skip
    rows += _same("first wrong step", {name: part for name, part in first.items() if name != "f1"})
    rows += [
        ("AUC of steps", _number(found["step_auc"], "{:.3f}")),
        ("AUC of solutions", "smallest step {}, product {}".format(
            *(_number(auc[name], "{:.3f}") for name in ("min", "product")))),
        ("calibration", f"ECE {found['calibration']['ece']:.3f}"),
        ("loss", f"{found['loss']:.4f} nats per step"),
    ]  # fmt: skip
    return rows


def reward_rows(evaluation):
    """[(label, text)] of a reward model's held-out figures; empty for other stages."""
    rows = []
    if found := evaluation.get("preferences"):
        rows += [(f"held out: {label}", text) for label, text in _preference_rows(found)]
    if found := evaluation.get("process"):
        rows += [(f"held out: {label}", text) for label, text in _process_rows(found)]
    return rows


def group_table(evaluation):
    """(header, rows) of accuracies by source and kind, beside what is known of a pair without understanding it.

    "longer" is of these pairs, in tokens; the others are of the data's whole test file (its manifest.json).
    """
    found, outside = evaluation["preferences"], evaluation.get("data_baselines", {})
    groups = {"all": {"pairs": found["pairs"], **found["accuracy"], "longer": found["baselines"]["longer"]}}
    groups |= {name: part for part in ("by_source", "by_kind") for name, part in found[part].items()}
    rules = list(dict.fromkeys(rule for own in outside.values() for rule in own if rule not in ("longer", "shorter")))
    columns = ["this model", "longer", *(RULES.get(rule, rule) for rule in rules)]
    header = ["held-out pairs", "number", *(f"{column}, %" for column in columns)]
    rows = []
    for name, part in sorted(groups.items(), key=lambda item: (item[0] != "all", item[0])):
        own = [outside.get(name, {}).get(rule) for rule in rules]
        others = [with_interval(rule | {"value": rule["accuracy"]}) if rule else "" for rule in own]
        rows.append([name, f"{part['pairs']:,}", with_interval(part), with_interval(part["longer"]), *others])
    return header, rows


# ---------------------------------------------------------------- figures


def reward_curves(train, evals):
    """[(svg, caption)] of accuracy over the steps."""
    made = []
    for ours, ylabel in (("accuracy", "accuracy"), ("margin", "margin")):
        parts = (("training", train, ours), ("held out", evals, f"eval {ours}"))
        curves = [(label, [r["step"] for r in records if name in r], [r[name] for r in records if name in r])
                  for label, records, name in parts]  # fmt: skip
        curves = [curve for curve in curves if curve[1]]
        if curves:
            captions = {"accuracy": "Share that is judged right; ties count half.",
                        "margin": "Reward of the chosen side minus that of the rejected one, mean."}  # fmt: skip
            made.append((plot(curves, ylabel), captions[ours]))
    return made


def length_scatter(rows):
    """Reward over tokens of the completion, chosen and rejected."""
    figure, axes = _axes()
    rows = rows[:: -(-len(rows) // (SHOWN // 2))]
    for side, color in (("rejected", WRONG), ("chosen", RIGHT)):
        axes.scatter([row[f"{side}_tokens"] for row in rows], [row[side] for row in rows], s=10, alpha=0.6, color=color,
                     linewidths=0, label=side)  # fmt: skip
    return _finish(figure, axes, "tokens of the completion", "reward")


def margin_histogram(rows):
    figure, axes = _axes()
    margins = numpy.array([row["chosen"] - row["rejected"] for row in rows])
    edges = numpy.histogram_bin_edges(margins, bins=30)
    groups = [margins[margins > 0], margins[margins <= 0]]
    labels = [f"{label} ({len(group):,})" for label, group in zip(("right", "wrong"), groups)]
    axes.hist(groups, bins=edges, stacked=True, color=[RIGHT, WRONG], label=labels)
    return _finish(figure, axes, "reward of chosen - reward of rejected", "pairs")


def step_histogram(rows):
    figure, axes = _axes()
    steps = [pair for row in rows for pair in zip(row["probabilities"], row["labels"])]
    groups = [[p for p, label in steps if label == wanted] for wanted in (1, 0)]
    labels = [f"{label} steps ({len(group):,})" for label, group in zip(("right", "wrong"), groups)]
    axes.hist(groups, bins=numpy.linspace(0, 1, 31), color=[RIGHT, WRONG], label=labels)
    return _finish(figure, axes, "probability of being right", "steps")


def reward_section(evaluation, run_dir):
    """HTML of the held-out figures; empty for other stages, or where nothing was held out."""
    found = evaluation.get("preferences") or evaluation.get("process")
    file = Path(run_dir) / REWARDS_FILE
    if not found or not file.is_file():
        return ""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if "preferences" in evaluation:
        explained = (
            "How often a side is the better one, over the probability sigmoid(difference of rewards); each pair in "
            "both orders. Numbers: entries of a bin."
        )
        pairs = [
            (reliability(found["calibration"]), explained),
            (length_scatter(rows), "Length bias: a reward that rises with length would reward talking."),
            (margin_histogram(rows), "Differences of rewards inside the pairs."),
        ]
    else:
        pairs = [(reliability(found["calibration"]), "How often a step is right, over its probability."),
                 (step_histogram(rows), "Probabilities of right and of wrong steps.")]  # fmt: skip
    table = ""
    if "preferences" in evaluation:
        table = (
            f"<section>{grid(*group_table(evaluation))}<p class=note>Accuracy; brackets: 95 % intervals over problems. "
            "The other columns prefer without understanding: the longer side; the side whose words are the likelier "
            "ones of a chosen side (naive Bayes); the option that stands first. Where words alone tell the sides "
            "apart, the model's accuracy says little.</p></section>"
        )
    return f"<h2>Held out</h2>{table}{figures_grid(pairs)}"
