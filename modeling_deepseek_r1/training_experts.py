"""The routed experts' training step as one autograd function that saves little and moves each row few times.

The (token, choice) pairs are sorted by expert, so that torch's grouped matmul serves all experts at once; between the
matmuls run the kernels of `kernels_expert_rows` (on CUDA) or their torch twins below (elsewhere). The gate values go in
before the down projection: sum_k w_k down(h_k) = sum_k down(w_k h_k). Then the choices are combined by a plain sum,
whose gradient is a gather, and the gradient of w_k comes from h_k, not from a stored output.

Source: DeepSeek-V3 (arXiv:2412.19437), Eq. 12, the routed sum; each expert is SwiGLU (arXiv:2002.05202).
Names in shapes, `order`, `back` and `offsets`: see `kernels_expert_rows`.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  brings torch.ops.transformers.grouped_mm_fallback
from torch.autograd.function import once_differentiable

from .fused import kernels_run_on

try:
    from .kernels_expert_rows import (
        gate_rows,
        gate_rows_backward,
        gather_rows,
        sort_pairs_kernels,
        sum_choices,
        zero_empty_experts,
    )

    KERNELS = SimpleNamespace(
        sort_pairs=sort_pairs_kernels, gather_rows=gather_rows, gate_rows=gate_rows,
        gate_rows_backward=gate_rows_backward, sum_choices=sum_choices,
    )  # fmt: skip
except ImportError:  # no triton: the twins below serve
    KERNELS = None


# ---- twins ---------------------------------------------------------------------------------------------------------


def sort_pairs_twin(top_k_index, num_experts):
    """As `sort_pairs`, by a stable sort."""
    expert_of = top_k_index.flatten()
    order = expert_of.argsort(stable=True)
    back = torch.empty_like(order).scatter(0, order, torch.arange(order.numel(), device=order.device))
    counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=order.device)
    counts = counts.scatter_add(0, expert_of.long(), torch.ones_like(expert_of, dtype=torch.int32))
    return order.int(), back.int(), counts[:num_experts].cumsum(0, dtype=torch.int32)


def gather_rows_twin(source, order, offsets, top_k, dtype):
    return source.index_select(0, order // top_k).to(dtype)


def _without_foreign(rows, offsets):
    """rows (N, ...) by expert, zeros in place of those of other ranks' experts, which may be anything."""
    local = int(offsets[-1])
    if local == rows.shape[0]:
        return rows
    return torch.cat((rows[:local], torch.zeros_like(rows[local:])))


