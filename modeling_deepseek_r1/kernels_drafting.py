"""Triton kernels around the layers of a step: its beginning, the head with its argmax, and the decisions at its end.

None of them computes much. What they save is launches: a small model's step is a chain of kernels of three microseconds
each, and in torch the end of a step with drafts alone was more than fifty of them.

Best tokens travel as packed int64 pairs (score, token), of which the larger wins: the programs of the head put theirs
into one of a few slots by an atomic maximum, which has the same result in any order; the kernel that reads them
resets the slots. Each kernel has a torch twin of the same signature in `decoding_rows` (`*_reference`).
"""

import torch

from .decoding_rows import LOWEST
from .kernels_launch import ahead, wait_for_inputs
from .kernels_linear import MAX_ROWS, linear_blocks
from .kernels_sampling import MANY_ROWS, STRIDE, _pack, _race_kernel, _token_of

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the fast kernels need triton, which torch brings on Linux with CUDA") from missing

NOTHING = tl.constexpr(LOWEST)


@triton.jit
def _normed(values, gain, eps, D: tl.constexpr, dtype: tl.constexpr):
    """RMS norm of one row (BLOCK_D,) fp32, zeros behind D; rounded to `dtype`, as fp32."""
    return (values * tl.rsqrt(tl.sum(values * values, 0) / D + eps) * gain).to(dtype).to(tl.float32)


