"""What a run says and leaves behind: console lines, progress bar, metrics.jsonl, config.yaml, samples.

The console and `metrics.jsonl` use the same names (`NAMES`); TensorBoard and the other loggers of
`report_to` get the trainer's. Every record of `metrics.jsonl` has `kind` (train, eval, samples) and
`step`; on resume, records beyond the resumed step are dropped, so that no step is there twice.
"""

import dataclasses
import json
import logging
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
import yaml
from huggingface_hub import get_token
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from recipes.checkpoint_files import write_atomically
from recipes.sizing import format_duration

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
NAMES = {
    "loss": "loss",
    "next_token_loss": "next-token loss",
    "mtp_loss": "mtp loss",
    "feature_loss": "feature loss",
    "mean_token_accuracy": "token accuracy",
    "accuracy": "accuracy",
    "margin": "margin",
    "mean_reward": "mean reward",
    "entropy": "entropy",
    "learning_rate": "lr",
    "grad_norm": "grad",
    "tokens": "tokens",
    "tokens_per_second": "tok/s",
    "mfu": "mfu",
    "gradient_megabytes": "gradient megabytes",
    "step_seconds": "step_seconds",
    "epoch": "epoch",
}
# Reinforcement learning; held-out ones have "eval " in front, and each reward's mean is in `rewards`.
RL_NAMES = {
    "reward": "reward",
    "reward_std": "reward std",
    "kl": "kl",
    "kl_coef": "kl coef",
    "policy_loss": "policy loss",
    "value_loss": "value loss",
    "ratio": "ratio",
    "clip_fraction": "clip fraction",
    "clip_ratio/region_mean": "clip fraction",
    "value_clip_fraction": "value clip fraction",
    "explained_variance": "explained variance",
    "approx_kl": "approx kl",
    "completions/mean_length": "length",
    "completions/clipped_ratio": "cut off",
    "completions/empty": "empty",
    "completions/unscored": "unscored",
    "frac_reward_zero_std": "zero variance",
    "reflection_words": "reflection words",
    "routing/experts_differ": "experts differ",
    "routing/tokens_differ": "routes differ",
    "routing/kl_replayed": "sampler kl with replay",
    "routing/kl_own": "sampler kl without replay",
    "routing/largest_difference": "largest log-probability difference",
    "seconds/rollout": "rollout seconds",
    "seconds/scoring": "scoring seconds",
    "seconds/update": "update seconds",
}
RL_PREFIXES = ("curriculum ", "sampling ", "groups ", "samples per ")  # named as they are logged
LOAD_PREFIX = "load_max_over_mean_layer_"
EVAL_NAMES = {
    "eval_loss": "eval loss",
    "eval_bits_per_byte": "bits/byte",
    "eval_token_accuracy": "eval token accuracy",
    "eval_accuracy": "eval accuracy",
    "eval_margin": "eval margin",
    "eval_runtime": "eval_seconds",
}
EVAL_SOURCE_PREFIX = "eval_bits_per_byte_"


def _rl_values(logs, prefix=""):
    """What a trainer with rewards logs, by our names; `prefix`: "eval_" of an evaluation."""
    word = prefix.replace("_", " ")
    found = {word + ours: logs[prefix + name] for name, ours in RL_NAMES.items() if logs.get(prefix + name) is not None}
    found |= {name: value for name, value in logs.items() if name.startswith(RL_PREFIXES) and value is not None}
    start, end = f"{prefix}rewards/", "/mean"
    rewards = {name: logs[name] for name in logs if name.startswith(start) and name.endswith(end)}
    if rewards:
        found[f"{word}rewards"] = {name[len(start) : -len(end)]: value for name, value in rewards.items()}
    return found


def train_record(step, logs, eta_seconds=None):
    """The trainer's names -> those of the console and the file, in fixed order."""
    record = {"kind": "train", "step": step}
    record |= {ours: logs[theirs] for theirs, ours in NAMES.items() if theirs in logs}
    record |= _rl_values(logs)
    load = {int(name[len(LOAD_PREFIX) :]): value for name, value in logs.items() if name.startswith(LOAD_PREFIX)}
    if load:
        record["load max/mean"] = max(load.values())
        record["load max/mean per layer"] = {str(layer): load[layer] for layer in sorted(load)}
    if eta_seconds is not None:
        record["eta"] = eta_seconds
    return record


