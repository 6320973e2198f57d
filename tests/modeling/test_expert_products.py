"""The experts' own products against the eager loop and against torch's grouped matmul with the kernels around it.

As in test_training_experts.py natively on a GPU, and without one in Triton's interpreter, in a process of its own.
"""

import os

import pytest
import torch

from modeling_deepseek_r1.fused import expert_products_chosen, set_expert_products
from modeling_deepseek_r1.training_experts import fused_experts, sort_pairs
from tests.modeling import test_training_experts as cases

INTERPRETED, DEVICE, FP32, BF16 = cases.INTERPRETED, cases.DEVICE, cases.FP32, cases.BF16
slow = pytest.mark.slow
runs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in test_in_the_interpreter")
if DEVICE == "cuda" or INTERPRETED:
    from modeling_deepseek_r1 import kernels_expert_products as kernels
    from modeling_deepseek_r1 import training_expert_products as products


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests below run by themselves")
def test_in_the_interpreter(interpreted):
    interpreted(__file__)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def chosen():
    before = set_expert_products(True)
    yield
    set_expert_products(before)


def small_tiles(monkeypatch, gather=True):
    """Two tiles along every side of the tiny cases, the last ones not full."""
    for name, tiles in kernels.TILES.items():
        monkeypatch.setitem(kernels.TILES, name, tiles._replace(rows=32, columns=32, depth=32, gather=gather))


def results(module, index, floats, target, pairs=None, **options):
    """The output and the gradients of `fused_experts`; `pairs`: how many of `order` it is given."""
    order, back, offsets = sort_pairs(index, module.num_experts)
    inputs = (*floats, *module.parameters())
    output = fused_experts(*floats[:2], order[:pairs], back, offsets, *module.parameters(), floats[2], **options)
    return [output, *cases.gradients(output, inputs, target)]


@runs_kernels
@pytest.mark.parametrize("experts, tokens, top_k, spread, rows", [
    (6, 40, 3, "ragged", 16), (5, 300, 1, "crowded", 2), (7, 20, 2, "foreign", 4), (3, 9, 2, "only_foreign", 4),
])  # fmt: skip
def test_schedule(monkeypatch, experts, tokens, top_k, spread, rows):
    """Every local row in one block of its expert, blocks in the order of rows; experts by size."""
    monkeypatch.setitem(kernels.TILES, "gate_up", kernels.TILES["gate_up"]._replace(rows=rows))
    order, _, offsets = sort_pairs(cases.choices(tokens, experts, top_k, spread), experts)
    plan = kernels.schedule(offsets, order.numel())
    ends = offsets.tolist()
    expected = [(expert, start, min(start + rows, end))
                for expert, (begin, end) in enumerate(zip([0, *ends], ends)) for start in range(begin, end, rows)]
    count = int(plan.table[-1])
    assert count == len(expected) <= plan.capacity
    found = plan.table[:-1].view(3, plan.capacity)[:, :count].t().tolist()
    assert [tuple(block) for block in found] == expected
    sizes = [end - begin for begin, end in zip([0, *ends], ends)]
    assert plan.by_size.tolist() == sorted(range(experts), key=lambda expert: -sizes[expert])


@runs_kernels
@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU these products serve bf16 alone")
@pytest.mark.parametrize("tokens, experts, top_k, spread, gather", [
    (35, 4, 2, "ragged", True), (9, 4, 3, "foreign", False), (2, 3, 2, "only_foreign", True),
    (0, 4, 2, "random", True), pytest.param(41, 5, 1, "crowded", True, marks=slow),
    pytest.param(80, 3, 2, "random", True, marks=slow), pytest.param(33, 6, 3, "ragged", False, marks=slow),
    pytest.param(40, 1, 1, "random", True, marks=slow),
    pytest.param(10, 9, 8, "foreign", True, marks=slow), pytest.param(1, 4, 2, "random", False, marks=slow),
])  # fmt: skip
def test_step_equals_the_loop(monkeypatch, chosen, tokens, experts, top_k, spread, gather):
    small_tiles(monkeypatch, gather)
    module, index, *floats = cases.case(tokens, experts, top_k, spread)
    target = cases.random(tokens, cases.WIDTH)
    expected = floats[2] + module(floats[0], index, floats[1])
    reference = [expected, *cases.gradients(expected, (*floats, *module.parameters()), target)]
    for mine, other in zip(results(module, index, floats, target), reference):
        assert mine.dtype == other.dtype
        cases.close(mine, other, FP32, slack=4)  # sums over up to T * K rows in another order


