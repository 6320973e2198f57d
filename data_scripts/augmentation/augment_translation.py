"""Back-translation: English -> Spanish -> English by Apertium's rules, and what of it is good enough to keep.

Apertium (Forcada et al., 2011) works offline and translates word for word: of 2,900 sentences of prose that came back,
one in a hundred could be kept whole. But words that it chose are often good, for it has told noun from verb
(paraphrases by a pivot language: Bannard and Callison-Burch, 2005). So a sentence stays as it was written, and only
single words and phrases are taken over, each where it is gone from what came back and its counterpart is new there:

    words of `WORDS`, in the same form (plural, past, -ing), read among 17,800 sentences and found good
    in most places (those of `NEIGHBOURED` only where English at hand has them beside the same neighbours),
    and the `PHRASES`.

What the translator did not know, lost, added or turned round stays as in the source.
"""

import re
import shutil
import subprocess

from data_scripts.augmentation.augment_english import ADJECTIVE, ADVERB, MET, NOUN, VERB
from data_scripts.augmentation.augment_protected import SENTENCE, WORD, protected, words_of
from data_scripts.augmentation.augment_synonyms import apply_edits, word_edits

SHORTEST, LONGEST = 5, 40  # words of a sentence
BATCH = 2_000              # sentences a process


def _pairs(words):
    return {pos: dict(pair.split(">") for pair in pairs.split()) for pos, pairs in words.items()}


WORDS = _pairs({
    NOUN: "movie>film phone>telephone attorney>lawyer customer>client amount>quantity kingdom>realm manner>way "
          "path>route outcome>result peak>summit topic>subject exam>examination vacation>holiday supplier>provider "
          "seller>vendor teenager>adolescent remainder>rest gasoline>petrol freeway>motorway funding>financing "
          "duration>length assumption>supposition grave>tomb assailant>aggressor purchaser>buyer parcel>package "
          "noon>midday backpack>rucksack freedom>liberty jail>prison journey>trip ability>capacity staff>personnel "
          "corporation>company someone>somebody disease>illness decline>decrease supporter>follower",
    VERB: "start>begin begin>start stay>remain attempt>try retrieve>recover regain>recover prohibit>forbid "
          "confront>face disclose>reveal dedicate>devote exceed>surpass permit>allow construct>build demonstrate>show "
          "free>release rebuild>reconstruct vanish>disappear commence>begin utilise>use utilize>use assemble>gather "
          "assess>evaluate halt>stop pollute>contaminate abduct>kidnap bother>annoy amaze>astound frighten>scare "
          "wander>roam weep>cry pick>choose gain>obtain",
    ADJECTIVE: "large>big entire>whole various>several actual>real principal>main mandatory>compulsory huge>enormous "
               "prohibited>forbidden awful>terrible dreadful>terrible tremendous>enormous frightened>scared "
               "everyday>daily peculiar>odd largest>biggest strange>odd wealthy>rich notable>remarkable "
               "outstanding>exceptional meaningful>significant ordinary>normal ongoing>current honest>sincere",
    ADVERB: "completely>entirely nearly>almost eventually>finally ultimately>finally subsequently>later "
            "normally>usually primarily>mainly principally>mainly approximately>roughly rarely>seldom hence>thus "
            "rapidly>quickly wholly>entirely exceedingly>extremely incorrectly>wrongly intentionally>deliberately "
            "luckily>fortunately maybe>perhaps barely>hardly commonly>generally "
            "formerly>previously allegedly>supposedly"})
NEIGHBOURED = _pairs({
    NOUN: "home>house team>squad award>prize stage>phase theme>subject feature>characteristic concern>worry "
          "response>reply reply>response shape>form chance>opportunity",
    VERB: "believe>think struggle>fight talk>speak encourage>boost find>discover",
    ADJECTIVE: "major>important", ADVERB: "straight>directly"})
_PARTICIPLES = {"begun", "forbidden", "shown", "chosen"}  # of a form in -ed that is both
_PASTS = {"began", "forbade", "showed", "chose"}
_AUXILIARIES = frozenset("have has had having be is are was were been being".split())
_NUMBER = r"(?= (?:a |some )?(?:\d|two|three|four|five|six|seven|eight|nine|ten|half|hundred|thousand|million))"
_THE = r"(?:the|a|an|his|her|its|their|our|my|your|this|these)\b"
_HE = r"(?:the|a|an|his|her|their|he|she|it|they|I|we|you|there)\b"
_MANY = r"(?<!how )(?<!so )(?<!as )(?<!too )(?<!very )(?<!not )(?<!the )(?<!of )(?<!his )(?<!her )(?<!its )(?<!their )"
PHRASES = [(re.compile(rf"\b{old}", re.IGNORECASE), new) for old, new in (
    (r"however(?=, )", "even so"), (r"despite(?= \w)", "in spite of"), (rf"due to(?= {_THE})", "because of"),
    (r"such as(?= \w)", "like"), (r"indeed(?=, )", "in fact"),
    (r"moreover(?=, )", "besides"), (r"additionally(?=, )", "besides"),
    (rf"(?<!even )(?<!as )though(?= {_HE})", "although"), (r"currently(?=, )", "at present"),
    (r"find out(?= \w)", "discover"), (r"finds out(?= \w)", "discovers"), (r"found out(?= \w)", "discovered"),
    (r"in order to(?= \w)", "to"),
    (rf"(?<!what )(?<!how )about{_NUMBER}", "roughly"), (r"along with(?= \w)", "together with"), (r"persons", "people"),
    (r"offspring", "descendants"), (rf"most of(?= {_THE})", "the majority of"),
    (rf"{_MANY}many(?= (?:people|men|women|children|[a-z]+[^s']s)\b)", "a lot of"),
    (r"(?<!almost )(?<!nearly )(?<!not )(?<!each and )every(?= (?:day|week|month|year|night|morning|time|season|game|"
     r"member|person|country|state|city|episode|player|student|child|man|woman|word|part)\b)", "each"),
    (rf"(?<=know )whether(?= {_HE}(?!.* or\b))|(?<=decide )whether(?= {_HE}(?!.* or\b))", "if"),
    (r"it's(?= (?!been|got|had)[a-z])", "it is"), (r"that's(?= (?!been|got|had)[a-z])", "that is"),
    (r"I'm(?= [a-z])", "I am"), (r"we're(?= [a-z])", "we are"), (r"won't(?= (?!you|I|we|they|it)[a-z])", "will not"),
    (r"I've(?= [a-z])", "I have"), (r"we've(?= [a-z])", "we have"), (r"they're(?= [a-z])", "they are"),
    (r"you're(?= [a-z])", "you are"), (r"don't(?= (?!you|I|we|they)[a-z])", "do not"))]
