"""One decoder layer: attention and feed-forward, each normalised before and added to the residual stream."""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import ATTENTIONS
from .linear_weights import is_intercepted
from .moe import DeepSeekR1MLP, DeepSeekR1MoE
from .norms import DeepSeekR1RMSNorm, DropPath, add_and_norm


class DeepSeekR1DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block. Source: DeepSeek-V3 (arXiv:2412.19437), Fig. 2.

    Shapes: hidden_states (B, S, D), position_embeddings two of (B, S, R / 2), attention_mask as the attention
    implementation wants it, token_mask (B, S) bool, segment_ids (B, S) int64 and routes (B, S, K) for the router
    -> (B, S, D). `kept_routes`: an empty list, in which a pass that is computed again finds the experts of the first.
    """

    def __init__(self, config, layer_idx):
        super().__init__()
        kinds = config.attention_types or ["latent"] * config.num_hidden_layers
        # An MTP layer (index past the last) is built like the last decoder layer.
        kind = kinds[min(layer_idx, config.num_hidden_layers - 1)]
        self.self_attn = ATTENTIONS[kind](config, layer_idx)
        self.mlp = DeepSeekR1MoE(config) if config.is_moe_layer(layer_idx) else DeepSeekR1MLP(config)
        self.input_layernorm = DeepSeekR1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = DeepSeekR1RMSNorm(config.hidden_size, config.rms_norm_eps)
        depth = min(layer_idx / max(config.num_hidden_layers - 1, 1), 1.0)
        # Both regularisers act on a sub-layer's output before it joins the residual stream.
        self.branch = nn.Sequential(nn.Dropout(config.hidden_dropout), DropPath(config.drop_path_rate * depth))
        self.regularised = bool(config.hidden_dropout or config.drop_path_rate)

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        past_key_values=None,
        token_mask=None,
        segment_ids=None,
        routes=None,
        kept_routes=None,
        **kwargs,
    ):
        hidden_states, normed = add_and_norm(self.input_layernorm, hidden_states)
        attended, _ = self.self_attn(
            normed,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states, normed = add_and_norm(self.post_attention_layernorm, hidden_states, self.branch(attended))
        routing = token_mask, segment_ids, kept_routes[0] if kept_routes else routes, kept_routes
        # Who listens at the feed-forward block, or replaces what it returns, means the block's own output.
        if self.regularised or is_intercepted(self.mlp):
            return hidden_states + self.branch(self.mlp(normed, *routing))
        return self.mlp(normed, *routing, residual=hidden_states)
