"""Hashes of runs of words, and of Chinese, Japanese or Korean characters, the same in every process.

A run's hash is the sum over its places of (hash of the unit) * (odd random factor of the place) modulo 2**64, as in
`overlap.NgramIndex`, which draws the values of units in order of arrival and so cannot be shared between processes.
"""

import numpy

from data_scripts import overlap

LONGEST = max(overlap.WORDS, overlap.CHARACTERS)
MOST_KEPT = 400_000  # values of units a process keeps, about 40 MB
_FACTORS = numpy.random.default_rng(13).integers(0, 2**63, size=LONGEST, dtype=numpy.uint64) * 2 + 1


class _Values(dict):
    def __missing__(self, unit):
        import xxhash

        if len(self) >= MOST_KEPT:
            self.clear()
        value = self[unit] = xxhash.xxh64_intdigest(unit.encode("utf-8", "surrogatepass"))
        return value


_values = _Values()


def unit_values(units):
    """The units' own hashes, uint64."""
    return numpy.fromiter(map(_values.__getitem__, units), numpy.uint64, len(units))


def run_hashes(values, lengths):
    """{length: hashes of all runs of that many units} for the `lengths` that fit, from one pass up to the longest."""
    found, total = {}, numpy.zeros(len(values), numpy.uint64)
    for length in range(1, min(max(lengths, default=0), len(values)) + 1):
        count = len(values) - length + 1
        total = total[:count] + values[length - 1:] * _FACTORS[length - 1]  # wraps around at 2**64, as intended
        if length in lengths:
            found[length] = total
    return found


def mixed(hashes):
    """Hashes whose every bit depends on all bits of the given ones (the finaliser of SplitMix64)."""
    hashes = (hashes ^ (hashes >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> numpy.uint64(31))


def shingles(text, length):
    """Distinct mixed hashes of all runs of `length` words and of `length` CJK characters.

    A sequence shorter than that gives one run, the whole of it, so that short texts can be duplicates too.
    """
    parts = []
    for salt, units in enumerate(overlap.units(text)):
        if units:
            size = min(length, len(units))
            parts.append(run_hashes(unit_values(units), {size})[size] + numpy.uint64(salt * LONGEST + size))
    return mixed(numpy.unique(numpy.concatenate(parts))) if parts else numpy.empty(0, numpy.uint64)
