"""FusedAdamW against torch's AdamW with clipping, Muon against torch's on each matrix.

The AdamW kernel runs natively on a GPU, else in Triton's interpreter (see `interpreted` in tests/conftest.py); the
other tests run everywhere.
"""

import copy
import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modeling_deepseek_r1.compute_copies import in_dtype
from recipes import kernels_adamw
from recipes.kernels_adamw import adamw_, adamw_lists_, coefficients
from recipes.optimizers import FusedAdamW, MuonAdamW, gradient_norm, orthogonalise

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in test_in_the_interpreter")
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests below run by themselves")
def test_in_the_interpreter(interpreted):
    interpreted(__file__)


# ---- the update ----------------------------------------------------------------------------------------------------


def one_step_inputs(count, dtype, gradient_dtype=None):
    make = lambda scale, kind=dtype: (torch.randn(count) * scale).to(DEVICE, kind)
    return make(1.0), make(0.1, gradient_dtype or dtype), make(0.1), make(0.1).square()


@runs_kernels
@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("count, dtype, gradient_dtype", [
    (2 * 2048 + 5, FP32, None), (640, BF16, None), (2049, BF16, FP32), (960, torch.float16, None),
])  # fmt: skip
def test_kernel_equals_its_twin(count, dtype, gradient_dtype, clipped):
    tensors = one_step_inputs(count, dtype, gradient_dtype)
    ours, twin = ([x.clone() for x in tensors] for _ in range(2))
    clip = torch.tensor(0.37, device=DEVICE) if clipped else None
    numbers = coefficients(1e-2, 0.9, 0.95, 1e-8, 0.1, 3)
    version = ours[0]._version
    adamw_(*ours, clip, **numbers)
    adamw_lists_(*([x] for x in twin), clip, **numbers)
    assert ours[0]._version > version  # what was made from the old weights can tell
    # fp32 sums in another order; rounded to a narrower dtype that may end one step apart, though seldom does, except
    # in Triton's interpreter, which cuts bf16 off where the GPU rounds
    seldom = 0.01 if dtype != FP32 and not (INTERPRETED and dtype == BF16) else 1.0
    tolerance = {FP32: 1e-6, BF16: 2**-7, torch.float16: 2**-10}[dtype]
    for found, expected, before in zip(ours, twin, tensors):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-7)
        assert (found != expected).float().mean() <= seldom
        assert found.data_ptr() != before.data_ptr()
    assert torch.equal(ours[1], tensors[1]) and torch.equal(twin[1], tensors[1])  # gradients stay as they are


@runs_kernels
@pytest.mark.parametrize("count", [2 * 2048 + 5, 640])
def test_kernel_writes_the_copy_and_reads_bf16_gradients(count):
    """Of an fp32 weight: the same step to the last bit as with the gradient in fp32, and what torch's cast gives."""
    weight, gradient, *moments = one_step_inputs(count, FP32, BF16)
    weight[:4] = torch.tensor([torch.inf, torch.nan, 1e-40, -0.0])
    copy_of, flag = weight.bfloat16(), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    narrow = [weight.clone(), gradient, *(each.clone() for each in moments)]
    wide = [weight.clone(), gradient.float(), *(each.clone() for each in moments)]
    numbers, clip = coefficients(1e-2, 0.9, 0.95, 1e-8, 0.1, 3), torch.tensor(0.37, device=DEVICE)
    version = copy_of._version
    adamw_(*narrow, clip, None, copy_of, (flag, 0), **numbers)
    adamw_(*wide, clip, **numbers)
    same = lambda a, b: torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    assert all(same(found.float(), expected) for found, expected in zip(narrow, wide))
    assert same(copy_of, narrow[0].bfloat16()) and copy_of._version > version and flag.item() == 0


