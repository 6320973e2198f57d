"""MinHash: shingles against plain sets, estimates against true similarity, which of a cluster is kept."""

import random

import numpy
import pytest

pytest.importorskip("datatrove")

from data_scripts import overlap
from data_scripts.cleaning import unit_hashes
from data_scripts.cleaning.clean_blocks import Shard, facts_path, read_json, write_json
from data_scripts.cleaning.clean_settings import NearSettings
from data_scripts.cleaning.exact_duplicates import equal_pairs, save_decisions
from data_scripts.cleaning.near_duplicates import Signatures, chance_of_meeting

WORDS = ["".join(random.Random(i).choices("abcdefghij", k=6)) for i in range(3_000)]


def plain_shingles(text, length):
    """The same sets, with tuples in place of hashes."""
    found = set()
    for kind, units in enumerate(overlap.units(text)):
        size = min(length, len(units))
        found |= {(kind, tuple(units[i:i + size])) for i in range(len(units) - size + 1) if size}
    return found


def jaccard(left, right):
    return len(left & right) / len(left | right)


@pytest.mark.parametrize("left, right", [
    ("The quick brown fox jumps over the lazy dog again.", "the QUICK brown fox\njumps over: the lazy cat again"),
    ("学而时习之，不亦说乎？有朋自远方来。", "学而时习之 不亦说乎 有朋自近方来"),
    ("mixed 学而时习之不亦说乎 with English words in it", "mixed 学而时习之不亦乐乎 with English words in it"),
    ("too short", "too short"), ("too short", "too shorter"), ("one two three four five", "one two three four")])
def test_shingles_match_plain_sets(left, right):
    a, b = set(unit_hashes.shingles(left, 5).tolist()), set(unit_hashes.shingles(right, 5).tolist())
    assert len(a) == len(plain_shingles(left, 5))
    assert jaccard(a, b) == jaccard(plain_shingles(left, 5), plain_shingles(right, 5))


def test_texts_without_words_have_no_shingles():
    assert not len(unit_hashes.shingles("?!-- ***", 5)) and not len(unit_hashes.shingles("", 5))


def test_run_hashes_agree_for_equal_runs_only():
    words = [random.Random(0).choice(WORDS[:4]) for _ in range(400)]
    runs = unit_hashes.run_hashes(unit_hashes.unit_values(words), {2, 3})
    for length, hashes in runs.items():
        plain = [tuple(words[i:i + length]) for i in range(len(words) - length + 1)]
        assert len(set(zip(plain, hashes.tolist()))) == len(set(plain)) == len(set(hashes.tolist()))


def changed(words, share, generator):
    words = list(words)
    for place in generator.sample(range(len(words)), int(share * len(words))):
        words[place] = generator.choice(WORDS)
    return words


def test_estimated_similarity_is_the_jaccard_similarity(tmp_path):
    block, generator, errors = Signatures(tmp_path, NearSettings()), random.Random(1), []

    def signature(text):
        block._places, block._rows = [], []
        block._document = type("D", (), {"metadata": {"_index": 0}})
        block.get_signature(unit_hashes.shingles(text, 5).reshape(-1, 1))
        return block._rows[0]

    for share in (0, .01, .02, .05, .1, .2) * 8:
        words = generator.choices(WORDS, k=300)
        left, right = " ".join(words), " ".join(changed(words, share, generator))
        true = jaccard(plain_shingles(left, 5), plain_shingles(right, 5))
        errors.append((signature(left) == signature(right)).mean() - true)
    # 112 hashes: standard deviation at most 0.047 a pair, so 0.007 of the mean of 48
    assert numpy.abs(errors).max() < .2 and abs(numpy.mean(errors)) < .03
    assert errors[0] == 0


def test_signatures_of_long_texts_do_not_depend_on_parts(tmp_path, monkeypatch):
    text = " ".join(random.Random(2).choices(WORDS, k=5_000))
    results = []
    for size in (64, 100_000):
        monkeypatch.setattr("data_scripts.cleaning.near_duplicates.SHINGLES_AT_ONCE", size)
        block = Signatures(tmp_path, NearSettings())
        block._places, block._rows, block._document = [], [], type("D", (), {"metadata": {"_index": 0}})
        results.append(block.get_signature(unit_hashes.shingles(text, 5).reshape(-1, 1)))
    assert results[0] == results[1]


def test_theory():
    assert chance_of_meeting(.8, NearSettings()) == pytest.approx(.924, abs=.001)
    assert chance_of_meeting(1, NearSettings()) == 1 and chance_of_meeting(0, NearSettings()) == 0


@pytest.mark.parametrize("part", [3, 1_000])
def test_equal_pairs_are_those_of_a_dictionary(part):
    generator = random.Random(3)
    texts = [[f"Text  {generator.randrange(30)}" for _ in range(count)] for count in (20, 0, 35, 7)]
    digests = [numpy.frombuffer(b"".join(map(overlap.digest, shard)), "<u8").reshape(-1, 2) for shard in texts]
    first, expected = {}, []
    for rank, shard in enumerate(texts):
        for index, text in enumerate(shard):
            kept = first.setdefault(overlap.normalise(text), (rank, index))
            if kept != (rank, index):
                expected.append((rank, index, *kept))
    found = equal_pairs(digests, part)
    assert [tuple(pair)[:4] for pair in found.tolist()] == expected


def test_pairs_are_counted_by_their_sources_whatever_these_are_called(tmp_path):
    shards = [Shard(rank, name, "a.jsonl.zst", "", "text", ("en",), "") for rank, name in enumerate(("a|b", "c"))]
    for shard in shards:
        write_json(facts_path(tmp_path / shard.source / shard.name, "ids.json"), ["first", "second"])
    digests = [numpy.array(rows, "<u8") for rows in ([[1, 1], [1, 1]], [[1, 1], [2, 2]])]
    save_decisions(equal_pairs(digests), shards, tmp_path, tmp_path / "out")
    totals = read_json(tmp_path / "out" / "totals.json")
    assert totals["pairs_across_sources"] == {"a|b|c": 1} and totals["pairs_within_sources"] == {"a|b": 1}
