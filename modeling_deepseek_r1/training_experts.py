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

from .fused import beside, join, kernels_run_on
from .training_expert_products import routed_gradients, routed_rows, runs_own_products
from .training_linear import gated_mlp_backward, gated_mlp_forward

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


def gather_rows_twin(source, back, offsets, count, dtype):
    rows, placed = source.repeat_interleave(back.numel() // max(1, source.shape[0]), 0).to(dtype), back < count
    return rows.new_zeros(count, rows.shape[1]).index_copy(0, back[placed].long(), rows[placed])


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
    hidden, top_k_weights, order, back, offsets, gate_up, down, residual=None, shared=None, recompute=False,
    shared_weights=None,
):  # fmt: skip
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
    if shared_weights is not None:
        gate, up = (F.linear(hidden.to(gate_up.dtype), weight) for weight in shared_weights[:2])
        shared = F.linear(F.silu(gate) * up, shared_weights[2])
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
    """See `fused_experts`. Of row-sized tensors the inputs of both products and what lies between are saved; none with
    `recompute`.

    `mlp`: nothing, or the shared experts' gate, up and down weights; their kernels run `beside` the routed experts'.
    """

    @staticmethod
    def forward(ctx, hidden, top_k_weights, order, back, offsets, gate_up, down, residual, shared, recompute, *mlp):
        run, dtype = _functions(hidden.device), _output_dtype(hidden, residual, gate_up if mlp else shared)
        ctx.recompute, ctx.added_dtypes = recompute, [None if x is None else x.dtype for x in (residual, shared)]
        inputs = hidden, top_k_weights, order, back, offsets, gate_up, down
        if hidden.shape[0] == 0:
            ctx.save_for_backward(*inputs, *mlp)
            return hidden.new_empty(hidden.shape, dtype=dtype)
        if mlp:
            states = hidden.to(gate_up.dtype)
            with beside(hidden):
                shared, mlp = gated_mlp_forward(states, *mlp, recompute)
        ctx.own_products = runs_own_products(gate_up)
        rows, saved = (routed_rows if ctx.own_products else _routed_rows)(*inputs, not recompute)
        ctx.save_for_backward(*inputs, *mlp, *saved)
        del saved
        if mlp:
            join(hidden)
        return run.sum_choices(rows, back, offsets, top_k_weights.shape[1], dtype, residual, shared)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad
        inputs, mlp, saved = tensors[:7], tensors[7 : len(needs) - 3], tensors[len(needs) - 3 :]
        hidden, top_k_weights, _, back, offsets, gate_up, _ = inputs
        narrow = grad.to(gate_up.dtype).contiguous()  # once, for the rows and for `shared`
        added = [(narrow if dtype == narrow.dtype else grad.to(dtype)) if needed else None
                 for needed, dtype in zip(needs[7:9], ctx.added_dtypes)]  # fmt: skip
        floats = *needs[:7], *needs[10:]
        if hidden.shape[0] == 0 or not any(floats):
            zeros = [torch.zeros_like(tensor) if needed else None for tensor, needed in zip(tensors, floats)]
            return *zeros[:7], *added, None, *zeros[7:]
        grad_hidden, grad_states, grads_mlp = None, None, ()
        if mlp:
            states = hidden.to(gate_up.dtype)
            with beside(hidden):
                grad_states, *grads_mlp = gated_mlp_backward(narrow, states, mlp, ctx.recompute, needs[0], *needs[10:])
        gradients = routed_gradients if ctx.own_products else _routed_gradients
        rows, grad_weights, *grads_experts = (
            gradients(narrow, *inputs, saved, needs) if any(needs[:7]) else [None] * 4
        )
        if mlp:
            join(hidden)
        if needs[0]:
            add = _functions(hidden.device).sum_choices
            grad_hidden = add(rows, back, offsets, top_k_weights.shape[1], hidden.dtype, grad_states)
        return grad_hidden, grad_weights, None, None, None, *grads_experts, *added, None, *grads_mlp


def _routed_rows(hidden, top_k_weights, order, back, offsets, gate_up, down, keeps):
    """-> what each pair's expert gives times its gate value (N, D), and if it `keeps` any what its backward reads."""
    run = _functions(hidden.device)
    rows = run.gather_rows(hidden, back, offsets, order.numel(), gate_up.dtype)
    gated = _grouped_product(rows, gate_up.transpose(-2, -1), offsets)
    inner = run.gate_rows(gated, top_k_weights, order, offsets)
    saved = (rows, gated, inner) if keeps else ()
    del rows, gated
    return _grouped_product(inner, down.transpose(-2, -1), offsets), saved


