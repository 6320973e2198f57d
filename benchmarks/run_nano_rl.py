"""R1-Zero and R1 with the nano model on one GPU: data, base, cold start, then reinforcement learning in many settings.

    python benchmarks/run_nano_rl.py --output_dir runs/nano_rl --stages data          # CPU, about two minutes
    python benchmarks/run_nano_rl.py --output_dir runs/nano_rl --stages pretrain cold
    python benchmarks/run_nano_rl.py --output_dir runs/nano_rl --stages rl --settings grpo zero --seeds 0 1 2
    python benchmarks/run_nano_rl.py --output_dir runs/nano_rl --stages               # the tables and the figure again

Two branches from one base, pretrained on text of which 20 % are worked problems (data_scripts/worked_documents.py):
R1-Zero (reinforcement learning from the base, its template and no fine-tuning) and the full one (a small cold start,
then reinforcement learning). Runs of all settings and seeds stand side by side on the card; finished ones are not
repeated, killed ones are resumed. Settings:

    grpo            from the cold start; router replay on
    grpo_no_replay  the same without router replay
    ppo             PPO from the cold start with as many samples, on the same prompts, with the same rewards
    zero            GRPO from the base with the template deepseek_r1_zero
    zero_plain      the same from a base without worked documents (--plain_base): expected to be refused before step 1
    dapo            clip-higher, token-level loss, dynamic sampling, soft punishment of length (arXiv:2503.14476)
    dr_grpo         no division by lengths and deviations (arXiv:2503.20783)
    gspo            ratios of whole sequences (arXiv:2507.18071)

`--grpo.key value` goes to all runs of recipes/grpo.py, likewise ppo., pretrain. and cold. With `--learning_rates a b`
every setting is run at each rate, under names like grpo-3e-05_0. Processes share the card well only under the driver's
multi-process service (nvidia-cuda-mps-control -d). `--size tiny` rehearses everything on a CPU in a few steps.
"""

import argparse
import copy
import json
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import yaml

from benchmarks.rl_tables import curve_table, draw, gain_table, read_run, stage_table
from benchmarks.run_nano_ppo import call, command
from recipes.eval_tables import aligned

SETTINGS = ("grpo", "grpo_no_replay", "ppo", "zero", "zero_plain", "dapo", "dr_grpo", "gspo")
STAGES = ("data", "pretrain", "cold", "rl")
OF_STAGE = ("pretrain", "cold", "grpo", "ppo")
# As in pipeline_nano.yaml.
ZERO = ["--chat_template", "deepseek_r1_zero", "--rewards", "accuracy", "format", "--reward_weights", "1.0", "1.0",
        "--learning_rate", "5e-5"]  # fmt: skip
# What makes a run of recipes/grpo.py another setting; the values of the papers named above.
ARGUMENTS = {
    "grpo": [],
    "grpo_no_replay": ["--router_replay", "false"],
    "zero": ZERO,
    "zero_plain": ZERO,
    "dapo": ["--loss_type", "dapo", "--epsilon", "0.2", "--epsilon_high", "0.28", "--beta", "0.0",
             "--dynamic_sampling", "true"],
    "dr_grpo": ["--loss_type", "dr_grpo", "--scale_rewards", "none"],
    "gspo": ["--loss_type", "grpo", "--importance_sampling_level", "sequence", "--epsilon", "3e-4",
             "--epsilon_high", "4e-4"],
}  # fmt: skip
# PPO takes these from GRPO's config, so that only the algorithm differs.
SHARED = ("optimizer", "learning_rate", "lr_scheduler_type", "warmup_steps", "rewards", "reward_weights",
          "reward_kwargs", "num_generations", "temperature", "max_completion_length", "max_prompt_length", "eval_tasks",
          "eval_problems", "eval_max_new_tokens", "eval_generation_batch_size")  # fmt: skip
CONFIGS = {"nano": {"pretrain": "pretrain_nano", "cold": "sft_nano_cold", "grpo": "grpo_nano", "ppo": "ppo_nano"},
           "tiny": {"pretrain": "pretrain_tiny", "cold": "sft_tiny", "grpo": "grpo_tiny", "ppo": "ppo_tiny"}}
