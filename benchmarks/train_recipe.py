"""Our step through `recipes/pretrain.py` and the HF Trainer, timed without a wait for the device in each step."""

import contextlib
import json
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy
import torch
import yaml
from transformers import TrainerCallback, set_seed

from benchmarks.train_cases import StepClock, expert_load, memory_figures, step_figures, synchronize

LOGGING_STEPS = 10
WATCHED_STEPS = 2  # after the timed ones


def split_recipe_arguments(argv):
    """(other arguments, ["--key", "value", ...] of every `--recipe.key value` or `--recipe.key=value`)."""
    rest, settings, position = [], [], 0
    while position < len(argv):
        word = argv[position]
        if not word.startswith("--recipe."):
            rest.append(word)
            position += 1
            continue
        name, _, value = word.partition("=")
        if not _:
            if position + 1 >= len(argv):
                raise ValueError(f"{word} needs a value: --recipe.KEY VALUE sets KEY of recipes/pretrain.py")
            position, value = position + 1, argv[position + 1]
        settings += ["--" + name.removeprefix("--recipe."), value]
        position += 1
    return rest, settings


def write_packed_rows(folder, vocab_size, length, documents):
    """A packed data set. documents: {split: iterable of (N,) int arrays of token ids}; a token counts as one byte."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from data_scripts.packing.packed_writer import (
        FORMAT,
        VERSION,
        SplitWriter,
        file_sha256,
        token_dtype,
        write_manifest,
    )

    words = {"<s>": 0, "</s>": 1} | {f"w{token}": token for token in range(2, vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<s>")),
        bos_token="<s>", eos_token="</s>", pad_token="<s>",
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    splits = {}
    for split, rows in documents.items():
        writer = SplitWriter(folder, split, token_dtype(vocab_size), ["random"], 1 << 30)
        for row in rows:
            writer.append(row, len(row), "random")
        splits[split] = writer.close()
    write_manifest(folder, {
        "format": FORMAT, "version": VERSION, "dtype": "uint16", "vocab_size": vocab_size,
        "bos_token_id": 0, "eos_token_id": 1, "sources": ["random"], "splits": splits,
        "tokenizer_sha256": file_sha256(folder / "tokenizer" / "tokenizer.json"),
    })  # fmt: skip


def random_rows(job, count):
    generator = numpy.random.default_rng(0)
    return (generator.integers(2, job["fields"]["vocab_size"], job["length"]) for _ in range(count))


def recipe_settings(job, data, output):
    steps = job["warmup"] + job["steps"] + WATCHED_STEPS
    return {
        "output_dir": str(output), "dataset_name": str(data), "sequence_length": job["length"],
        "model_config": {**job["fields"], "num_nextn_predict_layers": 0}, "max_steps": steps,
        "per_device_train_batch_size": job["batch"], "logging_steps": LOGGING_STEPS, "save_strategy": "no",
        "eval_strategy": "no", "timing_warmup_steps": job["warmup"], "sample_prompts": [],
        "weights_dtype": "bfloat16" if "-bf16" in job["variant"] else "float32", "optim": "adamw_torch_fused",
        "learning_rate": 1e-4, "report_to": "none", "disable_tqdm": True, "use_cpu": job["device"] == "cpu",
    }  # fmt: skip


class SyncPlaces:
    """Source lines, outside of torch, that make the host wait for the device, with counts."""

    def __init__(self):
        self.places = Counter()

    def note(self, message, *_, **__):
        if "synchronizing" not in str(message):
            return
        inside = str(Path(torch.__file__).parent)
        frames = [frame for frame in traceback.extract_stack()[:-1]
                  if not frame.filename.startswith(inside) and Path(frame.filename).name != "warnings.py"]  # fmt: skip
        parts = Path(frames[-1].filename).parts[-3:] if frames else ("torch",)
        self.places["/".join(parts) + f":{frames[-1].lineno}" if frames else "torch"] += 1

    @contextlib.contextmanager
    def watching(self):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = self.note
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")


class StepTimes(TrainerCallback):
    """Marks the end of every step; afterwards, in a few more steps, lists what waits for the device."""

    def __init__(self, job):
        self.job, self.clock, self.syncs, self.first = job, StepClock(job["device"]), SyncPlaces(), None
        self.watch = contextlib.ExitStack()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            synchronize(self.job["device"])
            self.ready = time.time()
        if state.global_step == self.job["warmup"] + self.job["steps"] and self.job["device"] == "cuda":
            self.watch.enter_context(self.syncs.watching())

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            synchronize(self.job["device"])
            self.first = time.time() - self.ready
        if self.job["warmup"] <= state.global_step <= self.job["warmup"] + self.job["steps"]:
            self.clock.mark()

    def on_train_end(self, args, state, control, **kwargs):
        self.watch.close()


def measure_recipe(job):
    """One line of results of `recipes/pretrain.py` up to the end of training (no evaluation, no saving)."""
    from recipes.model_loading import build_model, load_tokenizer
    from recipes.pretrain import build_trainer
    from recipes.pretrain_config import PretrainConfig, parse_config

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        count = job["batch"] * (job["warmup"] + job["steps"] + WATCHED_STEPS + 1)
        documents = {"train": random_rows(job, count), "validation": random_rows(job, 2)}
        write_packed_rows(folder / "data", job["fields"]["vocab_size"], job["length"], documents)
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(recipe_settings(job, folder / "data", folder / "run")))
        args = parse_config(PretrainConfig, ["--config", str(path), *job.get("recipe", [])])
        set_seed(args.seed)
        tokenizer = load_tokenizer(args)
        trainer, times = build_trainer(args, build_model(args, tokenizer), tokenizer), StepTimes(job)
        trainer.add_callback(times)
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    job = job | {"batch": args.train_batch_size * args.gradient_accumulation_steps, "length": args.sequence_length}
    logged = [record["tok/s"] for record in map(json.loads, lines) if record.get("tok/s")]
    load = expert_load(trainer.accelerator.unwrap_model(trainer.model), None)
    return {
        **step_figures(job, times.clock.milliseconds()), **memory_figures(job),
        "first_step_s": round(times.first, 2),
        "process_to_first_step_s": round(times.ready + times.first - job["spawned"], 1),
        "logged_tokens_per_second": round(statistics.median(logged)) if logged else None,
        "load_max_over_mean": None if load is None else round(load, 3), "max_grad_norm": args.max_grad_norm,
        "settings": job.get("recipe", []), "waits_for_device": dict(times.syncs.places), "waits_steps": WATCHED_STEPS,
    }  # fmt: skip
