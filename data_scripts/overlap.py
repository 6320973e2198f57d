"""Exact duplicates and n-gram overlap between documents.

Two documents overlap if they share 13 consecutive words, or 30 consecutive characters of Chinese,
Japanese or Korean script (no spaces there to count words by); case, punctuation and white space do
not count. 13 words is the length used for GPT-3 (arXiv:2005.14165, App. C); 30 characters is ours.
"""

import hashlib
import re
import unicodedata

import numpy

WORDS, CHARACTERS = 13, 30
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af\U00020000-\U0003ffff"
_IS_CJK = re.compile(f"[{_CJK}]")
_WORD = re.compile(rf"[^\W_{_CJK}]+")


def normalise(text):
    """Text as duplicates are compared: compatibility forms, lower case, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def digest(text, seed=0):
    """16 bytes that equal texts share; `seed` makes independent orders of the same documents."""
    return hashlib.blake2b(normalise(text).encode("utf-8", "surrogatepass"), digest_size=16,
                           salt=int(seed).to_bytes(16, "little", signed=True)).digest()


def units(text):
    """(words, CJK characters) of a text, the two sequences whose n-grams are compared."""
    text = unicodedata.normalize("NFKC", text).lower()
    return _WORD.findall(text), _IS_CJK.findall(text)


class NgramIndex:
    """The n-grams of held-out documents, as sorted 64-bit hashes.

    A hash is the sum over the window of (random value of the unit) * (odd random factor of the place)
    modulo 2**64: a chance hit is possible (about held-out n-grams / 2**64 a window) and would merely
    drop a document that need not be dropped; an overlap is never missed. Memory is that of the held-out text: units
    that it does not hold share one value when other texts are compared.
    """

    _UNKNOWN = numpy.uint64(0x5851F42D4C957F2D)

    def __init__(self):
        self._values, self._random = {}, numpy.random.default_rng(13)
        self._factors = self._random.integers(0, 2**63, size=max(WORDS, CHARACTERS), dtype=numpy.uint64) * 2 + 1
        self._pool, self._used = numpy.empty(0, numpy.uint64), 0
        self._hashes, self._sorted = [], None

    def _value(self, unit):
        value = self._values.get(unit)
        if value is None:
            if self._sorted is not None:
                return self._UNKNOWN
            if self._used == len(self._pool):
                self._pool = self._random.integers(0, 2**64 - 1, size=65_536, dtype=numpy.uint64)
                self._used = 0
            value = self._values[unit] = self._pool[self._used]
            self._used += 1
        return value

    def _windows(self, sequence, length):
        count = len(sequence) - length + 1
        if count < 1:
            return numpy.empty(0, numpy.uint64)
        values = numpy.fromiter(map(self._value, sequence), numpy.uint64, len(sequence))
        total = numpy.zeros(count, numpy.uint64)
        for place in range(length):  # wraps around at 2**64, as intended
            total += values[place:place + count] * self._factors[place]
        return total

    def _hash(self, text):
        words, characters = units(text)
        return numpy.concatenate([self._windows(words, WORDS), self._windows(characters, CHARACTERS)])

    def add(self, text):
        """Take the n-grams of a held-out document in."""
        self._sorted = None
        self._hashes.append(numpy.unique(self._hash(text)))

    def __len__(self):
        self._sort()
        return len(self._sorted)

    def _sort(self):
        if self._sorted is None:
            self._sorted = numpy.unique(numpy.concatenate([numpy.empty(0, numpy.uint64), *self._hashes]))

    def compare(self, text):
        """(ranks of the n-grams added so far that the text has, rising, each once; how many n-grams it has in all)."""
        self._sort()
        hashes = numpy.unique(self._hash(text))
        if not len(hashes) or not len(self._sorted):
            return numpy.empty(0, numpy.int64), len(hashes)
        places = numpy.minimum(numpy.searchsorted(self._sorted, hashes), len(self._sorted) - 1)
        return places[self._sorted[places] == hashes], len(hashes)

    def overlaps(self, text):
        """Whether the text shares an n-gram with any document added so far."""
        return bool(len(self.compare(text)[0]))