PACKED = {"nano": ["--max_tokens", 3_600_000], "tiny": ["--max_tokens", 300_000, "--validation_fraction", 0.05]}
MIXTURE = "text=42,code=18,multilingual=14,mathematics=6,worked=20"
PROMPTS = {"nano": (20_000, 240), "tiny": (64, 16)}
SHORT = ["--eval_problems", "4", "--logging_steps", "1", "--eval_strategy", "no", "--save_strategy", "no"]
REHEARSAL = {"pretrain": ["--max_steps", "12", "--warmup_steps", "2", *SHORT[2:], "--sample_steps", "0"],
             "cold": ["--max_steps", "12", "--warmup_steps", "2", "--eval_before", "false", *SHORT],
             "grpo": ["--max_steps", "4", "--warmup_steps", "1", *SHORT],
             "ppo": ["--warmup_steps", "1", *SHORT]}  # fmt: skip
LISTS = ("rewards", "reward_weights", "eval_tasks")  # also where they have one entry
REFUSAL = re.compile(r"^ValueError: (nothing can be learned.*)", re.M | re.S)  # of the pre-flight
# (heading, name in metrics.jsonl, format)
CURVES = (
    ("reward", "reward", "{:.3f}"), ("accuracy", "rewards/accuracy", "{:.3f}"), ("tokens", "length", "{:.0f}"),
    ("reflection words", "reflection words", "{:.2f}"), ("cut off", "cut off", "{:.2f}"),
    ("groups alike", "zero variance", "{:.2f}"), ("entropy", "entropy", "{:.2f}"),
)  # fmt: skip
ROUTING = (
    ("token-layers routed apart", "routes differ", "{:.4f}"), ("experts apart", "experts differ", "{:.4f}"),
    ("KL sampler, replayed", "sampler kl with replay", "{:.2e}"),
    ("KL sampler, own routing", "sampler kl without replay", "{:.2e}"), ("KL to reference", "kl", "{:.4f}"),
)  # fmt: skip


def read_config(size, stage):
    return yaml.safe_load((ROOT / f"recipes/configs/{CONFIGS[size][stage]}.yaml").read_text(encoding="utf-8"))


def with_overrides(config, overrides):
    """A YAML's values with `--key value ...` arguments laid over them, `--key.part value` inside of one."""
    found, given = copy.deepcopy(config), {}
    for argument in map(str, overrides):
        if argument.startswith("--"):
            values = given[argument.removeprefix("--")] = []
        else:
            values.append(yaml.safe_load(argument))
    for key, values in given.items():
        *parts, name = key.split(".")
        inside = found
        for part in parts:
            inside[part] = inside = inside.get(part) or {}
        inside[name] = values[0] if len(values) == 1 and key not in LISTS else values
    return found


def samples_of(config):
    """Completions that a run samples for each optimizer step: each is in `num_iterations` (PPO: epochs) of them."""
    repeats = config.get("num_iterations") or config.get("num_ppo_epochs") or 1
    return config["per_device_train_batch_size"] * config.get("gradient_accumulation_steps", 1) / repeats


def equal_steps(grpo, ppo):
    """Optimizer steps of PPO, in whole rollouts, that sample as many completions as the run of GRPO.

    Raises:
        ValueError: if no whole number of PPO's rollouts does.
    """
    samples, rollout = grpo["max_steps"] * samples_of(grpo), samples_of(ppo)
    rollout_steps = (ppo.get("num_mini_batches") or 1) * (ppo.get("num_ppo_epochs") or 1)
    steps = samples / rollout
    if steps % rollout_steps:
        raise ValueError(
            f"GRPO samples {samples:,.0f} completions, PPO {rollout * rollout_steps:,.0f} a rollout: change "
            "--grpo.max_steps or --ppo.per_device_train_batch_size so that one divides the other"
        )
    return int(steps)


# ---------------------------------------------------------------- stages


def make_data(folder, size, mixture=MIXTURE, max_tokens=None):
    """Conversations, worked documents of their training side, a packed set with both, prompts: pipeline_nano.yaml's."""
    tasks = read_config(size, "grpo")["eval_tasks"]
    call("-m", "data_scripts.prepare_sft", "--output_dir", folder / "data_sft", "--size", size)
    call("-m", "data_scripts.worked_documents", "--output_dir", folder / "worked", "--conversations",
         folder / "data_sft")  # fmt: skip
    call("-m", "data_scripts.prepare_pretraining", "--output_dir", folder / "data", "--size", size, *PACKED[size],
         *(["--max_tokens", max_tokens] if max_tokens else []), "--source", f"worked={folder / 'worked'}",
         "--keep_overlaps", "worked", "--mixture", mixture)  # fmt: skip
    train, test = PROMPTS[size]
    call("-m", "data_scripts.prepare_prompts", "--output_dir", folder / "prompts", "--tasks", *tasks,
         "--train", train, "--test", test)  # fmt: skip


