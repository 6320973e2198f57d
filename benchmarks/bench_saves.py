"""How long training waits for a checkpoint: plain, in shards, and beside training (`async_save`).

    python benchmarks/bench_saves.py [--size reference] [--kinds plain beside] [--saves 3] [--every 8]
    accelerate launch --config_file recipes/launch/fsdp2.yaml --num_processes 2 benchmarks/bench_saves.py \
        --kinds shards beside --folder FOLDER

Trains on random tokens through recipes/pretrain.py's trainer, fp32 weights and AdamW, and saves every so many steps. A
line for each kind: bytes of a checkpoint, seconds that training stands still for a save (median, slowest), seconds from
the beginning of a save to its marker, and seconds of a step without and with a save under way. `plain` is what whole
models write at once, `shards` what sharded ones do; `beside` writes shards in a thread.
"""

import argparse
import contextlib
import gc
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import TrainerCallback, set_seed

from benchmarks.train_cases import SIZES
from benchmarks.train_recipe import random_rows, write_packed_rows
from recipes import checkpoint_writer, checkpoints
from recipes.checkpoint_files import list_checkpoints
from recipes.model_loading import build_model, load_tokenizer
from recipes.pretrain import build_trainer
from recipes.pretrain_config import PretrainConfig
from recipes.run_results import text_table

KINDS = ("plain", "shards", "beside")


class Clock(TrainerCallback):
    """(end of a step, whether a save was under way in it) and the times of every save."""

    def __init__(self, trainer):
        self.trainer, self.steps, self.saves, self.marked, self.left = trainer, [], [], [], None
        save = trainer._save_checkpoint

        def timed(*args, **kwargs):
            start = self.now()
            save(*args, **kwargs)
            self.saves.append((start, self.now()))
            self.left = self.saves[-1][1]

        trainer._save_checkpoint = timed

    @contextlib.contextmanager
    def listening(self):
        """Inside the block markers are noted; afterwards nothing keeps this trainer and its weights alive."""
        modules = (checkpoint_writer, checkpoints)
        before = [module.write_marker for module in modules]
        for module, write in zip(modules, before):
            module.write_marker = self.noting(write)
        try:
            yield
        finally:
            for module, write in zip(modules, before):
                module.write_marker = write

    def noting(self, write):
        def marked(*args, **kwargs):
            result = write(*args, **kwargs)
            self.marked.append(time.perf_counter())
            return result

        return marked

    def now(self):
        if self.trainer.args.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self.left = self.now()

    def on_step_end(self, args, state, control, **kwargs):
        under_way = len(self.marked) < len(self.saves)
        if state.global_step > args.save_steps / 2:  # the first ones warm up
            self.steps.append((self.now() - self.left, under_way))


def measure(kind, args, data, folder):
    """The figures of one kind, on rank 0; None elsewhere."""
    fields, rows, length = SIZES[args.size]()
    settings = PretrainConfig(
        output_dir=str(folder / kind), dataset_name=str(data), sequence_length=length, save_total_limit=1,
        model_config=fields | {"num_nextn_predict_layers": 0}, save_steps=args.every,
        max_steps=args.saves * args.every + 1,
        per_device_train_batch_size=rows, logging_steps=args.every, eval_strategy="no", sample_prompts=[],
        report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available(), async_save=kind == "beside",
    )  # fmt: skip
    set_seed(settings.seed)
    tokenizer = load_tokenizer(settings)
    trainer = build_trainer(settings, build_model(settings, tokenizer), tokenizer)
    clock = Clock(trainer)
    trainer.add_callback(clock)
    with contextlib.redirect_stdout(sys.stderr), clock.listening():
        trainer.train()
    if not trainer.is_world_process_zero():
        return None
    newest = list_checkpoints(settings.output_dir)[-1][1]
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    waits = [end - start for start, end in clock.saves]
    whole = [marked - start for (start, _), marked in zip(clock.saves, clock.marked)]
    alone, during = ([seconds for seconds, busy in clock.steps if busy == wanted] for wanted in (False, True))
    step = f"{statistics.median(alone):.3f} s alone" + (f", {statistics.median(during):.3f} s beside" if during else "")
    return (f"{size / 2**30:.2f} GiB, waits {statistics.median(waits):.2f} s (slowest {max(waits):.2f} s), complete "
            f"after {statistics.median(whole):.2f} s, step {step}")


def make_data(folder, size, rows):
    """Random packed rows, made by rank 0; the others wait for them."""
    fields, _, length = SIZES[size]()
    if int(os.environ.get("RANK", 0)) == 0:
        job = {"fields": fields, "length": length}
        documents = {"train": random_rows(job, rows), "validation": random_rows(job, 8)}
        write_packed_rows(folder / "making", fields["vocab_size"], length, documents)
        os.rename(folder / "making", folder / "data")
    while not (folder / "data").is_dir():
        time.sleep(0.1)
    return folder / "data"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="reference" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["plain", "beside"])
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--every", type=int, default=8, help="steps between two saves")
    parser.add_argument("--folder", help="where to write; several processes need the same. Default: a temporary one")
    args = parser.parse_args(argv)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and args.folder is None:
        parser.error("several processes write into one --folder, on a file system that they share")
    with contextlib.ExitStack() as stack:
        folder = Path(args.folder or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        data = make_data(folder, args.size, (args.saves * args.every + 2) * 8 * world)
        for kind in args.kinds:
            line = measure(kind, args, data, folder)
            gc.collect()  # its weights and states make room for the next one's
            if line is not None:
                print(text_table([(f"{args.size}, {kind}", line)]), flush=True)


if __name__ == "__main__":
    main()
