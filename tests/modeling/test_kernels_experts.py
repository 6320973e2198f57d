"""The linear, router and expert kernels of fast decoding against their torch twins and the modules they stand for.

On a GPU the kernels run as they are, elsewhere in Triton's interpreter (see `interpreted` in tests/conftest.py), which
takes a millisecond for ten tensor operations: some cases are marked slow.
"""

import os

import pytest
import torch
import torch.nn.functional as F

from modeling_deepseek_r1 import decoding_experts as twins
from modeling_deepseek_r1.experts import DeepSeekR1Experts
from modeling_deepseek_r1.routing import ROUTERS
from tests.modeling.helpers import tiny_config

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in test_in_the_interpreter")
if DEVICE == "cuda" or INTERPRETED:
    from modeling_deepseek_r1 import kernels_experts, kernels_linear, kernels_routing

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
slow = pytest.mark.slow


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests below run by themselves")
def test_in_the_interpreter(interpreted):
    interpreted(__file__)


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests below run by themselves")
@slow
def test_slow_ones_in_the_interpreter(interpreted_slow):
    interpreted_slow(__file__)


def in_dots(dtype, tokens):
    """The dtype to test the kernels for lists in: Triton's interpreter takes bf16 operands of a dot for integers."""
    return torch.float16 if INTERPRETED and dtype == torch.bfloat16 and tokens > kernels_experts.FEW_TOKENS else dtype


