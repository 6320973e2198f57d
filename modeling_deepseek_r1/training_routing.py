"""The router's training step as two autograd functions: logits, then everything from the logits on.

`fused_route` does what `DeepSeekR1Router.forward` does behind its logits, losses and load included, in two launches of
routing.py's thirty, and `router_logits` multiplies with fp32 accuracy without an fp32 copy of the hidden states. On
CUDA both run kernels_training_routing.py. Elsewhere the twins here run, in plain torch, with gradients by hand too.

The balance loss never appears as a number. Its gradient is all that training needs, and that follows from how often
each sequence chose each expert: with f_i and the number of tokens T of a sequence (V3, Eqs. 17-20), d loss / d s'_it =
alpha f_i / (T * sequences). So the forward pass counts, in integers, whose sum no order changes.

Names in shapes: R rows (sequences) of S tokens, T = R * S tokens, D hidden_size, E experts, K choices.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .fused import kernels_run_on

try:
    from .kernels_training_routing import (
        hidden_gradient,
        logits_forward,
        route_backward,
        route_forward,
        weight_gradient,
    )
except ImportError:  # no triton: the twins below serve
    pass

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class RoutingRule(NamedTuple):
    """How logits become choices, in the words of routing.py; group_score "sum2" adds a group's two best scores."""

    scoring: str
    n_group: int
    topk_group: int
    group_score: str
    top_k: int
    norm_topk: bool
    scaling: float
    balance_alpha: float
    z_loss_coef: float


# ---- logits --------------------------------------------------------------------------------------------------------


def router_logits(hidden_states, weight, passes_on=False):
    """F.linear(hidden_states.float(), weight.float()), as exact, also under autocast.

    With `passes_on` it also returns the hidden states. Who reads them there, and not where they came from, leaves it to
    the router to add the gradients, in the kernel that makes its own.

    Shapes: hidden_states (T, D), weight (E, D), each float32, bfloat16 or float16 -> (T, E) float32, with `passes_on`
    also (T, D). Saves its inputs.
    Raises:
        ValueError: for other dtypes.
    """
    for name, tensor in (("hidden_states", hidden_states), ("weight", weight)):
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} is of dtype {tensor.dtype}; the router takes float32, bfloat16 or float16")
    return (_RouterLogitsAndInput if passes_on else _RouterLogits).apply(hidden_states, weight)


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight):
        ctx.save_for_backward(hidden_states, weight)
        ctx.set_materialize_grads(False)
        function = logits_forward if kernels_run_on(hidden_states.device) else logits_forward_twin
        return function(hidden_states.contiguous(), weight.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logits, grad_passed=None):
        if grad_logits is None:
            return grad_passed, None
        return router_logits_backward(grad_logits, *ctx.saved_tensors, *ctx.needs_input_grad, grad_passed)


class _RouterLogitsAndInput(_RouterLogits):
    @staticmethod
    def forward(ctx, hidden_states, weight):
        return _RouterLogits.forward(ctx, hidden_states, weight), hidden_states


def router_logits_backward(grad_logits, hidden_states, weight, need_hidden=True, need_weight=True, base=None):
    """The gradients of `router_logits`, each in the dtype of its tensor, None where not needed.

    With `base` (T, D), another gradient of the same hidden states, that of the hidden states is added to it in fp32 and
    rounded once; it saves a pass over both.
    """
    kernels = kernels_run_on(hidden_states.device)
    grad_logits, hidden_states, weight = (each.contiguous() for each in (grad_logits, hidden_states, weight))
    grad_hidden = grad_weight = None
    if need_hidden:
        function = hidden_gradient if kernels else hidden_gradient_twin
        base = None if base is None else base.contiguous()
        grad_hidden = function(grad_logits, weight, hidden_states.dtype, base)
    if need_weight:
        function = weight_gradient if kernels else weight_gradient_twin
        grad_weight = function(grad_logits, hidden_states, weight.dtype)
    return grad_hidden, grad_weight


def logits_forward_twin(hidden_states, weight):
    with torch.autocast(hidden_states.device.type, enabled=False):
        return F.linear(hidden_states.float(), weight.float())


def hidden_gradient_twin(grad_logits, weight, dtype, base=None):
    with torch.autocast(weight.device.type, enabled=False):
        grad = grad_logits @ weight.float()
    return (grad if base is None else grad + base).to(dtype)


