"""Linear layer and cross-entropy in one, chunk by chunk: (tokens, vocabulary) is never held in memory."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .experts import compute_dtype
from .fused import is_switched_on
from .kernels_cross_entropy import fused_linear_cross_entropy, has_kernels, scaled
from .training_cpu import cross_entropy_with_gradients, takes

# Logits held at a time, in elements: 256 MiB in fp32.
CHUNK_ELEMENTS = 1 << 26
KEPT_SHARE = 0.9  # below it, ignored tokens are worth leaving out of the head's pass


def chunk_rows(tokens, vocab_size):
    """Tokens a chunk, so that a chunk's logits hold at most `CHUNK_ELEMENTS` elements (but at least 64 tokens)."""
    return min(tokens, max(64, CHUNK_ELEMENTS // vocab_size))


def token_losses(logits, labels, label_smoothing=0.0, ignore_index=-100):
    """Cross-entropy per token in fp32: (T, V) logits, (T,) labels -> (T,), 0 at `ignore_index`."""
    return F.cross_entropy(
        logits.float(), labels, reduction="none", label_smoothing=label_smoothing, ignore_index=ignore_index
    )


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over tokens of cross_entropy(hidden @ weight.T, labels), the gradients made beside the loss.

    Gradients are kept per unit of the sum, so that fp16 sees numbers near 1 and not near 1 / tokens; the backward
    scales them. On CUDA the work is `fused_linear_cross_entropy`'s, on a CPU in fp32 `cross_entropy_with_gradients`'s.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, label_smoothing, ignore_index):
        dtype = compute_dtype(hidden)
        ctx.fused, ctx.dtypes = is_switched_on() and has_kernels(hidden), (hidden.dtype, weight.dtype)
        if ctx.fused:
            with torch.cuda.device_of(hidden), torch.autocast(hidden.device.type, enabled=False):
                losses, *gradients = fused_linear_cross_entropy(
                    hidden, weight.to(dtype), labels, label_smoothing, ignore_index, *ctx.needs_input_grad[:2]
                )
            ctx.save_for_backward(*gradients)
            ctx.mark_non_differentiable(losses)
            return losses.sum(), losses
        if dtype == torch.float32 and takes(hidden, weight) and any(ctx.needs_input_grad[:2]):
            losses, *gradients = cross_entropy_with_gradients(
                hidden, weight, labels, label_smoothing, ignore_index, *ctx.needs_input_grad[:2], CHUNK_ELEMENTS
            )
            ctx.save_for_backward(*gradients)
            ctx.mark_non_differentiable(losses)
            return losses.sum(), losses
        with torch.autocast(hidden.device.type, enabled=False):
            narrow, vocab_size = weight.to(dtype), weight.shape[0]
            rows = chunk_rows(hidden.shape[0], vocab_size)
            losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
            grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
            for start in range(0, hidden.shape[0], rows):
                part = slice(start, start + rows)
                states, target = hidden[part].to(dtype), labels[part]
                logits = F.linear(states, narrow).float()
                if grad_hidden is None and grad_weight is None:
                    losses[part] = token_losses(logits, target, label_smoothing, ignore_index)
                    continue
                kept = (target != ignore_index).unsqueeze(-1)
                column = target.masked_fill(~kept.squeeze(-1), 0).unsqueeze(-1)
                normaliser = logits.logsumexp(-1, keepdim=True)
                loss = normaliser - (1.0 - label_smoothing) * logits.gather(-1, column)
                if label_smoothing:
                    loss = loss - label_smoothing * logits.mean(-1, keepdim=True)
                losses[part] = torch.where(kept, loss, 0.0).squeeze(-1)
                # d loss / d logits = softmax - (1 - e) * onehot - e / V
                grad = logits.sub_(normaliser).exp_()
                if label_smoothing:
                    grad -= label_smoothing / vocab_size
                grad.scatter_add_(1, column, torch.full_like(column, label_smoothing - 1.0, dtype=grad.dtype))
                grad = grad.masked_fill_(~kept, 0.0).to(dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = grad @ narrow
                if grad_weight is not None:
                    grad_weight += grad.t() @ states
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, grad_sum, _):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True: they would lack a term
            raise RuntimeError(
                "this loss keeps its gradients, not what gradients of gradients need; for these take the logits "
                "(skip_logits=False) and torch.nn.functional.cross_entropy, with set_fused_kernels(False)"
            )
        grad_hidden, grad_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        if ctx.fused:
            pairs = zip((grad_hidden, grad_weight), ctx.dtypes)
            return *(None if grad is None else scaled(grad, grad_sum, dtype) for grad, dtype in pairs), None, None, None
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad_sum).to(hidden_dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_sum).to(weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def _module_cross_entropy(hidden, head, labels, label_smoothing, ignore_index):
    """The same through `head(chunk)`, recomputed in the backward: for heads that are more than one matrix."""

    def one_chunk(states, target):
        logits = head(states)
        return token_losses(logits, target.to(logits.device), label_smoothing, ignore_index).to(target.device)

    rows = chunk_rows(hidden.shape[0], head_vocab_size(head))
    parts = [
        checkpoint(one_chunk, states, target, use_reentrant=False)
        if torch.is_grad_enabled()
        else one_chunk(states, target)
        for states, target in zip(hidden.split(rows), labels.split(rows))
    ]
    losses = torch.cat(parts)
    return losses.sum(), losses.detach()


def head_vocab_size(head):
    """Number of logits that `head` returns."""
    return head.out_features if hasattr(head, "out_features") else head.weight.shape[0]


def is_plain_linear(head):
    """Whether `head` is one unsharded matrix that nobody has hooked or wrapped (accelerate's offloading replaces its
    `forward`), so that its weight may be used directly."""
    return (
        type(head) is nn.Linear
        and head.bias is None
        and type(head.weight) in (nn.Parameter, torch.Tensor)
        and not head._forward_hooks
        and not head._forward_pre_hooks
        and "forward" not in vars(head)
    )


def linear_cross_entropy(hidden, head, labels, label_smoothing=0.0, ignore_index=-100):
    """Cross-entropy of `head(hidden)` against `labels`, summed over the tokens.

    Shapes (T tokens, D width, V vocabulary): hidden (T, D), labels (T,) int64 -> sum () float32 with gradients to
    `hidden` and `head`, losses (T,) float32 without, both in nats; 0 where labels are `ignore_index`. Memory is
    O(chunk * V + T * D + V * D). `label_smoothing` as in `torch.nn.functional.cross_entropy`.
    Raises IndexError or RuntimeError (on the CPU) for a label outside [0, V).
    """
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():  # looking at labels waits for a GPU
        kept = labels != ignore_index
        if kept.sum() < KEPT_SHARE * len(labels) and kept.any():
            total, losses = _whole_linear_cross_entropy(hidden[kept], head, labels[kept], label_smoothing, ignore_index)
            return total, losses.new_zeros(len(labels)).masked_scatter(kept, losses)
    return _whole_linear_cross_entropy(hidden, head, labels, label_smoothing, ignore_index)


def _whole_linear_cross_entropy(hidden, head, labels, label_smoothing, ignore_index):
    """`linear_cross_entropy` with a head's pass over every token, ignored or not."""
    if is_plain_linear(head):
        # Without gradients `needs_input_grad` still says that a trained weight wants one.
        weight = head.weight if torch.is_grad_enabled() else head.weight.detach()
        return _LinearCrossEntropy.apply(hidden, weight, labels, label_smoothing, ignore_index)
    return _module_cross_entropy(hidden, head, labels, label_smoothing, ignore_index)
