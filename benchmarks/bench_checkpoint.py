"""Saving, loading and exporting the nano model against the library's own save and load of the same weights.

    python benchmarks/bench_checkpoint.py [--repetitions 7] [--config recipes/configs/pretrain_nano.yaml] [--profile]

The library's model is DeepseekV3ForCausalLM on the exported weights; it has no MTP layer and writes no checksums, ours
does both, flushed to disk. Both are also measured without MTP (same tensors), and the library's save also with
checksums and flush as ours has them; export is compared with the library's load and save. Repetitions are interleaved
in one process; medians, and medians of each repetition's ratio, from which the machine's speed drops out. `--profile`
says what the time goes to.
"""

import argparse
import contextlib
import cProfile
import io
import os
import pstats
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import yaml
from transformers import DeepseekV3ForCausalLM
from transformers.utils import logging

from modeling_deepseek_r1 import DeepSeekR1Config, DeepSeekR1ForCausalLM
from modeling_deepseek_r1.checkpoint import export
from modeling_deepseek_r1.checkpoint_files import verify_folder, write_manifest


def random_model(path, **changes):
    """The model of a recipe's `model_config`, random bf16 weights."""
    torch.manual_seed(0)
    fields = yaml.safe_load(Path(path).read_text())["model_config"]
    return DeepSeekR1ForCausalLM(DeepSeekR1Config(**{**fields, **changes})).to(torch.bfloat16).eval()


class Steps:
    """The rows of the table: an action of ours and the library's, on folders under `root`."""

    def __init__(self, root, config):
        self.root = root
        self.ours = random_model(config)
        self.plain = random_model(config, num_nextn_predict_layers=0)
        for name, model in (("with_mtp", self.ours), ("without_mtp", self.plain)):
            model.save_pretrained(root / name)
            export(root / name, root / f"{name}_v3")
        self.library = DeepseekV3ForCausalLM.from_pretrained(root / "without_mtp_v3", dtype="auto")
        self.library.save_pretrained(root / "library")
        # {row of the table: (ours, the library's counterpart)}
        self.pairs = {
            "save": (lambda out: self.ours.save_pretrained(out), self.library_save),
            "save, no MTP": (lambda out: self.plain.save_pretrained(out), self.library_save),
            "load": (lambda out: self.load("with_mtp"), self.library_load),
            "load, no MTP": (lambda out: self.load("without_mtp"), self.library_load),
            "load, verify=True": (lambda out: self.load("with_mtp", verify=True), self.library_load),
            "export": (lambda out: export(root / "with_mtp", out), self.library_export),
            "export, no MTP": (lambda out: export(root / "without_mtp", out), self.library_export),
            "export to fp8": (lambda out: export(root / "with_mtp", out, to="fp8"), self.library_export),
            "save, vs library + sums": (lambda out: self.plain.save_pretrained(out), self.library_save_with_sums),
            "checksums alone": (lambda out: write_manifest(root / "without_mtp"), self.library_save),
            "verify alone": (lambda out: verify_folder(root / "with_mtp"), self.library_load),
        }

    def load(self, name, **kwargs):
        return DeepSeekR1ForCausalLM.from_pretrained(self.root / name, dtype="auto", **kwargs)

    def library_save(self, out):
        self.library.save_pretrained(out)

    def library_export(self, out):
        """What the library has for it: load, then save."""
        self.library_load(None).save_pretrained(out)

    def library_save_with_sums(self, out):
        self.library.save_pretrained(out)
        write_manifest(out)

    def library_load(self, out):
        return DeepseekV3ForCausalLM.from_pretrained(self.root / "library", dtype="auto")

    def seconds(self, action):
        out = self.root / "out"
        shutil.rmtree(out, ignore_errors=True)
        os.sync()  # what others left to write is not this action's
        start = time.perf_counter()
        action(out)
        return time.perf_counter() - start


def measure(steps, repetitions):
    """-> {row: ([seconds of ours], [seconds of the library])}; who goes first alternates."""
    found = {row: ([], []) for row in steps.pairs}
    for number in range(repetitions + 1):
        for row, pair in steps.pairs.items():
            order = (0, 1) if number % 2 else (1, 0)
            for which in order:
                seconds = steps.seconds(pair[which])
                if number:  # the first repetition warms up
                    found[row][which].append(seconds)
    return found


def table(found):
    lines = [f"{'':24}{'ours':>9}{'library':>10}{'ratio':>8}"]
    for row, (ours, library) in found.items():
        ratio = statistics.median(a / b for a, b in zip(ours, library))
        lines.append(
            f"{row:24}{1000 * statistics.median(ours):6.0f} ms{1000 * statistics.median(library):7.0f} ms{ratio:8.2f}"
        )
    return "\n".join(lines)


def profile(steps, row, times=3):
    """The functions that our time of a row goes to, by time in them and in what they call."""
    profiler, text = cProfile.Profile(), io.StringIO()
    for _ in range(times):
        shutil.rmtree(steps.root / "out", ignore_errors=True)
        profiler.enable()
        steps.pairs[row][0](steps.root / "out")
        profiler.disable()
    stats = pstats.Stats(profiler, stream=text).sort_stats("cumulative")
    stats.print_stats(45)
    return f"--- {row}, {times} times\n{text.getvalue()}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--config", default=str(ROOT / "recipes" / "configs" / "pretrain_nano.yaml"))
    parser.add_argument("--profile", action="store_true", help="print profiles of save and load instead")
    args = parser.parse_args(argv)
    if args.repetitions < 1:
        parser.error(f"repetitions={args.repetitions} must be at least 1")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as root, contextlib.redirect_stderr(io.StringIO()):
        steps = Steps(Path(root), args.config)
        if args.profile:
            print(profile(steps, "save, no MTP"), profile(steps, "load, no MTP"))
            return
        found = measure(steps, args.repetitions)
        tensors = sum(p.numel() for p in steps.ours.parameters())
    threads = torch.get_num_threads()
    print(f"{tensors / 1e6:.1f} M parameters in bf16, {threads} thread(s), median of {args.repetitions}")
    print(table(found))


if __name__ == "__main__":
    main()
