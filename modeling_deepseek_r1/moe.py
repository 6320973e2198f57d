"""Feed-forward blocks: the dense gated MLP, and DeepSeekMoE with routed and shared experts."""

from torch import nn
from transformers.activations import ACT2FN

from .experts import DeepSeekR1Experts
from .routing import ROUTERS


class DeepSeekR1MLP(nn.Module):
    """Gated MLP, down(act(gate(x)) * up(x)). Source: arXiv:2002.05202, Eq. 6. Shapes: (B, S, D) -> (B, S, D)."""

    def __init__(self, config, intermediate_size=None):
        super().__init__()
        inner = config.intermediate_size if intermediate_size is None else intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states, token_mask=None, segment_ids=None, routes=None):
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class DeepSeekR1MoE(nn.Module):
    """Sum of the chosen experts, each times its gate value, and of the shared experts.

    Source: DeepSeekMoE (arXiv:2401.06066), Eq. 9; DeepSeek-V3 (arXiv:2412.19437), Eq. 12.
    Shapes: hidden_states (B, S, D), token_mask (B, S) bool, segment_ids (B, S) int64, routes (B, S, K)
    -> (B, S, D).
    """

    def __init__(self, config):
        super().__init__()
        self.experts = DeepSeekR1Experts(config)
        self.gate = ROUTERS[config.scoring_func, config.topk_method](config)
        self.shared_experts = (
            DeepSeekR1MLP(config, config.moe_intermediate_size * config.n_shared_experts)
            if config.n_shared_experts
            else None
        )

    def forward(self, hidden_states, token_mask=None, segment_ids=None, routes=None):
        _, weights, indices = self.gate(hidden_states, token_mask, segment_ids, routes)
        output = self.experts(hidden_states.flatten(0, -2), indices, weights).view_as(hidden_states)
        return output if self.shared_experts is None else output + self.shared_experts(hidden_states)