@runs_kernels
def test_kernel_notices_weights_changed_without_a_trace():
    tensors, numbers = one_step_inputs(3 * 1024, FP32, BF16), coefficients(1e-2, 0.9, 0.95, 1e-8, 0.1, 3)
    copy_of = tensors[0].bfloat16()
    tensors[0][1500] += 1.0  # in the second block
    flags = []
    for turn in (0, 1, 2, 64, 65):
        flags.append(torch.zeros(1, dtype=torch.int32, device=DEVICE))
        adamw_(*(each.clone() for each in tensors), None, None, copy_of.clone(), (flags[-1], turn), **numbers)
    assert [flag.item() for flag in flags] == [0, 1, 0, 0, 1]


@runs_kernels
def test_kernel_rounds_stochastically_like_its_twin():
    tensors = one_step_inputs(3000, BF16)
    tensors[0][:3] = torch.tensor([torch.inf, torch.nan, 0.0])
    numbers = coefficients(1e-3, 0.9, 0.95, 1e-8, 0.0, 1)
    runs = []
    for seed in (5, 5, 6):
        runs.append([x.clone() for x in tensors])
        adamw_(*runs[-1], None, seed, **numbers)
    twin = [x.clone() for x in tensors]
    adamw_lists_(*([x] for x in twin), None, [5], **numbers)
    equal = lambda a, b: ((a == b) | (a.isnan() & b.isnan())).float().mean()
    assert equal(runs[0][0], runs[1][0]) == 1 and equal(runs[0][0], twin[0]) > 0.999  # another order of fp32 sums
    assert 0.05 < 1 - equal(runs[0][0], runs[2][0]) < 0.9
    assert runs[0][0][0] == torch.inf and runs[0][0][1].isnan()


def test_stochastic_rounding_is_right_in_the_mean():
    """1 + 2^-11 lies an eighth of the way to bf16's next number, and rounding to nearest always loses it."""
    values = torch.full((40_000,), 1 + 2**-11) * 2.0
    found = torch.cat([kernels_adamw._rounded(values, seed) for seed in (1, 2, 3)])
    assert torch.equal(found, found.bfloat16().float())
    assert found.unique().tolist() == [2.0, 2 + 2**-6]
    share = (found > 2).float().mean().item()
    assert abs(share - 1 / 16) < 6 * (1 / 16 * 15 / 16 / 120_000) ** 0.5  # six standard errors
    assert torch.equal(kernels_adamw._rounded(-values, 1), -kernels_adamw._rounded(values, 1))


SHAPES = [(40, 3), (17,), (2, 8, 5), (300, 31)]


def parameters(dtype=FP32, device=DEVICE):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]


def run_steps(optimizer, weights, steps, max_norm, first=0, ours=True):
    """Norms of `steps` steps on gradients that are the same for every optimizer."""
    norms = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for weight in weights:
            gradient = torch.randn(weight.shape, generator=generator) * (1 + step % 3)
            weight.grad = gradient.to(weight.device, weight.dtype)
        if max_norm and ours:
            norms.append(optimizer.clip_gradients(weights, max_norm))
        elif max_norm:
            norms.append(nn.utils.clip_grad_norm_(weights, max_norm))
        optimizer.step()
    return norms


def groups_of(weights):
    return [{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:], "weight_decay": 0.0, "lr": 3e-3}]


OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}


@pytest.mark.parametrize("count, dtype, expected", [
    (1 << 16, FP32, True), (1024, FP32, False), (1024, BF16, True), (0, BF16, False),
])  # fmt: skip
def test_who_updates_a_weight(count, dtype, expected):
    weight = torch.zeros(count, dtype=dtype)
    assert not kernels_adamw.has_kernel(weight)
    on_a_gpu = SimpleNamespace(is_cuda=True, **{name: getattr(weight, name) for name in
                                                ("numel", "element_size", "is_contiguous")})  # fmt: skip
    assert kernels_adamw.has_kernel(on_a_gpu) == expected


