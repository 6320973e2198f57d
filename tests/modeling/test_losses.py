"""The chunked linear + cross-entropy equals the plain one, and never holds (tokens, vocabulary) in memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_deepseek_r1 import losses
from modeling_deepseek_r1.losses import chunk_rows, linear_cross_entropy

from .helpers import close, random_ids, tiny_model

TOKENS, WIDTH, VOCAB = 150, 24, 53


@pytest.fixture(autouse=True, params=["one_chunk", "three_chunks"])
def chunks(request, monkeypatch):
    """All tokens at once, or 64 rows (the least) at a time: 64 + 64 + 22."""
    if request.param == "three_chunks":
        monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 64 * VOCAB)
        assert chunk_rows(TOKENS, VOCAB) == 64


def inputs(ignored=0.3, dtype=torch.float32):
    hidden = torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_()
    head = nn.Linear(WIDTH, VOCAB, bias=False)
    nn.init.normal_(head.weight, std=0.5)
    labels = torch.randint(0, VOCAB, (TOKENS,))
    return hidden, head.to(dtype), labels.masked_fill(torch.rand(TOKENS) < ignored, -100)


def reference(hidden, head, labels, label_smoothing=0.0):
    """Loss per token and the gradients of their sum, through torch's cross_entropy in fp32."""
    states = hidden.detach().float().requires_grad_()
    weight = head.weight.detach().float().requires_grad_()
    each = F.cross_entropy(states @ weight.T, labels, reduction="none", label_smoothing=label_smoothing)
    return (each.detach(), *torch.autograd.grad(each.sum(), (states, weight)))


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.1])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_values_and_gradients_equal_cross_entropy(smoothing, ignored, plain):
    hidden, head, labels = inputs(ignored)
    each, grad_hidden, grad_weight = reference(hidden, head, labels, smoothing)
    if not plain:
        head.register_forward_hook(lambda *_: None)  # a head whose weight must not be used behind its back
    assert losses.is_plain_linear(head) == plain
    total, per_token = linear_cross_entropy(hidden, head, labels, smoothing)
    assert total.dtype == per_token.dtype == torch.float32 and not per_token.requires_grad
    close(per_token, each)
    close(total, each.sum())
    (3.0 * total).backward()
    close(hidden.grad, 3.0 * grad_hidden)
    close(head.weight.grad, 3.0 * grad_weight)
    with torch.no_grad():
        evaluated = linear_cross_entropy(hidden, head, labels, smoothing)
    close(evaluated[0], each.sum())
    close(evaluated[1], each)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_only_what_is_trained_gets_a_gradient(trained):
    hidden, head, labels = inputs()
    _, grad_hidden, grad_weight = reference(hidden, head, labels)
    hidden.requires_grad_(trained == "hidden")
    head.weight.requires_grad_(trained == "weight")
    linear_cross_entropy(hidden, head, labels)[0].backward()
    if trained == "hidden":
        close(hidden.grad, grad_hidden)
        assert head.weight.grad is None
    else:
        close(head.weight.grad, grad_weight)
        assert hidden.grad is None


