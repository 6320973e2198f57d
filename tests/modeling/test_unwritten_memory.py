"""Fused training functions in memory that begins as NaN: whatever they read they, or somebody before, have written.

Fresh memory holds what was there before, nearly always numbers, so a place left out shows once in thousands of steps.
As in test_training_experts.py the kernels run natively on a GPU, and without one in Triton's interpreter. The slow
sweep: `TRITON_INTERPRET=1 python -m pytest -m slow tests/modeling/test_unwritten_memory.py`.
"""

import itertools

import pytest
import torch

from modeling_deepseek_r1 import training_blocks, training_experts, training_linear, training_routing
from modeling_deepseek_r1.fused import set_expert_products

from .kernel_tests import DEVICE, INTERPRETED, runs_elsewhere, runs_kernels
from .test_expert_products import small_tiles

FP32, BF16 = torch.float32, torch.bfloat16
UNLIKELY = -(2**30)  # as an index or a count


@runs_elsewhere
def test_in_the_interpreter(interpreted):
    interpreted(__file__)


def poisoned(make):
    def call(*args, **kwargs):
        tensor = make(*args, **kwargs)
        value = float("nan") if tensor.is_floating_point() else UNLIKELY if tensor.dtype.itemsize > 2 else None
        return tensor if value is None else tensor.detach().fill_(value)

    return call


