"""Feed-forward blocks: the dense gated MLP, and DeepSeekMoE with routed and shared experts."""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .compute_copies import in_dtype
from .experts import DeepSeekR1Experts, compute_dtype
from .fused import runs_fused
from .linear_weights import is_intercepted, is_plain
from .recomputation import computed_again
from .routing import FUSED_KINDS, ROUTERS
from .training_cpu import is_silu
from .training_linear import fused_gated_mlp
from .training_routing import router_logits


class DeepSeekR1MLP(nn.Module):
    """Gated MLP, down(act(gate(x)) * up(x)), added to `residual` if that is given. Source: arXiv:2002.05202, Eq. 6.

    Shapes: hidden_states and residual (B, S, D) -> (B, S, D). Attribute `recompute`: see recomputation.py.
    """

    recompute = False

    def __init__(self, config, intermediate_size=None):
        super().__init__()
        inner = config.intermediate_size if intermediate_size is None else intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states, token_mask=None, segment_ids=None, routes=None, kept_routes=None, residual=None
    ):
        if self.runs_fused(hidden_states):
            rows, weights = hidden_states.flatten(0, -2).to(compute_dtype(hidden_states)), self.weights(hidden_states)
            output = fused_gated_mlp(rows, *weights, self.recompute and self.training).view(hidden_states.shape)
        elif self.recompute:
            output = computed_again(self, self.plain, hidden_states)
        else:
            output = self.plain(hidden_states)
        return output if residual is None else residual + output

    def plain(self, hidden_states):
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))

    def weights(self, hidden_states):
        """Of gate, up and down in the dtype in which they compute."""
        dtype = compute_dtype(hidden_states)
        return [in_dtype(linear.weight, dtype) for linear in (self.gate_proj, self.up_proj, self.down_proj)]

    def runs_fused(self, hidden_states):
        linears = (self.gate_proj, self.up_proj, self.down_proj)
        return (
            is_silu(self.act_fn)
            and all(is_plain(linear) for linear in linears)
            and runs_fused(hidden_states, *(linear.weight for linear in linears))
        )


class DeepSeekR1MoE(nn.Module):
    """Sum of the chosen experts, each times its gate value, of the shared experts and of `residual` if that is given.

    Source: DeepSeekMoE (arXiv:2401.06066), Eq. 9; DeepSeek-V3 (arXiv:2412.19437), Eq. 12.
    Shapes: hidden_states and residual (B, S, D), token_mask (B, S) bool, segment_ids (B, S) int64, routes (B, S, K)
    -> (B, S, D). `kept_routes`: an empty list, to which the (T, K) experts that the router chose are appended.
    Attribute `recompute`: see recomputation.py.
    """

    recompute = False

    def __init__(self, config):
        super().__init__()
        self.experts = DeepSeekR1Experts(config)
        self.gate = ROUTERS[config.scoring_func, config.topk_method](config)
        self.shared_experts = (
            DeepSeekR1MLP(config, config.moe_intermediate_size * config.n_shared_experts)
            if config.n_shared_experts
            else None
        )

    def forward(
        self, hidden_states, token_mask=None, segment_ids=None, routes=None, kept_routes=None, residual=None
    ):
        logits, hidden_states = self.logits_first(hidden_states, segment_ids)
        _, weights, indices = self.gate(hidden_states, token_mask, segment_ids, routes, **logits)
        # What a hook made of the router's output, such as expert parallelism's own numbers, is no input to it.
        if kept_routes == [] and not is_intercepted(self.gate) and not torch.compiler.is_compiling():
            kept_routes.append(indices)
        tokens = hidden_states.flatten(0, -2)
        # Adapters and quantisers put modules of their own in the experts' place.
        bare = type(self.experts) is DeepSeekR1Experts and not is_intercepted(self.experts)
        fused = bare and self.experts.runs_fused(tokens)
        joined = fused and self.shared_run_beside(hidden_states)
        shared = None if self.shared_experts is None or joined else self.shared_experts(hidden_states)
        if fused:
            added = (None if part is None else part.flatten(0, -2) for part in (residual, shared))
            output = self.experts.fused(
                tokens, indices, weights, *added, recompute=self.recompute and self.training,
                shared_weights=self.shared_experts.weights(tokens) if joined else None,
            )  # fmt: skip
            return output.view(hidden_states.shape)
        if self.recompute:
            output = computed_again(self, self.experts, tokens, indices, weights).view_as(hidden_states)
        else:
            output = self.experts(tokens, indices, weights).view_as(hidden_states)
        output = output if shared is None else output + shared
        return output if residual is None else residual + output

    def logits_first(self, hidden_states, segment_ids):
        """-> what else the router is called with, and the hidden states for all that read them next: their gradient
        comes by the router's product, whose kernel adds its own to it."""
        gate = self.gate
        bare = type(gate) in FUSED_KINDS and not is_intercepted(gate) and torch.is_grad_enabled()
        if not bare or not gate.fuses(hidden_states, segment_ids):
            return {}, hidden_states
        logits, tokens = router_logits(hidden_states.flatten(0, -2), gate.weight, passes_on=True)
        return {"logits": logits}, tokens.view(hidden_states.shape)

    def shared_run_beside(self, hidden_states):
        """Whether the shared experts, if any, are made together with the routed ones, for a later backward."""
        shared = self.shared_experts
        return (
            type(shared) is DeepSeekR1MLP
            and torch.is_grad_enabled()
            and not is_intercepted(shared)
            and all(type(part) is nn.Linear for part in (shared.gate_proj, shared.up_proj, shared.down_proj))
            and shared.runs_fused(hidden_states)
        )
