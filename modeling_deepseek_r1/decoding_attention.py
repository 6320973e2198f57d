"""Attention over cached latents in plain torch: the reference of the decoding kernels, the CPU path, the FP8 cache.

Absorbed form (DeepSeek-V2, arXiv:2405.04434, Sec. 2.1.2): the up-projection of the keys moves to the queries, that of
the values to the output, so that a cached latent serves as key and value of all heads and is never expanded.

Dimensions: T tokens of a step (B batch rows x S steps, token t = b * S + s), H heads, r kv_lora_rank,
R qk_rope_head_dim, v v_head_dim, W = kv_b_proj.weight seen as (H, nope + v, r).

Cache: one buffer (cache rows, capacity, width) a layer. Its address stands in `table[layer]` (int64), its elements a
cache row in `table[-1]`. Width r + R of the compute dtype, or the bytes of `latent_bytes` with FP8.
The functions `x_twin` have the arguments of `kernels_attention.x` and say the same in more tensors.
"""

import ctypes
from functools import lru_cache

import torch
import torch.nn.functional as F
from transformers.utils import logging

from .rotary import rotate

logger = logging.get_logger(__name__)

FP8_MAX = 448.0  # the largest e4m3 number
FP8_GROUP = 128  # channels that share one scale
MIN_SHARE = 64  # tokens a split takes at least: less does not pay for its partial result


def latent_bytes(latent_rank, rope_dim):
    """Bytes an FP8 cache needs for a token and layer: e4m3 latent, fp32 scales of 128 channels, bf16 rotary key."""
    if latent_rank % FP8_GROUP or rope_dim % 2:
        raise ValueError(f"kv_lora_rank={latent_rank} must be a multiple of {FP8_GROUP} and "
                         f"qk_rope_head_dim={rope_dim} even for the FP8 cache; use the model's dtype")  # fmt: skip
    return latent_rank + latent_rank // FP8_GROUP * 4 + 2 * rope_dim


def quantize_latents(latent, key_rope):
    """Latent (..., r) and rotated key (..., R) -> (..., latent_bytes) uint8.

    A scale is the largest magnitude of its 128 channels over 448, so that nothing saturates.
    """
    latent_bytes(latent.shape[-1], key_rope.shape[-1])
    groups = latent.float().unflatten(-1, (-1, FP8_GROUP))
    scales = groups.abs().amax(-1).clamp_min(1e-12) / FP8_MAX
    values = (groups / scales.unsqueeze(-1)).to(torch.float8_e4m3fn).flatten(-2)
    parts = values, scales, key_rope.to(torch.bfloat16)
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)


def dequantize_latents(buffer, latent_rank, rope_dim, dtype):
    """(..., latent_bytes) uint8 -> latent (..., r) and rotated key (..., R) of `dtype`."""
    scales_end = latent_rank + latent_rank // FP8_GROUP * 4
    values = buffer[..., :latent_rank].contiguous().view(torch.float8_e4m3fn).float()
    scales = buffer[..., latent_rank:scales_end].contiguous().view(torch.float32)
    latent = (values.unflatten(-1, (-1, FP8_GROUP)) * scales.unsqueeze(-1)).flatten(-2)
    key_rope = buffer[..., scales_end : scales_end + 2 * rope_dim].contiguous().view(torch.bfloat16)
    return latent.to(dtype), key_rope.to(dtype)


