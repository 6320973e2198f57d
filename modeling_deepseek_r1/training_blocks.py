"""The element-wise parts of a decoder layer as differentiable functions: norms, residual sums, rotary parts, SwiGLU.

On CUDA each is one fused kernel forward and one backward that save their inputs and a number a row; elsewhere it is its
`_twin`, the same arithmetic in plain torch, which autograd differentiates. Fused arithmetic is fp32 inside and rounds
once at the end, where the twin in bf16 rounds after every operation. Gradients of gradients are refused.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .fused import kernels_run_on

try:
    from .kernels_norms import rms_norm_backward, rms_norm_forward, rows_of, swiglu_backward, swiglu_forward
    from .kernels_rotary import assemble, assemble_backward
except ImportError:  # no triton: the twins below serve
    pass


# ---- norms ---------------------------------------------------------------------------------------------------------


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, out_dtype):
        output, rstd, _ = rms_norm_forward(x, weight, eps, out_dtype)
        ctx.save_for_backward(x, weight, rstd)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_x, _, grad_weight = rms_norm_backward(
            grad, *ctx.saved_tensors, needs_x=needs_x, needs_weight=needs_weight
        )
        return grad_x, grad_weight, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, delta, weight, eps, out_dtype):
        output, rstd, total = rms_norm_forward(residual, weight, eps, out_dtype, delta)
        ctx.save_for_backward(total, weight, rstd)
        ctx.delta_dtype = None if delta is None else delta.dtype
        ctx.set_materialize_grads(False)  # nobody else reads the last layer's sum
        return total, output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, grad):
        total, weight, rstd = ctx.saved_tensors
        needs_residual, needs_delta, needs_weight = ctx.needs_input_grad[:3]
        if grad is None:
            grad_delta = None if grad_total is None or not needs_delta else grad_total.to(ctx.delta_dtype)
            return grad_total if needs_residual else None, grad_delta, None, None, None
        grad_residual, grad_delta, grad_weight = rms_norm_backward(
            grad, total, weight, rstd, grad_total, ctx.delta_dtype if needs_delta else None,
            needs_residual or needs_delta, needs_weight,
        )  # fmt: skip
        return grad_residual if needs_residual else None, grad_delta if needs_delta else None, grad_weight, None, None


class _SplitRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, out_dtype):
        first, rest = x.split((weight.shape[0], x.shape[-1] - weight.shape[0]), dim=-1)
        output, rstd, _ = rms_norm_forward(first, weight, eps, out_dtype)
        ctx.save_for_backward(x, weight, rstd)
        return output, rest

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_rest):
        x, weight, rstd = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        width, grad_x = weight.shape[0], torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_x else None
        first = rows_of(grad_x)[:, :width] if needs_x else None
        _, _, grad_weight = rms_norm_backward(
            grad, x[..., :width], weight, rstd, needs_x=needs_x, needs_weight=needs_weight, grad_x=first
        )
        if needs_x:
            grad_x[..., width:].copy_(grad_rest)
        return grad_x, grad_weight, None, None


def rms_norm_twin(x, weight, eps, out_dtype=None):
    wide = torch.promote_types(x.dtype, weight.dtype)
    normed = F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps)
    return normed if out_dtype is None else normed.to(out_dtype)


def fused_rms_norm(x, weight, eps, out_dtype=None):
    """x / rms(x) * weight, the mean in fp32. Source: arXiv:1910.07467, Eq. 4.

    Shapes: x (..., D), its rows may be strided (a slice of a projection's output is not copied), weight (D,) of x's
    dtype or another -> (..., D) of `out_dtype`, by default the wider of both. Saves x and T floats.
    Raises:
        ValueError: if the widths differ.
    """
    _check_width(x, weight)
    if not kernels_run_on(x.device):
        return rms_norm_twin(x, weight, eps, out_dtype)
    return _RMSNorm.apply(x, weight, eps, out_dtype or torch.promote_types(x.dtype, weight.dtype))


def split_rms_norm_twin(x, weight, eps, out_dtype=None):
    first, rest = x.split((weight.shape[0], x.shape[-1] - weight.shape[0]), dim=-1)
    return rms_norm_twin(first, weight, eps, out_dtype), rest


def fused_split_rms_norm(x, weight, eps, out_dtype=None):
    """`fused_rms_norm` of x's first D channels, and the others as they are, a view; both gradients are written into one
    tensor, where those of a split would be copied together.

    Shapes: x (..., D + R), weight (D,) -> (..., D) of `out_dtype`, by default the wider of x's and weight's, (..., R).
    Saves x and T floats.
    Raises:
        ValueError: if x is not wider than weight.
    """
    if weight.dim() != 1 or x.shape[-1] <= weight.shape[0]:
        raise ValueError(f"x {tuple(x.shape)} must have more channels than weight {tuple(weight.shape)}")
    if not kernels_run_on(x.device):
        return split_rms_norm_twin(x, weight, eps, out_dtype)
    return _SplitRMSNorm.apply(x, weight, eps, out_dtype or torch.promote_types(x.dtype, weight.dtype))


def add_rms_norm_twin(residual, delta, weight, eps, out_dtype=None):
    total = residual if delta is None else (residual + delta).to(residual.dtype)
    return total, rms_norm_twin(total, weight, eps, out_dtype)


def fused_add_rms_norm(residual, delta, weight, eps, out_dtype=None):
    """The residual sum and its norm: total = residual + delta, total / rms(total) * weight.

    With None as delta the total is the residual itself. Who reads it there, and not where it came from, leaves it to
    the norm's backward kernel to add both gradients.

    Shapes: residual, delta (..., D), weight (D,) -> total (..., D) of residual's dtype, normed (..., D) of `out_dtype`,
    by default the wider of residual's and weight's. Saves the sum and T floats. Do not change the sum in place.
    Raises:
        ValueError: if residual and delta differ in shape, or weight in width.
    """
    _check_width(residual, weight)
    if delta is not None and residual.shape != delta.shape:
        raise ValueError(f"delta {tuple(delta.shape)} must have residual's shape {tuple(residual.shape)}: expand it")
    if not kernels_run_on(residual.device):
        return add_rms_norm_twin(residual, delta, weight, eps, out_dtype)
    out_dtype = out_dtype or torch.promote_types(residual.dtype, weight.dtype)
    return _AddRMSNorm.apply(residual, delta, weight, eps, out_dtype)


def _check_width(x, weight):
    if weight.dim() != 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"weight {tuple(weight.shape)} must hold one number for each channel of x {tuple(x.shape)}")


# ---- queries and keys ----------------------------------------------------------------------------------------------


class _QueriesKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, key_rope, cos, sin, sizes, interleave, inplace):
        queries, keys = assemble(q, kv, key_rope, cos, sin, *sizes, interleave, inplace)
        ctx.save_for_backward(cos, sin)
        ctx.interleave, ctx.dtypes = interleave, (q.dtype, kv.dtype, key_rope.dtype)
        ctx.inplace = inplace
        if inplace:
            ctx.mark_dirty(q)
        return queries, keys, _values(kv, *sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_queries, grad_keys, grad_values):
        if ctx.inplace:
            grad_queries = grad_queries.unflatten(-1, (grad_keys.shape[1], -1)).transpose(1, 2)
        dtypes = (dtype if needed else None for dtype, needed in zip(ctx.dtypes, ctx.needs_input_grad))
        grads = assemble_backward(grad_queries, grad_keys, grad_values, *ctx.saved_tensors, ctx.interleave, *dtypes)
        return *grads, None, None, None, None, None


def _values(kv, nope, rope, value):
    """(B, S, H * (N + V)) -> (B, H, S, V), a view."""
    return kv.unflatten(-1, (-1, nope + value))[..., nope:].transpose(1, 2)


def queries_keys_twin(q, kv, key_rope, cos, sin, nope, rope, value, interleave):
    from .rotary import rotate  # here: it reads norms, which may read this file

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    query_nope, query_rope = q.unflatten(-1, (-1, nope + rope)).transpose(1, 2).split((nope, rope), dim=-1)
    queries = torch.cat((query_nope, rotate(query_rope, cos, sin, interleave).to(q.dtype)), dim=-1)
    key_nope = kv.unflatten(-1, (-1, nope + value))[..., :nope].transpose(1, 2)
    key_rope = rotate(key_rope.unsqueeze(1), cos, sin, interleave).to(kv.dtype)
    keys = torch.cat((key_nope, key_rope.expand(-1, key_nope.shape[1], -1, -1)), dim=-1)
    return queries, keys, _values(kv, nope, rope, value)


def can_turn_in_place(q):
    """Whether `fused_queries_keys(..., inplace=True)` takes q: a fresh, contiguous result, no view and no leaf.

    It cannot see whether something else keeps q: a forward hook on the projection would find turned queries.
    """
    return q.is_contiguous() and not q._is_view() and not (q.is_leaf and q.requires_grad)


def fused_queries_keys(q, kv, key_rope, cos, sin, nope, rope, value, interleave, inplace=False):
    """Queries and keys of latent attention from what the projections give. Source: DeepSeek-V2 (arXiv:2405.04434),
    Eqs. 10-13; the rotation is `rotary.rotate`.

    Queries and keys lie in memory as (B, S, H, N + R), values are a view of kv: attention kernels take strides.
    `inplace` may turn q in its own memory, which spares two thirds of the traffic of queries. Autograd allows it (q is
    marked as changed: what saved q for its own backward says so, and a linear layer saves none), but not for a view,
    and who kept a reference to q sees turned queries: `can_turn_in_place`. The CPU never does it.

    Shapes (B batch, S sequence, H heads, N nope, R rope, V value): q (B, S, H * (N + R)), kv (B, S, H * (N + V)),
    key_rope (B, S, R), rows may be strided, cos and sin (B or 1, S, R / 2) without gradient -> queries, keys
    (B, H, S, N + R), values (B, H, S, V), of the dtypes of q, kv and kv. Saves cos and sin.
    Raises:
        ValueError: if shapes do not fit, or `inplace` is asked for a q that autograd cannot change in place.
    """
    _check_attention_shapes(q, kv, key_rope, cos, sin, nope, rope, value)
    if not kernels_run_on(q.device):
        return queries_keys_twin(q, kv, key_rope, cos, sin, nope, rope, value, interleave)
    if inplace and not can_turn_in_place(q):
        raise ValueError(
            f"inplace=True needs the contiguous, fresh output of a projection, q is {tuple(q.shape)} with strides "
            f"{q.stride()}, view: {q._is_view()}, leaf: {q.is_leaf}; use inplace=False"
        )
    queries, keys, values = _QueriesKeys.apply(q, kv, key_rope, cos, sin, (nope, rope, value), interleave, inplace)
    return queries.unflatten(-1, (-1, nope + rope)).transpose(1, 2) if inplace else queries, keys, values


def _check_attention_shapes(q, kv, key_rope, cos, sin, nope, rope, value):
    batch, seq, width = q.shape
    heads = width // (nope + rope)
    angles = ((1, seq, rope // 2), (batch, seq, rope // 2))
    if (
        rope % 2
        or width != heads * (nope + rope)
        or kv.shape != (batch, seq, heads * (nope + value))
        or key_rope.shape != (batch, seq, rope)
        or tuple(cos.shape) not in angles
        or cos.shape != sin.shape
    ):
        raise ValueError(
            f"nope={nope}, rope={rope} (even), value={value} do not fit q {tuple(q.shape)}, kv {tuple(kv.shape)}, "
            f"key_rope {tuple(key_rope.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}: for H heads the last "
            "dimensions are H * (nope + rope), H * (nope + value), rope, rope / 2, rope / 2"
        )


# ---- SwiGLU --------------------------------------------------------------------------------------------------------


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return swiglu_forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inputs = ctx.saved_tensors
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) if needed else None
                 for x, needed in zip(inputs, ctx.needs_input_grad)]  # fmt: skip
        swiglu_backward(grad, *inputs, *(None if each is None else rows_of(each) for each in grads))
        return tuple(grads)


class _PackedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return swiglu_forward(*gate_up.chunk(2, dim=-1))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (gate_up,) = ctx.saved_tensors
        output = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
        swiglu_backward(grad, *gate_up.chunk(2, dim=-1), *rows_of(output).chunk(2, dim=-1))
        return output


def swiglu_twin(gate, up):
    return F.silu(gate) * up


def fused_swiglu(gate, up):
    """silu(gate) * up. Source: arXiv:2002.05202, Eq. 6.

    Shapes: (..., I) twice, rows may be strided -> (..., I) contiguous, of the wider dtype. Saves both inputs.
    Raises:
        ValueError: if the shapes differ.
    """
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape")
    return _SwiGLU.apply(gate, up) if kernels_run_on(gate.device) else swiglu_twin(gate, up)


def fused_swiglu_packed(gate_up):
    """`fused_swiglu` of the two halves of one tensor, whose gradient is one tensor too. Shapes: (..., 2 I) -> (..., I).

    Raises:
        ValueError: if the width is odd.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up {tuple(gate_up.shape)} must hold gate and up side by side: an even width")
    return _PackedSwiGLU.apply(gate_up) if kernels_run_on(gate_up.device) else swiglu_twin(*gate_up.chunk(2, dim=-1))
