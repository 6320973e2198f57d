"""The same request in another shape: rules that move or spell out words and never choose new content.

| rule         | example                                                                   |
|--------------|---------------------------------------------------------------------------|
| contraction  | What is the sum? -> What's the sum?  I do not know. -> I don't know.      |
| expansion    | the other way round, where it has one reading ("it's been" has two)       |
| clause       | Tell me if it rains. -> If it rains, tell me.  And back                   |
| adverbial    | Today, we met. -> We met today.  And back                                 |
| that         | I think that it works. -> I think it works.  And back                    |
| particle     | Write down the answer. -> Write the answer down.                          |
| politeness   | Explain gravity. -> Please explain gravity. / Could you explain gravity?  |
| greeting     | Hello! ... in front                                                       |
| instructions | bullet points that do not build on one another, in another order          |

Passives are left alone: without a parser objects cannot be told from complements.
"""

import re

from data_scripts.augmentation.augment_protected import SENTENCE, WORD, difference, names, operands, protected

CONTRACTIONS = {
    "do not": "don't", "does not": "doesn't", "did not": "didn't", "is not": "isn't", "are not": "aren't",
    "was not": "wasn't", "were not": "weren't", "cannot": "can't", "could not": "couldn't", "would not": "wouldn't",
    "should not": "shouldn't", "will not": "won't", "have not": "haven't", "has not": "hasn't",
    "I am": "I'm", "you are": "you're", "we are": "we're", "they are": "they're", "I have been": "I've been",
    "I will": "I'll", "you will": "you'll", "we will": "we'll", "they will": "they'll", "it will": "it'll",
    "what is the": "what's the", "what is a": "what's a", "what is an": "what's an", "what is your": "what's your",
    "what is my": "what's my", "where is the": "where's the", "who is the": "who's the",
    "that is the": "that's the", "it is a": "it's a", "it is the": "it's the", "it is not": "it's not",
    "let us": "let's"}
EXPANSIONS = {short: long for long, short in CONTRACTIONS.items() if long != "let us"}
# After a contraction that takes the verb's place nothing may end: "Yes, I am." has no short form.
CONJUNCTIONS = "because|if|when|whenever|although|unless|once"
ADVERBIALS = ("today|tomorrow|yesterday|nowadays|currently|recently|sometimes|usually|in general|"
              "at the moment|these days")
IMPERATIVES = frozenset(
    "add answer calculate check compare complete compute convert correct count create decrypt define describe "
    "determine "
    "evaluate explain express find fix generate give help identify list name outline provide reverse rewrite say show "
    "simplify solve sort spell state suggest summarise summarize tell think translate use work write".split())
GREETED = 0.15  # of the copies that could be: more would teach that requests begin so
GREETINGS = ("Hello! ", "Hi! ", "Hi there! ", "Hello there! ")
OPENERS = frozenset("a an the this that these those i you he she it we they my your his her its our their there what "
                    "who "
                    "which where when why how is are do does did can could would should will "
                    "please".split()) | IMPERATIVES
_ALREADY = re.compile(r"\b(please|hello|hi|hey|dear|good (day|morning|evening)|thanks?|thank you)\b", re.IGNORECASE)
_BULLETS = re.compile(r"(?:^[-*•] .+(?:\n|\Z)){2,}", re.MULTILINE)
_DEPENDENT = re.compile(r"\b(above|below|previous\w*|next|first\w*|second\w*|last|finally|follow\w*|latter|afterwards"
                        r"|then|this|that|these|those|it|also|otherwise|again|other|former|same)\b", re.IGNORECASE)
_LEAD = re.compile(r"\b(rules|requirements|instructions|constraints|guidelines|keep in mind|make sure)\b",
                   re.IGNORECASE)


def _lower_first(text):
    """With a small first letter, or None where the first word may be a name."""
    word = WORD.match(text)
    if not word:
        return None
    if word[0].split("'")[0] == "I":
        return text
    return text[0].lower() + text[1:] if word[0].lower().split("'")[0] in OPENERS else None


def _upper_first(text):
    return text[:1].upper() + text[1:]


def _free(mask, start, end):
    return not any(mask[start:end])


def _opens_question(text, match):
    """Whether a match is among the first three words of a question."""
    sentence = next(s for s in SENTENCE.finditer(text) if s.start() <= match.start() < s.end())
    return not sentence[0].rstrip().endswith((".", "!")) and len(text[sentence.start():match.start()].split()) < 3


def _swap(text, table, rng, rule):
    """One of the phrases of a table replaced by its counterpart, where it is followed by a word."""
    mask = protected(text)
    pattern = re.compile(r"(?<![\w'’-])(" + "|".join(map(re.escape, sorted(table, key=len, reverse=True)))
                         + r")(?= [a-z])", re.IGNORECASE)
    known = {long.lower(): short for long, short in table.items()}
    places = [match for match in pattern.finditer(text) if _free(mask, *match.span())
              # A question's short form turns the words round: "Why can't robots eat?" has no long form of this kind.
              and (rule == "contraction" or not (match[0].lower().endswith("n't") and _opens_question(text, match)))]
    if not places:
        return None
    match = rng.choice(places)
    new = known[match[0].lower()]
    new = _upper_first(new) if match[0][0].isupper() else new
    return text[:match.start()] + new + text[match.end():]