def weight_gradient_twin(grad_logits, hidden_states, dtype):
    with torch.autocast(hidden_states.device.type, enabled=False):
        return (grad_logits.t() @ hidden_states.float()).to(dtype)


# ---- choices -------------------------------------------------------------------------------------------------------


def fused_route(
    logits, bias, loss_scale, load_counts, rows, token_mask=None, routes=None, *, scoring, n_group, topk_group,
    group_score, top_k, norm_topk, scaling, balance_alpha=0.0, z_loss_coef=0.0,
):  # fmt: skip
    """Gate values and choices of a router; in the backward pass also the balance and z losses' gradients and the load.

    The same as `DeepSeekR1Router.forward` from its logits on, for every kind of `routing.ROUTERS`; a row is a sequence.
    `load_counts` is increased in the backward pass only: once per token under activation checkpointing, never without
    gradients. Of equal scores the first expert is taken by the kernels; no expert is chosen twice, whatever the scores.

    Shapes: logits (T, E) float32; bias (E,) float32 or None; loss_scale () float32, whose value now is what the
    backward pass uses; load_counts (E,) int64; token_mask (R, S) bool, False for padding; routes (R, S, K) of any
    integer dtype, experts to use instead, a token's being -1 where the router shall choose
    -> weights (T, K) float32, indices (T, K) int64 in no particular order.
    Args:
        rows: R. loss_scale, load_counts: None outside of training, for neither losses nor load.
    Raises:
        ValueError: for a rule that cannot be computed, see `check_rule`, or rows that do not divide T.
    """
    rule = RoutingRule(
        scoring, n_group, topk_group, group_score, top_k, norm_topk, scaling, balance_alpha, z_loss_coef
    )  # fmt: skip
    tokens, experts = logits.shape
    check_rule(rule, experts)
    if logits.dtype != torch.float32 or rows < min(1, tokens) or tokens % max(rows, 1):
        raise ValueError(f"logits are {tuple(logits.shape)} {logits.dtype} in rows={rows}; give float32 logits of "
                         "(rows * length, experts)")  # fmt: skip
    # The kernels read both as one piece of memory.
    routes = None if routes is None else routes.reshape(tokens, top_k).contiguous()
    token_mask = None if token_mask is None else token_mask.reshape(tokens).to(torch.bool).contiguous()
    if load_counts is None or not (torch.is_grad_enabled() and logits.requires_grad):
        loss_scale = None
    return _FusedRoute.apply(logits, bias, loss_scale, load_counts, rows, token_mask, routes, rule)


def check_rule(rule, experts):
    """Raises a ValueError unless `rule` is one of the known kinds and the kept groups hold top_k experts."""
    if rule.scoring not in ("sigmoid", "softmax") or rule.group_score not in ("sum2", "max"):
        raise ValueError(
            f"scoring={rule.scoring!r}, group_score={rule.group_score!r}: use sigmoid or softmax, sum2 or max"
        )
    groups, kept = rule.n_group, rule.topk_group
    if groups < 1 or experts % groups or not 1 <= kept <= groups or not 1 <= rule.top_k <= kept * (experts // groups):
        raise ValueError(
            f"n_group={groups} must divide {experts} experts, and topk_group={kept} of them hold top_k={rule.top_k}"
        )
    if rule.group_score == "sum2" and 1 < groups and experts // groups < 2:
        raise ValueError(f"n_group={groups} leaves one of {experts} experts a group; 'sum2' needs two: use 'max'")


class _FusedRoute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, bias, loss_scale, load_counts, rows, token_mask, routes, rule):
        logits = logits.contiguous()
        function = route_forward if kernels_run_on(logits.device) else route_forward_twin
        weights, indices, counts, kept_scale = function(logits, bias, loss_scale, routes, token_mask, rows, rule)
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(logits, indices, token_mask, counts, kept_scale)
        ctx.load_counts, ctx.rows, ctx.rule = load_counts, rows, rule
        ctx.set_materialize_grads(False)  # of the indices' no zeros are needed
        return weights, indices

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_weights, _):
        logits, indices, token_mask, counts, kept_scale = ctx.saved_tensors
        function = route_backward if kernels_run_on(logits.device) else route_backward_twin
        grad_logits = function(
            grad_weights.contiguous(), logits, indices, token_mask, counts, kept_scale, ctx.load_counts, ctx.rows,
            ctx.rule,
        )  # fmt: skip
        return grad_logits, None, None, None, None, None, None, None