@pytest.fixture
def poison(monkeypatch):
    """Uninitialised tensors begin as NaN, and so do the rows and experts that a grouped product may leave out."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    product, gradient = training_experts._grouped_product, training_experts._grouped_weight_gradient

    def grouped_product(rows, weight, offsets):
        output = product(rows, weight, offsets).clone()
        output[int(offsets[-1]) :] = float("nan")
        return output

    def grouped_weight_gradient(left, right, offsets):
        result = gradient(left, right, offsets)
        result[offsets.diff(prepend=offsets.new_zeros(1)) == 0] = float("nan")
        return training_experts.zero_empty_experts(result, offsets)

    monkeypatch.setattr(training_experts, "_grouped_product", grouped_product)
    monkeypatch.setattr(training_experts, "_grouped_weight_gradient", grouped_weight_gradient)


def leaf(*shape, dtype=FP32):
    return torch.randn(*shape).to(DEVICE, dtype).requires_grad_()


def all_finite(*tensors):
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def backward_is_finite(outputs, inputs):
    sum(output.float().sum() for output in outputs).backward()
    return all_finite(*outputs, *(tensor.grad for tensor in inputs))


@runs_kernels
def test_poison_is_seen(poison):
    assert not all_finite(torch.empty(3, device=DEVICE)) and int(torch.empty(1, dtype=torch.int32)) == UNLIKELY


def check_experts(tokens, experts, top_k, spread, recompute=False, width=40, inner=24, dtype=FP32):
    index = torch.rand(tokens, experts).topk(top_k).indices
    if spread == "last":  # all pairs on the last experts, the others empty
        index = (experts - top_k + torch.arange(top_k)).expand(tokens, top_k).contiguous()
    elif spread != "random":  # another rank's
        index = torch.where(torch.rand(tokens, top_k) < (0.5 if spread == "foreign" else 2.0), experts, index)
    hidden, weights, residual = leaf(tokens, width), leaf(tokens, top_k), leaf(tokens, width)
    gate_up, down = leaf(experts, 2 * inner, width, dtype=dtype), leaf(experts, width, inner, dtype=dtype)
    places = training_experts.sort_pairs(index.to(DEVICE), experts)
    output = training_experts.fused_experts(hidden, weights, *places, gate_up, down, residual, None, recompute)
    assert backward_is_finite([output], [hidden, weights, residual, gate_up, down])


@runs_kernels
@pytest.mark.parametrize("tokens, spread, recompute", [
    (0, "random", False), (1, "random", False), (33, "last", True), (33, "foreign", False), (3, "only_foreign", False),
])  # fmt: skip
def test_experts(tokens, spread, recompute, poison):
    check_experts(tokens, 6, 3, spread, recompute)


@runs_kernels
@pytest.mark.parametrize("gather", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_experts_by_our_own_products(monkeypatch, poison, gather):
    if INTERPRETED:
        small_tiles(monkeypatch, gather)
    before = set_expert_products(True)
    try:
        check_experts(9, 4, 2, "foreign", dtype=FP32 if INTERPRETED else BF16)
    finally:
        set_expert_products(before)


def check_router(rows, length, experts, top_k, recorded, scoring="sigmoid", norm_topk=True):
    tokens = rows * length
    logits, mask = leaf(tokens, experts), torch.rand(rows, length) < 0.5
    logits.data[:1], logits.data[-1:] = -200.0, 200.0  # every affinity 0, every affinity 1
    mask[-1] = False  # a row of padding
    routes = torch.rand(rows, length, experts).topk(top_k).indices.to(torch.int16)
    routes[torch.rand(rows, length) >= recorded] = -1
    counts, scale = torch.zeros(experts, dtype=torch.int64, device=DEVICE), torch.ones((), device=DEVICE)
    weights, indices = training_routing.fused_route(
        logits, torch.zeros(experts, device=DEVICE), scale, counts, rows, mask.to(DEVICE), routes.to(DEVICE),
        scoring=scoring, n_group=1, topk_group=1, group_score="max", top_k=top_k, norm_topk=norm_topk, scaling=2.5,
        balance_alpha=1e-2, z_loss_coef=1e-3,
    )  # fmt: skip
    assert backward_is_finite([weights], [logits])
    assert bool(((indices >= 0) & (indices < experts)).all()) and int(counts.sum()) == top_k * int(mask.sum())


@runs_kernels
@pytest.mark.parametrize("rows, length, recorded", [(2, 33, 0.5), (1, 1, 0.0), (3, 5, 1.0)])
def test_router_with_recorded_routes(rows, length, recorded, poison):
    check_router(rows, length, 6, 3, recorded)


def check_logits(tokens, width, experts, dtype):
    hidden, weight = leaf(tokens, width, dtype=dtype), leaf(experts, width)
    assert backward_is_finite([training_routing.router_logits(hidden, weight)], [hidden, weight])


def check_elementwise(tokens, width, dtype):
    x, delta, weight = leaf(tokens, width), leaf(tokens, width, dtype=dtype), leaf(width)
    x.data[:1] = delta.data[:1] = 0.0
    assert backward_is_finite([training_blocks.fused_rms_norm(x, weight, 1e-6, dtype)], [x, weight])
    added = training_blocks.fused_add_rms_norm(x, delta, weight, 1e-6, dtype)
    assert backward_is_finite(added, [x, delta, weight])
    states, matrices = leaf(tokens, 24, dtype=dtype), [leaf(width, 24, dtype=dtype) for _ in range(2)]
    matrices.append(leaf(24, width, dtype=dtype))
    output = training_linear.fused_gated_mlp(states, *matrices, tokens % 2 == 0)
    assert backward_is_finite([output], [states, *matrices])


@runs_kernels
@pytest.mark.parametrize("tokens, width", [(0, 96), (1, 160), (17, 96)])
def test_logits_norms_and_gated_mlp(tokens, width, poison):
    check_logits(tokens, width, 6, BF16)
    check_elementwise(tokens, width, BF16)


def check_queries_keys(batch, seq, heads, nope, rope, value, interleave, inplace):
    start, angles = leaf(batch, seq, heads * (nope + rope)), torch.randn(1, seq, rope // 2).to(DEVICE)
    kv, key_rope = leaf(batch, seq, heads * (nope + value)), leaf(batch, seq, rope)
    outputs = training_blocks.fused_queries_keys(
        start * 1.0, kv, key_rope, angles.cos(), angles.sin(), nope, rope, value, interleave, inplace=inplace
    )
    assert backward_is_finite(outputs, [start, kv, key_rope])


@runs_kernels
@pytest.mark.parametrize("inplace", [False, True])
def test_queries_and_keys(inplace, poison):
    check_queries_keys(2, 3, 3, 40, 24, 24, True, inplace)


@pytest.mark.slow
@runs_kernels
def test_many_shapes(poison):
    for tokens, (experts, top_k), spread, recompute in itertools.product(
        (0, 1, 2, 31, 33, 65, 129), ((4, 4), (16, 4), (5, 1)), ("random", "last", "foreign", "only_foreign"),
        (False, True),
    ):  # fmt: skip
        check_experts(tokens, experts, top_k, spread, recompute)
    check_experts(33, 16, 4, "random", False, 256, 160, BF16)
    for rows, length, (experts, top_k), recorded, scoring, norm_topk in itertools.product(
        (1, 3), (1, 2, 33, 70), ((16, 4), (5, 1)), (0.0, 0.5, 1.0), ("sigmoid", "softmax"), (False, True)
    ):
        check_router(rows, length, experts, top_k, recorded, scoring, norm_topk)
    for tokens, width, dtype in itertools.product((0, 1, 17, 65, 150), (96, 160, 40), (FP32, BF16)):
        check_logits(tokens, width, 16, dtype)
        check_elementwise(tokens, width, dtype)
    for batch, seq, heads, nope, value, interleave, inplace in itertools.product(
        (1, 2), (1, 9), (1, 3, 4), (64, 40), (64, 24), (False, True), (False, True)
    ):
        check_queries_keys(batch, seq, heads, nope, 32, value, interleave, inplace)