_GUARD = "\n\n"            # Apertium takes an empty line for a new block: sentences stay apart
_COMMON = frozenset("about along also am are as do due every fact find found has have in indeed is it like majority "
                    "many most must of order out so such that the they to together we with you".split())


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
    """The sentences that are worth sending, as (start, end): printable, of some length, not all of it protected."""
    mask, found = protected(text), []
    for match in SENTENCE.finditer(text):
        body = match[0].strip()
        start = match.start() + match[0].index(body) if body else 0
        words = len(WORD.findall(body))
        if SHORTEST <= words <= LONGEST and body.isprintable() and not all(mask[start:start + len(body)]):
            found.append((start, start + len(body)))
    return found


def wrong_form(word, other, words):
    """Whether a past stands for a participle or the other way round: "started" is both, "begun" is not."""
    before = words[max(0, words.index(word) - 2):words.index(word)]
    perfect = bool(_AUXILIARIES & set(before))
    return other in _PARTICIPLES and not perfect or other in _PASTS and perfect


class BackTranslation:
    """`variant(text, taboo, rng)` -> (text, changes) or None; `prepare(texts)` sends what they need in batches first.

    Attributes:
        reasons: why the last text's sentences stayed as they were.
    """

    kind = "back_translation"
    source, licence = "Apertium eng-spa and spa-eng", "GPL-2.0-or-later (the program; its output is yours)"

    def __init__(self, wordnet, pairs):
        check_installed()
        self.wordnet, self.pairs, self.translations, self._known = wordnet, pairs, {}, {}

    def prepare(self, texts):
        """Translate the sentences of these texts, in few processes; forget those of the call before."""
        wanted = list(dict.fromkeys(text[start:end] for text in texts for start, end in translatable(text)))
        self.translations = {}
        for first in range(0, len(wanted), BATCH):
            batch = wanted[first:first + BATCH]
            self.translations.update(zip(batch, there_and_back(batch)))

    def counterpart(self, old, new):
        """How often the pairs of a word that came back must be met to stand for one that went; None: it may not."""
        if (old, new) not in self._known:
            forms = [(lemma, other, pos) for lemma, *form in self.wordnet.forms(old) for pos in form[:1]
                     for other, *its_form in self.wordnet.forms(new) if form == its_form]
            self._known[old, new] = next((least for table, least in ((WORDS, 0), (NEIGHBOURED, MET))
                                          if table[ADJECTIVE].get(old) == new
                                          or any(table[pos].get(a) == b for a, b, pos in forms)), None)
        return self._known[old, new]

    def replacements(self, before, after):
        """{word that went: [(word that came in its place, how often its pairs must be met)]}, lower case."""
        old, new = ([word.lower() for word in WORD.findall(text)] for text in (before, after))
        come, found = [word for word in dict.fromkeys(new) if word not in old], {}
        for word in old:
            if word not in new and old.count(word) == 1:
                found[word] = [(other, least) for other in come if (least := self.counterpart(word, other)) is not None
                               and not wrong_form(word, other, old)]
        return {word: others for word, others in found.items() if others}

    def variant(self, text, taboo, rng):
        mask, words, edits, self.reasons = protected(text), {}, [], []
        for start, end in translatable(text):
            before, after = text[start:end], self.translations[text[start:end]] or ""
            found = self.replacements(before, after)
            words.update((start + match.start(), found[word]) for match in WORD.finditer(before)
                         if (word := match[0].lower()) in found)
            phrases = [(start + match.start(), start + match.end(), new) for phrase, new in PHRASES
                       for match in phrase.finditer(before) if not any(mask[start + match.start():start + match.end()])
                       and not taboo & words_of(match[0] + " " + new) - _COMMON
                       and match[0].lower() not in after.lower() and re.search(rf"\b{new}\b", after, re.IGNORECASE)]
            edits += phrases
            self.reasons.append("lost on its way" if not after else "no better known counterpart came back"
                                if not found and not phrases else "the counterpart does not stand well there")
        self.reasons = self.reasons or ["no sentence to translate"]
        edits += word_edits(text, taboo, self.wordnet, self.pairs, lambda match: words.get(match.start(), ()))
        found = apply_edits(text, edits, rng)
        return found and (found[0], [{"rule": "eng-spa-eng", **change} for change in found[1]])
