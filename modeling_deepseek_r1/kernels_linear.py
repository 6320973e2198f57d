"""Linear layers on a few rows at the speed of memory: matrix-vector products in Triton, with the norm before them.

With 1 to 8 tokens a linear layer is as fast as its weights can be read. Tensor cores have nothing to add; what counts
is that many 16-byte loads are in flight on every multiprocessor, and that a launch does the small things around the
product too: the norm of its input, a second weight on the same input, the residual sum.
"""

from .kernels_launch import ahead, wait_for_inputs

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the fast kernels need triton, which torch brings on Linux with CUDA") from missing

MAX_ROWS = 8
MULTIPROCESSORS = 132  # of an H100; a choice of block sizes, not of results


@triton.jit
def rows_times_tile(
    pointers, inside, x, x_stride, tokens, norm_weight, norm_eps, normed, writes_normed,
    K: tl.constexpr, T: tl.constexpr, NORM: tl.constexpr, STORE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, T) fp32: the weight rows that start at `pointers` (BLOCK_N,), where `inside`, times T rows of x.

    x: pointer to rows of K elements, `x_stride` apart; rows from `tokens` on count as zero. NORM: the rows are first
    RMS-normalised and rounded to x's dtype. STORE: programs with `writes_normed` also write them to `normed` (T, K).
    AHEAD: waits for the kernel in front, once the weights are on their way if they fit one tile.
    """
    if K > BLOCK_K:
        wait_for_inputs(AHEAD)
    lanes = tl.arange(0, T)
    product = tl.zeros((BLOCK_N, T), tl.float32)
    squares = tl.zeros((T,), tl.float32)
    if NORM and K > BLOCK_K:
        for start in tl.range(0, K, BLOCK_K):
            cols = start + tl.arange(0, BLOCK_K)
            for t in tl.static_range(T):
                row = tl.load(x + t * x_stride + cols, mask=(cols < K) & (t < tokens), other=0.0).to(tl.float32)
                squares = tl.where(lanes == t, squares + tl.sum(row * row, 0), squares)
    for start in tl.range(0, K, BLOCK_K, num_stages=3):
        cols = start + tl.arange(0, BLOCK_K)
        # Read before the norm is computed: the slow loads are on their way meanwhile.
        tile = tl.load(pointers[:, None] + cols[None, :], mask=inside[:, None] & (cols < K)[None, :], other=0.0)
        if NORM:
            gain = tl.load(norm_weight + cols, mask=cols < K, other=0.0).to(tl.float32)
        if K <= BLOCK_K:
            wait_for_inputs(AHEAD)
        for t in tl.static_range(T):
            raw = tl.load(x + t * x_stride + cols, mask=(cols < K) & (t < tokens), other=0.0)
            row = raw.to(tl.float32)
            if NORM:
                if K > BLOCK_K:
                    square = tl.sum(tl.where(lanes == t, squares, 0.0), 0)
                else:
                    square = tl.sum(row * row, 0)
                rounded = (row * tl.rsqrt(square / K + norm_eps) * gain).to(raw.dtype)
                if STORE:
                    tl.store(normed + t * K + cols, rounded, mask=(cols < K) & (t < tokens) & writes_normed)
                row = rounded.to(tl.float32)
            part = tl.sum(tile.to(tl.float32) * row[None, :], 1)
            # A choice, not a product with 0 and 1: one token's infinity must not reach the others.
            product = tl.where((lanes == t)[None, :], product + part[:, None], product)
    return product


@triton.jit(do_not_specialize=["tokens"])
def _few_rows_linear(
    x, weight, second_weight, output, second_output, norm_weight, norm_eps, residual,
    x_stride, output_stride, second_stride, residual_stride, tokens,
    N: tl.constexpr, SECOND_N: tl.constexpr, K: tl.constexpr, T: tl.constexpr,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Program p: BLOCK_N outputs of all T rows; the programs of the second weight follow those of the first."""
    block = tl.program_id(0)
    blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    count = N
    if SECOND_N > 0:
        is_second = block >= blocks
        weight = tl.where(is_second, second_weight, weight)
        output = tl.where(is_second, second_output, output)
        output_stride = tl.where(is_second, second_stride, output_stride)
        count = tl.where(is_second, SECOND_N, N)
        block = tl.where(is_second, block - blocks, block)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < count
    lanes = tl.arange(0, T)
    mask = inside[:, None] & (lanes < tokens)[None, :]
    if RESIDUAL:
        added = tl.load(residual + lanes[None, :] * residual_stride + rows[:, None], mask=mask, other=0.0)
    product = rows_times_tile(
        weight + rows.to(tl.int64) * K, inside, x, x_stride, tokens, norm_weight, norm_eps, x, False,
        K, T, NORM, False, BLOCK_N, BLOCK_K, AHEAD,
    )  # fmt: skip
    if RESIDUAL:
        product += added.to(tl.float32)
    tl.store(output + lanes[None, :] * output_stride + rows[:, None], product, mask=mask)


