"""Repair of encodings, and filters by length, lines and repetition.

Rules of web corpora (Gopher, arXiv:2112.11446, Table A1; C4, arXiv:1910.10683; FineWeb, arXiv:2406.17557) assume
English prose: measured on manuals, dictionaries and Chinese they remove much that is good, so each applies to the
kinds and with the thresholds that real text bears (data_scripts/README.md has the figures).
"""

import collections
import re
import unicodedata
import zlib

from datatrove.data import Document
from datatrove.pipeline.filters import GopherRepetitionFilter
from datatrove.utils.word_tokenizers import WordTokenizer

from data_scripts.cleaning.corpus_blocks import (
    PROSE,
    DocumentEditor,
    DocumentFilter,
    check_share,
    kind_of,
    passages,
)
from data_scripts.optional_packages import require

# Controls but tab and newline; C1 controls are ftfy's (they stand for Windows-1252 letters), dropped if it leaves them.
CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufff9-\ufffb\ufffe\uffff]")
LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\u2028\u2029]")
OVERSTRIKE = re.compile("[^\n]\x08")  # a typewriter's bold and underline, as old manual pages have it
C1 = re.compile("[\x80-\x9f]")
SURROGATES = re.compile("[\ud800-\udfff]")
TERMINAL = re.compile("\x1b\\[[0-9;]*[A-Za-z]")
HAN = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\U00020000-\U0002fa1f"  # scripts written without spaces
WORDS = re.compile(rf"[{HAN}]|[^\W{HAN}]+")
PIECES = re.compile(rf"[{HAN}]|[^\W{HAN}]+|[^\w\s]")  # a word, one such character, or one other sign


def repair_mojibake(text):
    """Text with wrongly decoded passages decoded anew (ftfy), otherwise as it was: quotes, ligatures, widths, entities.

    ftfy leaves a line alone unless `is_bad` finds an unlikely sequence in it, so lines without one are not sent there.
    """
    ftfy, badness = require("ftfy"), require("ftfy.badness")
    config = ftfy.TextFixerConfig(unescape_html=False, fix_latin_ligatures=False, fix_character_width=False,
                                  uncurl_quotes=False, fix_line_breaks=False, normalization=None)
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if not line.isascii() and (C1.search(line) or badness.is_bad(line)):
            lines[number] = ftfy.fix_text(line, config)
    return "\n".join(lines)


def strip_line_ends(text):
    """Text without spaces and tabs at the ends of its lines."""
    return "\n".join(map(str.rstrip, text.split("\n")))


