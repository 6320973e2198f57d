"""Triton kernels of a decoding step's attention: prepare, absorb, attend over the latent cache, expand.

What each computes stands at its twin in decoding_attention.py (`x` here, `x_twin` there; same arguments, dimensions
and cache layout). The kernels never synchronise, allocate the same whatever the data, are deterministic, and do not
recompile when lengths, rows, counts or addresses change.

A latent is read from memory once for BLOCK_M (head, step) pairs, as key and as value: 2 (r + R) bytes a token and
block of heads are all that attention has to wait for. The context is split over the card by `splits`.
"""

from functools import lru_cache
from math import gcd

import torch

from .decoding_attention import MIN_SHARE, latent_bytes
from .kernels_fp8 import fp8_attention_blocks, fp8_attention_kernel
from .kernels_launch import ahead, wait_for_inputs

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the decoding kernels need triton; decoding_attention.py computes the same without") from error

FEW_TOKENS = 8  # up to here a step is bound by launches, and splits are joined inside `expand_values`


def attention_blocks(steps, heads, rank, element_size):
    """Launch settings of `latent_attention` for `steps` tokens a batch row; element_size of the cache (1: FP8).

    BLOCK_M (head, step) pairs and BLOCK_N tokens a program. Chosen from the compiler's report for sm_90: one to two
    tiles under way while one is worked on (num_stages), no more than 227 kB of shared memory, few or no spills.
    """
    if element_size == 1:
        return fp8_attention_blocks(steps, heads)
    pairs = min(32 if element_size == 4 else 64, max(16, triton.next_power_of_2(steps * heads)))
    wide = pairs * rank > 16 * 512
    block_n = 16 if element_size == 4 else 32 if pairs * rank > 32 * 512 else 64
    return {"BLOCK_M": pairs, "BLOCK_N": block_n, "num_warps": 4 if element_size == 2 and not wide else 8,
            "num_stages": 4 if rank <= 256 else 3}  # fmt: skip


