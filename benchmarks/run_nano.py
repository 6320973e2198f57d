"""The nano pipeline from nothing: data, pretraining, fine-tuning; prints what README and LOG.md quote.

    python benchmarks/run_nano.py --output_dir runs/nano [--stages data pretrain sft]

About five minutes on one H100, the data (two minutes of one core) not counted. Stages that are finished are not
repeated; the figures are read from the run folders, so that a second call prints them again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from recipes.eval_scores import macro_average
from recipes.eval_tables import aligned, with_interval
from recipes.logging_callbacks import read_metrics

STAGES = ("data", "pretrain", "sft")


def call(*command):
    print("$ " + " ".join(map(str, command)), flush=True)
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def run(folder, stages):
    if "data" in stages:
        call("-m", "data_scripts.prepare_pretraining", "--output_dir", folder / "data", "--size", "nano")
        call("-m", "data_scripts.prepare_sft", "--output_dir", folder / "data_sft", "--size", "nano")
    if "pretrain" in stages and not (folder / "pretrain" / "eval.json").is_file():
        call("recipes/pretrain.py", "--config", "recipes/configs/pretrain_nano.yaml", "--dataset_name", folder / "data",
             "--output_dir", folder / "pretrain", "--resume_from_checkpoint", "auto")
    if "sft" in stages and not (folder / "sft" / "eval.json").is_file():
        call("recipes/sft.py", "--config", "recipes/configs/sft_nano.yaml", "--dataset_name", folder / "data_sft",
             "--model_name_or_path", folder / "pretrain", "--output_dir", folder / "sft",
             "--resume_from_checkpoint", "auto")


def training_summary(path):
    """Tokens, seconds without evaluation and saving, and speed of a run folder, as text."""
    records = [record for record in read_metrics(path / "metrics.jsonl") if record["kind"] == "train"]
    pairs = zip([{"step": 0}, *records], records)
    seconds = sum(r["step_seconds"] * (r["step"] - last["step"]) for last, r in pairs if r.get("step_seconds"))
    text = f"{records[-1]['step']:,} steps, {sum(r['tokens'] for r in records):,} tokens in {seconds:.0f} s of training"
    for name, form in (("tok/s", "{:,.0f} tokens/s"), ("mfu", "MFU {:.1%}")):
        if found := sorted(record[name] for record in records if record.get(name)):
            text += ", median " + form.format(found[len(found) // 2])
    return text


def figures(folder, leave_out=()):
    """The quoted figures of the stages that are there, as text; tasks in `leave_out` are not in the mean."""
    parts = []
    for stage in STAGES[1:]:
        path = folder / stage
        if not (path / "eval.json").is_file():
            continue
        result = json.loads((path / "eval.json").read_text())
        parts.append(f"{stage}: {training_summary(path)}")
        if "weights" in result:
            parts.append(f"{stage}: {result['weights']['bits_per_byte']:.3f} bits per byte held out")
        if "tasks" in result:
            before, after = result["tasks"]["before"], result["tasks"]["after"]
            rows = [[name, with_interval(before["tasks"][name]["pass@1"]), with_interval(task["pass@1"]),
                     f"{task['tokens']['mean']:.0f}"] for name, task in after["tasks"].items()]
            counted = [name for name in after["tasks"] if name not in leave_out]
            means = (macro_average([stage["tasks"][name]["pass@1"] for name in counted]) for stage in (before, after))
            rows.append([f"mean of {len(counted)} tasks", *map(with_interval, means), ""])
            parts.append(aligned(["pass@1 %", "before", "after", "tokens"], rows))
    return "\n".join(parts)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/nano"))
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES)
    parser.add_argument("--leave_out", nargs="*", default=(), help="tasks that the mean does not count")
    args = parser.parse_args(argv)
    folder = args.output_dir.resolve()
    run(folder, args.stages)
    print(figures(folder, args.leave_out))


if __name__ == "__main__":
    main()
