"""The rows that expert parallelism sends and adds up: the kernels and plain torch, natively on a GPU or interpreted."""

import os

import pytest
import torch

from modeling_deepseek_r1.expert_parallel import Route, _add_rows, _take_rows
from modeling_deepseek_r1.fused import set_fused_kernels
from modeling_deepseek_r1.training_experts import sort_pairs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH = 40


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests below run by themselves")
def test_in_the_interpreter(interpreted):
    interpreted(__file__)


def make_route(present):
    """present (T, W) bool: which processes a token goes to."""
    size = present.shape[1]
    index = torch.where(present, torch.arange(size, device=DEVICE), size)
    order, back, ends = sort_pairs(index, size)
    return Route(None, order[: int(present.sum())], back.view(-1, size), ends, [], [])


@pytest.mark.parametrize("tokens, processes, share", [(23, 2, 0.7), (9, 3, 0.4), (5, 1, 1.0), (6, 4, 0.0), (0, 2, 1.0)])
@pytest.mark.parametrize("kernels", [False, True] if DEVICE == "cuda" else [INTERPRETED])
def test_rows_equal_a_loop(tokens, processes, share, kernels):
    present = torch.rand(tokens, processes).to(DEVICE) < share
    route, source = make_route(present), torch.randn(tokens, WIDTH).to(DEVICE)
    residual, shared = (torch.randn(tokens, WIDTH).to(DEVICE) for _ in range(2))
    before = set_fused_kernels(kernels)
    try:
        rows = _take_rows(source, route, torch.float32)
        narrow = _take_rows(source, route, torch.bfloat16)
        total = _add_rows(rows * 2.0, route, torch.float32, residual, shared.bfloat16())
        alone = _add_rows(narrow, route, torch.bfloat16)
    finally:
        set_fused_kernels(before)
    sender = [token for process in range(processes) for token in range(tokens) if present[token, process]]
    assert torch.equal(rows, source[sender])
    # bf16 to one rounding and no better: Triton's interpreter cuts off where the hardware rounds.
    torch.testing.assert_close(narrow.float(), source[sender], atol=0.0, rtol=2.0**-7)
    counts = present.sum(1, keepdim=True).float()
    expected = 2.0 * counts * source + residual + shared.bfloat16().float()
    torch.testing.assert_close(total, expected, atol=2e-6, rtol=2e-6)  # at most six terms of size 1
    torch.testing.assert_close(alone.float(), counts * source, atol=0.0, rtol=2.0**-6)  # two such roundings
