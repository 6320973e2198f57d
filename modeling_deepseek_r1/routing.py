"""Routers, the load they count, and the losses that balance it.

A router returns logits, gate values and expert indices. In training it also
1. counts how many tokens each expert was given, for the bias update of `update_expert_bias`, and
2. adds the gradient of the balance losses.
Both happen in the backward of `_AttachRouterLoss`, so they act whoever computes the language-modelling loss (TRL never
calls `ForCausalLM.forward`), once per token under any kind of activation checkpointing, and never without gradients.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .fused import runs_fused
from .norms import ExactBuffers
from .training_routing import fused_route, router_logits


class _AttachRouterLoss(torch.autograd.Function):
    """Identity on the gate values; its backward feeds `loss_scale` to `loss` and adds `counts` to `load_counts`."""

    @staticmethod
    def forward(ctx, weights, loss, loss_scale, load_counts, counts):
        ctx.save_for_backward(loss_scale.clone(), counts)  # the scale may be set anew before the backward
        ctx.load_counts = load_counts
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx, grad_weights):
        loss_scale, counts = ctx.saved_tensors
        ctx.load_counts.add_(counts)
        return grad_weights, loss_scale, None, None, None


def sequence_balance_loss(affinities, indices, token_mask=None, segment_ids=None):
    """Sequence-wise balance loss without its factor alpha, and the experts' load.

    sum_i f_i P_i per sequence, f_i = E / (K T) * (tokens of the sequence that chose expert i), P_i = the mean
    normalised affinity, averaged over the sequences. 1 when perfectly even. Gradients flow through P only.
    Source: DeepSeek-V3 (arXiv:2412.19437), Sec. 2.1.2, Eqs. 17-20.

    Shapes (B rows, S tokens, E experts, K choices):
        affinities (B, S, E) non-negative; indices (B, S, K) int64; token_mask (B, S) bool, False for padding;
        segment_ids (B, S) int64 in [0, S): documents of a padding-free row, each its own sequence; None: a row is one.
        -> loss () float32, counts (E,) int64 of the unmasked tokens.
    """
    rows, length, num_experts = affinities.shape
    top_k = indices.shape[-1]
    shares = affinities / affinities.sum(-1, keepdim=True).clamp_min(1e-20)                # Eq. 19
    ones = torch.ones_like(shares[..., :1]) if token_mask is None else token_mask.unsqueeze(-1).to(shares.dtype)
    if segment_ids is None:
        sequences, sequence_of = rows, torch.arange(rows, device=indices.device).unsqueeze(1).expand(rows, length)
    else:
        sequences = rows * length  # an upper bound that needs no look at the data
        sequence_of = segment_ids + length * torch.arange(rows, device=indices.device).unsqueeze(1)
    chosen = torch.zeros(sequences * num_experts, dtype=shares.dtype, device=shares.device)
    chosen = chosen.scatter_add(
        0, (sequence_of.unsqueeze(-1) * num_experts + indices).flatten(), ones.expand(-1, -1, top_k).flatten()
    ).view(sequences, num_experts)
    if segment_ids is None:
        mass, tokens = (shares * ones).sum(1), ones.sum(1)
    else:
        sequence_of = sequence_of.flatten()
        mass = shares.new_zeros(sequences, num_experts).index_add(0, sequence_of, (shares * ones).flatten(0, 1))
        tokens = shares.new_zeros(sequences, 1).index_add(0, sequence_of, ones.flatten(0, 1))
    frequency = chosen * num_experts / (top_k * tokens.clamp_min(1.0))                    # Eq. 18
    probability = mass / tokens.clamp_min(1.0)                                            # Eq. 20
    present = (tokens > 0).sum().clamp_min(1)
    return (frequency.detach() * probability).sum() / present, chosen.detach().sum(0).long()   # Eq. 17


class DeepSeekR1Router(ExactBuffers):
    """Token-choice top-k routing. Subclasses say how logits become scores and how experts are chosen from them.

    Shapes (T tokens = B * S, D hidden_size, E experts, K num_experts_per_tok):
        hidden_states (B, S, D) or (T, D) of any float dtype, token_mask (B, S) bool, segment_ids (B, S) int64,
        routes (B, S, K) of any integer dtype: experts to use instead of the choice, see `replayed`; logits (T, E):
        `router_logits` of the hidden states and the weight, by a caller that has made them, where `fuses`
        -> logits (T, E) float32, weights (T, K) float32, indices (T, K) int64 in no particular order.

    Buffers: `e_score_correction_bias` (E,) float32 where the kind has one; `load_counts` (E,) int64, tokens counted
    since the last bias update; `balance_loss_scale` () float32, see `DeepSeekR1PreTrainedModel.balance_loss_scale`.
    """

    has_bias = False

    def __init__(self, config):
        super().__init__()
        self.top_k, self.num_experts = config.num_experts_per_tok, config.n_routed_experts
        self.n_group, self.topk_group = config.n_group, config.topk_group
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.balance_alpha, self.z_loss_coef = config.seq_aux_loss_alpha, config.router_z_loss_coef
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        # float(): DeepSpeed's zero.Init makes every new tensor 16-bit, whatever dtype is asked for.
        if self.has_bias:
            self.register_buffer("e_score_correction_bias", torch.zeros(self.num_experts).float())
        self.register_buffer("load_counts", torch.zeros(self.num_experts, dtype=torch.int64), persistent=False)
        self.register_buffer("balance_loss_scale", torch.ones(()).float(), persistent=False)

    def score(self, logits):
        """(T, E) logits -> (T, E) affinities."""
        raise NotImplementedError

    def select(self, scores):
        """(T, E) affinities -> (T, K) expert indices."""
        return scores.topk(self.top_k, dim=-1, sorted=False).indices

    def keep_best_groups(self, scores, group_scores):
        """Excludes (with -inf) the experts outside the `topk_group` groups of highest `group_scores` (T, n_group)."""
        best = group_scores.topk(self.topk_group, dim=-1, sorted=False).indices
        dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, best, False)
        groups = scores.unflatten(-1, (self.n_group, -1))
        return groups.masked_fill(dropped.unsqueeze(-1), -torch.inf).flatten(-2)

    def replayed(self, indices, routes):
        """The router's own choice (T, K) -> the experts of `routes` (B, S, K), except where these are -1."""
        routes = routes.reshape(indices.shape).to(indices)
        return torch.where(routes[:, :1] < 0, indices, routes)

    def fuses(self, hidden_states, segment_ids=None):
        """Whether the fused kernels serve."""
        by_row = segment_ids is None or not (self.training and torch.is_grad_enabled())
        # The kernels' balance loss knows no documents.
        return by_row and type(self) in FUSED_KINDS and runs_fused(hidden_states, self.weight)

    def forward(self, hidden_states, token_mask=None, segment_ids=None, routes=None, logits=None):
        trains = self.training and torch.is_grad_enabled()
        if self.fuses(hidden_states, segment_ids):
            return self.forward_fused(hidden_states, token_mask, routes, trains, logits)
        # In fp32, also under autocast: rounding would make near-tied experts swap places.
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.flatten(0, -2).float(), self.weight.float())
            scores = self.score(logits)
            indices = self.select(scores)
            if routes is not None:
                indices = self.replayed(indices, routes)
            weights = scores.gather(-1, indices)
            if self.norm_topk_prob:                                                       # V3, Eq. 13
                weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
            weights = weights * self.routed_scaling_factor
            if trains:
                rows = (hidden_states.shape[0], -1) if hidden_states.dim() == 3 else (1, -1)
                weights = self.attach_losses(logits, scores, weights, indices, rows, token_mask, segment_ids)
        return logits, weights, indices

    def forward_fused(self, hidden_states, token_mask, routes, trains, logits=None):
        """`forward` by the fused kernels, in which a row is a sequence."""
        scoring, group_score = FUSED_KINDS[type(self)]
        grouped = self.n_group > 1 and group_score is not None
        logits = router_logits(hidden_states.flatten(0, -2), self.weight) if logits is None else logits
        weights, indices = fused_route(
            logits, self.e_score_correction_bias if self.has_bias else None,
            self.balance_loss_scale if trains else None, self.load_counts if trains else None,
            hidden_states.shape[0] if hidden_states.dim() == 3 else 1, token_mask, routes, scoring=scoring,
            n_group=self.n_group if grouped else 1, topk_group=self.topk_group if grouped else 1,
            group_score=group_score or "max", top_k=self.top_k, norm_topk=self.norm_topk_prob,
            scaling=self.routed_scaling_factor, balance_alpha=self.balance_alpha, z_loss_coef=self.z_loss_coef,
        )  # fmt: skip
        return logits, weights, indices

    def attach_losses(self, logits, scores, weights, indices, rows, token_mask, segment_ids):
        """-> `weights`, unchanged, whose backward counts the load and adds the balance and z-loss gradients."""
        affinities = scores if self.balance_alpha else scores.detach()
        loss, counts = sequence_balance_loss(
            affinities.unflatten(0, rows), indices.unflatten(0, rows), token_mask, segment_ids
        )
        loss = loss * self.balance_alpha
        if self.z_loss_coef:
            z = logits.logsumexp(-1).square()                                             # ST-MoE, Eq. 5
            mask = torch.ones_like(z) if token_mask is None else token_mask.flatten().to(z.dtype)
            loss = loss + self.z_loss_coef * (z * mask).sum() / mask.sum().clamp_min(1.0)
        return _AttachRouterLoss.apply(weights, loss, self.balance_loss_scale, self.load_counts, counts)


