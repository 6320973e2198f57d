"""The experts' training step against the eager loop, its kernels against their torch twins, the sort against argsort.

As in test_kernels_experts.py the kernels run natively on a GPU, and without one in Triton's interpreter, in a process
of its own (see `interpreted` in tests/conftest.py). The tests of the whole step run on the twins too.
"""

import os

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from modeling_deepseek_r1 import training_experts
from modeling_deepseek_r1.experts import DeepSeekR1Experts
from modeling_deepseek_r1.fused import beside, join, set_second_stream
from modeling_deepseek_r1.training_experts import TWINS, fused_experts, fused_experts_twin, sort_pairs
from modeling_deepseek_r1.training_linear import fused_gated_mlp
from tests.modeling.helpers import tiny_config

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in test_in_the_interpreter")
if DEVICE == "cuda" or INTERPRETED:
    from modeling_deepseek_r1 import kernels_expert_rows as kernels

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
WIDTH, INNER = 40, 24  # no powers of two, multiples of 8 as torch's grouped matmul wants them


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests below run by themselves")
def test_in_the_interpreter(interpreted):
    interpreted(__file__)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random(*shape, dtype=FP32, scale=1.0):
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def close(result, reference, dtype, slack=1.0):
    """One rounding to the dtype apart, and the order of fp32 sums; `slack` roundings where more are chained."""
    tolerance = slack * {FP32: 3e-6, BF16: 1e-2, FP16: 2e-3}[dtype]
    torch.testing.assert_close(result.float(), reference.float(), rtol=tolerance, atol=4 * tolerance)


def choices(tokens, experts, top_k, spread="random"):
    """(T, K) int64. ragged: experts 1 and the last get nothing; crowded: one gets all; foreign: half are of others."""
    if spread == "crowded":
        index = torch.full((tokens, top_k), experts // 2)
    else:
        scores = torch.rand(tokens, experts)
        if spread == "ragged":
            scores[:, [1, -1]] = -1.0
        index = scores.topk(top_k).indices
    if spread in ("foreign", "only_foreign"):
        index = torch.where(torch.rand(tokens, top_k) < (0.5 if spread == "foreign" else 2.0), experts, index)
    return index.to(DEVICE)


# ---- the sort ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens, experts, top_k, spread", [
    (100, 8, 3, "random"), (43, 6, 3, "foreign"), (150, 5, 1, "crowded"), (1, 512, 8, "random"), (70, 7, 2, "ragged"),
    (0, 4, 2, "random"), (65, 3, 2, "only_foreign"), (64, 1, 1, "random"),
])  # fmt: skip
def test_sort_equals_a_stable_argsort(tokens, experts, top_k, spread):
    index = choices(tokens, experts, top_k, spread)
    order, back, offsets = sort_pairs(index, experts)
    expected = index.flatten().argsort(stable=True)
    assert torch.equal(order.long(), expected)
    assert torch.equal(back.long(), expected.argsort())
    counts = index.flatten().bincount(minlength=experts + 1)[:experts]
    assert torch.equal(offsets.long(), counts.cumsum(0))
    assert {tensor.dtype for tensor in (order, back, offsets)} == {torch.int32}


# ---- kernels against twins -----------------------------------------------------------------------------------------

TOKENS, EXPERTS, TOP_K = 11, 5, 3


def sorted_case(spread="foreign", tokens=TOKENS):
    index = choices(tokens, EXPERTS, TOP_K, spread)
    return sort_pairs(index, EXPERTS), torch.rand(tokens, TOP_K, device=DEVICE)


def with_garbage(rows, offsets):
    """NaN in the rows of other ranks' experts, where torch's grouped matmul leaves memory as it was."""
    rows[int(offsets[-1]):] = torch.nan
    return rows


