"""Rollouts inside a trainer: one step of GRPO or PPO with our generation and with the library's loop, same weights.

    python benchmarks/bench_rollouts.py                            GRPO, reference config, bf16 weights (one GPU)
    python benchmarks/bench_rollouts.py --weights fp32             fp32 weights, bf16 compute (bf16=True)
    python benchmarks/bench_rollouts.py --trainer ppo
    python benchmarks/bench_rollouts.py --size toy --device cpu    to try the script out

Random weights, a trivial reward, 16 prompts x 16 completions of 128 + 256 tokens. One trainer, one process: a warm-up
step and --steps steps as they are by default, then --library_steps with `model.decoding.enabled = False`, which is all
that differs. Seconds by the wall with the device waited for, medians over the steps: `generation` is TRL's call of
`generate`, `step` the whole of it with scoring, backward and optimizer, `share` the first of the second. The
update has no gradient checkpointing (--gradient_checkpointing gives it back), so that its part is not made larger than
need be. Tokens are those of the completions up to their ends.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_train import our_model  # noqa: E402
from benchmarks.generation_cases import FIELDS  # noqa: E402
from recipes.ppo_trainer import PPOConfig, PPOTrainer  # noqa: E402

COLUMNS = ("generation_tokens_per_second", "generation_s", "step_s", "share_percent", "peak_gib")


def word_tokenizer(vocab_size):
    """One word a token: t2, t3, ...; ids 0 and 1 are padding and end, as in the configs."""
    words = {"<pad>": 0, "<end>": 1} | {f"t{number}": number for number in range(2, vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", padding_side="left")


def prompts(vocab_size, count, tokens):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(2, vocab_size, (count, tokens), generator=generator).tolist()
    return Dataset.from_dict({"prompt": [" ".join(f"t{token}" for token in row) for row in rows]})


def reward(completion_ids, **_):
    """Some number that differs between completions."""
    return [sum(ids) % 97 / 97 for ids in completion_ids]


class Clock(TrainerCallback):
    """Times of every step, in the mode it ran in; sets the mode of the next one.

    `modes`: one a step: "warm-up", "ours" or "library". `steps`: [{mode, generation_s, step_s, tokens, peak_gib}].
    """

    def __init__(self, modes):
        self.modes, self.steps, self.now, self.trainer = modes, [], None, None

    def attach(self, trainer):
        self.trainer, generate = trainer, trainer._generate_single_turn

        def timed(*args, **kwargs):
            start = self.seconds()
            completion_ids, log_probs = generate(*args, **kwargs)
            self.now["generation_s"] += self.seconds() - start
            self.now["tokens"] += sum(map(len, completion_ids))
            return completion_ids, log_probs

        trainer._generate_single_turn = timed
        trainer.add_callback(self)

    def seconds(self):
        if self.trainer.args.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.now = {"mode": self.modes[len(self.steps)], "generation_s": 0.0, "tokens": 0, "start": self.seconds()}
        self.trainer.accelerator.unwrap_model(model).decoding.enabled = self.now["mode"] != "library"

    def on_step_end(self, args, state, control, **kwargs):
        self.now["step_s"] = self.seconds() - self.now.pop("start")
        self.now["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if args.device.type == "cuda" else None
        self.steps.append(self.now)
        found = ", ".join(f"{name} {value:.4g}" for name, value in self.now.items() if isinstance(value, (int, float)))
        print(f"step {len(self.steps)} {self.now['mode']}: {found}", flush=True)


def build_trainer(options, output_dir):
    fields = FIELDS[options.size]
    cuda = options.device == "cuda"
    torch.manual_seed(0)
    with torch.device(options.device):
        model = our_model(fields)
    model = model.to(torch.bfloat16 if options.weights == "bf16" else torch.float32)
    model.config.auto_map = {}
    rollout = options.prompts * options.generations
    if rollout % options.micro_batch:
        raise ValueError(f"micro_batch={options.micro_batch} must divide the {rollout} completions of a step")
    settings = {
        "output_dir": output_dir, "use_cpu": not cuda, "bf16": cuda, "learning_rate": 1e-6,
        "gradient_checkpointing": options.gradient_checkpointing, "per_device_train_batch_size": options.micro_batch,
        "gradient_accumulation_steps": rollout // options.micro_batch, "num_generations": options.generations,
        "max_completion_length": options.new_tokens, "max_steps": 1 + options.steps + options.library_steps,
        "save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 1,
    }  # fmt: skip
    if options.trainer == "ppo":
        # The library's loop records no experts: both go without.
        args = PPOConfig(**settings, num_ppo_epochs=1, router_replay=False, route_probe_rows=0)
        trainer_class = PPOTrainer
    else:
        trainer_class, args = GRPOTrainer, GRPOConfig(**settings)
    rows = prompts(fields["vocab_size"], options.prompts * settings["max_steps"], options.prompt_tokens)
    return trainer_class(
        model, reward, args, train_dataset=rows, processing_class=word_tokenizer(fields["vocab_size"])
    )


def summary(steps, mode):
    """Medians over the steps of one mode, {} where it had none."""
    found = [step for step in steps if step["mode"] == mode]
    if not found:
        return {}
    middle = lambda name: statistics.median(step[name] for step in found)
    peaks = [step["peak_gib"] for step in found if step["peak_gib"] is not None]
    return {
        "generation_tokens_per_second": statistics.median(step["tokens"] / step["generation_s"] for step in found),
        "generation_s": middle("generation_s"), "step_s": middle("step_s"),
        "share_percent": 100 * statistics.median(step["generation_s"] / step["step_s"] for step in found),
        "peak_gib": max(peaks, default=None), "steps": len(found),
    }  # fmt: skip


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=("grpo", "ppo"), default="grpo")
    parser.add_argument("--size", choices=list(FIELDS), default="reference")
    parser.add_argument("--weights", choices=("bf16", "fp32"), help="default: bf16 on CUDA, fp32 on a CPU")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--generations", type=int, default=16, help="completions of each prompt")
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--micro_batch", type=int, default=16, help="completions of one backward pass")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of ours, after a warm-up")
    parser.add_argument("--library_steps", type=int, default=1, help="steps with the library's loop, 0 for none")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="JSON file")
    options = parser.parse_args(arguments)
    options.weights = options.weights or ("bf16" if options.device == "cuda" else "fp32")

    clock = Clock(["warm-up"] + ["ours"] * options.steps + ["library"] * options.library_steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(options, folder)
        clock.attach(trainer)
        trainer.train()
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    found = {mode: summary(clock.steps, mode) for mode in ("ours", "library")}
    result = {**vars(options), "device": device, "torch": torch.__version__, **found, "each_step": clock.steps}
    print(f"\n{options.trainer}, {options.size}, {options.weights} weights, {options.prompts} x {options.generations} "
          f"completions of {options.prompt_tokens} + {options.new_tokens} tokens, {device}")
    print(" ".join([f"{'generation by':14}", *(f"{name:>28}" for name in COLUMNS)]))
    for mode, line in found.items():
        cells = (line.get(name) for name in COLUMNS)
        print(" ".join([f"{mode:14}", *(f"{'':>28}" if cell is None else f"{cell:28,.2f}" for cell in cells)]))
    if all(found.values()):
        times = {name: found["library"][name] / found["ours"][name] for name in ("generation_s", "step_s")}
        result |= {"library_over_ours": times}
        print(f"the library's loop takes {times['generation_s']:.1f} times our generation, its step "
              f"{times['step_s']:.1f} times ours")  # fmt: skip
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
