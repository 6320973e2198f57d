"""Real kills: SIGKILL at random times, in training runs, in the commands that write checkpoint folders, in uploads.

    python benchmarks/bench_kills.py [--kills 50] [--kinds pretrain ppo ranks shards export cast upload] [--seed 0]

A run or a command is started, killed at a random time, started again, ..., until it completes; then anew, until
`--kills` processes of each kind have been killed. After each kill:

- training (checkpoints at every step): the newest complete checkpoint verifies (sizes and sha256), and no older one has
  taken its place; at the end records and weights equal those of a run that was left alone, bit for bit;
- ranks, shards: the same of a run on two processes, of which one is killed: under DDP, and sharded by FSDP2 and saved
  beside training. The other ends by itself within a minute (the slowest is shown): where one dies before they have met,
  after `collective_timeout_s`, 15 s here; under a launcher at once;
- export, cast: the target is absent, or complete and equal to that of a command that was left alone;
- upload (to the tests' stand-in for the Hub): the branch holds the old files or the new ones, never a mixture.

Processes are forked from this one, which has only imported things: a fresh interpreter would spend its life importing.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}

from huggingface_hub import HfApi

from modeling_deepseek_r1 import checkpoint
from modeling_deepseek_r1.checkpoint_files import MANIFEST, verify_folder
from recipes import run_results
from recipes.checkpoint_files import find_problem, is_unfinished, list_checkpoints, newest_complete_checkpoint
from recipes.hub_commit import commit_files
from recipes.run_results import text_table
from tests.hub.hub_server import TOKEN, HubServer
from tests.recipes.processes import FSDP, fork, start_ranks, wait_for
from tests.recipes.tiny_run import SIZES
from tests.recipes.tiny_stages import RECIPES, arguments, differences, make_base

EVERY_STEP = ("--save_steps", "1", "--eval_strategy", "no", "--save_total_limit", "2", "--max_steps", "8")


def child_of(work, log):
    """The id of a process that does `work()`; it ends with 0, or with 1 and a traceback in `log`."""

    def without_report():
        run_results.write_report = lambda folder: folder / "report.html"  # takes longer than the training
        return work()

    return fork(without_report, log, append=True)


def finish(work, log):
    """Seconds that `work()` takes in a process of its own. Raises RuntimeError where it fails."""
    start = time.perf_counter()
    _, status = os.waitpid(child_of(work, log), 0)
    if status:
        raise RuntimeError(f"a process that nobody killed has failed; the end of {log}:\n{log.read_text()[-2000:]}")
    return time.perf_counter() - start


def killed(work, log, seconds):
    """Whether a process doing `work()` was still there after `seconds`, and is killed now."""
    child, end = child_of(work, log), time.perf_counter() + seconds
    while time.perf_counter() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise RuntimeError(f"a process failed before its kill; the end of {log}:\n{log.read_text()[-2000:]}")
            return False
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


class Training:
    """A tiny run of a recipe with a checkpoint at every step."""

    window = (0.2, 1.0)  # when it is killed, in parts of what a whole run takes; before that it loads its data

    def __init__(self, stage, folder, log):
        self.stage, self.folder, self.log, self.newest = stage, folder, log, 0
        self.whole, self.target = folder / f"{stage}_whole", folder / f"{stage}_killed"
        self.seconds = finish(self.work_in(self.whole), log)

    def work_in(self, target):
        more = (*EVERY_STEP, "--resume_from_checkpoint", "auto")
        return lambda: RECIPES[self.stage].main(arguments(self.folder, self.stage, target, *more)) and 0

    def kill(self, work, seconds, generator):
        return killed(work, self.log, seconds)

    def start_anew(self):
        self.newest = 0
        shutil.rmtree(self.target, ignore_errors=True)

    def was_writing(self):
        unfinished = (path for _, path in list_checkpoints(self.target) if is_unfinished(path))
        return any(self.target.glob(".removing-*")) or any(unfinished)

    def is_intact(self):
        path, _ = newest_complete_checkpoint(self.target)
        step = 0 if path is None else int(path.name.rpartition("-")[2])
        before, self.newest = self.newest, max(step, self.newest)
        return step >= before and (path is None or find_problem(path) is None)

    def is_whole(self):
        return differences(self.target, self.whole) == []


class Ranks(Training):
    """Two processes over gloo; one of them, drawn at random, is killed."""

    window = (0.1, 1.0)

    def __init__(self, kind, folder, log):
        self.sharded, self.slowest_end = kind == "shards", 0.0
        self.options = (
            "--per_device_train_batch_size", "2", "--ema_decay", "0", "--dead_rank_s", "5", "--collective_timeout_s",
            "15", *(("--async_save", "true") if self.sharded else ()),
        )  # fmt: skip
        self.stage, self.folder, self.log, self.newest = "pretrain", folder, log, 0
        self.whole, self.target = folder / f"{kind}_whole", folder / f"{kind}_killed"
        self.seconds = finish(self.work_in(self.whole), log)

    def start(self, target):
        more = (*EVERY_STEP, *self.options, "--resume_from_checkpoint", "auto")
        work = lambda rank: RECIPES["pretrain"].main(arguments(self.folder, "pretrain", target, *more))
        return start_ranks(2, work, self.log.parent / "ranks", FSDP if self.sharded else {})

    def work_in(self, target):
        return lambda: int(wait_for(self.start(target)) != [0, 0])

    def kill(self, work, seconds, generator):
        children, end = self.start(self.target), time.perf_counter() + seconds
        ended = lambda child: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        while time.perf_counter() < end and not any(map(ended, children)):
            time.sleep(0.0005)
        os.kill(generator.choice(children), signal.SIGKILL)
        end = time.perf_counter()
        codes = wait_for(children, 60)
        self.slowest_end = max(self.slowest_end, time.perf_counter() - end)
        if 1 in codes and -signal.SIGKILL not in codes:
            log = "".join(path.read_text()[-2000:] for path in (self.log.parent / "ranks").glob("*.log"))
            raise RuntimeError(f"a rank failed before the kill: {log}")
        return -signal.SIGKILL in codes


class Command:
    """`python -m modeling_deepseek_r1.checkpoint export` or `cast` of a model in many shards."""

    window = (0.0, 1.1)

    def __init__(self, name, folder, log):
        self.name, self.source, self.log = name, folder / "shards", log
        self.whole, self.target = folder / f"{name}_whole", folder / f"{name}_killed"
        self.seconds = finish(self.work_in(self.whole), log)

    def work_in(self, target):
        to = ("--to", "fp8") if self.name == "cast" else ()
        return lambda: checkpoint.main([self.name, str(self.source), str(target), "--max_shard_size", "300KB", *to])

    def kill(self, work, seconds, generator):
        return killed(work, self.log, seconds)

    def start_anew(self):
        for path in (self.target, *self.target.parent.glob(f".{self.target.name}.*")):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def was_writing(self):
        return not self.target.exists() and any(self.target.parent.glob(f".{self.target.name}.*"))

    def is_intact(self):
        return not self.target.exists() or self.is_whole()

    def is_whole(self):
        verify_folder(self.target)
        files = [{p.name for p in folder.iterdir()} for folder in (self.target, self.whole)]
        same = ((self.target / name).read_bytes() == (self.whole / name).read_bytes() for name in files[0] - {MANIFEST})
        return files[0] == files[1] and all(same)


class Upload:
    """`commit_files`, which hub_upload.py and the trainers push with, of a sharded model over another one."""

    window, name = (0.0, 1.1), "user/model"

    def __init__(self, kind, folder, log):
        self.log, self.hub = log, HubServer()
        threading.Thread(target=self.hub.serve_forever, daemon=True).start()
        self.new = {path.name: path.read_bytes() for path in sorted((folder / "shards").iterdir()) if path.is_file()}
        self.old = {name: content[::-1] for name, content in self.new.items()}
        self.start_anew()
        self.seconds = finish(self.work_in(None), log)

    @property
    def target(self):
        """What the branch holds now: {path: bytes}."""
        files = self.hub.repos[self.name].at("main")["files"]
        return {path: content for path, (content, _) in files.items() if path != ".gitattributes"}

    def push(self, files):
        commit_files(HfApi(endpoint=self.hub.url, token=TOKEN), self.name, files, "pushed")

    def work_in(self, target):
        self.hub.requests.clear()
        return lambda: self.push(self.new)

    def kill(self, work, seconds, generator):
        return killed(work, self.log, seconds)

    def start_anew(self):
        self.hub.repos.clear()
        self.hub.objects.clear()
        self.push(self.old)
        self.hub.requests.clear()

    def was_writing(self):
        return bool(self.hub.requests) and self.target == self.old

    def is_intact(self):
        return self.target in (self.old, self.new)

    def is_whole(self):
        return self.target == self.new


def run_kind(task, kills, generator):
    """{"kills", "while writing", "intact", "runs", "completed"} of one kind."""
    found = {"kills": 0, "while writing": 0, "intact": 0, "runs": 0, "completed": 0}
    while found["kills"] < kills:
        task.start_anew()
        work, complete = task.work_in(task.target), False
        while not complete and found["kills"] < kills:
            if task.kill(work, generator.uniform(*task.window) * task.seconds, generator):
                found["kills"] += 1
                found["while writing"] += task.was_writing()
                found["intact"] += task.is_intact()
            else:
                complete = True
        if not complete:
            finish(work, task.log)  # the attempt after the last kill
        found["runs"] += 1
        found["completed"] += task.is_whole()
    if hasattr(task, "slowest_end"):
        found["slowest end"] = f"{task.slowest_end:.1f} s"
    return found


def make_shards(folder):
    """A random model of 3.5 million parameters in `folder`/shards, which exports to dozens of files."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    sizes = {"vocab_size": 512, "hidden_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 6}
    config = CONFIG_MAPPING["deepseek_r1"](**(SIZES | sizes))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "shards", max_shard_size="300KB")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = {"pretrain": Training, "ppo": Training, "ranks": Ranks, "shards": Ranks}
    kinds |= {"export": Command, "cast": Command, "upload": Upload}
    parser.add_argument("--kills", type=int, default=50, help="of each kind (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=list(kinds))
    parser.add_argument("--seed", type=int, default=0, help="of the random times")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder, log, start = Path(name), Path(name) / "log", time.perf_counter()
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        finish(lambda: make_base(folder) and 0, log)
        finish(lambda: make_shards(folder), log)
        rows = []
        for kind in args.kinds:
            task = kinds[kind](kind, folder, log)
            found = run_kind(task, args.kills, random.Random(f"{args.seed} {kind}"))
            rows.append((kind, ", ".join(f"{name} {value}" for name, value in found.items())))
            print(text_table(rows[-1:]), f"(alone {task.seconds:.1f} s)", flush=True)
        print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