def linear_blocks(T, N, K, element_size=2):
    """Block sizes for T rows and an (N, K) weight of `element_size` bytes; the one place to tune.

    Small programs, four on every multiprocessor at least: while one waits for the kernel in front or adds up, others
    read. On an H100 a whole step at batch 1 took 585 us with tiles of 8 KB, 596 with 16 KB, 611 with 32 KB. From 4 rows
    on a tile is worth more rows of x, and has more of them to read.
    """
    block_k = triton.next_power_of_2(K)
    if block_k > 2048:  # the size that pads least, the largest first
        block_k = min((2048, 1024), key=lambda size: -(-K // size) * size)
    block_n = max(1, (8192 if T <= 2 else 16384) // (block_k * element_size))
    smallest = max(1, min(2 if T <= 2 else 8, block_n))
    while block_n > smallest and -(-N // block_n) < 4 * MULTIPROCESSORS:
        block_n //= 2
    return {"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 2 if T <= 2 else 4}


def few_rows_linear(x, weights, outputs, norm_weight=None, norm_eps=0.0, residual=None):
    """outputs[i] = norm(x) @ weights[i].T (+ residual), products and sums in fp32, for at most 8 rows of x.

    Shapes: x (T, K); weights: one or two (N_i, K), contiguous; outputs: as many (T, N_i), written in place;
    norm_weight (K,): x is RMS-normalised first (the mean in fp32, the result rounded to x's dtype), None: it is not;
    residual (T, N), with one weight only, is added before the result is rounded, and may be the output itself.
    Raises:
        ValueError: for other row counts or more weights.
    """
    (tokens, width), pair = x.shape, len(weights) == 2
    if not 1 <= tokens <= MAX_ROWS:
        raise ValueError(f"x has {tokens} rows, few_rows_linear takes 1 to {MAX_ROWS}; use F.linear for more")
    if len(weights) not in (1, 2) or len(outputs) != len(weights) or (pair and residual is not None):
        raise ValueError(f"{len(weights)} weights and {len(outputs)} outputs: give one pair, or two without residual")
    weight, second = weights[0], weights[-1]
    rows, second_rows = weight.shape[0], second.shape[0] if pair else 0
    blocks = linear_blocks(tokens, rows + second_rows, width, weight.element_size())
    size = blocks["BLOCK_N"]
    _few_rows_linear[(triton.cdiv(rows, size) + triton.cdiv(second_rows, size),)](
        x, weight, second, outputs[0], outputs[-1], x if norm_weight is None else norm_weight, norm_eps,
        x if residual is None else residual,
        x.stride(0), outputs[0].stride(0), outputs[-1].stride(0), 0 if residual is None else residual.stride(0), tokens,
        N=rows, SECOND_N=second_rows, K=width, T=triton.next_power_of_2(tokens),
        NORM=norm_weight is not None, RESIDUAL=residual is not None, **blocks,
        **ahead(x.device),
    )  # fmt: skip