def eval_record(step, logs):
    record = {"kind": "eval", "step": step}
    record |= {ours: logs[theirs] for theirs, ours in EVAL_NAMES.items() if theirs in logs}
    record |= _rl_values(logs, "eval_")
    sources = [name for name in logs if name.startswith(EVAL_SOURCE_PREFIX)]
    if sources:
        record["bits/byte per source"] = {name[len(EVAL_SOURCE_PREFIX) :]: logs[name] for name in sources}
    return record


def console_line(record, max_steps):
    """`step  120/500 | loss 3.412 | lr 3.0e-04 | grad 0.92 | tok/s 41,200 | load max/mean 1.31 | eta 4m`"""
    formats = {
        "reward": "{:.3f}",
        "kl": "{:.4f}",
        "length": "{:.0f}",
        "cut off": "{:.1%}",
        "zero variance": "{:.0%}",
        "loss": "{:.3f}",
        "mtp loss": "{:.3f}",
        "token accuracy": "{:.3f}",
        "accuracy": "{:.3f}",
        "margin": "{:.2f}",
        "lr": "{:.1e}",
        "grad": "{:.2f}",
        "tok/s": "{:,.0f}",
        "mfu": "{:.1%}",
        "load max/mean": "{:.2f}",
        "eval reward": "{:.3f}",
        "eval loss": "{:.3f}",
        "bits/byte": "{:.3f}",
        "eval token accuracy": "{:.3f}",
        "eval accuracy": "{:.3f}",
        "eval margin": "{:.2f}",
    }
    word = "eval" if record["kind"] == "eval" else "step"
    width = len(str(max_steps))
    parts = [f"{word} {record['step']:>{width + 1}}/{max_steps}"]
    parts += [f"{name} {form.format(record[name])}" for name, form in formats.items() if record.get(name) is not None]
    parts += [f"{name} {value:.3f}" for name, value in record.get("bits/byte per source", {}).items()]
    if record.get("eta") is not None:
        parts.append(f"eta {format_duration(record['eta'])}")
    return " | ".join(parts)


