"""The router's training step in Triton: logits with fp32 accuracy, choices and counts, and their gradients.

Names in shapes: T tokens = R rows (sequences) * S, D hidden_size, E experts, K choices. What is computed stands in
training_routing.py, whose twins have the arguments of the functions here.

Logits have to be as exact as an fp32 product, else near-tied experts swap places, yet tensor cores multiply bf16. So a
number is taken as a sum of bf16 parts of 8 bits each: one part for bf16, two for fp16, three for fp32. The products of
parts are exact in fp32, and those below the last bit of fp32 are left out. Nothing is written to memory for that.
"""

import torch

from .fused import on_its_device

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the fused router needs triton, which torch brings on Linux with CUDA") from missing

PARTS_OF = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
# Triton's interpreter takes bf16 operands of a dot for integers: there parts are multiplied as fp32, to the same result
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
EXCLUDED = tl.constexpr(-(2**31))  # below the key of every number, of minus infinity too


# ---- logits --------------------------------------------------------------------------------------------------------


@triton.jit
def _as_operand(part):
    return part.to(tl.float32) if INTERPRETED else part


@triton.jit
def _parts(values, PARTS: tl.constexpr):
    """values = high + middle + low in bf16; of one part, high is `values` and the others are not to be used."""
    if PARTS == 1:
        high, middle, low = values, values, values
    else:
        values = values.to(tl.float32)
        high = values.to(tl.bfloat16)
        rest = values - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return _as_operand(high), _as_operand(middle), _as_operand(low)


@triton.jit
def _multiply(a, b, main, small, A_PARTS: tl.constexpr, B_PARTS: tl.constexpr, ORDER: tl.constexpr):
    """a @ b onto main + small. ORDER 3 is exact to fp32; 2, to 16 bits, is for results in bf16 or fp16."""
    a0, a1, a2 = _parts(a, A_PARTS)
    b0, b1, b2 = _parts(b, B_PARTS)
    main = tl.dot(a0, b0, main, input_precision="ieee")
    if A_PARTS > 1:
        small = tl.dot(a1, b0, small, input_precision="ieee")
    if B_PARTS > 1:
        small = tl.dot(a0, b1, small, input_precision="ieee")
    if ORDER > 2:
        if A_PARTS > 1:
            if B_PARTS > 1:
                small = tl.dot(a1, b1, small, input_precision="ieee")
        if A_PARTS > 2:
            small = tl.dot(a2, b0, small, input_precision="ieee")
        if B_PARTS > 2:
            small = tl.dot(a0, b2, small, input_precision="ieee")
    return main, small