class SigmoidGroupRouter(DeepSeekR1Router):
    """Sigmoid affinities; a bias steers the selection but never scales an expert's output; best groups only.

    A group is scored by the sum of its two best biased affinities. Excluded experts get -inf, not 0: with a negative
    bias every kept expert may score below 0.
    Source: DeepSeek-V3 (arXiv:2412.19437), Sec. 2.1.2, Eqs. 13, 15, 16 and node-limited routing.
    """

    has_bias = True

    def score(self, logits):
        return logits.sigmoid()                                                           # Eq. 15

    def select(self, scores):
        scores = scores + self.e_score_correction_bias                                    # Eq. 16
        if self.n_group > 1:
            groups = scores.unflatten(-1, (self.n_group, -1))
            scores = self.keep_best_groups(scores, groups.topk(2, dim=-1).values.sum(-1))
        return super().select(scores)


class SoftmaxRouter(DeepSeekR1Router):
    """Softmax affinities, the K largest. Source: DeepSeekMoE (arXiv:2401.06066), Eqs. 3-5."""

    def score(self, logits):
        return logits.softmax(-1)


class SoftmaxGroupRouter(SoftmaxRouter):
    """Softmax affinities, device-limited: a group is scored by its best expert. Source: DeepSeek-V2, Sec. 2.2.2."""

    def select(self, scores):
        if self.n_group > 1:
            best = scores.unflatten(-1, (self.n_group, -1)).amax(-1)
            scores = self.keep_best_groups(scores, best)
        return super().select(scores)


