"""How much of which source, and in which order: shares, epochs, interleaving, curriculum. Arithmetic only.

A mixture gives groups their per cent of the tokens: `text=60` is a kind, whose sources share it by temperature;
`text.anarchism=3` a single source. Within a kind share_i is proportional to tokens_i ** (1 / temperature): 1 reads all
sources equally often, larger values favour small sources, as multilingual models do with alpha = 1 / temperature
(XLM-R, arXiv:1911.02116, Sec. 3.1; mT5, arXiv:2010.11934, Sec. 3.2). A source is repeated at most `max_epochs`
times (four passes cost next to nothing against fresh text: arXiv:2305.16264, Sec. 6); what it then lacks its kind's
other sources give.
"""

import heapq
import math

import numpy

CURRICULA = ("none", "length", "difficulty")
DEFAULT_EPOCHS = 4.0
_MIX = numpy.uint64(0x9E3779B97F4A7C15)


def parse_epochs(values):
    """['3', 'wikipedia=2,gcide=1.5'] -> {None: 3.0, 'wikipedia': 2.0, 'gcide': 1.5}; None is every other source."""
    epochs = {None: DEFAULT_EPOCHS}
    for part in (part.strip() for value in values for part in str(value).split(",")):
        name, equals, number = part.rpartition("=")
        if name in epochs:
            raise ValueError(f"max_epochs names {name!r} twice; give it one number")
        try:
            epochs[name if equals else None] = float(number)
        except ValueError:
            raise ValueError(f"max_epochs: {part!r} is neither a number nor SOURCE=NUMBER, as in 4 or wikipedia=2") \
                from None
    for name, number in epochs.items():
        if not 0 < number < math.inf:
            raise ValueError(f"max_epochs{'' if name is None else f' {name}'}={number:g} must be above 0")
    return epochs


def make_groups(mixture, kinds):
    """{'text': 57, 'text.anarchism': 3} and {source: kind} -> {name: (share of all tokens, [sources])}.

    A source that is named singly is taken out of its kind's group. Sources of kinds without a share are in no group.
    Raises:
        ValueError: shares that do not sum to 100, names that the corpus does not have, an empty group.
    """
    if not math.isclose(sum(mixture.values()), 100, abs_tol=0.01):
        raise ValueError(f"mixture {show(mixture)} sums to {sum(mixture.values()):g}, must be 100 (per cent of tokens)")
    single, groups = {}, {}
    for name, share in mixture.items():
        kind, dot, source = name.partition(".")
        if share <= 0:
            raise ValueError(f"mixture {show(mixture)}: the share of {name} must be above 0; leave it out instead")
        if dot and kinds.get(source) != kind:
            raise ValueError(f"mixture names {name!r}; sources of kind {kind!r} in the corpus: "
                             f"{', '.join(sorted(s for s in kinds if kinds[s] == kind)) or 'none'}")
        if dot:
            single[source] = name
    for name, share in mixture.items():
        kind, dot, source = name.partition(".")
        members = [source] if dot else sorted(s for s in kinds if kinds[s] == kind and s not in single)
        if not members:
            have = sorted(set(kinds.values()))
            rest = {k: mixture[k] for k in mixture if k.partition(".")[0] in have}
            scaled = {k: round(100 * share / sum(rest.values()), 2) for k, share in rest.items()}
            raise ValueError(f"mixture gives {name!r} {share:g} %, but the corpus has no source of that kind"
                             f"{' that is not named singly' if kind in have else ''}; it has {', '.join(have)}. Add "
                             f"one, or leave it out{f', as in --mixture {show(scaled)}' if scaled else ''}")
        groups[name] = (share / 100, members)
    return groups


def show(mixture):
    return ",".join(f"{name}={share:g}" for name, share in mixture.items())


def allocate(wanted, weights, ceilings):
    """Divide `wanted` by weights, none above its ceiling: what one cannot take the others get. Sums to
    min(wanted, sum of ceilings)."""
    given, free = {}, dict(weights)
    left = min(wanted, sum(ceilings.values()))
    while free:
        scale = left / sum(free.values())
        full = [name for name in free if scale * free[name] >= ceilings[name]]
        if not full:
            return given | {name: scale * weight for name, weight in free.items()}
        for name in full:
            given[name] = ceilings[name]
            left = max(0.0, left - ceilings[name])
            del free[name]
    return given


