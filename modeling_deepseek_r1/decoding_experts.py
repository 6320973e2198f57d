"""What the expert, router and few-row linear kernels compute, in plain torch, and the experts for few tokens on CPU.

Each `x_twin` takes the arguments of `x` in kernels_linear.py, kernels_routing.py and kernels_experts.py, where shapes
are described, and rounds to the tensors' dtype where the kernel does; all else is fp32. Results are written in place.
"""

import torch
import torch.nn.functional as F

try:
    import triton
except ImportError:
    triton = None

from .experts import EXPERTS, compute_dtype, grouped_mm_experts_forward


def _norm(x, weight, eps):
    values = x.float()
    return (values * (values.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()).to(x.dtype)


def few_rows_linear_twin(x, weights, outputs, norm_weight=None, norm_eps=0.0, residual=None):
    rows = (x if norm_weight is None else _norm(x, norm_weight, norm_eps)).float()
    for weight, output in zip(weights, outputs):
        product = F.linear(rows, weight.float())
        output.copy_(product if residual is None else product + residual.float())


def route_twin(
    x, norm_weight, norm_eps, gate_weight, bias, normed, topk_index, topk_weight, expert_count, expert_tokens,
    scoring, n_group, topk_group, group_score, top_k, norm_topk, scaling, logits=None, tickets=None,
):  # fmt: skip
    """RMS norm, affinities in fp32, the K best of the best groups by biased affinity, gate values, the lists.

    Source: DeepSeek-V3 (arXiv:2412.19437), Sec. 2.1.2, Eqs. 13, 15, 16; as the modules of routing.py.
    """
    normed.copy_(_norm(x, norm_weight, norm_eps))
    values = F.linear(normed.float(), gate_weight.float())
    if logits is not None:
        logits.copy_(values)
    scores = values.sigmoid() if scoring == "sigmoid" else values.softmax(-1)
    choice = scores if bias is None else scores + bias
    if n_group > 1:
        groups = choice.unflatten(-1, (n_group, -1))
        ranked = groups.sort(-1, descending=True).values
        group_scores = ranked[..., :2].sum(-1) if group_score == "sum2" else ranked[..., 0]
        kept = torch.zeros_like(group_scores).scatter(-1, group_scores.topk(topk_group, dim=-1).indices, 1.0)
        choice = groups.masked_fill(kept.unsqueeze(-1) == 0, -torch.inf).flatten(-2)
    index = choice.topk(top_k, dim=-1).indices
    weight = scores.gather(-1, index)
    if norm_topk:
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-20)
    topk_index.copy_(index)
    topk_weight.copy_(weight * scaling)
    list_pairs_twin(topk_index, expert_count, expert_tokens)


def list_pairs_twin(topk_index, expert_count, expert_tokens):
    for pair, expert in enumerate(topk_index.flatten().tolist()):
        if expert < expert_count.shape[0]:
            expert_tokens[expert, expert_count[expert]] = pair
            expert_count[expert] += 1


