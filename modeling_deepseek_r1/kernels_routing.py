"""Routing for few tokens in Triton: norm, logits, choices, gate values, and a list of pairs for each expert.

Names in shapes: T tokens, D hidden_size, E experts, K choices. A pair is numbered t * K + k.
"""

import torch

from .kernels_launch import ahead, wait_for_inputs
from .kernels_linear import linear_blocks, rows_times_tile

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the fast kernels need triton, which torch brings on Linux with CUDA") from missing


@triton.jit
def _select_experts(
    logits, bias, topk_index, topk_weight, expert_count, expert_tokens, list_stride, first, tokens, scaling,
    E: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, K: tl.constexpr,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, SUM_OF_TWO: tl.constexpr, NORMALISE: tl.constexpr, LISTS: tl.constexpr,
    T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The choices of tokens first .. first + T - 1; a tile is (T, BLOCK_G groups, BLOCK_P experts of a group)."""
    per_group: tl.constexpr = E // GROUPS
    token = first + tl.arange(0, T)
    group, place = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_P)
    expert = group[:, None] * per_group + place[None, :]
    exists = ((group < GROUPS)[:, None] & (place < per_group)[None, :])[None, :, :]
    # Past the first-level cache: other multiprocessors may have written the logits within this very launch.
    scores = tl.load(
        logits + token[:, None, None] * E + expert[None, :, :],
        mask=exists & (token < tokens)[:, None, None], other=0.0, cache_modifier=".cg",
    )  # fmt: skip
    if SIGMOID:
        scores = tl.sigmoid(scores)
    else:
        scores = tl.where(exists, scores, -float("inf"))
        scores = tl.exp(scores - tl.max(tl.max(scores, 2), 1)[:, None, None])
        scores = scores / tl.sum(tl.sum(scores, 2), 1)[:, None, None]
    choice = scores
    if BIAS:
        choice += tl.load(bias + expert, mask=(group < GROUPS)[:, None] & (place < per_group)[None, :], other=0.0)[None]
    choice = tl.where(exists, choice, -float("inf"))
    if GROUPS > 1:
        group_score = tl.max(choice, 2)
        if SUM_OF_TWO:
            best = tl.argmax(choice, 2)
            rest = tl.where(place[None, None, :] == best[:, :, None], -float("inf"), choice)
            group_score += tl.max(rest, 2)
        kept = tl.zeros((T, BLOCK_G), tl.int32)
        for _ in tl.static_range(KEPT):
            best = tl.argmax(group_score, 1)
            taken = group[None, :] == best[:, None]
            kept = tl.where(taken, 1, kept)
            group_score = tl.where(taken, -float("inf"), group_score)
        choice = tl.where(kept[:, :, None] == 1, choice, -float("inf"))

    choice = tl.reshape(choice, (T, BLOCK_G * BLOCK_P))
    scores = tl.reshape(scores, (T, BLOCK_G * BLOCK_P))
    flat, lanes = tl.arange(0, BLOCK_G * BLOCK_P), tl.arange(0, BLOCK_K)
    if T * BLOCK_G * BLOCK_P * BLOCK_G * BLOCK_P <= 16384:
        # All places at once, by counting who is better: the loop below waits for K reductions, one after the other.
        better = choice[:, None, :] > choice[:, :, None]
        better = better | ((choice[:, None, :] == choice[:, :, None]) & (flat[None, None, :] < flat[None, :, None]))
        place_of = tl.sum(better.to(tl.int32), 2)
        taken = place_of[:, None, :] == lanes[None, :, None]
        number = flat // BLOCK_P * per_group + flat % BLOCK_P
        # Not a number anywhere may give several experts one place; the number of an expert it must stay.
        index = tl.minimum(tl.sum(tl.where(taken, number[None, None, :], 0), 2), E - 1)
        weight = tl.sum(tl.where(taken & (lanes < K)[None, :, None], scores[:, None, :], 0.0), 2)
    else:
        index = tl.zeros((T, BLOCK_K), tl.int32)
        weight = tl.zeros((T, BLOCK_K), tl.float32)
        for k in tl.static_range(K):
            best = tl.argmax(choice, 1)
            taken = flat[None, :] == best[:, None]
            gate = tl.sum(tl.where(taken, scores, 0.0), 1)
            choice = tl.where(taken, -float("inf"), choice)
            chosen = tl.minimum(best // BLOCK_P * per_group + best % BLOCK_P, E - 1)
            index = tl.where(lanes[None, :] == k, chosen[:, None], index)
            weight = tl.where(lanes[None, :] == k, gate[:, None], weight)
    if NORMALISE:
        weight = weight / tl.maximum(tl.sum(weight, 1), 1e-20)[:, None]
    pair = token[:, None] * K + lanes[None, :]
    mask = (token < tokens)[:, None] & (lanes < K)[None, :]
    tl.store(topk_index + pair, index, mask=mask)
    tl.store(topk_weight + pair, weight * scaling, mask=mask)
    if LISTS:
        rank = tl.atomic_add(expert_count + index, 1, mask=mask, sem="relaxed")
        tl.store(expert_tokens + index.to(tl.int64) * list_stride + rank, pair, mask=mask)


@triton.jit(do_not_specialize=["tokens", "list_stride"])
def _router_logits(
    x, norm_weight, norm_eps, gate_weight, bias, normed, logits, tickets,
    topk_index, topk_weight, expert_count, expert_tokens, list_stride, x_stride, tokens, scaling,
    D: tl.constexpr, E: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, K: tl.constexpr,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, SUM_OF_TWO: tl.constexpr, NORMALISE: tl.constexpr, LISTS: tl.constexpr,
    TICKETS: tl.constexpr, T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Program (b, j): the logits of experts b * BLOCK_E ... for T tokens from j * T on; with TICKETS the last one of
    a column to finish also selects, which saves a launch."""
    block, first = tl.program_id(0), tl.program_id(1) * T
    rows = block * BLOCK_E + tl.arange(0, BLOCK_E)
    product = rows_times_tile(
        gate_weight + rows * D, rows < E, x + first * x_stride, x_stride, tokens - first, norm_weight, norm_eps,
        normed + first * D, block == 0, D, T, True, True, BLOCK_E, BLOCK_D, AHEAD,
    )  # fmt: skip
    token = first + tl.arange(0, T)
    tl.store(logits + token[None, :] * E + rows[:, None], product, mask=(rows < E)[:, None] & (token < tokens)[None, :])
    if TICKETS:
        tl.debug_barrier()  # every thread's logits are written before the ticket is drawn
        drawn = tl.atomic_add(tickets + tl.program_id(1), 1, sem="acq_rel")
        if drawn == tl.num_programs(0) - 1:
            tl.store(tickets + tl.program_id(1), 0)
            _select_experts(
                logits, bias, topk_index, topk_weight, expert_count, expert_tokens, list_stride, first, tokens, scaling,
                E, GROUPS, KEPT, K, SIGMOID, BIAS, SUM_OF_TWO, NORMALISE, LISTS, T, BLOCK_G, BLOCK_P, BLOCK_K,
            )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "list_stride"])
