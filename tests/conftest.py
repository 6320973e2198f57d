"""Settings every test shares: no network, two threads (or OMP_NUM_THREADS), a fixed seed."""

import gc
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import pytest
import torch
from transformers import set_seed

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(autouse=True)
def fixed_seed():
    set_seed(0)


@pytest.fixture(scope="module", autouse=True)
def imports_are_not_collected():
    """Each run of a trainer ends in a full garbage collection: without this it goes through every imported module."""
    gc.collect()
    gc.freeze()


def run_interpreted(request, fixture, marks):
    """A function that takes a test file and fails unless all its tests passed in Triton's interpreter, none skipped.

    They run in a process with TRITON_INTERPRET=1: one for all files of the session that ask for `fixture`, because the
    imports take longer than the tests. Left out are tests named *_in_the_interpreter, which only ask.
    """
    pytest.importorskip("triton")
    root = request.config.rootpath
    files = sorted({str(item.path) for item in request.session.items if fixture in item.fixturenames})
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", marks,
               "-k", "not in_the_interpreter", *files]  # fmt: skip
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)

    def check(file):
        name = f"{Path(file).relative_to(root).as_posix()}::"
        lines = [line for line in run.stdout.splitlines() if line.startswith(name) and line.endswith("%]")]
        wrong = [line for line in lines if " PASSED" not in line]
        assert lines and not wrong, "\n".join(wrong) + run.stdout[-6000:] + run.stderr[-2000:]

    return check


@pytest.fixture(scope="session")
def interpreted(request):
    """`run_interpreted` of the tests marked neither `gpu` nor `slow`."""
    return run_interpreted(request, "interpreted", "not slow and not gpu")


@pytest.fixture(scope="session")
def interpreted_slow(request):
    """`run_interpreted` of the slow tests."""
    return run_interpreted(request, "interpreted_slow", "slow and not gpu")
