"""Both ends of entropy: what says the same over and over, and what says nothing (base64, hex dumps, key mashing).

Repetition is measured by zlib on passages of one length, since the ratio depends on it. Randomness is measured in
bits per Latin letter or space under a bigram model of the shipped English (Austen, Bible, Shakespeare): 3.3-4.7 for
English manuals, 3.5-5.8 for other European languages, up to 6.7 for code, but 7.3-9.1 for random letters and base64.
A table of numbers or bytes is told by its share of digits. Limits lie outside the 99.9 % quantiles of real text;
measured in README.
"""

import functools
import lzma
import re
import zlib
from pathlib import Path

import numpy as np

from data_scripts.cleaning.corpus_blocks import PROSE, DocumentFilter, kind_of, passages

ENGLISH = Path(__file__).parents[1] / "corpus" / "english.txt.xz"
TRAINED_ON = 3_000_000           # bytes of it
WINDOW = 2_000                   # bytes compressed at a time
LEAST_LETTERS = 200              # Latin ones in a passage, for the bigram model to speak
NUMBERS = re.compile(r"(?<![A-Za-z_])(?:0[xX])?[0-9a-fA-F]*\d[0-9a-fA-F]*(?![A-Za-z_])")  # also hexadecimal

# {kind: limit}. English is told apart where a document's language says so.
LEAST_RATIO = {"text": 0.08, "multilingual": 0.08, "code": 0.05, "mathematics": 0.06}
MOST_BITS = {"english": 5.0, "text": 6.5, "multilingual": 6.5, "code": 7.0, "mathematics": None}
MOST_NUMBERS = {"text": 0.5, "multilingual": 0.5, "code": 0.75, "mathematics": 0.9}


def letter_codes(text):
    """Codes 0-25 of the Latin letters of a text without regard to case, 26 where other characters lie between them."""
    raw = np.frombuffer(text.encode("ascii", "replace"), dtype=np.uint8)
    letters = (raw | 32) - np.uint8(97)
    codes = np.where((letters < 26) & (raw >= 65), letters, np.uint8(26))
    keep = np.ones(len(codes), dtype=bool)
    keep[1:] = (codes[1:] != 26) | (codes[:-1] != 26)  # one gap, however wide
    return codes[keep].astype(np.intp)


@functools.lru_cache(maxsize=1)
def bigram_costs():
    """(729,) bits of each pair of codes, from the shipped English."""
    with lzma.open(ENGLISH) as stream:
        codes = letter_codes(stream.read(TRAINED_ON).decode("utf-8", "ignore"))
    counts = np.bincount(codes[:-1] * 27 + codes[1:], minlength=729).reshape(27, 27) + 1.0
    return -np.log2(counts / counts.sum(axis=1, keepdims=True)).ravel()


def letter_bits(text):
    """Mean bits per Latin letter or gap, None for a text of too few letters or mostly of another script."""
    codes = letter_codes(text)
    letters = int((codes < 26).sum())
    if letters < LEAST_LETTERS or 2 * letters < len(text) - text.count(" "):
        return None
    return float(bigram_costs()[codes[:-1] * 27 + codes[1:]].mean())


def compression_ratio(text):
    """Compressed through uncompressed size of the first WINDOW bytes, None for a shorter text."""
    raw = text[:WINDOW].encode("utf-8", "replace")[:WINDOW]
    return len(zlib.compress(raw, 6)) / WINDOW if len(raw) == WINDOW else None


def number_share(text):
    """Share of the characters other than spaces and commas that are (hexadecimal) numbers."""
    total = len(text) - sum(map(text.count, " \n\t,"))
    return sum(map(len, NUMBERS.findall(text))) / total if total else 0.0


class EntropyFilter(DocumentFilter):
    """Drops documents most of whose passages are too repetitive, too random or numbers alone.

    Args:
        least_ratio, most_bits, most_numbers: limits by kind beside the defaults above; None switches a rule off.
        min_characters: shorter documents pass.
    """

    name = "entropy"

    def __init__(self, least_ratio=None, most_bits=None, most_numbers=None, min_characters=200, kinds=None,
                 exclusion_writer=None):
        super().__init__(kinds, exclusion_writer)
        for name, given, known in (("least_ratio", least_ratio, LEAST_RATIO), ("most_bits", most_bits, MOST_BITS),
                                   ("most_numbers", most_numbers, MOST_NUMBERS)):
            unknown = set(given or ()) - set(known)
            if unknown:
                raise ValueError(f"{name} names {sorted(unknown)[0]!r}; known are {', '.join(known)}")
        self.least_ratio = {**LEAST_RATIO, **(least_ratio or {})}
        self.most_bits = {**MOST_BITS, **(most_bits or {})}
        self.most_numbers = {**MOST_NUMBERS, **(most_numbers or {})}
        self.min_characters = min_characters

    def fault(self, passage, kind, english):
        """Why a passage is refused, or None."""
        least, most_numbers = self.least_ratio[kind], self.most_numbers[kind]
        most_bits = self.most_bits["english" if english else kind]
        if least is not None and (ratio := compression_ratio(passage)) is not None and ratio < least:
            return "too_repetitive"
        if most_numbers is not None and number_share(passage) > most_numbers:
            return "mostly_numbers"
        if most_bits is not None and (bits := letter_bits(passage)) is not None and bits > most_bits:
            return "too_random"
        return None

    def judge(self, document):
        if len(document.text) < self.min_characters:
            return True
        kind = kind_of(document)
        english = kind in PROSE and document.metadata.get("language") == "en"
        parts = passages(document.text, WINDOW + 500, 4)
        if len(parts) == 1 and len(document.text) > 2 * WINDOW:  # of which zlib would see the beginning only
            parts = [document.text[:len(document.text) // 2], document.text[len(document.text) // 2:]]
        faults = [fault for part in parts if (fault := self.fault(part, kind, english))]
        if 2 * len(faults) > len(parts):
            return False, max(set(faults), key=faults.count)
        return True
