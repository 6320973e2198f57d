"""What surrounds the grouped matmuls of the experts' training step, in Triton: sort, gather, gate, sum, and backwards.

Each kernel reads and writes its rows once; sums are in fp32 and in a fixed order, so that results are the same on every
run. The gate values are multiplied in before the down projection (a linear map: the same sum), which makes the
combination of the choices a plain sum and its gradient a plain gather.

Names in shapes: T tokens, K choices, N = T * K pairs, D hidden_size, E experts, I inner size of an expert. The pair
t * K + k is the k-th choice of token t; `order` (N,) int32 lists the pairs by expert, `back` (N,) int32 is its inverse,
`offsets` (E,) int32 holds the ends of the experts' runs. Rows from offsets[E - 1] on belong to experts of other ranks:
they are neither read nor written, and count as zero; `order` and the row-sized tensors may end there, with fewer than N
entries. All tensors are contiguous.
"""

import torch

from .fused import on_its_device

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the fast kernels need triton, which torch brings on Linux with CUDA") from missing

SORT_BLOCK = 128  # pairs that a program compares with each other
ZERO_PROGRAMS = 16  # per expert; nearly always there is nothing to do


# ---- the sort ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["pairs", "blocks"])
def _rank_pairs(index, counts, ranks, pairs, blocks, BLOCK: tl.constexpr):
    """Program b: how many earlier pairs of the block chose the same expert; counts[expert, b] by the last of each."""
    block, lane = tl.program_id(0), tl.arange(0, BLOCK)
    pair = block * BLOCK + lane
    inside = pair < pairs
    expert = tl.load(index + pair, mask=inside, other=-1).to(tl.int32)
    same = (expert[:, None] == expert[None, :]).to(tl.int32)
    earlier = tl.where(lane[None, :] < lane[:, None], same, 0)
    rank, count = tl.sum(earlier, 1), tl.sum(same, 1)
    tl.store(ranks + pair, rank, mask=inside)
    tl.store(counts + expert.to(tl.int64) * blocks + block, count, mask=inside & (rank == count - 1))


