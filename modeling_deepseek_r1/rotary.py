"""Rotary position embeddings: interleaved and half-split pairs, every rope type of the library, YaRN's two mscales."""

import math

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .norms import ExactBuffers


class DeepSeekR1RotaryEmbedding(ExactBuffers):
    """Angles of the rotary positions.

    Source: RoFormer (arXiv:2104.09864), Sec. 3.2.2; YaRN (arXiv:2309.00071), Sec. 3. YaRN's `mscale` enters here as
    `attention_scaling` (a factor on cosine and sine), `mscale_all_dim` enters in `softmax_scale`.

    Shapes (B batch, S sequence, R qk_rope_head_dim):
        position_ids (B, S) -> cos, sin (B, S, R / 2), of the dtype of `hidden_states`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        init_function = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = init_function(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config, device=None, **kwargs):
        """-> inverse frequencies (R / 2,) float32 in radians a token, and the factor 1 on cosine and sine."""
        exponents = torch.arange(0, config.qk_rope_head_dim, 2, dtype=torch.float, device=device)
        return config.rope_parameters["rope_theta"] ** (-exponents / config.qk_rope_head_dim), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states, position_ids):
        # In fp32, also under autocast: bf16 holds positions exactly only up to 256.
        with torch.autocast(hidden_states.device.type, enabled=False):
            inv_freq = self.inv_freq.to(device=hidden_states.device, dtype=torch.float)
            angles = position_ids[..., None].float() * inv_freq
            cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def rotate(states, cos, sin, interleave):
    """Turns channel pairs of `states` by the given angles.

    The pairs are (2i, 2i+1) if `interleave`, else (i, i + R/2). The result always lies half-split: a dot product does
    not depend on the order of the channels, and this is the order in which the library caches rotary keys.

    Shapes: states (..., S, R), cos and sin broadcastable to (..., S, R / 2) -> (..., S, R).
    """
    first, second = (states[..., 0::2], states[..., 1::2]) if interleave else states.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def softmax_scale(config):
    """1 / sqrt(q/k head width), times YaRN's mscale^2 where `mscale_all_dim` is set (YaRN, Eq. 15 as V3 uses it)."""
    scale = config.qk_head_dim**-0.5
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default" and rope.get("mscale_all_dim") and rope["factor"] > 1:
        scale *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0) ** 2
    return scale
