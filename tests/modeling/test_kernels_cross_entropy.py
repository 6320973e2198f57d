"""The cross-entropy kernel against its torch twin and against torch's cross_entropy, forward and gradients.

On a GPU the kernels run natively. Without one they run in Triton's interpreter, in a process of its own
(see `interpreted` in tests/conftest.py).
"""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modeling_deepseek_r1 import kernels_cross_entropy as kernels
from modeling_deepseek_r1 import losses as losses_module
from modeling_deepseek_r1.losses import linear_cross_entropy

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in test_in_the_interpreter")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
STEP = {FP32: 2e-7, BF16: 2**-8, FP16: 2**-11}  # relative rounding error


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests below run by themselves")
def test_in_the_interpreter(interpreted):
    interpreted(__file__)


@pytest.fixture
def through_kernels(monkeypatch):
    """`linear_cross_entropy` takes the kernels' way, in the interpreter too."""
    monkeypatch.setattr(losses_module, "has_kernels", lambda tensor: True)


def scores_and_labels(tokens, vocab, dtype, ignored=0.3):
    logits = (4.0 * torch.randn(tokens, vocab)).to(DEVICE, dtype)
    labels = torch.randint(0, vocab, (tokens,)).masked_fill(torch.rand(tokens) < ignored, -100)
    labels[:2] = torch.tensor([0, vocab - 1])[:tokens]  # the first and the last column
    return logits, labels.to(DEVICE)


@runs_kernels
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tokens, vocab, dtype", [
    (7, 53, FP32), (3, 64, BF16), (5, 9001, FP32), (4, 8192, FP16), (2, 3, FP32),
])  # fmt: skip
def test_rows_equal_their_twin(tokens, vocab, dtype, smoothing):
    logits, labels = scores_and_labels(tokens, vocab, dtype)
    if vocab == 53:
        logits[:, 50:] += 40.0  # the maximum in the last lanes, next to masked ones
        logits[2, 1:] = -torch.inf
        labels[2] = 0  # a row with one column above -inf
    if vocab == 9001:
        logits[:, 8500:] += 30.0  # the maximum in the second block: what the first one summed must shrink
        logits[:, :8192] += 19.0
    smoothing = 0.0 if vocab == 53 else smoothing
    ours, twin = logits.clone(), logits.clone()
    found, expected = (torch.empty(tokens, device=DEVICE) for _ in range(2))
    kernels.cross_entropy_rows(ours, labels, found, True, smoothing)
    kernels.cross_entropy_rows_twin(twin, labels, expected, True, smoothing)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
    # One place of the dtype apart: fp32 values that differ in the last bits may round to neighbours.
    torch.testing.assert_close(ours.float(), twin.float(), rtol=2e-6 + 2 * STEP[dtype], atol=1e-6)
    assert (ours[labels == -100] == 0).all()
    kept = logits.clone()
    kernels.cross_entropy_rows(kept, labels, expected, False, smoothing)
    assert torch.equal(kept, logits)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@runs_kernels
def test_rows_of_a_slice_leave_the_rest_alone():
    logits, labels = scores_and_labels(4, 80, FP32, 0.0)
    wide = logits.clone()
    found, expected = torch.empty(4, device=DEVICE), torch.empty(4, device=DEVICE)
    kernels.cross_entropy_rows(wide[:, :48], labels % 48, found, True)
    part = logits[:, :48].clone()
    kernels.cross_entropy_rows_twin(part, labels % 48, expected, True)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(wide[:, :48], part, rtol=2e-6, atol=1e-6)
    assert torch.equal(wide[:, 48:], logits[:, 48:])
    kernels.cross_entropy_rows(logits[:0], labels[:0], found[:0], True)


@runs_kernels
@pytest.mark.parametrize("label", [64, 10**12, -1])
def test_a_label_outside_the_vocabulary_gives_nan(label):
    logits, labels = scores_and_labels(3, 64, FP32, 0.0)
    labels[1], found = label, torch.empty(3, device=DEVICE)
    kernels.cross_entropy_rows(logits, labels, found, True)
    assert found.isnan().tolist() == [False, True, False]


@runs_kernels
def test_not_a_number_stays_one():
    logits, labels = scores_and_labels(2, 64, FP32, 0.0)
    logits[0, 3], found = torch.nan, torch.empty(2, device=DEVICE)
    kernels.cross_entropy_rows(logits, labels, found, True)
    assert found.isnan().tolist() == [True, False] and logits[0].isnan().all() and logits[1].isfinite().all()


def head_inputs(dtype, tokens=11, width=16, vocab=53, ignored=0.3):
    hidden = torch.randn(tokens, width).to(DEVICE, dtype).requires_grad_()
    head = nn.Linear(width, vocab, bias=False)
    nn.init.normal_(head.weight, std=0.5)
    labels = torch.randint(0, vocab, (tokens,)).masked_fill(torch.rand(tokens) < ignored, -100)
    return hidden, head.to(DEVICE, dtype), labels.to(DEVICE)


def plain(hidden, head, labels, smoothing=0.0):
    states, weight = (x.detach().float().requires_grad_() for x in (hidden, head.weight))
    each = F.cross_entropy(states @ weight.T, labels, reduction="none", label_smoothing=smoothing)
    return (each.detach(), *torch.autograd.grad(each.sum(), (states, weight)))