@triton.jit
def _feed(token, state, embedding, norm, enorm, hnorm, eps, output, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """output (2 D,) = [enorm(embedding[token]); hnorm(norm(state))]; `state`: pointer to (D,)."""
    cols = tl.arange(0, BLOCK_D)
    inside = cols < D
    dtype: tl.constexpr = output.dtype.element_ty
    first = tl.load(embedding + token.to(tl.int64) * D + cols, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(state + cols, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(norm + cols, mask=inside, other=0.0).to(tl.float32)
    first_gain = tl.load(enorm + cols, mask=inside, other=0.0).to(tl.float32)
    second_gain = tl.load(hnorm + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + cols, _normed(first, first_gain, eps, D, dtype), mask=inside)
    second = _normed(_normed(second, gain, eps, D, dtype), second_gain, eps, D, dtype)
    tl.store(output + D + cols, second, mask=inside)


@triton.jit(do_not_specialize=["count"])
def _begin_kernel(tokens, embedding, hidden, counts, rows, count, D: tl.constexpr, BLOCK_D: tl.constexpr,
                  BLOCK: tl.constexpr, AHEAD: tl.constexpr):
    wait_for_inputs(AHEAD)
    program = tl.program_id(0)
    if program < rows:
        cols = tl.arange(0, BLOCK_D)
        row = tl.load(embedding + tl.load(tokens + program).to(tl.int64) * D + cols, mask=cols < D, other=0.0)
        tl.store(hidden + program.to(tl.int64) * D + cols, row, mask=cols < D)
    else:
        place = (program - rows) * BLOCK + tl.arange(0, BLOCK)
        tl.store(counts + place, tl.zeros([BLOCK], tl.int32), mask=place < count)


@triton.jit(do_not_specialize=["tokens"])
def _best_tokens_kernel(
    x, picks, weight, norm_weight, norm_eps, winners, tokens,
    V: tl.constexpr, K: tl.constexpr, T: tl.constexpr, SLOTS: tl.constexpr, PICK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Program p: the scores of BLOCK_N tokens for all T rows, and the best of them into slot p % SLOTS of each row."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < V
    pointers = weight + rows.to(tl.int64) * K
    lanes = tl.arange(0, T)
    dtype: tl.constexpr = x.dtype.element_ty
    scores = tl.zeros((BLOCK_N, T), tl.float32)
    squares = tl.zeros((T,), tl.float32)
    if K > BLOCK_K:
        wait_for_inputs(AHEAD)
        for start in tl.range(0, K, BLOCK_K):
            cols = start + tl.arange(0, BLOCK_K)
            for t in tl.static_range(T):
                source = t if not PICK else tl.load(picks + t, mask=t < tokens, other=0)
                row = tl.load(x + source * K + cols, mask=(cols < K) & (t < tokens), other=0.0).to(tl.float32)
                squares = tl.where(lanes == t, squares + tl.sum(row * row, 0), squares)
    for start in tl.range(0, K, BLOCK_K, num_stages=3):
        cols = start + tl.arange(0, BLOCK_K)
        # Read before the norm is computed: the slow loads are on their way meanwhile.
        tile = tl.load(pointers[:, None] + cols[None, :], mask=inside[:, None] & (cols < K)[None, :], other=0.0)
        gain = tl.load(norm_weight + cols, mask=cols < K, other=0.0).to(tl.float32)
        if K <= BLOCK_K:
            wait_for_inputs(AHEAD)
        for t in tl.static_range(T):
            source = t if not PICK else tl.load(picks + t, mask=t < tokens, other=0)
            row = tl.load(x + source * K + cols, mask=(cols < K) & (t < tokens), other=0.0).to(tl.float32)
            if K > BLOCK_K:
                square = tl.sum(tl.where(lanes == t, squares, 0.0), 0)
            else:
                square = tl.sum(row * row, 0)
            row = (row * tl.rsqrt(square / K + norm_eps) * gain).to(dtype).to(tl.float32)
            part = tl.sum(tile.to(tl.float32) * row[None, :], 1)
            scores = tl.where((lanes == t)[None, :], scores + part[:, None], scores)
    scores = scores.to(dtype).to(tl.float32)  # ties as among the rounded logits of plain decoding
    scores = tl.where((scores == scores) & inside[:, None], scores, -float("inf"))
    scores = tl.where(scores == 0.0, 0.0, scores)
    best = tl.max(_pack(scores, rows[:, None] + lanes[None, :] * 0), 0)
    tl.atomic_max(winners + lanes * SLOTS + tl.program_id(0) % SLOTS, best, mask=lanes < tokens, sem="relaxed")


@triton.jit
def _advance_kernel(
    tokens, lengths, finished, best, given, eos_ids, seen, seen_from,
    cursor, base, limit, home, before, accepted, picks, following, statistics, chosen_out,
    hidden, norm, embedding, enorm, hnorm, eps, output, ROWS: tl.constexpr,
    S: tl.constexpr, BLOCK_S: tl.constexpr, PARTS: tl.constexpr, BLOCK_P: tl.constexpr, EOS: tl.constexpr,
    GIVEN: tl.constexpr, SEEN: tl.constexpr, V: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Program b: row b. PARTS > 0: `best` is packed; EOS ids (0: none); V > 0: `seen` has V columns; D > 0: feeds."""
    wait_for_inputs(AHEAD)
    row = tl.program_id(0)
    order = tl.arange(0, BLOCK_S)
    inside = order < S
    place = row * S + order
    if PARTS > 0:
        parts = tl.arange(0, BLOCK_P)
        slots = best + place[:, None].to(tl.int64) * PARTS + parts[None, :]
        there = inside[:, None] & (parts < PARTS)[None, :]
        chosen = _token_of(tl.max(tl.load(slots, mask=there, other=NOTHING), 1))
    else:
        chosen = tl.load(best + place, mask=inside, other=0)
    drafts = tl.load(tokens + place + 1, mask=order < S - 1, other=-1)
    if GIVEN:
        kept = tl.load(given + row).to(tl.int32)
    else:
        kept = tl.min(tl.where(inside & ((order == S - 1) | (chosen != drafts)), order, S), 0)
    active = tl.load(finished + row) == 0
    filled, longest = tl.load(cursor + row), tl.load(limit)
    length = tl.load(lengths + row)
    columns = filled + order
    noted = inside & (order <= kept) & (columns < longest) & active
    ends = inside & (order < 0)
    if EOS > 0:
        ids = tl.load(eos_ids + tl.arange(0, EOS))
        ends = inside & (tl.sum((chosen[:, None] == ids[None, :]).to(tl.int32), 1) > 0)
        noted = noted & (order <= tl.min(tl.where(ends, order, S), 0))
    count = tl.sum(noted.to(tl.int32), 0)
    done = (tl.sum((ends & noted).to(tl.int32), 0) > 0) | (filled + count >= longest)
    tl.debug_barrier()  # every thread has read what is now overwritten
    if PARTS > 0:
        tl.store(slots, tl.full([BLOCK_S, BLOCK_P], NOTHING, tl.int64), mask=there)
    sequences = tl.load(home).to(tl.pointer_type(tl.int64))
    tl.store(sequences + tl.load(base + row) + columns, chosen, mask=noted)
    if SEEN:
        tl.store(seen + row.to(tl.int64) * V + chosen, noted, mask=noted & (columns >= tl.load(seen_from + row)))
    tl.store(finished + row, (active == 0) | done)
    tl.store(cursor + row, filled + count)
    tl.store(before + row, length)
    tl.store(lengths + row, length + tl.where(active, kept + 1, 0))
    tl.store(accepted + row, kept)
    tl.store(picks + row, (row * S + kept).to(tl.int64))
    tl.store(following + order * ROWS + row, length + kept + 1 + order, mask=(order < S - 1) | (order == 0))
    tl.store(tokens + row * S, tl.sum(tl.where(order == kept, chosen, 0), 0))
    tl.store(chosen_out + place, chosen, mask=inside)
    counter = statistics + row * (2 * S) + order
    last = order == S - 1
    made = (active & (last | (columns < longest))).to(tl.int64)
    became = tl.where(last, count, (order < tl.minimum(kept, count)).to(tl.int32))
    tl.store(counter, tl.load(counter, mask=inside, other=0) + made, mask=inside)
    tl.store(counter + S, tl.load(counter + S, mask=inside, other=0) + became, mask=inside)
    if D > 0:
        for s in tl.static_range(S):
            token = tl.sum(tl.where(order == s, chosen, 0), 0)
            spot = (row * S + s).to(tl.int64)
            _feed(token, hidden + spot * D, embedding, norm, enorm, hnorm, eps, output + spot * 2 * D, D, BLOCK_D)


@triton.jit(do_not_specialize=["column"])
def _note_draft_kernel(
    tokens, column, winners, picks, hidden, norm, embedding, enorm, hnorm, eps, output,
    S: tl.constexpr, PARTS: tl.constexpr, BLOCK_P: tl.constexpr, PICK: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Program b: row b's draft, and the input of the next pass if D > 0."""
    wait_for_inputs(AHEAD)
    row = tl.program_id(0)
    parts = tl.arange(0, BLOCK_P)
    slots = winners + row.to(tl.int64) * PARTS + parts
    token = _token_of(tl.max(tl.load(slots, mask=parts < PARTS, other=NOTHING), 0))
    tl.debug_barrier()
    tl.store(slots, tl.full([BLOCK_P], NOTHING, tl.int64), mask=parts < PARTS)
    tl.store(tokens + row * S + column, token)
    if D > 0:
        spot = row.to(tl.int64)
        state = tl.load(picks + row).to(tl.int64) if PICK else spot
        _feed(token, hidden + state * D, embedding, norm, enorm, hnorm, eps, output + spot * 2 * D, D, BLOCK_D)


def _feed_arguments(feed, unused):
    """-> (pointers and eps for `_feed`, its constexprs, warps)."""
    if feed is None:
        return (unused,) * 5 + (0.0, unused), {"D": 0, "BLOCK_D": 1}, 1
    width = feed.hidden.shape[-1]
    block = triton.next_power_of_2(width)
    return tuple(feed), {"D": width, "BLOCK_D": block}, min(max(block // 256, 1), 8)


def begin(tokens, embedding, hidden, counts):
    """hidden (T, D) = embeddings (V, D) of tokens (T,) int64, and counts (int32 or None) = 0, in one launch."""
    rows, width = hidden.shape
    count = 0 if counts is None else counts.numel()
    _begin_kernel[(rows + triton.cdiv(count, 1024),)](
        tokens, embedding, hidden, tokens if counts is None else counts, rows, count,
        D=width, BLOCK_D=triton.next_power_of_2(width), BLOCK=1024, num_warps=4, **ahead(hidden.device),
    )  # fmt: skip


def best_tokens(hidden, norm, eps, weight, winners, picks=None):
    """See `best_tokens_reference`; for at most 8 rows, and `winners` with any number of slots.

    Raises:
        ValueError: for more rows.
    """
    tokens, width = len(hidden) if picks is None else len(picks), hidden.shape[-1]
    if not 1 <= tokens <= MAX_ROWS:
        raise ValueError(f"{tokens} rows: best_tokens takes 1 to {MAX_ROWS}; use F.linear and draw_tokens for more")
    blocks = linear_blocks(tokens, weight.shape[0], width, weight.element_size())
    _best_tokens_kernel[(triton.cdiv(weight.shape[0], blocks["BLOCK_N"]),)](
        hidden, winners if picks is None else picks, weight, norm, eps, winners, tokens, V=weight.shape[0], K=width,
        T=triton.next_power_of_2(tokens), SLOTS=winners.shape[-1], PICK=picks is not None, **blocks,
        **ahead(hidden.device),
    )  # fmt: skip


def best_of_logits(logits):
    """(T, V) contiguous logits of any number of rows -> (T, parts) packed, as `best_tokens` leaves them."""
    rows, vocab = logits.shape
    block, warps = (STRIDE // 2, 4) if rows >= MANY_ROWS else (STRIDE // 4, 8)
    parts = triton.cdiv(vocab, 4 * STRIDE) * (STRIDE // block)
    winners = torch.empty(rows, parts, dtype=torch.int64, device=logits.device)
    _race_kernel[(rows, parts)](
        logits, winners, logits, winners, VOCAB=vocab, HAS_TEMPERATURE=False, DRAW=False, STRIDE=STRIDE, BLOCK=block,
        num_warps=warps,
    )  # fmt: skip
    return winners


def advance(tokens, lengths, finished, best, state, eos_ids=None, accepted=None, seen=None, feed=None, packed=False):
    """The end of a step in one launch: see `advance_reference`. The sequences are found by `state.home`."""
    rows, steps = tokens.shape
    parts = best.shape[-1] if packed else 0
    chosen = torch.empty_like(tokens)
    fed, sizes, warps = _feed_arguments(feed, tokens)
    _advance_kernel[(rows,)](
        tokens, lengths, finished, best, tokens if accepted is None else accepted,
        tokens if eos_ids is None else eos_ids, *((finished, tokens) if seen is None else seen),
        state.cursor, state.base, state.limit, state.home, state.before, state.accepted, state.picks, state.following,
        state.statistics, chosen, *fed, ROWS=state.size, S=steps, BLOCK_S=triton.next_power_of_2(steps), PARTS=parts,
        BLOCK_P=triton.next_power_of_2(max(parts, 1)), EOS=0 if eos_ids is None else len(eos_ids),
        GIVEN=accepted is not None, SEEN=seen is not None, V=0 if seen is None else seen[0].shape[-1], **sizes,
        num_warps=warps, **ahead(tokens.device),
    )  # fmt: skip
    return chosen


def note_draft(tokens, column, winners, feed=None, picks=None):
    """tokens[:, column] = the best tokens, and the input of the next pass: see `note_draft_reference`."""
    parts = winners.shape[-1]
    fed, sizes, warps = _feed_arguments(feed, tokens)
    _note_draft_kernel[(len(tokens),)](
        tokens, column, winners, tokens if picks is None else picks, *fed, S=tokens.shape[1], PARTS=parts,
        BLOCK_P=triton.next_power_of_2(parts), PICK=picks is not None, **sizes, num_warps=warps,
        **ahead(tokens.device),
    )  # fmt: skip