@runs_kernels
@pytest.mark.parametrize("gather", [True, pytest.param(False, marks=slow)])
def test_recomputed_products_are_the_same(monkeypatch, chosen, gather):
    if INTERPRETED:
        small_tiles(monkeypatch, gather)
    module, index, *floats = cases.case(7, 3, 2, "ragged", BF16)
    target = cases.random(7, cases.WIDTH)
    kept, again = (results(module, index, floats, target, recompute=recompute) for recompute in (False, True))
    assert all(torch.equal(mine, other) for mine, other in zip(kept, again))


@runs_kernels
@pytest.mark.parametrize("spread, gather", [("ragged", True), pytest.param("foreign", False, marks=slow)])
def test_bf16_equals_the_grouped_matmul(monkeypatch, chosen, spread, gather):
    if INTERPRETED:
        small_tiles(monkeypatch, gather)
    module, index, *floats = cases.case(18, 4, 2, spread, BF16)
    target = cases.random(18, cases.WIDTH)
    mine = results(module, index, floats, target)
    assert products.runs_own_products(module.gate_up_proj)
    set_expert_products(False)
    for ours, other in zip(mine, results(module, index, floats, target)):
        assert ours.dtype == other.dtype
        # Against the largest entry: sums of numbers rounded two or three times each. The interpreter cuts off.
        assert (ours.float() - other.float()).abs().max() < 2e-2 * other.float().abs().max()


@runs_kernels
@pytest.mark.parametrize("gather", [pytest.param(True, marks=slow), False])
def test_other_ranks_rows_stay_out(monkeypatch, chosen, gather):
    """Whatever stands in the memory of rows that no expert of this rank fills; `order` may also end before them."""
    if INTERPRETED:
        small_tiles(monkeypatch, gather)
    dtype = FP32 if INTERPRETED else BF16
    module, index, *floats = cases.case(6, 3, 2, "foreign", dtype)
    target, offsets = cases.random(6, cases.WIDTH), sort_pairs(index, 3)[2]
    local, calls = int(offsets[-1]), []
    assert 0 < local < index.numel()
    expected = results(module, index, floats, target)
    for mine, other in zip(results(module, index, floats, target, pairs=local), expected):
        assert torch.equal(mine, other)

    def spoil(owner, name):
        function = getattr(owner, name)

        def leaves_garbage(*args, **kwargs):
            calls.append(name)
            found = function(*args, **kwargs)
            for rows in found if isinstance(found, tuple) else (found,):
                if rows is not None and rows.shape[0] == index.numel():
                    cases.with_garbage(rows, offsets)
            return found

        monkeypatch.setattr(owner, name, leaves_garbage)

    for name in ("gate_up_product", "rows_product", "inner_gradient"):
        spoil(products, name)
    spoil(kernels, "gather_rows")
    for mine, other in zip(results(module, index, floats, target), expected):
        assert torch.equal(mine, other)
    assert len(calls) == 4 + (0 if kernels.TILES["gate_up"].gather else 2)


@slow
@runs_kernels
def test_frozen_inputs(monkeypatch, chosen):
    """Gradients of what wants one only, the same to the bit."""
    if INTERPRETED:
        small_tiles(monkeypatch)
    module, index, hidden, weights, _ = cases.case(9, 6, 3, "ragged", BF16)
    tensors, target = [hidden, weights, *module.parameters()], cases.random(9, cases.WIDTH)
    order = sort_pairs(index, 6)

    def run(*wanted):
        leaves = [tensor.detach().requires_grad_(k in wanted) for k, tensor in enumerate(tensors)]
        output = fused_experts(*leaves[:2], *order, *leaves[2:])
        return torch.autograd.grad((output.float() * target).sum(), [leaves[k] for k in wanted])

    full = run(0, 1, 2, 3)
    for wanted in ([0], [1], [3], [0, 2]):
        for k, mine in zip(wanted, run(*wanted)):
            assert torch.equal(mine, full[k])


def test_our_products_are_the_default_on_a_gpu():
    before = set_expert_products(True)
    assert before is {"0": False, "1": True}.get(os.environ.get("DEEPSEEK_R1_EXPERT_PRODUCTS"))
    if before is None:
        set_expert_products(None)
        assert expert_products_chosen(torch.device("cuda")) and not expert_products_chosen(torch.device("cpu"))
        set_expert_products(True)
    assert set_expert_products(before) is True