def experts_gate_up_twin(
    normed, gate_up_proj, shared_gate, shared_up, topk_index, expert_count, expert_tokens, hidden, shared_hidden,
    act="silu",
):  # fmt: skip
    if act != "silu":
        raise ValueError(f"hidden_act={act!r}: the decoding kernels compute 'silu'; use the ordinary experts")
    for pair, expert in enumerate(topk_index.flatten().tolist()):
        if expert < gate_up_proj.shape[0]:
            row = normed[pair // topk_index.shape[1]].float()
            gate, up = F.linear(row, gate_up_proj[expert].float()).chunk(2)
            hidden[pair] = F.silu(gate) * up
    if shared_gate is not None:
        rows = normed.float()
        shared_hidden.copy_(F.silu(F.linear(rows, shared_gate.float())) * F.linear(rows, shared_up.float()))


def experts_down_twin(
    hidden, shared_hidden, down_proj, shared_down, topk_index, topk_weight, residual, output,
    expert_count=None, expert_tokens=None, shared_output=None, results=None,
):  # fmt: skip
    total = torch.zeros(output.shape, dtype=torch.float32, device=output.device)
    if residual is not None:
        total += residual.float()
    for pair, expert in enumerate(topk_index.flatten().tolist()):
        if expert < down_proj.shape[0]:
            token, choice = divmod(pair, topk_index.shape[1])
            total[token] += topk_weight[token, choice] * F.linear(hidden[pair].float(), down_proj[expert].float())
    if shared_down is not None:
        total += F.linear(shared_hidden.float(), shared_down.float())
    if shared_output is not None:
        total += shared_output.float()
    output.copy_(total)


def experts_forward_twin(
    normed, gate_up_proj, down_proj, shared, topk_index, topk_weight, expert_count, expert_tokens, residual, output,
    act="silu", shared_output=None,
):  # fmt: skip
    gate, up, down = (None, None, None) if shared is None else shared
    hidden = normed.new_empty(topk_index.numel(), down_proj.shape[2])
    shared_hidden = None if shared is None else normed.new_empty(normed.shape[0], gate.shape[0])
    experts_gate_up_twin(
        normed, gate_up_proj, gate, up, topk_index, expert_count, expert_tokens, hidden, shared_hidden, act
    )
    experts_down_twin(
        hidden, shared_hidden, down_proj, down, topk_index, topk_weight, residual, output,
        expert_count, expert_tokens, shared_output,
    )  # fmt: skip
    return output


def experts_few_tokens(hidden_states, top_k_index, top_k_weights, experts_module):
    """The routed sum for few tokens on CPU: a loop over the chosen experts, whose weights are read in place and once.

    A processor is as fast as its memory here: gathering the chosen weights for one batched product would read them
    twice and write them once. Takes `DeepSeekR1Experts` and its arguments: hidden_states (T, D), top_k_index (T, K),
    top_k_weights (T, K) -> (T, D). An index of E adds nothing. Differentiable; reads the indices on the host.
    """
    dtype, experts = compute_dtype(hidden_states), experts_module.num_experts
    gate_up, down, act = experts_module.gate_up_proj, experts_module.down_proj, experts_module.act_fn
    tokens, top_k = top_k_index.shape
    rows = hidden_states.to(dtype)
    if tokens == 1:
        parts = []
        for expert in top_k_index[0].tolist():
            if expert < experts:
                gate, up = F.linear(rows, gate_up[expert].to(dtype)).chunk(2, dim=-1)
                parts.append(F.linear(act(gate) * up, down[expert].to(dtype)))
            else:
                parts.append(torch.zeros_like(rows))
        return (top_k_weights.float() @ torch.cat(parts).float()).to(hidden_states.dtype)
    pairs_of = {}
    for pair, expert in enumerate(top_k_index.flatten().tolist()):
        if expert < experts:
            pairs_of.setdefault(expert, []).append(pair)
    order = torch.tensor(sum(pairs_of.values(), []), dtype=torch.int64, device=rows.device)
    output = torch.zeros(tokens, rows.shape[1], dtype=torch.float32, device=rows.device)
    if not order.numel():
        return output.to(hidden_states.dtype)
    token, lengths = order // top_k, [len(pairs) for pairs in pairs_of.values()]
    parts = []
    for expert, run in zip(pairs_of, rows[token].split(lengths)):
        gate, up = F.linear(run, gate_up[expert].to(dtype)).chunk(2, dim=-1)
        parts.append(F.linear(act(gate) * up, down[expert].to(dtype)))
    result = torch.cat(parts).float() * top_k_weights.flatten()[order].float().unsqueeze(-1)
    return output.index_add(0, token, result).to(hidden_states.dtype)


# Tokens up to which the kernels' lists are faster than sorting, gathering and the grouped matmul; on an H100 (reference
# config, bf16) 5.8 times at 1 token, 2 at 1,024, 1.4 at 4,096: `benchmarks/bench_generate.py --cases experts`.
LISTS_UP_TO = 4096


def experts_without_gradients(self, hidden_states, top_k_index, top_k_weights):
    """The entry "grouped_mm": short prompts and evaluation on a GPU go through the decoding kernels, all else through
    the grouped matmul. As `DeepSeekR1Experts.forward`."""
    weights = (self.gate_up_proj, self.down_proj)
    if (
        hidden_states.is_cuda
        and not torch.is_grad_enabled()
        and len(hidden_states) <= LISTS_UP_TO
        and triton is not None
        and not torch.compiler.is_compiling()
        and hidden_states.dtype in (torch.bfloat16, torch.float16)
        and all(type(weight.data) is torch.Tensor and weight.dtype == hidden_states.dtype for weight in weights)
        and compute_dtype(hidden_states) == hidden_states.dtype
    ):
        from .kernels_experts import SILU, decode_experts  # it reads this file

        if isinstance(self.act_fn, SILU):
            return decode_experts(self, hidden_states, top_k_index, top_k_weights)
    return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)


EXPERTS["grouped_mm"] = experts_without_gradients