def contraction(text, rng):
    return _swap(text, CONTRACTIONS, rng, "contraction")


def expansion(text, rng):
    found = _swap(text.replace("’", "'") if "’" in text else text, EXPANSIONS, rng, "expansion")
    # A tag or question that the short form had turned round: "isn't it?" is no "is not it?".
    return None if found and re.search(r"not (you|it|he|she|we|they|I)\b", found) else found


def _on_sentences(text, rng, change):
    """Apply `change(sentence without its end)` to one sentence that it takes, all of it unprotected."""
    mask, options = protected(text), []
    for match in SENTENCE.finditer(text):
        body = match[0].strip()
        if len(body) < 12 or body[-1] not in ".?!" or re.search(r"[.?!]", body[:-1]):
            continue
        start = match.start() + match[0].index(body)
        if _free(mask, start, start + len(body)) and (new := change(body[:-1])):
            options.append((start, start + len(body), new + body[-1]))
    if not options:
        return None
    start, end, new = rng.choice(options)
    return text[:start] + new + text[end:]


def _clause(body):
    """"Main if this" <-> "If this, main": one conjunction, no other comma, both sides whole clauses."""
    found = re.findall(rf"\b({CONJUNCTIONS})\b", body, re.IGNORECASE)
    if len(found) != 1 or re.search(r"[;–—-]|\bor\b|\band\b|\bonly\b", body):
        return None
    front = re.fullmatch(rf"({CONJUNCTIONS}) ([^,]+), ([^,]+)", body, re.IGNORECASE)
    if front:
        if front[2].startswith("of ") or front[3].split()[0] in ("then", "so") or \
                min(len(front[2].split()), len(front[3].split())) < 2:
            return None
        # The clause would belong to a clause before it, or a pronoun would stand before what it means.
        return None if re.search(r"\b(that|which|who|whether)\b|^(it|its|they|their|he|his|she|her|this|these)\b",
                                 front[3], re.IGNORECASE) else \
            f"{_upper_first(front[3])} {front[1].lower()} {front[2]}"
    back = re.fullmatch(rf"([^,]+?) ({CONJUNCTIONS}) ([^,]+)", body)
    if not back or len(back[1].split()) < 2 or not re.match(r"(I|you|we|the|a|an|my|your|our|there)\b ",
                                                            back[3] + " "):
        return None
    # "Tell me when it rains", "Do you know if ...", "even if": the clause is an object or belongs to a word.
    if re.search(r"\b(tell|know|knows|knew|ask|asks|asked|wonder|see|say|said|decides?|decided|check|explain|remember"
                 r"|forget|simply|sure|even|as|that|which|who|how|why|where|what|whether|just|is|was|are|were|not|n't|time|day|moment"
                 r"|me)$",
                 back[1], re.IGNORECASE) or re.search(r"\b(that|whether|know|think|believe|say|said)\b", back[1]):
        return None
    if re.search(r"^(Which|And|But|Or|So)\b|\b(like|than)\b", back[1]):
        return None
    main = _lower_first(back[1])
    return main and f"{_upper_first(back[2])} {back[3]}, {main}"


def clause(text, rng):
    return _on_sentences(text, rng, _clause)


def _adverbial(body):
    front = re.fullmatch(rf"({ADVERBIALS}),? ([^,;]+)", body, re.IGNORECASE)
    if front and not re.search(rf"\b({CONJUNCTIONS}|that|which|and|but|or)\b|\b[A-Z]$", front[2]):
        subject = re.match(r"(I|we|you|they|he|she|it|the|there|this|a|an|my|our|your|many|most|some|people)\b",
                           front[2])
        return f"{_upper_first(front[2])} {front[1].lower()}" if subject else None
    back = re.fullmatch(rf"((?:I|We|You|They|He|She|It|The|There|This|My|Our|Your) [^,;]+) ({ADVERBIALS})", body)
    if back and not re.search(rf"\b({CONJUNCTIONS}|that|which|and|but|or)\b"
                              r"|\b(by|until|till|from|since|of|for|than|as)$", back[1]):
        main = _lower_first(back[1])
        return main and f"{_upper_first(back[2])}, {main}"
    return None


def adverbial(text, rng):
    return _on_sentences(text, rng, _adverbial)


_SAY = "think|thinks|thought|believe|believes|hope|hopes|know|knows|say|says|said|claim|claims|claimed|suppose"
_SHORT = "I|you|he|she|we|they|it|there"
_VERB = "is|are|was|were|has|had|have|will|would|can|could|should|might|must|does|did"
_WITH_THAT = re.compile(rf"\b((?:{_SAY})) that (?=(?:{_SHORT}) (?:{_VERB})\b)", re.IGNORECASE)
_WITHOUT_THAT = re.compile(rf"\b((?:I|you|he|she|we|they|who) (?:{_SAY})) (?=(?:{_SHORT}) (?:{_VERB})\b)",
                           re.IGNORECASE)