# Kinds that the fused kernels know, exactly: (scores, what a group is judged by or None without groups).
FUSED_KINDS = {
    SigmoidGroupRouter: ("sigmoid", "sum2"),
    SoftmaxRouter: ("softmax", None),
    SoftmaxGroupRouter: ("softmax", "max"),
}

# Keyed by the released fields; `configuration_deepseek_r1.ROUTER_KINDS` lists the same pairs.
ROUTERS = {
    ("sigmoid", "noaux_tc"): SigmoidGroupRouter,
    ("softmax", "greedy"): SoftmaxRouter,
    ("softmax", "group_limited_greedy"): SoftmaxGroupRouter,
}


@torch.no_grad()
def update_expert_bias(routers, speed, group=None):
    """One step of the auxiliary-loss-free balancing over the load counted since the last one; counts start anew.

    b_i += speed where expert i had less than the mean load, b_i -= speed where it had more. The counts are summed over
    the processes of `group` (None: all of them), and compared as integers, so that every process takes the same step
    whatever the number of processes and micro-batches. A router that counted nothing is left alone.
    Source: DeepSeek-V3, Sec. 2.1.2; arXiv:2408.15664, Algorithm 1.

    Args:
        routers: `DeepSeekR1Router`s with equal `num_experts`, in the same order on every process.
        speed: gamma, in units of affinity a step.
    Returns:
        (routers, E) int64 tokens that each expert was given, over all processes.
    """
    device = routers[0].load_counts.device
    loads = torch.stack([router.load_counts.to(device) for router in routers])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(loads, group=group)
    # mean - load_i, times E to stay in integers
    steps = (loads.sum(-1, keepdim=True) - loads * loads.shape[-1]).sign() * speed
    moved = [(router.e_score_correction_bias, step) for router, step in zip(routers, steps) if router.has_bias]
    if moved and speed:
        # One launch for all layers on one device.
        torch._foreach_add_([bias for bias, _ in moved], [step.to(bias.device) for bias, step in moved])
    torch._foreach_zero_([router.load_counts for router in routers])
    return loads
