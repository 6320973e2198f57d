"""What the tests of the fused training kernels share: where they run, and the switch put back after each.

On a GPU the kernels run as they are, elsewhere in Triton's interpreter (see `interpreted` in tests/conftest.py).
"""

import os

import pytest
import torch

from modeling_deepseek_r1.fused import set_fused_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in test_in_the_interpreter")
runs_elsewhere = pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests below run by themselves")


@pytest.fixture(autouse=True)
def switch_restored():
    before = set_fused_kernels(None)
    yield
    set_fused_kernels(before)
