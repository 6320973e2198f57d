"""kill -9 of one rank under `accelerate launch`: the launcher ends soon and names it, and the resumed run is the whole
one, bit for bit. In the middle of a run, and in the middle of a save."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from recipes import pretrain
from recipes.checkpoint_files import MARKER, find_problem, list_checkpoints, newest_complete_checkpoint
from tests.recipes.tiny_stages import arguments, differences, make_base

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 60, 10
LAYOUTS = {  # launch file, further settings
    "ddp": ("cpu.yaml", ()),
    "fsdp2, beside training": ("fsdp2.yaml", ("--async_save", "true")),
}
OPTIONS = ("--max_steps", str(STEPS), "--save_steps", str(EVERY), "--eval_strategy", "no", "--ema_decay", "0",
           "--per_device_train_batch_size", "2", "--save_total_limit", "3")  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("kills"))


def command(base, layout, run, *more):
    file, options = LAYOUTS[layout]
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes" / "launch" / file),
        "--num_processes", "2", "--main_process_port", "0", pretrain.__file__,
        *arguments(base, "pretrain", run, *OPTIONS, *options, *more),
    ]  # fmt: skip


def started(words, log):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)


@pytest.fixture(scope="module", params=LAYOUTS)
def whole(request, base, tmp_path_factory):
    """(layout, folder) of a run that was left alone."""
    folder = tmp_path_factory.mktemp("whole")
    with open(folder / "log", "w") as log:
        code = started(command(base, request.param, folder / "run"), log).wait(timeout=300)
    assert code == 0, (folder / "log").read_text()[-3000:]
    return request.param, folder / "run"


def rank_of(launcher, rank):
    """The process of that rank under a launcher."""
    for child in psutil.Process(launcher.pid).children(recursive=True):
        try:
            if child.environ().get("RANK") == str(rank):
                return child
        except psutil.NoSuchProcess:
            continue
    raise AssertionError(f"no rank {rank}")


def in_the_run(run):
    """Between two saves."""
    return (run / f"checkpoint-{EVERY}" / MARKER).is_file()


def in_a_save(run):
    """The second save has begun: its folder is there, its marker is not."""
    return (run / f"checkpoint-{2 * EVERY}").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("moment, rank", [(in_the_run, 1), (in_a_save, 0)])
def test_a_killed_rank_ends_the_launcher_and_the_run_goes_on(whole, base, tmp_path, moment, rank):
    layout, expected = whole
    run, log_file = tmp_path / "run", tmp_path / "log"
    with open(log_file, "w") as log:
        launcher = started(command(base, layout, run), log)
        deadline = time.monotonic() + 200
        while not moment(run) and launcher.poll() is None and time.monotonic() < deadline:
            time.sleep(0.0005)
        rank_of(launcher, rank).send_signal(signal.SIGKILL)
        start = time.monotonic()
        code = launcher.wait(timeout=90)
    text = log_file.read_text()
    assert code == 1 and time.monotonic() - start < 60, text[-3000:]
    assert re.search(rf"rank\s+: {rank} .*\n\s+exitcode\s+: -9 .*SIGKILL", text), text[-3000:]

    kept, _ = newest_complete_checkpoint(run)
    reached = max(step for step, _ in list_checkpoints(run))
    assert kept is not None and reached - int(kept.name.split("-")[1]) <= EVERY  # no more lost than since the last save
    with open(log_file, "a") as log:
        code = started(command(base, layout, run, "--resume_from_checkpoint", "true"), log).wait(timeout=300)
    assert code == 0, log_file.read_text()[-3000:]
    assert differences(run, expected) == []
    assert find_problem(run / f"checkpoint-{STEPS}") is None
