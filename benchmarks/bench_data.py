"""What reading training rows costs, as a share of a training step.

    python benchmarks/bench_data.py --data data/nano [--steps 200] [--no_model]

Times the recipe's own rows and collator through a DataLoader, in the shuffled order of the trainer, by batch shape: the
nano config (32 rows of 1,024 tokens) and the reference config (4 rows of 4,096); page cache cold (the files' pages are
dropped before, by posix_fadvise) and warm; with 0 and 2 workers. With 0 workers the whole time is added to the step,
with workers only what the training process itself does (taking a ready batch) while they keep up.
Shares are given of the H100's steps (benchmarks/LOG.md: nano about 440,000 tokens/s, 74 ms; reference 16,384 tokens in
230 ms) and of a step of the nano config measured here on the CPU (2 rows, scaled to 32).
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from recipes.data import PackedTokens, PackingCollator
from recipes.model_loading import build_config
from recipes.pretrain_config import PretrainConfig, parse_config
from recipes.row_order import RowOrder

SHAPES = {"nano": (32, 1024, 0.0745), "reference": (4, 4096, 0.230)}  # rows, tokens, seconds of an H100's step


def drop_pages(folder):
    """Take the data set's pages out of the page cache."""
    for path in Path(folder).glob("*.bin"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(rows, batch_size, workers, steps, step_seconds):
    """(median, least) seconds that the training process waits for a batch, then it computes for `step_seconds`.

    On a machine with other work the median also holds what that takes away.
    """
    order = RowOrder(len(rows), batch_size, seed=0)
    loader = DataLoader(rows, batch_size, sampler=order, collate_fn=PackingCollator(), num_workers=workers)
    batches, waits = iter(loader), []
    if workers:
        next(batches)  # starting the processes is no part of a step
    while len(waits) < steps:
        begin = time.perf_counter()
        batch = next(batches, None)
        wait = time.perf_counter() - begin
        if batch is None:
            batches = iter(loader)
            continue
        waits.append(wait)
        if workers:
            time.sleep(step_seconds)  # the accelerator computes; the workers read on
    return statistics.median(waits), min(waits)


def cpu_step_seconds(rows, config_file):
    """Forward and backward of the nano config on 2 rows, scaled to 32."""
    args = parse_config(PretrainConfig, ["--config", config_file, "--use_cpu", "true", "--output_dir", "unused"])
    config = build_config(args)
    config.vocab_size = max(config.vocab_size, rows.manifest["vocab_size"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    batch = PackingCollator()([rows[0], rows[1]])
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        model(**batch).loss.backward()
        seconds.append(time.perf_counter() - begin)
    return min(seconds) * 16


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a packed data set")
    parser.add_argument("--config", default="recipes/configs/pretrain_nano.yaml")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--no_model", action="store_true", help="do not time a training step on the CPU")
    args = parser.parse_args(argv)
    on_cpu = None
    if not args.no_model:
        on_cpu = cpu_step_seconds(PackedTokens(args.data, "train", 1024), args.config)
        print(f"nano on this CPU: {on_cpu:.2f} s a step of 32 rows")
    more = "  % of the CPU's" if on_cpu else ""
    print("shape      cache  workers  ms a batch (least)  % of the H100's step (least)" + more)
    results = []
    for name, (batch_size, length, step_seconds) in SHAPES.items():
        for workers in (0, 2):
            for cache in ("cold", "warm"):
                rows = PackedTokens(args.data, "train", length)
                steps = min(args.steps, len(rows) // batch_size) if cache == "cold" else args.steps
                if cache == "cold":
                    drop_pages(args.data)
                seconds, least = read_seconds(rows, batch_size, workers, steps, step_seconds)
                share, best = 100 * seconds / step_seconds, 100 * least / step_seconds
                cpu = f"{100 * seconds / on_cpu:14.3f}" if on_cpu and name == "nano" else ""
                print(f"{name:10} {cache:5} {workers:8} {1e3 * seconds:11.2f} "
                      f"({1e3 * least:.2f}) {share:16.2f} ({best:.2f}) {cpu}", flush=True)
                results.append({"shape": name, "cache": cache, "workers": workers, "seconds": seconds, "least": least,
                                "share_of_h100_step": share / 100})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
