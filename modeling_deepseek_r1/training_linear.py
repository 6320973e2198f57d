"""Linear layers around one input as one differentiable function: gated MLPs, and two projections of the same states.

The gradients of an input that several matrices read are added where the second product is made, not in a pass of their
own. `gated_mlp_forward` and `gated_mlp_backward` are also what the routed experts' function runs beside them, on a
second stream where that is switched on (`fused.set_second_stream`). Gradients of gradients are refused.

Names in shapes: T tokens, D hidden_size, I inner width.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .fused import kernels_run_on

try:
    from .kernels_norms import swiglu_backward, swiglu_forward
except ImportError:  # no triton: the twins below serve
    pass


# ---- gated MLP -----------------------------------------------------------------------------------------------------


def _swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return swiglu_forward(gate, up) if kernels_run_on(gate_up.device) else F.silu(gate) * up


def _swiglu_gradient(gate_up, grad, with_output):
    """-> gradient of gate_up (T, 2 I), and `_swiglu` once more (T, I) or None; it may take the place of `grad`."""
    if not kernels_run_on(gate_up.device):
        gate, up = gate_up.chunk(2, dim=-1)
        sigmoid, silu = gate.sigmoid(), F.silu(gate)
        grad_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        return torch.cat((grad_gate, grad * silu), dim=-1), silu * up if with_output else None
    grad_gate_up, output = torch.empty_like(gate_up), grad if with_output else None
    swiglu_backward(grad, *gate_up.chunk(2, dim=-1), *grad_gate_up.chunk(2, dim=-1), output)
    return grad_gate_up, output


def gated_mlp_forward(x, gate_weight, up_weight, down_weight, recompute):
    """-> down(silu(gate(x)) * up(x)) (T, D), and three tensors for `gated_mlp_backward`."""
    # One matrix product for both halves, also in the backward: copying two weights costs less than two products.
    weight = torch.cat((gate_weight, up_weight))
    gate_up = F.linear(x, weight)
    kept = (gate_weight, up_weight, down_weight) if recompute else (weight, gate_up, down_weight)
    return F.linear(_swiglu(gate_up), down_weight), kept


def gated_mlp_backward(grad, x, kept, recompute, needs_x, needs_gate, needs_up, needs_down):
    """`grad` (T, D), contiguous, and what `gated_mlp_forward` left -> the gradients of x and of the three weights, None
    for what is not needed."""
    weight, gate_up, down_weight = kept
    if recompute:
        weight = torch.cat((weight, gate_up))
        gate_up = F.linear(x, weight)
    grad_gate_up, inner = _swiglu_gradient(gate_up, grad @ down_weight, needs_down)
    grad_down = grad.t() @ inner if needs_down else None
    del inner, gate_up
    grad_x = grad_gate_up @ weight if needs_x else None
    grad_gate = grad_up = None
    if needs_gate or needs_up:
        grad_gate, grad_up = (grad_gate_up.t() @ x).chunk(2)
    return grad_x, grad_gate if needs_gate else None, grad_up if needs_up else None, grad_down


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate_weight, up_weight, down_weight, recompute):
        output, kept = gated_mlp_forward(x, gate_weight, up_weight, down_weight, recompute)
        ctx.recompute = recompute
        ctx.save_for_backward(x, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, *kept = ctx.saved_tensors
        return *gated_mlp_backward(grad.contiguous(), x, kept, ctx.recompute, *ctx.needs_input_grad[:4]), None


def fused_gated_mlp(x, gate_weight, up_weight, down_weight, recompute=False):
    """down(silu(gate(x)) * up(x)) with all four tensors of one dtype. Source: arXiv:2002.05202, Eq. 6.

    Saves x, gate and up and a copy of both weights; the gated product is made again in the backward. With `recompute`
    it saves x and the weights, for one matmul more in the backward.
    Shapes: x (T, D), gate_weight and up_weight (I, D), down_weight (D, I) -> (T, D).
    """
    if not torch.is_grad_enabled():  # copying the weights pays for long backward passes only, not for a few tokens
        gate, up = F.linear(x, gate_weight), F.linear(x, up_weight)
        return F.linear(swiglu_forward(gate, up) if kernels_run_on(x.device) else F.silu(gate) * up, down_weight)
    return _GatedMLP.apply(x.contiguous(), gate_weight, up_weight, down_weight, recompute)


# ---- two projections -----------------------------------------------------------------------------------------------


class _TwoLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, first, second):
        ctx.save_for_backward(x, first, second)
        ctx.set_materialize_grads(False)
        return F.linear(x, first), F.linear(x, second)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, *weights = ctx.saved_tensors
        rows, grad_x, grad_weights = x.flatten(0, -2), None, []
        for grad, weight, needed in zip(grads, weights, ctx.needs_input_grad[1:]):
            grad = None if grad is None else grad.flatten(0, -2)
            if grad is not None and ctx.needs_input_grad[0]:
                # Our own fresh product, so that the second may be added in place.
                grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
            grad_weights.append(grad.t() @ rows if needed and grad is not None else None)
        return None if grad_x is None else grad_x.view(x.shape), *grad_weights


def fused_two_linears(x, first, second):
    """x first^T and x second^T, all of one dtype; the gradients of x are added inside the second's matrix product.

    Shapes: x (..., D), first (A, D), second (B, D) -> (..., A), (..., B). Saves its inputs.
    """
    return _TwoLinears.apply(x, first, second)
