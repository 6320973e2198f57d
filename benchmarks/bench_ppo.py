"""PPO on a toy problem by TRL 1.12's experimental trainer and by ours: reward reached and wall time.

    python benchmarks/bench_ppo.py                                 # 15 minutes of one core

Same policy weights, prompts, reward rule, episodes, batches, epochs, learning rate (constant), KL, GAE and sampling for
each seed (ppo_toy.py); every run is a process of its own with one setting of threads, in alternating order. What only
one side has is off: entropy bonus and gradient clipping. TRL trains a value model of the policy's size beside the
policy; ours does so as "separate", which is the comparison of like with like, and by default has a head on the policy's
trunk ("shared", with its own defaults), also tried with the value loss training the trunk. TRL collects garbage twice a
rollout, a constant that weighs only on a toy: "GC s" is the part of the CPU time that all collections take.
The first call makes a virtual environment for TRL 1.12 that shares all other packages with this one (--venv).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import transformers

import modeling_deepseek_r1  # noqa: F401  (registers the model type)
from benchmarks.ppo_toy import Recorder, Toy, add_toy_arguments, build_folders, prompts

TRL = "1.12.*"
QUARTERS = (0.25, 0.5, 0.75, 1.0)
WINDOW = 5  # rollouts that a reward is averaged over
# Of the value function that has no counterpart there: PPOConfig's own defaults.
SHARED = {"value_function": "shared", "vf_coef": 0.5, "cliprange_value": None, "value_learning_rate": None}
VARIANTS = {  # what differs from the toy's settings; None: TRL's
    "TRL 1.12": None,
    "ours, separate": {"value_function": "separate"},
    "ours, shared": SHARED,
    "ours, shared, trunk trained": SHARED | {"value_trunk_gradient": True},
}


def main(argv=None):
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=cache / "deepseek_r1_bench" / "trl-1.12")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "bench_ppo")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=4, metavar=("VARIANT", "FOLDER", "SEED", "RESULT"), help=argparse.SUPPRESS)
    add_toy_arguments(parser)
    options = parser.parse_args(argv)
    if options.one:
        return run_ours(*options.one)
    python = trl_python(options.venv)
    toy = Toy(**{field.name: getattr(options, field.name) for field in fields(Toy)})
    results = {name: [] for name in VARIANTS}
    for seed in range(options.seeds):
        folder = options.output_dir / f"{toy.policy}_{seed}"
        build_folders(folder, toy, seed)
        for name in list(VARIANTS) if seed % 2 == 0 else reversed(VARIANTS):
            found = run_apart(name, folder, seed, python, options.threads)
            results[name].append(found)
            times = f"{found['seconds']:6.1f} s ({found['cpu_seconds']:.1f} CPU)"
            print(f"seed {seed}  {name:28} {times}  reward {reward_at(found, 1.0):.3f}", flush=True)
    (options.output_dir / f"{toy.policy}.json").write_text(json.dumps(results))
    print_table(results, toy, options)


def trl_python(venv):
    """The Python of a venv with TRL 1.12 and, behind it, the packages of this one: same torch, same transformers."""
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        site = next(venv.glob("lib/python*/site-packages"))
        (site / "shared.pth").write_text(f"{Path(transformers.__file__).parents[1]}\n")
    show = [python, "-c", "from importlib.metadata import version; print(version('trl'))"]
    if not subprocess.run(show, check=False, capture_output=True, text=True).stdout.startswith(TRL.rstrip("*")):
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", f"trl=={TRL}"], check=True)
    return python


def run_apart(name, folder, seed, python, threads):
    """One run in a process of its own -> {"rewards": mean of each rollout, "seconds": of the training loop}."""
    result = folder / f"{name.replace(', ', '_').replace(' ', '_')}.json"
    if VARIANTS[name] is None:
        command = [python, ROOT / "benchmarks" / "trl_ppo_1_12.py", folder, str(seed), result]
    else:
        command = [sys.executable, __file__, "--one", name, folder, str(seed), result]
    settings = {
        "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    done = subprocess.run(command, check=False, env=os.environ | settings, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} with seed {seed} failed:\n{done.stderr[-4000:]}")
    return json.loads(result.read_text())


def run_ours(name, folder, seed, result):
    """One run by PPOTrainer (in the process that `run_apart` starts)."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from recipes.ppo_trainer import PPOConfig, PPOTrainer

    toy, seed, folder = Toy.read(folder), int(seed), Path(folder)
    steps = toy.epochs * toy.minibatches  # optimizer steps of a rollout
    value_settings = {"vf_coef": toy.vf_coef, "cliprange_value": toy.cliprange_value} | VARIANTS[name]
    if value_settings["value_function"] == "separate":
        value_settings["value_model_name_or_path"] = str(folder / "value")
    args = PPOConfig(
        output_dir=str(folder / "ours"), seed=seed, max_steps=toy.updates * steps,
        per_device_train_batch_size=toy.batch // toy.minibatches, num_mini_batches=toy.minibatches,
        num_ppo_epochs=toy.epochs, max_completion_length=toy.length, learning_rate=toy.learning_rate,
        lr_scheduler_type="constant", temperature=toy.temperature, kl_coef=toy.kl_coef, gamma=toy.gamma, lam=toy.lam,
        epsilon=toy.cliprange, entropy_coef=0.0, max_grad_norm=0.0, **value_settings,
        gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        logging_steps=steps,
    )  # fmt: skip
    recorder, tokenizer = Recorder(toy), AutoTokenizer.from_pretrained(folder / "policy")
    ids = prompts(toy, seed).tolist()

    def counts_on(prompts, completions, completion_ids, prompt_tokens, **columns):
        return recorder(torch.tensor(prompt_tokens), torch.tensor(completion_ids)).tolist()

    trainer = PPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "policy"), reward_funcs=counts_on, args=args,
        train_dataset=Dataset.from_dict({"prompt": [tokenizer.decode(row) for row in ids], "prompt_tokens": ids}),
        processing_class=tokenizer,
    )  # fmt: skip
    Path(result).write_text(json.dumps(recorder.train(trainer)))


