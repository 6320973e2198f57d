"""report.html of a run folder: one self-contained file with results, plots and samples.

    python recipes/reporting.py RUN_DIR

reads metrics.jsonl, config.yaml and eval.json, and needs nothing else: plots are inline SVG.
"""

import argparse
import html
import io
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

import matplotlib
import yaml

from recipes.checkpoint_files import write_atomically
from recipes.logging_callbacks import METRICS_FILE, read_metrics

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)

REPORT_FILE = "report.html"
COLORS = ("#1f5fa8", "#c8502e", "#2f8a57", "#8257a8", "#a8842a", "#4a9aa8", "#8a3a5a", "#555555")
STYLE = """
body{font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;color:#1d2329;background:#f6f7f8;margin:0}
main{max-width:62rem;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.7rem;margin:0 0 .2rem}h2{font-size:1.15rem;margin:2.2rem 0 .6rem}
.note{color:#59636e;font-size:.9rem;margin:.2rem 0 0}
section,.card{background:#fff;border:1px solid #dfe3e7;border-radius:8px;padding:1rem 1.2rem;margin:.8rem 0}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(27rem,1fr));gap:.8rem}
.plots figure{margin:0;background:#fff;border:1px solid #dfe3e7;border-radius:8px;padding:.6rem}
.plots svg{width:100%;height:auto;display:block}figcaption{color:#59636e;font-size:.85rem;padding:.2rem .4rem}
table{border-collapse:collapse;width:100%}
td,th{text-align:left;padding:.3rem .8rem .3rem 0;border-bottom:1px solid #eceff1;vertical-align:top}
td:last-child{font-variant-numeric:tabular-nums;overflow-wrap:anywhere}th{font-weight:600}
pre{white-space:pre-wrap;overflow-wrap:anywhere;
background:#f6f7f8;padding:.8rem;border-radius:6px;font-size:.85rem;margin:.4rem 0}
.prompt{color:#59636e}summary{cursor:pointer}
@media(max-width:32rem){.plots{grid-template-columns:1fr}}
"""


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