@triton.jit(do_not_specialize=["tokens"])
def _logits(
    hidden, weight, logits, tokens, D: tl.constexpr, E: tl.constexpr, HIDDEN_PARTS: tl.constexpr,
    WEIGHT_PARTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_E experts' logits of BLOCK_T tokens, as (weight @ hidden^T)^T: the split weight stays in registers."""
    blocks: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    expert = tl.program_id(0) % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    token = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    main = tl.zeros((BLOCK_E, BLOCK_T), tl.float32)
    small = tl.zeros((BLOCK_E, BLOCK_T), tl.float32)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        rows = tl.load(
            weight + expert[:, None] * D + column[None, :], mask=(expert < E)[:, None] & (column < D)[None, :],
            other=0.0,
        )  # fmt: skip
        states = tl.load(
            hidden + token[None, :] * D + column[:, None], mask=(token < tokens)[None, :] & (column < D)[:, None],
            other=0.0,
        )  # fmt: skip
        main, small = _multiply(rows, states, main, small, WEIGHT_PARTS, HIDDEN_PARTS, 3)
    tl.store(
        logits + token[None, :] * E + expert[:, None], main + small,
        mask=(token < tokens)[None, :] & (expert < E)[:, None],
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _hidden_gradient(
    grad_logits, weight, base, grad_hidden, tokens, D: tl.constexpr, E: tl.constexpr, BASE: tl.constexpr,
    WEIGHT_PARTS: tl.constexpr, ORDER: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """grad_logits @ weight for a block of tokens and columns, onto `base` with BASE."""
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    column = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    token = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    main = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    small = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(0, E, BLOCK_E):
        expert = start + tl.arange(0, BLOCK_E)
        grad = tl.load(
            grad_logits + token[:, None] * E + expert[None, :], mask=(token < tokens)[:, None] & (expert < E)[None, :],
            other=0.0,
        )  # fmt: skip
        rows = tl.load(
            weight + expert[:, None] * D + column[None, :], mask=(expert < E)[:, None] & (column < D)[None, :],
            other=0.0,
        )  # fmt: skip
        main, small = _multiply(grad, rows, main, small, 3, WEIGHT_PARTS, ORDER)
    place = token[:, None] * D + column[None, :]
    mask = (token < tokens)[:, None] & (column < D)[None, :]
    total = main + small
    if BASE:
        total += tl.load(base + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_hidden + place, total, mask=mask)


@triton.jit(do_not_specialize=["tokens", "chunk"])
def _weight_gradient(
    grad_logits, hidden, partial, tokens, chunk, D: tl.constexpr, E: tl.constexpr, HIDDEN_PARTS: tl.constexpr,
    ORDER: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Program (b, j): a block of grad_logits^T @ hidden over the tokens j * chunk .. (j + 1) * chunk."""
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    column = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    expert = tl.program_id(0) // blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    main = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    small = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    first = tl.program_id(1) * chunk
    for start in range(first, tl.minimum(first + chunk, tokens), BLOCK_T):
        token = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        grad = tl.load(
            grad_logits + token[None, :] * E + expert[:, None], mask=(token < tokens)[None, :] & (expert < E)[:, None],
            other=0.0,
        )  # fmt: skip
        states = tl.load(
            hidden + token[:, None] * D + column[None, :], mask=(token < tokens)[:, None] & (column < D)[None, :],
            other=0.0,
        )  # fmt: skip
        main, small = _multiply(grad, states, main, small, 3, HIDDEN_PARTS, ORDER)
    place = tl.program_id(1).to(tl.int64) * (E * D) + expert[:, None] * D + column[None, :]
    tl.store(partial + place, main + small, mask=(expert < E)[:, None] & (column < D)[None, :])


@triton.jit(do_not_specialize=["parts"])
def _sum_of_parts(partial, total, parts, SIZE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    part, place = tl.arange(0, BLOCK_P), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(
        partial + part.to(tl.int64)[:, None] * SIZE + place[None, :],
        mask=(part < parts)[:, None] & (place < SIZE)[None, :], other=0.0,
    )  # fmt: skip
    tl.store(total + place, tl.sum(values, 0), mask=place < SIZE)


def _block(size, least, most):
    return min(most, max(least, triton.next_power_of_2(size)))


@on_its_device
def logits_forward(hidden, weight):
    """(T, D) and (E, D), contiguous, each fp32, bf16 or fp16 -> (T, E) float32. Reads `hidden` E / 128 times."""
    (tokens, width), experts = hidden.shape, weight.shape[0]
    logits = torch.empty(tokens, experts, dtype=torch.float32, device=hidden.device)
    block_e, block_t = _block(experts, 16, 128), _block(tokens, 16, 64)
    if tokens:
        _logits[(triton.cdiv(tokens, block_t) * triton.cdiv(experts, block_e),)](
            hidden, weight, logits, tokens, D=width, E=experts, HIDDEN_PARTS=PARTS_OF[hidden.dtype],
            WEIGHT_PARTS=PARTS_OF[weight.dtype], BLOCK_E=block_e, BLOCK_T=block_t, BLOCK_D=_block(width, 16, 64),
            num_warps=4 if block_e < 128 and hidden.dtype == torch.bfloat16 else 8, num_stages=3,
        )  # fmt: skip
    return logits


@on_its_device
def hidden_gradient(grad_logits, weight, dtype, base=None):
    """(T, E) float32 and (E, D) -> their product (T, D) in `dtype`, added to `base` (T, D) where given."""
    (tokens, experts), width = grad_logits.shape, weight.shape[1]
    grad = torch.empty(tokens, width, dtype=dtype, device=weight.device)
    block_t, block_d = _block(tokens, 16, 64), _block(width, 16, 64)  # small: five programs a multiprocessor
    if tokens:
        _hidden_gradient[(triton.cdiv(tokens, block_t) * triton.cdiv(width, block_d),)](
            grad_logits, weight, grad if base is None else base, grad, tokens, D=width, E=experts,
            BASE=base is not None, WEIGHT_PARTS=PARTS_OF[weight.dtype], ORDER=3 if dtype == torch.float32 else 2,
            BLOCK_T=block_t, BLOCK_D=block_d, BLOCK_E=_block(experts, 16, 64), num_warps=4, num_stages=2,
        )  # fmt: skip
    return grad


@on_its_device
def weight_gradient(grad_logits, hidden, dtype):
    """(T, E) float32 and (T, D) -> grad_logits^T @ hidden (E, D) in `dtype`; the order of the sum is fixed."""
    (tokens, experts), width = grad_logits.shape, hidden.shape[1]
    block_e, block_d, block_t = _block(experts, 16, 64), _block(width, 16, 128), _block(tokens, 16, 64)
    blocks = triton.cdiv(width, block_d) * triton.cdiv(experts, block_e)
    # One program for each multiprocessor of an H100; its loads are ahead by two blocks.
    parts = max(1, min(32, 128 // blocks, triton.cdiv(tokens, 2 * block_t)))
    chunk = triton.cdiv(triton.cdiv(tokens, parts), block_t) * block_t
    partial = torch.empty(parts, experts, width, dtype=torch.float32, device=hidden.device)
    _weight_gradient[(blocks, parts)](
        grad_logits, hidden, partial, tokens, chunk, D=width, E=experts, HIDDEN_PARTS=PARTS_OF[hidden.dtype],
        ORDER=3 if dtype == torch.float32 else 2, BLOCK_E=block_e, BLOCK_D=block_d, BLOCK_T=block_t, num_warps=8,
        num_stages=3,
    )  # fmt: skip
    if parts == 1:
        return partial[0].to(dtype)
    grad = torch.empty(experts, width, dtype=dtype, device=hidden.device)
    _sum_of_parts[(triton.cdiv(experts * width, 128),)](
        partial, grad, parts, SIZE=experts * width, BLOCK_P=triton.next_power_of_2(parts), BLOCK=128, num_warps=4,
    )  # fmt: skip
    return grad


# ---- choices and their gradient ------------------------------------------------------------------------------------


@triton.jit
def _key(values):
    """fp32 -> int32 in the order of the numbers, what is not a number on top; never EXCLUDED."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(values != values, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _scores(logits, token, alive, expert, exists, E: tl.constexpr, SIGMOID: tl.constexpr):
    """-> logits and affinities (BLOCK_T, BLOCK_E) of the tokens; affinities are 0 where no expert is."""
    values = tl.load(
        logits + token[:, None] * E + expert[None, :], mask=alive[:, None] & exists[None, :], other=0.0
    )  # fmt: skip
    if SIGMOID:
        scores = tl.where(exists[None, :], tl.sigmoid(values), 0.0)
    else:
        scores = _softmax(values, exists)
    return values, scores


@triton.jit
def _softmax(values, exists):
    values = tl.where(exists[None, :], values, -float("inf"))
    powers = tl.exp(values - tl.max(values, 1)[:, None])
    return powers / tl.sum(powers, 1)[:, None]


@triton.jit
def _keep_best_groups(
    choice, key, GROUPS: tl.constexpr, KEPT: tl.constexpr, SUM_OF_TWO: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Keys (BLOCK_T, BLOCK_G * BLOCK_P), EXCLUDED outside the KEPT groups of highest score."""
    grouped = tl.reshape(choice, (BLOCK_T, BLOCK_G, BLOCK_P))
    place, group = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_G)
    score = tl.max(grouped, 2)
    if SUM_OF_TWO:
        best = tl.argmax(tl.reshape(key, (BLOCK_T, BLOCK_G, BLOCK_P)), 2)
        score += tl.max(tl.where(place[None, None, :] == best[:, :, None], -float("inf"), grouped), 2)
    group_key = tl.where((group < GROUPS)[None, :], _key(score), EXCLUDED)
    kept = tl.zeros((BLOCK_T, BLOCK_G), tl.int32)
    for _ in tl.static_range(KEPT):
        taken = group[None, :] == tl.argmax(group_key, 1)[:, None]
        kept = tl.where(taken, 1, kept)
        group_key = tl.where(taken, EXCLUDED, group_key)
    kept = tl.broadcast_to(kept[:, :, None], (BLOCK_T, BLOCK_G, BLOCK_P))
    return tl.where(tl.reshape(kept, (BLOCK_T, BLOCK_G * BLOCK_P)) == 1, key, EXCLUDED)


@triton.jit(do_not_specialize=["rows", "length", "blocks"])
def _route(
    logits, bias, routes, token_mask, loss_scale, weights, indices, counts, kept_scale, rows, length, blocks, scaling,
    E: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr,
    BIAS: tl.constexpr, SUM_OF_TWO: tl.constexpr, NORMALISE: tl.constexpr, ROUTES: tl.constexpr, COUNTED: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Choices of BLOCK_T tokens of one row. A tile has BLOCK_G * BLOCK_P places, those past a group's end empty."""
    per_group: tl.constexpr = E // GROUPS
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    place = block * BLOCK_T + tl.arange(0, BLOCK_T)
    alive, token = place < length, row.to(tl.int64) * length + place
    flat, lanes = tl.arange(0, BLOCK_G * BLOCK_P), tl.arange(0, BLOCK_K)
    expert = flat // BLOCK_P * per_group + flat % BLOCK_P
    exists = (flat // BLOCK_P < GROUPS) & (flat % BLOCK_P < per_group)
    _, scores = _scores(logits, token, alive, expert, exists, E, SIGMOID)
    choice = scores
    if BIAS:
        choice += tl.load(bias + expert, mask=exists, other=0.0)[None, :]
    choice = tl.where(exists[None, :], choice, -float("inf"))
    key = _key(choice)
    if GROUPS > 1:
        key = _keep_best_groups(choice, key, GROUPS, KEPT, SUM_OF_TWO, BLOCK_T, BLOCK_G, BLOCK_P)
    key = tl.where(exists[None, :], key, EXCLUDED)
    if ROUTES:
        given = tl.load(routes + token * K, mask=alive, other=-1) >= 0
    index = tl.zeros((BLOCK_T, BLOCK_K), tl.int64)
    weight = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    chosen = tl.zeros((BLOCK_T, BLOCK_G * BLOCK_P), tl.int32)
    for k in tl.static_range(K):
        best = tl.argmax(key, 1)
        number = best // BLOCK_P * per_group + best % BLOCK_P
        if ROUTES:
            named = tl.load(routes + token * K + k, mask=alive, other=0).to(tl.int32)
            number = tl.where(given, named, number)
            best = tl.where(given, named // per_group * BLOCK_P + named % per_group, best)
        taken = flat[None, :] == best[:, None]
        key = tl.where(taken, EXCLUDED, key)
        chosen += taken.to(tl.int32)
        index = tl.where(lanes[None, :] == k, number.to(tl.int64)[:, None], index)
        weight = tl.where(lanes[None, :] == k, tl.sum(tl.where(taken, scores, 0.0), 1)[:, None], weight)
    if NORMALISE:
        weight = weight / tl.maximum(tl.sum(weight, 1), 1e-20)[:, None]
    pair, mask = token[:, None] * K + lanes[None, :], alive[:, None] & (lanes < K)[None, :]
    tl.store(indices + pair, index, mask=mask)
    tl.store(weights + pair, weight * scaling, mask=mask)
    if COUNTED:
        counted = alive
        if MASKED:
            counted = counted & (tl.load(token_mask + token, mask=alive, other=0) != 0)
        load = tl.sum(tl.where(counted[:, None], chosen, 0), 0)
        # Sums of integers: the same in any order.
        tl.atomic_add(counts + row.to(tl.int64) * E + expert, load, mask=exists & (load > 0), sem="relaxed")
        tl.atomic_add(counts + rows.to(tl.int64) * E + row, tl.sum(counted.to(tl.int32), 0), sem="relaxed")
        tl.store(kept_scale, tl.load(loss_scale))  # every program the same number


@triton.jit(do_not_specialize=["rows", "length", "blocks"])
def _route_gradient(
    grad_weights, logits, indices, token_mask, counts, kept_scale, load_counts, grad_logits, rows, length, blocks,
    scaling, balance_alpha, z_loss_coef,
    E: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr,
    COUNTED: tl.constexpr, MASKED: tl.constexpr, BALANCE: tl.constexpr, Z_LOSS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    place = block * BLOCK_T + tl.arange(0, BLOCK_T)
    alive, token = place < length, row.to(tl.int64) * length + place
    expert = tl.arange(0, BLOCK_E)
    exists = expert < E
    values, scores = _scores(logits, token, alive, expert, exists, E, SIGMOID)
    grad = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    chosen = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for k in tl.static_range(K):
        index = tl.load(indices + token * K + k, mask=alive, other=0).to(tl.int32)
        gate_grad = tl.load(grad_weights + token * K + k, mask=alive, other=0.0)
        taken = expert[None, :] == index[:, None]
        grad += tl.where(taken, gate_grad[:, None], 0.0)
        chosen += tl.where(taken, 1.0, 0.0)
    if NORMALISE:
        total = tl.sum(chosen * scores, 1)
        mean = tl.where(total >= 1e-20, tl.sum(grad * scores, 1) / tl.maximum(total, 1e-20), 0.0)
        grad = (grad - chosen * mean[:, None]) / tl.maximum(total, 1e-20)[:, None]
    grad = grad * scaling

    if COUNTED:
        load = tl.load(counts + row.to(tl.int64) * E + expert, mask=exists, other=0)
        tl.atomic_add(
            load_counts + expert, load.to(tl.int64), mask=exists & (load > 0) & (block == 0), sem="relaxed"
        )  # fmt: skip
        scale = tl.load(kept_scale)
        counted = tl.where(alive, 1.0, 0.0)
        row_tokens = tl.load(counts + rows.to(tl.int64) * E + row).to(tl.float32)
        if MASKED:
            counted = tl.where(tl.load(token_mask + token, mask=alive, other=0) != 0, 1.0, 0.0)
            seen, present = tl.zeros((BLOCK_R,), tl.int32), tl.zeros((BLOCK_R,), tl.int32)
            for start in range(0, rows, BLOCK_R):
                other_row = start + tl.arange(0, BLOCK_R)
                tokens = tl.load(counts + rows.to(tl.int64) * E + other_row, mask=other_row < rows, other=0)
                seen += tokens
                present += (tokens > 0).to(tl.int32)
            all_tokens, sequences = tl.sum(seen, 0).to(tl.float32), tl.sum(present, 0).to(tl.float32)
        else:
            all_tokens, sequences = rows.to(tl.float32) * length.to(tl.float32), rows.to(tl.float32)
        if BALANCE:
            row_tokens = tl.maximum(row_tokens, 1.0)
            frequency = load.to(tl.float32) * E / (K * row_tokens)                           # V3, Eq. 18
            share_grad = balance_alpha * scale / tl.maximum(sequences, 1.0) * frequency / row_tokens   # Eqs. 17, 20
            share_grad = counted[:, None] * share_grad[None, :]
            total = tl.sum(scores, 1)
            mean = tl.where(total >= 1e-20, tl.sum(share_grad * scores, 1) / tl.maximum(total, 1e-20), 0.0)
            grad += (share_grad - mean[:, None]) / tl.maximum(total, 1e-20)[:, None]         # Eq. 19
    if SIGMOID:
        grad = grad * scores * (1.0 - scores)
    else:
        grad = scores * (grad - tl.sum(grad * scores, 1)[:, None])
    if COUNTED:
        if Z_LOSS:                                                                           # ST-MoE, Eq. 5
            real = tl.where(exists[None, :], values, -float("inf"))
            top = tl.max(real, 1)
            powers = tl.exp(real - top[:, None])
            sums = tl.sum(powers, 1)
            factor = 2.0 * z_loss_coef * scale * counted / tl.maximum(all_tokens, 1.0) * (top + tl.log(sums)) / sums
            grad += factor[:, None] * powers
    tl.store(grad_logits + token[:, None] * E + expert[None, :], grad, mask=alive[:, None] & exists[None, :])


def _tokens_a_program(places, length):
    """About 2,048 places: 16 for each thread of four warps."""
    return max(1, min(32, 2048 // places, triton.next_power_of_2(length)))


@on_its_device
def route_forward(logits, bias, loss_scale, routes, token_mask, rows, rule):
    """-> weights (T, K) float32, indices (T, K) int64, and where `loss_scale` is given counts (R * E + R,) int32 (what
    each row gave each expert, then the rows' unmasked tokens) and a copy of the scale; `rule`: `RoutingRule`."""
    tokens, experts = logits.shape
    length, device = tokens // rows if rows else 0, logits.device
    weights = torch.empty(tokens, rule.top_k, dtype=torch.float32, device=device)
    indices = torch.empty(tokens, rule.top_k, dtype=torch.int64, device=device)
    counts = kept_scale = None
    if loss_scale is not None:
        counts = torch.zeros(rows * (experts + 1), dtype=torch.int32, device=device)
        kept_scale = torch.empty_like(loss_scale) if tokens else loss_scale.clone()
    block_g, block_p = triton.next_power_of_2(rule.n_group), triton.next_power_of_2(experts // rule.n_group)
    block_t = _tokens_a_program(block_g * block_p, length)
    blocks = triton.cdiv(length, block_t)
    unused = logits
    if tokens:
        _route[(rows * blocks,)](
            logits, unused if bias is None else bias, unused if routes is None else routes,
            unused if token_mask is None else token_mask.view(torch.uint8), unused if counts is None else loss_scale,
            weights, indices, unused if counts is None else counts, unused if counts is None else kept_scale,
            rows, length, blocks, float(rule.scaling), E=experts, GROUPS=rule.n_group, KEPT=rule.topk_group,
            K=rule.top_k, SIGMOID=rule.scoring == "sigmoid", BIAS=bias is not None,
            SUM_OF_TWO=rule.group_score == "sum2", NORMALISE=bool(rule.norm_topk), ROUTES=routes is not None,
            COUNTED=counts is not None, MASKED=token_mask is not None, BLOCK_T=block_t, BLOCK_G=block_g,
            BLOCK_P=block_p, BLOCK_K=triton.next_power_of_2(rule.top_k), num_warps=4,
        )  # fmt: skip
    return weights, indices, counts, kept_scale


@on_its_device
def route_backward(grad_weights, logits, indices, token_mask, counts, kept_scale, load_counts, rows, rule):
    """-> the gradient of the logits (T, E) float32; with `counts` the losses' too, and `load_counts` is increased."""
    tokens, experts = logits.shape
    length = tokens // rows if rows else 0
    grad_logits = torch.empty_like(logits)
    block_e = triton.next_power_of_2(experts)
    block_t = _tokens_a_program(block_e, length)
    blocks = triton.cdiv(length, block_t)
    unused, counted = logits, counts is not None
    if tokens:
        _route_gradient[(rows * blocks,)](
            grad_weights, logits, indices, unused if token_mask is None else token_mask.view(torch.uint8),
            counts if counted else unused, kept_scale if counted else unused, load_counts if counted else unused,
            grad_logits, rows, length, blocks, float(rule.scaling), float(rule.balance_alpha), float(rule.z_loss_coef),
            E=experts, K=rule.top_k, SIGMOID=rule.scoring == "sigmoid",
            NORMALISE=bool(rule.norm_topk), COUNTED=counted, MASKED=counted and token_mask is not None,
            BALANCE=bool(rule.balance_alpha), Z_LOSS=bool(rule.z_loss_coef), BLOCK_T=block_t, BLOCK_E=block_e,
            BLOCK_R=min(1024, triton.next_power_of_2(rows)), num_warps=4,
        )  # fmt: skip
    return grad_logits