@pytest.mark.parametrize("max_norm", [1.0, 1000.0, 0.0])
@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=runs_kernels)])
def test_twenty_steps_equal_torch(kernel, max_norm, monkeypatch):
    monkeypatch.setattr(kernels_adamw, "LEAST_ELEMENTS", 0 if kernel else 1 << 30)
    if kernel and INTERPRETED:
        monkeypatch.setattr("recipes.optimizers.has_kernel", lambda weight: True)
    ours, theirs = parameters(), parameters()
    fused = FusedAdamW(groups_of(ours), **OPTIONS)
    plain = torch.optim.AdamW(groups_of(theirs), foreach=False, **OPTIONS)
    norms = run_steps(fused, ours, 20, max_norm), run_steps(plain, theirs, 20, max_norm, ours=False)
    for found, expected in zip(*norms):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for found, expected in zip(ours, theirs):
        assert (found - expected).norm() < 1e-6 * expected.norm()
        for name in ("exp_avg", "exp_avg_sq", "step"):
            state, other = fused.state[found][name].cpu(), plain.state[expected][name].cpu()
            torch.testing.assert_close(state, other, rtol=5e-6, atol=2e-7)  # sums of numbers near 1 may cancel


@pytest.mark.parametrize("start, then", [("ours", "ours"), ("ours", "torch"), ("torch", "ours"), ("fused", "ours")])
def test_state_moves_between_our_adamw_and_torchs(start, then):
    make = {
        "ours": lambda weights: FusedAdamW(groups_of(weights), **OPTIONS),
        "torch": lambda weights: torch.optim.AdamW(groups_of(weights), **OPTIONS),
        "fused": lambda weights: torch.optim.AdamW(groups_of(weights), fused=True, **OPTIONS),
    }
    weights, through = parameters(), parameters()
    run_steps(make["torch"](through), through, 7, 0.5, ours=False)
    optimizer = make[start](weights)
    run_steps(optimizer, weights, 4, 0.5, ours=start == "ours")
    resumed = make[then](weights)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.param_groups[1]["lr"] == 3e-3
    run_steps(resumed, weights, 3, 0.5, first=4, ours=then == "ours")
    for found, expected in zip(weights, through):
        assert (found - expected).norm() < 2e-6 * expected.norm()


@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=runs_kernels)])
def test_copies_and_bf16_gradients_change_no_number(kernel, monkeypatch):
    monkeypatch.setattr(kernels_adamw, "LEAST_ELEMENTS", 0 if kernel else 1 << 30)
    if kernel and INTERPRETED:
        monkeypatch.setattr("recipes.optimizers.has_kernel", lambda weight: True)
    runs = []
    for copies in (True, False):
        weights, found = parameters(), []
        optimizer = FusedAdamW(weights, lr=1e-2, compute_copies=copies)
        for step in range(3):
            torch.manual_seed(step)
            factors = [torch.randn(weight.shape).to(DEVICE, BF16) for weight in weights]
            sum((in_dtype(w, BF16) * factor).float().sin().sum() for w, factor in zip(weights, factors)).backward()
            assert {w.grad.dtype for w in weights} == {BF16 if copies else FP32}
            found.append(optimizer.clip_gradients(weights, 0.5).item())
            optimizer.step()
            optimizer.zero_grad()
        if copies:
            assert all(torch.equal(optimizer.copies.take(w), w.bfloat16()) for w in weights)
        runs.append((found, weights))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1]))


@runs_kernels
def test_a_weight_changed_without_a_trace_stops_the_run(monkeypatch):
    monkeypatch.setattr(kernels_adamw, "CHECKED", 1)
    monkeypatch.setattr("recipes.optimizers.has_kernel", lambda weight: True)
    weight = nn.Parameter(torch.randn(40, 30, device=DEVICE))
    optimizer = FusedAdamW([weight], lr=1e-2, compute_copies=True)

    def step():
        in_dtype(weight, BF16).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize() if DEVICE == "cuda" else None

    step()
    step()
    weight.data.mul_(1.5)
    step()
    with pytest.raises(RuntimeError, match=r"weight\.data\.mul_.*compute_copies=false"):
        step()


def test_copies_are_for_one_process(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="this group has 2"):
        FusedAdamW([nn.Parameter(torch.ones(3))], compute_copies=True)