def train_stage(folder, stage, size, overrides):
    """Pretraining, or the cold start from it, unless it is finished."""
    if (folder / stage / "eval.json").is_file():
        return
    start = [] if stage == "pretrain" else ["--model_name_or_path", folder / "pretrain"]
    data = folder / ("data" if stage == "pretrain" else "data_sft")
    call("recipes/pretrain.py" if stage == "pretrain" else "recipes/sft.py", "--config",
         f"recipes/configs/{CONFIGS[size][stage]}.yaml", "--dataset_name", data, "--output_dir", folder / stage,
         "--resume_from_checkpoint", "auto", *start, *overrides)  # fmt: skip


def texts_of(value):
    """A YAML value as arguments of the command line."""
    if isinstance(value, dict):
        return [json.dumps(value)]
    return [str(part).lower() if isinstance(part, bool) else str(part) for part in
            (value if isinstance(value, list) else [value])]  # fmt: skip


def with_length_reward(config):
    """DAPO's soft overlong punishment beside the config's rewards."""
    rewards = config["rewards"]
    weights = config.get("reward_weights") or [1.0] * len(rewards)
    return ["--rewards", *rewards, "length", "--reward_weights", *map(str, [*weights, 1.0])]


def setting_arguments(setting, size, of_stage):
    """(script, config file, arguments) that make a setting; overrides of the command line win."""
    grpo = with_overrides(read_config(size, "grpo"), of_stage["grpo"])
    if setting != "ppo":
        extra = with_length_reward(grpo) if setting == "dapo" and "length" not in grpo["rewards"] else []
        return "recipes/grpo.py", CONFIGS[size]["grpo"], [*ARGUMENTS[setting], *of_stage["grpo"], *extra]
    shared = [part for name in SHARED if grpo.get(name) is not None for part in (f"--{name}", *texts_of(grpo[name]))]
    shared += ["--kl_coef", str(grpo.get("beta", 0.0))]
    ppo = with_overrides(read_config(size, "ppo"), [*shared, *of_stage["ppo"]])
    steps = ["--max_steps", str(equal_steps(grpo, ppo))]
    return "recipes/ppo.py", CONFIGS[size]["ppo"], [*shared, *steps, *of_stage["ppo"]]


def plan(folder, size, settings, seeds, rates, bases, of_stage):
    """{run folder: command} of the runs that are neither finished nor refused; `bases`: {"cold", "zero", "plain"}."""
    found = {}
    for setting in settings:
        base = bases[{"zero": "zero", "zero_plain": "plain"}.get(setting, "cold")]
        if base is None:
            raise SystemExit("the setting zero_plain needs --plain_base, a base pretrained without worked documents")
        script, config, arguments = setting_arguments(setting, size, of_stage)
        for rate in rates or [None]:
            for seed in seeds:
                run = folder / f"{setting}{'' if rate is None else f'-{rate:g}'}_{seed}"
                if (run / "eval.json").is_file() or (run / "refused.txt").is_file():
                    continue
                found[run] = command(
                    script, "--config", f"recipes/configs/{config}.yaml", "--model_name_or_path", base,
                    "--dataset_name", folder / "prompts", "--output_dir", run, "--seed", seed, "--disable_tqdm", "true",
                    "--resume_from_checkpoint", "auto", *arguments,
                    *([] if rate is None else ["--learning_rate", f"{rate:g}"]),
                )  # fmt: skip
    return found


def _conclude(run, code, seconds):
    """Notes what became of a run: its seconds, added up over resumed starts, or why it was refused."""
    times = run / "seconds.json"
    before = json.loads(times.read_text(encoding="utf-8")) if times.is_file() else 0.0
    times.write_text(json.dumps(round(before + seconds, 1)), encoding="utf-8")
    output = (run / "output.txt").read_text(encoding="utf-8", errors="replace")
    refusal = REFUSAL.search(output)
    if code and refusal:
        (run / "refused.txt").write_text(refusal[1][:2000], encoding="utf-8")
        return None
    return output[-2000:] if code else None