def route_forward_twin(logits, bias, loss_scale, routes, token_mask, rows, rule):
    tokens, experts = logits.shape
    scores = logits.sigmoid() if rule.scoring == "sigmoid" else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    if rule.n_group > 1:
        groups = choice.unflatten(-1, (rule.n_group, -1))
        best = groups.topk(2, dim=-1).values.sum(-1) if rule.group_score == "sum2" else groups.amax(-1)
        best = best.topk(rule.topk_group, dim=-1, sorted=False).indices
        dropped = torch.ones(tokens, rule.n_group, dtype=torch.bool, device=logits.device).scatter(-1, best, False)
        choice = groups.masked_fill(dropped.unsqueeze(-1), -torch.inf).flatten(-2)
    indices = choice.topk(rule.top_k, dim=-1, sorted=False).indices
    if routes is not None:
        indices = torch.where(routes[:, :1] < 0, indices, routes.to(indices))
    weights = scores.gather(-1, indices)
    if rule.norm_topk:                                                                    # V3, Eq. 13
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
    if loss_scale is None:
        return weights * rule.scaling, indices, None, None
    counted = token_mask if token_mask is not None else torch.ones(tokens, dtype=torch.bool, device=logits.device)
    counted, row = counted.int(), torch.arange(tokens, device=logits.device) // max(1, tokens // max(1, rows))
    counts = torch.zeros(rows * (experts + 1), dtype=torch.int32, device=logits.device)
    counts.index_add_(0, (row.unsqueeze(-1) * experts + indices).flatten(), counted.repeat_interleave(rule.top_k))
    counts.index_add_(0, rows * experts + row, counted)
    return weights * rule.scaling, indices, counts, loss_scale.clone()


def route_backward_twin(grad_weights, logits, indices, token_mask, counts, kept_scale, load_counts, rows, rule):
    scores = logits.sigmoid() if rule.scoring == "sigmoid" else logits.softmax(-1)
    gates, grad = scores.gather(-1, indices), grad_weights * rule.scaling
    if rule.norm_topk:
        grad = _through_shares(grad, gates)
    grad = torch.zeros_like(logits).scatter_add(-1, indices, grad)
    if counts is not None:
        experts = logits.shape[1]
        chosen, row_tokens = counts.split((rows * experts, rows))
        chosen = chosen.view(rows, experts)
        load_counts.add_(chosen.sum(0))
        counted = torch.ones_like(grad[:, 0]) if token_mask is None else token_mask.to(grad.dtype)
    if counts is not None and rule.balance_alpha:
        sequences, row_tokens = (row_tokens > 0).sum().clamp_min(1), row_tokens.clamp_min(1).unsqueeze(-1)
        frequency = chosen * experts / (rule.top_k * row_tokens)                          # V3, Eq. 18
        share = rule.balance_alpha * kept_scale / sequences * frequency / row_tokens      # Eqs. 17, 20
        share = share.unsqueeze(1).expand(-1, logits.shape[0] // max(1, rows), -1).reshape(logits.shape)
        grad = grad + _through_shares(share * counted.unsqueeze(-1), scores)              # Eq. 19
    if rule.scoring == "sigmoid":
        grad = grad * scores * (1 - scores)
    else:
        grad = scores * (grad - (grad * scores).sum(-1, keepdim=True))
    if counts is not None and rule.z_loss_coef:                                           # ST-MoE, Eq. 5
        factor = 2 * rule.z_loss_coef * kept_scale * counted / counted.sum().clamp_min(1.0)
        grad = grad + (factor * logits.logsumexp(-1)).unsqueeze(-1) * logits.softmax(-1)
    return grad


def _through_shares(grad, values):
    """The gradient of `values / values.sum(-1).clamp_min(1e-20)` from that of its result."""
    total = values.sum(-1, keepdim=True)
    mean = (grad * values).sum(-1, keepdim=True) / total.clamp_min(1e-20)
    return (grad - torch.where(total >= 1e-20, mean, 0.0)) / total.clamp_min(1e-20)
