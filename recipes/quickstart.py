"""The main job, small, on a CPU in about ten minutes: data -> pretraining -> fine-tuning -> reward model -> PPO ->
evaluation -> one report.

    python recipes/quickstart.py [--output_dir runs/quickstart] [--pretrain.max_steps 100] [--ppo.learning_rate 1e-4]

Everything is made on the spot and without a network: the data from what this repository, Python and reasoning-gym bring
(`data_scripts/README.md`), the model by `recipes/configs/*_tiny.yaml`; further keys, with their stage's name in front,
override these files. A second call continues where the first one stopped.
"""

import argparse
import html
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):  # launched as a script: recipes/ is first on the path and shadows packages
    sys.path[0] = str(ROOT)

from data_scripts import prepare_preferences, prepare_pretraining, prepare_prompts, prepare_sft
from recipes import ppo, pretrain, reward, sft
from recipes.checkpoint_files import write_atomically
from recipes.eval_report import before_and_after
from recipes.logging_callbacks import METRICS_FILE, read_metrics
from recipes.ppo_config import PPORecipeConfig
from recipes.ppo_plots import reward_plot
from recipes.pretrain_config import PretrainConfig, parse_config
from recipes.report_page import facts_table, page
from recipes.reporting import result_rows
from recipes.reward_config import RewardRecipeConfig
from recipes.sft_config import SFTRecipeConfig

CONFIGS = Path(__file__).resolve().parent / "configs"
STAGES = {"pretrain": "Pretraining", "sft": "Supervised fine-tuning", "reward": "Reward model",
          "ppo": "Reinforcement learning (PPO)"}  # fmt: skip
PARTS = {
    "pretrain": (PretrainConfig, pretrain.main), "sft": (SFTRecipeConfig, sft.main),
    "reward": (RewardRecipeConfig, reward.main), "ppo": (PPORecipeConfig, ppo.main),
}  # fmt: skip
TASKS = ("simple_equations:1", "leg_counting:1")  # those of the configs' evaluations
# Shorter than the configs, so that all stages together take about ten minutes.
SHORTER = {
    "pretrain": ["--max_steps", "300"], "sft": ["--max_steps", "900", "--eval_steps", "450", "--save_steps", "450"],
    "reward": [], "ppo": [],
}  # fmt: skip


def headline(number, title):
    """Prints a stage's headline; returns a function that gives its seconds so far."""
    print(f"\n== {number}. {title}", flush=True)
    start = time.perf_counter()
    return lambda: time.perf_counter() - start


def overrides_of(stage, arguments):
    """`--sft.max_steps 9` among the arguments as ["--max_steps", "9"]; a key without a stage is an error."""
    found, mine = [], False
    for argument in arguments:
        name, dot, key = argument.removeprefix("--").partition(".")
        if argument.startswith("--"):
            if not dot or name not in STAGES:
                raise ValueError(
                    f"{argument}: begin it with a stage, e.g. --pretrain.max_steps; stages are {', '.join(STAGES)}"
                )
            mine, argument = name == stage, f"--{key}"
        found += [argument] if mine else []
    return found


def stage_arguments(stage, folder, rest):
    """The command line of a stage: its config, what earlier stages have made, what is shorter here, overrides."""
    tuned = ["--model_name_or_path", str(folder / "sft")]
    made = {
        "pretrain": ["--dataset_name", str(folder / "data")],
        "sft": ["--dataset_name", str(folder / "data_sft"), "--model_name_or_path", str(folder / "pretrain")],
        "reward": ["--dataset_name", str(folder / "data_preferences"), *tuned],
        "ppo": ["--dataset_name", str(folder / "data_prompts"), *tuned, "--track_rewards", str(folder / "reward"),
                "--eval_before", "false"],  # that is the evaluation after fine-tuning
    }  # fmt: skip
    return ["--config", str(CONFIGS / f"{stage}_tiny.yaml"), *made[stage], "--output_dir", str(folder / stage),
            *SHORTER[stage], *overrides_of(stage, rest), "--resume_from_checkpoint", "auto"]  # fmt: skip


def make_data(folder):
    """What all stages train on; what is there already is not made again."""
    print(prepare_pretraining.summary(prepare_pretraining.prepare(folder / "data", size="tiny")))
    prepare_sft.main(["--output_dir", str(folder / "data_sft"), "--size", "tiny"])
    prepare_preferences.main(["--output_dir", str(folder / "data_preferences"), "--size", "tiny"])
    few = ["--train", "64", "--test", "64"]  # as ppo_tiny.yaml wants them
    prepare_prompts.main(["--output_dir", str(folder / "data_prompts"), *few, "--tasks", *TASKS])


def write_report(folder, results, seconds):
    """One page on all stages, with links to theirs."""
    spent = [(name, f"{value:.0f} s") for name, value in seconds.items()]
    body = (
        "<h1>Quickstart</h1><p class=note>A model from nothing to answers, on this machine. Every stage has a page of "
        f"its own.</p><h2>Time</h2><section>{facts_table(spent)}</section>"
    )
    for stage, title in STAGES.items():
        records = read_metrics(folder / stage / METRICS_FILE)
        link = f"<a href='{stage}/report.html'>{html.escape(stage)}/report.html</a>: curves, settings, samples"
        rows = facts_table(result_rows(records, results[stage], {}))
        body += f"<h2>{title}</h2><section>{rows}<p class=note>{link}</p></section>"
        if stage == "ppo":
            caption = "Mean reward of the completions, in training and on held-out prompts."
            body += f"<div class=plots><figure>{reward_plot(records)}<figcaption>{caption}</figcaption></figure></div>"
    ends = {"before": ("sft", "fine-tuned"), "after": ("ppo", "after PPO")}
    body += before_and_after({
        end: results[stage]["tasks"]["after"] | {"name": name} for end, (stage, name) in ends.items()
        if "tasks" in results[stage]
    }, folder / "ppo")  # fmt: skip
    write_atomically(folder / "report.html", page("Quickstart", body))
    return folder / "report.html"


def main(argv=None):
    """Runs all stages. Returns {"seconds": {stage: seconds}, "results": {stage: its eval.json}, "report": path}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/quickstart", help="folder for data, models and reports")
    args, rest = parser.parse_known_args(argv)
    folder, seconds, results = Path(args.output_dir), {}, {}
    commands = {stage: stage_arguments(stage, folder, rest) for stage in STAGES}
    for stage, (config_class, _) in PARTS.items():
        parse_config(config_class, commands[stage])  # a mistyped key is said now, not after the data is made

    clock = headline(1, "data and tokenizer")
    make_data(folder)
    seconds["data"] = clock()
    for number, (stage, (_, run)) in enumerate(PARTS.items(), 2):
        clock = headline(number, STAGES[stage])
        results[stage] = run(commands[stage])
        seconds[STAGES[stage]] = clock()

    report = write_report(folder, results, seconds)
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    print(f"\n== done in {sum(seconds.values()) / 60:.1f} minutes ({spent})")
    print(f"report   {report}")
    print(f"chat     python recipes/chat.py --model_name_or_path {folder / 'ppo'}")
    return {"seconds": seconds, "results": results, "report": report}


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:  # what a user can mend needs no traceback
        sys.exit(f"{type(error).__name__}: {error}")
