"""Back-translation: English -> Spanish -> English by Apertium's rules, and what of it is good enough to keep.

Apertium (Forcada et al., 2011) works offline and translates word for word, so much comes back broken. A sentence is
kept only if all of this holds, and each refusal is counted by its reason:

    the numbers, names and decisive words (not, more, first, which ...) are the same in the same order,
    so are the pronouns and auxiliaries: Spanish turns questions round in other ways,
    the text has capitals, so that names can be told,
    every new content word shares a sense of WordNet with a word that went, no compound noun is taken apart,
    every new pair of neighbours occurs in English at hand, so that "the king wise" does not pass,
    it still begins as a sentence of its kind (an order stays an order, a question a question),
    between `LEAST_ALIKE` and all of its words are unchanged.
"""

import difflib
import re
import shutil
import subprocess

from data_scripts.augmentation.augment_english import tokens
from data_scripts.augmentation.augment_protected import DECISIVE, SENTENCE, WORD, difference, names, operands, protected

LEAST_ALIKE = 0.5
SHORTEST, LONGEST = 5, 30  # words of a sentence
BATCH = 2_000              # sentences a process
_GUARD = "\n\n"            # Apertium takes an empty line for a new block: sentences stay apart
_FUNCTION = frozenset("a an the of in on at to for from by with about into and or but that this these those it its "
                      "is are was "
                      "were be been do does did have has had i you he she we they me him her us them my your his our "
                      "their there as than so will would can could shall should may might must".split())


_EXCHANGEABLE = frozenset("of in on at about by the".split())
COMMON = 0.1  # a new pair of neighbours must be met at least so often as the pair in its place
_FRAME = frozenset("i you he she it we they me him her us them am is are was were be been being do does did have has "
                   "had will "
                   "would can could shall should may might must there".split())


class ApertiumMissing(ValueError):
    """Apertium or its pair is not installed."""


def check_installed(program="apertium"):
    """Raises ApertiumMissing with the command that mends it."""
    how = "run `apt-get install -y --no-install-recommends apertium apertium-eng-spa`, or pass --back_translation 0"
    if shutil.which(program) is None:
        raise ApertiumMissing(f"back_translation needs the program {program!r}, which is not installed: {how}")
    modes = subprocess.run([program, "-l"], capture_output=True, text=True).stdout.split()
    missing = {"eng-spa", "spa-eng"} - set(modes)
    if missing:
        raise ApertiumMissing(f"{program} has no direction {', '.join(sorted(missing))}: {how}")


def _run(direction, text):
    done = subprocess.run(["apertium", "-u", direction], input=text, capture_output=True, text=True,
                          encoding="utf-8", errors="replace")
    if done.returncode:
        raise RuntimeError(f"apertium {direction} ended with {done.returncode}: {done.stderr.strip()[:300]}")
    return done.stdout


def there_and_back(sentences):
    """Each sentence through Spanish; None where the blocks that came back are not as many as went in."""
    if not sentences:
        return []
    back = _run("spa-eng", _run("eng-spa", _GUARD.join(sentences) + _GUARD)).strip("\n").split(_GUARD)
    if len(back) == len(sentences):
        return [sentence.strip() for sentence in back]
    if len(sentences) == 1:
        return [None]
    half = len(sentences) // 2
    return there_and_back(sentences[:half]) + there_and_back(sentences[half:])


def translatable(text):
    """The sentences that may be sent, as (start, end): whole ones without anything protected, or numbers alone."""
    mask, found = protected(text), []
    for match in SENTENCE.finditer(text):
        body = match[0].strip()
        start = match.start() + match[0].index(body) if body else 0
        words = len(WORD.findall(body))
        if SHORTEST <= words <= LONGEST and body[-1] in ".?!" and not any(mask[start:start + len(body)]):
            found.append((start, start + len(body)))
    return found


def _decisive(words):
    return ["what" if word == "which" else word for word in words if word in DECISIVE]