def _routed_gradients(grad, hidden, top_k_weights, order, back, offsets, gate_up, down, saved, needs):
    """`grad` (T, D) of the sums -> of the gathered rows (N, D), the gate values, gate_up and down; each None where
    `needs`, by the place of the input, says so. `saved`: rows, gate-up product and gated product, or nothing."""
    for_hidden, for_weights, _, _, _, for_gate_up, for_down = needs[:7]
    run, dtype, pairs = _functions(hidden.device), gate_up.dtype, order.numel()
    rows, gated, inner = saved or (None, None, None)
    if not saved:
        gated = _grouped_product(run.gather_rows(hidden, back, offsets, pairs, dtype), gate_up.mT, offsets)
    grad_rows = run.gather_rows(grad, back, offsets, pairs, dtype)
    grad_inner = _grouped_product(grad_rows, down, offsets)
    grad_gated, again, grad_weights = run.gate_rows_backward(
        gated, top_k_weights, order, offsets, grad_inner, with_output=for_down and not saved, in_place=not saved
    )
    inner = inner if saved else again
    del gated, grad_inner, again
    grad_down = _grouped_weight_gradient(grad_rows, inner, offsets) if for_down else None
    del grad_rows, inner
    grad_gate_up = None
    if for_gate_up:
        # Gathered once more, where less else is alive.
        rows = run.gather_rows(hidden, back, offsets, pairs, dtype) if rows is None else rows
        grad_gate_up = _grouped_weight_gradient(grad_gated, rows, offsets)
    del rows
    grad_rows = _grouped_product(grad_gated, gate_up, offsets) if for_hidden else None
    return grad_rows, grad_weights if for_weights else None, grad_gate_up, grad_down


def sort_pairs(top_k_index, num_experts):
    """The (token, choice) pairs by expert, and in the order of tokens within an expert.

    Shapes: top_k_index (T, K) integers in [0, E]; E, another rank's expert, sorts last -> order (N,), back (N,),
    offsets (E,), all int32: order[i] is the pair at place i, back[p] the place of pair p, offsets the ends of the runs.
    Never waits for the device.
    """
    return _functions(top_k_index.device).sort_pairs(top_k_index, num_experts)


def fused_experts(
    hidden, top_k_weights, order, back, offsets, gate_up, down, residual=None, shared=None, recompute=False,
    shared_weights=None,
):  # fmt: skip
    """residual[t] + shared[t] + sum_k weight[t, k] * expert(hidden[t]), silu experts, all float tensors differentiable.

    What the shared experts add is given as `shared`, or made here, beside the routed experts, from `shared_weights`.

    The matmuls run in the dtype of gate_up and down, whatever the dtypes of hidden and residual; gate, sums and the
    weights' gradients are in fp32. `recompute` spares the memory of the gathered rows (N, D), of the gate-up product
    (N, 2 I) and of the gated one (N, I) for two gathers, a grouped matmul and a write of (N, I) more in the backward.
    Pairs of other ranks' experts add nothing and receive no gradient; who knows how many there are may leave their end
    of `order` out, and nothing is allocated for them.

    Shapes: hidden (T, D), top_k_weights (T, K) any float dtype, order, back, offsets from `sort_pairs`,
    gate_up (E, 2 I, D), down (E, D, I) of one dtype, residual and shared (T, D) or None, shared_weights: gate (J, D),
    up (J, D) and down (D, J) of the dtype of gate_up, or None -> (T, D) in the widest dtype of hidden, residual and
    shared.
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
    if shared_weights is not None and (shared is not None or any(x.dtype != gate_up.dtype for x in shared_weights)):
        raise ValueError(f"shared_weights of {[x.dtype for x in shared_weights]} come without `shared` and in the "
                         f"dtype of gate_up, {gate_up.dtype}: cast them, and give one of the two")  # fmt: skip
    if _has_grouped_mm(gate_up) and (width % 8 or inner % 8):
        raise ValueError(f"hidden_size={width} and moe_intermediate_size={inner} must be multiples of 8 for torch's "
                         "grouped matmul on CUDA; use such sizes, or experts_implementation='eager'")  # fmt: skip
    residual, shared = (part if part is None else part.contiguous() for part in (residual, shared))
    return _FusedExperts.apply(
        hidden.contiguous(), top_k_weights.contiguous(), order, back, offsets, gate_up, down, residual, shared,
        recompute, *(shared_weights or ()),
    )  # fmt: skip
