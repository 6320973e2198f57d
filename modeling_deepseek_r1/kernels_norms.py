"""RMSNorm, the residual sum in front of it, and SwiGLU for training, forward and backward, in Triton.

All of these are bound by memory: every tensor is read once and written once, arithmetic is in fp32. The launchers below
take and fill tensors; `training_blocks` makes differentiable functions of them and holds their torch twins.

Names in shapes: T rows (tokens), D width of a row, I inner width of a gated MLP.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the fused training kernels need triton, which torch brings on Linux with CUDA") from missing

MULTIPROCESSORS = 132  # of an H100; a choice of grids, not of the machine: a sum's order must not depend on the card
FORWARD_TILE, BACKWARD_TILE = 4096, 2048  # elements of a program: 32 or 16 of each tensor in a thread
SUM_PARTS, SUM_COLUMNS = 256, 16  # of a program that adds up parts of a weight's gradient: 64 bytes of a row
BACKWARD_STAGES = 1  # 2: the next tile is on its way, through shared memory, while this one is summed


def rows_of(x):
    """(..., D) -> (T, D) with adjacent elements in a row; a copy only where no single row stride describes x."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _tile(width, elements):
    """Rows of a program, its columns (a power of two) and warps, 32 lanes to 1,024 elements or fewer."""
    block = triton.next_power_of_2(width)
    rows = max(1, elements // block)
    return rows, block, max(1, min(16, rows * block * 4 // elements))


# ---- norms ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(
    x, delta, weight, total, output, rstd, rows, x_stride, delta_stride, eps,
    D: tl.constexpr, DELTA: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    col = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (col < D)[None, :]
    value = tl.load(x + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    gain = tl.load(weight + col, mask=col < D, other=0.0).to(tl.float32)
    if DELTA:
        value += tl.load(delta + row[:, None] * delta_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row[:, None] * D + col[None, :], rounded, mask=mask)
        value = rounded.to(tl.float32)  # the norm sees what the residual stream keeps
    scale = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
    tl.store(rstd + row, scale, mask=row < rows)
    normed = value * scale[:, None] * gain[None, :]
    tl.store(output + row[:, None] * D + col[None, :], normed.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_backward_kernel(
    grad, x, weight, rstd, grad_total, grad_x, grad_delta, partial, rows, grad_stride, x_stride, total_stride,
    grad_x_stride, D: tl.constexpr, TOTAL: tl.constexpr, X: tl.constexpr, DELTA: tl.constexpr, WEIGHT: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program p takes tiles p, p + P, p + 2 P ... of R rows and leaves its part of the weight's gradient in row p."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    col = tl.arange(0, BLOCK)
    gain = tl.load(weight + col, mask=col < D, other=0.0).to(tl.float32)[None, :]
    weight_sum = tl.zeros((R, BLOCK), tl.float32)
    for start in tl.range(program * R, rows, programs * R, num_stages=STAGES):
        row = start + tl.arange(0, R)
        inside = row < rows
        mask = inside[:, None] & (col < D)[None, :]
        row = row.to(tl.int64)
        value = tl.load(x + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        outer = tl.load(grad + row[:, None] * grad_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row, mask=inside, other=0.0)[:, None]
        value *= scale
        if WEIGHT:
            weight_sum += outer * value
        if X:
            outer *= gain
            inner = (outer - value * (tl.sum(outer * value, 1) / D)[:, None]) * scale
            if TOTAL:
                place = grad_total + row[:, None] * total_stride + col[None, :]
                inner += tl.load(place, mask=mask, other=0.0).to(tl.float32)
            place = row[:, None] * grad_x_stride + col[None, :]
            tl.store(grad_x + place, inner.to(grad_x.dtype.element_ty), mask=mask)
            if DELTA:
                place = row[:, None] * D + col[None, :]
                tl.store(grad_delta + place, inner.to(grad_delta.dtype.element_ty), mask=mask)
    if WEIGHT:
        tl.store(partial + program.to(tl.int64) * D + col, tl.sum(weight_sum, 0), mask=col < D)


@triton.jit(do_not_specialize=["parts"])
def _sum_parts_kernel(partial, total, parts, D: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Program p: BLOCK columns of `partial` (parts, D), PARTS rows at a time, summed in fp32 and rounded once."""
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((PARTS, BLOCK), tl.float32)
    for start in tl.range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & (col < D)[None, :]
        sums += tl.load(partial + part.to(tl.int64)[:, None] * D + col[None, :], mask=mask, other=0.0)
    tl.store(total + col, tl.sum(sums, 0).to(total.dtype.element_ty), mask=col < D)


def rms_norm_forward(x, weight, eps, out_dtype, delta=None):
    """Normalises x, or x + delta rounded to x's dtype.

    Shapes: x, delta (..., D), weight (D,) -> output (..., D) of `out_dtype`, rstd (T,) float32, and the sum (..., D)
    of x's dtype (x itself without `delta`).
    """
    rows, width = rows_of(x), x.shape[-1]
    addend = rows if delta is None else rows_of(delta)
    output = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    total = x if delta is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    if rows.shape[0]:
        tile, block, warps = _tile(width, FORWARD_TILE)
        with torch.cuda.device_of(x):
            _rms_norm_kernel[(triton.cdiv(rows.shape[0], tile),)](
                rows, addend, weight.contiguous(), total, output, rstd, rows.shape[0], rows.stride(0),
                addend.stride(0), eps, D=width, DELTA=delta is not None, R=tile, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return output, rstd, total


def rms_norm_backward(
    grad, x, weight, rstd, grad_total=None, delta_dtype=None, needs_x=True, needs_weight=True, grad_x=None
):
    """Gradients of `rms_norm_forward`, with x the tensor that was normalised.

    A program adds up the weight's gradient over its rows; how many there are follows from the shape alone, so that the
    sum has one order. `grad_total`: the gradient that reaches the sum itself, added to the norm's. `grad_x`: where to
    write the gradient of x, (T, D), its rows may be strided.

    Shapes: grad, x, grad_total (..., D), rstd (T,) -> gradients of x (..., D), of delta (the same tensor, or one of
    `delta_dtype`) and of weight (D,); None for what is not needed.
    """
    rows, grads, width = rows_of(x), rows_of(grad), x.shape[-1]
    totals = grads if grad_total is None else rows_of(grad_total)
    if needs_x and grad_x is None:
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    other = needs_x and delta_dtype not in (None, x.dtype)
    grad_delta = torch.empty(x.shape, dtype=delta_dtype, device=x.device) if other else grad_x
    tile, block, warps = _tile(width, BACKWARD_TILE)
    programs = min(MULTIPROCESSORS * max(1, min(4, 8192 // block)), triton.cdiv(rows.shape[0], tile))
    partial = torch.empty(programs if needs_weight else 0, width, dtype=torch.float32, device=x.device)
    if programs:
        with torch.cuda.device_of(x):
            _rms_norm_backward_kernel[(programs,)](
                grads, rows, weight.contiguous(), rstd, totals, grad_x if needs_x else rstd,
                grad_delta if needs_x else rstd, partial, rows.shape[0], grads.stride(0), rows.stride(0),
                totals.stride(0), rows_of(grad_x).stride(0) if needs_x else width, D=width,
                TOTAL=grad_total is not None, X=needs_x, DELTA=other, WEIGHT=needs_weight, R=tile, BLOCK=block,
                STAGES=BACKWARD_STAGES, num_warps=warps,
            )  # fmt: skip
    return grad_x, grad_delta, _sum_of_parts(partial, weight) if needs_weight else None


def _sum_of_parts(partial, weight):
    """The sum of the rows of `partial` (P, D) in weight's dtype, in an order that follows from the shape."""
    parts, width = partial.shape
    total = torch.empty(width, dtype=weight.dtype, device=weight.device)
    with torch.cuda.device_of(weight):
        _sum_parts_kernel[(triton.cdiv(width, SUM_COLUMNS),)](
            partial, total, parts, D=width, PARTS=SUM_PARTS, BLOCK=SUM_COLUMNS, num_warps=8
        )
    return total


# ---- SwiGLU --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def _swiglu_kernel(
    gate, up, output, rows, gate_stride, up_stride,
    INNER: tl.constexpr, COLUMN_BLOCKS: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    row = (block // COLUMN_BLOCKS).to(tl.int64) * R + tl.arange(0, R)
    col = block % COLUMN_BLOCKS * BLOCK + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (col < INNER)[None, :]
    left = tl.load(gate + row[:, None] * gate_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    right = tl.load(up + row[:, None] * up_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    product = left * tl.sigmoid(left) * right
    tl.store(output + row[:, None] * INNER + col[None, :], product.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _swiglu_backward_kernel(
    grad, gate, up, grad_gate, grad_up, output, rows, grad_stride, gate_stride, up_stride, grad_gate_stride,
    grad_up_stride, output_stride, GATE: tl.constexpr, UP: tl.constexpr, OUTPUT: tl.constexpr,
    INNER: tl.constexpr, COLUMN_BLOCKS: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    row = ((block // COLUMN_BLOCKS).to(tl.int64) * R + tl.arange(0, R))[:, None]
    col = (block % COLUMN_BLOCKS * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (row < rows) & (col < INNER)
    outer = tl.load(grad + row * grad_stride + col, mask=mask, other=0.0).to(tl.float32)
    left = tl.load(gate + row * gate_stride + col, mask=mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(left)
    if GATE or OUTPUT:
        right = tl.load(up + row * up_stride + col, mask=mask, other=0.0).to(tl.float32)
    if OUTPUT:
        tl.debug_barrier()  # `output` may be `grad`: all of it is read before any is written
        tl.store(output + row * output_stride + col, (left * share * right).to(output.dtype.element_ty), mask=mask)
    if GATE:
        inner = outer * right * share * (1.0 + left * (1.0 - share))
        tl.store(grad_gate + row * grad_gate_stride + col, inner.to(grad_gate.dtype.element_ty), mask=mask)
    if UP:
        tl.store(grad_up + row * grad_up_stride + col, (outer * left * share).to(grad_up.dtype.element_ty), mask=mask)


def _columns(width):
    """Column block, rows and blocks of a row: the power of two from 128 to 1,024 that leaves fewest idle lanes."""
    block = min((1024, 512, 256, 128), key=lambda size: triton.cdiv(width, size) * size)
    return {"COLUMN_BLOCKS": triton.cdiv(width, block), "R": BACKWARD_TILE // block, "BLOCK": block, "num_warps": 4}


def swiglu_forward(gate, up):
    """silu(gate) * up. Shapes: (..., I) twice, rows may be strided -> (..., I) contiguous."""
    left, right, width = rows_of(gate), rows_of(up), gate.shape[-1]
    output = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    if output.numel():
        blocks = _columns(width)
        with torch.cuda.device_of(gate):
            _swiglu_kernel[(triton.cdiv(left.shape[0], blocks["R"]) * blocks["COLUMN_BLOCKS"],)](
                left, right, output, left.shape[0], left.stride(0), right.stride(0), INNER=width, **blocks
            )
    return output


def swiglu_backward(grad, gate, up, grad_gate, grad_up, output=None):
    """Fills `grad_gate` and `grad_up` (T, I), rows may be strided; None for one that is not needed. `output` (T, I) is
    filled with silu(gate) * up if it is given; it may be `grad`."""
    outer, left, right = rows_of(grad), rows_of(gate), rows_of(up)
    rows, width = left.shape
    blocks = _columns(width)
    first, second, third = (outer if each is None else each for each in (grad_gate, grad_up, output))
    if left.numel():
        with torch.cuda.device_of(gate):
            _swiglu_backward_kernel[(triton.cdiv(rows, blocks["R"]) * blocks["COLUMN_BLOCKS"],)](
                outer, left, right, first, second, third, rows, outer.stride(0), left.stride(0), right.stride(0),
                first.stride(0), second.stride(0), third.stride(0), GATE=grad_gate is not None,
                UP=grad_up is not None, OUTPUT=output is not None, INNER=width, **blocks,
            )  # fmt: skip