@runs_kernels
@pytest.mark.parametrize("width, dtype, to", [(40, FP32, BF16), (192, BF16, BF16), (100, FP16, FP32)])
def test_gather_and_sum(width, dtype, to):
    (order, back, offsets), _ = sorted_case()
    local = int(offsets[-1])
    assert 0 < local < TOKENS * TOP_K
    source, residual = random(TOKENS, width, dtype=dtype), random(TOKENS, width, dtype=to)
    result = kernels.gather_rows(source, back, offsets, local + 1, to)
    expected = TWINS.gather_rows(source, back, offsets, local + 1, to)
    assert result.dtype == to and result.shape == expected.shape == (local + 1, width)
    assert torch.equal(expected[:local], source[order[:local].long() // TOP_K].to(to))
    if to == dtype or not INTERPRETED:  # the interpreter cuts fp32 off to bf16 where a GPU rounds
        assert torch.equal(result[:local], expected[:local])
    close(result[:local], expected[:local], to)
    rows = with_garbage(random(TOKENS * TOP_K, width, dtype=dtype), offsets)
    for added in (None, residual):
        expected = TWINS.sum_choices(rows, back, offsets, TOP_K, to, added)
        result = kernels.sum_choices(rows, back, offsets, TOP_K, to, added)
        assert result.dtype == to
        close(result, expected, to)


@runs_kernels
@pytest.mark.parametrize("inner, dtype", [(24, FP32), (192, BF16), (100, FP16), (4100, FP32)])
def test_gate(inner, dtype):
    tokens = TOKENS if inner < 1000 else 2
    (order, _, offsets), weights = sorted_case(tokens=tokens)
    local, pairs = int(offsets[-1]), tokens * TOP_K
    gate_up = with_garbage(random(pairs, 2 * inner, dtype=dtype), offsets)
    grad = with_garbage(random(pairs, inner, dtype=dtype), offsets)
    close(kernels.gate_rows(gate_up, weights, order, offsets)[:local],
          TWINS.gate_rows(gate_up, weights, order, offsets)[:local], dtype)  # fmt: skip
    expected = TWINS.gate_rows_backward(gate_up, weights, order, offsets, grad)
    before, kept = gate_up.clone(), grad.clone()
    none = kernels.gate_rows_backward(gate_up, weights, order, offsets, grad, with_output=False)
    assert none[1] is None and torch.equal(grad[:local], kept[:local])
    result = kernels.gate_rows_backward(gate_up, weights, order, offsets, grad)
    assert torch.equal(before[:local], gate_up[:local])
    in_place = kernels.gate_rows_backward(gate_up, weights, order, offsets, kept, in_place=True)
    assert in_place[0] is gate_up and in_place[1] is kept
    for outcome in (none, result, in_place):
        for mine, reference in zip(outcome[:2], expected[:2]):
            if mine is not None:
                close(mine[:local], reference[:local], dtype)
        # A sum of `inner` products of fp32 numbers: its order differs.
        torch.testing.assert_close(outcome[2], expected[2], rtol=1e-5, atol=1e-4)


@runs_kernels
def test_empty_experts_get_zeros():
    offsets = torch.tensor([0, 3, 3, 7, 7], dtype=torch.int32, device=DEVICE)
    gradient = torch.full((5, 70, 48), torch.nan, dtype=BF16, device=DEVICE)
    gradient[[1, 3]] = 1.0
    kernels.zero_empty_experts(gradient, offsets)
    assert torch.equal(gradient[:, 0, 0], torch.tensor([0, 1, 0, 1, 0], dtype=BF16, device=DEVICE))
    assert torch.equal(gradient, gradient[:, :1, :1].expand_as(gradient))


# ---- the whole step ------------------------------------------------------------------------------------------------


def case(tokens, experts, top_k, spread, dtype=FP32):
    config = tiny_config(n_routed_experts=experts, num_experts_per_tok=top_k, n_group=1, topk_group=1,
                         hidden_size=WIDTH, moe_intermediate_size=INNER)  # fmt: skip
    config._experts_implementation = "eager"
    module = DeepSeekR1Experts(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, WIDTH**-0.5)
    floats = [random(tokens, WIDTH, dtype=dtype), torch.rand(tokens, top_k, device=DEVICE),
              random(tokens, WIDTH, dtype=dtype)]  # fmt: skip
    for tensor in floats:
        tensor.requires_grad_()
    return module.to(DEVICE, dtype), choices(tokens, experts, top_k, spread), *floats


def gradients(output, inputs, target):
    found = torch.autograd.grad((output.float() * target).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(tensor) if grad is None else grad for grad, tensor in zip(found, inputs)]


def step(module, index, hidden, weights, residual, function=fused_experts, recompute=False):
    order = sort_pairs(index, module.num_experts)
    return function(hidden, weights, *order, module.gate_up_proj, module.down_proj, residual,
                    recompute=recompute)  # fmt: skip


CASES = pytest.mark.parametrize("tokens, experts, top_k, spread", [
    (13, 6, 3, "random"), (9, 6, 3, "ragged"), (7, 5, 1, "crowded"), (10, 9, 8, "foreign"), (4, 3, 2, "only_foreign"),
    (1, 4, 2, "random"), (0, 4, 2, "random"),
])  # fmt: skip


@CASES
def test_step_equals_the_loop(tokens, experts, top_k, spread):
    module, index, hidden, weights, residual = case(tokens, experts, top_k, spread)
    inputs, target = (hidden, weights, residual, *module.parameters()), random(tokens, WIDTH)
    expected = residual + module(hidden, index, weights)
    reference = gradients(expected, inputs, target)
    outputs = [step(module, index, hidden, weights, residual, recompute=recompute) for recompute in (False, True)]
    found = [gradients(output, inputs, target) for output in outputs]
    twin = step(module, index, hidden, weights, residual, fused_experts_twin)
    for output, grads in ((outputs[0], found[0]), (twin, gradients(twin, inputs, target))):
        close(output, expected, FP32)
        for mine, other in zip(grads, reference):
            assert mine.dtype == other.dtype
            close(mine, other, FP32, slack=4)  # sums over up to T * K rows in another order
    for mine, other in zip((outputs[0], *found[0]), (outputs[1], *found[1])):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("spread", ["ragged", "foreign"])
def test_low_precision_stays_close(dtype, spread):
    module, index, hidden, weights, residual = case(23, 6, 3, spread, dtype)
    inputs, target = (hidden, weights, residual, *module.parameters()), random(23, WIDTH)
    output = step(module, index, hidden, weights, residual)
    found = gradients(output, inputs, target)
    exact, _, *floats = case(23, 6, 3, spread)
    with torch.no_grad():
        for mine, other in zip((*floats, *exact.parameters()), inputs[:3] + inputs[3:]):
            mine.copy_(other)
    expected = floats[2] + exact(floats[0], index, floats[1])
    assert output.dtype == dtype
    close(output, expected, dtype)
    reference = gradients(expected, (*floats, *exact.parameters()), target)
    for mine, other, tensor in zip(found, reference, inputs):
        assert mine.dtype == tensor.dtype
        # Against the largest entry: each is a sum of numbers rounded three or four times, and some cancel.
        assert (mine.float() - other).abs().max() < {BF16: 2e-2, FP16: 3e-3}[dtype] * other.abs().max()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_garbage_of_other_ranks_stays_out(monkeypatch, dtype):
    """Whatever stands in the rows that no expert of this rank fills, in every row-sized tensor."""
    module, index, hidden, weights, residual = case(10, 5, 3, "foreign", dtype)
    inputs, target = (hidden, weights, residual, *module.parameters()), random(10, WIDTH)
    reference = gradients(step(module, index, hidden, weights, residual), inputs, target)
    offsets, calls = sort_pairs(index, 5)[2], []
    run = training_experts._functions(hidden.device)

    def spoil(owner, name):
        function = getattr(owner, name)

        def leaves_garbage(*args, **kwargs):
            calls.append(name)
            results = function(*args, **kwargs)
            for rows in results[:2] if isinstance(results, tuple) else (results,):
                if rows is not None:
                    with_garbage(rows, offsets)
            return results

        monkeypatch.setattr(owner, name, leaves_garbage)

    for owner, name in ((training_experts, "_grouped_product"), (run, "gather_rows"), (run, "gate_rows"),
                        (run, "gate_rows_backward")):  # fmt: skip
        spoil(owner, name)
    for recompute in (False, True):
        output = step(module, index, hidden, weights, residual, recompute=recompute)
        assert output.isfinite().all()
        for mine, other in zip(gradients(output, inputs, target), reference):
            assert torch.equal(mine, other)
    assert calls.count("_grouped_product") == 4 + 5 and (index == 5).any()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_order_may_end_with_the_last_local_pair(dtype):
    """Pairs of other ranks that are known to be there take no memory; the result is the same."""
    module, index, hidden, weights, residual = case(10, 5, 3, "foreign", dtype)
    inputs, target = (hidden, weights, residual, *module.parameters()), random(10, WIDTH)
    order, back, offsets = sort_pairs(index, 5)
    local = int(offsets[-1])
    assert 0 < local < order.numel()
    for recompute in (False, True):
        outputs = [fused_experts(hidden, weights, part, back, offsets, *module.parameters(), residual,
                                 recompute=recompute) for part in (order, order[:local])]  # fmt: skip
        assert torch.equal(*outputs)
        for full, short in zip(*(gradients(output, inputs, target) for output in outputs)):
            assert torch.equal(full, short)


def test_frozen_inputs_mixed_dtypes_and_checkpoints():
    """Gradients of what wants one only; hidden and residual in fp32 around bf16 matmuls; both kinds of checkpoint."""
    module, index, hidden, weights, residual = case(9, 6, 3, "ragged")
    target, low = random(9, WIDTH), [parameter.detach().to(BF16) for parameter in module.parameters()]
    order = sort_pairs(index, 6)

    def run(*wanted, checkpointed=None):
        tensors = [tensor.detach().requires_grad_(name in wanted) for name, tensor in
                   zip("hwrgd", (hidden, weights, residual, *low))]  # fmt: skip
        inner = lambda h, w, r, g, d: fused_experts(h, w, *order, g, d, r)
        output = inner(*tensors) if checkpointed is None else checkpoint(inner, *tensors, **checkpointed)
        output.backward(target)
        return output, [tensor.grad for tensor in tensors]

    output, full = run(*"hwrgd")
    assert output.dtype == FP32 and [grad.dtype for grad in full] == [FP32, FP32, FP32, BF16, BF16]
    close(output, residual + module(hidden, index, weights), BF16)
    assert torch.equal(full[2], target)
    narrow = hidden.detach().to(BF16).requires_grad_()  # as after a norm under autocast, the residual stream in fp32
    mixed = fused_experts(narrow, weights, *order, *low, residual)
    mixed.backward(target)
    assert mixed.dtype == FP32 and narrow.grad.dtype == BF16
    assert torch.equal(mixed, output) or INTERPRETED  # which rounds hidden differently
    close(narrow.grad, full[0], BF16)
    for wanted in ("h", "w", "r", "g", "d", "hw", "gd"):
        _, found = run(*wanted)
        for name, mine, other in zip("hwrgd", found, full):
            assert mine is None if name not in wanted else torch.equal(mine, other), (wanted, name)
    for reentrant in (False, True):
        _, found = run(*"hwrgd", checkpointed={"use_reentrant": reentrant})
        assert all(torch.equal(mine, other) for mine, other in zip(found, full))


def shared_case(tokens=9, dtype=FP32):
    """`case`, and the weights of shared experts."""
    module, index, *floats = case(tokens, 6, 3, "ragged", dtype)
    shapes = (20, WIDTH), (20, WIDTH), (WIDTH, 20)
    return module, index, floats, [random(*shape, dtype=dtype, scale=0.2).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("recompute", [False, True])
def test_shared_experts_inside_are_those_beside(recompute):
    """Made by the experts' function or given to it: the same numbers, but for the order in which the two gradients of
    the hidden states are added."""
    module, index, (hidden, weights, residual), shared = shared_case()
    experts = (*sort_pairs(index, 6), module.gate_up_proj, module.down_proj, residual)
    inputs, target = (hidden, weights, residual, *module.parameters(), *shared), random(9, WIDTH)
    inside = fused_experts(hidden, weights, *experts, recompute=recompute, shared_weights=shared)
    beside = fused_experts(hidden, weights, *experts, fused_gated_mlp(hidden, *shared, recompute), recompute)
    twin = fused_experts_twin(hidden, weights, *experts, shared_weights=shared)
    assert torch.equal(inside, beside)
    close(twin, inside, FP32)
    found, expected, plain = (gradients(output, inputs, target) for output in (inside, beside, twin))
    close(found[0], expected[0], FP32)
    assert all(torch.equal(mine, other) for mine, other in zip(found[1:], expected[1:]))
    for mine, other in zip(found, plain):
        close(mine, other, FP32, slack=4)
    for frozen in ([0], [3, 4], [5, 6], [7], [0, 1, 3, 4]):
        tensors = [x.detach().requires_grad_(k not in frozen) for k, x in enumerate(inputs)]
        output = fused_experts(*tensors[:2], *experts[:3], *tensors[3:5], tensors[2], None, recompute, tensors[5:])
        wanted = [k for k in range(8) if k not in frozen]
        for k, mine in zip(wanted, gradients(output, [tensors[k] for k in wanted], target)):
            assert torch.equal(mine, found[k])


def test_shared_experts_of_no_tokens_have_zero_gradients():
    module, index, (hidden, weights, _), shared = shared_case(tokens=0)
    experts = (*sort_pairs(index, 6), module.gate_up_proj, module.down_proj)
    output = fused_experts(hidden, weights, *experts, shared_weights=shared)
    found = torch.autograd.grad(output.sum(), (hidden, module.down_proj, *shared))
    assert [grad.shape for grad in found[2:]] == [x.shape for x in shared] and not any(x.any() for x in found)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a second stream")
def test_the_second_stream_changes_no_number():
    """Many steps of changing size, so that memory goes back to both streams' pools and comes from them again."""
    before = set_second_stream(False)
    try:
        for size in (4096, 777, 4096, 1500):
            module, index, (hidden, weights, residual), shared = shared_case(size, BF16)
            experts = (*sort_pairs(index, 6), module.gate_up_proj, module.down_proj, residual)
            inputs, target = (hidden, weights, residual, *module.parameters(), *shared), random(size, WIDTH)
            results = []
            for enabled in (False, True, True):
                set_second_stream(enabled)
                output = fused_experts(hidden, weights, *experts, shared_weights=shared)
                results.append([output, *gradients(output, inputs, target)])
            for others in results[1:]:
                assert all(torch.equal(mine, other) for mine, other in zip(results[0], others))
    finally:
        set_second_stream(before)


def test_without_cuda_the_second_stream_is_none():
    before = set_second_stream(True)
    try:
        value = torch.ones(1)
        with beside(value):
            value = value + 1
        join(value)
        assert value == 2
    finally:
        assert set_second_stream(before) is True


def test_inputs_and_saved_tensors_stay_as_they_are():
    """Also with a second backward through the same graph, whose saved product the first must not have changed."""
    module, index, hidden, weights, residual = case(9, 6, 3, "random")
    inputs = (hidden, weights, residual, *module.parameters())
    copies = [tensor.detach().clone() for tensor in inputs]
    output = step(module, index, hidden, weights, residual).sum()
    first, second = (torch.autograd.grad(output, inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(*pair) for pair in (*zip(first, second), *zip(inputs, copies)))


@pytest.mark.parametrize("change, message", [
    ({"gate_up": (4, 20, 8)}, "must be"), ({"weights": (3, 2)}, "K choices"), ({"offsets": (5,)}, "5 entries"),
    ({"residual": (4, 9)}, "residual"), ({"dtype": FP16}, "cast both"), ({"shared": BF16}, "cast them"),
    ({"order": 0}, "last local one"), ({"order": 9}, "last local one"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(change, message):
    sizes = {"gate_up": (4, 16, 8), "weights": (4, 2), "offsets": (4,), "residual": (4, 8)} | change
    order, pairs = (torch.zeros(size, dtype=torch.int32) for size in (sizes.get("order", 8), 8))
    with pytest.raises(ValueError, match=message):
        fused_experts(torch.zeros(4, 8), torch.zeros(sizes["weights"]), order, pairs, torch.zeros(sizes["offsets"]),
                      torch.zeros(sizes["gate_up"]), torch.zeros(4, 8, 8, dtype=sizes.get("dtype", FP32)),
                      torch.zeros(sizes["residual"]),
                      shared_weights=[torch.zeros(1, dtype=sizes.get("shared", FP32))] * 3)  # fmt: skip
