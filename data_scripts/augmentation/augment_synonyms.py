"""Words replaced by synonyms of WordNet, where part of speech, sense and neighbours leave little doubt.

No tagger is used. A word is changed only if nine in ten of its uses have one part of speech and six in ten one sense,
the synonym is itself mostly used in that sense and often enough to be known, its regular inflection is the word's,
and both
its pairs with the words beside it occur in English at hand.
"""

import re

from data_scripts.augmentation.augment_english import ADJECTIVE, ADVERB, END, NOUN, VERB, inflect, tokens
from data_scripts.augmentation.augment_protected import DECISIVE, SENTENCE, WORD, protected

POS_SHARE, SENSE_SHARE, BACK_SHARE = 0.9, 0.6, 0.6  # of the uses counted in tagged text
LEAST_MET, LEAST_SEEN = 4, 10                       # times: in tagged text, in the English at hand
CHANGED = 0.6                                       # of the words that could be, so that copies differ
SHORTEST = 4                                        # letters
PARTICLES = frozenset("up down out off on in over away back through about along around for to with at of by".split())
KEPT = DECISIVE | PARTICLES | frozenset("have having does done doing being been would should could might must will "
                                        "shall there here "
                            "this that these those with from into onto upon than such very much also just even still "
                            "quite rather thing things please thanks thank hello okay".split())


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
        if not analyses or any(word in self.wordnet.irregular[pos] for pos in (NOUN, VERB)):
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
            if not re.fullmatch(r"[a-z]{3,}", other) or other[:5] == lemma[:5] or other in self.wordnet.irregular[pos]:
                continue
            its_synset, its_share, its_met = self._sense(other, pos)
            form = inflect(other, ending)
            if its_synset == synset and its_share >= BACK_SHARE and its_met >= LEAST_MET and form and \
                    self.pairs.words[form] >= LEAST_SEEN and self._reading(form) == (other, pos, ending):
                found.append((-its_met, form))
        return [form for _, form in sorted(found)]

    def _fits(self, before, word, after, pos):
        if pos == VERB and after in PARTICLES or f"{before}_{word}" in self.wordnet.senses[NOUN] \
                or f"{word}_{after}" in self.wordnet.senses[NOUN]:
            return False
        if pos == NOUN and "of" in (before, after):  # margin of error, league of nations: fixed phrases
            return False
        return pos in (NOUN, VERB, ADJECTIVE, ADVERB)

    def _choose(self, text, match, sentence, taboo, mask):
        """A synonym for one word of a sentence that stands there well, or None."""
        word = match[0]
        lower = word.lower()
        if len(word) < SHORTEST or lower in KEPT or lower in taboo or "'" in word \
                or any(mask[match.start():match.end()]):
            return None
        if word != lower and (match.start() != sentence.start() or word != lower.capitalize()
                              or not self.pairs.is_lower_case_word(lower)):
            return None
        if match.start() and text[match.start() - 1] in "-’'" or text[match.end():match.end() + 1] in ("-", "'", "’"):
            return None
        options = self.candidates(lower)
        if not options:
            return None
        before = ([END] + tokens(text[sentence.start():match.start()]))[-1]
        after = (tokens(text[match.end():sentence.end()]) + [END])[0]
        if not self._fits(before, lower, after, self._reading(lower)[1]):
            return None
        for option in options:
            article = before in ("a", "an") and (option[0] in "aeiou") != (lower[0] in "aeiou")
            if option not in taboo and not article and self.pairs.attested(before, option) \
                    and self.pairs.attested(option, after):
                return option if word == lower else option.capitalize()
        return None

    def variant(self, text, taboo, rng):
        mask, pieces, changes, end = protected(text), [], [], 0
        for sentence in SENTENCE.finditer(text):
            for match in WORD.finditer(text, sentence.start(), sentence.end()):
                option = self._choose(text, match, sentence, taboo, mask)
                if option is None or rng.random() >= CHANGED and changes:
                    continue
                pieces += [text[end:match.start()], option]
                end = match.end()
                changes.append({"rule": "synonym", "from": match[0], "to": option})
        return ("".join(pieces) + text[end:], changes) if changes else None