class BackTranslation:
    """`variant(text, taboo, rng)` -> (text, changes) or None; `prepare(texts)` sends what they need in batches first.

    Attributes:
        refused: {reason: count} of sentences that came back.
    """

    kind = "back_translation"
    source, licence = "Apertium eng-spa and spa-eng", "GPL-2.0-or-later (the program; its output is yours)"

    def __init__(self, wordnet, pairs):
        check_installed()
        self.wordnet, self.pairs, self.translations = wordnet, pairs, {}

    def prepare(self, texts):
        """Translate the sentences of these texts, in few processes; forget those of the call before."""
        wanted = list(dict.fromkeys(text[start:end] for text in texts for start, end in translatable(text)))
        self.translations = {}
        for first in range(0, len(wanted), BATCH):
            batch = wanted[first:first + BATCH]
            self.translations.update(zip(batch, there_and_back(batch)))

    def refusal(self, before, after, taboo=frozenset()):
        """Why a translation is not good enough, or None."""
        if after is None or not after.strip() or "  " in after or re.search(r"[*#@\\]|\s[.,?!]", after):
            return "words lost or unknown"
        if after.lower() == before.lower():
            return "unchanged"
        old, new = [list(map(str.lower, WORD.findall(text))) for text in (before, after)]
        if operands(before) != operands(after) or names(before) != names(after):
            return "numbers or names changed"
        if _decisive(old) != _decisive(new) or before[-1] != after[-1]:
            return "decisive words changed"
        if [w for w in old if w in _FRAME] != [w for w in new if w in _FRAME]:
            return "pronouns or auxiliaries changed"
        if [w for w in old if w in taboo and w not in _FUNCTION] != [w for w in new if w in taboo
                                                                     and w not in _FUNCTION]:
            return "a word of the answer changed or moved"
        if old[0] != new[0]:
            return "begins in another way"
        if len(old) - len(new) > 1 or len(new) - len(old) > 2 or \
                difflib.SequenceMatcher(None, old, new).ratio() < LEAST_ALIKE:
            return "too different"
        gone, come = [w for w in old if w not in new], [w for w in new if w not in old]
        return self._meaning(gone, come) or self._fluency(before, after)

    def _share_sense(self, first, second):
        """Whether two words have a sense in common, and a part of speech with the same ending."""
        forms = [{(pos, ending) for _, pos, ending in self.wordnet.analyses(word)} for word in (first, second)]
        return bool(forms[0] & forms[1] and self.wordnet.related(first) & self.wordnet.related(second))

    def _meaning(self, gone, come):
        if (set(gone) | set(come)) & _FUNCTION - _EXCHANGEABLE:
            return "grammar words changed"
        gone = [word for word in gone if word not in _FUNCTION]
        come = [word for word in come if word not in _FUNCTION]
        if len(gone) != len(come):
            return "a content word lost or added"
        related = all(any(self._share_sense(new, old) for old in gone) for new in come) and \
            all(any(self._share_sense(new, old) for new in come) for old in gone)
        return None if related else "another meaning"

    def _fluency(self, before, after):
        old, new = tokens(before), tokens(after)
        known = set(zip(old, old[1:]))
        fresh = [pair for pair in zip([".", *new], new) if pair not in known and pair[0] != pair[1]]
        now = set(zip(new, new[1:]))
        capitals = {word.lower() for word in names(before)}
        broken = any((a, b) not in now and not {a, b} & _FUNCTION and
                     (f"{a}_{b}" in self.wordnet.senses["noun"] or capitals & {a, b}) for a, b in known)
        rarer = len(old) == len(new) and any(
            self.pairs.pairs[f"{c} {d}"] < COMMON * self.pairs.pairs[f"{a} {b}"]
            for a, b, c, d in zip(old, old[1:], new, new[1:]) if (a, b) != (c, d))
        repeated = broken or any(a == b for a, b in zip(new, new[1:]))
        # "american the citizens": an article in the middle of a noun phrase
        inserted = any(b == "the" and a not in _FUNCTION and (a, b) not in known for a, b in zip(new, new[1:]))
        articles = inserted or any(a in ("a", "an") and (b[0] in "aeiou") != (a == "an") and (a, b) not in known
                       for a, b in zip(new, new[1:]))
        if repeated or articles or rarer or not all(self.pairs.attested(a, b, 2) for a, b in fresh if (a,
                                                                                                       b) != (".",
                                                                                                              new[0])):
            return "word pairs not met in English"
        return None

    def variant(self, text, taboo, rng):
        pieces, changes, end, reasons = [], [], 0, []
        for start, stop in translatable(text):
            before = text[start:stop]
            after = self.translations[before]
            reason = self.refusal(before, after, taboo)
            reasons.append(reason)
            if reason is None:
                pieces += [text[end:start], after]
                end = stop
                changes.append({"rule": "eng-spa-eng", **difference(before, after)})
        self.reasons = reasons or ["no free sentence"]
        return ("".join(pieces) + text[end:], changes) if changes else None
