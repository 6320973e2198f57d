import random

import numpy
import pytest

from data_scripts.packing.mixture import (
    allocate,
    describe_short,
    epoch_order,
    interleave,
    make_groups,
    parse_epochs,
    plan,
    scramble,
)

KINDS = {"web": "text", "anarchism": "text", "gcide": "text", "go": "code", "rust": "code", "wenyan": "multilingual"}
TOKENS = {"web": 8_000, "anarchism": 1_000, "gcide": 1_000, "go": 3_000, "rust": 1_000, "wenyan": 500}


def brute_allocation(wanted, weights, ceilings):
    """The same division by hand: hand out tiny equal steps in proportion to the weights of those not yet full."""
    given, step = dict.fromkeys(weights, 0.0), wanted / 20_000
    for _ in range(20_000):
        free = [name for name in weights if given[name] < ceilings[name]]
        for name in free:
            given[name] = min(ceilings[name], given[name] + step * weights[name] / sum(weights[n] for n in free))
    return given


@pytest.mark.parametrize("seed", range(6))
def test_allocation_equals_handing_out_step_by_step(seed):
    rng = random.Random(seed)
    weights = {i: rng.random() for i in range(5)}
    ceilings = {i: rng.random() * 100 for i in range(5)}
    wanted = rng.uniform(0.2, 1.2) * sum(ceilings.values())
    given = allocate(wanted, weights, ceilings)
    assert sum(given.values()) == pytest.approx(min(wanted, sum(ceilings.values())))
    reference = brute_allocation(wanted, weights, ceilings)
    for name in weights:
        assert given[name] == pytest.approx(reference[name], abs=0.01 * sum(ceilings.values()))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_sources_share_their_kind_by_temperature(temperature):
    groups = make_groups({"text": 70, "code": 30}, KINDS)
    total, given, short = plan(groups, TOKENS, {None: 10.0}, temperature, 1_000)
    assert total == 1_000 and not short and "wenyan" not in given
    assert given["web"] / given["gcide"] == pytest.approx((8_000 / 1_000) ** (1 / temperature))
    assert given["web"] + given["anarchism"] + given["gcide"] == pytest.approx(700)
    assert given["go"] + given["rust"] == pytest.approx(300)


def test_single_sources_have_their_own_share():
    groups = make_groups({"text": 57, "text.anarchism": 3, "code": 40}, KINDS)
    assert groups["text"][1] == ["gcide", "web"]
    _, given, _ = plan(groups, TOKENS, {None: 4.0}, 1.0, 1_000)
    assert given["anarchism"] == pytest.approx(30) and given["web"] + given["gcide"] == pytest.approx(570)


def test_caps_move_tokens_to_the_other_sources_of_the_kind():
    groups = make_groups({"text": 50, "code": 50}, KINDS)
    _, given, short = plan(groups, TOKENS, {None: 4.0, "gcide": 0.5}, 100.0, 6_000)  # nearly equal weights
    assert given["gcide"] == 500 and not short
    assert given["web"] + given["anarchism"] == pytest.approx(2_500)
    assert given["web"] == pytest.approx(given["anarchism"], rel=0.05)


def test_a_kind_that_is_short_is_named_and_the_total_is_the_largest_possible():
    groups = make_groups({"text": 80, "multilingual": 20}, KINDS)
    total, given, short = plan(groups, TOKENS, {None: 2.0}, 1.0, 9_000)
    assert total == 5_000 and given["wenyan"] == 1_000 and list(short) == ["multilingual"]
    (line,) = describe_short(short, total, {None: 2.0})
    assert "'multilingual' has 1,000 of 1,800 tokens wanted" in line and "800 too few" in line
    assert "(wenyan 2)" in line and "largest total that meets the mixture is 5,000" in line
    assert not plan(groups, TOKENS, {None: 2.0}, 1.0, total)[2]