def reward_at(found, share):
    """Mean reward of the WINDOW rollouts that end after this share of the episodes."""
    end = round(share * len(found["rewards"]))
    return statistics.mean(found["rewards"][max(0, end - WINDOW) : end])


def print_table(results, toy, options):
    threads = {found["threads"] for runs in results.values() for found in runs}
    print(
        f"\n{toy.policy}, {options.seeds} seeds, {toy.updates} rollouts of {toy.batch} episodes, {toy.epochs} epochs "
        f"of {toy.minibatches} minibatches,\nlr {toy.learning_rate:g}, {', '.join(map(str, threads))} thread(s), "
        f"transformers {version('transformers')}, torch {version('torch')}. Reward: mean ± standard deviation over\n"
        f"seeds, of the {WINDOW} rollouts up to that share of the episodes. Time of the training loop: median.\n"
    )
    heads = [f"reward at {share:.0%}" for share in QUARTERS]
    print("| trainer | " + " | ".join(heads) + " | whole curve | wall s | ratio | CPU s | ratio | GC s |")
    print("|---" * (len(heads) + 7) + "|")
    for name, runs in results.items():
        cells = [spread([reward_at(found, share) for found in runs]) for share in QUARTERS]
        cells.append(spread([statistics.mean(found["rewards"]) for found in runs]))
        for clock in ("seconds", "cpu_seconds"):
            ours, theirs = (statistics.median(found[clock] for found in each) for each in (runs, results["TRL 1.12"]))
            cells += [f"{ours:.1f}", f"{ours / theirs:.2f}"]
        cells.append(f"{statistics.median(found['gc_seconds'] for found in runs):.1f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


def spread(values):
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


if __name__ == "__main__":
    main()