def read_metrics(path):
    """The records of a metrics file; a last line cut off by a kill is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s: dropping a line that was cut off: %.40s", path, line)
    return records


def _jsonable(value):
    return json.dumps(value, ensure_ascii=False, allow_nan=True)


def _saves_the_best(args, control):
    """Whether the evaluation that is due decides about a checkpoint."""
    return control.should_evaluate and args.save_strategy == SaveStrategy.BEST


class RunLogCallback(TrainerCallback):
    """Console lines, progress bar and metrics.jsonl, on the first process only."""

    def __init__(self, output_dir, show_bar=True, announce=None):
        """`announce()`: called when training begins, that is after the checks of a resumed run."""
        self.announce = announce
        self.path = Path(output_dir) / METRICS_FILE
        self.show_bar = show_bar
        self.bar = self.eval_bar = None

    def say(self, text):
        if self.bar is not None:
            self.bar.clear()
        print(text, flush=True)
        if self.bar is not None:
            self.bar.refresh()

    def write(self, record):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_jsonable(record) + "\n")

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        if self.announce is not None:
            self.announce()
        kept = [r for r in read_metrics(self.path) if r.get("step", 0) <= state.global_step and state.global_step > 0]
        write_atomically(self.path, "".join(_jsonable(record) + "\n" for record in kept))
        if self.show_bar:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
        # Also where logging_steps does not divide the run. At a checkpoint, so that no interval of the log begins
        # before it: what has been summed up by then is not in it, and a resumed run would log other figures.
        if state.global_step >= state.max_steps or control.should_save or _saves_the_best(args, control):
            control.should_log = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if control.should_save or _saves_the_best(args, control):
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            seconds = logs.get("step_seconds")
            eta = None if seconds is None else seconds * (state.max_steps - state.global_step)
            record = train_record(state.global_step, logs, eta)
        elif "eval_loss" in logs:
            record = eval_record(state.global_step, logs)
        else:  # the trainer's own summary at the end, or a further evaluation (eval.json has it)
            return
        self.say(console_line(record, state.max_steps))
        self.write({name: value for name, value in record.items() if name != "eta"})

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class SampleCallback(TrainerCallback):
    """Continues fixed prompts every `sample_steps` steps and at the end.

    Sampling uses generators of its own state: the global random state is as before, so that a run with
    samples and one without, or resumed between two of them, have the same losses.
    """

    def __init__(self, log, tokenizer, prompts, steps, new_tokens, speed=None, seed=0):
        self.log, self.tokenizer, self.prompts = log, tokenizer, list(prompts)
        self.steps, self.new_tokens, self.speed, self.seed = steps, new_tokens, speed, seed
        self.last_step = None

    def on_train_begin(self, args, state, control, **kwargs):
        """A resumed run does not repeat the samples of the step that it resumes at."""
        written = [r["step"] for r in read_metrics(self.log.path) if r.get("kind") == "samples"]
        if state.global_step and state.global_step in written:
            self.last_step = state.global_step

    def generate(self, model, synced=False):
        """[{"prompt", "completion"}] by sampling at temperature 0.8; the model's mode is restored."""
        was_training, device = model.training, model.device
        model.eval()
        devices = [device] if device.type == "cuda" else []
        samples = []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(self.seed)
            for prompt in self.prompts:
                inputs = self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
                if inputs["input_ids"].shape[1] == 0:
                    raise ValueError(f"sample_prompts holds {prompt!r}, which has no token; give it some text")
                ids = model.generate(
                    **inputs, max_new_tokens=self.new_tokens, do_sample=True, temperature=0.8, top_k=0, top_p=0.95,
                    pad_token_id=self.tokenizer.pad_token_id, synced_gpus=synced,
                )  # fmt: skip
                completion = self.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                samples.append({"prompt": prompt, "completion": completion})
        model.train(was_training)
        return samples

    def _run(self, args, state, model):
        # FSDP2 and expert parallelism mark a model whose forward takes all processes.
        marked = getattr(getattr(model, "module", model), "_is_fsdp_managed_module", False)
        sharded = marked or args.deepspeed is not None
        if not self.prompts or state.global_step == self.last_step or not (state.is_world_process_zero or sharded):
            return
        self.last_step = state.global_step
        with self.speed.paused():
            samples = self.generate(getattr(model, "module", model), synced=sharded)
        if state.is_world_process_zero:
            for sample in samples:
                text = " ".join(sample["completion"].split())
                self.log.say(f"  sample | {sample['prompt']} >>> {text}")
            self.log.write({"kind": "samples", "step": state.global_step, "samples": samples})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.steps and state.global_step % self.steps == 0:
            self._run(args, state, model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._run(args, state, model)


# ---------------------------------------------------------------- config.yaml


def git_commit():
    """Commit of the code that runs, with `-dirty` where files differ; or why there is none."""
    folder = Path(__file__).resolve().parent
    try:
        tracked = ["git", "-C", str(folder), "ls-files", "--error-unmatch", Path(__file__).name]
        subprocess.run(tracked, capture_output=True, check=True, timeout=10)  # not somebody else's checkout
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown (not a git checkout)"


def changed_arguments(args):
    """{field: value} of the training arguments that differ from their defaults; no secrets."""
    values, changed = args.to_dict(), {}
    for field in dataclasses.fields(args):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        value = values.get(field.name)
        if field.init and field.name != "hub_token" and getattr(default, "value", default) != value:
            changed[field.name] = value
    return changed


def command_line():
    """What started this process, as one would type it again; an access token in it is left out."""
    given = [Path(sys.argv[0]).name, *sys.argv[1:]]
    script = Path(sys.argv[0]).resolve()
    root = Path(__file__).resolve().parents[1]
    if script.is_relative_to(root):
        given[0] = str(script.relative_to(root))
    option = r"--(?:push[-_]to[-_])?hub[-_]token"
    hidden = ["..." if re.fullmatch(option, before) else re.sub(rf"^({option}=).*", r"\1...", word, flags=re.DOTALL)
              for before, word in zip(["", *given], given)]  # fmt: skip
    return shlex.join(["python", *hidden])


def write_run_config(args, model, output_dir, facts):
    """config.yaml: everything that is needed to understand and repeat the run. `facts`: data, sizes."""
    packages = ("torch", "transformers", "trl", "accelerate", "datasets", "tokenizers")
    content = {
        "commit": git_commit(),
        "command": command_line(),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
        "device": {"type": args.device.type, "processes": args.world_size, "mixed_precision": args.mixed_precision},
        "arguments": changed_arguments(args),
        "model": model.config.to_diff_dict(),
        **facts,
    }
    text = yaml.safe_dump(json.loads(json.dumps(content, default=str)), sort_keys=False, allow_unicode=True)
    for secret in filter(None, (getattr(args, "hub_token", None), get_token())):  # however it got in
        text = text.replace(secret, "...")
    write_atomically(Path(output_dir) / "config.yaml", text)
    return content