def test_muon_takes_copies_of_adamws_weights_only():
    matrix, other = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(5, 6))
    optimizer = MuonAdamW([{"params": [matrix], "muon": True}, {"params": [other]}], lr=0.01, compute_copies=True)
    for _ in range(2):
        (in_dtype(matrix, BF16).float().sum() + in_dtype(other, BF16).float().sum()).backward()
        assert (matrix.grad.dtype, other.grad.dtype) == (FP32, BF16)
        optimizer.clip_gradients([matrix, other], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(optimizer.copies.take(other), other.bfloat16()) and optimizer.copies.take(matrix) is None


def test_bf16_weights_round_once_a_step():
    """One step from bf16 numbers: the fp32 step on the same numbers, rounded."""
    narrow = parameters(BF16)
    wide = [nn.Parameter(weight.detach().float()) for weight in narrow]
    gradients = [torch.randn_like(weight) for weight in narrow]
    for weights in (narrow, wide):
        for weight, gradient in zip(weights, gradients):
            weight.grad = gradient.to(weight.dtype)
        optimizer = FusedAdamW(weights, lr=1e-2, weight_decay=0.1)
        norm = optimizer.clip_gradients(weights, 1.0)
        assert norm.dtype == FP32
        optimizer.step()
    for found, expected in zip(narrow, wide):
        assert (found == expected.bfloat16()).float().mean() > 0.998  # the norms may differ in their last bits


def test_stochastic_rounding_keeps_small_updates_and_repeats():
    results = {}
    for name, options in {"nearest": {}, "a": {"stochastic_rounding": True}, "b": {"stochastic_rounding": True},
                          "other seed": {"stochastic_rounding": True, "seed": 1}}.items():  # fmt: skip
        weight = nn.Parameter(torch.ones(2000, dtype=BF16, device=DEVICE))
        optimizer = FusedAdamW([weight], lr=1e-4, weight_decay=0.0, **options)
        for _ in range(20):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        results[name] = weight.detach().float()
    assert (results["nearest"] == 1).all()  # a step of 1e-4 is below half of bf16's 2^-8
    assert abs(results["a"].mean().item() - (1 - 20e-4)) < 3e-4
    assert torch.equal(results["a"], results["b"]) and not torch.equal(results["a"], results["other seed"])


def test_a_gradient_scaler_unscales_before_our_step():
    ours, theirs = parameters(device="cpu"), parameters(device="cpu")
    for weights, make in ((ours, FusedAdamW), (theirs, torch.optim.AdamW)):
        optimizer, scaler = make(weights, lr=1e-2), torch.amp.GradScaler("cpu", init_scale=256.0)
        for factor in (1.0, float("inf"), 2.0):  # the second step overflows and must be left out
            for weight in weights:
                weight.grad = torch.ones_like(weight) * 256.0 * factor
            scaler.scale(torch.zeros(()))  # as a loss would be
            scaler.unscale_(optimizer)
            if make is FusedAdamW:
                optimizer.clip_gradients(weights, 1.0)
            else:
                nn.utils.clip_grad_norm_(weights, 1.0)
            scaler.step(optimizer)
            scaler.update(256.0)
    for found, expected in zip(ours, theirs):
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_what_is_refused():
    weight = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="lr is a tensor"):
        FusedAdamW([weight], lr=torch.tensor(0.1))
    for name in ("amsgrad", "maximize"):
        with pytest.raises(ValueError, match=name):
            FusedAdamW([weight]).load_state_dict(torch.optim.AdamW([weight], **{name: True}).state_dict())
    with pytest.raises(ValueError, match="muon_adjust_lr='x'"):
        MuonAdamW([weight], adjust_lr_fn="x")
    with pytest.raises(ValueError, match="muon_momentum=1.0"):
        MuonAdamW([weight], momentum=1.0)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        MuonAdamW([{"params": [weight], "muon": True}])
    with pytest.raises(ValueError, match="not Muon"):
        muon = MuonAdamW([{"params": [nn.Parameter(torch.ones(3, 2))], "muon": True}])
        muon.load_state_dict(FusedAdamW([weight]).state_dict())
    assert gradient_norm([weight]) == 0


