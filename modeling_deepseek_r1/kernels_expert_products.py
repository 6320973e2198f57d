"""The experts' matrix products with what surrounds them inside, in Triton, for Hopper.

SwiGLU and the gate value are applied where gate and up come out, their gradients where the gradient of the gated
product comes out, which so is never in memory. A product can gather its rows itself, too (`Tiles.gather`), and then
these are not either. A table made on the device tells which rows a tile has; nothing waits for it.

Numbers are those of `kernels_expert_rows` around torch's grouped matmul: sums in fp32 and in a fixed order, gate and up
rounded to their dtype before SwiGLU, which the backward pass reads in that dtype.

Names in shapes and what foreign rows are: see `kernels_expert_rows`.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from .fused import on_its_device
from .kernels_expert_rows import gather_rows

try:
    import triton
    import triton.language as tl
    from triton.tools.ragged_tma import create_ragged_descriptor, load_ragged
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as missing:
    raise ImportError("the experts' own products need triton 3.5 or newer, with ragged tensor descriptors") from missing


INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LINE = tl.constexpr(128)  # bytes that a prefetch brings


# ---- which rows a tile has -----------------------------------------------------------------------------------------


@triton.jit
def _row_blocks(offsets, table, by_size, capacity, E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr):
    """Program e: expert, begin and end of each block of ROWS rows of expert e, and its place among all by size.

    table (3 * capacity + 1,): experts, begins, ends of all blocks, and how many there are.
    """
    expert, every = tl.program_id(0), tl.arange(0, BLOCK_E)
    ends = tl.load(offsets + every, mask=every < E, other=0)
    begins = tl.load(offsets + every - 1, mask=(every > 0) & (every < E), other=0)
    counts = ends - begins
    blocks = (counts + ROWS - 1) // ROWS
    mine = every == expert
    begin, end = tl.sum(tl.where(mine, begins, 0), 0), tl.sum(tl.where(mine, ends, 0), 0)
    count = end - begin
    first = tl.sum(tl.where(every < expert, blocks, 0), 0)
    lane = tl.arange(0, 128)
    for block in tl.range(0, tl.cdiv(count, ROWS), 128):
        start = begin + (block + lane) * ROWS
        slot, present = table + first + block + lane, start < end
        tl.store(slot, tl.full((128,), 0, tl.int32) + expert, mask=present)
        tl.store(slot + capacity, start, mask=present)
        tl.store(slot + 2 * capacity, tl.minimum(start + ROWS, end), mask=present)
    ahead = (counts > count) | ((counts == count) & (every < expert))
    tl.store(by_size + tl.sum((ahead & (every < E)).to(tl.int32), 0), expert)
    if expert == 0:
        tl.store(table + 3 * capacity, tl.sum(blocks, 0))


# ---- parts of tiles ------------------------------------------------------------------------------------------------


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The left and the right half of a tile's columns, which the same threads hold."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
def _sigmoid(x):
    """By the units for 2^x and 1 / x alone: what rescales denormals costs as much as all the rest of SwiGLU."""
    if INTERPRETED:
        return tl.sigmoid(x)
    return tl.inline_asm_elementwise(
        "{ .reg .f32 e; ex2.approx.ftz.f32 e, $1; add.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e; }", "=f,f",
        [x * -1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _fetch_ahead(
    source, place, end, start, WIDTH: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Brings columns start to start + BLOCK of rows `place` (before `end`) into the second-level cache."""
    if not INTERPRETED:
        step: tl.constexpr = LINE * 8 // source.dtype.element_ty.primitive_bitwidth
        col = tl.minimum(start + tl.arange(0, BLOCK // step) * step, WIDTH - 1)
        row = tl.minimum(place, end - 1).to(tl.int64)
        tl.inline_asm_elementwise(
            "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l", [source + row[:, None] * STRIDE + col[None, :]],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _dot(left, right, total, EXACT: tl.constexpr):
    """EXACT: the operands in fp32, not cut off to TF32."""
    if EXACT:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    return tl.dot(left, right, total)


# ---- gate and up, with SwiGLU --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["capacity"])
def _gate_up_product(
    hidden, rows, order, weights, weight, table, gated, output, capacity,
    K: tl.constexpr, D: tl.constexpr, INNER: tl.constexpr, GATHER: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Tiles of BLOCK_M rows and BLOCK_N / 2 columns of gate and the same of up: both go to `gated`, and
    silu(gate) * up * weight to `output`."""
    half: tl.constexpr = BLOCK_N // 2
    columns: tl.constexpr = (INNER + half - 1) // half
    dtype: tl.constexpr = gated.dtype.element_ty
    lane, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    tiles = tl.load(table + 3 * capacity) * columns
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=FLATTEN):
        block, start = tile // columns, tile % columns * half
        expert, begin = tl.load(table + block), tl.load(table + capacity + block)
        place, end = begin + lane, tl.load(table + 2 * capacity + block)
        valid = place < end
        pair = tl.load(order + place, mask=valid, other=0)
        factor = tl.load(weights + pair, mask=valid, other=0.0).to(tl.float32)  # early: it is there when it is needed
        if GATHER:
            source = hidden + (pair // K).to(tl.int64)[:, None] * D + depth[None, :]
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, D, BLOCK_K):
            if GATHER:
                left = tl.load(source + k) if D % BLOCK_K == 0 else tl.load(
                    source + k, mask=(depth < D - k)[None, :], other=0.0)  # fmt: skip
            else:
                left = rows.load([begin, k])
            right = tl.reshape(weight.load([expert, 0, start, k]), (BLOCK_N, BLOCK_K))
            total = _dot(left, right.T, total, EXACT)
        gate, up = _halves(total.to(dtype), BLOCK_M, BLOCK_N)
        cols = start + tl.arange(0, half)
        mask = valid[:, None] & (cols < INNER)[None, :]
        own = place.to(tl.int64)[:, None]
        tl.store(gated + own * (2 * INNER) + cols[None, :], gate, mask=mask)
        tl.store(gated + own * (2 * INNER) + INNER + cols[None, :], up, mask=mask)
        gate, up = gate.to(tl.float32), up.to(tl.float32)
        tl.store(output + own * INNER + cols[None, :], gate * _sigmoid(gate) * up * factor[:, None], mask=mask)


# ---- a plain product -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["capacity"])
def _rows_product(
    rows, weight, table, output, capacity,
    A: tl.constexpr, B: tl.constexpr, TRANSPOSED: tl.constexpr, EXACT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """output[i] = rows[i] (A) @ weight[expert of i], which is (A, B), or with TRANSPOSED (B, A)."""
    columns: tl.constexpr = (B + BLOCK_N - 1) // BLOCK_N
    lane = tl.arange(0, BLOCK_M)
    tiles = tl.load(table + 3 * capacity) * columns
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=FLATTEN):
        block, start = tile // columns, tile % columns * BLOCK_N
        expert, begin = tl.load(table + block), tl.load(table + capacity + block)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, A, BLOCK_K):
            left = rows.load([begin, k])
            if TRANSPOSED:
                right = tl.reshape(weight.load([expert, start, k]), (BLOCK_N, BLOCK_K)).T
            else:
                right = tl.reshape(weight.load([expert, k, start]), (BLOCK_K, BLOCK_N))
            total = _dot(left, right, total, EXACT)
        place, cols = begin + lane, start + tl.arange(0, BLOCK_N)
        mask = (place < tl.load(table + 2 * capacity + block))[:, None] & (cols < B)[None, :]
        tl.store(output + place.to(tl.int64)[:, None] * B + cols[None, :], total.to(output.dtype.element_ty), mask=mask)


# ---- the gradient of gate and up -----------------------------------------------------------------------------------


@triton.jit
def _swiglu_gradient(
    grad, gated, weight, result, own, cols, valid, total, INNER: tl.constexpr
):  # fmt: skip
    """For columns `cols` of the inner gradient: writes those of gate and up, -> `total` + what goes to the weights."""
    mask = valid[:, None] & (cols < INNER)[None, :]
    places = own * (2 * INNER) + cols[None, :]
    gate = tl.load(gated + places, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gated + places + INNER, mask=mask, other=0.0).to(tl.float32)
    grad = grad.to(result.dtype.element_ty).to(tl.float32)
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    total += tl.sum(tl.where(mask, grad * silu * up, 0.0), 1)
    scaled = grad * weight[:, None]
    tl.store(result + places, scaled * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), mask=mask)
    tl.store(result + places + INNER, scaled * silu, mask=mask)
    return total


@triton.jit(do_not_specialize=["capacity"])
def _inner_gradient(
    grad, rows, order, weights, weight, table, gated, result, parts, capacity,
    K: tl.constexpr, D: tl.constexpr, INNER: tl.constexpr, GATHER: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Tiles of the gradient of the gated product, from which those of gate and up (`result`) are made at once, and
    parts[i, column], the tile's part of the gradient of row i's gate value."""
    columns: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    lane, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    tiles = tl.load(table + 3 * capacity) * columns
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=FLATTEN):
        block, start = tile // columns, tile % columns * BLOCK_N
        expert, begin = tl.load(table + block), tl.load(table + capacity + block)
        place, end = begin + lane, tl.load(table + 2 * capacity + block)
        valid = place < end
        pair = tl.load(order + place, mask=valid, other=0)
        factor = tl.load(weights + pair, mask=valid, other=0.0).to(tl.float32)  # early: it is there when it is needed
        if GATHER:
            source = grad + (pair // K).to(tl.int64)[:, None] * D + depth[None, :]
        _fetch_ahead(gated, place, end, start, INNER, 2 * INNER, BLOCK_N)
        _fetch_ahead(gated + INNER, place, end, start, INNER, 2 * INNER, BLOCK_N)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, D, BLOCK_K):
            if GATHER:
                left = tl.load(source + k) if D % BLOCK_K == 0 else tl.load(
                    source + k, mask=(depth < D - k)[None, :], other=0.0)  # fmt: skip
            else:
                left = rows.load([begin, k])
            total = _dot(left, tl.reshape(weight.load([expert, k, start]), (BLOCK_K, BLOCK_N)), total, EXACT)
        own, part = place.to(tl.int64)[:, None], tl.zeros((BLOCK_M,), tl.float32)
        quarter: tl.constexpr = BLOCK_N // 4
        cols = start + tl.arange(0, quarter)
        left, right = _halves(total, BLOCK_M, BLOCK_N)
        first, second = _halves(left, BLOCK_M, BLOCK_N // 2)
        part = _swiglu_gradient(first, gated, factor, result, own, cols, valid, part, INNER)
        part = _swiglu_gradient(second, gated, factor, result, own, cols + quarter, valid, part, INNER)
        first, second = _halves(right, BLOCK_M, BLOCK_N // 2)
        part = _swiglu_gradient(first, gated, factor, result, own, cols + 2 * quarter, valid, part, INNER)
        part = _swiglu_gradient(second, gated, factor, result, own, cols + 3 * quarter, valid, part, INNER)
        tl.store(parts + place.to(tl.int64) * columns + start // BLOCK_N, part, mask=valid)


@triton.jit(do_not_specialize=["pairs"])
def _sum_parts(parts, order, offsets, grad_weights, pairs, E: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """grad_weights[order[i]] = the sum of parts[i], 0 for other ranks' rows."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < pairs
    valid = inside & (place < tl.load(offsets + E - 1))
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + place.to(tl.int64) * PARTS + part, mask=valid, other=0.0)
    tl.store(grad_weights + tl.load(order + place, mask=inside, other=0), total, mask=inside)


# ---- gradients of the weights --------------------------------------------------------------------------------------


@triton.jit
def _run_rows(
    source, ragged, token, begin, count, start, first, WIDTH: tl.constexpr, GATHER: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of BLOCK_K rows from `start` on of an expert's run, zeros past its end. `token`: -1 there."""
    if GATHER:
        col, mask = first + tl.arange(0, BLOCK), (token >= 0)[:, None]
        mask = mask if WIDTH % BLOCK == 0 else mask & (col < WIDTH)[None, :]
        return tl.load(source + token[:, None] * WIDTH + col[None, :], mask=mask, other=0.0)
    return load_ragged(ragged, begin, count, [start, first])


@triton.jit
def _experts_gradient(
    left, left_runs, right, right_runs, order, offsets, by_size, gradient,
    K: tl.constexpr, A: tl.constexpr, B: tl.constexpr, GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr,
    EXACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """gradient[e] (A, B) = left^T right over the rows of expert e, a tile a program, large experts first; what is
    gathered has a row a token and not a row a pair."""
    across: tl.constexpr = (B + BLOCK_N - 1) // BLOCK_N
    tiles: tl.constexpr = (A + BLOCK_M - 1) // BLOCK_M * across
    expert, tile = tl.load(by_size + tl.program_id(0) // tiles), tl.program_id(0) % tiles
    begin = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    count = tl.load(offsets + expert) - begin
    down, along = tile // across * BLOCK_M, tile % across * BLOCK_N
    lane, total = tl.arange(0, BLOCK_K), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, count, BLOCK_K):
        token = tl.full((BLOCK_K,), -1, tl.int64)
        if GATHER_LEFT or GATHER_RIGHT:
            inside = start + lane < count
            token = tl.load(order + begin + start + lane, mask=inside, other=-K).to(tl.int32) // K
            token = tl.where(inside, token, -1).to(tl.int64)
        left_tile = _run_rows(left, left_runs, token, begin, count, start, down, A, GATHER_LEFT, BLOCK_M, BLOCK_K)
        right_tile = _run_rows(right, right_runs, token, begin, count, start, along, B, GATHER_RIGHT, BLOCK_N, BLOCK_K)
        total = _dot(left_tile.T, right_tile, total, EXACT)
    row, col = down + tl.arange(0, BLOCK_M), along + tl.arange(0, BLOCK_N)
    own = gradient + expert.to(tl.int64) * (A * B) + row[:, None] * B + col[None, :]
    tl.store(own, total.to(gradient.dtype.element_ty), mask=(row < A)[:, None] & (col < B)[None, :])


# ---- launches ------------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """How a product is cut. rows: the same in all but the weights' gradients, which share a table; gather: whether the
    kernel gathers its rows itself; flatten: whether a tile's first loads begin before the last one is written."""

    rows: int = 128
    columns: int = 256
    depth: int = 64
    warps: int = 8
    stages: int = 4
    flatten: bool = True
    gather: bool = True
    programs_per_sm: int = 1


# Of 36 on an H100 at the reference config those of the quickest whole. Gathering inside costs more than it spares.
TILES = {
    "gate_up": Tiles(columns=128, warps=4, stages=3, flatten=False, gather=False, programs_per_sm=2),
    "down": Tiles(), "inner_gradient": Tiles(gather=False), "rows_gradient": Tiles(),
    "gate_up_gradient": Tiles(gather=False), "down_gradient": Tiles(gather=False),
}  # fmt: skip


@lru_cache(maxsize=None)
def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _cut(tiles, device):
    """The launch arguments that a persistent product takes from its tiles."""
    programs = tiles.programs_per_sm * _multiprocessors(device)
    return programs, dict(
        BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=tiles.depth, PROGRAMS=programs, FLATTEN=tiles.flatten,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def _described(tensor, *block):
    return TensorDescriptor.from_tensor(tensor, list(block))


def _exact(tensor):
    """Also in Triton's interpreter, which takes bf16 operands of a dot for integers."""
    return tensor.dtype == torch.float32 or bool(triton.knobs.runtime.interpret)


class Schedule(NamedTuple):
    """Of one routing: the blocks of rows (see `_row_blocks`), and the experts by size, largest first."""

    table: torch.Tensor
    by_size: torch.Tensor

    @property
    def capacity(self):
        return self.table.numel() // 3


@on_its_device
def schedule(offsets, pairs):
    """offsets (E,) -> Schedule of `pairs` rows in blocks of TILES["gate_up"].rows."""
    experts, rows = offsets.numel(), TILES["gate_up"].rows
    capacity = triton.cdiv(pairs, rows) + experts
    table, by_size = (offsets.new_empty(size) for size in (3 * capacity + 1, experts))
    _row_blocks[(experts,)](
        offsets, table, by_size, capacity, E=experts, BLOCK_E=triton.next_power_of_2(experts), ROWS=rows, num_warps=4
    )
    return Schedule(table, by_size)


def _rows_for(tiles, source, back, offsets, pairs):
    """The gathered rows where the kernel does not gather itself, else None."""
    return None if tiles.gather else gather_rows(source, back, offsets, pairs, source.dtype)


@on_its_device
def gate_up_product(hidden, weights, order, back, offsets, plan, gate_up):
    """hidden (T, D), weights (T, K) any float dtype, gate_up (E, 2 I, D) of hidden's dtype -> gate and up (N, 2 I),
    silu(gate) * up * weight (N, I), and the gathered rows (N, D) if they were made."""
    tiles, (experts, twice, width), pairs = TILES["gate_up"], gate_up.shape, order.numel()
    inner, rows = twice // 2, _rows_for(tiles, hidden, back, offsets, pairs)
    gated, output = hidden.new_empty(pairs, twice), hidden.new_empty(pairs, inner)
    programs, cut = _cut(tiles, hidden.device)
    halves = _described(gate_up.view(experts, 2, inner, width), 1, 2, tiles.columns // 2, tiles.depth)
    _gate_up_product[(programs,)](
        hidden, _described(hidden if rows is None else rows, tiles.rows, tiles.depth), order, weights, halves,
        plan.table, gated, output, plan.capacity,
        K=weights.shape[1], D=width, INNER=inner, GATHER=rows is None, EXACT=_exact(hidden), **cut,
    )  # fmt: skip
    return gated, output, rows


@on_its_device
def rows_product(rows, weight, plan, transposed, name):
    """rows (N, A) by expert, weight (E, A, B), or (E, B, A) if `transposed` -> (N, B), undefined for foreign rows.
    `name`: of its tiles."""
    tiles, inside, outside = TILES[name], rows.shape[1], weight.shape[1 if transposed else 2]
    output = rows.new_empty(rows.shape[0], outside)
    programs, cut = _cut(tiles, rows.device)
    block = (tiles.columns, tiles.depth) if transposed else (tiles.depth, tiles.columns)
    _rows_product[(programs,)](
        _described(rows, tiles.rows, tiles.depth), _described(weight, 1, *block), plan.table, output, plan.capacity,
        A=inside, B=outside, TRANSPOSED=transposed, EXACT=_exact(rows), **cut,
    )  # fmt: skip
    return output


@on_its_device
def inner_gradient(grad, weights, order, back, offsets, plan, down, gated):
    """grad (T, D) of the sums, down (E, D, I), gated (N, 2 I) -> gradients (N, 2 I) of gate and up and (T, K) of the
    gate values, and the gathered rows of grad (N, D) if they were made."""
    tiles, (experts, width, inner), pairs = TILES["inner_gradient"], down.shape, order.numel()
    rows, result = _rows_for(tiles, grad, back, offsets, pairs), torch.empty_like(gated)
    columns = triton.cdiv(inner, tiles.columns)
    parts = torch.empty(pairs, columns, dtype=torch.float32, device=grad.device)
    programs, cut = _cut(tiles, grad.device)
    _inner_gradient[(programs,)](
        grad, _described(grad if rows is None else rows, tiles.rows, tiles.depth), order, weights,
        _described(down, 1, tiles.depth, tiles.columns), plan.table, gated, result, parts, plan.capacity,
        K=weights.shape[1], D=width, INNER=inner, GATHER=rows is None, EXACT=_exact(grad), **cut,
    )  # fmt: skip
    grad_weights = torch.empty_like(weights) if pairs == weights.numel() else torch.zeros_like(weights)
    _sum_parts[(triton.cdiv(pairs, 512),)](
        parts, order, offsets, grad_weights, pairs, E=experts, PARTS=columns, BLOCK=512, num_warps=4
    )
    return result, grad_weights, rows


class Tokens(NamedTuple):
    """Rows by token (T, width), which a product is to gather by expert."""

    rows: torch.Tensor


@on_its_device
def weight_gradient(offsets, order, plan, top_k, left, right, name):
    """left^T right over the rows of each expert, (E, A, B), zeros for an empty expert. left (N, A) and right (N, B) by
    expert, or `Tokens`. `name`: of its tiles."""
    tiles, gathered = TILES[name], [isinstance(side, Tokens) for side in (left, right)]
    left, right = (side.rows if gather else side for side, gather in zip((left, right), gathered))
    down, across, experts = left.shape[1], right.shape[1], offsets.numel()
    gradient = left.new_empty(experts, down, across)
    runs = [create_ragged_descriptor(side, [tiles.depth, block])
            for side, block in ((left, tiles.rows), (right, tiles.columns))]  # fmt: skip
    _experts_gradient[(experts * triton.cdiv(down, tiles.rows) * triton.cdiv(across, tiles.columns),)](
        left, runs[0], right, runs[1], order, offsets, plan.by_size, gradient,
        K=top_k, A=down, B=across, GATHER_LEFT=gathered[0], GATHER_RIGHT=gathered[1], EXACT=_exact(left),
        BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=tiles.depth, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return gradient