@pytest.mark.parametrize("dtype, step", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_low_precision(dtype, step):
    """Logits and their gradients are rounded to the dtype; `step` is its relative rounding error."""
    hidden, head, labels = inputs(dtype=dtype)
    each, grad_hidden, grad_weight = reference(hidden, head, labels)
    total, per_token = linear_cross_entropy(hidden, head, labels)
    close(per_token, each, atol=8 * step, rtol=4 * step)  # logits of up to about 8 in magnitude
    total.backward()
    assert hidden.grad.dtype == head.weight.grad.dtype == dtype
    for gradient, expected in ((hidden.grad, grad_hidden), (head.weight.grad, grad_weight)):
        assert (gradient.float() - expected).norm() < 4 * step * expected.norm()


@pytest.mark.parametrize("plain", [True, False])
def test_fp32_weights_under_autocast(plain):
    hidden, head, labels = inputs()
    each, grad_hidden, grad_weight = reference(hidden, head, labels)
    if not plain:
        head.register_forward_hook(lambda *_: None)
    with torch.autocast("cpu", torch.bfloat16):
        total, per_token = linear_cross_entropy(hidden, head, labels)
    total.backward()
    assert per_token.dtype == hidden.grad.dtype == head.weight.grad.dtype == torch.float32
    close(per_token, each, atol=8 * 2**-8, rtol=4 * 2**-8)
    assert not torch.equal(per_token, each)  # it did compute in bf16
    for gradient, expected in ((hidden.grad, grad_hidden), (head.weight.grad, grad_weight)):
        assert (gradient - expected).norm() < 4 * 2**-8 * expected.norm()


def test_a_loss_scale_of_fp16_does_not_underflow():
    """A mean over many tokens has gradients below fp16's least number; scaled by 2^16 they must arrive."""
    hidden, head, labels = inputs(ignored=0.0, dtype=torch.float16)
    _, grad_hidden, grad_weight = reference(hidden, head, labels)
    (2.0**16 * (linear_cross_entropy(hidden, head, labels)[0] / 1e9)).backward()
    factor = 2.0**16 / 1e9
    for gradient, expected in ((hidden.grad, grad_hidden), (head.weight.grad, grad_weight)):
        assert (gradient.float() / factor - expected).norm() < 0.01 * expected.norm()


def test_lora_on_the_head():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)).train()
    ids = random_ids(4, 20)
    assert not losses.is_plain_linear(model.base_model.model.lm_head)
    output = model(input_ids=ids, labels=ids)
    assert output.logits is None
    logits = model.eval()(input_ids=ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    close(output.loss, expected)
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert len(adapters) == 2
    for ours, theirs in zip(
        torch.autograd.grad(output.loss, adapters), torch.autograd.grad(expected, adapters), strict=True
    ):
        assert theirs.abs().max() > 1e-3
        close(ours, theirs)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("label", [VOCAB, VOCAB + 1000, -1])
def test_a_label_outside_the_vocabulary_raises(label, training, plain):
    hidden, head, labels = inputs()
    labels[70] = label
    if not plain:
        head.register_forward_hook(lambda *_: None)
    with torch.set_grad_enabled(training), pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(hidden, head, labels)


def test_label_smoothing_acts_in_training_only():
    model, ids = tiny_model(label_smoothing=0.1), random_ids()
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten()
    close(model(ids, labels=ids).loss, F.cross_entropy(logits, targets))
    close(model.train()(ids, labels=ids).loss, F.cross_entropy(logits, targets, label_smoothing=0.1))


def test_a_batch_without_labels_gives_zero_not_nan():
    model, ids = tiny_model(num_nextn_predict_layers=1).train(), random_ids()
    output = model(ids, labels=torch.full_like(ids, -100))
    output.loss.backward()
    assert output.loss == 0 and output.mtp_loss == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation, also of the backward, returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return result


@pytest.mark.parametrize("head", ["plain", "hooked"])
def test_training_never_makes_all_logits(head, monkeypatch):
    """Weights, activations, attention weights and a chunk's logits all stay far below tokens * vocabulary."""
    vocab, ids = 4000, torch.randint(0, 4000, (8, 64))
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 64 * vocab)
    model = tiny_model(num_nextn_predict_layers=2, vocab_size=vocab, label_smoothing=0.1).train()
    if head == "hooked":
        model.lm_head.register_forward_hook(lambda *_: None)
    with LargestTensor() as record:
        model(ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0
    assert 64 * vocab <= record.largest < ids.numel() * vocab / 4
    with LargestTensor() as record:  # the recorder does see them where they are asked for
        model(ids, labels=ids, skip_logits=False)
    assert record.largest >= ids.numel() * vocab