def sum_choices_twin(rows, back, offsets, top_k, dtype, residual=None, shared=None):
    local = int(offsets[-1])
    rows = torch.cat((rows[:local], rows.new_zeros(1, rows.shape[1])))  # the last for all pairs of other ranks
    chosen = rows.index_select(0, back.clamp(max=local)).float()
    total = chosen.view(back.numel() // top_k, top_k, rows.shape[1]).sum(1)
    return _plus(total, residual, shared).to(dtype)


def _plus(total, *parts):
    for part in parts:
        total = total if part is None else total + part.float()
    return total


def gate_rows_twin(gate_up, weights, order, offsets):
    gate, up = gate_up.float().chunk(2, dim=-1)
    weight = weights.flatten().index_select(0, order).float().unsqueeze(-1)
    return (F.silu(gate) * up * weight).to(gate_up.dtype)


def gate_rows_backward_twin(gate_up, weights, order, offsets, grad_output, with_output=True, in_place=False):
    """As `kernels_expert_rows.gate_rows_backward`; `in_place` is a permission that it has no use for."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    weight, grad = weights.flatten().index_select(0, order).float().unsqueeze(-1), grad_output.float()
    sigmoid, silu = gate.sigmoid(), F.silu(gate)
    grad_gate = grad * weight * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    of_rows = _without_foreign((grad * silu * up).sum(-1), offsets)
    grad_weights = of_rows.new_zeros(weights.numel()).scatter(0, order.long(), of_rows)
    grad_weights = grad_weights.view(weights.shape).to(weights.dtype)
    output = (silu * up * weight).to(gate_up.dtype) if with_output else None
    return torch.cat((grad_gate, grad * weight * silu), -1).to(gate_up.dtype), output, grad_weights


TWINS = SimpleNamespace(
    sort_pairs=sort_pairs_twin, gather_rows=gather_rows_twin, gate_rows=gate_rows_twin,
    gate_rows_backward=gate_rows_backward_twin, sum_choices=sum_choices_twin,
)  # fmt: skip


def fused_experts_twin(
    hidden, top_k_weights, order, back, offsets, gate_up, down, residual=None, shared=None, recompute=False
):
    """As `fused_experts`, expert after expert in plain torch, with autograd's own gradients; saves everything."""
    top_k, begin, results = top_k_weights.shape[1], 0, []
    rows = hidden.index_select(0, order // top_k).to(gate_up.dtype)
    weights = top_k_weights.flatten().index_select(0, order).float().unsqueeze(-1)
    for expert, end in enumerate(offsets.tolist()):
        gate, up = F.linear(rows[begin:end], gate_up[expert]).float().chunk(2, dim=-1)
        inner = (F.silu(gate) * up * weights[begin:end]).to(gate_up.dtype)
        results.append(F.linear(inner, down[expert]))
        begin = end
    results.append(torch.zeros_like(rows[begin:]))
    total = torch.cat(results).index_select(0, back).float().view(*top_k_weights.shape, hidden.shape[1]).sum(1)
    return _plus(total, residual, shared).to(_output_dtype(hidden, residual, shared))


# ---- the step ------------------------------------------------------------------------------------------------------


def _functions(device):
    return KERNELS if kernels_run_on(device) else TWINS


def _output_dtype(hidden, *parts):
    dtype = hidden.dtype
    for part in parts:
        dtype = dtype if part is None else torch.promote_types(dtype, part.dtype)
    return dtype


def _has_grouped_mm(tensor):
    return tensor.device.type == "cuda" and tensor.dtype == torch.bfloat16


def _grouped_product(rows, weight, offsets):
    """rows (N, A) by expert, weight (E, A, B) -> (N, B). Rows of other ranks' experts are left undefined."""
    if _has_grouped_mm(rows):
        return F.grouped_mm(rows, weight, offs=offsets)
    return torch.ops.transformers.grouped_mm_fallback(rows, weight, offsets)


def _grouped_weight_gradient(left, right, offsets):
    """left (N, A), right (N, B) by expert -> left^T right over each expert's rows (E, A, B); zeros for an empty one."""
    if _has_grouped_mm(left):
        return zero_empty_experts(F.grouped_mm(left.t(), right, offs=offsets), offsets)
    gradient = left.new_zeros(offsets.numel(), left.shape[1], right.shape[1])
    begin = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > begin:
            torch.mm(left[begin:end].t(), right[begin:end], out=gradient[expert])
        begin = end
    return gradient


class _FusedExperts(torch.autograd.Function):
    """See `fused_experts`. Of row-sized tensors the inputs and the gate-up product are saved; none with `recompute`."""

    @staticmethod
    def forward(ctx, hidden, top_k_weights, order, back, offsets, gate_up, down, residual, shared, recompute):
        run, top_k, dtype = _functions(hidden.device), top_k_weights.shape[1], _output_dtype(hidden, residual, shared)
        ctx.added_dtypes = [None if part is None else part.dtype for part in (residual, shared)]
        if hidden.shape[0] == 0:
            ctx.save_for_backward(hidden, top_k_weights, order, back, offsets, gate_up, down, None, None)
            return hidden.new_empty(hidden.shape, dtype=dtype)
        rows = run.gather_rows(hidden, order, offsets, top_k, gate_up.dtype)
        gated = _grouped_product(rows, gate_up.transpose(-2, -1), offsets)
        saved = (None, None) if recompute else (rows, gated)
        ctx.save_for_backward(hidden, top_k_weights, order, back, offsets, gate_up, down, *saved)
        del rows
        inner = run.gate_rows(gated, top_k_weights, order, offsets)
        del gated, saved
        rows = _grouped_product(inner, down.transpose(-2, -1), offsets)
        del inner
        return run.sum_choices(rows, back, offsets, top_k, dtype, residual, shared)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, top_k_weights, order, back, offsets, gate_up, down, rows, gated = ctx.saved_tensors
        for_hidden, for_weights, _, _, _, for_gate_up, for_down, *for_added, _ = ctx.needs_input_grad
        narrow = grad.to(gate_up.dtype)  # once, for the rows and for `shared`
        added = [(narrow if dtype == narrow.dtype else grad.to(dtype)) if wanted else None
                 for wanted, dtype in zip(for_added, ctx.added_dtypes)]  # fmt: skip
        if hidden.shape[0] == 0 or not (for_hidden or for_weights or for_gate_up or for_down):
            zeros = [torch.zeros_like(tensor) if wanted else None for tensor, wanted in (
                (hidden, for_hidden), (top_k_weights, for_weights), (gate_up, for_gate_up), (down, for_down))]
            return *zeros[:2], None, None, None, *zeros[2:], *added, None
        run, top_k, dtype = _functions(hidden.device), top_k_weights.shape[1], gate_up.dtype
        recompute = gated is None
        if recompute:
            rows = run.gather_rows(hidden, order, offsets, top_k, dtype)
            gated = _grouped_product(rows, gate_up.transpose(-2, -1), offsets)
            rows = None  # gathered once more below, where less else is alive
        grad_rows = run.gather_rows(narrow.contiguous(), order, offsets, top_k, dtype)
        grad_inner = _grouped_product(grad_rows, down, offsets)
        grad_gated, inner, grad_weights = run.gate_rows_backward(
            gated, top_k_weights, order, offsets, grad_inner, with_output=for_down, in_place=recompute
        )
        del gated, grad_inner
        grad_down = _grouped_weight_gradient(grad_rows, inner, offsets) if for_down else None
        del grad_rows, inner
        grad_gate_up = grad_hidden = None
        if for_gate_up:
            rows = run.gather_rows(hidden, order, offsets, top_k, dtype) if rows is None else rows
            grad_gate_up = _grouped_weight_gradient(grad_gated, rows, offsets)
        del rows
        if for_hidden:
            rows = _grouped_product(grad_gated, gate_up, offsets)
            del grad_gated
            grad_hidden = run.sum_choices(rows, back, offsets, top_k, hidden.dtype)
        grad_weights = grad_weights if for_weights else None
        return grad_hidden, grad_weights, None, None, None, grad_gate_up, grad_down, *added, None


def sort_pairs(top_k_index, num_experts):
    """The (token, choice) pairs by expert, and in the order of tokens within an expert.

    Shapes: top_k_index (T, K) integers in [0, E]; E, another rank's expert, sorts last -> order (N,), back (N,),
    offsets (E,), all int32: order[i] is the pair at place i, back[p] the place of pair p, offsets the ends of the runs.
    Never waits for the device.
    """
    return _functions(top_k_index.device).sort_pairs(top_k_index, num_experts)


def fused_experts(
    hidden, top_k_weights, order, back, offsets, gate_up, down, residual=None, shared=None, recompute=False
):
    """residual[t] + shared[t] + sum_k weight[t, k] * expert(hidden[t]), silu experts, all float tensors differentiable.

    The matmuls run in the dtype of gate_up and down, whatever the dtypes of hidden and residual; gate, sums and the
    weights' gradients are in fp32. `recompute` spares the memory of the gathered rows (N, D) and of the gate-up
    product (N, 2 I) for two gathers and a grouped matmul more in the backward. Pairs of other ranks' experts add
    nothing and receive no gradient; who knows how many there are may leave their end of `order` out, and nothing is
    allocated for them.

    Shapes: hidden (T, D), top_k_weights (T, K) any float dtype, order, back, offsets from `sort_pairs`,
    gate_up (E, 2 I, D), down (E, D, I) of one dtype, residual and shared (T, D) or None -> (T, D) in the widest dtype
    of hidden, residual and shared.
    Raises:
        ValueError: if shapes or dtypes do not fit together, or a width does not suit torch's grouped matmul on CUDA.
    """
    (tokens, width), (experts, inner) = hidden.shape, (down.shape[0], down.shape[-1])
    if gate_up.shape != (experts, 2 * inner, width) or down.shape != (experts, width, inner):
        raise ValueError(f"gate_up {tuple(gate_up.shape)} and down {tuple(down.shape)} must be (E, 2 I, D) and "
                         f"(E, D, I) with D={width}, the width of hidden")  # fmt: skip
    if gate_up.dtype != down.dtype:
        raise ValueError(f"gate_up is {gate_up.dtype} and down {down.dtype}: cast both to the dtype to compute in")
    pairs = top_k_weights.numel()
    if top_k_weights.shape[0] != tokens or back.numel() != pairs or not min(pairs, 1) <= order.numel() <= pairs:
        raise ValueError(f"top_k_weights {tuple(top_k_weights.shape)}, order ({order.numel()},) and back "
                         f"({back.numel()},) must hold K choices for each of the {tokens} tokens of hidden, order may "
                         "end with the last local one; take order and back from sort_pairs")  # fmt: skip
    if offsets.numel() != experts:
        raise ValueError(f"offsets has {offsets.numel()} entries for {experts} experts: sort_pairs(index, {experts})")
    for name, part in (("residual", residual), ("shared", shared)):
        if part is not None and part.shape != hidden.shape:
            raise ValueError(f"{name} {tuple(part.shape)} must have the shape of hidden, {tuple(hidden.shape)}")
    if _has_grouped_mm(gate_up) and (width % 8 or inner % 8):
        raise ValueError(f"hidden_size={width} and moe_intermediate_size={inner} must be multiples of 8 for torch's "
                         "grouped matmul on CUDA; use such sizes, or experts_implementation='eager'")  # fmt: skip
    residual, shared = (part if part is None else part.contiguous() for part in (residual, shared))
    return _FusedExperts.apply(
        hidden.contiguous(), top_k_weights.contiguous(), order, back, offsets, gate_up, down, residual, shared,
        recompute,
    )  # fmt: skip
