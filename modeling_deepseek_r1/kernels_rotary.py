"""Queries and keys of latent attention put together for training, forward and backward, in Triton.

One program a token: it turns the rotary channels of every query head, writes the one rotary key behind every head's
part of the expanded latent, and in the backward adds the heads' gradients of that key in fixed order. Nothing else is
copied. `training_blocks` makes a differentiable function of it and holds the torch twin.

Names in shapes: B batch, S sequence, H heads, N nope width, R rope width, V value width, W = N + R.
"""

import torch

from .kernels_norms import rows_of

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the fused training kernels need triton, which torch brings on Linux with CUDA") from missing


@triton.jit
def _load_pairs(
    base, inside, ROPE: tl.constexpr, INTERLEAVE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The first and the second channels of the pairs of each row, (ROWS, BLOCK) fp32; base, inside: (ROWS, 1)."""
    half: tl.constexpr = ROPE // 2
    if INTERLEAVE:
        col = tl.arange(0, 2 * BLOCK)[None, :]
        both = tl.load(base + col, mask=inside & (col < ROPE), other=0.0)  # one wide access, then parted in registers
        first, second = tl.split(tl.reshape(both, (ROWS, BLOCK, 2)))
    else:
        col = tl.arange(0, BLOCK)[None, :]
        first = tl.load(base + col, mask=inside & (col < half), other=0.0)
        second = tl.load(base + half + col, mask=inside & (col < half), other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store_pairs(
    base, inside, first, second,
    ROPE: tl.constexpr, INTERLEAVE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What `_load_pairs` reads, written."""
    half: tl.constexpr = ROPE // 2
    if INTERLEAVE:
        col = tl.arange(0, 2 * BLOCK)[None, :]
        both = tl.reshape(tl.join(first, second), (ROWS, 2 * BLOCK))
        tl.store(base + col, both.to(base.dtype.element_ty), mask=inside & (col < ROPE))
    else:
        col = tl.arange(0, BLOCK)[None, :]
        tl.store(base + col, first.to(base.dtype.element_ty), mask=inside & (col < half))
        tl.store(base + half + col, second.to(base.dtype.element_ty), mask=inside & (col < half))


@triton.jit(do_not_specialize=["seq"])
def _assemble_kernel(
    q, kv, key_rope, cos, sin, queries, keys, q_stride, kv_stride, rope_stride, angle_stride, seq,
    H: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr, INTERLEAVE: tl.constexpr,
    INPLACE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = ROPE // 2
    width: tl.constexpr = NOPE + ROPE
    program = tl.program_id(0)
    token = program.to(tl.int64)
    lane, col, heads = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)[None, :], tl.arange(0, BLOCK_H)[:, None]
    angle = (program // seq).to(tl.int64) * angle_stride + program % seq * half + lane
    c = tl.load(cos + angle, mask=lane < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + angle, mask=lane < half, other=0.0).to(tl.float32)[None, :]
    # The same row for every head of a block: a broadcast read, already laid out like the heads it is written to.
    base = key_rope + token * rope_stride + heads * 0
    first, second = _load_pairs(base, heads < H, ROPE, INTERLEAVE, BLOCK_H, BLOCK_R)
    key_first, key_second = first * c - second * s, second * c + first * s
    for start in range(0, H, BLOCK_H):
        head = start + heads
        mask = (head < H) & (col < NOPE)
        key = keys + token * (H * width) + head * width
        nope = tl.load(kv + token * kv_stride + head * (NOPE + V) + col, mask=mask, other=0.0)
        tl.store(key + col, nope.to(keys.dtype.element_ty), mask=mask)
        _store_pairs(key + NOPE, head < H, key_first, key_second, ROPE, False, BLOCK_H, BLOCK_R)
        source = q + token * q_stride + head * width
        query = queries + token * (H * width) + head * width
        q_first, q_second = _load_pairs(source + NOPE, head < H, ROPE, INTERLEAVE, BLOCK_H, BLOCK_R)
        if INPLACE:
            tl.debug_barrier()  # a pair's new places are other threads' old ones: all have read before any writes
        else:
            nope = tl.load(source + col, mask=mask, other=0.0)
            tl.store(query + col, nope, mask=mask)
        turned_first, turned_second = q_first * c - q_second * s, q_second * c + q_first * s
        _store_pairs(query + NOPE, head < H, turned_first, turned_second, ROPE, False, BLOCK_H, BLOCK_R)


@triton.jit(do_not_specialize=["seq"])
def _assemble_backward_kernel(
    grad_queries, grad_keys, grad_values, cos, sin, grad_q, grad_kv, grad_rope, angle_stride, seq,
    query_b, query_h, query_s, key_b, key_h, key_s, value_b, value_h, value_s,
    H: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr, INTERLEAVE: tl.constexpr,
    NEEDS_Q: tl.constexpr, NEEDS_KV: tl.constexpr, NEEDS_ROPE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = ROPE // 2
    width: tl.constexpr = NOPE + ROPE
    program = tl.program_id(0)
    token = program.to(tl.int64)
    batch, place = (program // seq).to(tl.int64), (program % seq).to(tl.int64)
    lane, col, heads = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)[None, :], tl.arange(0, BLOCK_H)[:, None]
    angle = batch * angle_stride + place * half + lane
    c = tl.load(cos + angle, mask=lane < half, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=lane < half, other=0.0).to(tl.float32)
    sum_first, sum_second = tl.zeros((BLOCK_H, BLOCK_R), tl.float32), tl.zeros((BLOCK_H, BLOCK_R), tl.float32)
    for start in range(0, H, BLOCK_H):
        head = (start + heads).to(tl.int64)
        mask = (head < H) & (col < NOPE)
        key = grad_keys + batch * key_b + place * key_s + head * key_h
        if NEEDS_Q:
            query = grad_queries + batch * query_b + place * query_s + head * query_h
            target = grad_q + token * (H * width) + head * width
            nope = tl.load(query + col, mask=mask, other=0.0)
            first, second = _load_pairs(query + NOPE, head < H, ROPE, False, BLOCK_H, BLOCK_R)
            tl.store(target + col, nope.to(grad_q.dtype.element_ty), mask=mask)
            turned_first = first * c[None, :] + second * s[None, :]
            turned_second = second * c[None, :] - first * s[None, :]
            _store_pairs(target + NOPE, head < H, turned_first, turned_second, ROPE, INTERLEAVE, BLOCK_H, BLOCK_R)
        if NEEDS_KV:
            value_col = tl.arange(0, BLOCK_V)[None, :]
            value_mask = (head < H) & (value_col < V)
            value = grad_values + batch * value_b + place * value_s + head * value_h
            target = grad_kv + token * (H * (NOPE + V)) + head * (NOPE + V)
            key_nope = tl.load(key + col, mask=mask, other=0.0)
            values = tl.load(value + value_col, mask=value_mask, other=0.0)
            tl.store(target + col, key_nope.to(grad_kv.dtype.element_ty), mask=mask)
            tl.store(target + NOPE + value_col, values.to(grad_kv.dtype.element_ty), mask=value_mask)
        if NEEDS_ROPE:
            key_first, key_second = _load_pairs(key + NOPE, head < H, ROPE, False, BLOCK_H, BLOCK_R)
            sum_first += key_first
            sum_second += key_second
    if NEEDS_ROPE:
        total_first, total_second = tl.sum(sum_first, 0), tl.sum(sum_second, 0)
        turned_first, turned_second = total_first * c + total_second * s, total_second * c - total_first * s
        step: tl.constexpr = 2 if INTERLEAVE else 1
        apart: tl.constexpr = 1 if INTERLEAVE else half
        target = grad_rope + token * ROPE + lane * step
        tl.store(target, turned_first.to(grad_rope.dtype.element_ty), mask=lane < half)
        tl.store(target + apart, turned_second.to(grad_rope.dtype.element_ty), mask=lane < half)


def _blocks(heads, nope, rope, value):
    """About 2,048 elements of a tensor at a time, 16 in a thread."""
    block_n, block_v = triton.next_power_of_2(nope), triton.next_power_of_2(value)
    block_h = min(triton.next_power_of_2(heads), max(1, 2048 // max(block_n, block_v)))
    warps = max(1, min(4, block_h * block_n // 512))
    return {"BLOCK_H": block_h, "BLOCK_N": block_n, "BLOCK_R": triton.next_power_of_2(rope // 2), "num_warps": warps}


def _angles(cos, sin):
    """cos, sin (B or 1, S, R / 2) as the kernels read them, and the elements from one sequence's to the next's."""
    return cos.contiguous(), sin.contiguous(), 0 if cos.shape[0] == 1 else cos.shape[1] * cos.shape[2]


def by_head(batch, heads, seq, width, like):
    """(B, H, S, W) uninitialised, in memory (B, S, H, W): what the projections produce and attention kernels take."""
    strides = (seq * heads * width, width, heads * width, 1)
    return torch.empty_strided((batch, heads, seq, width), strides, dtype=like.dtype, device=like.device)


def assemble(q, kv, key_rope, cos, sin, nope, rope, value, interleave, inplace=False):
    """Queries and keys with their rotary parts turned.

    Shapes: q (B, S, H * W), kv (B, S, H * (N + V)), key_rope (B, S, R), cos and sin (B or 1, S, R / 2) -> queries (q
    itself if `inplace`, then contiguous) and keys, both (B, H, S, W) in memory (B, S, H, W).
    """
    batch, seq, heads = q.shape[0], q.shape[1], q.shape[-1] // (nope + rope)
    keys = by_head(batch, heads, seq, nope + rope, kv)
    queries = q if inplace else by_head(batch, heads, seq, nope + rope, q)
    if keys.numel():
        rows, expanded, rotary = rows_of(q), rows_of(kv), rows_of(key_rope)
        cos, sin, angle_stride = _angles(cos, sin)
        with torch.cuda.device_of(q):
            _assemble_kernel[(batch * seq,)](
                rows, expanded, rotary, cos, sin, queries, keys, rows.stride(0), expanded.stride(0), rotary.stride(0),
                angle_stride, seq, H=heads, NOPE=nope, ROPE=rope, V=value, INTERLEAVE=bool(interleave),
                INPLACE=bool(inplace), **_blocks(heads, nope, rope, value),
            )  # fmt: skip
    return queries, keys


def assemble_backward(
    grad_queries, grad_keys, grad_values, cos, sin, interleave, q_dtype=None, kv_dtype=None, rope_dtype=None
):
    """The gradients of `assemble`'s first three inputs and of the values kept inside `kv`, each only if its dtype is
    given.

    Shapes: grad_queries, grad_keys (B, H, S, W), grad_values (B, H, S, V), of any strides -> (B, S, H * W),
    (B, S, H * (N + V)), (B, S, R), or None.
    """
    (batch, heads, seq, width), value, rope = grad_keys.shape, grad_values.shape[-1], 2 * cos.shape[-1]
    nope = width - rope
    widths = (heads * width, heads * (nope + value), rope)
    outputs = [
        None if dtype is None else torch.empty(batch, seq, size, dtype=dtype, device=grad_keys.device)
        for size, dtype in zip(widths, (q_dtype, kv_dtype, rope_dtype))
    ]
    if grad_keys.numel():
        grads = [g if g.stride(-1) == 1 else g.contiguous() for g in (grad_queries, grad_keys, grad_values)]
        cos, sin, angle_stride = _angles(cos, sin)
        targets = (grads[1] if output is None else output for output in outputs)
        with torch.cuda.device_of(grad_keys):
            _assemble_backward_kernel[(batch * seq,)](
                *grads, cos, sin, *targets, angle_stride, seq, *(step for g in grads for step in g.stride()[:3]),
                H=heads, NOPE=nope, ROPE=rope, V=value, INTERLEAVE=bool(interleave), NEEDS_Q=q_dtype is not None,
                NEEDS_KV=kv_dtype is not None, NEEDS_ROPE=rope_dtype is not None,
                BLOCK_V=triton.next_power_of_2(value), **_blocks(heads, nope, rope, value),
            )  # fmt: skip
    return outputs