def _svg(figure):
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def plot(curves, ylabel, references=(), log=False):
    """SVG of [(label, steps, values)] over optimizer steps; `references`: [(label, value)] dashed lines."""
    figure, axes = plt.subplots(figsize=(6.2, 3.2), layout="constrained")
    marker = "o" if max((len(steps) for _, steps, _ in curves), default=0) < 25 else None
    for (label, steps, values), color in zip(curves, COLORS * 8):
        axes.plot(steps, values, label=label, color=color, linewidth=1.4, marker=marker, markersize=3)
    for position, (label, value) in enumerate(references):
        axes.axhline(value, color="#8a939c", linewidth=1, linestyle=("--", ":", "-.")[position % 3], label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(ylabel)
    if log:
        axes.set_yscale("log")
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(curves) + len(references) > 1:
        figure.legend(loc="outside right center", fontsize=8, frameon=False)  # beside the curves, never on them
    return _svg(figure)


def _bits_per_byte_plot(evals, baselines):
    curves = [("all sources", *_series(evals, "bits/byte"))]
    for source in sorted({name for record in evals for name in record.get("bits/byte per source", {})}):
        flat = [{"step": r["step"], "value": r.get("bits/byte per source", {}).get(source)} for r in evals]
        curves.append((source, *_series(flat, "value")))
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


def figures(records, baselines, model=()):
    """[(svg, caption)] of everything that the metrics hold."""
    train = [r for r in records if r["kind"] == "train"]
    evals = [r for r in records if r["kind"] == "eval"]
    made = []
    losses = [("next token", *_series(train, "next-token loss")), ("MTP", *_series(train, "mtp loss"))]
    losses = [curve for curve in losses if curve[1]] or [("loss", *_series(train, "loss"))]
    losses += [("held out", *_series(evals, "eval loss"))] if evals else []
    if train:
        made.append((plot(losses, "loss, nats per token"), "Training loss, mean over all micro-batches and processes."))
    if evals:
        caption = "Held-out text. Grey: the same text by token frequencies alone (unigram), and compressed by xz."
        made.append((_bits_per_byte_plot(evals, baselines), caption))
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
        caption = (
            "Last step before each log. 1 is even; worst: all tokens at the same experts."
        )
        made.append((load, caption))
    return made


# ---------------------------------------------------------------- the page


def _read_yaml(path):
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _read_json(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _table(rows):
    cells = "".join(f"<tr><th>{html.escape(str(a))}</th><td>{html.escape(str(b))}</td></tr>" for a, b in rows)
    return f"<table>{cells}</table>"


def result_rows(records, evaluation, config):
    """[(label, text)] of the results table; also printed at the end of a run."""
    train = [r for r in records if r["kind"] == "train"]
    rows = []
    if train:
        rows.append(("optimizer steps", f"{train[-1]['step']:,}"))
        rows.append(("training tokens", f"{sum(r.get('tokens', 0) for r in train):,}"))
        rows.append(("last training loss", f"{train[-1].get('next-token loss', train[-1]['loss']):.4f} nats per token"))
    for key, label in (("weights", "held out"), ("ema", "held out, averaged weights (EMA)")):
        values = evaluation.get(key)
        if values:
            rows.append((label, f"{values['bits_per_byte']:.4f} bits per byte, loss {values['loss']:.4f}"))
            rows += [(f"{label}, {name}", f"{value:.4f} bits per byte") for name, value in values["sources"].items()]
    rows += [
        (f"reference, {name}", f"{value:.3f} bits per byte") for name, value in config.get("baselines", {}).items()
    ]
    speeds = [r["tok/s"] for r in train if r.get("tok/s")]
    if speeds:
        middle = sorted(speeds)[len(speeds) // 2]
        mfu = sorted(r["mfu"] for r in train if r.get("mfu"))
        rows.append(("speed, median", f"{middle:,.0f} tokens/s" + (f", MFU {mfu[len(mfu) // 2]:.1%}" if mfu else "")))
    return rows


def _samples(records):
    kept = [r for r in records if r["kind"] == "samples"]
    shown = kept[:1] + kept[-2:] if len(kept) > 3 else kept
    parts = []
    for record in reversed(shown):
        for sample in record["samples"]:
            prompt, completion = html.escape(sample["prompt"]), html.escape(sample["completion"])
            parts.append(
                f"<p class=note>step {record['step']:,}</p><pre><span class=prompt>{prompt}</span>{completion}</pre>"
            )
    return "".join(parts)


def build_report(run_dir):
    """The page as text. Raises ValueError where there is nothing to report."""
    run_dir = Path(run_dir)
    records = [r for r in read_metrics(run_dir / METRICS_FILE) if "kind" in r and "step" in r]
    if not records:
        raise ValueError(f"{run_dir} holds no {METRICS_FILE} with records: is it a run folder?")
    config, evaluation = _read_yaml(run_dir / "config.yaml"), _read_json(run_dir / "eval.json")
    plots = "".join(
        f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"
        for svg, caption in figures(records, config.get("baselines", {}), config.get("model", {}))
    )
    facts = [("commit", config.get("commit", "unknown"))]
    facts += [(name, value) for name, value in config.get("sizes", {}).items()]
    facts += [("device", ", ".join(f"{k} {v}" for k, v in config.get("device", {}).items()))]
    samples = _samples(records)
    settings = html.escape(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    name = html.escape(run_dir.resolve().name)
    body = (
        f"<h1>{name}</h1><p class=note>Pretraining run. Figures are drawn from {METRICS_FILE}; "
        "<code>python recipes/reporting.py RUN_DIR</code> makes this page again.</p>"
        f"<h2>Results</h2><section>{_table(result_rows(records, evaluation, config))}</section>"
        f"<h2>Run</h2><section>{_table(facts)}</section>"
        f"<h2>Curves</h2><div class=plots>{plots}</div>"
        + (f"<h2>Samples</h2><section>{samples}</section>" if samples else "")
        + "<h2>Configuration</h2><section><details><summary>config.yaml</summary>"
        + f"<pre>{settings}</pre></details></section>"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><title>{name}</title><style>{STYLE}</style></head>'
        f"<body><main>{body}</main></body></html>"
    )


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