def _router_choices(
    logits, bias, topk_index, topk_weight, expert_count, expert_tokens, list_stride, tokens, scaling,
    E: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, K: tl.constexpr,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, SUM_OF_TWO: tl.constexpr, NORMALISE: tl.constexpr, LISTS: tl.constexpr,
    T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(AHEAD)
    _select_experts(
        logits, bias, topk_index, topk_weight, expert_count, expert_tokens, list_stride, tl.program_id(0) * T, tokens,
        scaling, E, GROUPS, KEPT, K, SIGMOID, BIAS, SUM_OF_TWO, NORMALISE, LISTS, T, BLOCK_G, BLOCK_P, BLOCK_K,
    )  # fmt: skip


def route(
    x, norm_weight, norm_eps, gate_weight, bias, normed, topk_index, topk_weight, expert_count, expert_tokens,
    scoring, n_group, topk_group, group_score, top_k, norm_topk, scaling, logits=None, tickets=None,
):  # fmt: skip
    """Norm, router and the experts' lists: see `decoding_experts.route_twin` for what is computed.

    Two launches, logits by many programs and then the choices; one with `tickets`: the program that finishes last
    chooses. Ties go to either expert; the order within a list is not fixed (no result depends on it).

    Shapes: x, normed (T, D); norm_weight (D,); gate_weight (E, D); bias (E,) float32 or None; topk_index (T, K) int32;
    topk_weight (T, K) float32; expert_count (E,) int32, zero at entry, and expert_tokens (E, at least T) int32, or both
    None: no lists (few tokens do without); logits (T, E) float32 scratch or None; tickets (at least T,) int32, zero at
    entry and left zero, or None. All contiguous.
    Raises:
        ValueError: for scoring other than "sigmoid" and "softmax", group_score other than "sum2" and "max", groups
            that do not divide E or keep fewer than K experts.
    """
    (tokens, width), experts = x.shape, gate_weight.shape[0]
    rule = (scoring, n_group, topk_group, group_score, top_k, norm_topk)
    choice = _choice_constants(experts, bias, *rule) | {"LISTS": expert_count is not None}
    rows = min(8, triton.next_power_of_2(tokens))
    logits = torch.empty(tokens, experts, dtype=torch.float32, device=x.device) if logits is None else logits
    lists = (topk_index, topk_weight, expert_count, expert_tokens)
    given = lists if expert_count is not None else (topk_index, topk_weight, topk_index, topk_index)
    blocks = linear_blocks(rows, experts, width, gate_weight.element_size())
    block_e = min(blocks["BLOCK_N"], max(1, experts // 64))
    _router_logits[(triton.cdiv(experts, block_e), triton.cdiv(tokens, rows))](
        x, norm_weight, norm_eps, gate_weight, logits if bias is None else bias, normed, logits,
        logits if tickets is None else tickets, *given, given[3].stride(0), x.stride(0), tokens, scaling, D=width,
        TICKETS=tickets is not None, T=rows, **choice, BLOCK_E=block_e, BLOCK_D=blocks["BLOCK_K"], num_warps=4,
        **ahead(x.device),
    )  # fmt: skip
    if tickets is None:
        choose_experts(logits, bias, *lists, *rule, scaling)


def choose_experts(
    logits, bias, topk_index, topk_weight, expert_count, expert_tokens,
    scoring, n_group, topk_group, group_score, top_k, norm_topk, scaling,
):  # fmt: skip
    """What `route` does behind the logits (T, E) float32, where these come from elsewhere; arguments as there."""
    tokens, experts = logits.shape
    choice = _choice_constants(experts, bias, scoring, n_group, topk_group, group_score, top_k, norm_topk)
    choice["LISTS"] = expert_count is not None
    lists = (expert_count, expert_tokens) if choice["LISTS"] else (topk_index, topk_index)
    # A chain of small reductions: one warp has nobody to wait for, and few rows in each let a batch fill the card.
    rows = triton.next_power_of_2(max(1, min(4, 128 // experts)))
    _router_choices[(triton.cdiv(tokens, rows),)](
        logits, logits if bias is None else bias, topk_index, topk_weight, *lists, lists[1].stride(0), tokens,
        scaling, T=rows, **choice, num_warps=1, **ahead(logits.device),
    )  # fmt: skip


def has_exact_product(x, gate_weight):
    """Whether `torch.mm(x, gate_weight.t(), out_dtype=torch.float32)` gives router logits: on CUDA, both in bf16 or
    fp16, whose products fp32 holds exactly; they are summed and left in fp32."""
    half = x.dtype == gate_weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    return half and x.is_cuda and "dtype" in torch.ops.aten.mm.overloads()


def _choice_constants(experts, bias, scoring, n_group, topk_group, group_score, top_k, norm_topk):
    """Constexprs of `_select_experts`, all but the tokens a program takes."""
    _check_routing(experts, scoring, n_group, topk_group, group_score, top_k)
    return dict(
        E=experts, GROUPS=n_group, KEPT=topk_group, K=top_k, SIGMOID=scoring == "sigmoid", BIAS=bias is not None,
        SUM_OF_TWO=group_score == "sum2", NORMALISE=bool(norm_topk),
        BLOCK_G=triton.next_power_of_2(n_group), BLOCK_P=triton.next_power_of_2(experts // n_group),
        BLOCK_K=triton.next_power_of_2(top_k),
    )  # fmt: skip


def _check_routing(experts, scoring, n_group, topk_group, group_score, top_k):
    if scoring not in ("sigmoid", "softmax") or group_score not in ("sum2", "max"):
        raise ValueError(f"scoring={scoring!r}, group_score={group_score!r}: use sigmoid or softmax, sum2 or max")
    if experts % n_group or not 1 <= topk_group <= n_group or top_k > topk_group * (experts // n_group):
        raise ValueError(
            f"n_group={n_group} must divide {experts} experts, and topk_group={topk_group} of them hold top_k={top_k}"
        )
    if group_score == "sum2" and 1 < n_group and experts // n_group < 2:
        raise ValueError(f"n_group={n_group} leaves one of {experts} experts a group; 'sum2' needs two: use 'max'")


@triton.jit(do_not_specialize=["pairs", "list_stride"])
def _list_pairs(topk_index, expert_count, expert_tokens, list_stride, pairs, E: tl.constexpr, BLOCK: tl.constexpr):
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(topk_index + pair, mask=pair < pairs, other=E).to(tl.int64)
    rank = tl.atomic_add(expert_count + expert, 1, mask=expert < E, sem="relaxed")
    tl.store(expert_tokens + expert * list_stride + rank, pair, mask=expert < E)


def list_pairs(topk_index, expert_count, expert_tokens):
    """Fills the experts' lists from given indices (T, K) int32 or int64; an index of E is left out. As `route`."""
    _list_pairs[(triton.cdiv(topk_index.numel(), 128),)](
        topk_index, expert_count, expert_tokens, expert_tokens.stride(0), topk_index.numel(),
        E=expert_count.shape[0], BLOCK=128, num_warps=4,
    )  # fmt: skip
