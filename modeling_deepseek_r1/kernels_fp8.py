"""Attention over the FP8 latent cache (its layout: `latent_bytes` in decoding_attention.py), without dequantising it.

An e4m3 number is exact in fp16, so a tile is only unpacked: two channels stand in a 16-bit word, and the card turns two
bytes into two fp16 numbers at once. Words go from shared memory straight into the operands of the products, even and
odd channels apart; no converted tile is written back. The scales never touch the tile. With q, k, v the parts of a
group g of 128 channels, s its scale at token t and p the softmax weight:

    score[t] = rope part + sum over g of (q_g . k_g[t]) * s_g[t]         output_g = sum over t of (p[t] * s_g[t]) v_g[t]

Both products are in fp16 and must neither overflow nor lose small numbers, so powers of two, which are exact, are
divided out: of a query row its largest exponent, of a token its largest scale u[t], by adding log2 u[t] to the score
before the running maximum is taken. So p * s stays below 2^15 whatever the magnitudes, and is rounded as if p were.
"""

from .kernels_launch import wait_for_inputs

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the decoding kernels need triton; decoding_attention.py computes the same without") from error


def fp8_attention_blocks(steps, heads, query_size=2):
    """Launch settings of `fp8_attention_kernel`: BLOCK_M (head, step) pairs and BLOCK_N tokens a program; query_size in
    bytes changes all but BLOCK_M.

    With 16 pairs, 4 warps read the queries from shared memory half as often as 8, and two programs fit a
    multiprocessor (238 registers, 104 kB at r = 512). 64 pairs would spill, and so would larger tiles in fp32.
    """
    pairs = min(32, max(16, triton.next_power_of_2(steps * heads)))
    if query_size == 4:
        return {"BLOCK_M": pairs, "BLOCK_N": 16, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": pairs, "BLOCK_N": 64, "num_warps": 4 if pairs == 16 else 8, "num_stages": 3}


@triton.jit
def _channels(words, PACKED: tl.constexpr, DTYPE: tl.constexpr):
    """e4m3 pairs -> even and odd channels. PACKED: fp16, two words at a time, 4 instructions for 4 numbers."""
    if PACKED:
        # prmt puts the even bytes of two words below the odd ones. Two blocks, because the compiler moves only those
        # with one result next to the products; the assembler computes their prmt once.
        even = tl.inline_asm_elementwise(
            """{ .reg .b16 even, odd; .reg .b32 sorted;
                 prmt.b32 sorted, $1, 0, 0x3120; mov.b32 {even, odd}, sorted; cvt.rn.f16x2.e4m3x2 $0, even; }""",
            "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)  # fmt: skip
        odd = tl.inline_asm_elementwise(
            """{ .reg .b16 even, odd; .reg .b32 sorted;
                 prmt.b32 sorted, $1, 0, 0x3120; mov.b32 {even, odd}, sorted; cvt.rn.f16x2.e4m3x2 $0, odd; }""",
            "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)  # fmt: skip
    else:
        even = (words & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(DTYPE)
        odd = (words >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(DTYPE)
    return even, odd


@triton.jit
def _exponent(value):
    """e of the largest 2^e <= value, for normal positive fp32."""
    return (value.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _load_queries(latent_rows, ql_channel, valid, GROUPS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr):
    """-> even and odd channels by group, each row divided by a power of two so that it peaks in [1, 2) * 2^12; those
    powers. In fp16 what is dropped lies 2^36 below the peak."""
    channel = tl.arange(0, 128)[None, :]
    peak = tl.full((BLOCK_M,), 1e-30, tl.float32)
    queries = ()
    for g in tl.static_range(GROUPS):
        part = tl.load(latent_rows[:, None] + (g * 128 + channel) * ql_channel, mask=valid[:, None], other=0.0)
        queries = queries + (part.to(tl.float32),)
        peak = tl.maximum(peak, tl.max(tl.abs(queries[g]), axis=1))
    exponent = _exponent(peak) - 12
    evens, odds = (), ()
    for g in tl.static_range(GROUPS):
        scaled = (queries[g] * _power_of_two(-exponent)[:, None]).to(DTYPE)
        even, odd = tl.split(tl.reshape(scaled, (BLOCK_M, 64, 2)))
        evens, odds = evens + (even,), odds + (odd,)
    return evens, odds, _power_of_two(exponent)


@triton.jit(do_not_specialize=["layer", "last", "steps", "tokens", "splits"])
def fp8_attention_kernel(query_latent, query_rope, table, layer, last, rows, lengths, partial, partial_lse, steps,
                         tokens, splits, scale, ql_token, ql_head, ql_channel, qr_token, qr_head, qr_channel,
                         heads: tl.constexpr, rank: tl.constexpr, rope: tl.constexpr, ALIGN: tl.constexpr,
                         MIN_SHARE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
                         PACKED: tl.constexpr, AHEAD: tl.constexpr):  # fmt: skip
    """Grid, arguments and results of `latent_attention_kernel`; products in fp16, or in fp32 for fp32 queries."""
    wait_for_inputs(AHEAD)
    dtype: tl.constexpr = query_latent.dtype.element_ty
    DTYPE: tl.constexpr = tl.float32 if dtype == tl.float32 else tl.float16
    GROUPS: tl.constexpr = rank // 128
    LIFT: tl.constexpr = 16384.0  # of the weights, so that fp16 keeps what is 2^38 below the largest
    width: tl.constexpr = (rank + rank // 128 * 4 + 2 * rope) // 2  # 16-bit words a token
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
    if begin >= end:
        tl.store(partial_lse + target, tl.full((BLOCK_M,), float("-inf"), tl.float32), mask=valid)
        return

    row_offset = tl.load(rows + batch).to(tl.int64) * tl.load(table + last) // 2
    entry = tl.multiple_of(tl.load(table + layer).to(tl.pointer_type(tl.uint16)) + row_offset, ALIGN)
    word, rotary = tl.arange(0, 64)[None, :], tl.arange(0, BLOCK_P)[None, :]
    rope_rows = query_rope + token * qr_token + head * qr_head
    q_rope = tl.load(rope_rows[:, None] + rotary * qr_channel, mask=valid[:, None] & (rotary < rope), other=0.0)
    q_even, q_odd, q_scale = _load_queries(query_latent + token * ql_token + head * ql_head, ql_channel, valid, GROUPS,
                                           DTYPE, BLOCK_M)  # fmt: skip
    result_even, result_odd = (), ()
    for g in tl.static_range(GROUPS):
        result_even = result_even + (tl.zeros((BLOCK_M, 64), tl.float32),)
        result_odd = result_odd + (tl.zeros((BLOCK_M, 64), tl.float32),)
    limit = length + step
    factor = scale * 1.4426950408889634
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total_weight = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(begin, end, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        seen = position < end
        latent = entry + position.to(tl.int64) * width
        words, scales = (), ()
        for g in tl.static_range(GROUPS):
            words = words + (tl.load((latent + g * 64)[:, None] + word, mask=seen[:, None], other=0),)
            scale_address = (latent + (rank // 2 + g * 2)).to(tl.pointer_type(tl.float32), bitcast=True)
            scales = scales + (tl.load(scale_address, mask=seen, other=0.0),)
        keys = (latent + (rank // 2 + GROUPS * 2)).to(tl.pointer_type(tl.bfloat16), bitcast=True)
        key_rope = tl.load(keys[:, None] + rotary, mask=seen[:, None] & (rotary < rope), other=0.0).to(dtype)

        scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        largest = tl.full((BLOCK_N,), 1e-30, tl.float32)
        for g in tl.static_range(GROUPS):
            even, odd = _channels(words[g], PACKED, DTYPE)
            part = tl.dot(q_even[g], tl.trans(even), input_precision="ieee")
            scores += tl.dot(q_odd[g], tl.trans(odd), part, input_precision="ieee") * scales[g][None, :]
            largest = tl.maximum(largest, scales[g])
        rope_scores = tl.dot(q_rope, tl.trans(key_rope), input_precision="ieee")
        exponent = _exponent(largest)
        scores = (scores * q_scale[:, None] + rope_scores) * factor + exponent.to(tl.float32)[None, :]
        scores = tl.where(position[None, :] <= limit[:, None], scores, float("-inf"))
        highest = tl.maximum(maximum, tl.max(scores, axis=1))
        origin = tl.where(highest == float("-inf"), 0.0, highest)  # -inf - -inf would be NaN
        weights = tl.exp2(scores - origin[:, None])
        decay = tl.exp2(maximum - origin)
        inverse = _power_of_two(-exponent)
        total_weight = total_weight * decay + tl.sum(weights * inverse[None, :], axis=1)
        maximum = highest
        next_even, next_odd = (), ()
        for g in tl.static_range(GROUPS):
            even, odd = _channels(words[g], PACKED, DTYPE)
            scaled = (weights * (scales[g] * inverse * LIFT)[None, :]).to(DTYPE)
            decayed_even, decayed_odd = result_even[g] * decay[:, None], result_odd[g] * decay[:, None]
            next_even = next_even + (tl.dot(scaled, even, decayed_even, input_precision="ieee"),)
            next_odd = next_odd + (tl.dot(scaled, odd, decayed_odd, input_precision="ieee"),)
        result_even, result_odd = next_even, next_odd

    some = total_weight > 0.0
    lse = tl.where(some, (maximum + tl.log2(total_weight)) * 0.6931471805599453, float("-inf"))
    tl.store(partial_lse + target, lse, mask=valid)
    norm = (1.0 / (tl.where(some, total_weight, 1.0) * LIFT))[:, None]
    for g in tl.static_range(GROUPS):
        both = tl.reshape(tl.join(result_even[g] * norm, result_odd[g] * norm), (BLOCK_M, 128))
        tl.store(partial + target[:, None] * rank + g * 128 + tl.arange(0, 128)[None, :], both, mask=valid[:, None])
