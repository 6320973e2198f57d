"""report.html of a run folder: one self-contained file with results, plots and samples.

    python recipes/reporting.py RUN_DIR

reads metrics.jsonl, config.yaml and eval.json, and needs nothing else: plots are inline SVG.
"""

import argparse
import html
import itertools
import json
import logging
import lzma
import math
import sys
from collections import Counter
from pathlib import Path

if __package__ in (None, ""):  # launched as a script: recipes/ is first on the path and shadows packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import yaml

from recipes.checkpoint_files import write_atomically
from recipes.distill_plots import distill_figures, distill_rows, distill_section
from recipes.eval_report import before_and_after
from recipes.eval_tables import with_interval
from recipes.expert_loads import balance_plot, favourite_rows, group_counts, heat_maps
from recipes.logging_callbacks import METRICS_FILE, read_metrics
from recipes.report_page import facts_table, page, plot
from recipes.reward_plots import UNITS, reward_curves, reward_rows, reward_section
from recipes.rl_plots import rl_figures, rl_rows

REPORT_FILE = "report.html"
MANY_SOURCES = 10  # more than these get a table of their own, and curves by kind
STAGES = {
    "pretrain": "Pretraining", "sft": "Supervised fine-tuning", "ppo": "Reinforcement learning (PPO)",
    "grpo": "Reinforcement learning (GRPO)",
    "reward": "Reward model", "process_reward": "Process reward model",
    "distill": "Distillation",
}  # fmt: skip

# Losses that say nothing by themselves, without a unit: what they are made of.
LOSSES = {
    "ppo": ("Policy loss + vf_coef x value loss - entropy_coef x entropy", None),
    "grpo": ("Policy loss + beta x KL - entropy_coef x entropy; near 0 on policy, whatever is learned", None),
}

# ---------------------------------------------------------------- reference values


def text_baselines(texts, held_out, training=(), vocab_size=None):
    """Bits per byte that need no model: {"uniform", "unigram", "xz"} of a held-out sample.

    Args:
        texts: the sample; held_out: its tokens, lists of ids; training: tokens of training rows.
    uniform: 8 (each byte equally likely); unigram: tokens by their frequency in training text, plus
    one each; xz: the sample compressed by itself with LZMA, preset 9.
    """
    data = "\n".join(texts).encode("utf-8")
    if not data:
        return {"uniform": 8.0}
    found = {"uniform": 8.0}
    counts = Counter(itertools.chain.from_iterable(training))
    if counts:
        total = sum(counts.values()) + vocab_size
        nats = -sum(math.log((counts[token] + 1) / total) for row in held_out for token in row)
        found["unigram"] = nats / math.log(2) / sum(len(text.encode("utf-8")) for text in texts)
    found["xz"] = 8 * len(lzma.compress(data, preset=9)) / len(data)
    return found


# ---------------------------------------------------------------- plots


def _series(records, name):
    points = [(r["step"], r[name]) for r in records if isinstance(r.get(name), (int, float))]
    return [p[0] for p in points], [p[1] for p in points]


def _bits_per_byte_plot(evals, baselines, kinds):
    """All sources together and each source; of a corpus of many, each kind, as the mean over its sources."""
    curves, groups = [("all sources", *_series(evals, "bits/byte"))], {}
    for source in sorted({name for record in evals for name in record.get("bits/byte per source", {})}):
        groups.setdefault(kinds.get(source, source), []).append(source)
    for name, sources in groups.items():
        label = name if sources == [name] else f"{name} ({len(sources)} sources)"
        flat = []
        for record in evals:
            values = [v for k in sources if (v := record.get("bits/byte per source", {}).get(k)) is not None]
            flat.append({"step": record["step"], "value": sum(values) / len(values) if values else None})
        curves.append((label, *_series(flat, "value")))
    references = [(f"{name} ({value:.2f})", value) for name, value in baselines.items() if name != "uniform"]
    return plot(curves, "bits per byte", references or [("uniform bytes (8.00)", 8.0)])


def _load_plot(train, model):
    layers = sorted({layer for r in train for layer in r.get("load max/mean per layer", {})}, key=int)
    curves = []
    for layer in layers:
        flat = [{"step": r["step"], "value": r.get("load max/mean per layer", {}).get(layer)} for r in train]
        curves.append((f"layer {layer}", *_series(flat, "value")))
    references = [("even", 1.0)]
    if model.get("n_routed_experts"):
        worst = model["n_routed_experts"] / model["num_experts_per_tok"]
        references.insert(0, (f"worst ({worst:.0f})", worst))
    return plot(curves, "expert load, max / mean", references) if curves else None


