"""Words replaced by synonyms of WordNet, where part of speech, sense and neighbours leave little doubt.

No tagger is used. A word is changed only if nine in ten of its uses have one part of speech and three in four one
sense, the synonym is itself mostly used in that sense and not much rarer, its regular inflection is the word's, and it
stands beside the same neighbours in English at hand as readily as the word.
"""

import re

from data_scripts.augmentation.augment_english import ADJECTIVE, END, MET, NOUN, VERB, inflect, tokens
from data_scripts.augmentation.augment_protected import DECISIVE, SENTENCE, WORD, protected

POS_SHARE, SENSE_SHARE, BACK_SHARE = 0.9, 0.75, 0.75  # of the uses counted in tagged text
LEAST_MET, LEAST_SEEN = 4, 30                       # times: in tagged text, in the English at hand
RARER = 0.3                                         # a substitute's uses, against the word's
CHANGED = 0.6                                       # of the words that could be, so that copies differ
SHORTEST = 4                                        # letters
PARTICLES = frozenset("up down out off on in over away back through about along around for to with at of by".split())
KEPT = DECISIVE | PARTICLES | frozenset("have having does done doing being been would should could might must will "
                                        "shall there here "
                            "this that these those with from into onto upon than such very much also just even still "
                            "quite rather thing things please thanks thank hello okay".split())


def _may_change(text, match, sentence, taboo, mask, pairs):
    """Whether a word is free: long enough, no name, no part of an operand, a compound or the answer."""
    word, lower = match[0], match[0].lower()
    neighbours = text[match.start() - 1:match.start()] + text[match.end():match.end() + 1]
    if len(word) < SHORTEST or lower in KEPT or lower in taboo or "'" in word or set(neighbours) & set("-’'") \
            or any(mask[match.start():match.end()]):
        return False
    opens = not WORD.search(text, sentence.start(), match.start())
    return word == lower or opens and word == lower.capitalize() and pairs.is_lower_case_word(lower)


def word_edits(text, taboo, wordnet, pairs, options):
    """[(start, end, new word)]: for every free word the first of its options that stands well in its place.

    `options(match)` lists (a word, how often its pairs with the neighbours must be met).
    """
    mask, edits = protected(text), []
    for sentence in SENTENCE.finditer(text):
        for match in WORD.finditer(text, sentence.start(), sentence.end()):
            if not _may_change(text, match, sentence, taboo, mask, pairs) or not (found := options(match)):
                continue
            word = match[0].lower()
            before = ([END] + tokens(text[sentence.start():match.start()]))[-1]
            after = (tokens(text[match.end():sentence.end()]) + [END])[0]
            if f"{before}_{word}" in wordnet.senses[NOUN] or f"{word}_{after}" in wordnet.senses[NOUN]:
                continue
            for option, least in found:
                article = before in ("a", "an") and (option[0] in "aeiou") != (word[0] in "aeiou")
                if option not in taboo and option not in (before, after) and not article and \
                        pairs.stands(before, word, option, after, least):
                    edits.append((*match.span(), option))
                    break
    return edits


def apply_edits(text, edits, rng):
    """(text, [{"from", "to"}]) with the first of the edits and some of the others; None without any."""
    pieces, changes, end = [], [], 0
    for start, stop, new in sorted(edits):
        if start < end or changes and rng.random() >= CHANGED:
            continue
        new = new[0].upper() + new[1:] if text[start].isupper() else new
        pieces += [text[end:start], new]
        changes.append({"from": text[start:stop], "to": new})
        end = stop
    return ("".join(pieces) + text[end:], changes) if changes else None


# Read and found wanting: another construction ("help do"), register or object than the word's.
POOR = frozenset("assist assisted assisting assists being beasts encourage encouraged engineering furnish furnished "
                 "individuals instantly intention intentions kind manner manners merely persons printed promote "
                 "promoted scheme schemes someone sort strategy style technology used".split())


class Synonyms:
    """`variant(text, taboo, rng)` -> (text, changes) or None where no word could be changed."""

    kind = "synonyms"
    source, licence = "WordNet 3", "WordNet licence (Princeton University)"

    def __init__(self, wordnet, pairs):
        self.wordnet, self.pairs, self._known = wordnet, pairs, {}

    def _sense(self, lemma, pos):
        """(synset, share of the lemma's uses, times met) of the most frequent sense."""
        senses = self.wordnet.senses[pos][lemma]
        total = sum(count for _, count in senses)
        synset, count = max(senses, key=lambda sense: sense[1])
        return synset, 1.0 if len(senses) == 1 else count / total if total else 0.0, count

    def _reading(self, word):
        """(lemma, pos, ending) of a word with one clear part of speech, else None."""
        analyses = [a for a in self.wordnet.analyses(word) if a[1] != ADJECTIVE or a[2] == "base"]
        if not analyses or any(word in known[pos] for pos in (NOUN, VERB)
                               for known in (self.wordnet.irregular, self.wordnet.irregular_lemmas)):
            return None
        weight = {a: self.wordnet.met[a[1]][a[0]] for a in analyses}
        best = max(analyses, key=weight.get)
        same = sum(weight[a] for a in analyses if a[1] == best[1])
        total = sum(weight.values())
        alone = len({a[1] for a in analyses}) == 1
        return best if alone or total and same / total >= POS_SHARE else None

    def candidates(self, word):
        """Synonyms of a lower-case word in its form, the most frequent first; [] where there is doubt."""
        if word not in self._known:
            self._known[word] = self._candidates(word)
        return self._known[word]

    def _candidates(self, word):
        reading = self._reading(word)
        if reading is None:
            return []
        lemma, pos, ending = reading
        synset, share, met = self._sense(lemma, pos)
        if share < SENSE_SHARE or met < LEAST_MET:
            return []
        found = []
        for other in self.wordnet.words[pos][synset]:
            if not re.fullmatch(r"[a-z]{3,}", other) or other[:5] == lemma[:5] or \
                    other in self.wordnet.irregular_lemmas[pos]:
                continue
            its_synset, its_share, its_met = self._sense(other, pos)
            form = inflect(other, ending)
            common = form and form not in POOR and \
                self.pairs.words[form] >= max(LEAST_SEEN, RARER * self.pairs.words[word])
            if common and its_synset == synset and its_share >= BACK_SHARE and its_met >= LEAST_MET and \
                    self._reading(form) == (other, pos, ending):
                found.append((-its_met, form))
        return [form for _, form in sorted(found)]

    def variant(self, text, taboo, rng):
        edits = word_edits(text, taboo, self.wordnet, self.pairs,
                           lambda match: [(word, MET) for word in self.candidates(match[0].lower())])
        found = apply_edits(text, edits, rng)
        return found and (found[0], [{"rule": "synonym", **change} for change in found[1]])
