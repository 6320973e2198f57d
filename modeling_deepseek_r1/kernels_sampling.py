"""Triton kernels that choose tokens: filters without a sort, the draw, the end of a step, log-probabilities.

A draw is a race: the token with the largest p_i / e_i wins, e_i ~ Exponential(1), which is how `torch.multinomial`
draws one sample. The race needs no normalisation: argmax of score_i - log(e_i). The kernels make their own noise, so
that it never goes through memory: Philox, a hash of (seed, row, token), with a seed from torch's generator for each
step. So `torch.manual_seed` reproduces draws and CUDA graphs advance them, but they are others than
`torch.multinomial`'s at the same seed. Source of Philox4x32-10: Salmon et al., "Parallel random numbers" (SC 2011).

The filters look for a threshold instead of sorting the vocabulary. A cheap bound first (top-k: the k-th largest of the
maxima of disjoint subsets; top-p: tokens below (1 - p) / V together weigh less than 1 - p) leaves a shorter list of
candidates; then bisection over the scores' bit patterns is exact. Masses are summed as integers of 2^-62, so the result
does not depend on the order of the sums. One program serves one row.

Each kernel has a torch twin of the same signature (`*_reference`), which is also what runs without Triton.
"""

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda.libdevice import fast_log2f
except ImportError:  # the torch forms below serve then
    triton = None
else:
    INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

BLOCK, CANDIDATES, WARPS = 4096, 2048, 8
STRIDE = 2048  # one call of Philox gives four tokens their noise, this far apart: each word serves neighbours
MANY_ROWS = 64  # from here on the rows alone fill the card, and a program of the plain draw takes more tokens