def figures(records, baselines, model=(), stage="pretrain", kinds=()):
    """[(svg, caption)] of everything that the metrics hold."""
    train = [r for r in records if r["kind"] == "train"]
    evals = [r for r in records if r["kind"] == "eval"]
    made = []
    losses = [("next token", *_series(train, "next-token loss")), ("MTP", *_series(train, "mtp loss"))]
    losses = [curve for curve in losses if curve[1]] or [("loss", *_series(train, "loss"))]
    losses += [("held out", *_series(evals, "eval loss"))] if evals else []
    accuracy = [("training", *_series(train, "token accuracy")), ("held out", *_series(evals, "eval token accuracy"))]
    accuracy = [curve for curve in accuracy if curve[1]]
    made += rl_figures(train, evals) + reward_curves(train, evals)
    made += distill_figures(train, stage)
    if train:
        what, unit = LOSSES.get(stage, ("Training loss", UNITS.get(stage, "nats per token")))
        label = f"loss, {unit}" if unit else "loss"
        made.append((plot(losses, label), f"{what}, mean over all micro-batches and processes."))
    if accuracy:
        parts = " and ".join(name for name, *_ in accuracy)
        caption = f"Share of the answers' tokens that are the model's most likely ones, {parts}."
        made.append((plot(accuracy, "token accuracy"), caption))
    if any("bits/byte" in record for record in evals):
        caption = "Held-out text. Grey: the same text by token frequencies alone (unigram), and compressed by xz."
        made.append((_bits_per_byte_plot(evals, baselines, dict(kinds)), caption))
    simple = (
        ("lr", "learning rate", "Learning rate of the step.", False),
        ("grad", "gradient norm before clipping", "Gradient norm (L2, all parameters).", True),
        ("tok/s", "tokens per second", "Non-padding tokens; without warm-up, evaluation, saving and samples.", False),
    )
    for name, ylabel, caption, log in simple:
        steps, values = _series(train, name)
        if steps:
            made.append((plot([(name, steps, values)], ylabel, log=log and min(values) > 0), caption))
    if (load := _load_plot(train, dict(model))) is not None:
        made.append((load, "Last step before each log. 1 is even; worst: all tokens at the same experts."))
    return made


# ---------------------------------------------------------------- the page


def _read_yaml(path):
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _read_json(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _source_rows(label, sources):
    """A row for each source; of many only the ends, since the page has a table of them."""
    if len(sources) <= MANY_SOURCES:
        return [(f"{label}, {name}", f"{value:.4f} bits per byte") for name, value in sources.items()]
    ends = [f"{sources[name]:.4f} ({name})" for name in (choose(sources, key=sources.get) for choose in (min, max))]
    return [(f"{label}, {len(sources)} sources", f"{' to '.join(ends)} bits per byte")]


def _source_section(evaluation, config):
    """Bits per byte of many sources as a table, by kind."""
    found = {label: evaluation[key]["sources"] for key, label in (("weights", "weights"), ("ema", "averaged (EMA)"))
             if evaluation.get(key)}
    first, kinds = next(iter(found.values()), {}), config.get("data", {}).get("kinds", {})
    if len(first) <= MANY_SOURCES:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("kind", "source", *found))
    rows = "".join(
        f"<tr><td>{html.escape(kinds.get(name, ''))}</td><td>{html.escape(name)}</td>"
        + "".join(f"<td>{values[name]:.4f}</td>" for values in found.values()) + "</tr>"
        for name in sorted(first, key=lambda name: (kinds.get(name, ""), first[name]))
    )  # fmt: skip
    return (f"<h2>Held-out text, bits per byte</h2><section><details><summary>{len(first)} sources</summary>"
            f"<table><tr>{head}</tr>{rows}</table></details></section>")


