"""PPO from the nano SFT model on one GPU: against rules, and against a reward model with the true accuracy beside it.

    python benchmarks/run_nano.py --output_dir runs/nano                  # makes what this starts from
    python benchmarks/run_nano_ppo.py --base runs/nano/sft --output_dir runs/nano_ppo

Makes prompts and preferences, trains a reward model, then runs every setting with every seed, all side by side on the
card, and draws curves with bands (mean and range over the seeds). Stages that are finished are not repeated: a second
call prints the figures again. Settings:

    rules     accuracy and format by the tasks' verifiers
    model     the reward model alone, without KL: shows over-optimisation (arXiv:2210.10760)
    model_kl  the reward model with ten times the config's KL to the SFT model in the reward

Processes share the card well only under the driver's multi-process service (nvidia-cuda-mps-control -d).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import yaml
from matplotlib import pyplot as plt

from recipes.eval_tables import aligned, with_interval
from recipes.logging_callbacks import read_metrics
from recipes.report_page import COLORS, figure_svg

SETTINGS = ("rules", "model", "model_kl")
STAGES = ("data", "reward", "ppo")
TIMES = ("rollout seconds", "scoring seconds", "update seconds")


def command(*parts):
    return [sys.executable, *map(str, parts)]


def call(*parts):
    print("$ " + " ".join(map(str, parts)), flush=True)
    subprocess.run(command(*parts), cwd=ROOT, check=True)


def make_data(folder, size):
    tasks = yaml.safe_load((ROOT / f"recipes/configs/ppo_{size}.yaml").read_text())["eval_tasks"]
    if not (folder / "prompts" / "train.jsonl").is_file():
        call("-m", "data_scripts.prepare_prompts", "--output_dir", folder / "prompts", "--tasks", *tasks,
             "--train", 20000 if size == "nano" else 64, "--test", 250 if size == "nano" else 16)  # fmt: skip
    if not (folder / "preferences" / "train.jsonl").is_file():
        sizes = ("--tasks", ",".join(tasks), "--problems", 15000, "--test_problems", 100) if size == "nano" else ()
        call("-m", "data_scripts.prepare_preferences", "--output_dir", folder / "preferences", "--size", size,
             "--only_given", "--source", "traces=built-in", *sizes)  # fmt: skip


def train_reward_model(folder, base, size, overrides):
    if not (folder / "reward" / "eval.json").is_file():
        call("recipes/reward.py", "--config", f"recipes/configs/reward_{size}.yaml", "--model_name_or_path", base,
             "--dataset_name", folder / "preferences", "--output_dir", folder / "reward",
             "--resume_from_checkpoint", "auto", *overrides)  # fmt: skip


def run_arguments(setting, folder):
    """What tells a setting from the others."""
    if setting == "rules":
        return ["--rewards", "accuracy", "format", "--reward_weights", "1.0", "0.1"]
    kl = ["--kl_coef", "0.0" if setting == "model" else "0.1"]
    model = ["--rewards", folder / "reward", "--reward_weights", "1.0"]
    return [*model, "--track_rewards", "accuracy", "format", *kl]


def train_policies(folder, base, size, settings, seeds, overrides):
    """Starts all runs that are not finished, waits for them; raises if one fails, with the end of its output."""
    running = {}
    for setting in settings:
        for seed in seeds:
            run = folder / f"{setting}_{seed}"
            if (run / "eval.json").is_file():
                continue
            run.mkdir(parents=True, exist_ok=True)
            parts = command(
                "recipes/ppo.py", "--config", f"recipes/configs/ppo_{size}.yaml", "--model_name_or_path", base,
                "--dataset_name", folder / "prompts", "--output_dir", run, "--seed", seed, "--disable_tqdm", "true",
                "--resume_from_checkpoint", "auto", *run_arguments(setting, folder), *overrides,
            )  # fmt: skip
            log = open(run / "output.txt", "w", encoding="utf-8")
            running[run] = subprocess.Popen(parts, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    start = time.perf_counter()
    failed = [run for run, process in running.items() if process.wait()]
    if running:
        print(f"{len(running)} runs side by side: {time.perf_counter() - start:.0f} s", flush=True)
    for run in failed:
        print(f"{run} failed:\n" + (run / "output.txt").read_text(encoding="utf-8")[-2000:])
    if failed:
        raise SystemExit(f"{len(failed)} of {len(running)} runs failed")


# ---------------------------------------------------------------- figures


def read_runs(folder):
    """{setting: {seed: its training records}} of the finished runs."""
    found = {}
    for path in sorted(folder.glob("*_*/eval.json")):
        setting, _, seed = path.parent.name.rpartition("_")
        if setting in SETTINGS:
            records = [record for record in read_metrics(path.parent / "metrics.jsonl") if record["kind"] == "train"]
            found.setdefault(setting, {})[seed] = records
    return found


def component(record, name):
    """A reward by name ("reward": the reward model's, which is its folder's name), or a plain number of the record."""
    return record.get("rewards", {}).get(name) if name in ("accuracy", "reward") else record.get(name)


def measured(runs, name):
    return any(component(record, name) is not None for records in runs.values() for record in records)


def band(runs, name, smooth=3):
    """(steps, mean, lowest, highest) over the seeds, each a running mean of `smooth` logged values."""
    curves = []
    for records in runs.values():
        points = [(record["step"], component(record, name)) for record in records]
        points = [(step, value) for step, value in points if value is not None]
        values = [value for _, value in points]
        smoothed = [statistics.fmean(values[max(0, i - smooth + 1) : i + 1]) for i in range(len(values))]
        curves.append(([step for step, _ in points], smoothed))
    steps = curves[0][0]
    columns = list(zip(*(values for _, values in curves)))
    ranges = ([function(column) for column in columns] for function in (statistics.fmean, min, max))
    return steps[: len(columns)], *ranges


def draw(found, path):
    """Four panels: true accuracy, reward model's score, KL, completion length."""
    panels = (("accuracy", "true accuracy (sampled, T = 1)"), ("reward", "reward model's score"),
              ("kl", "KL to the SFT model, nats per token"), ("length", "tokens of a completion"))  # fmt: skip
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
    for (name, label), axis in zip(panels, axes.flat):
        for (setting, runs), color in zip(sorted(found.items()), COLORS):
            if not measured(runs, name):
                continue
            steps, mean, low, high = band(runs, name)
            axis.plot(steps, mean, color=color, label=f"{setting} ({len(runs)} seeds)", linewidth=1.5)
            axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
    axes[0, 0].legend(fontsize=8, frameon=False)
    path.write_text(figure_svg(figure), encoding="utf-8")