if triton is not None:

    @triton.jit
    def _load_scores(logits, offsets, mask, inverse_temperature, HAS_TEMPERATURE: tl.constexpr):
        scores = tl.load(logits + offsets, mask=mask, other=-float("inf")).to(tl.float32)
        if HAS_TEMPERATURE:
            scores = scores * inverse_temperature
        return tl.where(scores == 0.0, 0.0, scores)  # -0 and 0 are equal scores: one bit pattern

    @triton.jit
    def _flip(bits):
        """fp32 bit patterns <-> signed integers in the order of the numbers (its own inverse)."""
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)

    @triton.jit
    def _key(scores):
        return _flip(scores.to(tl.int32, bitcast=True))

    @triton.jit
    def _mass(scores, shift, total):
        """Probabilities as multiples of 2^-62; above zero wherever the fp32 probability is."""
        probs = tl.exp(scores - shift) / total
        return tl.where(probs > 0.0, tl.maximum((probs * 4611686018427387904.0).to(tl.int64), 1), 0)

    @triton.jit
    def _pack(values, indices):
        """Larger value first, then smaller index, as one int64."""
        return (_key(values).to(tl.int64) << 32) | (0x7FFFFFFF - indices).to(tl.int64)

    @triton.jit
    def _token_of(packed):
        return 0x7FFFFFFF - (packed & 0x7FFFFFFF)

    @triton.jit
    def _random_words(seed, row, counter):
        """Four uint32 tensors of random bits for each int32 `counter` of a row; seed: pointer to two int64."""
        step = tl.load(seed + 1)
        low, high = step.to(tl.uint32) + counter * 0, (step >> 32).to(tl.uint32) + counter * 0
        return tl.philox(tl.load(seed), counter, counter * 0 + row, low, high)

    @triton.jit
    def _log2(x):
        """One instruction, off by 2^-22, where `tl.log2` takes 25: the draw is bound by arithmetic."""
        if INTERPRETED:
            return tl.log2(x)
        else:
            return fast_log2f(x)

    @triton.jit
    def _exponential(word):
        """-log2(1 - w), w = (word + 1/2) / 2^32: Exponential(1) / ln 2, relative error about 1e-5 at most.

        Neither w nor 1 - w is ever 0 or rounded off: the smaller of both is what is converted to fp32.
        """
        signed = word.to(tl.int32, bitcast=True)
        smaller = ((signed ^ (signed >> 31)).to(tl.float32) + 0.5) * 2.3283064365386963e-10
        series = smaller * (1.0 + smaller * (0.5 + smaller * (1 / 3 + smaller * 0.25))) * 1.4426950408889634
        logarithm = -_log2(tl.where(signed >= 0, 1.0 - smaller, smaller))
        return tl.where((signed >= 0) & (smaller < 0.015625), series, logarithm)

    @triton.jit
    def _race(scores, word):
        """The value whose largest wins, in base 2; a token without a score never does."""
        return scores * 1.4426950408889634 - _log2(_exponential(word))

    @triton.jit
    def _race_of_tokens(scores, seed, row, token, STRIDE: tl.constexpr):
        """`_race` of any tokens of a row; `_race_kernel` uses all four words of a call."""
        counter = token // (4 * STRIDE) * STRIDE + token % STRIDE
        first, second, third, fourth = _random_words(seed, row, counter)
        place = token // STRIDE % 4
        word = tl.where(place < 2, tl.where(place == 0, first, second), tl.where(place == 2, third, fourth))
        return _race(scores, word)

    @triton.jit
    def _select_kernel(
        logits, seed, inverse_temperature, top_k, one_minus_p, min_p, keys, filtered, tokens,
        VOCAB: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
        MIN_P: tl.constexpr, DRAW: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64) * VOCAB
        logits += row
        keys += row
        lane = tl.arange(0, BLOCK)
        scale = tl.load(inverse_temperature) if HAS_TEMPERATURE else 1.0

        # 1. The largest score, and the total mass if top-p comes first.
        lane_max = tl.full([BLOCK], -float("inf"), tl.float32)
        lane_sum = tl.zeros([BLOCK], tl.float32)
        for start in range(0, VOCAB, BLOCK):
            offsets = start + lane
            scores = _load_scores(logits, offsets, offsets < VOCAB, scale, HAS_TEMPERATURE)
            new_max = tl.maximum(lane_max, scores)
            if TOP_P and not TOP_K:
                safe = tl.where(new_max == -float("inf"), 0.0, new_max)
                lane_sum = lane_sum * tl.exp(lane_max - safe) + tl.exp(scores - safe)
            lane_max = new_max
        largest = tl.max(lane_max, 0)
        shift = tl.where(largest == -float("inf"), 0.0, largest)
        total = tl.maximum(tl.sum(lane_sum * tl.exp(lane_max - shift), 0), 1.0)  # the largest score weighs 1

        # 2. A bound below which everything is certainly removed.
        k = 0
        limit = tl.zeros([], tl.int64)
        bound = largest
        if TOP_P:
            allowance = tl.load(one_minus_p)
            limit = (allowance.to(tl.float64) * 4611686018427387904.0).to(tl.int64)
            bound = shift + tl.log(total * allowance / VOCAB) - 1.0
        if TOP_K:
            k = tl.minimum(tl.load(top_k), VOCAB).to(tl.int32)
            low = shift - 1000.0
            high = shift
            enough = tl.sum((lane_max >= low).to(tl.int32), 0) >= k
            for _ in range(16):
                middle = 0.5 * (low + high)
                above = tl.sum((lane_max >= middle).to(tl.int32), 0) >= k
                low = tl.where(above, middle, low)
                high = tl.where(above, high, middle)
            bound = tl.where(enough, low, -float("inf"))

        # 3. The keys of the candidates, and the mass of the others.
        count = 0
        low_mass = tl.zeros([], tl.int64)
        if TOP_K or TOP_P:
            for start in range(0, VOCAB, BLOCK):
                offsets = start + lane
                inside = offsets < VOCAB
                scores = _load_scores(logits, offsets, inside, scale, HAS_TEMPERATURE)
                candidate = inside & (scores >= bound)
                if TOP_P and not TOP_K:
                    low_mass += tl.sum(tl.where(candidate, 0, _mass(scores, shift, total)), 0)
                found = tl.sum(candidate.to(tl.int32), 0)
                if found > 0:
                    slots = count + tl.cumsum(candidate.to(tl.int32), 0) - 1
                    tl.store(keys + slots, _key(scores), mask=candidate)
                    count += found
            tl.debug_barrier()  # other threads of this program read what was stored

        slot = tl.arange(0, CANDIDATES)
        largest_key = _key(largest).to(tl.int64)
        cut = tl.full([], -2147483648, tl.int64)  # keys below are removed

        # 4. top-k: the largest cut that at least k candidates reach.
        reached = count
        if TOP_K:
            low_key = _key(bound).to(tl.int64)
            high_key = largest_key + 1
            while (high_key - low_key > 1) & (reached != k):
                middle_key = low_key + (high_key - low_key) // 2
                lane_count = tl.zeros([CANDIDATES], tl.int32)
                for start in range(0, count, CANDIDATES):
                    inside = start + slot < count
                    key = tl.load(keys + start + slot, mask=inside, other=0)
                    lane_count += (inside & (key.to(tl.int64) >= middle_key)).to(tl.int32)
                above_count = tl.sum(lane_count, 0)
                above = above_count >= k
                low_key = tl.where(above, middle_key, low_key)
                high_key = tl.where(above, high_key, middle_key)
                reached = tl.where(above, above_count, reached)
            cut = low_key
            if TOP_P:
                lane_mass = tl.zeros([CANDIDATES], tl.float32)
                for start in range(0, count, CANDIDATES):
                    inside = start + slot < count
                    key = tl.load(keys + start + slot, mask=inside, other=0)
                    scores = _flip(key).to(tl.float32, bitcast=True)
                    kept = inside & (key.to(tl.int64) >= cut)
                    lane_mass += tl.where(kept, tl.exp(scores - shift), 0.0)
                total = tl.maximum(tl.sum(lane_mass, 0), 1.0)

        # 5. top-p: the smallest key up to which the mass exceeds 1 - p. The list shrinks to the open interval.
        removed_ties = tl.zeros([], tl.int64)
        if TOP_P:
            low_key = tl.maximum(_key(bound).to(tl.int64), cut) - 1
            high_key = largest_key
            low_count = 0
            high_count = reached
            base_mass = low_mass
            base_count = 0
            while (high_key - low_key > 1) & (high_count - low_count > 1):
                middle_key = low_key + (high_key - low_key) // 2
                sum_mass = tl.zeros([CANDIDATES], tl.int64)
                lane_count = tl.zeros([CANDIDATES], tl.int32)
                for start in range(0, count, CANDIDATES):
                    inside = start + slot < count
                    key = tl.load(keys + start + slot, mask=inside, other=0)
                    scores = _flip(key).to(tl.float32, bitcast=True)
                    below = inside & (key.to(tl.int64) >= cut) & (key.to(tl.int64) <= middle_key)
                    sum_mass += tl.where(below, _mass(scores, shift, total), 0)
                    lane_count += below.to(tl.int32)
                middle_mass = base_mass + tl.sum(sum_mass, 0)
                middle_count = base_count + tl.sum(lane_count, 0)
                light = middle_mass <= limit
                low_key = tl.where(light, middle_key, low_key)
                low_mass = tl.where(light, middle_mass, low_mass)
                low_count = tl.where(light, middle_count, low_count)
                high_key = tl.where(light, high_key, middle_key)
                high_count = tl.where(light, high_count, middle_count)
                if (high_count - low_count) * 4 < count:
                    remaining = 0
                    tl.debug_barrier()
                    for start in range(0, count, CANDIDATES):
                        inside = start + slot < count
                        key = tl.load(keys + start + slot, mask=inside, other=0)
                        undecided = inside & (key.to(tl.int64) > low_key) & (key.to(tl.int64) <= high_key)
                        slots = remaining + tl.cumsum(undecided.to(tl.int32), 0) - 1
                        tl.debug_barrier()  # all have read before any writes: in place
                        tl.store(keys + slots, key, mask=undecided)
                        remaining += tl.sum(undecided.to(tl.int32), 0)
                    tl.debug_barrier()
                    count = remaining
                    base_mass = low_mass
                    base_count = low_count
            lane_key = tl.full([CANDIDATES], -2147483648, tl.int64)
            for start in range(0, count, CANDIDATES):
                inside = start + slot < count
                key = tl.load(keys + start + slot, mask=inside, other=0).to(tl.int64)
                lane_key = tl.maximum(lane_key, tl.where(inside & (key <= high_key), key, -2147483648))
            cut = tl.max(lane_key, 0)
            lane_count = tl.zeros([CANDIDATES], tl.int32)
            for start in range(0, count, CANDIDATES):
                inside = start + slot < count
                key = tl.load(keys + start + slot, mask=inside, other=0).to(tl.int64)
                lane_count += (inside & (key == cut)).to(tl.int32)
            # Of the ties the first ones go, as in a stable sort, and never all of them.
            ties = tl.sum(lane_count, 0).to(tl.int64)
            tie_mass = tl.maximum(_mass(_flip(cut.to(tl.int32)).to(tl.float32, bitcast=True), shift, total), 1)
            removed_ties = tl.maximum(tl.minimum((limit - low_mass) // tie_mass, ties - 1), 0)

        # 6. The kept tokens: written out, or drawn from.
        least = tl.zeros([], tl.float32)
        if MIN_P:
            least = tl.load(min_p)  # a share of the largest probability: the total of the kept cancels
        best = tl.full([BLOCK], -9223372036854775808, tl.int64)
        ties_before = tl.zeros([], tl.int64)
        for start in range(0, VOCAB, BLOCK):
            offsets = start + lane
            inside = offsets < VOCAB
            scores = _load_scores(logits, offsets, inside, scale, HAS_TEMPERATURE)
            key = _key(scores)
            kept = inside & (key >= cut.to(tl.int32))
            if TOP_P:
                tie = (inside & (key == cut.to(tl.int32))).to(tl.int32)
                tied = tl.sum(tie, 0)
                if (tied > 0) & (removed_ties > ties_before):
                    kept = kept & ((tie == 0) | (ties_before + tl.cumsum(tie, 0).to(tl.int64) > removed_ties))
                ties_before += tied.to(tl.int64)
            if MIN_P:
                kept = kept & ((tl.exp(scores - shift) >= least) | (scores == largest))
            if DRAW:
                if tl.sum(kept.to(tl.int32), 0) > 0:
                    race = _race_of_tokens(scores, seed, tl.program_id(0), offsets, STRIDE)
                    best = tl.maximum(best, tl.where(kept, _pack(race, offsets), -9223372036854775808))
            else:
                tl.store(filtered + row + offsets, tl.where(kept, scores, -float("inf")), mask=inside)
        if DRAW:  # also a row of NaN gets a token that can be looked up
            tl.store(tokens + tl.program_id(0), tl.minimum(_token_of(tl.max(best, 0)), VOCAB - 1))

    @triton.jit
    def _contend(best, best_token, logits, token, word, scale, VOCAB: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
                 DRAW: tl.constexpr):
        """Lane by lane the better of `best` and `token`; the earlier of equals."""
        race = _load_scores(logits, token, token < VOCAB, scale, HAS_TEMPERATURE)
        if DRAW:
            race = _race(race, word)
        better = (token < VOCAB) & (race > best)
        return tl.where(better, race, best), tl.where(better, token, best_token)

    @triton.jit
    def _race_kernel(logits, seed, inverse_temperature, partial, VOCAB: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
                     DRAW: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
        """Program (row, part): the winner among 4 * BLOCK tokens, runs of BLOCK that stand STRIDE apart."""
        row, part = tl.program_id(0), tl.program_id(1)
        logits += row.to(tl.int64) * VOCAB
        group, lane = part // (STRIDE // BLOCK), part % (STRIDE // BLOCK) * BLOCK + tl.arange(0, BLOCK)
        token = group * (4 * STRIDE) + lane
        scale = tl.load(inverse_temperature) if HAS_TEMPERATURE else 1.0
        first, second, third, fourth = lane, lane, lane, lane
        if DRAW:
            first, second, third, fourth = _random_words(seed, row, group * STRIDE + lane)
        best = tl.full([BLOCK], -float("inf"), tl.float32)
        winner = tl.minimum(token, VOCAB - 1)  # also a row of NaN gets a token that can be looked up
        best, winner = _contend(best, winner, logits, token, first, scale, VOCAB, HAS_TEMPERATURE, DRAW)
        best, winner = _contend(best, winner, logits, token + STRIDE, second, scale, VOCAB, HAS_TEMPERATURE, DRAW)
        best, winner = _contend(best, winner, logits, token + 2 * STRIDE, third, scale, VOCAB, HAS_TEMPERATURE, DRAW)
        best, winner = _contend(best, winner, logits, token + 3 * STRIDE, fourth, scale, VOCAB, HAS_TEMPERATURE, DRAW)
        tl.store(partial + row * tl.num_programs(1) + part, tl.max(_pack(best, winner), 0))

    @triton.jit
    def _winner_kernel(partial, tokens, PARTS: tl.constexpr, BLOCK: tl.constexpr):
        lane = tl.arange(0, BLOCK)
        packed = tl.load(partial + tl.program_id(0) * PARTS + lane, mask=lane < PARTS, other=-9223372036854775808)
        tl.store(tokens + tl.program_id(0), _token_of(tl.max(packed, 0)))

    @triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["tokens", "finished"])
    def _finish_kernel(tokens, finished, eos_ids, pad_id, rows, EOS: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = row < rows
        done = tl.load(finished + row, mask=inside, other=0) != 0
        token = tl.where(done, tl.load(pad_id), tl.load(tokens + row, mask=inside, other=0))
        ids = tl.load(eos_ids + tl.arange(0, EOS))
        done = done | (tl.sum((token[:, None] == ids[None, :]).to(tl.int32), 1) > 0)
        tl.store(tokens + row, token, mask=inside)
        tl.store(finished + row, done, mask=inside)

    @triton.jit(do_not_specialize_on_alignment=["tokens", "log_probs"])
    def _log_prob_kernel(logits, tokens, log_probs, inverse_temperature, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64) * VOCAB
        lane = tl.arange(0, BLOCK)
        lane_max = tl.full([BLOCK], -float("inf"), tl.float32)
        lane_sum = tl.zeros([BLOCK], tl.float32)
        for start in range(0, VOCAB, BLOCK):
            offsets = start + lane
            scores = tl.load(logits + row + offsets, mask=offsets < VOCAB, other=-float("inf")).to(tl.float32)
            scores *= inverse_temperature
            new_max = tl.maximum(lane_max, scores)
            safe = tl.where(new_max == -float("inf"), 0.0, new_max)
            lane_sum = lane_sum * tl.exp(lane_max - safe) + tl.exp(scores - safe)
            lane_max = new_max
        largest = tl.max(lane_max, 0)
        total = tl.sum(lane_sum * tl.exp(lane_max - largest), 0)
        chosen = tl.load(logits + row + tl.load(tokens + tl.program_id(0))).to(tl.float32) * inverse_temperature
        tl.store(log_probs + tl.program_id(0), chosen - largest - tl.log(total))


def _launch_select(logits, seed, inverse_temperature, top_k, one_minus_p, min_p):
    logits = logits.contiguous()
    rows, vocab = logits.shape
    keys = torch.empty(rows, vocab, dtype=torch.int32, device=logits.device)
    if seed is None:
        filtered, tokens = torch.empty(rows, vocab, dtype=torch.float32, device=logits.device), keys
    else:
        filtered, tokens = keys, torch.empty(rows, dtype=torch.int64, device=logits.device)
    unused = logits  # for the pointers of absent filters, which are never read
    given = [unused if value is None else value for value in (inverse_temperature, top_k, one_minus_p, min_p)]
    _select_kernel[(rows,)](
        logits, keys if seed is None else seed, *given, keys, filtered, tokens, VOCAB=vocab,
        HAS_TEMPERATURE=inverse_temperature is not None, TOP_K=top_k is not None, TOP_P=one_minus_p is not None,
        MIN_P=min_p is not None, DRAW=seed is not None, STRIDE=STRIDE, BLOCK=BLOCK, CANDIDATES=CANDIDATES,
        num_warps=WARPS,
    )
    return filtered if seed is None else tokens


def filter_scores(logits, inverse_temperature=None, top_k=None, one_minus_p=None, min_p=None):
    """Temperature, then top-k, top-p and min-p as far as given: removed tokens score -inf, the others logits / T.

    Top-k keeps every tie of the k-th score. Top-p removes tokens in ascending order of score, and of index among
    equals, while their mass is at most 1 - p, but never the last. Min-p removes what is less probable than min_p times
    the most probable. Deterministic. At least one filter is needed.
    Shapes: logits (B, V) of any float dtype; the others () tensors on its device: inverse_temperature (1 / T),
    one_minus_p and min_p float32, top_k int64 -> (B, V) float32.
    """
    return _launch_select(logits, None, inverse_temperature, top_k, one_minus_p, min_p)


def filter_scores_reference(logits, inverse_temperature=None, top_k=None, one_minus_p=None, min_p=None):
    """The torch twin of `filter_scores`, by a full sort."""
    scores = logits.float()
    if inverse_temperature is not None:
        scores = scores * inverse_temperature
    if top_k is not None:
        scores = keep_top_k(scores, top_k)
    if one_minus_p is not None:
        scores = keep_top_p(scores, one_minus_p, stable=True)
    if min_p is not None:
        scores = keep_min_p(scores, min_p)
    return scores


def keep_top_k(scores, top_k):
    """(B, V) scores and () int64 -> scores with -inf below the k-th largest. No look at the device from the host."""
    if not scores.is_cuda:  # reading a CPU tensor costs nothing, and a partial sort is cheaper
        least = scores.topk(min(int(top_k), scores.shape[-1])).values[:, -1:]
    else:
        rank = (scores.shape[-1] - top_k).clamp_min(0).expand(scores.shape[0], 1)
        least = scores.sort(dim=-1).values.gather(1, rank)
    return scores.masked_fill(scores < least, -torch.inf)


def keep_top_p(scores, one_minus_p, stable=False):
    """(B, V) scores and () float32 -> scores with -inf for the least probable tokens that weigh 1 - p together.

    Among equals at the edge a stable sort removes the first ones; the library's sort promises no order.
    """
    ordered, order = scores.sort(dim=-1, stable=stable)
    removed = ordered.softmax(-1).cumsum(-1) <= one_minus_p
    removed[:, -1] = False
    return scores.masked_fill(removed.scatter(1, order, removed), -torch.inf)


def keep_min_p(scores, min_p):
    """(B, V) scores and () float32 -> scores with -inf where the probability is below min_p times the largest."""
    probs = scores.softmax(-1)
    largest = probs.amax(-1, keepdim=True)
    return scores.masked_fill((probs < min_p * largest) & (probs < largest), -torch.inf)


def draw_seed(device):
    """(2,) int64 for one step's draws, from torch's generator; on CUDA inside of graphs too."""
    return torch.empty(2, dtype=torch.int64, device=device).random_()


def draw_tokens(logits, seed, inverse_temperature=None, top_k=None, one_minus_p=None, min_p=None):
    """`filter_scores` and the race of the kept tokens in one kernel; without a filter one pass over the logits.

    A row's noise depends on the seed and its number only. Probabilities are right to 1e-5 of themselves, those of
    1e-7 to 0.3 % (noise comes in steps of 2^-32).
    Shapes: as `filter_scores`, and seed (2,) int64 of `draw_seed`, or None for the largest score (the first of equals;
    without filters) -> (B,) int64.
    """
    if any(value is not None for value in (top_k, one_minus_p, min_p)):
        return _launch_select(logits, seed, inverse_temperature, top_k, one_minus_p, min_p)
    logits = logits.contiguous()
    rows, vocab = logits.shape
    block, warps = (STRIDE // 2, 4) if rows >= MANY_ROWS else (STRIDE // 4, 8)
    parts = triton.cdiv(vocab, 4 * STRIDE) * (STRIDE // block)
    partial = torch.empty(rows, parts, dtype=torch.int64, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    scale = logits if inverse_temperature is None else inverse_temperature
    _race_kernel[(rows, parts)](logits, partial if seed is None else seed, scale, partial, VOCAB=vocab,
                                HAS_TEMPERATURE=inverse_temperature is not None, DRAW=seed is not None, STRIDE=STRIDE,
                                BLOCK=block, num_warps=warps)
    _winner_kernel[(rows,)](partial, tokens, PARTS=parts, BLOCK=triton.next_power_of_2(parts), num_warps=1)
    return tokens


def draw_tokens_reference(logits, seed, inverse_temperature=None, top_k=None, one_minus_p=None, min_p=None):
    """The torch twin of `draw_tokens`."""
    scores = filter_scores_reference(logits, inverse_temperature, top_k, one_minus_p, min_p)
    return scores.argmax(-1) if seed is None else race_reference(scores, exponential_reference(seed, *scores.shape))


def race_reference(scores, noise):
    """(B, V) scores, and noise ~ Exponential(1) -> (B,) tokens: those of `torch.multinomial` with this noise."""
    return (scores.softmax(-1) / noise).argmax(-1)


def exponential_reference(seed, rows, vocab):
    """The noise (B, V) float32 that `draw_tokens` makes of a seed."""
    token = torch.arange(vocab, device=seed.device)
    counter = (token // (4 * STRIDE) * STRIDE + token % STRIDE).expand(rows, vocab)
    row = torch.arange(rows, device=seed.device).unsqueeze(1).expand(rows, vocab)
    step = [part.expand(rows, vocab) for part in (seed[1] & 0xFFFFFFFF, seed[1] >> 32 & 0xFFFFFFFF)]
    words = philox_reference(counter, row, *step, seed[0] & 0xFFFFFFFF, seed[0] >> 32 & 0xFFFFFFFF)
    word = torch.stack(words).gather(0, (token // STRIDE % 4).expand(1, rows, vocab))[0]
    return -torch.log1p((word.double() + 0.5) * -(2.0**-32)).float()


def philox_reference(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10: counters and keys, int64 tensors of 32 bits -> four such tensors."""
    half = 0xFFFFFFFF
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # below 2^64, of which an int64 keeps the bits
        c0, c1, c2, c3 = second >> 32 & half ^ c1 ^ k0, second & half, first >> 32 & half ^ c3 ^ k1, first & half
        k0, k1 = k0 + 0x9E3779B9 & half, k1 + 0xBB67AE85 & half
    return c0, c1, c2, c3


def finish_rows(tokens, finished, eos_ids, pad_id):
    """In place: finished rows get the pad id; a row whose token is an end of sequence is finished.

    Shapes: tokens (B,) int64, finished (B,) bool, eos_ids (16,) int64 padded with -1, pad_id () int64.
    """
    rows = tokens.shape[0]
    _finish_kernel[(triton.cdiv(rows, 64),)](tokens, finished, eos_ids, pad_id, rows, EOS=eos_ids.shape[0], BLOCK=64,
                                             num_warps=2)


def finish_rows_reference(tokens, finished, eos_ids, pad_id):
    """The torch twin of `finish_rows`."""
    tokens.copy_(torch.where(finished, pad_id, tokens))
    finished.logical_or_((tokens.unsqueeze(-1) == eos_ids).any(-1))


def token_log_probs(logits, tokens, out, temperature=1.0):
    """log softmax(logits / temperature) of one token a row, into `out`; the temperature is a number, which a CUDA graph
    keeps. Shapes: (B, V) any float, (B,) int64, (B,) float32."""
    logits = logits.contiguous()
    rows, vocab = logits.shape
    _log_prob_kernel[(rows,)](logits, tokens, out, 1.0 / temperature, VOCAB=vocab, BLOCK=BLOCK, num_warps=WARPS)


def token_log_probs_reference(logits, tokens, out, temperature=1.0):
    """The torch twin of `token_log_probs`."""
    scores = logits.float() / temperature
    out.copy_(scores.gather(1, tokens.unsqueeze(1)).squeeze(1) - scores.logsumexp(-1))