def plan(groups, tokens, max_epochs, temperature=1.0, max_tokens=None):
    """How many tokens each source gives.

    Args:
        groups: of `make_groups`; tokens: {source: tokens of one epoch}; max_epochs: of `parse_epochs`.
        max_tokens: wanted in all. None: what lets the group with the most text for its share be read once, the
            others repeated as far as they may be.
    Returns:
        (total tokens, {source: tokens}, short): short is {group: {"available", "wanted", "missing", "sources"}} of
        the groups that cannot meet their share of `max_tokens`; the total is then the largest that can be met.
    """
    ceilings = {s: tokens[s] * max_epochs.get(s, max_epochs[None]) for _, members in groups.values() for s in members}
    most = {name: sum(ceilings[s] for s in members) for name, (_, members) in groups.items()}
    largest = min(most[name] / share for name, (share, _) in groups.items())
    wanted = max_tokens
    if wanted is None:
        once = max(sum(tokens[s] for s in members) / share for share, members in groups.values())
        wanted = min(once, largest)
    short = {name: {"available": int(most[name]), "wanted": math.ceil(share * wanted), "sources": members,
                    "missing": math.ceil(share * wanted) - int(most[name])}
             for name, (share, members) in groups.items() if most[name] < math.floor(share * wanted)}
    total, given = min(wanted, largest), {}
    for share, members in groups.values():
        weights = {s: float(tokens[s]) ** (1 / temperature) for s in members}
        given |= allocate(share * total, weights, {s: ceilings[s] for s in members})
    return total, given, short


def describe_short(short, total, max_epochs):
    """One line for each group that cannot meet its share: which, how much it has, wanted, missing, and the way out."""
    for name, facts in short.items():
        caps = ", ".join(f"{s} {max_epochs.get(s, max_epochs[None]):g}" for s in facts["sources"][:8])
        more = f" and {len(facts['sources']) - 8} more" if len(facts["sources"]) > 8 else ""
        yield (f"{name!r} has {facts['available']:,} of {facts['wanted']:,} tokens wanted with every source repeated "
               f"up to its max_epochs ({caps}{more}), {facts['missing']:,} too few: the largest total that meets the "
               f"mixture is {int(total):,} tokens; add text, lower its share or raise --max_epochs")


def interleave(shares, take):
    """Take documents such that every stretch has the shares, the source furthest behind next; yield their tokens.

    To within a document of each source: the first stretch has one of each, long before a small source is due.

    Args:
        shares: {source: weight}; take: function of a source, called when its turn comes, that takes its next document
            and returns its tokens, or None when the source is at its end, where all ends.
    """
    heap = [(0.0, place, source) for place, source in enumerate(shares)]
    taken = dict.fromkeys(shares, 0)
    while heap:
        _, place, source = heap[0]
        count = take(source)
        if count is None:
            return
        taken[source] += count
        heapq.heapreplace(heap, (taken[source] / shares[source], place, source))
        yield count


def scramble(keys, salt):
    """uint64 keys -> other uint64 keys, equally spread, independent for each salt (the finaliser of SplitMix64)."""
    with numpy.errstate(over="ignore"):
        mixed = keys.astype(numpy.uint64) + _MIX * numpy.uint64(salt + 1)
        mixed = (mixed ^ (mixed >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> numpy.uint64(31))


def epoch_order(keys, epoch, difficulty=None, window=0.1):
    """The order in which a source's documents are read in one epoch, as indices.

    Args:
        keys: (documents,) uint64, random; they decide the order, so it is the same wherever it is computed.
        difficulty: (documents,) numbers or None. In epoch 0 easy documents go first: each stands at its rank moved at
            random by at most `window` / 2 of the source, so that neighbours differ and batches are not all alike.
            Later epochs are shuffled: by then the curriculum is over.
    """
    random = scramble(keys, epoch)
    order = numpy.argsort(random, kind="stable")
    if difficulty is None or epoch > 0:
        return order
    ranks, chance = numpy.empty(len(keys)), numpy.empty(len(keys))
    ranks[numpy.lexsort((random, difficulty))] = chance[order] = numpy.arange(len(keys))
    # By rank: the documents of a part of an epoch were drawn by their random numbers, all of them small.
    return numpy.argsort(ranks + window * (chance - len(keys) / 2), kind="stable")
