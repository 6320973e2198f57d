"""Multi-head Latent Attention and the registry of attention kinds."""

import contextlib

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .compute_copies import in_dtype
from .decoding_attention import absorbed_attention, causal_chunk_attention
from .decoding_cache import PrefillView
from .documents import document_attention
from .experts import compute_dtype
from .flash_attention import attends_unpadded, flash_attention_4
from .fused import runs_fused
from .linear_weights import is_intercepted, is_plain, project
from .norms import DeepSeekR1RMSNorm
from .rotary import rotate, softmax_scale
from .training_blocks import can_turn_in_place, fused_queries_keys, fused_split_rms_norm
from .training_cpu import CausalAttentionFunction, attends
from .training_linear import fused_two_linears


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Plain attention, the reference for the other backends; softmax in fp32.

    Shapes (B batch, H heads, Q queries, S keys): query (B, H, Q, d), key (B, H, S, d), value (B, H, S, v), additive
    mask broadcastable to (B, H, Q, S) or None -> output (B, Q, H, v), weights (B, H, Q, S).
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def misses_masked_rows(queries, attention_mask):
    """Whether cuDNN's attention, which torch prefers on Hopper, might give gradients of queries that are NaN.

    Its backward masks whole pairs of tiles of 64 keys. With a mask tensor and a length of 64 modulo 128, the keys that
    fill the last pair score 0, and exp(0 - logsumexp) overflows for rows whose logsumexp is below -88.7, down to -inf
    for rows that see nothing: the padding on the left of prompts. Found as pytorch issue 196678. A switch of torch's
    cannot be thrown inside a compiled graph.
    """
    trains = queries.requires_grad and torch.is_grad_enabled()
    return queries.is_cuda and attention_mask is not None and trains and not torch.compiler.is_compiling()


