"""Dictionaries and glossaries as documents, from Debian's packages.

    python -m data_scripts.fetch_dictionaries --output_dir data/raw            # 25 MB of downloads

Entries are short, so that neighbours share a document of about 3,000 characters. Lines broken for the terminal are put
together again; what each entry repeats (the tags of its source, braces around cross-references) is removed. WordNet
comes from its data files: each synset once, with its words, definition and examples.
"""

import re

from data_scripts.reading.fetching import Source, decode, main
from data_scripts.reading.packages import members

TOGETHER = 3_000  # characters of entries in a document
VERSE = 56        # columns: a paragraph whose lines are all shorter was not broken by a program
DIGITS = {digit: value for value, digit in
          enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}
PARTS = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}


def number(digits):
    """A number of a dictd index: base 64, the highest digit first."""
    value = 0
    for digit in digits:
        value = value * 64 + DIGITS[digit]
    return value


def dictd_entries(index, data):
    """Each distinct entry of a dictionary in dictd's format, as bytes, in the order of the data."""
    places = set()
    for line in index.decode("utf-8", "replace").splitlines():
        word, start, size = line.split("\t")[:3]
        if not word.startswith("00-database") and not word.startswith("00database"):
            places.add((number(start), number(size)))
    for start, size in sorted(places):
        yield data[start:start + size]


def reflow(entry):
    """An entry's paragraphs as one line each; verse, quotations and numbered senses begin lines of their own."""
    blocks = []
    for block in re.split(r"\n\s*\n", entry):
        lines = [line for line in block.split("\n") if line.strip()]
        if not lines:
            continue
        margin = min(len(line) - len(line.lstrip()) for line in lines[1:] or lines)
        text, verse = lines[0].strip(), len(lines) > 1 and max(map(len, lines)) < VERSE
        for line in lines[1:]:
            line, inset = line.strip(), len(line) - len(line.lstrip()) - margin
            begins = verse or inset >= 8 or re.match(r"\d{1,2}[.):] |\([a-z]\) |--[A-Z]", line)
            text += ("\n" if begins else " ") + line
        blocks.append(text)
    return "\n".join(blocks)


def clean_entry(entry):
    """An entry without the marks of its source."""
    entry = re.sub(r"\[(1913 Webster( \+\w+)?|PJC|WordNet 1\.5|Webster 1913 Suppl\.|[A-Za-z ]+ \+PJC)\]", "", entry)
    entry = re.sub(r"(?s)\{([^{}]*)\}", r"\1", entry)
    return reflow(entry).strip()


def together(entries, name):
    """Yield (place, text, metadata) of documents of neighbouring entries."""
    texts, size, count = [], 0, 0
    for entry in entries:
        if not entry:
            continue
        texts.append(entry)
        size += len(entry)
        if size >= TOGETHER:
            yield f"{name}#{count}", "\n\n".join(texts), {}
            texts, size, count = [], 0, count + 1
    if texts:
        yield f"{name}#{count}", "\n\n".join(texts), {}


def dictionary(name, package, licence, origin):
    """A source from a package with one dictionary in dictd's format."""
    def documents(packages, left_out):
        files = dict(members(packages[0], ["usr/share/dictd/*.dict", "usr/share/dictd/*.index"], left_out))
        data = next((data for path, data in files.items() if path.endswith(".dict")), None)
        index = next((data for path, data in files.items() if path.endswith(".index")), None)
        if data is None or index is None:
            raise ValueError(f"{packages[0].path.name} holds {', '.join(files) or 'nothing'} in usr/share/dictd, "
                             "expected a .dict.dz and an .index file")
        yield from together((clean_entry(decode(entry) or "") for entry in dictd_entries(index, data)), name)

    return Source(name, "text", ("en",), licence, origin, (("debian", package),), documents)


def synset(line):
    """A line of WordNet's data files as an entry: words (part of speech): definition; examples."""
    head, _, gloss = line.partition("|")
    fields = head.split()
    words = [fields[4 + 2 * place].replace("_", " ") for place in range(int(fields[3], 16))]
    words = [re.sub(r"\((a|p|ip)\)$", "", word) for word in words]  # where an adjective may stand
    return f"{', '.join(words)} ({PARTS[fields[2]]}): {gloss.strip()}"


def wordnet_documents(packages, left_out):
    for path, data in members(packages[0], ["usr/share/wordnet/data.*"], left_out):
        lines = data.decode("utf-8").split("\n")
        # The licence stands before the data, in lines that begin with spaces.
        yield from together((synset(line) for line in lines if line and not line.startswith(" ")), path)


SOURCES = [
    dictionary("gcide", "dict-gcide", "GPL-3+ (text of 1913: public domain)",
               "Collaborative International Dictionary of English, from Webster 1913"),
    dictionary("foldoc", "dict-foldoc", "GFDL-1.1+", "Free On-line Dictionary of Computing"),
    dictionary("jargon", "dict-jargon", "public domain", "The Jargon File 4.4.7"),
    dictionary("devils-dictionary", "dict-devil", "public domain", "Ambrose Bierce, The Devil's Dictionary"),
    Source("wordnet", "text", ("en",), "WordNet licence", "WordNet 3.0: synsets with definitions and examples",
           (("debian", "wordnet-base"),), wordnet_documents),
]

if __name__ == "__main__":
    main("fetch_dictionaries", SOURCES, __doc__)