@triton.jit(do_not_specialize=["pairs", "blocks"])
def _place_pairs(
    index, ends, order, back, offsets, pairs, blocks, E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Program b: rank (in `back`) + where the block's pairs of this expert begin = the place of each pair.

    `ends` (E + 1, blocks): running sums of the counts, so the entry before one's own is where one begins.
    """
    block = tl.program_id(0)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    expert = tl.load(index + pair, mask=inside, other=0).to(tl.int32)
    slot = expert.to(tl.int64) * blocks + block
    begin = tl.load(ends + slot - 1, mask=inside & (slot > 0), other=0)
    place = begin + tl.load(back + pair, mask=inside, other=0)
    tl.store(back + pair, place, mask=inside)
    tl.store(order + place, pair, mask=inside)
    if block == 0:
        run = tl.arange(0, BLOCK_E)
        end = tl.load(ends + (run + 1).to(tl.int64) * blocks - 1, mask=run < E, other=0)
        tl.store(offsets + run, end, mask=run < E)


@on_its_device
def sort_pairs_kernels(top_k_index, num_experts):
    """See `training_experts.sort_pairs`. Two kernels and a running sum over experts x blocks between them."""
    pairs, device = top_k_index.numel(), top_k_index.device
    order, back = (torch.empty(pairs, dtype=torch.int32, device=device) for _ in range(2))
    if pairs == 0:
        return order, back, torch.zeros(num_experts, dtype=torch.int32, device=device)
    offsets = torch.empty(num_experts, dtype=torch.int32, device=device)
    top_k_index, blocks = top_k_index.contiguous(), triton.cdiv(pairs, SORT_BLOCK)
    counts = torch.zeros((num_experts + 1) * blocks, dtype=torch.int32, device=device)
    _rank_pairs[(blocks,)](top_k_index, counts, back, pairs, blocks, BLOCK=SORT_BLOCK, num_warps=8)
    ends = counts.cumsum(0, dtype=torch.int32)
    _place_pairs[(blocks,)](
        top_k_index, ends, order, back, offsets, pairs, blocks,
        E=num_experts, BLOCK=SORT_BLOCK, BLOCK_E=triton.next_power_of_2(num_experts), num_warps=4,
    )  # fmt: skip
    return order, back, offsets


# ---- moving rows ---------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens"])
def _gather_rows(
    source, back, offsets, output, tokens,
    K: tl.constexpr, D: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (r, c), ROWS tokens and BLOCK_D columns: output[back[t * K + k]] = source[t] for each choice k.

    By token and not by place, so that the source is read once and in order, whatever the second-level cache holds.
    """
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    token = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = token < tokens
    mask = inside[:, None] & (cols < D)[None, :]
    local = tl.load(offsets + E - 1)
    values = tl.load(source + token.to(tl.int64)[:, None] * D + cols[None, :], mask=mask, other=0.0)
    values = values.to(output.dtype.element_ty)
    for k in tl.static_range(K):
        place = tl.load(back + token * K + k, mask=inside, other=0)
        present = mask & (place < local)[:, None]
        tl.store(output + place.to(tl.int64)[:, None] * D + cols[None, :], values, mask=present)


@triton.jit(do_not_specialize=["tokens"])
def _sum_choices(
    rows, back, offsets, residual, shared, output, tokens,
    K: tl.constexpr, D: tl.constexpr, E: tl.constexpr, RESIDUAL: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (r, c), ROWS tokens and BLOCK_D columns: residual[t] + shared[t] + sum_k rows[back[t * K + k]]."""
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    token = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = token < tokens
    mask = inside[:, None] & (cols < D)[None, :]
    own = token.to(tl.int64)[:, None] * D + cols[None, :]
    local = tl.load(offsets + E - 1)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if RESIDUAL:
        total += tl.load(residual + own, mask=mask, other=0.0).to(tl.float32)
    if SHARED:
        total += tl.load(shared + own, mask=mask, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        place = tl.load(back + token * K + k, mask=inside, other=0)
        present = mask & (place < local)[:, None]
        pointers = rows + place.to(tl.int64)[:, None] * D + cols[None, :]
        total += tl.load(pointers, mask=present, other=0.0).to(tl.float32)
    tl.store(output + own, total, mask=mask)


def _columns(width):
    """Columns of a block: a power of two that divides the width where a large one does, so that no lane idles."""
    divisor = width & -width
    return min(divisor, 1024) if divisor >= 64 else min(128, triton.next_power_of_2(width))


@on_its_device
def gather_rows(source, back, offsets, count, dtype):
    """source (T, D) any float dtype -> (count, D) in `dtype`, where output[back[t * K + k]] = source[t].

    count: rows of the output, at least offsets[E - 1]; those from there on, other ranks', stay undefined.
    """
    tokens, width = source.shape
    output = torch.empty(count, width, dtype=dtype, device=source.device)
    block = _columns(width)
    rows = max(1, 2048 // block)
    if tokens:
        _gather_rows[(triton.cdiv(tokens, rows) * triton.cdiv(width, block),)](
            source, back, offsets, output, tokens,
            K=back.numel() // tokens, D=width, E=offsets.numel(), ROWS=rows, BLOCK_D=block, num_warps=4,
        )  # fmt: skip
    return output


@on_its_device
def sum_choices(rows, back, offsets, top_k, dtype, residual=None, shared=None):
    """rows (N, D) by expert -> residual[t] + shared[t] + sum_k rows[back[t * K + k]] (T, D) in `dtype`.

    residual and shared (T, D), each of its own dtype, or None for nothing.
    """
    tokens, width = back.numel() // top_k, rows.shape[1]
    output = torch.empty(tokens, width, dtype=dtype, device=rows.device)
    block = _columns(width)
    count = max(1, 2048 // block)
    _sum_choices[(triton.cdiv(tokens, count) * triton.cdiv(width, block),)](
        rows, back, offsets, rows if residual is None else residual, rows if shared is None else shared, output,
        tokens, K=top_k, D=width, E=offsets.numel(), RESIDUAL=residual is not None, SHARED=shared is not None,
        ROWS=count, BLOCK_D=block, num_warps=4,
    )  # fmt: skip
    return output


# ---- the gate ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["pairs"])
def _gate_rows(
    gate_up, weights, order, offsets, output, pairs,
    INNER: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Program (r, c): ROWS rows of BLOCK_I columns, output[i] = silu(gate) * up * weights[order[i]]."""
    blocks: tl.constexpr = (INNER + BLOCK_I - 1) // BLOCK_I
    place = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    valid = place < tl.minimum(tl.load(offsets + E - 1), pairs)
    mask = valid[:, None] & (cols < INNER)[None, :]
    own = place.to(tl.int64)[:, None] * INNER + cols[None, :]
    pointers = gate_up + place.to(tl.int64)[:, None] * (2 * INNER) + cols[None, :]
    gate = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(pointers + INNER, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weights + tl.load(order + place, mask=valid, other=0), mask=valid, other=0.0).to(tl.float32)
    tl.store(output + own, gate * tl.sigmoid(gate) * up * weight[:, None], mask=mask)


@triton.jit(do_not_specialize=["pairs"])
def _gate_rows_backward(
    gate_up, weights, order, offsets, grad_output, grad_gate_up, output, grad_weights, pairs,
    INNER: tl.constexpr, E: tl.constexpr, OUTPUT: tl.constexpr, OVERWRITES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Program: ROWS whole rows; both gradients, and with OUTPUT the forward's result once more.

    With OVERWRITES `grad_gate_up` may be `gate_up` and `output` may be `grad_output`: of a block all is read before any
    is written.
    """
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = place < pairs
    valid = inside & (place < tl.load(offsets + E - 1))
    pair = tl.load(order + place, mask=inside, other=0)
    weight = tl.load(weights + pair, mask=valid, other=0.0).to(tl.float32)[:, None]
    total = tl.zeros((ROWS,), tl.float32)
    for start in tl.range(0, INNER, BLOCK_I):
        cols = start + tl.arange(0, BLOCK_I)
        mask = valid[:, None] & (cols < INNER)[None, :]
        own = place.to(tl.int64)[:, None] * INNER + cols[None, :]
        halves = place.to(tl.int64)[:, None] * (2 * INNER) + cols[None, :]
        gate = tl.load(gate_up + halves, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up + halves + INNER, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_output + own, mask=mask, other=0.0).to(tl.float32)
        if OVERWRITES:
            tl.debug_barrier()  # another thread may write what this one reads
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        total += tl.sum(grad * silu * up, 1)
        scaled = grad * weight
        tl.store(grad_gate_up + halves, scaled * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), mask=mask)
        tl.store(grad_gate_up + halves + INNER, scaled * silu, mask=mask)
        if OUTPUT:
            tl.store(output + own, silu * up * weight, mask=mask)
    tl.store(grad_weights + pair, total, mask=inside)


@on_its_device
def gate_rows(gate_up, weights, order, offsets):
    """gate_up (N, 2 I) by expert, weights (T, K) any float dtype -> silu(gate) * up * weights[order] (N, I)."""
    (pairs, inner), block = (gate_up.shape[0], gate_up.shape[1] // 2), min(512, _columns(gate_up.shape[1] // 2))
    output = torch.empty(pairs, inner, dtype=gate_up.dtype, device=gate_up.device)
    rows = max(1, 2048 // block)
    _gate_rows[(triton.cdiv(pairs, rows) * triton.cdiv(inner, block),)](
        gate_up, weights, order, offsets, output, pairs,
        INNER=inner, E=offsets.numel(), ROWS=rows, BLOCK_I=block, num_warps=4,
    )  # fmt: skip
    return output


@on_its_device
def gate_rows_backward(gate_up, weights, order, offsets, grad_output, with_output=True, in_place=False):
    """Gradients of `gate_rows` for `grad_output` (N, I), which is overwritten with the forward's result.

    With `in_place` the gradient overwrites `gate_up` too, which only its owner may ask for.
    -> gradient (N, 2 I); result (N, I), None unless `with_output`; gradient (T, K) of the weights, 0 for other ranks'.
    """
    pairs, inner = grad_output.shape
    grad_gate_up = gate_up if in_place else torch.empty_like(gate_up)
    grad_weights = torch.empty_like(weights) if pairs == weights.numel() else torch.zeros_like(weights)
    block = min(4096, triton.next_power_of_2(inner))
    rows = min(32, max(1, 2048 // block))
    _gate_rows_backward[(triton.cdiv(pairs, rows),)](
        gate_up, weights, order, offsets, grad_output, grad_gate_up, grad_output, grad_weights, pairs,
        INNER=inner, E=offsets.numel(), OUTPUT=with_output, OVERWRITES=with_output or in_place, ROWS=rows,
        BLOCK_I=block, num_warps=8 if block > 2048 else 4,
    )  # fmt: skip
    return grad_gate_up, grad_output if with_output else None, grad_weights


# ---- empty experts -------------------------------------------------------------------------------------------------


@triton.jit
def _zero_empty_experts(gradient, offsets, SIZE: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    """Program (e, p): zeros for every PROGRAMS-th block of gradient[e] if expert e has no rows."""
    expert, lane = tl.program_id(0), tl.arange(0, BLOCK)
    before = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    stop = tl.where(tl.load(offsets + expert) == before, SIZE, 0)
    for start in tl.range(tl.program_id(1) * BLOCK, stop, PROGRAMS * BLOCK):
        pointers = gradient + expert.to(tl.int64) * SIZE + start + lane
        tl.store(pointers, tl.zeros((BLOCK,), tl.float32), mask=start + lane < SIZE)


@on_its_device
def zero_empty_experts(gradient, offsets):
    """Sets gradient[e] (E, M, P), contiguous, to zero where expert e has no rows, in place; reads two numbers each.

    torch's grouped matmul gives zeros there on Hopper, but not on every architecture (pytorch issue 172439).
    """
    size = gradient[0].numel()
    _zero_empty_experts[(gradient.shape[0], ZERO_PROGRAMS)](
        gradient, offsets, SIZE=size, PROGRAMS=ZERO_PROGRAMS, BLOCK=min(2048, triton.next_power_of_2(size)), num_warps=4
    )
    return gradient
