"""The router's fused training step against the modules of routing.py, twins and kernels alike.

On a GPU the kernels run natively; without one, in Triton's interpreter, by `test_in_the_interpreter`, which runs this
file once more (see `interpreted` in tests/conftest.py). There every test is one of kernels; in the process of the
suite, without a GPU, one of the twins.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from modeling_deepseek_r1 import training_routing
from modeling_deepseek_r1.routing import ROUTERS
from modeling_deepseek_r1.training_routing import fused_route, router_logits, router_logits_backward

from .helpers import tiny_config

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
GREEDY = dict(scoring_func="softmax", topk_method="greedy", n_group=1, topk_group=1)
LIMITED = dict(scoring_func="softmax", topk_method="group_limited_greedy")
# E, K, n_group, topk_group; the rest of the configuration; rows, length
CASES = {
    "plain": ((6, 3, 1, 1), dict(n_group=1), 2, 5),
    "groups": ((20, 4, 5, 2), {}, 3, 9),
    "wide": ((160, 8, 8, 3), {}, 1, 19),
    "many": ((64, 6, 1, 1), dict(router_z_loss_coef=0.0), 2, 37),
    "one": ((6, 1, 3, 1), dict(norm_topk_prob=False, seq_aux_loss_alpha=0.0), 4, 1),
    "all": ((6, 6, 2, 2), dict(seq_aux_loss_alpha=0.0, router_z_loss_coef=0.0), 1, 9),
    "greedy": ((20, 5, 1, 1), GREEDY, 2, 9),
    "limited": ((12, 2, 3, 2), dict(**LIMITED, norm_topk_prob=False), 2, 34),
}


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    torch.manual_seed(5)
    if INTERPRETED:
        monkeypatch.setattr(training_routing, "kernels_run_on", lambda device: True)


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels run by themselves")
def test_in_the_interpreter(interpreted):
    interpreted(__file__)


def make_router(case, dtype=FP32, width=24):
    (experts, top_k, groups, kept), fields, rows, length = CASES[case]
    fields = dict(seq_aux_loss_alpha=0.3, router_z_loss_coef=0.05, routed_scaling_factor=2.5) | fields
    config = tiny_config(**dict(hidden_size=width, n_routed_experts=experts, num_experts_per_tok=top_k, n_group=groups,
                                topk_group=kept) | fields)  # fmt: skip
    router = ROUTERS[config.scoring_func, config.topk_method](config).to(DEVICE, dtype)
    torch.nn.init.normal_(router.weight, std=0.3)
    if router.has_bias:
        router.e_score_correction_bias.normal_(-1.0, 1.0)  # kept scores below 0, where excluded experts must not win
    router.balance_loss_scale.fill_(7.0)
    router.load_counts.fill_(3)
    return router, torch.randn(rows, length, width).to(DEVICE, dtype).requires_grad_()


def fused(router, hidden_states, token_mask=None, routes=None):
    """What DeepSeekR1Router.forward does, by the functions under test."""
    sigmoid = router.has_bias
    logits = router_logits(hidden_states.flatten(0, -2), router.weight)
    losses = (router.balance_loss_scale, router.load_counts) if router.training else (None, None)
    weights, indices = fused_route(
        logits, router.e_score_correction_bias if sigmoid else None, *losses, hidden_states.shape[0], token_mask,
        routes, scoring="sigmoid" if sigmoid else "softmax", n_group=router.n_group, topk_group=router.topk_group,
        group_score="sum2" if sigmoid else "max", top_k=router.top_k, norm_topk=router.norm_topk_prob,
        scaling=router.routed_scaling_factor, balance_alpha=router.balance_alpha, z_loss_coef=router.z_loss_coef,
    )  # fmt: skip
    return logits, weights, indices


def outcome(function, router, hidden_states, *given):
    """Logits, (T, E) gate values, and after a backward pass both gradients and the load."""
    router.load_counts.fill_(3)
    logits, weights, indices = function(hidden_states, *given)
    assert (router.load_counts == 3).all() and indices.dtype == torch.int64
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all()
    weigh = torch.linspace(-1.0, 2.0, router.num_experts, device=DEVICE)  # the order of choices is free
    dense = torch.zeros_like(logits).scatter(1, indices, weights)
    kept_scale = router.balance_loss_scale.clone()
    router.balance_loss_scale.fill_(-50.0)  # set anew for the next step before this one's backward pass
    loss = (dense.square() * weigh).sum()
    gradients = torch.autograd.grad(loss, [hidden_states, router.weight])
    router.balance_loss_scale.copy_(kept_scale)
    return logits, dense, *gradients, router.load_counts.clone()


def assert_equal_routers(router, hidden_states, *given):
    expected = outcome(router, router, hidden_states, *given)
    result = outcome(lambda *inputs: fused(router, *inputs), router, hidden_states, *given)
    assert torch.equal(result[4], expected[4]) and result[4].sum() > 3 * router.num_experts
    for mine, reference in zip(result[:4], expected[:4]):
        assert mine.dtype == reference.dtype
        scale = reference.detach().float().abs().max().item()  # sums of numbers of this size, in another order
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=3e-6 * scale)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_modules(case):
    assert_equal_routers(*make_router(case))


@pytest.mark.parametrize("case", ["groups", "limited"])
def test_masks_and_routes(case):
    router, hidden_states = make_router(case)
    rows, length, _ = hidden_states.shape
    mask = torch.rand(rows, length, device=DEVICE) < 0.6
    mask[1] = False  # no sequence at all
    routes = torch.rand(rows, length, router.num_experts).argsort(-1)[..., : router.top_k].to(DEVICE, torch.int16)
    routes[torch.rand(rows, length) < 0.4] = -1
    assert_equal_routers(router, hidden_states, mask)
    for given in ((mask, routes), (None, routes)):
        expected = outcome(lambda x, m, r: router(x, m, routes=r), router, hidden_states, *given)
        result = outcome(lambda *inputs: fused(router, *inputs), router, hidden_states, *given)
        for mine, reference in zip(result, expected):
            torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


def test_nothing_counted_without_training():
    router, hidden_states = make_router("groups")
    with torch.no_grad():
        fused(router, hidden_states)
    router.eval()
    expected, result = router(hidden_states), fused(router, hidden_states)
    gradients = [torch.autograd.grad(w.square().sum(), hidden_states)[0] for _, w, _ in (expected, result)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    assert (router.load_counts == 3).all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_counted_once_under_checkpointing(reentrant):
    router, hidden_states = make_router("plain")
    expected = outcome(lambda x: fused(router, x), router, hidden_states)[-1]
    router.load_counts.fill_(3)
    weights = checkpoint(lambda x: fused(router, x)[1], hidden_states, use_reentrant=reentrant)
    assert (router.load_counts == 3).all()
    weights.sum().backward()
    assert torch.equal(router.load_counts, expected) and expected.sum() == 3 * 6 + 10 * 3


def test_no_tokens_and_frozen_parts():
    router, hidden_states = make_router("plain")
    for nothing in (hidden_states[:, :0], hidden_states[:0]):
        _, weights, indices = fused(router, nothing)
        weights.sum().backward()
        assert indices.shape == (0, 3) and not router.weight.grad.any() and (router.load_counts == 3).all()
    router.weight.grad = None
    router.weight.requires_grad_(False)
    fused(router, hidden_states)[1].sum().backward()
    assert router.weight.grad is None and hidden_states.grad.any()
    assert router.load_counts.sum() == 3 * 6 + 10 * 3


@pytest.mark.parametrize("value", [0.0, 40.0, -torch.inf, torch.inf, torch.nan])
def test_no_expert_is_chosen_twice(value):
    """Ties, saturated scores, and whatever else: an expert chosen twice would be a token lost."""
    rule = dict(scoring="sigmoid", group_score="sum2", norm_topk=True, scaling=1.0)
    logits, bias = torch.full((3, 12), value, device=DEVICE), torch.full((12,), -torch.inf, device=DEVICE)
    for groups, kept, offsets in ((1, 1, None), (3, 2, None), (3, 2, bias)):
        indices = fused_route(logits, offsets, None, None, 1, n_group=groups, topk_group=kept, top_k=7, **rule)[1]
        assert (indices.sort(-1).values.diff(dim=-1) > 0).all() and (0 <= indices).all() and (indices < 12).all()


@pytest.mark.parametrize("change, message", [
    ({"scoring": "tanh"}, "tanh"), ({"n_group": 5}, "n_group=5"), ({"topk_group": 1, "top_k": 4}, "top_k=4"),
    ({"n_group": 12, "topk_group": 12}, "use 'max'"), ({"rows": 4}, "rows=4"),
])  # fmt: skip
def test_refuses_what_it_cannot_compute(change, message):
    rule = dict(rows=2, scoring="sigmoid", n_group=4, topk_group=2, group_score="sum2", top_k=3, norm_topk=True,
                scaling=1.0)  # fmt: skip
    with pytest.raises(ValueError, match=message):
        fused_route(torch.zeros(6, 12), None, None, None, **(rule | change))
    with pytest.raises(ValueError, match="float64"):
        router_logits(torch.zeros(2, 4, dtype=torch.float64), torch.zeros(3, 4))


@pytest.mark.parametrize("tokens, width, experts, hidden_dtype, weight_dtype", [
    (70, 200, 20, BF16, FP32), (130, 72, 80, BF16, BF16), (259, 40, 6, FP32, FP32), (17, 72, 20, FP16, FP16),
    (33, 1024, 20, BF16, FP32), (5, 136, 160, FP32, BF16),
])  # fmt: skip
def test_logits_are_as_exact_as_in_fp32(tokens, width, experts, hidden_dtype, weight_dtype):
    """Against float64. Rounding to bf16 instead is 2e-3 off, one bf16 part too few 1e-5."""
    hidden_states = torch.randn(tokens, width).to(DEVICE, hidden_dtype).requires_grad_()
    weight = torch.randn(experts, width).to(DEVICE, weight_dtype).requires_grad_()
    grad = torch.randn(tokens, experts).to(DEVICE)
    exact_hidden, exact_weight = hidden_states.detach().double(), weight.detach().double()
    logits = router_logits(hidden_states, weight)
    result = logits, *torch.autograd.grad(logits, (hidden_states, weight), grad)
    expected = exact_hidden @ exact_weight.t(), grad.double() @ exact_weight, grad.double().t() @ exact_hidden
    for mine, reference, dtype in zip(result, expected, (FP32, hidden_dtype, weight_dtype)):
        assert mine.dtype == dtype
        error = ((mine.double() - reference).norm() / reference.norm()).item()
        # fp32 sums, which tensor cores cut off instead of rounding them (up to 1e-7 for each 16 columns); else one
        # rounding of the result, which the interpreter cuts off.
        assert error < {FP32: 4e-6 if DEVICE == "cuda" else 1e-6, BF16: 2**-8, FP16: 2**-11}[dtype]
    under_autocast = torch.autocast(DEVICE, BF16)
    with under_autocast:
        torch.testing.assert_close(router_logits(hidden_states, weight), logits, rtol=0, atol=0)


def test_gradient_onto_another():
    shapes = (9, 40), (6, 40), (9, 6), (9, 40)
    hidden_states, weight, grad, base = (torch.randn(*shape).to(DEVICE) for shape in shapes)
    result, none = router_logits_backward(grad, hidden_states, weight, need_weight=False, base=base)
    assert none is None
    torch.testing.assert_close(result, base + F.linear(grad, weight.t()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_logits_that_pass_their_input_on(dtype):
    """The other reader's gradient is added in the kernel, in fp32; the logits are those without."""
    hidden_states, weight = (torch.randn(*shape).to(DEVICE, dtype).requires_grad_() for shape in ((9, 40), (6, 40)))
    logits, passed = router_logits(hidden_states, weight, passes_on=True)
    assert torch.equal(logits, router_logits(hidden_states, weight)) and torch.equal(passed, hidden_states)
    outer = torch.randn_like(logits), torch.randn_like(passed)
    found = torch.autograd.grad((logits, passed), (hidden_states, weight), outer)
    expected = torch.autograd.grad(router_logits(hidden_states, weight), (hidden_states, weight), outer[0])
    assert torch.equal(found[1], expected[1])
    tolerance = 2**-6 if dtype == BF16 else 1e-5  # two roundings to bf16 against one, cut off in the interpreter
    torch.testing.assert_close(found[0], expected[0] + outer[1], rtol=tolerance, atol=tolerance)
    _, passed = router_logits(hidden_states, weight, passes_on=True)
    alone = torch.autograd.grad(passed, (hidden_states, weight), outer[1], allow_unused=True)
    assert torch.equal(alone[0], outer[1]) and alone[1] is None
