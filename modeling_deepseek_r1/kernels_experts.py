"""The routed and shared experts for few tokens, in Triton, with each chosen weight read once.

Up to `FEW_TOKENS` tokens every (token, choice) pair multiplies its expert's rows with one vector; the work is spread
over the rows, and the shared experts are part of the same two launches. With more tokens the pairs stand in one list
per expert (`route` makes them), a program multiplies a block of weight rows with a block of a list on tensor cores, and
which list is whose follows from the counts on the device: grids depend on the number of tokens only.

Names in shapes: T tokens, D hidden_size, E experts, K choices, I inner size of an expert, I_s of the shared experts.
A pair is numbered t * K + k. Results are the same on every run: sums over the choices have a fixed order.
"""

import torch
from transformers.activations import ACT2FN

from .decoding_experts import experts_few_tokens
from .kernels_launch import ahead, wait_for_inputs
from .kernels_linear import linear_blocks, rows_times_tile
from .kernels_routing import list_pairs, route

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the fast kernels need triton, which torch brings on Linux with CUDA") from missing

__all__ = ["decode_experts", "experts_down", "experts_forward", "experts_gate_up", "list_pairs", "route"]

FEW_TOKENS = 4
AT_ONCE_BYTES = 65536  # of weights that a program of 8 warps holds in registers
SILU = (torch.nn.SiLU, type(ACT2FN["silu"]))


# ---- few tokens: one vector per pair -------------------------------------------------------------------------------


