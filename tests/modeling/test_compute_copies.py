"""Training with kept bf16 copies of fp32 weights against training that casts anew: the same numbers to the last bit.

In the plain path, where only experts, queries and MTP's projection take copies; the fused one is in test_fused.py.
"""

import copy
import gc

import pytest
import torch
from torch import nn

from modeling_deepseek_r1 import DeepSeekR1ForCausalLM
from modeling_deepseek_r1.compute_copies import has_copy, in_dtype, keep_copies
from recipes.optimizers import FusedAdamW

from .helpers import tiny_model
from .kernel_tests import DEVICE

BF16 = torch.bfloat16


def model_of(**changes):
    torch.manual_seed(3)
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "moe_intermediate_size": 32} | changes
    return tiny_model(implementation="sdpa", **sizes).to(DEVICE).train()


def loss_of(model, seed, length=9):
    ids = torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    with torch.autocast(DEVICE, BF16):
        return model(input_ids=ids, labels=ids, use_cache=False).loss


def one_backward(model, step):
    loss = loss_of(model, step)
    loss.backward()
    return [loss]


def train(model, copies, steps=3, gradients=one_backward):
    """-> norms and losses, gradient dtypes of the last step, weights."""
    optimizer, found, graphs = FusedAdamW(model.parameters(), lr=1e-2, compute_copies=copies), [], []
    for step in range(steps):
        graphs += gradients(model, step)  # who keeps what a model returned must not slow the next steps down
        dtypes = {name: p.grad.dtype for name, p in model.named_parameters() if p.grad is not None}
        found.append(optimizer.clip_gradients(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return found + [loss.item() for loss in graphs], dtypes, weights


def assert_same_run(found, expected):
    assert found[0] == expected[0]
    for name, weight in expected[2].items():
        assert torch.equal(found[2][name], weight), name
    assert set(expected[1].values()) == {torch.float32}


def is_expert(name):
    return ".experts." in name


CASES = {
    "plain": {}, "mtp": dict(num_nextn_predict_layers=1), "tied": dict(tie_word_embeddings=True),
    "no copies between steps": dict(copies="gradients"), "selective": dict(checkpointing="selective"),
    "full": dict(checkpointing="full"), "full, gradients": dict(checkpointing="full", copies="gradients"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers(case):
    changes = dict(CASES[case])
    copies, checkpointing = changes.pop("copies", True), changes.pop("checkpointing", "none")

    def run(copies):
        model = model_of(**changes)
        model.set_activation_checkpointing(checkpointing)
        return train(model, copies)

    found, expected = run(copies), run(False)
    assert_same_run(found, expected)
    narrow = {name for name, dtype in found[1].items() if dtype == BF16}
    assert {name for name in found[1] if is_expert(name)} <= narrow  # also where a layer is computed again
    assert not any("norm" in name or "embed" in name or ".gate." in name for name in narrow)


def one_by_one(model, step):
    losses = []
    for number in range(3):
        losses.append(loss_of(model, 3 * step + number))
        losses[-1].backward()
    return losses


def together(model, step):
    losses = [loss_of(model, 2 * step), loss_of(model, 2 * step + 1)]
    sum(losses).backward()
    return losses


def twice(model, step):
    losses = [loss_of(model, 2 * step), loss_of(model, 2 * step + 1)]
    sum(losses).backward(retain_graph=True)
    sum(losses).backward()
    return losses


def abandoned(model, step):
    return [loss_of(model, 2 * step), *one_backward(model, 2 * step + 1)]


@pytest.mark.parametrize("gradients", [one_by_one, together, twice, abandoned])
def test_gradients_are_added_in_fp32(gradients):
    """Micro-batches, several uses of a weight in one graph, a second backward of a graph, a graph without any."""
    found, expected = (train(model_of(), copies, 2, gradients) for copies in (True, False))
    assert_same_run(found, expected)
    assert {dtype for name, dtype in found[1].items() if is_expert(name)} == {torch.float32}


# ---- when a copy is true -------------------------------------------------------------------------------------------


def trained(copies=True):
    """A model after a step, its optimizer, and the copies of its experts' down projection."""
    model = model_of()
    optimizer = FusedAdamW(model.parameters(), lr=1e-2, compute_copies=copies)
    loss_of(model, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    weight = model.model.layers[1].mlp.experts.down_proj
    return model, optimizer, weight, optimizer.copies.kept[weight]


def test_a_step_writes_the_next_copy_in_place():
    model, optimizer, weight, kept = trained()
    made = kept.current()
    assert made.data_ptr() == in_dtype(weight, BF16).data_ptr() and torch.equal(made, weight.bfloat16())
    loss_of(model, 1).backward()
    before = made.clone()
    optimizer.step()
    assert kept.current() is made and torch.equal(made, weight.bfloat16()) and not torch.equal(made, before)


@pytest.mark.parametrize("change", ["in place", "load_state_dict", "data", "moved"])
def test_a_changed_weight_is_cast_anew(change):
    model, _, weight, kept = trained()
    other = torch.randn_like(weight)
    if change == "in place":
        with torch.no_grad():
            weight.copy_(other)
    elif change == "load_state_dict":
        name = next(name for name, p in model.named_parameters() if p is weight)
        model.load_state_dict({**model.state_dict(), name: other})
    elif change == "data":
        weight.data = other  # counts no version
    else:
        weight.data = torch.cat((other, other))[: len(other)].clone()
        model.double().float()
    assert kept.current() is None
    assert torch.equal(in_dtype(weight, BF16), other.bfloat16())
    assert kept.current() is not None


def test_what_is_no_training_step_casts_the_weight_itself():
    _, _, weight, kept = trained()
    weight.data.mul_(2)  # nothing counts this
    with torch.no_grad():
        assert torch.equal(in_dtype(weight, BF16), weight.bfloat16())
    with torch.inference_mode():
        assert torch.equal(in_dtype(weight, BF16), weight.bfloat16())
    assert torch.equal(in_dtype(weight, torch.float16), weight.half())
    assert in_dtype(weight, torch.float32) is weight
    weight.requires_grad_(False)
    assert torch.equal(in_dtype(weight, BF16), weight.bfloat16())


def test_a_backward_after_the_step_is_refused():
    """The products of that graph would be differentiated with other weights than they were made with."""
    model, optimizer, _, _ = trained()
    first, second = loss_of(model, 1), loss_of(model, 2)
    first.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


# ---- beyond training -----------------------------------------------------------------------------------------------


def test_copies_end_with_their_optimizer():
    model, optimizer, weight, kept = trained()
    loss_of(model, 1).backward()
    wide = weight.grad.float()
    assert weight.grad.dtype == BF16 and weight.grad_dtype is None
    del optimizer, kept
    gc.collect()
    assert not has_copy(weight) and weight.grad_dtype == torch.float32 and torch.equal(weight.grad, wide)
    model.zero_grad()
    loss_of(model, 1).backward()
    assert weight.grad.dtype == torch.float32 and torch.equal(weight.grad, wide)


def test_two_optimizers_share_a_copy():
    weight = nn.Parameter(torch.randn(4, 4))
    first, second = keep_copies([weight]), keep_copies([weight])
    assert first[0] is second[0]
    in_dtype(weight, BF16).sum().backward()
    del first
    gc.collect()
    assert weight.grad.dtype == BF16 and has_copy(weight)


def test_models_are_copied_and_saved_without(tmp_path):
    model, _, weight, _ = trained()
    twin = copy.deepcopy(model)
    twin_weight = twin.model.layers[1].mlp.experts.down_proj
    assert not has_copy(twin_weight) and twin_weight.grad_dtype == torch.float32
    assert loss_of(twin, 1).item() == loss_of(model, 1).item()
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert (tmp_path / "model.pt").stat().st_size < 5 * sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    loaded = DeepSeekR1ForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for other in (again, loaded):
        pairs = list(zip(model.parameters(), other.parameters()))
        assert all(torch.equal(p.cpu(), q.cpu()) and p.dtype == q.dtype for p, q in pairs)


def test_gradients_of_gradients():
    """d/dw of |d/dw f(cast(w))|^2, where the cast is an identity for gradients."""
    weight, rows = nn.Parameter(torch.randn(3, 4)), torch.randn(5, 4)
    held = keep_copies([weight])
    results = []
    for cast in (lambda: in_dtype(weight, BF16), lambda: weight.to(BF16)):
        loss = (rows @ cast().float().t()).pow(3).sum()
        gradient, = torch.autograd.grad(loss, weight, create_graph=True)
        assert gradient.dtype == torch.float32
        results.append((gradient.detach(), torch.autograd.grad(gradient.square().sum(), weight)[0].float()))
    assert held and all(torch.equal(a, b) for a, b in zip(*results))


def test_own_wishes_for_a_gradient_s_dtype_are_left_alone():
    weight = nn.Parameter(torch.randn(3, 4))
    weight.grad_dtype = torch.float64
    held = keep_copies([weight])
    in_dtype(weight, BF16).sum().backward()
    assert held and weight.grad_dtype == torch.float64 and weight.grad.dtype == torch.float64


def test_frozen_and_other_weights_get_none():
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    assert keep_copies([frozen, nn.Parameter(torch.ones(3, dtype=BF16))]) == []
    assert not has_copy(frozen) and in_dtype(frozen, BF16).dtype == BF16