def test_without_max_tokens_the_longest_kind_is_read_once():
    groups = make_groups({"text": 60, "code": 40}, KINDS)
    total, given, _ = plan(groups, TOKENS, {None: 4.0})
    assert total == pytest.approx(10_000 / 0.6) and given["web"] == pytest.approx(8_000)
    assert given["go"] / TOKENS["go"] == pytest.approx(total * 0.4 / 4_000)  # 1.67 passes
    total, given, short = plan(groups, TOKENS, {None: 1.0})
    assert total == pytest.approx(4_000 / 0.4) and not short


@pytest.mark.parametrize("mixture, message", [
    ({"text": 60, "code": 30}, "sums to 90, must be 100"),
    ({"text": 100, "code": 0}, "the share of code must be above 0"),
    ({"text": 50, "text.go": 50}, "names 'text.go'; sources of kind 'text' in the corpus: anarchism, gcide, web"),
    ({"text": 60, "mathematics": 40}, "gives 'mathematics' 40 %.*leave it out, as in --mixture text=100"),
])
def test_impossible_mixtures(mixture, message):
    with pytest.raises(ValueError, match=message):
        make_groups(mixture, KINDS)


def test_epochs_are_parsed():
    assert parse_epochs(["3", "wikipedia=2,gcide=1.5"]) == {None: 3.0, "wikipedia": 2.0, "gcide": 1.5}
    with pytest.raises(ValueError, match="'x' is neither a number nor SOURCE=NUMBER"):
        parse_epochs(["x"])
    with pytest.raises(ValueError, match="max_epochs web=0 must be above 0"):
        parse_epochs(["web=0"])
    with pytest.raises(ValueError, match="max_epochs names 'web' twice"):
        parse_epochs(["web=1,2", "web=3"])


def test_every_stretch_has_the_shares():
    rng, shares, order = random.Random(0), {"a": 0.6, "b": 0.3, "c": 0.1}, []

    def take(name):
        order.append((name, rng.randint(1, 50)))
        return order[-1][1]

    for _, count in zip(range(6_000), interleave(shares, take)):
        assert count == order[-1][1]
    for start in range(0, 6_000, 1_000):
        part = order[start:start + 1_000]
        total = sum(count for _, count in part)
        for name, share in shares.items():
            # Of each source there is at most one document too many.
            assert abs(sum(c for n, c in part if n == name) - share * total) <= 100


def test_orders_are_permutations_that_differ_between_epochs():
    keys = numpy.random.default_rng(0).integers(0, 2**64 - 1, 500, dtype=numpy.uint64)
    orders = [epoch_order(keys, epoch) for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(500))
    assert abs(numpy.corrcoef(orders[0], orders[1])[0, 1]) < 0.15
    assert abs(numpy.corrcoef(scramble(keys, 0).astype(float), scramble(keys, 1).astype(float))[0, 1]) < 0.15


def test_curriculum_is_easy_first_within_its_window():
    rng = numpy.random.default_rng(0)
    keys, difficulty = rng.integers(0, 2**64 - 1, 2_000, dtype=numpy.uint64), rng.permutation(2_000)
    sorted_order = epoch_order(keys, 0, difficulty, window=0.0)
    assert (difficulty[sorted_order] == numpy.arange(2_000)).all()
    mixed = difficulty[epoch_order(keys, 0, difficulty, window=0.1)]
    moved = numpy.abs(mixed - numpy.arange(2_000))
    assert moved.max() <= 0.1 * 2_000 + 1 and moved.mean() > 0.02 * 2_000
    drawn = epoch_order(keys, 0)[:200]  # a tenth of an epoch is mixed as well as a whole one
    mixed = numpy.argsort(numpy.argsort(difficulty[drawn]))[epoch_order(keys[drawn], 0, difficulty[drawn], window=0.1)]
    assert numpy.abs(mixed - numpy.arange(200)).mean() > 0.02 * 200
    assert abs(numpy.corrcoef(difficulty[epoch_order(keys, 1, difficulty)], numpy.arange(2_000))[0, 1]) < 0.1