class RepairText(DocumentEditor):
    """Encoding repaired, controls and null bytes removed, line ends "\\n", NFC (never NFKC: ² is not 2).

    Code keeps its letters, trailing spaces and normal form, which may be what a string or a test is about: only
    controls and line ends change there.
    """

    name = "repair"

    def edit(self, document):
        text, counts = document.text, {}

        def count(name, changed):
            counts[name] = int(changed != text)
            return changed

        if SURROGATES.search(text):
            text = count("surrogates", text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        prose = kind_of(document) != "code"
        if not prose:
            text = count("line_ends", LINE_ENDS.sub("\n", text))
        if prose:
            text = count("terminal_escapes", TERMINAL.sub("", text))
            text = count("overstrikes", OVERSTRIKE.sub("", text) if "\x08" in text else text)
            text = count("line_ends", LINE_ENDS.sub("\n", text))
            text = count("mojibake", text if text.isascii() else repair_mojibake(text))
        counts["null_bytes"] = text.count("\0")
        text = count("controls", CONTROLS.sub("", text))
        if prose:
            text = count("not_nfc", text if unicodedata.is_normalized("NFC", text) else
                         unicodedata.normalize("NFC", text))
            text = count("trailing_spaces", strip_line_ends(text))
        document.text = text
        return counts


class ShortTextFilter(DocumentFilter):
    """Drops texts that are too short, or that were decoded wrongly beyond repair.

    Args:
        min_characters: fewer, without the spaces around, are dropped.
        min_words: the same in words, where a Chinese, Japanese or Korean character counts as one; 0: not looked at.
        max_unreadable: most replacement characters (U+FFFD) as a share of the text.
    """

    name = "short"

    def __init__(self, min_characters=10, min_words=0, max_unreadable=0.005, exclusion_writer=None):
        super().__init__(None, exclusion_writer)
        if min_characters < 0 or min_words < 0:
            raise ValueError(f"min_characters={min_characters} and min_words={min_words} must not be negative")
        check_share("max_unreadable", max_unreadable)
        self.min_characters, self.min_words, self.max_unreadable = min_characters, min_words, max_unreadable

    def judge(self, document):
        text = document.text.strip()
        if not text:
            return False, "empty"
        if len(text) < self.min_characters:
            return False, "too_few_characters"
        if self.min_words and len(PIECES.findall(text[:64 * self.min_words])) < self.min_words:
            return False, "too_few_words"
        if text.count("\ufffd") > self.max_unreadable * len(text):
            return False, "unreadable"
        return True


LINK = re.compile(r"(?:https?|ftp)://\S+|www\.\S+|\[[^\]\n]*\]\([^)\n]*\)")
INDEX = re.compile(r"\D.{0,80}?(?:[ ,.]\s*|\.{3,}\s*)(?:\d{1,4}|\[\d+\])(?:\s*[-\u2013,]\s*(?:\d{1,4}|\[\d+\]))*\s*$")
TABLE = re.compile(r"[|+\-=_*~.:\s\d%$()/,]+$|(?:[^|\n]*\|){3}|(?:[^\t\n]*\t\s*){3}")
FILLER = re.compile(r"\b(?:lorem|ipsum|dolor|amet|consectetur|adipisci|adipiscing|eiusmod|tempor|incididunt|labore|"
                    r"magna|aliqua|veniam|nostrud|ullamco|laboris|commodo|consequat|voluptate|fugiat|pariatur|excepteur)\b")
ENDS = tuple(".!?:;,\"')]\u2026\u2019\u201d\u3002\uff01\uff1f\uff1a\uff1b\uff0c\u300d\u300f\uff09")


def line_class(line):
    """What a line of prose is: "link", "index", "table", "label" (few words, no punctuation at its end) or "text"."""
    links = sum(len(found.group()) for found in LINK.finditer(line)) if "//" in line or "](" in line else 0
    if links > len(line) / 2:
        return "link"
    if TABLE.match(line):
        return "table"
    if line[-1:].isdigit() or line.endswith("]"):
        return "index" if INDEX.match(line) else "text"
    if len(line) < 60 and not line.endswith(ENDS) and len(PIECES.findall(line)) < 8:
        return "label"
    return "text"


class BoilerplateFilter(DocumentFilter):
    """Drops prose most of whose text is not sentences: link lists, indices, tables, menus, filler.

    Args:
        max_shares: {class of line: largest share of the characters}; see `line_class`.
        min_characters: shorter documents pass: entries of dictionaries, rhymes, headings with a sentence.
        max_filler: largest share of "lorem ipsum" words among the words.
    """

    name = "boilerplate"
    MAX_SHARES = {"link": 0.5, "index": 0.6, "table": 0.7, "label": 0.8}

    def __init__(self, max_shares=None, min_characters=200, max_filler=0.1, kinds=PROSE, exclusion_writer=None):
        super().__init__(kinds, exclusion_writer)
        self.max_shares = {**self.MAX_SHARES, **(max_shares or {})}
        unknown = set(self.max_shares) - set(self.MAX_SHARES)
        if unknown:
            raise ValueError(f"max_shares names {sorted(unknown)[0]!r}; classes of lines are "
                             f"{', '.join(self.MAX_SHARES)}")
        for name, share in {**self.max_shares, "max_filler": max_filler}.items():
            check_share(name, share)
        self.min_characters, self.max_filler = min_characters, max_filler

    def judge(self, document):
        if len(document.text) < self.min_characters:
            return True
        shares = collections.Counter()
        for passage in passages(document.text):
            for line in passage.split("\n"):
                if line := line.strip():
                    shares[line_class(line)] += len(line)
        total = sum(shares.values())
        for name, most in self.max_shares.items():
            if shares[name] > most * total:
                return False, f"mostly_{name}"
        if "lorem" in document.text or "Lorem" in document.text:
            words = document.text.lower().split()
            if len(FILLER.findall(document.text.lower())) > self.max_filler * len(words):
                return False, "lorem_ipsum"
        return True


class Words(WordTokenizer):
    """Words for datatrove's filters without spaCy: runs of letters and digits, single ideographs."""

    def word_tokenize(self, text):
        return WORDS.findall(text)

    def sent_tokenize(self, text):
        return text.split("\n")

    def span_tokenize(self, text):
        raise NotImplementedError("the filters used here need no spans")


class RepetitionFilter(DocumentFilter):
    """Gopher's rules on repeated lines, paragraphs and n-grams (datatrove's filter), on passages of a document.

    A document goes when more than half of its passages do. What zlib cannot shrink to COMPRESSED of its size is not
    looked at: it repeats too little to break the limits, and counting n-grams is slow. Gopher's own limits remove a
    fifth of the manuals, whose signatures and tables repeat words; these lie above the 99.9 % quantile of every
    source of prose that was measured. Code and mathematics repeat by nature: there only repeated lines and paragraphs
    count.

    Args:
        rules, code_rules: arguments of GopherRepetitionFilter for prose and for the other kinds, beside the defaults.
        min_characters: shorter documents pass: a share of little text says nothing.
    """

    name = "repetition"
    COMPRESSED = 0.42
    RULES = {"dup_line_frac": None, "dup_para_frac": None, "dup_line_char_frac": 0.5, "dup_para_char_frac": 0.5,
             "top_n_grams": ((2, 0.25), (4, 0.35)), "dup_n_grams": ((10, 0.45),)}
    CODE_RULES = {"dup_line_frac": None, "dup_para_frac": None, "dup_line_char_frac": 0.8, "dup_para_char_frac": 0.8,
                  "top_n_grams": (), "dup_n_grams": ()}

    def __init__(self, min_characters=500, rules=None, code_rules=None, kinds=None, exclusion_writer=None):
        super().__init__(kinds, exclusion_writer)
        self.min_characters = min_characters
        self._prose = GopherRepetitionFilter(language=Words(), **{**self.RULES, **(rules or {})})
        self._code = GopherRepetitionFilter(language=Words(), **{**self.CODE_RULES, **(code_rules or {})})

    def judge(self, document):
        if len(document.text) < self.min_characters:
            return True
        rules = self._prose if kind_of(document) in PROSE else self._code
        parts = passages(document.text, 4_000, 3)
        reasons = collections.Counter()
        for part in parts:
            raw = part.encode("utf-8", "replace")
            if len(zlib.compress(raw, 1)) > self.COMPRESSED * len(raw):
                continue
            verdict = rules.filter(Document(text=part, id=document.id))
            if verdict is not True:
                reasons[verdict[1]] += 1
        if reasons.total() * 2 > len(parts):
            return False, reasons.most_common(1)[0][0]
        return True