_PARTICLE = re.compile(
    r"\b((?:turn|switch|write|fill|throw|point|figure|pick|cut|look|wipe|clean|shut)(?:s|ed|ing)?) "
    r"(on|off|up|down|out|away) ((?:the|my|your|his|her|their|this|that) [a-z]{3,})"
    r"(?=[.?!,]| (?:and|before|after|when)\b)", re.IGNORECASE)


def _replaced_once(text, pattern, new, rng):
    mask = protected(text)
    places = [match for match in pattern.finditer(text) if _free(mask, *match.span())]
    if not places:
        return None
    match = rng.choice(places)
    return text[:match.start()] + match.expand(new) + text[match.end():]


def that(text, rng):
    """Leave out or put in the "that" of what is thought or said, before a pronoun and its verb.

    A question about the object keeps it out: "Who do you think he is?"
    """
    if re.search(r"\b(who|what|which|where|when|how|why)\b[^.?!]*\?", text, re.IGNORECASE):
        return None
    return _replaced_once(text, _WITH_THAT, r"\1 ", rng) or _replaced_once(text, _WITHOUT_THAT, r"\1 that ", rng)


def particle(text, rng):
    if re.search(r"\blook(s|ed|ing)? (on|off|out|away|down)\b", text):  # "look out the window"
        return None
    return _replaced_once(text, _PARTICLE, r"\1 \3 \2", rng)


def politeness(text, rng):
    """Ask for what the text commands in its first sentence; a question only where nothing stands before its end."""
    first = SENTENCE.match(text)
    word = WORD.match(text)
    if not first or not word or _ALREADY.search(text) or word[0].lower() not in IMPERATIVES or not word[0].istitle() \
            or re.match(r"\W*(of|is|are|was|were)\b", text[word.end():]):  # "List of rivers", "Work is hard"
        return None
    rest = text[0].lower() + text[1:]
    plain = first[0].endswith(".") and _free(protected(text), 0, first.end()) and len(first[0].split()) < 25
    if not plain or rng.random() < 0.5:
        return "Please " + rest
    opening = rng.choice(("Could you ", "Can you ", "Would you please "))
    return opening + rest[:first.end() - 1] + "?" + rest[first.end():]


def greeting(text, rng):
    """In front of a question or an order; a greeting before a plain statement reads like a slip."""
    first, word = SENTENCE.match(text), WORD.match(text)
    asks = first and first[0].endswith("?") or word and word[0].lower() in IMPERATIVES
    if not asks or _ALREADY.search(text[:200]) or not text[:1].isalpha():
        return None
    new = rng.choice(GREETINGS)
    return (new if text[0].isupper() else new.lower().replace("!", ",")) + text


def instructions(text, rng):
    """Bullet points of a list that is announced as rules, each a sentence of its own, in another order."""
    for block in _BULLETS.finditer(text):
        items = block[0].rstrip("\n").split("\n")
        lead = text[:block.start()].rstrip().rsplit("\n", 1)[-1]
        whole = all(re.fullmatch(r"[-*•] [A-Z][^\n]*[.!]", item) for item in items)
        if not whole or not _LEAD.search(lead) or any(_DEPENDENT.search(item) for item in items):
            continue
        order = items[:]
        rng.shuffle(order)
        order = order if order != items else items[::-1]
        tail = "\n" * (len(block[0]) - len(block[0].rstrip("\n")))
        return text[:block.start()] + "\n".join(order) + tail + text[block.end():]
    return None


SHAPES = {"contraction": contraction, "expansion": expansion, "clause": clause, "adverbial": adverbial, "that": that,
          "particle": particle, "politeness": politeness}
WRAPPINGS = {"greeting": greeting}
WITHOUT_TASK = {"instructions": instructions}


class Syntax:
    """`variant(text, taboo, rng)` -> (text, changes) or None where no rule applies.

    lists: also reorder the bullet points of rules.
    `greets` (attribute): whether the text opens a conversation.
    """

    kind = "syntax"
    source, licence = "rules of this project", "Apache-2.0"

    def __init__(self, lists=True):
        self.greets = True
        self.rules = {**SHAPES, **(WITHOUT_TASK if lists else {})}

    def variant(self, text, taboo, rng):
        changes, changed = [], text
        names_before, kept = names(text), operands(text)
        for rules in (self.rules, WRAPPINGS):
            order = list(rules)
            rng.shuffle(order)
            for rule in order:
                if rule == "greeting" and not (self.greets and rng.random() < GREETED):
                    continue
                new = rules[rule](changed, rng)
                # Names and operands of all rules are compared, for those that move what they should not.
                if new and (rule == "instructions" or
                            operands(new) == kept and set(names_before) <= set(WORD.findall(new))):
                    changes.append({"rule": rule, **difference(changed, new)})
                    changed = new
                    break
        return (changed, changes) if changes and changed != text else None
