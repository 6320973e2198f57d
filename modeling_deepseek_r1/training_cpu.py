"""The training step on a CPU in fp32: the same sums with fewer passes over memory.

At the sizes that one trains on a CPU, half of a plain step is matmuls; the rest is elementwise passes over tensors
larger than the caches, and fresh memory for each of their results. The functions here work on blocks that stay in the
caches, save for the backward only what cannot be made again cheaply, and write weight gradients once. Autocast, other
dtypes, compilation, inference and gradients of gradients take the ordinary path: see `serves`, and for the last,
`set_fused_kernels(False)`.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN

from .fused import is_switched_on

# Logits worked on at a time, in elements: 4 MiB, which the matmuls still run at full speed on.
HEAD_BLOCK = 1 << 20
# Queries that attend at a time: fewer waste less work above the diagonal, more make faster matmuls.
QUERY_BLOCK = 64
# Attention weights kept for the backward, in elements a layer; above, torch's own kernel, which keeps none.
KEPT_WEIGHTS = 1 << 23

_silu_backward = torch.ops.aten.silu_backward


def _many_rows_product():
    """rows @ weight.T by oneDNN where torch was built with it: at a few hundred rows and more a tenth faster than MKL
    on the processors measured (AMD Zen 4), and with two threads up to a third."""
    product = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
    if product is None:
        return F.linear
    return lambda rows, weight: product(rows, weight, None, "none", [], "")


many_rows_product = _many_rows_product()


def takes(*tensors):
    """Whether the functions here are not switched off and all tensors are unsharded fp32 ones on a CPU, outside
    compilation and tracing."""
    return is_switched_on() and all(
        tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and type(tensor) in (torch.Tensor, nn.Parameter)
        for tensor in tensors
    ) and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def serves(*tensors):
    """Whether these tensors are the inputs of a training step that the functions here may compute: plain fp32 tensors
    on a CPU of which one needs a gradient, outside autocast."""
    return (
        torch.is_grad_enabled()
        and takes(*tensors)
        and any(tensor.requires_grad for tensor in tensors)
        and not torch.is_autocast_enabled("cpu")
    )


def is_silu(activation):
    """Whether an activation module is exactly SiLU, which the functions here have built in."""
    return type(activation) in (nn.SiLU, type(ACT2FN["silu"]))


class RMSNormFunction(torch.autograd.Function):
    """x / rms(x) * weight; keeps 1 / rms and no normalised copy. Source: arXiv:1910.07467, Eq. 4.

    Shapes: states (..., D), weight (D,) -> (..., D). Also for `states` that are a part of wider rows.
    """

    @staticmethod
    def forward(ctx, states, weight, epsilon):
        scale = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        scale = scale.square_().div_(states.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(states, weight, scale)
        return torch.mul(states, scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        states, weight, scale = ctx.saved_tensors
        grad_states = grad_weight = None
        product = (grad * states).reshape(-1, states.shape[-1])
        rows = scale.flatten()
        if ctx.needs_input_grad[1]:
            grad_weight = torch.mv(product.t(), rows)
        if ctx.needs_input_grad[0]:
            # dx = s w g - x s^3 / D sum(g w x), s = 1 / rms
            towards = torch.mv(product, weight).mul_(rows.pow(3)).div_(-states.shape[-1])
            grad_states = torch.mul(grad, scale).mul_(weight).addcmul_(states, towards.view_as(scale))
        return grad_states, grad_weight, None


def _runs(indices, num_experts):
    """(T, K) experts -> tokens (T * K,) and places (T * K,) in the flat (T, K), both sorted by expert, and a list of
    (expert, slice of the sorted places) without the empty ones and without the mark `num_experts`."""
    chosen = indices.flatten()
    places = chosen.argsort(stable=True)
    runs, start = [], 0
    for expert, count in enumerate(torch.bincount(chosen, minlength=num_experts)[:num_experts].tolist()):
        if count:
            runs.append((expert, slice(start, start + count)))
        start += count
    return places // indices.shape[1], places, runs


class ExpertsFunction(torch.autograd.Function):
    """Sum over a token's chosen experts of gate value * SwiGLU expert, expert by expert over its own rows.

    The gate value multiplies the inner activation, which is narrower than the output and gives its gradient without
    the output being kept. Sums run in the order of the experts: the same result on every run.
    Source: DeepSeek-V3 (arXiv:2412.19437), Eq. 12. Shapes: those of `DeepSeekR1Experts`.
    """

    @staticmethod
    def forward(ctx, states, indices, weights, gate_up, down):
        tokens, places, runs = _runs(indices, gate_up.shape[0])
        weights = weights.flatten().index_select(0, places).unsqueeze(1)
        inner_width = down.shape[2]
        inner = states.new_empty(len(places), 2 * inner_width)
        output = torch.zeros_like(states)
        for expert, run in runs:
            torch.mm(states.index_select(0, tokens[run]), gate_up[expert].t(), out=inner[run])
            gate, up = inner[run].split(inner_width, dim=1)
            activated = F.silu(gate).mul_(up).mul_(weights[run])
            output.index_add_(0, tokens[run], torch.mm(activated, down[expert].t()))
        ctx.save_for_backward(states, tokens, places, weights, gate_up, down, inner)
        ctx.runs, ctx.choices = runs, indices.shape
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        states, tokens, places, weights, gate_up, down, inner = ctx.saved_tensors
        needs_states, _, needs_weights, needs_gate_up, needs_down = ctx.needs_input_grad
        inner_width = down.shape[2]
        grad_states = torch.zeros_like(states) if needs_states else None
        grad_sorted = torch.zeros_like(weights) if needs_weights else None
        grad_gate_up = torch.empty_like(gate_up) if needs_gate_up else None
        grad_down = torch.empty_like(down) if needs_down else None
        for expert, run in ctx.runs:
            rows = grad.index_select(0, tokens[run])
            gate, up = inner[run].split(inner_width, dim=1)
            activated = F.silu(gate)
            product = activated * up
            grad_product = torch.mm(rows, down[expert])
            if needs_weights:
                torch.sum(product * grad_product, dim=1, keepdim=True, out=grad_sorted[run])
            if needs_down:
                torch.mm(rows.t(), product.mul_(weights[run]), out=grad_down[expert])
            if not (needs_states or needs_gate_up):
                continue
            grad_product.mul_(weights[run])
            grad_inner = torch.empty_like(inner[run])
            grad_gate, grad_up = grad_inner.split(inner_width, dim=1)
            torch.mul(grad_product, activated, out=grad_up)
            _silu_backward.grad_input(grad_product.mul_(up), gate, grad_input=grad_gate)
            if needs_gate_up:
                torch.mm(grad_inner.t(), states.index_select(0, tokens[run]), out=grad_gate_up[expert])
            if needs_states:
                grad_states.index_add_(0, tokens[run], torch.mm(grad_inner, gate_up[expert]))
        served = {expert for expert, _ in ctx.runs}
        for unused in (expert for expert in range(gate_up.shape[0]) if expert not in served):
            for gradient in (grad_gate_up, grad_down):
                if gradient is not None:
                    gradient[unused].zero_()
        grad_weights = None
        if needs_weights:
            grad_weights = torch.empty_like(grad_sorted).index_copy_(0, places, grad_sorted).view(ctx.choices)
        return grad_states, None, grad_weights, grad_gate_up, grad_down


def cross_entropy_with_gradients(
    hidden, weight, labels, label_smoothing, ignore_index, needs_hidden, needs_weight, most_elements=HEAD_BLOCK
):
    """Cross-entropy of hidden @ weight.T and the gradients of its sum, by blocks of logits that stay in the caches.

    Shapes (T tokens, D width, V vocabulary): hidden (T, D), weight (V, D), labels (T,)
    -> losses (T,), gradients (T, D) and (V, D), each None where it is not needed. A block has at most `most_elements`
    logits (but at least 64 tokens).
    """
    tokens, vocab_size = hidden.shape[0], weight.shape[0]
    losses = hidden.new_empty(tokens)
    grad_hidden = torch.empty_like(hidden) if needs_hidden else None
    grad_weight = torch.zeros_like(weight) if needs_weight else None
    rows = max(64, min(HEAD_BLOCK, most_elements) // vocab_size)
    for start in range(0, tokens, rows):
        part = slice(start, start + rows)
        states, target = hidden[part], labels[part]
        logits = many_rows_product(states, weight)
        ignored = (target == ignore_index).unsqueeze(1)
        column = target.unsqueeze(1).masked_fill(ignored, 0)
        loss = logits.amax(1, keepdim=True) - (1.0 - label_smoothing) * logits.gather(1, column)
        if label_smoothing:
            loss -= label_smoothing * logits.mean(1, keepdim=True)
        grad = torch.softmax(logits, dim=1, out=logits)
        # log(sum(exp(logits))) is the largest logit less the log of its probability.
        loss -= grad.amax(1, keepdim=True).log_()
        if label_smoothing:
            grad -= label_smoothing / vocab_size
        losses[part] = loss.masked_fill_(ignored, 0.0).squeeze(1)
        # d loss / d logits = softmax - (1 - e) * onehot - e / V
        grad.scatter_add_(1, column, torch.full_like(loss, label_smoothing - 1.0))
        grad.index_fill_(0, ignored.squeeze(1).nonzero().squeeze(1), 0.0)
        if needs_hidden:
            grad_hidden[part] = many_rows_product(grad, weight.t())
        if needs_weight:
            grad_weight.addmm_(grad.t(), states)
    return losses, grad_hidden, grad_weight


def attends(hidden_states, heads, attention_mask):
    """Whether `CausalAttentionFunction` serves (B, S, D) in training: weights few enough to keep, and no mask or a
    boolean one (B or 1, 1, S, S) that hides what comes later."""
    batch, length = hidden_states.shape[:2]
    if batch * heads * length**2 > KEPT_WEIGHTS or not serves(hidden_states):
        return False
    if attention_mask is None:
        return True
    return (
        attention_mask.dtype == torch.bool
        and attention_mask.dim() == 4
        and attention_mask.shape[1:] == (1, length, length)
        and not attention_mask.triu(1).any()
    )


def _halves(states, interleave):
    """(..., R) -> the first and second channels of the rotary pairs, (..., R / 2) each."""
    return (states[..., 0::2], states[..., 1::2]) if interleave else states.chunk(2, dim=-1)


def _turn(source, cos, sin, target):
    """Turns pairs by the angles, from `source` to `target`, both (first, second)."""
    torch.mul(source[0], cos, out=target[0]).addcmul_(source[1], sin, value=-1.0)
    torch.mul(source[1], cos, out=target[1]).addcmul_(source[0], sin)


class CausalAttentionFunction(torch.autograd.Function):
    """Rotation, assembly of queries and keys, and causal softmax attention; the weights are kept for the backward.

    Queries go in blocks, each over the keys up to its own end, so that little above the diagonal is computed. A query
    that may see nothing at all (padding) gives 0, as torch's kernels have it.
    Source: DeepSeek-V3 (arXiv:2412.19437), Eqs. 3-5, 8-10; the backward as in FlashAttention (arXiv:2205.14135),
    Appendix B.2.

    Shapes (B batch, H heads, S tokens, N nope, R rope, V value width): queries (B, H, S, N + R), expanded
    (B, S, H * (N + V)), key_rope (B, 1, S, R), none of them rotated; cos, sin (B or 1, S, R / 2); mask (B or 1, 1, S,
    S) bool, True where a query sees a key, or None -> (B, S, H, V).
    """

    @staticmethod
    def forward(ctx, queries, expanded, key_rope, cos, sin, mask, scaling, interleave):
        (batch, heads, length, width), rope = queries.shape, key_rope.shape[-1]
        nope, cos, sin = width - rope, cos.unsqueeze(1), sin.unsqueeze(1)
        query, key = queries.new_empty(2, batch, heads, length, width)
        key_nope, value = _by_head(expanded, heads).split((nope, expanded.shape[-1] // heads - nope), dim=-1)
        query[..., :nope] = queries[..., :nope]
        _turn(_halves(queries[..., nope:], interleave), cos, sin, query[..., nope:].chunk(2, dim=-1))
        query.mul_(scaling)
        key[..., :nope] = key_nope
        turned = torch.empty_like(key_rope)
        _turn(_halves(key_rope, interleave), cos, sin, turned.chunk(2, dim=-1))
        key[..., nope:] = turned

        query, key, value = (part.reshape(batch * heads, length, -1) for part in (query, key, value))
        hidden = None if mask is None else ~mask
        blind = None if mask is None else hidden.all(-1, keepdim=True)
        output, kept = torch.empty_like(value), []
        above = query.new_full((min(QUERY_BLOCK, length),) * 2, -torch.inf).triu_(1)
        for start in range(0, length, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, length)
            weights = torch.bmm(query[:, start:end], key[:, :end].transpose(1, 2))
            by_row = weights.view(batch, heads, end - start, end)
            if mask is None:
                weights[:, :, start:] += above[: end - start, : end - start]
            else:
                by_row.masked_fill_(hidden[:, :, start:end, :end], torch.finfo(weights.dtype).min)
            torch.softmax(weights, dim=-1, out=weights)
            if mask is not None:
                by_row.masked_fill_(blind[:, :, start:end], 0.0)
            output[:, start:end] = torch.bmm(weights, value[:, :end])
            kept.append(weights)
        output = output.view(batch, heads, length, -1).transpose(1, 2).contiguous()
        ctx.save_for_backward(query, key, value, output, cos, sin, *kept)
        ctx.sizes = nope, rope, scaling, interleave
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, output, cos, sin, *kept = ctx.saved_tensors
        nope, rope, scaling, interleave = ctx.sizes
        batch, length, heads, value_width = output.shape
        inner = (grad * output).sum(-1).transpose(1, 2).reshape(batch * heads, length, 1)
        grad = grad.transpose(1, 2).reshape(batch * heads, length, value_width)
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for start, weights in zip(range(0, length, QUERY_BLOCK), kept):
            end = min(start + QUERY_BLOCK, length)
            rows = grad[:, start:end]
            grad_value[:, :end].baddbmm_(weights.transpose(1, 2), rows)
            scores = torch.bmm(rows, value[:, :end].transpose(1, 2)).sub_(inner[:, start:end]).mul_(weights)
            grad_query[:, start:end] = torch.bmm(scores, key[:, :end])
            grad_key[:, :end].baddbmm_(scores.transpose(1, 2), query[:, start:end])

        by_token = (batch, heads, length, -1)
        grad_query, grad_key = grad_query.view(by_token).mul_(scaling), grad_key.view(by_token)
        grad_queries = grad.new_empty(batch, length, heads, nope + rope).transpose(1, 2)
        grad_queries[..., :nope] = grad_query[..., :nope]
        # The inverse of a rotation is that by the negative angle.
        _turn(grad_query[..., nope:].chunk(2, dim=-1), cos, -sin, _halves(grad_queries[..., nope:], interleave))
        grad_expanded = grad.new_empty(batch, length, heads, nope + value_width)
        grad_expanded.transpose(1, 2)[..., :nope] = grad_key[..., :nope]
        grad_expanded.transpose(1, 2)[..., nope:] = grad_value.view(by_token)
        summed = grad_key[..., nope:].sum(1, keepdim=True)
        grad_rope = torch.empty_like(summed)
        _turn(summed.chunk(2, dim=-1), cos, -sin, _halves(grad_rope, interleave))
        return grad_queries, grad_expanded.flatten(2), grad_rope, *(None,) * 5


def _by_head(states, heads):
    """(B, S, H * width) -> (B, H, S, width)."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)