@contextlib.contextmanager
def without_cudnn_attention():
    """torch's attention by its other kernels; what else the user has switched off stays off."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class DeepSeekR1LatentAttention(nn.Module):
    """Attention whose keys and values are expanded from one cached latent per token.

    Source: DeepSeek-V2 (arXiv:2405.04434), Sec. 2.1.2-2.1.3; DeepSeek-V3 (arXiv:2412.19437), Eqs. 1-11.

    Shapes (B batch, S new tokens, T all tokens, H heads, D hidden_size):
        hidden_states (B, S, D), position_embeddings two of (B, S, R / 2) -> output (B, S, D), weights or None.
        Cache, as the library's own class stores it: latent (B, 1, T, kv_lora_rank) as key, rotary key
        (B, 1, T, qk_rope_head_dim) as value.
    """

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.num_key_value_groups = 1
        self.attention_dropout = config.attention_dropout or 0.0
        self.scaling = softmax_scale(config)
        heads, bias = config.num_attention_heads, config.attention_bias
        self.q_lora_rank = config.q_lora_rank
        if self.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, self.q_lora_rank, bias=bias)
            self.q_a_layernorm = DeepSeekR1RMSNorm(self.q_lora_rank)  # eps fixed at 1e-6 in released code
            self.q_b_proj = nn.Linear(self.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            config.hidden_size, config.kv_lora_rank + config.qk_rope_head_dim, bias=bias
        )
        self.kv_a_layernorm = DeepSeekR1RMSNorm(config.kv_lora_rank)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * config.v_head_dim, config.hidden_size, bias=bias)

    def flat_queries(self, hidden_states):
        """(B, S, D) -> (B, S, H (nope + rope)); Eqs. 6-9 without the rotation."""
        if self.q_lora_rank is None:
            return project(self.q_proj, hidden_states)
        return project(self.q_b_proj, self.q_a_layernorm(project(self.q_a_proj, hidden_states)))

    def project_queries(self, hidden_states):
        """(B, S, D) -> (B, H, S, nope + rope); Eqs. 6-9 without the rotation."""
        return self.flat_queries(hidden_states).unflatten(-1, (-1, self.config.qk_head_dim)).transpose(1, 2)

    def compress(self, hidden_states):
        """(B, S, D) -> latent (B, 1, S, kv_lora_rank) of Eq. 1 and unrotated key (B, 1, S, R) of Eq. 3."""
        latent, key_rope = self.kv_a_proj_with_mqa(hidden_states).split(
            (self.config.kv_lora_rank, self.config.qk_rope_head_dim), dim=-1
        )
        return self.kv_a_layernorm(latent).unsqueeze(1), key_rope.unsqueeze(1)

    def expand(self, latent, key_rope):
        """Cached (B, 1, T, r) and (B, 1, T, R) -> keys (B, H, T, nope + rope), values (B, H, T, v); Eqs. 2, 4, 5."""
        expanded = self.kv_b_proj(latent.squeeze(1))
        expanded = expanded.unflatten(-1, (-1, self.config.qk_nope_head_dim + self.config.v_head_dim)).transpose(1, 2)
        key_nope, values = expanded.split((self.config.qk_nope_head_dim, self.config.v_head_dim), dim=-1)
        keys = torch.cat((key_nope, key_rope.to(key_nope.dtype).expand(-1, key_nope.shape[1], -1, -1)), dim=-1)
        return keys, values

    def absorbs(self, query, latent, attention_mask):
        """Whether queries come to the cached latents instead of the latents being expanded: the same sums in another
        order (V2, Sec. 2.1.2), cheaper for few queries. Reads `kv_b_proj.weight`, so nothing may wrap that layer."""
        if attention_mask is None and query.shape[2] > 1:  # causal from the first key on, as into a static cache
            return False
        config = self.config
        if config._attn_implementation != "sdpa" or torch.is_grad_enabled() or not is_plain(self.kv_b_proj):
            return False
        weight, expanded = self.kv_b_proj.weight, config.qk_nope_head_dim + config.v_head_dim
        return (
            weight.shape[0] == query.shape[1] * expanded
            and weight.dtype == query.dtype == latent.dtype
            and query.shape[2] * (2 * config.kv_lora_rank - expanded) < config.kv_lora_rank * expanded
            and query.shape[2] < latent.shape[2]
        )

    def attend_absorbed(self, query_nope, query_rope, latent, key_rope, attention_mask):
        """(B, H, S, nope), (B, H, S, R), cached (B, 1, T, r) and (B, 1, T, R) -> (B, S, H, v)."""
        if attention_mask is not None and query_nope.shape[2] > 1:
            # A padded position may see nothing at all: -inf everywhere would make it, and what reads it, NaN.
            lowest = torch.finfo(query_nope.dtype).min / 2
            if attention_mask.dtype == torch.bool:
                attention_mask = torch.zeros_like(attention_mask, dtype=query_nope.dtype).masked_fill(
                    ~attention_mask, lowest
                )
            attention_mask = attention_mask.clamp(min=lowest)
        by_key, by_value = self.kv_b_proj.weight.unflatten(0, (query_nope.shape[1], -1)).split(
            (self.config.qk_nope_head_dim, self.config.v_head_dim), dim=1
        )
        attended = absorbed_attention(
            query_nope @ by_key, query_rope, latent.squeeze(1), key_rope.squeeze(1), self.scaling, attention_mask
        )
        return (attended @ by_value.transpose(1, 2)).transpose(1, 2)

    def attend_expanded(self, queries, latent, key_rope, attention_mask, **kwargs):
        """(B, H, S, nope + R), (B, 1, T, r), (B, 1, T, R) -> (B, S, H, v) and weights or None."""
        return self.attend(queries, *self.expand(latent, key_rope), attention_mask, **kwargs)

    def runs_on_cpu(self, hidden_states, attention_mask, **kwargs):
        """Whether this is a step of plain causal attention that `CausalAttentionFunction` computes."""
        return (
            self.config._attn_implementation == "sdpa"
            and not (self.training and self.attention_dropout)
            and kwargs.get("is_causal") is not False
            and attends(hidden_states, self.config.num_attention_heads, attention_mask)
        )

    def project(self, hidden_states):
        """(B, S, D) -> queries (B, S, H (nope + R)), expanded latents (B, S, H (nope + v)), rotary key (B, S, R); none
        of them rotated."""
        latent, key_rope = project(self.kv_a_proj_with_mqa, hidden_states).split(
            (self.config.kv_lora_rank, self.config.qk_rope_head_dim), dim=-1
        )
        return self.flat_queries(hidden_states), project(self.kv_b_proj, self.kv_a_layernorm(latent)), key_rope

    def project_fused(self, hidden_states):
        """`project` with one gradient for the hidden states and one for the compressed latents and rotary key, where
        nobody has a hand in between."""
        first = self.q_proj if self.q_lora_rank is None else self.q_a_proj
        second, norm = self.kv_a_proj_with_mqa, self.kv_a_layernorm
        # A subclass may multiply in its own way.
        kinds = type(first), type(second), type(norm)
        plain = kinds == (nn.Linear, nn.Linear, DeepSeekR1RMSNorm) and is_plain(first) and is_plain(second)
        if (
            not plain
            or is_intercepted(norm)
            or not torch.is_grad_enabled()
            or not runs_fused(hidden_states, first.weight, second.weight)
        ):
            return self.project(hidden_states)
        dtype = compute_dtype(hidden_states)
        weights = (in_dtype(linear.weight, dtype) for linear in (first, second))
        queries, compressed = fused_two_linears(hidden_states.to(dtype), *weights)
        latent, key_rope = fused_split_rms_norm(
            compressed, norm.weight, norm.variance_epsilon, norm.output_dtype(compressed)
        )
        if self.q_lora_rank is not None:
            queries = project(self.q_b_proj, self.q_a_layernorm(queries))
        return queries, project(self.kv_b_proj, latent), key_rope

    def attend_on_cpu(self, hidden_states, position_embeddings, attention_mask):
        """The whole of `forward` up to the output projection, without a cache, where `runs_on_cpu`."""
        queries, expanded, key_rope = self.project(hidden_states)
        return CausalAttentionFunction.apply(
            queries.unflatten(-1, (-1, self.config.qk_head_dim)).transpose(1, 2), expanded, key_rope.unsqueeze(1),
            *position_embeddings, attention_mask, self.scaling, self.config.rope_interleave,
        )  # fmt: skip

    def attend_fused(self, hidden_states, position_embeddings, attention_mask, **kwargs):
        """The whole of `forward` up to the output projection, without a cache: queries and keys in one pass."""
        queries, expanded, key_rope = self.project_fused(hidden_states)
        config, last = self.config, self.q_proj if self.q_lora_rank is None else self.q_b_proj
        queries, keys, values = fused_queries_keys(
            queries, expanded, key_rope, *position_embeddings, config.qk_nope_head_dim, config.qk_rope_head_dim,
            config.v_head_dim, config.rope_interleave, inplace=is_plain(last) and can_turn_in_place(queries),
        )  # fmt: skip
        return self.attend(queries, keys, values, attention_mask, **kwargs)

    def attend(self, queries, keys, values, attention_mask, documents=None, **kwargs):
        """(B, H, S, nope + R) twice, (B, H, S, v) -> (B, S, H, v) and weights or None, by the chosen implementation."""
        implementation = self.config._attn_implementation
        dropout = self.attention_dropout if self.training else 0.0
        if attends_unpadded(implementation, queries, keys, attention_mask, documents, **kwargs):
            return flash_attention_4(queries, keys, values, self.scaling, documents, dropout), None
        if documents is not None and implementation == "sdpa":
            return document_attention(queries, keys, values, documents, self.scaling), None
        if documents is not None:  # another flash attention, through the library
            kwargs |= documents.as_arguments()
        # On a CPU, torch's fused kernel takes values only as wide as keys, and falls back to one 2 x slower.
        pad = implementation == "sdpa" and values.device.type == "cpu" and queries.shape[2] > 1
        missing_width = self.config.qk_head_dim - self.config.v_head_dim if pad else 0
        values = nn.functional.pad(values, (0, missing_width)) if missing_width > 0 else values
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        masked = implementation == "sdpa" and misses_masked_rows(queries, attention_mask)
        with without_cudnn_attention() if masked else contextlib.nullcontext():
            output, weights = attention(
                self, queries, keys, values, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
            )
        return output[..., : self.config.v_head_dim] if missing_width > 0 else output, weights

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        if past_key_values is None and runs_fused(hidden_states, self.kv_a_layernorm.weight):
            output, weights = self.attend_fused(hidden_states, position_embeddings, attention_mask, **kwargs)
            return project(self.o_proj, output.flatten(2)), weights
        if past_key_values is None and self.runs_on_cpu(hidden_states, attention_mask, **kwargs):
            output = self.attend_on_cpu(hidden_states, position_embeddings, attention_mask)
            return self.o_proj(output.flatten(2)), None
        cos, sin = (angle.unsqueeze(1) for angle in position_embeddings)
        query_nope, query_rope = self.project_queries(hidden_states).split(
            (self.config.qk_nope_head_dim, self.config.qk_rope_head_dim), dim=-1
        )
        query_rope = rotate(query_rope, cos, sin, self.config.rope_interleave).to(query_nope.dtype)
        latent, key_rope = self.compress(hidden_states)
        key_rope = rotate(key_rope, cos, sin, self.config.rope_interleave)

        weights = None
        if isinstance(past_key_values, PrefillView):
            dtype = compute_dtype(hidden_states)
            latent, key_rope = past_key_values.update(latent, key_rope, self.layer_idx, dtype)
        elif past_key_values is not None:
            latent, key_rope = past_key_values.update(latent, key_rope, self.layer_idx)
        queries = torch.cat((query_nope, query_rope), dim=-1)
        if isinstance(past_key_values, PrefillView) and past_key_values.start:
            output = causal_chunk_attention(queries, *self.expand(latent, key_rope), self.scaling).transpose(1, 2)
        elif past_key_values is not None and self.absorbs(queries, latent, attention_mask):
            output = self.attend_absorbed(query_nope, query_rope, latent, key_rope, attention_mask)
        else:
            output, weights = self.attend_expanded(queries, latent, key_rope, attention_mask, **kwargs)
        return self.o_proj(output.flatten(2)), weights


# Every entry: `__init__(config, layer_idx)` and the `forward` above. Keys are the names of `config.attention_types`.
ATTENTIONS = {"latent": DeepSeekR1LatentAttention}