def split_count(batch, head_blocks, sm_count):
    """Splits of the context that fill the card once; at batch 1 as many as there are multiprocessors."""
    return max(1, sm_count // (batch * head_blocks))


@lru_cache(maxsize=None)
def _column_block(columns, heads):
    """Columns a program of a per-head product takes: 128 programs or more where the size allows, 64-byte rows."""
    block = 64
    while block > 16 and heads * triton.cdiv(columns, block) < 128:
        block //= 2
    return block


@triton.jit
def _rotated(source, position, inv_freq, rope_scaling, pair, kept, half: tl.constexpr, INTERLEAVE: tl.constexpr,
             DTYPE: tl.constexpr):  # fmt: skip
    """Both halves, fp32, of the rotated channels at `source` (pointers to the first channel; `pair` broadcasts)."""
    first_channel = 2 * pair if INTERLEAVE else pair
    second_channel = first_channel + (1 if INTERLEAVE else half)
    angle = position.to(tl.float32) * tl.load(inv_freq + pair, mask=pair < half, other=0.0)
    cosine = (tl.cos(angle) * rope_scaling).to(DTYPE).to(tl.float32)  # rounded as rotary.py does
    sine = (tl.sin(angle) * rope_scaling).to(DTYPE).to(tl.float32)
    first = tl.load(source + first_channel, mask=kept, other=0.0).to(tl.float32)
    second = tl.load(source + second_channel, mask=kept, other=0.0).to(tl.float32)
    return first * cosine - second * sine, second * cosine + first * sine


@triton.jit
def _rotate_queries(token, block, position, queries, inv_freq, rope_scaling, query_rope, q_token, q_head,
                    heads: tl.constexpr, nope: tl.constexpr, rope: tl.constexpr, INTERLEAVE: tl.constexpr,
                    BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr):  # fmt: skip
    """Rotates one block of a token's heads."""
    dtype: tl.constexpr = query_rope.dtype.element_ty
    half: tl.constexpr = rope // 2
    head = block * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    pair = tl.arange(0, BLOCK_P)[None, :]
    kept = (head < heads) & (pair < half)
    source = queries + token * q_token + head * q_head + nope
    first, second = _rotated(source, position, inv_freq, rope_scaling, pair, kept, half, INTERLEAVE, dtype)
    target = query_rope + (token * heads + head) * rope + pair
    tl.store(target, first.to(dtype), mask=kept)
    tl.store(target + half, second.to(dtype), mask=kept)


@triton.jit
def _write_entry(source, position, norm_weight, norm_eps, inv_freq, rope_scaling, table, layer, last, row,
                 rank: tl.constexpr, rope: tl.constexpr, INTERLEAVE: tl.constexpr, FP8: tl.constexpr,
                 BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr):  # fmt: skip
    """Normalises the latent and rotates the key at `source`, writes both to the cache."""
    dtype: tl.constexpr = source.dtype.element_ty
    half: tl.constexpr = rope // 2
    width: tl.constexpr = (rank + rank // 128 * 4 + 2 * rope) if FP8 else (rank + rope)
    offset = row.to(tl.int64) * tl.load(table + last) + position.to(tl.int64) * width
    channel, pair = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    kept = pair < half
    weight = tl.load(norm_weight + channel, mask=channel < rank, other=0.0).to(tl.float32)
    latent = tl.load(source + channel, mask=channel < rank, other=0.0).to(tl.float32)
    mean_square = tl.sum(latent * latent, axis=0) / rank
    latent = (latent * tl.rsqrt(mean_square + norm_eps) * weight).to(dtype)
    first, second = _rotated(source + rank, position, inv_freq, rope_scaling, pair, kept, half, INTERLEAVE, dtype)
    if FP8:
        entry = tl.load(table + layer) + offset  # in bytes
        groups = tl.reshape(latent.to(tl.float32), (BLOCK_R // 128, 128))
        largest = tl.maximum(tl.max(tl.abs(groups), axis=1), 1e-12)
        scales = tl.div_rn(largest, tl.full((BLOCK_R // 128,), 448.0, tl.float32))
        values = tl.div_rn(groups, tl.broadcast_to(scales[:, None], (BLOCK_R // 128, 128)))
        values = tl.reshape(values, (BLOCK_R,)).to(tl.float8e4nv)
        tl.store(entry.to(tl.pointer_type(tl.float8e4nv)) + channel, values, mask=channel < rank)
        group = tl.arange(0, BLOCK_R // 128)
        tl.store((entry + rank).to(tl.pointer_type(tl.float32)) + group, scales, mask=group < rank // 128)
        key = (entry + rank + rank // 128 * 4).to(tl.pointer_type(tl.bfloat16))
        tl.store(key + pair, first.to(dtype).to(tl.bfloat16), mask=kept)
        tl.store(key + half + pair, second.to(dtype).to(tl.bfloat16), mask=kept)
    else:
        entry = tl.load(table + layer).to(tl.pointer_type(dtype)) + offset
        tl.store(entry + channel, latent, mask=channel < rank)
        tl.store(entry + rank + pair, first.to(dtype), mask=kept)
        tl.store(entry + rank + half + pair, second.to(dtype), mask=kept)


@triton.jit
def _prepare(token, part, queries, compressed, norm_weight, norm_eps, inv_freq, rope_scaling, table, layer, last,
             rows, lengths, steps, query_rope, q_token, q_head, c_token, heads: tl.constexpr, nope: tl.constexpr,
             rank: tl.constexpr, rope: tl.constexpr, INTERLEAVE: tl.constexpr, FP8: tl.constexpr,
             BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr):  # fmt: skip
    """Part 0 of a token writes its cache entry, part i > 0 rotates block i - 1 of its heads."""
    batch = token // steps
    position = tl.load(lengths + batch) + token % steps
    if part == 0:
        _write_entry(compressed + token * c_token, position, norm_weight, norm_eps, inv_freq, rope_scaling, table,
                     layer, last, tl.load(rows + batch), rank, rope, INTERLEAVE, FP8, BLOCK_R, BLOCK_P)  # fmt: skip
    else:
        _rotate_queries(token, part - 1, position, queries, inv_freq, rope_scaling, query_rope, q_token, q_head, heads,
                        nope, rope, INTERLEAVE, BLOCK_H, BLOCK_P)  # fmt: skip


@triton.jit
def _head_product(token_block, head, column_block, source, weight, target, tokens, s_token, s_head, w_head, t_token,
                  t_head, inner: tl.constexpr, columns: tl.constexpr, W_INNER: tl.constexpr, W_COLUMN: tl.constexpr,
                  BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
                  AHEAD: tl.constexpr):  # fmt: skip
    """target[t, head, c] = sum over k of source[t, head, k] * weight[head, k, c], one tile."""
    token = token_block * BLOCK_T + tl.arange(0, BLOCK_T)
    column = column_block * BLOCK_C + tl.arange(0, BLOCK_C)
    kept = (token < tokens)[:, None]
    result = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for begin in tl.static_range(0, inner, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        w_mask = (k < inner)[:, None] & (column < columns)[None, :]
        w = tl.load(weight + head * w_head + k[:, None] * W_INNER + column[None, :] * W_COLUMN, mask=w_mask, other=0.0)
        if begin == 0:
            wait_for_inputs(AHEAD)
        rows = tl.load(source + token[:, None] * s_token + head * s_head + k[None, :],
                       mask=kept & (k < inner)[None, :], other=0.0)  # fmt: skip
        result = tl.dot(rows, w, result, input_precision="ieee")
    tl.store(target + token[:, None] * t_token + head * t_head + column[None, :],
             result.to(target.dtype.element_ty), mask=kept & (column < columns)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["layer", "last", "steps"])
def prepare_kernel(queries, compressed, norm_weight, norm_eps, inv_freq, rope_scaling, table, layer, last, rows,
                   lengths, steps, query_rope, q_token, q_head, c_token, heads: tl.constexpr, nope: tl.constexpr,
                   rank: tl.constexpr, rope: tl.constexpr, INTERLEAVE: tl.constexpr, FP8: tl.constexpr,
                   BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
                   AHEAD: tl.constexpr):  # fmt: skip
    """Grid (T, head blocks + 1)."""
    wait_for_inputs(AHEAD)
    _prepare(tl.program_id(0), tl.program_id(1), queries, compressed, norm_weight, norm_eps, inv_freq, rope_scaling,
             table, layer, last, rows, lengths, steps, query_rope, q_token, q_head, c_token, heads, nope, rank, rope,
             INTERLEAVE, FP8, BLOCK_H, BLOCK_R, BLOCK_P)  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def head_product_kernel(source, weight, target, tokens, s_token, s_head, w_head, t_token, t_head, inner: tl.constexpr,
                        columns: tl.constexpr, W_INNER: tl.constexpr, W_COLUMN: tl.constexpr, BLOCK_T: tl.constexpr,
                        BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, AHEAD: tl.constexpr):  # fmt: skip
    """Grid (token blocks, heads, column blocks); token blocks of one tile of W run side by side and share it in L2."""
    _head_product(tl.program_id(0), tl.program_id(1), tl.program_id(2), source, weight, target, tokens, s_token, s_head,
                  w_head, t_token, t_head, inner, columns, W_INNER, W_COLUMN, BLOCK_T, BLOCK_K, BLOCK_C,
                  AHEAD)  # fmt: skip


@triton.jit(do_not_specialize=["layer", "last", "steps", "tokens", "absorb_programs"])
def prepare_and_absorb_kernel(queries, compressed, norm_weight, norm_eps, inv_freq, rope_scaling, table, layer, last,
                              rows, lengths, steps, query_rope, q_token, q_head, c_token, weight, query_latent, tokens,
                              absorb_programs, w_head, l_token, l_head, heads: tl.constexpr, nope: tl.constexpr,
                              rank: tl.constexpr, rope: tl.constexpr, INTERLEAVE: tl.constexpr, FP8: tl.constexpr,
                              BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
                              BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
                              AHEAD: tl.constexpr):  # fmt: skip
    """The first `absorb_programs` of a flat grid absorb, the others prepare."""
    program = tl.program_id(0)
    if program < absorb_programs:
        column_blocks: tl.constexpr = (rank + BLOCK_C - 1) // BLOCK_C
        tile = program % (heads * column_blocks)
        _head_product(program // (heads * column_blocks), tile // column_blocks, tile % column_blocks, queries, weight,
                      query_latent, tokens, q_token, q_head, w_head, l_token, l_head, nope, rank, rank, 1, BLOCK_T,
                      BLOCK_K, BLOCK_C, AHEAD)  # fmt: skip
    else:
        wait_for_inputs(AHEAD)
        parts: tl.constexpr = (heads + BLOCK_H - 1) // BLOCK_H + 1
        task = program - absorb_programs
        _prepare(task // parts, task % parts, queries, compressed, norm_weight, norm_eps, inv_freq, rope_scaling, table,
                 layer, last, rows, lengths, steps, query_rope, q_token, q_head, c_token, heads, nope, rank, rope,
                 INTERLEAVE, FP8, BLOCK_H, BLOCK_R, BLOCK_P)  # fmt: skip


@triton.jit
def _cache_tile(entry, position, end, rank: tl.constexpr, rope: tl.constexpr, BLOCK_R: tl.constexpr,
                BLOCK_P: tl.constexpr):  # fmt: skip
    """Latents (BLOCK_N, BLOCK_R) and rotated keys (BLOCK_N, BLOCK_P) at `position`; zeros past `end` and past r, R."""
    channel, rotary = tl.arange(0, BLOCK_R)[None, :], tl.arange(0, BLOCK_P)[None, :]
    offset = position[:, None].to(tl.int64) * (rank + rope)
    seen = (position < end)[:, None]
    rope_mask = seen if rope == BLOCK_P else seen & (rotary < rope)
    keys = entry + offset
    latent = tl.load(keys + channel, mask=seen if rank == BLOCK_R else seen & (channel < rank), other=0.0)
    key_rope = tl.load(keys + rank + rotary, mask=rope_mask, other=0.0)
    return latent, key_rope


@triton.jit(do_not_specialize=["layer", "last", "steps", "tokens", "splits"])
def latent_attention_kernel(query_latent, query_rope, table, layer, last, rows, lengths, partial, partial_lse, steps,
                            tokens, splits, scale, ql_token, ql_head, ql_channel, qr_token, qr_head, qr_channel,
                            heads: tl.constexpr, rank: tl.constexpr, rope: tl.constexpr, ALIGN: tl.constexpr,
                            MIN_SHARE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                            BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, AHEAD: tl.constexpr):  # fmt: skip
    """Grid (B, head blocks, splits): BLOCK_M (head, step) pairs attend over one share of one row's context.

    Softmax in base 2, running maximum and sum in fp32. A share without tokens leaves an lse of -inf and no partial.
    """
    dtype: tl.constexpr = query_latent.dtype.element_ty
    batch, split = tl.program_id(0), tl.program_id(2)
    length = tl.load(lengths + batch)
    total = length + steps
    share = tl.maximum(tl.cdiv(total, splits), MIN_SHARE)
    share = tl.cdiv(share, BLOCK_N) * BLOCK_N
    begin = split * share
    end = tl.minimum(begin + share, total)

    pair = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    head, step = pair // steps, pair % steps
    valid = head < heads
    token = batch * steps + step
    target = (split.to(tl.int64) * tokens + token) * heads + head
    # Up to here only what no kernel of a step writes was read.
    wait_for_inputs(AHEAD)
    if begin >= end:
        tl.store(partial_lse + target, tl.full((BLOCK_M,), float("-inf"), tl.float32), mask=valid)
        return

    row_offset = tl.load(rows + batch).to(tl.int64) * tl.load(table + last)
    # The compiler must learn that rows start at multiples of 16 bytes, or it loads element by element. The hint has to
    # stand on the sum: on the bare address it is lost.
    entry = tl.multiple_of(tl.load(table + layer).to(tl.pointer_type(dtype)) + row_offset, ALIGN)

    channel, rotary = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    latent_rows = query_latent + token * ql_token + head * ql_head
    q_latent = tl.load(latent_rows[:, None] + channel[None, :] * ql_channel,
                       mask=valid[:, None] & (channel < rank)[None, :], other=0.0)  # fmt: skip
    rope_rows = query_rope + token * qr_token + head * qr_head
    q_rope = tl.load(rope_rows[:, None] + rotary[None, :] * qr_channel,
                     mask=valid[:, None] & (rotary < rope)[None, :], other=0.0)  # fmt: skip
    limit = length + step
    factor = scale * 1.4426950408889634
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total_weight = tl.zeros((BLOCK_M,), tl.float32)
    result = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(begin, end, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        latent, key_rope = _cache_tile(entry, position, end, rank, rope, BLOCK_R, BLOCK_P)
        scores = tl.dot(q_rope, tl.trans(key_rope), input_precision="ieee")
        scores = tl.dot(q_latent, tl.trans(latent), scores, input_precision="ieee") * factor
        scores = tl.where(position[None, :] <= limit[:, None], scores, float("-inf"))
        highest = tl.maximum(maximum, tl.max(scores, axis=1))
        origin = tl.where(highest == float("-inf"), 0.0, highest)  # -inf - -inf would be NaN
        weights = tl.exp2(scores - origin[:, None])
        decay = tl.exp2(maximum - origin)
        total_weight = total_weight * decay + tl.sum(weights, axis=1)
        result = tl.dot(weights.to(dtype), latent, result * decay[:, None], input_precision="ieee")
        maximum = highest

    seen = total_weight > 0.0
    result = result / tl.where(seen, total_weight, 1.0)[:, None]
    lse = tl.where(seen, (maximum + tl.log2(total_weight)) * 0.6931471805599453, float("-inf"))
    tl.store(partial_lse + target, lse, mask=valid)
    tl.store(partial + target[:, None] * rank + channel[None, :], result,
             mask=valid[:, None] & (channel < rank)[None, :])  # fmt: skip


@triton.jit
def _combine(partial, partial_lse, index, count, splits, rank: tl.constexpr, BLOCK_S: tl.constexpr,
             CHUNK: tl.constexpr, channel):  # fmt: skip
    """Channels `channel` of (token, head) pair `index` of `count`, joined over the splits that hold something."""
    split = tl.arange(0, BLOCK_S)
    lse = tl.load(partial_lse + split * count + index, mask=split < splits, other=float("-inf"))
    highest = tl.max(lse, axis=0)
    weight_sum = tl.sum(tl.exp(lse - highest), axis=0)
    used = tl.sum((lse > float("-inf")).to(tl.int32), axis=0)  # shares with tokens come first
    result = tl.zeros((channel.shape[0],), tl.float32)
    for begin in tl.range(0, used, CHUNK, num_stages=4):  # at 132 splits waiting for each load would cost 5 us
        part = begin + tl.arange(0, CHUNK)
        weight = tl.exp(tl.load(partial_lse + part * count + index, mask=part < used, other=float("-inf")) - highest)
        row = (part.to(tl.int64) * count + index) * rank
        kept = (part < used)[:, None] & (channel < rank)[None, :]
        values = tl.load(partial + row[:, None] + channel[None, :], mask=kept, other=0.0)
        result += tl.sum(values * weight[:, None], axis=0)
    return result / weight_sum


@triton.jit(do_not_specialize=["count", "splits"])
def combine_kernel(partial, partial_lse, combined, count, splits, rank: tl.constexpr, BLOCK_S: tl.constexpr,
                   CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, AHEAD: tl.constexpr):  # fmt: skip
    """Grid (T * H, channel blocks): combined (T, H, r) from the splits."""
    wait_for_inputs(AHEAD)
    index = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    result = _combine(partial, partial_lse, index, count, splits, rank, BLOCK_S, CHUNK, channel)
    target = combined + index.to(tl.int64) * rank + channel
    tl.store(target, result.to(combined.dtype.element_ty), mask=channel < rank)


@triton.jit(do_not_specialize=["count", "splits"])
def combine_expand_kernel(partial, partial_lse, weight, output, count, splits, w_head, heads: tl.constexpr,
                          rank: tl.constexpr, columns: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
                          BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, AHEAD: tl.constexpr):  # fmt: skip
    """Grid (heads, column blocks, T). W's tile is asked for first and arrives while the splits are joined."""
    head, token = tl.program_id(0), tl.program_id(2)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = tl.arange(0, BLOCK_R)
    w = tl.load(weight + head * w_head + column[:, None] * rank + channel[None, :],
                mask=(column < columns)[:, None] & (channel < rank)[None, :], other=0.0)  # fmt: skip
    wait_for_inputs(AHEAD)
    combined = _combine(partial, partial_lse, token * heads + head, count, splits, rank, BLOCK_S, CHUNK, channel)
    result = tl.sum(w.to(tl.float32) * combined[None, :], axis=1)
    target = output + (token * heads + head) * columns + column
    tl.store(target, result.to(output.dtype.element_ty), mask=column < columns)


def _check_widths(compressed, latent_rank, query_rope, queries):
    rope_dim = query_rope.shape[-1]
    if compressed.shape[-1] != latent_rank + rope_dim or not query_rope.is_contiguous():
        raise ValueError(f"compressed has {compressed.shape[-1]} channels and must have latent_rank + R = "
                         f"{latent_rank} + {rope_dim}; query_rope must be contiguous")  # fmt: skip
    if queries.stride(-1) != 1 or compressed.stride(-1) != 1:
        raise ValueError("the channels of queries and compressed must be neighbours; pass the projections as they are")


def _check_weight(kv_b_weight, states):
    if kv_b_weight.dtype != states.dtype or not kv_b_weight.is_contiguous():
        raise ValueError(f"kv_b_weight is {kv_b_weight.dtype} and must be contiguous and {states.dtype} as the "
                         "states; cast the weight once, outside the step")  # fmt: skip


def _prepare_arguments(queries, compressed, norm_weight, norm_eps, inv_freq, rope_scaling, table, layer, rows, lengths,
                       steps, query_rope, interleave, fp8, latent_rank):  # fmt: skip
    """-> positional arguments and constexprs that both preparing kernels share, and their programs a token."""
    _check_widths(compressed, latent_rank, query_rope, queries)
    heads, rope_dim = query_rope.shape[1:]
    if fp8:
        latent_bytes(latent_rank, rope_dim)
    pairs = triton.next_power_of_2(max(rope_dim // 2, 1))
    block_h = min(triton.next_power_of_2(heads), max(1, 1024 // pairs))
    arguments = (
        queries, compressed, norm_weight, norm_eps, inv_freq, rope_scaling, table, layer, table.numel() - 1, rows,
        lengths, steps, query_rope, queries.stride(0), queries.stride(1), compressed.stride(0),
    )  # fmt: skip
    constants = dict(heads=heads, nope=queries.shape[2] - rope_dim, rank=latent_rank, rope=rope_dim,
                     INTERLEAVE=bool(interleave), FP8=bool(fp8), BLOCK_H=block_h, BLOCK_P=pairs,
                     BLOCK_R=triton.next_power_of_2(latent_rank))  # fmt: skip
    return arguments, constants, triton.cdiv(heads, block_h) + 1


def prepare_latents(queries, compressed, norm_weight, norm_eps, inv_freq, rope_scaling, table, layer, rows, lengths,
                    steps, query_rope, interleave, fp8, latent_rank):  # fmt: skip
    """See `prepare_latents_twin`; one launch."""
    arguments, constants, parts = _prepare_arguments(
        queries, compressed, norm_weight, norm_eps, inv_freq, rope_scaling, table, layer, rows, lengths, steps,
        query_rope, interleave, fp8, latent_rank,
    )  # fmt: skip
    prepare_kernel[(queries.shape[0], parts)](*arguments, **constants, num_warps=4, **ahead(queries.device))


def _product_blocks(tokens, inner, columns, heads, dtype):
    """16 to 64 tokens share a tile of W; smaller tiles in fp32, which multiplies out of registers and would spill."""
    block_t, block_k = (16, 64) if dtype == torch.float32 else (64, 128)
    block_t = min(block_t, max(16, triton.next_power_of_2(tokens)))
    block_k = min(block_k, max(16, triton.next_power_of_2(inner)))
    return {"BLOCK_T": block_t, "BLOCK_K": block_k, "BLOCK_C": _column_block(columns, heads)}


def absorb_queries(queries, kv_b_weight, query_latent, nope):
    """See `absorb_queries_twin`; one launch for any T: blocks of 16 to 64 tokens share a tile of W."""
    _check_weight(kv_b_weight, queries)
    tokens, heads, rank = query_latent.shape
    blocks = _product_blocks(tokens, nope, rank, heads, queries.dtype)
    grid = (triton.cdiv(tokens, blocks["BLOCK_T"]), heads, triton.cdiv(rank, blocks["BLOCK_C"]))
    head_product_kernel[grid](
        queries, kv_b_weight, query_latent, tokens, queries.stride(0), queries.stride(1),
        kv_b_weight.numel() // heads, query_latent.stride(0), query_latent.stride(1), inner=nope, columns=rank,
        W_INNER=rank, W_COLUMN=1, **blocks, num_warps=4, **ahead(queries.device),
    )  # fmt: skip


def prepare_and_absorb(queries, compressed, norm_weight, norm_eps, inv_freq, rope_scaling, table, layer, rows, lengths,
                       steps, query_rope, interleave, fp8, latent_rank, kv_b_weight, query_latent):  # fmt: skip
    """`prepare_latents` and `absorb_queries` in one launch, for any T."""
    _check_weight(kv_b_weight, queries)
    arguments, constants, parts = _prepare_arguments(
        queries, compressed, norm_weight, norm_eps, inv_freq, rope_scaling, table, layer, rows, lengths, steps,
        query_rope, interleave, fp8, latent_rank,
    )  # fmt: skip
    tokens, heads = query_rope.shape[:2]
    blocks = _product_blocks(tokens, constants["nope"], latent_rank, heads, queries.dtype)
    programs = heads * triton.cdiv(latent_rank, blocks["BLOCK_C"]) * triton.cdiv(tokens, blocks["BLOCK_T"])
    prepare_and_absorb_kernel[(programs + tokens * parts,)](
        *arguments, kv_b_weight, query_latent, tokens, programs, kv_b_weight.numel() // heads, query_latent.stride(0),
        query_latent.stride(1), **constants, **blocks, num_warps=4, **ahead(queries.device),
    )  # fmt: skip


def latent_attention(query_latent, query_rope, table, layer, rows, lengths, steps, scale, fp8, partial, partial_lse,
                     splits, blocks=None):  # fmt: skip
    """See `latent_attention_twin`; `blocks` replaces `attention_blocks`, for tuning. With one split, partial is the
    result and may be of the compute dtype, which `expand_values` then multiplies as it is."""
    tokens, heads, rank = query_latent.shape
    rope_dim = query_rope.shape[-1]
    if partial.shape != (splits, tokens, heads, rank) or not (partial.is_contiguous() and partial_lse.is_contiguous()):
        raise ValueError(f"partial is {tuple(partial.shape)} and must be {(splits, tokens, heads, rank)}, contiguous; "
                         "allocate it and partial_lse for this step")  # fmt: skip
    element_size = query_latent.element_size()
    width = latent_bytes(rank, rope_dim) if fp8 else (rank + rope_dim) * element_size
    blocks = blocks or (fp8_attention_blocks(steps, heads, element_size) if fp8 else
                        attention_blocks(steps, heads, rank, element_size))  # fmt: skip
    grid = (rows.shape[0], triton.cdiv(heads * steps, blocks["BLOCK_M"]), splits)
    arguments = (
        query_latent, query_rope, table, layer, table.numel() - 1, rows, lengths, partial, partial_lse, steps, tokens,
        splits, scale, *query_latent.stride(), *query_rope.stride(),
    )  # fmt: skip
    constants = dict(heads=heads, rank=rank, rope=rope_dim, ALIGN=gcd(width, 16), MIN_SHARE=MIN_SHARE,
                     BLOCK_P=max(16, triton.next_power_of_2(rope_dim)), **blocks,
                     **ahead(query_latent.device))  # fmt: skip
    if fp8:
        packed = query_latent.is_cuda and query_latent.dtype != torch.float32  # the interpreter knows no assembly
        fp8_attention_kernel[grid](*arguments, PACKED=packed, **constants)
    else:
        latent_attention_kernel[grid](*arguments, BLOCK_R=max(16, triton.next_power_of_2(rank)), **constants)


def combine_splits(partial, partial_lse, combined):
    """See `combine_splits_twin`; writes combined (T, H, r), contiguous, in its dtype."""
    splits, tokens, heads, rank = partial.shape
    block = min(128, triton.next_power_of_2(rank))
    combine_kernel[(tokens * heads, triton.cdiv(rank, block))](
        partial, partial_lse, combined, tokens * heads, splits, rank=rank, BLOCK_R=block,
        BLOCK_S=triton.next_power_of_2(splits), CHUNK=min(16, triton.next_power_of_2(splits)), num_warps=2,
        **ahead(partial.device),
    )  # fmt: skip


def expand_values(partial, partial_lse, kv_b_weight, output, nope):
    """See `expand_values_twin`; output contiguous. One launch for few tokens or one split in the dtype of the output,
    else one to join and one to multiply."""
    _check_weight(kv_b_weight, output)
    splits, tokens, heads, rank = partial.shape
    columns, w_head = output.shape[-1], kv_b_weight.numel() // heads
    weight = kv_b_weight.view(heads, -1, rank)[:, nope:]
    if tokens <= FEW_TOKENS:
        block_c = min(32, triton.next_power_of_2(columns))
        combine_expand_kernel[(heads, triton.cdiv(columns, block_c), tokens)](
            partial, partial_lse, weight, output, tokens * heads, splits, w_head, heads=heads, rank=rank,
            columns=columns, BLOCK_S=triton.next_power_of_2(splits), CHUNK=min(16, triton.next_power_of_2(splits)),
            BLOCK_R=triton.next_power_of_2(rank), BLOCK_C=block_c, num_warps=8, **ahead(partial.device),
        )  # fmt: skip
        return
    if splits == 1 and partial.dtype == output.dtype:
        combined = partial[0]  # normalised already, and of one share there is always something to see
    else:
        combined = torch.empty(tokens, heads, rank, dtype=output.dtype, device=output.device)
        combine_splits(partial, partial_lse, combined)
    blocks = _product_blocks(tokens, rank, columns, heads, output.dtype)
    grid = (triton.cdiv(tokens, blocks["BLOCK_T"]), heads, triton.cdiv(columns, blocks["BLOCK_C"]))
    head_product_kernel[grid](
        combined, weight, output, tokens, combined.stride(0), combined.stride(1), w_head, output.stride(0),
        output.stride(1), inner=rank, columns=columns, W_INNER=1, W_COLUMN=rank, **blocks, num_warps=4,
        **ahead(combined.device),
    )  # fmt: skip
