"""The routed experts' products forward and backward by the kernels of `kernels_expert_products`.

In place of torch's grouped matmul and what stands around it, on Hopper or as `fused.set_expert_products` says. Names in
shapes: see `kernels_expert_rows`.
"""

import torch

from .fused import expert_products_chosen, kernels_run_on

try:
    from .kernels_expert_products import (
        Schedule,
        Tokens,
        gate_up_product,
        inner_gradient,
        rows_product,
        schedule,
        weight_gradient,
    )
except ImportError:  # no triton: torch's products serve
    schedule = None


def runs_own_products(weight):
    """Whether these kernels are chosen and serve experts with such weights: bf16 on Hopper, for whose memory the tiles
    are cut; anything in the interpreter."""
    if schedule is None or not expert_products_chosen(weight.device) or not kernels_run_on(weight.device):
        return False
    return not weight.is_cuda or (
        weight.dtype == torch.bfloat16 and torch.cuda.get_device_capability(weight.device)[0] == 9
    )


def routed_rows(hidden, top_k_weights, order, back, offsets, gate_up, down, keeps):
    """As `training_experts._routed_rows`, for `routed_gradients`."""
    plan = schedule(offsets, order.numel())
    gated, inner, rows = gate_up_product(
        hidden.to(gate_up.dtype), top_k_weights, order, back, offsets, plan, gate_up.contiguous()
    )
    saved = (gated, inner, *plan, *(() if rows is None else (rows,))) if keeps else ()
    del gated, rows
    return rows_product(inner, down.contiguous(), plan, True, "down"), saved


def routed_gradients(grad, hidden, top_k_weights, order, back, offsets, gate_up, down, saved, needs):
    """As `training_experts._routed_gradients`."""
    for_hidden, for_weights, _, _, _, for_gate_up, for_down = needs[:7]
    hidden, gate_up, down = hidden.to(gate_up.dtype), gate_up.contiguous(), down.contiguous()
    plan = Schedule(*saved[2:4]) if saved else schedule(offsets, order.numel())
    if saved:
        gated, inner, rows = *saved[:2], saved[4] if len(saved) > 4 else None
    else:
        gated, inner, rows = gate_up_product(hidden, top_k_weights, order, back, offsets, plan, gate_up)
    grad_gated, grad_weights, grad_rows = inner_gradient(grad, top_k_weights, order, back, offsets, plan, down, gated)
    del gated
    over_rows = lambda *sides, name: weight_gradient(offsets, order, plan, top_k_weights.shape[1], *sides, name)
    grad_down = grad_gate_up = None
    if for_down:
        grad_down = over_rows(Tokens(grad) if grad_rows is None else grad_rows, inner, name="down_gradient")
    del grad_rows, inner
    if for_gate_up:
        rows = Tokens(hidden) if rows is None else rows
        grad_gate_up = over_rows(grad_gated, rows, name="gate_up_gradient")
    grad_rows = rows_product(grad_gated, gate_up, plan, False, "rows_gradient") if for_hidden else None
    return grad_rows, grad_weights if for_weights else None, grad_gate_up, grad_down