def result_rows(records, evaluation, config):
    """[(label, text)] of the results table; also printed at the end of a run."""
    train = [r for r in records if r["kind"] == "train"]
    rows = []
    if train:
        rows.append(("optimizer steps", f"{train[-1]['step']:,}"))
        rows.append(("training tokens", f"{sum(r.get('tokens', 0) for r in train):,}"))
        unit = UNITS.get(evaluation.get("stage"), "nats per token")
        loss = train[-1].get("next-token loss", train[-1]["loss"])
        if evaluation.get("stage") not in LOSSES:
            rows.append(("last training loss", f"{loss:.4f} {unit}"))
    for key, label in (("weights", "held out"), ("ema", "held out, averaged weights (EMA)")):
        values = evaluation.get(key)
        if values:
            rows.append((label, f"{values['bits_per_byte']:.4f} bits per byte, loss {values['loss']:.4f}"))
            rows += _source_rows(label, values["sources"])
    if held_out := evaluation.get("held_out"):
        text = f"loss {held_out['loss']:.4f} nats per token, {held_out['token_accuracy']:.1%} of tokens right"
        rows.append(("held-out answers", text))
    rows += rl_rows(train, evaluation) + reward_rows(evaluation)
    rows += distill_rows(evaluation)
    tasks = evaluation.get("tasks", {})
    for name in tasks.get("after", {}).get("tasks", ()):
        found = [tasks[stage]["tasks"][name]["pass@1"] for stage in ("before", "after") if stage in tasks]
        rows.append((f"{name}, pass@1 %", " -> ".join(map(with_interval, found))))
    if "merged_logits_difference" in evaluation:
        difference = f"{evaluation['merged_logits_difference']:.1e}"
        rows.append(("merged adapter", f"largest difference of a logit {difference}"))
    rows += [
        (f"reference, {name}", f"{value:.3f} bits per byte") for name, value in config.get("baselines", {}).items()
    ]
    speeds = [r["tok/s"] for r in train if r.get("tok/s")]
    if speeds:
        middle = sorted(speeds)[len(speeds) // 2]
        mfu = sorted(r["mfu"] for r in train if r.get("mfu"))
        rows.append(("speed, median", f"{middle:,.0f} tokens/s" + (f", MFU {mfu[len(mfu) // 2]:.1%}" if mfu else "")))
    return rows


def _rewards_of(sample):
    rewards = sample.get("rewards", {})
    return html.escape("".join(f", {name} {'none' if value is None else value}" for name, value in rewards.items()))


def _samples(records):
    kept = [r for r in records if r["kind"] == "samples"]
    shown = kept[:1] + kept[-2:] if len(kept) > 3 else kept
    parts = []
    for record in reversed(shown):
        for sample in record["samples"]:
            prompt, completion = html.escape(sample["prompt"]), html.escape(sample["completion"])
            parts.append(
                f"<p class=note>step {record['step']:,}{_rewards_of(sample)}</p>"
                f"<pre><span class=prompt>{prompt}</span>{completion}</pre>"
            )
    return "".join(parts)


def _expert_section(evaluation, config):
    """Which experts like which text, of the final weights."""
    table = evaluation.get("expert_load")
    if not table:
        return ""
    kinds = group_counts(table, config.get("data", {}).get("kinds", {}))
    made = [(balance_plot(kinds), "Largest over mean expert load by layer, of held-out text of each kind and of all.")]
    plots = "".join(f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"
                    for svg, caption in made + heat_maps(table))
    return (f"<h2>Experts</h2><section><p class=note>Where the tokens of a kind of text are sent most, in times the "
            f"expert's even share.</p>{facts_table(favourite_rows(kinds))}</section><div class=plots>{plots}</div>")


def build_report(run_dir):
    """The page as text. Raises ValueError where there is nothing to report."""
    run_dir = Path(run_dir)
    records = [r for r in read_metrics(run_dir / METRICS_FILE) if "kind" in r and "step" in r]
    if not records:
        raise ValueError(f"{run_dir} holds no {METRICS_FILE} with records: is it a run folder?")
    config, evaluation = _read_yaml(run_dir / "config.yaml"), _read_json(run_dir / "eval.json")
    plots = "".join(
        f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"
        for svg, caption in figures(records, config.get("baselines", {}), config.get("model", {}), config.get("stage"),
                                    config.get("data", {}).get("kinds", {}))
    )
    facts = [("commit", config.get("commit", "unknown"))]
    facts += [(name, value) for name, value in config.get("sizes", {}).items()]
    facts += [("device", ", ".join(f"{k} {v}" for k, v in config.get("device", {}).items()))]
    samples = _samples(records)
    settings = html.escape(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    name = html.escape(run_dir.resolve().name)
    body = (
        f"<h1>{name}</h1><p class=note>{STAGES[config.get('stage', 'pretrain')]} run. Figures are drawn from "
        f"{METRICS_FILE}; <code>python recipes/reporting.py RUN_DIR</code> makes this page again.</p>"
        f"<h2>Results</h2><section>{facts_table(result_rows(records, evaluation, config))}</section>"
        f"<h2>Run</h2><section>{facts_table(facts)}</section>"
        f"<h2>Curves</h2><div class=plots>{plots}</div>"
        + _source_section(evaluation, config)
        + _expert_section(evaluation, config)
        + reward_section(evaluation, run_dir)
        + distill_section(evaluation)
        + before_and_after(evaluation.get("tasks", {}), run_dir)
        + (f"<h2>Samples</h2><section>{samples}</section>" if samples else "")
        + "<h2>Configuration</h2><section><details><summary>config.yaml</summary>"
        + f"<pre>{settings}</pre></details></section>"
    )
    return page(name, body)


def write_report(run_dir):
    """Write report.html into the run folder; returns its path."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    path = Path(run_dir) / REPORT_FILE
    write_atomically(path, build_report(run_dir))
    return path


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw report.html of a run folder from its metrics.")
    parser.add_argument("run_dir", help="folder with metrics.jsonl")
    print(write_report(parser.parse_args(argv).run_dir))


if __name__ == "__main__":
    main()