# ---- Muon ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, columns", [(24, 40), (40, 24), (32, 32)])
def test_orthogonal_updates(rows, columns):
    """Singular values near 1 (Newton-Schulz with these coefficients ends within about 0.7 .. 1.2), vectors kept."""
    matrices = torch.randn(6, rows, columns, device=DEVICE) * torch.logspace(-3, 3, 6, device=DEVICE)[:, None, None]
    found = orthogonalise(matrices).float()
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    inside = left.mT @ found @ right.mT
    strong = (values / values[:, :1]) > 0.1  # weak directions need more than five steps
    diagonal = inside.diagonal(dim1=-2, dim2=-1)
    assert diagonal[strong].min() > 0.6 and diagonal.max() < 1.35
    assert (inside - torch.diag_embed(diagonal)).abs().max() < 0.05  # bf16


@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("slices", [1, 3])
def test_each_expert_equals_torchs_muon_alone(adjust_lr_fn, slices, monkeypatch):
    experts, inner, hidden = 6, 12, 20
    if slices == 3:
        monkeypatch.setattr("recipes.optimizers.MUON_ELEMENTS", 2 * 2 * inner * hidden)
    gate_up, down = torch.randn(experts, 2 * inner, hidden), torch.randn(experts, hidden, inner)
    dense = torch.randn(14, 9)
    ours = [nn.Parameter(x.clone().to(DEVICE)) for x in (gate_up, down, dense)]
    optimizer = MuonAdamW(
        [{"params": ours[1:], "muon": True}, {"params": ours[:1], "muon": True, "stacked": 2}], lr=0.02,
        weight_decay=0.1, adjust_lr_fn=adjust_lr_fn,
    )  # fmt: skip
    alone = [x.clone().to(DEVICE) for x in (*gate_up[:, :inner], *gate_up[:, inner:], *down, dense)]
    alone = [nn.Parameter(x.contiguous()) for x in alone]
    plain = torch.optim.Muon(alone, lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust_lr_fn)
    for _ in range(4):
        gradients = [torch.randn_like(x) for x in ours]
        for weight, gradient in zip(ours, gradients):
            weight.grad = gradient
        one = gradients[0]
        for weight, gradient in zip(alone, (*one[:, :inner], *one[:, inner:], *gradients[1], gradients[2])):
            weight.grad = gradient.contiguous()
        optimizer.step()
        plain.step()
    found = (*ours[0][:, :inner], *ours[0][:, inner:], *ours[1], ours[2])
    for result, weight, before in zip(found, alone, (*gate_up[:, :inner], *gate_up[:, inner:], *down, dense)):
        moved = (weight - before.to(DEVICE)).norm()
        assert moved > 0.05 and (result - weight).norm() < 0.02 * moved  # bf16 products in another order


def test_muon_clips_its_gradients():
    weights = [nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(3, 8, 6))]
    optimizer = MuonAdamW([{"params": weights, "muon": True}], lr=0.01)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    norm = optimizer.clip_gradients(weights, 0.5)
    optimizer.step()
    for weight in weights:
        expected = 0.05 * weight.grad * 0.5 / norm
        torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], expected, rtol=1e-5, atol=1e-7)


def test_schedules_scale_every_group():
    from transformers import get_cosine_schedule_with_warmup

    weights = parameters()
    optimizer = MuonAdamW([{"params": weights[:1], "muon": True, "lr": 0.1}, {"params": weights[1:]}], lr=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, 10)
    for _ in range(5):
        run_steps(optimizer, weights, 1, 1.0)
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.005])


def test_copies_and_foreign_rates_go_on_stepping():
    weight = nn.Parameter(torch.ones(4, device=DEVICE))
    weight.grad = torch.ones_like(weight)
    optimizer = FusedAdamW([weight], lr=0.5)
    optimizer.load_state_dict(torch.optim.AdamW([weight], lr=torch.tensor(0.25)).state_dict())
    twin = copy.deepcopy(optimizer)
    for each in (optimizer, twin):
        each.param_groups[0]["params"][0].grad = torch.ones_like(weight)
        each.step()
    assert optimizer.param_groups[0]["lr"] == 0.25 and weight[0] < 0.8
    assert torch.equal(twin.param_groups[0]["params"][0], weight)