def cache_view(table, layer, cache_rows, width, dtype):
    """The layer's buffer as a tensor (cache_rows, capacity, width) on the memory that `table` points at."""
    address, row_elements = int(table[layer]), int(table[-1])
    size = cache_rows * row_elements * dtype.itemsize
    if table.device.type == "cpu":
        flat = torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
    else:
        interface = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 2}
        holder = type("Memory", (), {"__cuda_array_interface__": interface})()
        flat = torch.as_tensor(holder, device=table.device)
    return flat.view(dtype).view(cache_rows, row_elements // width, width)


def _layer_cache(table, layer, rows, latent_rank, rope_dim, dtype, fp8):
    width = latent_bytes(latent_rank, rope_dim) if fp8 else latent_rank + rope_dim
    return cache_view(table, layer, int(rows.max()) + 1, width, torch.uint8 if fp8 else dtype)


def prepare_latents_twin(queries, compressed, norm_weight, norm_eps, inv_freq, rope_scaling, table, layer, rows,
                         lengths, steps, query_rope, interleave, fp8, latent_rank):  # fmt: skip
    """Normalises the new latents, rotates the new keys and the queries' rotary part, writes the cache.

    Shapes: queries (T, H, nope + R), compressed (T, r + R) raw projections; norm_weight (r,); inv_freq (R / 2,) fp32
    in radians a token; rows, lengths (B,) int32. Writes query_rope (T, H, R), half-split, and for token (b, s) the
    cache at row rows[b], position lengths[b] + s.
    """
    rope_dim, dtype = query_rope.shape[-1], query_rope.dtype
    positions = (lengths[:, None] + torch.arange(steps, device=lengths.device)).flatten().long()
    angles = positions[:, None].float() * inv_freq
    cos, sin = (angles.cos() * rope_scaling).to(dtype), (angles.sin() * rope_scaling).to(dtype)
    query_rope.copy_(rotate(queries[..., -rope_dim:], cos[:, None], sin[:, None], interleave))
    key_rope = rotate(compressed[:, latent_rank:], cos, sin, interleave)
    latent = F.rms_norm(compressed[:, :latent_rank], (latent_rank,), norm_weight, norm_eps).to(dtype)
    entry = quantize_latents(latent, key_rope) if fp8 else torch.cat((latent, key_rope), dim=-1)
    cache = _layer_cache(table, layer, rows, latent_rank, rope_dim, dtype, fp8)
    cache[rows.long().repeat_interleave(steps), positions] = entry


def absorb_queries_twin(queries, kv_b_weight, query_latent, nope):
    """query_latent (T, H, r) = queries (T, H, >= nope)[..., :nope] @ W[h, :nope] for every head."""
    heads, rank = query_latent.shape[1:]
    keys = kv_b_weight.view(heads, -1, rank)[:, :nope]
    query_latent.copy_(torch.matmul(queries[..., :nope].transpose(0, 1), keys).transpose(0, 1))


def latent_attention_twin(query_latent, query_rope, table, layer, rows, lengths, steps, scale, fp8, partial,
                          partial_lse, splits):  # fmt: skip
    """Attention of token (b, s) over positions 0 .. lengths[b] + s of cache row rows[b], by shares of the context.

    Shapes: query_latent (T, H, r), query_rope (T, H, R), any strides. Writes partial (splits, T, H, r) fp32, each
    share normalised by itself, and partial_lse (splits, T, H) fp32, its natural log of the sum of exponentials; -inf
    where a share holds nothing the token may see (its partial is then undefined). Shares with something come first.
    """
    rank, rope_dim = query_latent.shape[-1], query_rope.shape[-1]
    cache = _layer_cache(table, layer, rows, rank, rope_dim, query_latent.dtype, fp8)
    partial_lse.fill_(-torch.inf)
    for b, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
        entries = cache[row, : length + steps]
        latent, key_rope = (dequantize_latents(entries, rank, rope_dim, query_latent.dtype) if fp8
                            else entries.split((rank, rope_dim), dim=-1))  # fmt: skip
        share = max(-(-(length + steps) // splits), MIN_SHARE)
        for s in range(steps):
            token, seen = b * steps + s, length + s + 1
            scores = query_latent[token].float() @ latent[:seen].float().T
            scores = (scores + query_rope[token].float() @ key_rope[:seen].float().T) * scale
            for split, begin in enumerate(range(0, seen, share)):
                part = scores[:, begin : begin + share]
                partial_lse[split, token] = part.logsumexp(-1)
                partial[split, token] = part.softmax(-1) @ latent[:seen][begin : begin + share].float()


def combine_splits_twin(partial, partial_lse):
    """(splits, T, H, r), (splits, T, H) -> (T, H, r) fp32: the attention over all shares."""
    shares = partial_lse.softmax(0).unsqueeze(-1)
    return torch.where(shares > 0, partial * shares, 0.0).sum(0)


def expand_values_twin(partial, partial_lse, kv_b_weight, output, nope):
    """Joins the splits and applies W_UV: output (T, H, v) = combined @ W[h, nope:].T for every head."""
    heads, rank = partial.shape[2:]
    values = kv_b_weight.view(heads, -1, rank)[:, nope:]
    combined = combine_splits_twin(partial, partial_lse).to(kv_b_weight.dtype)
    output.copy_(torch.matmul(combined.transpose(0, 1), values.transpose(1, 2)).transpose(0, 1))


def absorbed_attention(query_latent, query_rope, latent, key_rope, scale, mask=None):
    """Attention in latent space; softmax in fp32. Every query sees every key unless `mask` says else.

    Shapes (T cached tokens): query_latent (B, H, S, r), query_rope (B, H, S, R), latent (B, T, r), key_rope (B, T, R),
    also as views of one buffer; mask bool (True: seen) or additive, broadcastable to (B, H, S, T) -> (B, H, S, r).
    """
    batch, heads, steps, rank = query_latent.shape
    queries = query_latent.reshape(batch, heads * steps, rank)
    rotated = query_rope.reshape(batch, heads * steps, -1)
    # One batch row: 2-D products, whose dispatch costs half as much.
    if batch == 1:
        scores = torch.mm(rotated[0], key_rope[0].t())
        scores = torch.addmm(scores, queries[0], latent[0].t(), beta=scale, alpha=scale)
    else:
        scores = torch.bmm(rotated, key_rope.transpose(1, 2))
        scores = torch.baddbmm(scores, queries, latent.transpose(1, 2), beta=scale, alpha=scale)
    if mask is not None:
        scores = scores.view(batch, heads, steps, -1)
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        scores = scores.view(batch, heads * steps, -1)
    if scores.dtype == torch.float32:
        weights = scores.softmax(-1).to(latent.dtype)
    else:
        weights = scores.softmax(-1, dtype=torch.float32).to(latent.dtype)
    if batch == 1:
        return torch.mm(weights.view(heads * steps, -1), latent[0]).view(1, heads, steps, rank)
    return torch.bmm(weights, latent).view(batch, heads, steps, rank)


@lru_cache(maxsize=None)
def cudnn_merges(device, dtype, key_width, value_width):
    """Whether cuDNN's attention takes these widths and returns a natural-log (B, H, Q, 1) log-sum-exp; asked once."""
    sizes = ((key_width, 64), (key_width, 128), (value_width, 128))
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(1, 2, length, width, generator=generator, device=device, dtype=dtype) for width, length in sizes
    )
    try:
        output, lse = _cudnn_attention(query, key, value, False, 0.1)
    except RuntimeError as error:
        reason = str(error).split("\n")[0][:200]
        logger.warning(f"chunked prefill uses masked attention, not cuDNN ({key_width}, {value_width}): {reason}")
        return False
    scores = query.float() @ key.float().mT * 0.1
    expected = scores.softmax(-1) @ value.float()
    right = lse.numel() == 2 * 64 and output.shape == expected.shape
    right = right and torch.allclose(lse.float().view(1, 2, 64), scores.logsumexp(-1), atol=1e-2, rtol=1e-2)
    right = right and torch.allclose(output.float(), expected, atol=3e-2, rtol=3e-2)
    if not right:
        logger.warning(f"chunked prefill uses masked attention: cuDNN's log-sum-exp is no natural log in (B, H, Q, 1) "
                       f"for widths {key_width}, {value_width}")  # fmt: skip
    return right


def _cudnn_attention(queries, keys, values, causal, scaling):
    results = torch.ops.aten._scaled_dot_product_cudnn_attention(
        queries, keys, values, None, True, 0.0, causal, False, scale=scaling
    )
    return results[0], results[1]


def merge_attention(first, first_lse, second, second_lse):
    """Two attentions of the same queries over disjoint keys -> the attention over both; lse (B, H, Q, 1) fp32."""
    share = torch.sigmoid(first_lse - second_lse)  # exp(lse1) / (exp(lse1) + exp(lse2))
    return torch.lerp(second.float(), first.float(), share).to(first.dtype)


def causal_chunk_attention(queries, keys, values, scaling, mask_elements=2**22):
    """Causal attention of the last Q positions over all S: query i sees keys 0 .. S - Q + i.

    On CUDA in bf16 and fp16 by two cuDNN calls (the past in full, the chunk causally) joined exactly by their
    log-sum-exps; elsewhere, and where cuDNN does not take the widths, by masked attention over parts of the queries
    whose mask holds at most about `mask_elements`.

    Shapes: queries (B, H, Q, dk), keys (B, H, S, dk), values (B, H, S, dv) -> (B, H, Q, dv).
    """
    count, total, value_width = queries.shape[2], keys.shape[2], values.shape[3]
    past = total - count
    if past < 0:
        raise ValueError(f"{count} queries but only {total} keys; the queries must be the last positions of the keys")
    half = queries.dtype in (torch.bfloat16, torch.float16)
    if queries.is_cuda and half and cudnn_merges(queries.device, queries.dtype, keys.shape[3], value_width):
        chunk, chunk_lse = _cudnn_attention(queries, keys[:, :, past:], values[:, :, past:], True, scaling)
        if past == 0:
            return chunk
        before, before_lse = _cudnn_attention(queries, keys[:, :, :past], values[:, :, :past], False, scaling)
        shape = (*queries.shape[:3], 1)
        return merge_attention(before, before_lse.view(shape), chunk, chunk_lse.view(shape))
    # On a CPU, torch's fused kernel takes values only as wide as keys, and falls back to one that holds all scores.
    missing = keys.shape[3] - value_width if queries.device.type == "cpu" else 0
    values = F.pad(values, (0, missing)) if missing > 0 else values
    outputs, part = [], max(16, mask_elements // total)
    for begin in range(0, count, part):
        end = min(begin + part, count)
        seen = past + end
        positions = torch.arange(past + begin, seen, device=queries.device)
        mask = torch.arange(seen, device=queries.device) <= positions[:, None]
        outputs.append(F.scaled_dot_product_attention(
            queries[:, :, begin:end], keys[:, :, :seen], values[:, :, :seen], attn_mask=mask, scale=scaling
        ))  # fmt: skip
    return torch.cat(outputs, dim=2)[..., :value_width]