def task_rows(folder, found):
    """Accuracy on held-out problems by task: before, with its interval; after, mean and range over the seeds."""
    rows = []
    for setting, runs in sorted(found.items()):
        results = [json.loads((folder / f"{setting}_{seed}" / "eval.json").read_text())["tasks"] for seed in runs]
        for task in results[0]["after"]["tasks"]:
            before = results[0]["before"]["tasks"][task]["pass@1"]
            shares = [100 * result["after"]["tasks"][task]["pass@1"]["value"] for result in results]
            spread = f"{statistics.fmean(shares):.1f} ({min(shares):.1f} to {max(shares):.1f})"
            rows.append([setting, task, with_interval(before), spread])
    return rows


def curve_rows(found):
    """First, best and last tracked accuracy and reward model score, mean over seeds, and the time of a rollout."""
    rows = []
    for setting, runs in sorted(found.items()):
        row = [setting]
        for name in ("accuracy", "reward", "kl"):
            if not measured(runs, name):
                row.append("none")
                continue
            _, mean, low, high = band(runs, name)
            best = max(range(len(mean)), key=mean.__getitem__)
            row.append(f"{mean[0]:.3f} -> best {mean[best]:.3f} -> {mean[-1]:.3f} [{low[-1]:.3f}, {high[-1]:.3f}]")
        for name in TIMES:
            values = [record[name] for records in runs.values() for record in records if record.get(name) is not None]
            row.append(f"{statistics.median(values):.2f}" if values else "none")
        rows.append(row)
    return rows


def print_pilots(folder):
    """Rewards of each logged rollout, and held-out accuracies of reward models, from single files."""
    for path in sorted(folder.glob("*.jsonl")):
        records = [record for record in read_metrics(path) if record["kind"] == "train"]
        print(path.stem, [round(record["reward"], 3) for record in records if record.get("reward") is not None])
    for path in sorted(folder.glob("*.json")):
        for kind in ("preferences", "process"):
            found = json.loads(path.read_text()).get(kind)
            if found:
                print(path.stem, kind, "accuracy", with_interval(found["accuracy"]))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="folder of the fine-tuned model")
    parser.add_argument("--pilots", type=Path, help="only print the records of single runs in this folder")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/nano_ppo"))
    parser.add_argument("--size", default="nano", choices=["nano", "tiny"], help="tiny: a rehearsal on a CPU")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES)
    args, overrides = parser.parse_known_args(argv)  # --ppo.max_steps 9, --reward.max_steps 9: of all runs
    if args.pilots:
        return print_pilots(args.pilots)
    if args.base is None:
        raise SystemExit("--base is missing: the folder of the fine-tuned model")
    folder, base = args.output_dir.resolve(), args.base.resolve()
    of_stage = {stage: [] for stage in STAGES}
    stage = None
    for argument in overrides:
        if argument.startswith("--"):
            stage, _, key = argument.removeprefix("--").partition(".")
            if stage not in ("reward", "ppo"):
                raise SystemExit(f"{argument}: begin it with reward. or ppo., e.g. --ppo.max_steps")
            argument = f"--{key}"
        of_stage[stage].append(argument)
    if "data" in args.stages:
        make_data(folder, args.size)
    if "reward" in args.stages:
        train_reward_model(folder, base, args.size, of_stage["reward"])
    if "ppo" in args.stages:
        train_policies(folder, base, args.size, args.settings, args.seeds, of_stage["ppo"])
    found = read_runs(folder)
    if not found:
        return
    draw(found, folder / "curves.svg")
    header = ["setting", "accuracy", "reward model", "KL", *TIMES]
    print(aligned(header, curve_rows(found)))
    print(aligned(["setting", "task", "before, %", "after, % (range over seeds)"], task_rows(folder, found)))
    print(f"curves: {folder / 'curves.svg'}")


if __name__ == "__main__":
    main()