def random(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def close(result, reference, dtype):
    """One rounding to the dtype apart, and the order of fp32 sums."""
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(result.float(), reference.float(), rtol=tolerance, atol=4 * tolerance)


# ---- linear --------------------------------------------------------------------------------------------------------


FP32, BF16 = torch.float32, torch.bfloat16


@runs_kernels
@pytest.mark.parametrize("tokens, width, counts, dtype", [
    (1, 40, (24, 9), BF16), (2, 2100, (9,), FP32), (8, 64, (20,), BF16), (5, 33, (5, 4), FP32),
    pytest.param(1, 40, (24, 9), FP32, marks=slow), pytest.param(3, 2100, (17,), BF16, marks=slow),
    pytest.param(8, 64, (70,), FP32, marks=slow), pytest.param(5, 33, (5, 4), BF16, marks=slow),
])  # fmt: skip
def test_few_rows_linear(tokens, width, counts, dtype):
    x, norm_weight = random(tokens, width, dtype=dtype, scale=3.0), random(width, dtype=dtype)
    weights = [random(count, width, dtype=dtype, scale=width**-0.5) for count in counts]
    for norm in (None, norm_weight):
        residual = random(tokens, counts[0], dtype=dtype) if len(counts) == 1 else None
        outputs, expected = ([torch.empty(tokens, n, dtype=dtype, device=DEVICE) for n in counts] for _ in range(2))
        twins.few_rows_linear_twin(x, weights, expected, norm, 1e-6, residual)
        if residual is not None:
            outputs = [residual]  # in place
        kernels_linear.few_rows_linear(x, weights, outputs, norm, 1e-6, residual)
        for result, reference in zip(outputs, expected):
            close(result, reference, dtype)


@runs_kernels
def test_few_rows_linear_keeps_tokens_apart():
    x, weight = random(4, 20), random(6, 20)
    x[2] = torch.inf
    output = torch.empty(4, 6, device=DEVICE)
    kernels_linear.few_rows_linear(x, (weight,), (output,))
    assert output[[0, 1, 3]].isfinite().all() and not output[2].isfinite().any()
    with pytest.raises(ValueError, match="9 rows"):
        kernels_linear.few_rows_linear(random(9, 20), (weight,), (output,))


# ---- routing -------------------------------------------------------------------------------------------------------

KINDS = {
    "sigmoid": (dict(n_routed_experts=6, num_experts_per_tok=3, n_group=1, topk_group=1), "sum2"),
    "sigmoid_groups": (dict(n_routed_experts=12, num_experts_per_tok=4, n_group=3, topk_group=2), "sum2"),
    "softmax": (dict(scoring_func="softmax", topk_method="greedy", n_routed_experts=7, num_experts_per_tok=3,
                     n_group=1, topk_group=1, norm_topk_prob=False), "max"),
    "softmax_groups": (dict(scoring_func="softmax", topk_method="group_limited_greedy", n_routed_experts=8,
                            num_experts_per_tok=2, n_group=2, topk_group=1), "max"),
}  # fmt: skip


def run_route(function, x, norm_weight, router, group_score, **options):
    tokens, experts = x.shape[0], router.num_experts
    normed = torch.empty_like(x)
    index = torch.empty(tokens, router.top_k, dtype=torch.int32, device=DEVICE)
    weight = torch.empty(tokens, router.top_k, device=DEVICE)
    counts = torch.zeros(experts, dtype=torch.int32, device=DEVICE)
    lists = torch.full((experts, tokens), -1, dtype=torch.int32, device=DEVICE)
    bias = router.e_score_correction_bias if router.has_bias else None
    function(
        x, norm_weight, 1e-6, router.weight, bias, normed, index, weight, counts, lists,
        "sigmoid" if router.has_bias else "softmax", router.n_group, router.topk_group, group_score, router.top_k,
        router.norm_topk_prob, router.routed_scaling_factor, **options,
    )  # fmt: skip
    return normed, index, weight, counts, lists


@runs_kernels
@pytest.mark.parametrize("kind, tokens, dtype", [
    *((kind, tokens, FP32) for kind, tokens in zip(KINDS, (9, 2, 2, 1))),
    pytest.param("sigmoid", 1, FP32, marks=slow), pytest.param("sigmoid_groups", 2, BF16, marks=slow),
])  # fmt: skip
@torch.no_grad()
def test_route(kind, tokens, dtype):
    fields, group_score = KINDS[kind]
    config = tiny_config(hidden_size=40, routed_scaling_factor=2.5, **fields)
    router = ROUTERS[config.scoring_func, config.topk_method](config).to(DEVICE, dtype)
    router.weight.normal_()
    if router.has_bias:
        router.e_score_correction_bias.normal_(-3.0, 1.0)  # biased scores below 0, where excluded experts must not win
    x, norm_weight = random(tokens, 40, dtype=dtype), random(40, dtype=dtype)
    expected = run_route(twins.route_twin, x, norm_weight, router, group_score)
    _, weights, indices = router(expected[0])
    tickets = torch.zeros(tokens, dtype=torch.int32, device=DEVICE)
    for options in ({}, {"tickets": tickets}):
        normed, index, weight, counts, lists = run_route(
            kernels_experts.route, x, norm_weight, router, group_score, **options
        )
        close(normed, expected[0], dtype)
        if dtype == torch.float32:  # else a rounding of `normed` may swap two experts
            dense = lambda w, i: torch.zeros(tokens, router.num_experts, device=DEVICE).scatter(1, i.long(), w)
            torch.testing.assert_close(dense(weight, index), dense(weights, indices), rtol=2e-5, atol=1e-6)
        check_lists(index, counts, lists, router.num_experts)
        assert (index.sort(-1).values.diff(dim=-1) > 0).all()
    assert not tickets.any()


@runs_kernels
@pytest.mark.parametrize("kind, tokens", [("sigmoid_groups", 11), ("softmax", 5)])
@torch.no_grad()
def test_route_from_given_logits(kind, tokens):
    """`choose_experts`, and on a GPU the library's product in front of it, as a step of many tokens routes."""
    fields, group_score = KINDS[kind]
    config = tiny_config(hidden_size=40, routed_scaling_factor=2.5, **fields)
    dtype = BF16 if DEVICE == "cuda" else FP32
    router = ROUTERS[config.scoring_func, config.topk_method](config).to(DEVICE, dtype)
    router.weight.normal_()
    normed, product = random(tokens, 40, dtype=dtype), None
    assert kernels_routing.has_exact_product(normed, router.weight) == (DEVICE == "cuda")
    assert not kernels_routing.has_exact_product(normed.float(), router.weight)
    logits = F.linear(normed.float(), router.weight.float())
    if DEVICE == "cuda":
        product = torch.mm(normed, router.weight.t(), out_dtype=FP32)
        torch.testing.assert_close(product, logits, rtol=1e-5, atol=1e-5)

    def choose(x, norm_weight, norm_eps, gate_weight, bias, normed, *rest):
        kernels_routing.choose_experts(logits if product is None else product, bias, *rest)

    _, index, weight, counts, lists = run_route(choose, normed, None, router, group_score)
    _, weights, indices = router(normed)
    dense = lambda w, i: torch.zeros(tokens, router.num_experts, device=DEVICE).scatter(1, i.long(), w)
    torch.testing.assert_close(dense(weight, index), dense(weights, indices), rtol=2e-5, atol=1e-6)
    check_lists(index, counts, lists, router.num_experts)


def check_lists(index, counts, lists, experts):
    flat = index.flatten().tolist()
    for expert in range(experts):
        pairs = sorted(lists[expert, : counts[expert]].tolist())
        assert pairs == [pair for pair, chosen in enumerate(flat) if chosen == expert]


@runs_kernels
@pytest.mark.parametrize("change, message", [
    ({"scoring": "tanh"}, "tanh"), ({"n_group": 5}, "n_group=5"), ({"topk_group": 1, "top_k": 4}, "top_k=4"),
])  # fmt: skip
def test_route_refuses_what_it_cannot_compute(change, message):
    options = {"scoring": "sigmoid", "n_group": 4, "topk_group": 2, "group_score": "sum2", "top_k": 3, **change}
    x, lists = random(1, 8), torch.zeros(12, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        kernels_experts.route(x, x[0], 1e-6, random(12, 8), None, x, lists, x, lists[:, 0], lists, norm_topk=True,
                              scaling=1.0, **options)  # fmt: skip


# ---- experts -------------------------------------------------------------------------------------------------------

EXPERTS, TOP_K = 6, 3


def expert_weights(hidden, inner, shared_inner, dtype):
    scale = hidden**-0.5
    shared = None
    if shared_inner:
        shared = (random(shared_inner, hidden, dtype=dtype, scale=scale),
                  random(shared_inner, hidden, dtype=dtype, scale=scale),
                  random(hidden, shared_inner, dtype=dtype, scale=shared_inner**-0.5))  # fmt: skip
    return (random(EXPERTS, 2 * inner, hidden, dtype=dtype, scale=scale),
            random(EXPERTS, hidden, inner, dtype=dtype, scale=inner**-0.5), shared)  # fmt: skip


def choices(tokens, spread):
    """(T, K) indices. random; or one expert takes all tokens while one gets none; or every other pair is foreign."""
    index = torch.rand(tokens, EXPERTS).topk(TOP_K).indices
    if spread == "crowded":
        index = (torch.arange(TOP_K) * 2).expand(tokens, TOP_K).clone()
    elif spread == "foreign":
        index = torch.where(torch.rand(tokens, TOP_K) < 0.5, EXPERTS, index)
    return index.to(DEVICE, torch.int32)


def lists_of(index, list_pairs):
    counts = torch.zeros(EXPERTS, dtype=torch.int32, device=DEVICE)
    lists = torch.zeros(EXPERTS, index.shape[0], dtype=torch.int32, device=DEVICE)
    list_pairs(index, counts, lists)
    return counts, lists


SMALL = dict.fromkeys(("gate_up", "down"), {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "STAGES": 2, "num_warps": 4})


@runs_kernels
@pytest.mark.parametrize("tokens, spread, inner, shared_inner, dtype, blocks", [
    (1, "random", 24, 48, BF16, None), (2, "foreign", 24, 30, FP32, None), (5, "random", 40, 70, FP32, SMALL),
    (33, "foreign", 24, 0, BF16, None), pytest.param(18, "crowded", 24, 30, BF16, SMALL, marks=slow),
    pytest.param(3, "crowded", 24, 0, BF16, None, marks=slow),
    pytest.param(1, "foreign", 1100, 0, BF16, None, marks=slow),
    pytest.param(5, "random", 24, 48, FP32, None, marks=slow),
    pytest.param(33, "random", 72, 0, BF16, None, marks=slow),
    pytest.param(33, "crowded", 24, 30, FP32, None, marks=slow),
    pytest.param(7, "foreign", 24, 30, BF16, None, marks=slow),
])  # fmt: skip
def test_experts(tokens, spread, inner, shared_inner, dtype, blocks):
    dtype, width = in_dots(dtype, tokens), 40 if tokens > kernels_experts.FEW_TOKENS else 20
    gate_up, down, shared = expert_weights(width, inner, shared_inner, dtype)
    normed, residual = random(tokens, width, dtype=dtype), random(tokens, width, dtype=dtype)
    index, weight = choices(tokens, spread), torch.rand(tokens, TOP_K, device=DEVICE)
    counts, lists = lists_of(index, kernels_experts.list_pairs)
    check_lists(index, counts, lists, EXPERTS)
    expected = torch.full_like(residual, torch.nan)
    arguments = (normed, gate_up, down, shared, index, weight, counts, lists, residual)
    twins.experts_forward_twin(*arguments, expected)
    output = kernels_experts.experts_forward(*arguments, torch.full_like(residual, torch.nan), blocks=blocks)
    close(output, expected, dtype)
    if spread == "crowded":
        assert torch.equal(output, kernels_experts.experts_forward(*arguments, residual.clone(), blocks=blocks))


@runs_kernels
def test_order_of_a_list_changes_nothing():
    dtype = in_dots(torch.bfloat16, 19)
    gate_up, down, shared = expert_weights(40, 24, 48, dtype)
    normed, residual = (random(19, 40, dtype=dtype) for _ in range(2))
    index, weight = choices(19, "crowded"), torch.rand(19, TOP_K, device=DEVICE)
    counts, lists = lists_of(index, kernels_experts.list_pairs)
    reverse = lists.flip(1)  # every list is full or empty
    outputs = [
        kernels_experts.experts_forward(
            normed, gate_up, down, shared, index, weight, counts, each, residual, torch.empty_like(residual),
            blocks=SMALL,
        )
        for each in (lists, reverse)
    ]  # fmt: skip
    assert torch.equal(*outputs)
    expected = twins.experts_forward_twin(
        normed, gate_up, down, shared, index, weight, counts, lists, residual, torch.empty_like(residual)
    )
    close(outputs[0], expected, dtype)
    own = F.linear(F.silu(F.linear(normed, shared[0])) * F.linear(normed, shared[1]), shared[2])
    given = kernels_experts.experts_forward(
        normed, gate_up, down, None, index, weight, counts, lists, residual, torch.empty_like(residual),
        shared_output=own, blocks=SMALL,
    )  # fmt: skip
    close(given, outputs[0], dtype)


@runs_kernels
@pytest.mark.parametrize("tokens, dtype", [(1, FP32), (20, BF16)])
@torch.no_grad()
def test_decode_experts_equals_the_loop(tokens, dtype):
    dtype = in_dots(dtype, tokens)
    experts, arguments = module_and_arguments(tokens, dtype)
    close(kernels_experts.decode_experts(experts, *arguments), experts(*arguments), dtype)


@runs_kernels
def test_decode_experts_refuses_gradients_and_other_activations():
    experts, arguments = module_and_arguments(2, torch.float32)
    with pytest.raises(ValueError, match="no gradients"):
        kernels_experts.decode_experts(experts, *arguments)
    experts.act_fn = torch.nn.GELU()
    with torch.no_grad(), pytest.raises(ValueError, match="GELU"):
        kernels_experts.decode_experts(experts, *arguments)


# ---- on the CPU, without kernels -----------------------------------------------------------------------------------


def module_and_arguments(tokens, dtype, foreign=False):
    config = tiny_config(n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K, n_group=1, topk_group=1, hidden_size=40)
    config._experts_implementation = "eager"
    experts = DeepSeekR1Experts(config)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0.0, 0.2)
    index = choices(tokens, "foreign" if foreign else "random").long()
    return experts.to(DEVICE, dtype), (random(tokens, 40, dtype=dtype), index, torch.rand(tokens, TOP_K, device=DEVICE))


@DTYPES
@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("foreign", [False, True])
def test_experts_few_tokens_equals_the_loop(tokens, dtype, foreign):
    experts, arguments = module_and_arguments(tokens, dtype, foreign)
    result = twins.experts_few_tokens(*arguments, experts)
    close(result, experts(*arguments), dtype)
    if dtype == torch.float32:
        gradients = [torch.autograd.grad(output.square().sum(), experts.parameters(), allow_unused=True)
                     for output in (result, experts(*arguments))]  # fmt: skip
        for mine, reference in zip(*gradients):
            assert (mine is None) == (reference is None)
            if mine is not None:
                close(mine, reference, dtype)


def test_experts_few_tokens_touches_chosen_experts_only():
    experts, (states, index, weights) = module_and_arguments(2, torch.float32)
    unused = [expert for expert in range(EXPERTS) if expert not in index[:1]]
    with torch.no_grad():
        experts.gate_up_proj[unused] = torch.nan
        result = twins.experts_few_tokens(states[:1], index[:1], weights[:1], experts)
    assert result.isfinite().all()


def test_twins_agree_with_the_loop():
    experts, (states, index, weights) = module_and_arguments(5, torch.float32)
    with torch.no_grad():
        output = twins.experts_forward_twin(
            states, experts.gate_up_proj, experts.down_proj, None, index, weights, None, None, None,
            torch.empty_like(states),
        )  # fmt: skip
        close(output, experts(states, index, weights), torch.float32)