def run_all(jobs, parallel):
    """Runs commands, at most `parallel` at a time. Returns {run folder: end of its output} of those that failed."""
    waiting, running, failed, began = list(jobs.items()), {}, {}, time.perf_counter()
    while waiting or running:
        while waiting and len(running) < parallel:
            run, parts = waiting.pop(0)
            run.mkdir(parents=True, exist_ok=True)
            with open(run / "output.txt", "w", encoding="utf-8") as log:
                process = subprocess.Popen(parts, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            running[run] = process, time.perf_counter()
        for run, (process, start) in list(running.items()):
            if process.poll() is not None:
                del running[run]
                problem = _conclude(run, process.returncode, time.perf_counter() - start)
                failed |= {run: problem} if problem is not None else {}
        time.sleep(0.2)
    if jobs:
        print(f"{len(jobs)} runs, {parallel} at a time: {time.perf_counter() - began:.0f} s", flush=True)
    return failed


# ---------------------------------------------------------------- what came of it


def read_runs(folder):
    """{label: {seed: run}} of the finished runs, settings in their order."""
    found = {}
    for path in sorted(folder.glob("*_*/eval.json")):
        label, _, seed = path.parent.name.rpartition("_")
        if label.partition("-")[0] in SETTINGS and seed.isdigit():
            found.setdefault(label, {})[seed] = read_run(path.parent)
    order = {setting: place for place, setting in enumerate(SETTINGS)}
    return dict(sorted(found.items(), key=lambda item: (order[item[0].partition("-")[0]], item[0])))


def ends(found):
    """({label: results after}, {label: results before}) of the runs."""
    after = {label: [run["after"] for run in seeds.values()] for label, seeds in found.items()}
    return after, {label: [run["before"] for run in seeds.values() if run["before"]] for label, seeds in found.items()}


def branches_of(found):
    """{branch: [(stage, results)]} for the figure: what each reached, from the base on."""
    after, before = ends(found)
    base = [("base", before["zero"][:1])] if before.get("zero") else []
    branches = {"R1-Zero": [*base, ("GRPO from the base", after["zero"])]} if "zero" in after else {}
    if before.get("grpo"):
        branches["cold start, then GRPO"] = [*base, ("cold start", before["grpo"][:1]), ("GRPO", after["grpo"])]
    return branches


def tables(found):
    """The tables as text: stages, gains, settings against each other, curves, routing."""
    after, before = ends(found)
    stages = [(name, before[label][:1]) for name, label in (("base (zero)", "zero"), ("cold start", "grpo"))
              if before.get(label)]  # fmt: skip
    parts = [aligned(*stage_table([*stages, *after.items()]))]
    gains = [(f"{label} over its start", after[label], before[label][:1]) for label in after if before[label]]
    pairs = [("grpo", "ppo"), ("grpo", "grpo_no_replay"), *((name, "grpo") for name in ("dapo", "dr_grpo", "gspo"))]
    against = [(f"{one} - {two}", after[one], after[two]) for one, two in pairs if one in after and two in after]
    parts += [aligned(*gain_table(part)) for part in (gains, against) if part]
    return "\n\n".join([*parts, *(aligned(*curve_table(found, columns)) for columns in (CURVES, ROUTING))])


def report(folder):
    """Prints the tables and the refusals; draws accuracy.svg."""
    for path in sorted(folder.glob("*_*/refused.txt")):
        print(f"{path.parent.name} was refused before step 1: {path.read_text(encoding='utf-8').strip()}\n")
    found = read_runs(folder)
    if not found:
        return
    print(tables(found))
    panels = (("rewards/accuracy", "accuracy of the samples"), ("length", "tokens of a completion"))
    draw(branches_of(found), found, folder / "accuracy.svg", panels)
    print(f"figure: {folder / 'accuracy.svg'}")


def split_overrides(arguments, size):
    """{stage: its `--key value` arguments} of `--stage.key value`, after those of a rehearsal."""
    of_stage = {stage: list(REHEARSAL[stage]) if size == "tiny" else [] for stage in OF_STAGE}
    stage = None
    for argument in arguments:
        if argument.startswith("--"):
            stage, dot, key = argument.removeprefix("--").partition(".")
            if stage not in OF_STAGE or not dot:
                raise SystemExit(f"{argument}: begin it with {', '.join(OF_STAGE)} and a dot, e.g. --grpo.max_steps 9")
            key, equals, value = key.partition("=")
            of_stage[stage] += [f"--{key}", *([value] if equals else [])]
        elif stage is None:
            raise SystemExit(f"{argument} belongs to no option")
        else:
            of_stage[stage].append(argument)
    return of_stage


def print_pilots(path):
    """Mean over the tasks, in per cent, of each single run, before (where it was evaluated) and after; how many tasks
    gained ten points."""
    for name, run in json.loads(path.read_text(encoding="utf-8")).items():
        ends = run["tasks"]
        parts = [f"{end} {100 * sum(task['value'] for task in tasks.values()) / len(tasks):.1f}"
                 for end, tasks in ends.items()]  # fmt: skip
        if len(ends) == 2:
            after, before = ends["after"], ends["before"]
            gains = {task: 100 * (after[task]["value"] - before[task]["value"]) for task in after}
            large = sorted((task for task in gains if gains[task] > 9.99), key=gains.get, reverse=True)
            parts += [f"{task} {gains[task]:+.1f}" for task in large]
        print(name.ljust(24), ", ".join(parts))


def print_graph(path):
    """Seconds and mean accuracy of each stage of a pipeline.json, and by how much each task changed since `cold`."""
    stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
    rows, start = [], stages.get("cold", {}).get("scores")
    for name, stage in stages.items():
        scores = stage["scores"]
        mean = scores.get("mean of tasks")
        gains = {task: scores[task]["value"] - start[task]["value"] for task in scores if mean and start}
        largest = sorted((task for task in gains if task != "mean of tasks"), key=gains.get, reverse=True)[:3]
        rows.append([
            name, stage["state"], f"{stage['seconds']:.0f} s",
            f"{100 * mean['value']:.1f} [{100 * mean['low']:.1f}, {100 * mean['high']:.1f}]" if mean else "-",
            ", ".join(f"{task} {100 * gains[task]:+.1f}" for task in largest if gains[task]),
        ])  # fmt: skip
    print(aligned(["stage", "state", "time", "mean pass@1 %", "largest changes since cold"], rows))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/nano_rl"))
    parser.add_argument("--base", type=Path, help="a pretrained base instead of that of the stage pretrain")
    parser.add_argument("--cold", type=Path, help="a fine-tuned model instead of that of the stage cold")
    parser.add_argument("--plain_base", type=Path, help="for zero_plain: a base without worked documents")
    parser.add_argument("--size", default="nano", choices=CONFIGS, help="tiny: a rehearsal on a CPU")
    parser.add_argument("--mixture", default=MIXTURE, help="of the base's text, by the stage data")
    parser.add_argument("--max_tokens", type=int, help="of that text")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=["grpo", "grpo_no_replay", "ppo", "zero"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--learning_rates", nargs="*", type=float, default=[], help="pilots: each setting at each rate")
    parser.add_argument("--parallel", type=int, default=8, help="runs at a time")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES)
    parser.add_argument("--pilots", type=Path, help="only print the mean accuracies of single runs in this file")
    parser.add_argument("--graph", type=Path, help="only print the stages of this pipeline.json")
    args, overrides = parser.parse_known_args(argv)
    if args.graph:
        return print_graph(args.graph)
    if args.pilots:
        return print_pilots(args.pilots)
    if args.parallel < 1:
        raise SystemExit(f"--parallel {args.parallel} must be at least 1")
    folder, of_stage = args.output_dir.resolve(), split_overrides(overrides, args.size)
    if "data" in args.stages:
        make_data(folder, args.size, args.mixture, args.max_tokens)
    for stage in ("pretrain", "cold"):
        if stage in args.stages:
            train_stage(folder, stage, args.size, of_stage[stage])
    failed = {}
    if "rl" in args.stages:
        base, cold = args.base or folder / "pretrain", args.cold or folder / "cold"
        bases = {"zero": base.resolve(), "cold": cold.resolve(),
                 "plain": args.plain_base and args.plain_base.resolve()}  # fmt: skip
        jobs = plan(folder, args.size, args.settings, args.seeds, args.learning_rates, bases, of_stage)
        failed = run_all(jobs, args.parallel)
    report(folder)
    for run, output in failed.items():
        print(f"\n{run} failed:\n{output}")
    if failed:
        raise SystemExit(f"{len(failed)} runs failed; a second call resumes them")


if __name__ == "__main__":
    main()