@triton.jit
def _gated_rows(
    x, x_stride, tokens, gate, up, start, limit, output, output_stride,
    D: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """silu(gate @ x) * (up @ x) for rows start .. of both, which lie interleaved in one tile: one wait for both."""
    row = tl.arange(0, 2 * BLOCK_I)
    inner = start + row // 2
    pointers = tl.where(row % 2 == 0, gate, up) + inner.to(tl.int64) * D
    if ALIGNED:  # which the compiler cannot see through the choice of a pointer, and would read two bytes at a time
        pointers = tl.multiple_of(pointers, [16])
    product = rows_times_tile(
        pointers, inner < limit, x, x_stride, tokens, x, 0.0, x, False, D, T, False, False, 2 * BLOCK_I, BLOCK_D,
        AHEAD,
    )
    gated, raised = tl.split(tl.permute(tl.reshape(product, (BLOCK_I, 2, T)), (0, 2, 1)))
    inner, lanes = start + tl.arange(0, BLOCK_I), tl.arange(0, T)
    mask = (inner < limit)[:, None] & (lanes < tokens)[None, :]
    tl.store(output + lanes[None, :] * output_stride + inner[:, None], gated * tl.sigmoid(gated) * raised, mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _gate_up_few(
    x, gate_up, shared_gate, shared_up, topk_index, hidden, shared_hidden, tokens,
    E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, INNER: tl.constexpr, SHARED_INNER: tl.constexpr,
    T: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Programs: the blocks of the shared experts, for all tokens; then those of each pair."""
    blocks: tl.constexpr = (INNER + BLOCK_I - 1) // BLOCK_I
    shared_blocks: tl.constexpr = (SHARED_INNER + BLOCK_I - 1) // BLOCK_I
    program = tl.program_id(0)
    if program < shared_blocks:
        _gated_rows(
            x, D, tokens, shared_gate, shared_up, program * BLOCK_I, SHARED_INNER, shared_hidden, SHARED_INNER,
            D, T, ALIGNED, BLOCK_I, BLOCK_D, AHEAD,
        )  # fmt: skip
    else:
        wait_for_inputs(AHEAD)
        pair = (program - shared_blocks) // blocks
        expert = tl.load(topk_index + pair).to(tl.int64)
        if expert < E:
            gate = gate_up + expert * (2 * INNER * D)
            _gated_rows(
                x + (pair // K) * D, D, 1, gate, gate + INNER * D, (program - shared_blocks) % blocks * BLOCK_I, INNER,
                hidden + pair * INNER, INNER, D, 1, ALIGNED, BLOCK_I, BLOCK_D, False,
            )  # fmt: skip


@triton.jit
def _down_few(
    hidden, shared_hidden, down, shared_down, topk_index, topk_weight, residual, output,
    E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, INNER: tl.constexpr, SHARED_INNER: tl.constexpr,
    RESIDUAL: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Program (b, t): BLOCK_D outputs of token t, over its choices and over the shared inner in chunks of I."""
    parts: tl.constexpr = (INNER + BLOCK_I - 1) // BLOCK_I
    chunks: tl.constexpr = (SHARED_INNER + INNER - 1) // INNER
    wait_for_inputs(AHEAD)
    token = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for step in tl.range(0, (K + chunks) * parts, num_stages=STAGES):
        choice = step // parts
        pair = token * K + choice
        routed = choice < K
        expert = tl.load(topk_index + pair, mask=routed, other=0).to(tl.int64)
        scale = tl.load(topk_weight + pair, mask=routed, other=1.0).to(tl.float32)
        first = (choice - K) * INNER
        weight = tl.where(routed, down + expert * (D * INNER), shared_down + first)
        vector = tl.where(routed, hidden + pair * INNER, shared_hidden + token * SHARED_INNER + first)
        stride = tl.where(routed, INNER, SHARED_INNER)
        width = tl.where(routed, INNER, tl.minimum(INNER, SHARED_INNER - first))
        cols = step % parts * BLOCK_I + tl.arange(0, BLOCK_I)
        inside = (cols < width) & (expert < E)
        tile = tl.load(
            weight + (rows * stride)[:, None] + cols[None, :], mask=(rows < D)[:, None] & inside[None, :], other=0.0
        )
        values = tl.load(vector + cols, mask=inside, other=0.0).to(tl.float32)
        total += scale * tl.sum(tile.to(tl.float32) * values[None, :], 1)
    if RESIDUAL:
        total += tl.load(residual + token * D + rows, mask=rows < D, other=0.0).to(tl.float32)
    tl.store(output + token * D + rows, total, mask=rows < D)


@triton.jit
def _down_at_once(
    hidden, shared_hidden, down, shared_down, topk_index, topk_weight, residual, output,
    E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, INNER: tl.constexpr, SHARED_INNER: tl.constexpr,
    RESIDUAL: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """`_down_few` where all weights of a program fit its registers: they are read while `hidden` is still computed.

    The choices are known by then: the router ran before the kernel in front (see kernels_launch.py).
    """
    chunks: tl.constexpr = (SHARED_INNER + INNER - 1) // INNER
    token, choice = tl.program_id(1), tl.arange(0, BLOCK_C)
    rows, cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_I)
    routed, pair = choice < K, token * K + choice
    first = (choice - K) * INNER
    expert = tl.load(topk_index + pair, mask=routed, other=0).to(tl.int64)
    scale = tl.load(topk_weight + pair, mask=routed, other=1.0).to(tl.float32)
    width = tl.where(routed, INNER, tl.minimum(INNER, SHARED_INNER - first))
    width = tl.where((expert < E) & (choice < K + chunks), width, 0)
    start = tl.where(routed, down + expert * (D * INNER), shared_down + first)[:, None]
    start = start + rows[None, :] * tl.where(routed, INNER, SHARED_INNER)[:, None]
    if ALIGNED:
        start = tl.multiple_of(start, [16, 16])
    inside = cols[None, :] < width[:, None]
    tile = tl.load(
        start[:, :, None] + cols[None, None, :], mask=inside[:, None, :] & (rows < D)[None, :, None], other=0.0
    )
    wait_for_inputs(AHEAD)
    vector = tl.where(routed, hidden + pair * INNER, shared_hidden + token * SHARED_INNER + first)
    values = tl.load(vector[:, None] + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    part = tl.sum(tile.to(tl.float32) * values[:, None, :], 2)
    total = tl.sum(part * scale[:, None], 0)
    if RESIDUAL:
        total += tl.load(residual + token * D + rows, mask=rows < D, other=0.0).to(tl.float32)
    tl.store(output + token * D + rows, total, mask=rows < D)


# ---- more tokens: one list of pairs per expert ---------------------------------------------------------------------


@triton.jit
def _list_block(expert_count, block, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Whose list block number `block` is in, if every list is cut into blocks of BLOCK_M.

    -> expert (E if there are fewer blocks), first place in its list, length of the list.
    """
    experts = tl.arange(0, BLOCK_E)
    counts = tl.load(expert_count + experts, mask=experts < E, other=0)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(blocks, 0)
    expert = tl.minimum(tl.sum((ends <= block).to(tl.int32), 0), E)
    here = experts == expert
    start = tl.sum(tl.where(here, ends - blocks, 0), 0)
    return expert, (block - start) * BLOCK_M, tl.sum(tl.where(here, counts, 0), 0)


@triton.jit(do_not_specialize=["list_stride", "tokens", "shared_blocks", "token_blocks", "blocks"])
def _gate_up_lists(
    x, gate_up, shared_gate, shared_up, expert_count, expert_tokens, hidden, shared_hidden,
    list_stride, tokens, shared_blocks, token_blocks, blocks,
    E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, INNER: tl.constexpr, SHARED_INNER: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_N inner rows of gate and of up for BLOCK_M pairs of one list. `blocks` blocks of pairs for each
    block of rows: first those of the shared experts, taken as chunks of I rows for all tokens, then the lists'."""
    wait_for_inputs(AHEAD)
    block, start_n = tl.program_id(0) % blocks, tl.program_id(0) // blocks * BLOCK_N
    rows, places = start_n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    if block < shared_blocks:
        chunk = block // token_blocks
        first = chunk * INNER
        gate, up = shared_gate + first.to(tl.int64) * D, shared_up + first.to(tl.int64) * D
        target, stride = shared_hidden + first, tl.full((), SHARED_INNER, tl.int32)
        pair = block % token_blocks * BLOCK_M + places
        valid, token = pair < tokens, pair
        limit = tl.minimum(INNER, SHARED_INNER - first)
        steps = tl.full((), D, tl.int32)
    else:
        expert, place, count = _list_block(expert_count, block - shared_blocks, E, BLOCK_E, BLOCK_M)
        valid = place + places < count
        pair = tl.load(expert_tokens + expert.to(tl.int64) * list_stride + place + places, mask=valid, other=0)
        token = pair // K
        gate = gate_up + expert.to(tl.int64) * (2 * INNER * D)
        up = gate + INNER * D
        target, stride = hidden, tl.full((), INNER, tl.int32)
        limit = tl.full((), INNER, tl.int32)
        steps = tl.where(expert < E, D, 0)
    if steps > 0:
        inside = rows < limit
        gated = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        raised = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in tl.range(0, steps, BLOCK_K, num_stages=STAGES):
            cols = start + tl.arange(0, BLOCK_K)
            used = (cols < D)[None, :]
            values = tl.load(x + token[:, None] * D + cols[None, :], mask=valid[:, None] & used, other=0.0)
            mask = inside[:, None] & used
            gate_tile = tl.load(gate + rows[:, None] * D + cols[None, :], mask=mask, other=0.0)
            up_tile = tl.load(up + rows[:, None] * D + cols[None, :], mask=mask, other=0.0)
            # Weights first: their rows fill the tensor cores' 64, so that a list may be as short as 16.
            gated = tl.dot(gate_tile.to(x.dtype.element_ty), tl.trans(values), gated, input_precision="ieee")
            raised = tl.dot(up_tile.to(x.dtype.element_ty), tl.trans(values), raised, input_precision="ieee")
        result = gated * tl.sigmoid(gated) * raised
        pointers = target + pair[None, :].to(tl.int64) * stride + rows[:, None]
        tl.store(pointers, result, mask=inside[:, None] & valid[None, :])


@triton.jit(do_not_specialize=["list_stride", "tokens", "shared_blocks", "blocks"])
def _down_lists(
    hidden, shared_hidden, down, shared_down, expert_count, expert_tokens, results,
    list_stride, tokens, shared_blocks, blocks,
    E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, INNER: tl.constexpr, SHARED_INNER: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_N outputs for BLOCK_M pairs of one list, to `results` (T * K + T, D): the shared experts' last."""
    wait_for_inputs(AHEAD)
    block, start_n = tl.program_id(0) % blocks, tl.program_id(0) // blocks * BLOCK_N
    rows, places = start_n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    if block < shared_blocks:
        source, weight, target = shared_hidden, shared_down, results + tokens.to(tl.int64) * (K * D)
        pair = block * BLOCK_M + places
        valid = pair < tokens
        inner = tl.full((), SHARED_INNER, tl.int32)
        steps = inner
    else:
        expert, place, count = _list_block(expert_count, block - shared_blocks, E, BLOCK_E, BLOCK_M)
        valid = place + places < count
        pair = tl.load(expert_tokens + expert.to(tl.int64) * list_stride + place + places, mask=valid, other=0)
        source, weight, target = hidden, down + expert.to(tl.int64) * (D * INNER), results
        inner = tl.full((), INNER, tl.int32)
        steps = tl.where(expert < E, INNER, 0)
    if steps > 0:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in tl.range(0, steps, BLOCK_K, num_stages=STAGES):
            cols = start + tl.arange(0, BLOCK_K)
            used = (cols < inner)[None, :]
            values = tl.load(source + (pair * inner)[:, None] + cols[None, :], mask=valid[:, None] & used, other=0.0)
            tile = tl.load(weight + (rows * inner)[:, None] + cols[None, :], mask=(rows < D)[:, None] & used, other=0.0)
            total = tl.dot(tile.to(hidden.dtype.element_ty), tl.trans(values), total, input_precision="ieee")
        pointers = target + pair[None, :].to(tl.int64) * D + rows[:, None]
        tl.store(pointers, total, mask=(rows < D)[:, None] & valid[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _sum_choices(
    results, shared_output, topk_index, topk_weight, residual, output, tokens,
    E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, SHARED: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_D: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Program (t, b): residual + weighted results of the choices + shared output, for one token, in this order."""
    wait_for_inputs(AHEAD)
    token = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    if RESIDUAL:
        total += tl.load(residual + token * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        pair = token * K + k
        present = tl.load(topk_index + pair) < E
        scale = tl.load(topk_weight + pair).to(tl.float32)
        values = tl.load(results + pair.to(tl.int64) * D + cols, mask=(cols < D) & present, other=0.0)
        total += tl.where(present, scale, 0.0) * values.to(tl.float32)
    if SHARED:
        total += tl.load(shared_output + token * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    tl.store(output + token * D + cols, total, mask=cols < D)


# ---- the launches --------------------------------------------------------------------------------------------------


def expert_blocks(T, K, E, element_size=2):
    """Block sizes for T tokens with K of E experts each, by kernel; the one place to tune.

    The lists' blocks take 16 to 64 pairs, the power of two from the mean length of a list up; a longer list has its
    weights come from the second-level cache for its further blocks, which run beside its first.
    """
    if T <= FEW_TOKENS:
        return {"gate_up": {"tile_bytes": 8192, "num_warps": 4}, "down": {"BLOCK_D": 4, "STAGES": 4, "num_warps": 4}}
    block_m = min(64, max(16, triton.next_power_of_2(-(-T * K // E))))
    narrow = 2 if element_size > 2 else 1  # the same bytes a stage
    gate_up = {"BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_K": 64 // narrow, "STAGES": 4, "num_warps": 4}
    down = {**gate_up, "BLOCK_K": 128 // narrow if block_m < 64 else 64 // narrow}
    if block_m == 16:  # on an H100 64 us a layer instead of 68, for 32 tokens
        gate_up |= {"BLOCK_K": 128 // narrow, "STAGES": 3}
    return {"gate_up": gate_up, "down": down}


def _check(act, shared, what):
    if act != "silu":
        raise ValueError(f"hidden_act={act!r}: the decoding kernels compute 'silu'; use the ordinary experts")
    if shared and any(tensor is None for tensor in shared) and any(tensor is not None for tensor in shared):
        raise ValueError(f"{what} must be given together, or all be None")


def _list_grid(blocks, tokens, top_k, experts, chunks):
    """Token blocks, shared blocks (of `chunks` shared experts) and all blocks: an upper bound that needs no look at
    the lists. Every non-empty list has at most one block that is not full."""
    pairs = tokens * top_k
    token_blocks = triton.cdiv(tokens, blocks["BLOCK_M"])
    shared_blocks = chunks * token_blocks
    return token_blocks, shared_blocks, shared_blocks + min(experts, pairs) + pairs // blocks["BLOCK_M"]


def experts_gate_up(
    normed, gate_up_proj, shared_gate, shared_up, topk_index, expert_count, expert_tokens, hidden, shared_hidden,
    act="silu", blocks=None,
):  # fmt: skip
    """hidden[pair] = silu(gate) * up of the pair's expert, shared_hidden[t] likewise; one launch.

    Up to `FEW_TOKENS` tokens from `topk_index`, with more from the lists (`expert_count`, `expert_tokens`), each of
    which may be None where the other is read. A pair of expert E (another rank's) leaves its row of `hidden` unwritten.

    Shapes: normed (T, D); gate_up_proj (E, 2 I, D); shared_gate, shared_up (I_s, D) or None; topk_index (T, K) int32 or
    int64; expert_count (E,), expert_tokens (E, at least T) int32; hidden (T * K, I), shared_hidden (T, I_s) or None are
    written. All contiguous. Products and sums in fp32. `blocks` replaces those of `expert_blocks`, for tuning.
    Raises:
        ValueError: for an activation other than "silu", or shared weights without the rest of their tensors.
    """
    _check(act, (shared_gate, shared_up, shared_hidden), "shared_gate, shared_up and shared_hidden")
    (tokens, width), (experts, inner) = normed.shape, (gate_up_proj.shape[0], gate_up_proj.shape[1] // 2)
    top_k = hidden.shape[0] // tokens
    shared_inner = 0 if shared_gate is None else shared_gate.shape[0]
    shared_gate, shared_up = (gate_up_proj, gate_up_proj) if shared_gate is None else (shared_gate, shared_up)
    shared_hidden = hidden if shared_hidden is None else shared_hidden
    sizes = dict(E=experts, K=top_k, D=width, INNER=inner, SHARED_INNER=shared_inner)
    blocks = (blocks or expert_blocks(tokens, top_k, experts, gate_up_proj.element_size()))["gate_up"]
    if tokens <= FEW_TOKENS:
        block_d = linear_blocks(1, 2 * inner, width)["BLOCK_K"]
        block_i = max(1, blocks["tile_bytes"] // (2 * block_d * gate_up_proj.element_size()))
        block_i = min(block_i, triton.next_power_of_2(inner))
        addresses = [tensor.data_ptr() for tensor in (gate_up_proj, shared_gate, shared_up)]
        aligned = not any(value % 16 for value in (width * gate_up_proj.element_size(), *addresses))
        programs = triton.cdiv(shared_inner, block_i) + tokens * top_k * triton.cdiv(inner, block_i)
        _gate_up_few[(programs,)](
            normed, gate_up_proj, shared_gate, shared_up, topk_index, hidden, shared_hidden, tokens,
            **sizes, T=triton.next_power_of_2(tokens), ALIGNED=aligned, BLOCK_I=block_i, BLOCK_D=block_d,
            num_warps=blocks["num_warps"], **ahead(normed.device),
        )  # fmt: skip
        return
    token_blocks, shared_blocks, count = _list_grid(blocks, tokens, top_k, experts, triton.cdiv(shared_inner, inner))
    _gate_up_lists[(count * triton.cdiv(inner, blocks["BLOCK_N"]),)](
        normed, gate_up_proj, shared_gate, shared_up, expert_count, expert_tokens, hidden, shared_hidden,
        expert_tokens.stride(0), tokens, shared_blocks, token_blocks, count,
        **sizes, BLOCK_E=triton.next_power_of_2(experts + 1), **blocks, **ahead(normed.device),
    )  # fmt: skip


def experts_down(
    hidden, shared_hidden, down_proj, shared_down, topk_index, topk_weight, residual, output,
    expert_count=None, expert_tokens=None, shared_output=None, results=None, blocks=None,
):  # fmt: skip
    """output = residual + sum_k weight * down(hidden) + shared down(shared_hidden), summed in fp32 in this order of k.

    One launch up to `FEW_TOKENS` tokens; two with more, through `results` in the dtype of `hidden`. Indices of E add
    nothing.

    Shapes: hidden (T * K, I); shared_hidden (T, I_s), shared_down (D, I_s) or None; down_proj (E, D, I); topk_index
    (T, K); topk_weight (T, K) float32; residual (T, D) or None, may be the output; output (T, D), written; results
    (T * K + T, D) scratch or None; shared_output (T, D): the shared experts' result where it was computed elsewhere
    (more than `FEW_TOKENS` tokens only). All contiguous. `blocks` as of `experts_gate_up`.
    Raises:
        ValueError: if shared_output comes with shared weights or with few tokens.
    """
    _check("silu", (shared_hidden, shared_down), "shared_hidden and shared_down")
    (tokens, width), (experts, _, inner), top_k = output.shape, down_proj.shape, topk_index.shape[1]
    if shared_output is not None and (shared_down is not None or tokens <= FEW_TOKENS):
        raise ValueError(f"shared_output with {tokens} tokens: give shared_hidden and shared_down instead, not both")
    shared_inner = 0 if shared_down is None else shared_down.shape[1]
    sizes = dict(E=experts, K=top_k, D=width)
    blocks = (blocks or expert_blocks(tokens, top_k, experts, down_proj.element_size()))["down"]
    with_residual, residual = residual is not None, output if residual is None else residual
    shared = (hidden, down_proj) if shared_down is None else (shared_hidden, shared_down)
    if tokens <= FEW_TOKENS:
        arguments = (hidden, shared[0], down_proj, shared[1], topk_index, topk_weight, residual, output)
        sizes |= dict(INNER=inner, SHARED_INNER=shared_inner, RESIDUAL=with_residual)
        block_c = triton.next_power_of_2(top_k + triton.cdiv(shared_inner, inner))
        block_i = triton.next_power_of_2(inner)
        if block_c * block_i * blocks["BLOCK_D"] * down_proj.element_size() <= AT_ONCE_BYTES:
            addresses = [tensor.data_ptr() for tensor in (down_proj, shared[1])]
            offsets = [size * down_proj.element_size() for size in (inner, shared_inner)]
            _down_at_once[(triton.cdiv(width, blocks["BLOCK_D"]), tokens)](
                *arguments, **sizes, ALIGNED=not any(value % 16 for value in (*addresses, *offsets)), BLOCK_C=block_c,
                BLOCK_D=blocks["BLOCK_D"], BLOCK_I=block_i, num_warps=8, **ahead(hidden.device),
            )  # fmt: skip
        else:
            _down_few[(triton.cdiv(width, blocks["BLOCK_D"]), tokens)](
                *arguments, **sizes, BLOCK_I=min(1024, block_i), **blocks, **ahead(hidden.device),
            )  # fmt: skip
        return
    if results is None:
        results = torch.empty(tokens * (top_k + 1), width, dtype=hidden.dtype, device=hidden.device)
    _, shared_blocks, count = _list_grid(blocks, tokens, top_k, experts, int(shared_inner > 0))
    _down_lists[(count * triton.cdiv(width, blocks["BLOCK_N"]),)](
        hidden, shared[0], down_proj, shared[1], expert_count, expert_tokens, results, expert_tokens.stride(0),
        tokens, shared_blocks, count,
        **sizes, INNER=inner, SHARED_INNER=shared_inner, BLOCK_E=triton.next_power_of_2(experts + 1), **blocks,
        **ahead(hidden.device),
    )  # fmt: skip
    shared_output = results[tokens * top_k :] if shared_output is None else shared_output
    _sum_choices[(tokens, triton.cdiv(width, 512))](
        results, shared_output, topk_index, topk_weight, residual, output, tokens, **sizes,
        SHARED=shared_inner > 0 or shared_output.data_ptr() != results[tokens * top_k :].data_ptr(),
        RESIDUAL=with_residual, BLOCK_D=512, num_warps=2, **ahead(hidden.device),
    )  # fmt: skip


def experts_forward(
    normed, gate_up_proj, down_proj, shared, topk_index, topk_weight, expert_count, expert_tokens, residual, output,
    act="silu", shared_output=None, blocks=None,
):  # fmt: skip
    """`experts_gate_up` and `experts_down` with their scratch; `shared` is (gate, up, down) weights or None."""
    tokens, top_k = topk_index.shape
    gate, up, down = (None, None, None) if shared is None else shared
    hidden = normed.new_empty(tokens * top_k, down_proj.shape[2])
    shared_hidden = None if shared is None else normed.new_empty(tokens, gate.shape[0])
    experts_gate_up(
        normed, gate_up_proj, gate, up, topk_index, expert_count, expert_tokens, hidden, shared_hidden, act, blocks
    )
    experts_down(
        hidden, shared_hidden, down_proj, down, topk_index, topk_weight, residual, output,
        expert_count, expert_tokens, shared_output, blocks=blocks,
    )  # fmt: skip
    return output


def decode_experts(self, hidden_states, top_k_index, top_k_weights):
    """An entry for `experts.EXPERTS`: the routed sum for few tokens, without gradients. As `DeepSeekR1Experts.forward`.

    Raises:
        ValueError: if gradients are wanted, or for an activation other than SiLU.
    """
    inputs = (hidden_states, top_k_weights, self.gate_up_proj, self.down_proj)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        raise ValueError("experts_implementation='decode' has no gradients: use torch.no_grad(), or 'grouped_mm'")
    if hidden_states.device.type == "cpu" and not triton.knobs.runtime.interpret:
        return experts_few_tokens(hidden_states, top_k_index, top_k_weights, self)
    if not isinstance(self.act_fn, SILU):
        raise ValueError(f"experts_implementation='decode' computes silu, not {self.act_fn}: use 'grouped_mm'")
    tokens = hidden_states.shape[0]
    counts = torch.zeros(self.num_experts, dtype=torch.int32, device=hidden_states.device)
    lists = torch.empty(self.num_experts, tokens, dtype=torch.int32, device=hidden_states.device)
    if tokens > FEW_TOKENS:
        list_pairs(top_k_index, counts, lists)
    return experts_forward(
        hidden_states.contiguous(), self.gate_up_proj, self.down_proj, None, top_k_index.contiguous(),
        top_k_weights.contiguous(), counts, lists, None, torch.empty_like(hidden_states),
    )  # fmt: skip
