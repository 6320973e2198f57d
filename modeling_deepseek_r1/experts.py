"""Routed experts: weights in three 3-D tensors, the loop that defines the result, and the grouped path that is fast."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ExpertsInterface

from .compute_copies import in_dtype
from .fused import runs_fused
from .layout import fuse_expert_keys
from .training_cpu import ExpertsFunction, is_silu, serves
from .training_experts import fused_experts, sort_pairs

# The library's experts functions, with our own under the name the library picks by default.
EXPERTS = ExpertsInterface()


def compute_dtype(tensor):
    """The dtype in which a linear layer on `tensor` computes: autocast's where it is on, else the tensor's own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


@use_experts_implementation(experts_interface=EXPERTS)
class DeepSeekR1Experts(nn.Module):
    """E gated MLPs; this `forward` is the `eager` reference, other names are looked up in `EXPERTS`.

    Source: DeepSeek-V3 (arXiv:2412.19437), Eq. 12, the routed sum; each expert is SwiGLU (arXiv:2002.05202).

    Shapes (T tokens, D hidden_size, E experts, I moe_intermediate_size, K choices):
        gate_up_proj (E, 2 I, D), down_proj (E, D, I); hidden_states (T, D), top_k_index (T, K) int64,
        top_k_weights (T, K) -> (T, D). An index equal to E (expert parallelism's mark for another rank's expert)
        contributes nothing.
    """

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.hidden_dim, self.intermediate_dim = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]
        self.register_load_state_dict_pre_hook(fuse_expert_keys)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, choice = torch.where(top_k_index == expert)
            if token.numel() == 0:
                continue
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            result = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            output = output.index_add(0, token, (result * top_k_weights[token, choice, None]).to(output.dtype))
        return output

    def runs_fused(self, hidden_states):
        """Whether `fused` serves: on CUDA, in bf16, with the grouped matmuls that torch has there."""
        return (
            runs_fused(hidden_states, self.gate_up_proj, self.down_proj)
            and compute_dtype(hidden_states) == torch.bfloat16
            and is_silu(self.act_fn)
            and self.config._experts_implementation == "grouped_mm"
            and self.hidden_dim % 8 == self.intermediate_dim % 8 == 0
        )

    def fused(
        self, hidden_states, top_k_index, top_k_weights, residual=None, shared=None, recompute=False,
        shared_weights=None, pairs=None,
    ):  # fmt: skip
        """`forward`, plus `residual` and `shared` (T, D) if they are given, by the kernels of training. `recompute`,
        `shared_weights`: see `fused_experts`. `pairs`: how many of `top_k_index` are below E, where that is known."""
        dtype = compute_dtype(hidden_states)
        order, back, offsets = sort_pairs(top_k_index, self.num_experts)
        return fused_experts(
            hidden_states.to(dtype), top_k_weights, order[:pairs], back, offsets,
            in_dtype(self.gate_up_proj, dtype), in_dtype(self.down_proj, dtype), residual, shared, recompute,
            shared_weights,
        )  # fmt: skip


def grouped_linear(rows, weight, offsets):
    """rows (N, D_in) sorted by expert, weight (E, D_out, D_in), offsets (E,) int32 ends of the runs -> (N, D_out).

    Rows past the last offset are left undefined, as torch's kernel leaves them.
    """
    if rows.device.type == "cuda" and rows.dtype == torch.bfloat16:
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=offsets)
    # Elsewhere torch has no fused kernel, and its own fallback cannot be compiled as part of a whole graph.
    return torch.ops.transformers.grouped_mm_fallback(rows, weight.transpose(-2, -1), offsets)


class _TakeRows(torch.autograd.Function):
    """source[index // fan_out] for a permutation `index`; the backward is a gather too, not a scatter.

    Shapes: source (T, D), index and its inverse `back` (T * fan_out,) int64 -> (T * fan_out, D).
    """

    @staticmethod
    def forward(ctx, source, index, back, fan_out):
        ctx.save_for_backward(back)
        ctx.fan_out = fan_out
        return source.index_select(0, index // fan_out if fan_out > 1 else index)

    @staticmethod
    def backward(ctx, grad):
        (back,) = ctx.saved_tensors
        grad = grad.index_select(0, back)
        return (grad.unflatten(0, (-1, ctx.fan_out)).sum(1) if ctx.fan_out > 1 else grad), None, None, None


def grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights):
    """The same sum by sorting the (token, choice) pairs by expert and multiplying each run with its expert.

    Under autocast the weights are cast to the compute dtype first; torch's grouped matmul knows no autocast and would
    multiply fp32 master weights in fp32.
    """
    if self.runs_fused(hidden_states):
        return self.fused(hidden_states, top_k_index, top_k_weights).to(hidden_states.dtype)
    if is_silu(self.act_fn) and serves(hidden_states, top_k_weights, self.gate_up_proj, self.down_proj):
        return ExpertsFunction.apply(hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj)
    tokens, top_k = top_k_index.shape
    dtype = compute_dtype(hidden_states)
    expert_of = top_k_index.flatten()
    order = expert_of.argsort(stable=True)
    counts = torch.zeros(self.num_experts + 1, dtype=torch.int32, device=order.device)
    counts = counts.scatter_add(0, expert_of, torch.ones_like(expert_of, dtype=torch.int32))
    offsets = counts[: self.num_experts].cumsum(0, dtype=torch.int32)

    back = torch.empty_like(order).scatter(0, order, torch.arange(order.numel(), device=order.device))

    rows = _TakeRows.apply(hidden_states.to(dtype), order, back, top_k)
    foreign = (expert_of[order] == self.num_experts).unsqueeze(-1) if self._is_expert_parallel else None
    rows = rows if foreign is None else rows.masked_fill(foreign, 0.0)
    hidden = grouped_linear(rows, in_dtype(self.gate_up_proj, dtype), offsets)
    hidden = hidden if foreign is None else hidden.masked_fill(foreign, 0.0)
    result = grouped_linear(self._apply_gate(hidden), in_dtype(self.down_proj, dtype), offsets)
    result = result if foreign is None else result.masked_fill(foreign, 0.0)

    # A gather and a sum over the choices, not an index_add: the same result on every run, also on CUDA.
    result = _TakeRows.apply(result, back, order, 1).unflatten(0, (tokens, top_k))
    if result.dtype == top_k_weights.dtype:
        return torch.bmm(top_k_weights.unsqueeze(1), result).squeeze(1).to(hidden_states.dtype)
    return (result * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


EXPERTS["grouped_mm"] = grouped_mm_experts_forward
