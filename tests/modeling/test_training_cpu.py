"""The training step's functions on a CPU equal plain autograd, values and gradients, in fp32."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modeling_deepseek_r1 import fused, losses, training_cpu
from modeling_deepseek_r1.attention import eager_attention_forward
from modeling_deepseek_r1.experts import DeepSeekR1Experts
from modeling_deepseek_r1.rotary import rotate
from modeling_deepseek_r1.training_cpu import (
    CausalAttentionFunction,
    ExpertsFunction,
    RMSNormFunction,
    attends,
    cross_entropy_with_gradients,
    is_silu,
    many_rows_product,
    serves,
)

from .helpers import close, tiny_config, tiny_model


def leaves(*shapes, std=1.0):
    return [(std * torch.randn(shape)).requires_grad_() for shape in shapes]


def assert_same(function, reference, inputs):
    """Outputs and the gradients of a random weighting of them; twice, for the same result on every run."""
    output, expected = function(*inputs), reference(*inputs)
    close(output, expected)
    weighting = torch.randn_like(expected)
    trained = [value for value in inputs if value.requires_grad]
    gradients = torch.autograd.grad(output, trained, weighting)
    for actual, wanted in zip(gradients, torch.autograd.grad(expected, trained, weighting)):
        assert actual.shape == wanted.shape and actual.dtype == wanted.dtype
        close(actual, wanted, atol=2e-5)
    for again, first in zip(torch.autograd.grad(function(*inputs), trained, weighting), gradients):
        assert torch.equal(again, first)


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("shape", [(3, 5, 24), (7, 24), (0, 24), (24,)])
def test_norm(shape, trained):
    wide, weight = torch.randn(*shape[:-1], 40), torch.randn(24)
    states = wide[..., 8:32].requires_grad_(trained[0])  # a part of wider rows, as the latent is
    assert_same(
        lambda x, w: RMSNormFunction.apply(x, w, 1e-6), lambda x, w: F.rms_norm(x, (24,), w, 1e-6),
        (states, weight.requires_grad_(trained[1])),
    )  # fmt: skip


def test_product_of_many_rows():
    rows, weight = torch.randn(70, 33), torch.randn(33, 21)
    close(many_rows_product(rows, weight.t()), rows @ weight)
    close(many_rows_product(rows[:0], weight.t()), rows[:0] @ weight)


@pytest.mark.parametrize("frozen", [(), (0,), (2,), (3, 4), (0, 3), (0, 2, 4)])
@pytest.mark.parametrize("case", ["even", "empty_experts", "foreign", "all_foreign", "no_tokens"])
def test_experts(case, frozen):
    """Against the eager loop; `foreign`: the mark of expert parallelism, E, in some places or all."""
    experts = DeepSeekR1Experts(tiny_config())
    eager = DeepSeekR1Experts.forward.__wrapped__
    count, top_k = experts.num_experts, 3
    indices = torch.rand(0 if case == "no_tokens" else 17, count).topk(top_k).indices
    if case == "empty_experts":
        indices = torch.tensor([1, 4, 6])[torch.rand(17, top_k).argsort(-1)]
    elif case == "foreign":
        indices = indices.masked_fill(torch.rand(17, top_k) < 0.4, count)
    elif case == "all_foreign":
        indices = torch.full_like(indices, count)
    states, weights = leaves((len(indices), 32), (len(indices), top_k))
    gate_up, down = leaves(experts.gate_up_proj.shape, experts.down_proj.shape, std=0.2)  # outputs of order 1
    inputs = [states, indices, weights, gate_up, down]
    for place in frozen:
        inputs[place].requires_grad_(False)

    def loop(states, indices, weights, gate_up, down):
        for name, value in (("gate_up_proj", gate_up), ("down_proj", down)):
            del experts._parameters[name]
            experts._parameters[name] = value
        output = eager(experts, states, indices, weights)
        # Where no expert is called, the loop's output hangs on nothing; adding 0 gives the gradients, which are 0.
        return output + 0.0 * sum(value.sum() for value in (states, weights, gate_up, down))

    assert_same(ExpertsFunction.apply, loop, inputs)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.1])
@pytest.mark.parametrize("scale", [1.0, 300.0])  # 300: probabilities of 0, losses of thousands
def test_cross_entropy(scale, ignored, smoothing, monkeypatch):
    monkeypatch.setattr(training_cpu, "HEAD_BLOCK", 64 * 53)  # 64 + 64 + 22 tokens
    hidden, weight = leaves((150, 24), (53, 24))
    labels = torch.randint(0, 53, (150,)).masked_fill(torch.rand(150) < ignored, -100)
    each = F.cross_entropy(scale * hidden @ weight.T, labels, reduction="none", label_smoothing=smoothing)
    with torch.no_grad():
        losses, *gradients = cross_entropy_with_gradients(
            scale * hidden, weight, labels, smoothing, -100, True, True
        )
    close(losses, each, rtol=1e-5, atol=1e-5 * scale)
    wanted = torch.autograd.grad(each.sum(), (hidden, weight))
    # The two sum the logits in another order, 1e-7 of their size: at scale 300 that moves a probability by 1e-3.
    tolerance = 1e-5 if scale == 1.0 else 3e-3
    close(scale * gradients[0], wanted[0], atol=tolerance * scale, rtol=tolerance)
    close(gradients[1], wanted[1], atol=tolerance * scale, rtol=tolerance)
    none = cross_entropy_with_gradients(hidden.detach(), weight.detach(), labels, smoothing, -100, False, False)
    assert none[1:] == (None, None)


def test_cross_entropy_refuses_labels_outside_the_vocabulary():
    with pytest.raises((IndexError, RuntimeError)):
        cross_entropy_with_gradients(
            torch.randn(4, 8), torch.randn(5, 8), torch.tensor([0, 5, 1, 2]), 0.0, -100, True, True
        )


BATCH, HEADS, NOPE, ROPE, VALUE, SCALING = 2, 3, 6, 4, 5, 0.4


def plain_attention(queries, expanded, key_rope, cos, sin, mask, interleave):
    """The same through `rotate`, concatenation and the eager softmax; rows that see nothing give 0."""
    length, (cos, sin) = queries.shape[2], (cos.unsqueeze(1), sin.unsqueeze(1))
    query = torch.cat((queries[..., :NOPE], rotate(queries[..., NOPE:], cos, sin, interleave)), -1)
    by_head = expanded.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    key = torch.cat((by_head[..., :NOPE], rotate(key_rope, cos, sin, interleave).expand(-1, HEADS, -1, -1)), -1)
    seen = torch.ones(length, length, dtype=torch.bool).tril() if mask is None else mask
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    output, _ = eager_attention_forward(nn.Module(), query, key, by_head[..., NOPE:], added, SCALING)
    blind = ~seen.any(-1)
    return output if mask is None else output.masked_fill(blind.transpose(1, 2).unsqueeze(-1), 0.0)


def attention_mask(kind, length):
    """None; `packed`: two documents a row; `padded`: the first row's first 3 places are padding, which see nothing."""
    if kind is None:
        return None
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    if kind == "packed":
        document = torch.arange(length) >= length // 3
        return (causal & (document.unsqueeze(0) == document.unsqueeze(1))).expand(1, 1, -1, -1)
    real = torch.ones(BATCH, length, dtype=torch.bool)
    real[0, :3] = False
    return causal & real[:, None, None, :]


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("kind", [None, "packed", "padded"])
@pytest.mark.parametrize("length", [5, 8, 19])  # less than a block, two blocks, two and a rest
def test_attention(length, kind, interleave, monkeypatch):
    monkeypatch.setattr(training_cpu, "QUERY_BLOCK", 8 if length != 8 else 4)
    queries, expanded, kv_a = leaves(
        (BATCH, length, HEADS, NOPE + ROPE), (BATCH, length, HEADS * (NOPE + VALUE)), (BATCH, length, 9 + ROPE)
    )
    angles = torch.rand(1 if kind is None else BATCH, length, ROPE // 2) * 6
    mask = attention_mask(kind, length)

    def ours(queries, expanded, kv_a):
        return CausalAttentionFunction.apply(
            queries.transpose(1, 2), expanded, kv_a[..., 9:].unsqueeze(1), angles.cos(), angles.sin(), mask, SCALING,
            interleave,
        )  # fmt: skip

    def plain(queries, expanded, kv_a):
        return plain_attention(
            queries.transpose(1, 2), expanded, kv_a[..., 9:].unsqueeze(1), angles.cos(), angles.sin(), mask, interleave
        )

    assert_same(ours, plain, (queries, expanded, kv_a))


def test_which_attention_is_served(monkeypatch):
    states = torch.randn(2, 16, 8, requires_grad=True)
    causal = torch.ones(2, 1, 16, 16, dtype=torch.bool).tril()
    assert attends(states, 4, None) and attends(states, 4, causal)
    assert not attends(states, 4, torch.ones_like(causal))  # looks ahead
    assert not attends(states, 4, causal.float())
    assert not attends(states.detach(), 4, None)
    monkeypatch.setattr(training_cpu, "KEPT_WEIGHTS", 2 * 4 * 16 * 16 - 1)
    assert not attends(states, 4, None)


def test_what_is_served():
    trained, frozen = torch.randn(3, requires_grad=True), torch.randn(3)
    assert serves(trained, frozen) and serves(frozen, nn.Parameter(frozen))
    assert not serves(frozen)
    assert not serves(trained, frozen.bfloat16())
    assert not serves(trained.double())
    assert not serves(trained, frozen.to("meta"))
    with torch.no_grad():
        assert not serves(trained)
    with torch.autocast("cpu", torch.bfloat16):
        assert not serves(trained)
    assert is_silu(nn.SiLU()) and is_silu(DeepSeekR1Experts(tiny_config()).act_fn) and not is_silu(nn.GELU())


def functions_of(loss):
    """Names of the functions in a loss's graph."""
    seen, front = set(), [loss.grad_fn]
    while front:
        node = front.pop()
        if node is not None and node not in seen:
            seen.add(node)
            front += [node for node, _ in node.next_functions]
    return {type(node).__name__ for node in seen}


@pytest.mark.parametrize("given", ["whole", "padding", "documents"])
def test_a_models_step_is_the_plain_one(given, monkeypatch):
    """Each function has its place in the model, the switch turns all of them off, and the step stays the same."""
    model = tiny_model(implementation="sdpa", num_nextn_predict_layers=1, seq_aux_loss_alpha=0.1).train()
    ids = torch.randint(3, model.config.vocab_size, (2, 21))
    mask, positions = torch.ones_like(ids), torch.cat((torch.arange(9), torch.arange(12))).expand(2, -1)
    mask[1, :5] = 0
    inputs = {"whole": {}, "padding": {"attention_mask": mask}, "documents": {"position_ids": positions}}[given]
    heads, head = [], losses.cross_entropy_with_gradients
    monkeypatch.setattr(losses, "cross_entropy_with_gradients", lambda *args: heads.append(1) or head(*args))
    ours, steps = {"RMSNormFunctionBackward", "ExpertsFunctionBackward", "CausalAttentionFunctionBackward"}, []
    for enabled in (None, False):
        monkeypatch.setattr(fused, "_enabled", enabled)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, **inputs).loss
        assert functions_of(loss) & ours == (set() if enabled is False else ours) and len(heads) == 2
        loss.backward()
        steps.append((loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}))
    close(steps[0][0], steps[1][0], rtol=1e-5)
    for name, gradient in steps[1][1].items():
        close(steps[0][1][name], gradient, rtol=1e-3, atol=2e-5)