@runs_kernels
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("dtype, smoothing", [(FP32, 0.1), (BF16, 0.0), (FP16, 0.0)])
def test_linear_cross_entropy(dtype, smoothing, chunks, through_kernels, monkeypatch):
    hidden, head, labels = head_inputs(dtype)
    if chunks == 2:
        monkeypatch.setattr(kernels, "fused_chunk_rows", lambda *_: 8)  # and 3 rows
    each, grad_hidden, grad_weight = plain(hidden, head, labels, smoothing)
    total, per_token = linear_cross_entropy(hidden, head, labels, smoothing)
    step = STEP[dtype]  # of logits up to about 8 in magnitude, and of their gradients
    torch.testing.assert_close(per_token, each, rtol=4 * step + 1e-5, atol=8 * step + 1e-5)
    (3.0 * total).backward()
    for gradient, expected in ((hidden.grad, grad_hidden), (head.weight.grad, grad_weight)):
        assert gradient.dtype == dtype
        assert (gradient.float() - 3.0 * expected).norm() < (4 * step + 1e-5) * 3.0 * expected.norm()
    with torch.no_grad():
        evaluated = linear_cross_entropy(hidden, head, labels, smoothing)
    torch.testing.assert_close(evaluated[1], per_token, rtol=1e-6, atol=1e-6)
    assert torch.equal(hidden.grad, run_again(hidden, head, labels, smoothing))


def run_again(hidden, head, labels, smoothing):
    total, _ = linear_cross_entropy(hidden, head, labels, smoothing)
    return torch.autograd.grad(3.0 * total, hidden)[0]


@runs_kernels
@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_only_what_is_trained_gets_a_gradient(trained, through_kernels):
    hidden, head, labels = head_inputs(FP32)
    _, grad_hidden, grad_weight = plain(hidden, head, labels)
    hidden.requires_grad_(trained == "hidden")
    head.weight.requires_grad_(trained == "weight")
    linear_cross_entropy(hidden, head, labels)[0].backward()
    if trained == "hidden":
        torch.testing.assert_close(hidden.grad, grad_hidden, rtol=1e-5, atol=1e-5)
        assert head.weight.grad is None
    else:
        torch.testing.assert_close(head.weight.grad, grad_weight, rtol=1e-5, atol=1e-5)
        assert hidden.grad is None


@runs_kernels
def test_fp32_weights_under_autocast(through_kernels):
    hidden, head, labels = head_inputs(FP32)
    each, grad_hidden, grad_weight = plain(hidden, head, labels)
    with torch.autocast(DEVICE, BF16):
        total, per_token = linear_cross_entropy(hidden, head, labels)
    total.backward()
    torch.testing.assert_close(per_token, each, rtol=4 * 2**-8, atol=8 * 2**-8)
    assert not torch.equal(per_token, each)  # it did compute in bf16
    for gradient, expected in ((hidden.grad, grad_hidden), (head.weight.grad, grad_weight)):
        assert gradient.dtype == FP32 and (gradient - expected).norm() < 4 * 2**-8 * expected.norm()


@runs_kernels
def test_a_loss_scale_of_fp16_does_not_underflow(through_kernels):
    """The factor of the backward is 6.5e-5, a subnormal number of fp16: it must be multiplied with in fp32."""
    hidden, head, labels = head_inputs(FP16, ignored=0.0)
    _, grad_hidden, grad_weight = plain(hidden, head, labels)
    (2.0**16 * (linear_cross_entropy(hidden, head, labels)[0] / 1e9)).backward()
    for gradient, expected in ((hidden.grad, grad_hidden), (head.weight.grad, grad_weight)):
        assert (gradient.float() / (2.0**16 / 1e9) - expected).norm() < 0.01 * expected.norm()


@runs_kernels
@pytest.mark.parametrize("source, target", [(FP32, BF16), (FP32, FP32), (FP16, FP16)])
def test_scaling_equals_its_twin(source, target):
    values, factor = torch.randn(3, 1500).to(DEVICE, source), torch.tensor(1.7e-3, device=DEVICE)
    expected = kernels.scaled_twin(values, factor, target)
    found = kernels.scaled(values, factor, target)
    if INTERPRETED and target == BF16:  # Triton's interpreter cuts bf16 off where the GPU rounds
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(found, expected) and found.dtype == target
    with pytest.raises(ValueError, match="strides"):
        kernels.scaled(values.t(), factor, target)


@runs_kernels
def test_no_tokens_and_no_labels(through_kernels):
    hidden, head, labels = head_inputs(FP32)
    total, _ = linear_cross_entropy(hidden[:0], head, labels[:0])
    total.backward()
    assert total == 0 and not head.weight.grad.any() and not hidden.grad.any()
    hidden.grad = head.weight.grad = None
    total, _ = linear_cross_entropy(hidden, head, torch.full_like(labels, -100))
    total.backward()
    assert total == 0 and not head.weight.grad.any() and not hidden.grad.any()


def test_chunks_are_nearly_equal():
    assert kernels.fused_chunk_rows(16384, 65536, 2) == 4096
    assert kernels.fused_chunk_rows(4097, 65536, 2) == 2176  # two of 17 tiles, the second one shorter
    assert kernels.fused_chunk_rows(100, 65536, 4) == 100
    assert kernels.fused_chunk_rows(500, 1 << 30, 4) == 64
