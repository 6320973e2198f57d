"""The part of a run's report that is about rollouts: curves, where the time went, the rows of its table."""

import numpy
from matplotlib import pyplot as plt

from recipes.report_page import COLORS, figure_svg, plot

TIMES = ("rollout seconds", "scoring seconds", "update seconds")


def _curve(label, records, read):
    """(label, steps, values) of the records for which `read` finds a number."""
    points = [(record["step"], read(record)) for record in records]
    points = [(step, value) for step, value in points if isinstance(value, (int, float))]
    return label, [step for step, _ in points], [value for _, value in points]


def _plain(label, records, name):
    return _curve(label, records, _component(name))


def _component(group, name=None):
    return lambda record: record.get(group) if name is None else record.get(group, {}).get(name)


def reward_curves(train, evals):
    """Curves of the weighted sum and of each reward by itself, in training and on held-out prompts."""
    names = sorted({name for record in train for name in record.get("rewards", {})})
    curves = [_plain("sum", train, "reward"), _plain("sum, held out", evals, "eval reward")]
    for name in names:
        curves.append(_curve(name, train, _component("rewards", name)))
        curves.append(_curve(f"{name}, held out", evals, _component("eval rewards", name)))
    return [curve for curve in curves if curve[1]]


def reward_plot(records):
    """SVG of `reward_curves` from the records of metrics.jsonl."""
    train, evals = ([r for r in records if r.get("kind") == kind] for kind in ("train", "eval"))
    return plot(reward_curves(train, evals), "reward")


def rollout_times(train):
    """[(step, seconds of rollout, scoring, update)]: the update is known when its rollout has been trained on."""
    latest, found = {}, []
    for record in train:
        latest |= {name: record[name] for name in TIMES if record.get(name) is not None}
        if record.get(TIMES[-1]) is not None and len(latest) == len(TIMES):
            found.append((record["step"], *(latest[name] for name in TIMES)))
    return found


def time_plot(times):
    """SVG of the seconds of a rollout, its scoring and its updates, stacked."""
    steps, *values = zip(*times)
    figure, axes = plt.subplots(figsize=(6.2, 3.2), layout="constrained")
    labels = [name.split()[0] for name in TIMES]
    axes.stackplot(steps, numpy.array(values), labels=labels, colors=COLORS[:3], alpha=0.75)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("seconds")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure_svg(figure)


def rl_figures(train, evals):
    """[(svg, caption)] of a run with rewards; [] for others."""
    if not any("reward" in record for record in train):
        return []
    made = [(plot(reward_curves(train, evals), "reward"),
             "Mean reward of completions: the weighted sum, and each reward by itself before weighting.")]  # fmt: skip
    groups = (
        ("nats per token", "KL to the reference, sampled. Approximate KL: between the policy and that of the rollout.",
         (("to the reference", "kl"), ("within a rollout", "approx kl"))),
        ("nats per token", "Entropy of the policy's next token, mean over completions' tokens.",
         (("entropy", "entropy"),)),
        ("tokens", "Mean length of completions.", (("length", "length"),)),
        ("words a completion", "Words of reflection, such as wait, check, wrong (DeepSeek-R1, Extended Data Fig. 1a).",
         (("reflection words", "reflection words"),)),
        ("share", "Groups whose completions all have the same reward, which teach nothing; what the curriculum knows: "
         "prompts that are solved, hopeless, and the mean pass rate.",
         (("groups without variance", "zero variance"), ("solved", "curriculum solved"),
          ("hopeless", "curriculum hopeless"), ("pass rate", "curriculum pass rate"))),
        ("share", "Experts chosen while sampling that the trainer's own router would not choose: of all choices, and "
         "tokens (a layer) with any such.", (("choices", "experts differ"), ("tokens", "routes differ"))),
        ("nats per token", "KL between sampler and trainer before any update: with the experts replayed, and without.",
         (("with replay", "sampler kl with replay"), ("without", "sampler kl without replay"))),
        ("share of completions", "Completions cut off at the limit, empty ones, and those that no reward could judge.",
         (("cut off", "cut off"), ("empty", "empty"), ("unscored", "unscored"))),
        ("value loss", "Loss of the value function, before its weight.", (("value loss", "value loss"),)),
        ("explained variance", "Share of the returns' variance that the values explain; 0: no better than a constant.",
         (("explained variance", "explained variance"),)),
        ("share of tokens", "Tokens whose ratio, or value, the clip range cut.",
         (("ratio", "clip fraction"), ("value", "value clip fraction"))),
    )  # fmt: skip
    for ylabel, caption, parts in groups:
        curves = [_plain(label, train, name) for label, name in parts]
        curves = [curve for curve in curves if curve[1]]
        if curves:
            made.append((plot(curves, ylabel), caption))
    if times := rollout_times(train):
        caption = "Where the time of a rollout goes: sampling; rewards and log-probabilities (scoring); updates."
        made.append((time_plot(times), caption))
    return made


def _both_ends(records, read):
    """`0.312 -> 0.541`: means over the first and the last fifth of the records, as a single rollout is noisy."""
    values, fifth = list(map(read, records)), max(1, len(records) // 5)
    ends = ([value for value in part if value is not None] for part in (values[:fifth], values[-fifth:]))
    return " -> ".join(f"{sum(end) / len(end):.3f}" if end else "none" for end in ends)


def rl_rows(train, evaluation):
    """[(label, text)] of the results table: rewards at both ends, KL, held-out rewards, shares of the time."""
    records = [record for record in train if record.get("reward") is not None]
    rows = []
    if records:
        last = records[-1]
        rows.append(("reward, first and last fifth of the run", _both_ends(records, _component("reward"))))
        for name in last.get("rewards", {}):
            rows.append((f"reward: {name}", _both_ends(records, _component("rewards", name))))
        for name in ("length", "reflection words", "zero variance"):
            if last.get(name) is not None:
                rows.append((f"{name}, first and last fifth", _both_ends(records, _component(name))))
        compared = [record for record in records if record.get("sampler kl without replay") is not None]
        if compared:
            told = (sum(record[f"sampler kl {end} replay"] for record in compared) / len(compared)
                    for end in ("with", "without"))  # fmt: skip
            rows.append(("KL of sampler and trainer, with and without replay", ", ".join(f"{x:.2e}" for x in told)))
        distances = [record["kl"] for record in train if record.get("kl") is not None]
        if distances:  # also of steps between two rollouts
            rows.append(("KL to the reference, at the end", f"{distances[-1]:.4f} nats per token"))
        totals = numpy.array([times[1:] for times in rollout_times(train)]).sum(0)
        if totals.any():
            shares = (f"{name.split()[0]} {share:.0%}" for name, share in zip(TIMES, totals / totals.sum()))
            rows.append(("time", ", ".join(shares)))
    if held_out := evaluation.get("held_out_rewards"):
        values = [("sum", held_out["reward"]), *held_out["rewards"].items()]
        shown = (f"{name} {'none' if value is None else format(value, '.3f')}" for name, value in values)
        rows.append(("rewards on held-out prompts", ", ".join(shown)))
    return rows
