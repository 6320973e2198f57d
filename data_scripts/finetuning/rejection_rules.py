"""When a sampled completion is kept: the rules of rejection sampling, and which of the kept ones are taken.

The rules of DeepSeek-R1 (arXiv:2501.12948, Sec. 2.3.3), made countable: only right answers, no mixed
languages, no endless repetition. In the order in which they are tried, each a reason of refusal:

| reason      | refused is                                                                                    |
|-------------|-----------------------------------------------------------------------------------------------|
| unfinished  | what did not end by itself                                                                    |
| format      | what is not reasoning, one `</think>` and an answer                                           |
| wrong       | an answer that the task's verifier does not accept                                            |
| too long    | more than `max_characters` in all                                                             |
| repetition  | more than `max_repetition` of the windows of NGRAM words and signs have been seen before in it |
| languages   | more than `max_foreign` of the letters in a script that the question does not use             |
"""

import hashlib
import random
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

from recipes.chat_format import follows_format

NGRAM = 12  # longer than the formulas that honest working repeats
REASONS = ("unfinished", "format", "wrong", "too long", "repetition", "languages")
CHOICES = ("random", "shortest", "likeliest")


@dataclass(frozen=True)
class Rules:
    """Thresholds of the rules, and how many of a problem's kept samples are taken."""

    max_characters: int = 4_000
    max_repetition: float = 0.2
    max_foreign: float = 0.05
    keep_per_problem: int = 2
    choose: str = "random"

    def __post_init__(self):
        for name in ("max_characters", "keep_per_problem"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("max_repetition", "max_foreign"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]; 1 switches the rule off")
        if self.choose not in CHOICES:
            raise ValueError(f"choose={self.choose!r} must be one of {', '.join(CHOICES)}")


def repetition(text, ngram=NGRAM):
    """Share of the windows of `ngram` words, numbers and signs that occurred earlier in the text."""
    pieces = re.findall(r"\w+|[^\w\s]", text)
    windows = Counter(tuple(pieces[i:i + ngram]) for i in range(len(pieces) - ngram + 1))
    total = sum(windows.values())
    return 1 - len(windows) / total if total else 0.0


def scripts(text):
    """Letters of each script, by the first word of their Unicode names: {"LATIN": 40, "CJK": 3}."""
    return Counter(unicodedata.name(letter, "UNKNOWN").split(" ", 1)[0] for letter in text if letter.isalpha())


def foreign_share(text, question):
    """Share of a text's letters whose script the question does not use. Latin is in every question's notation."""
    found, own = scripts(text), {*scripts(question), "LATIN"}
    total = sum(found.values())
    return sum(count for script, count in found.items() if script not in own) / total if total else 0.0


def refusal(completion, opened, task, problem, rules):
    """The first reason against a completion, or None; and the verdict on its answer.

    Args:
        completion: a `recipes.sampling.Completion`; opened: whether its prompt ended inside `<think>`.
    """
    text = whole_text(completion.text, opened)
    verdict = task.score(text, problem, untagged="unparsable")
    broken = {
        "unfinished": not completion.finished,
        "format": not follows_format(text) or not text.lstrip().startswith("<think>"),
        "wrong": not verdict.correct,
        "too long": len(text) > rules.max_characters,
        "repetition": repetition(text) > rules.max_repetition,
        "languages": foreign_share(text, problem.prompt) > rules.max_foreign,
    }
    return next((reason for reason in REASONS if broken[reason]), None), verdict


def whole_text(text, opened):
    return "<think>\n" + text.lstrip("\n") if opened else text


def normalised(text):
    """What two samples have in common if they differ only in spaces, case or compatible characters."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def take(candidates, rules, salt):
    """At most `keep_per_problem` of one problem's accepted samples, no two with the same normalised text.

    Args:
        candidates: dicts with text, log_prob, sample; salt: decides the order under choose="random".
    Returns:
        (taken, number of duplicates).
    """
    distinct = list({normalised(row["text"]): row for row in reversed(candidates)}.values())[::-1]
    if rules.choose == "shortest":
        distinct.sort(key=lambda row: (len(row["text"]), row["sample"]))
    elif rules.choose == "likeliest":
        distinct.sort(key=lambda row: (-row["log_prob"], row["sample"]))
    else:
        seed = int.from_bytes(hashlib.sha256(str(salt).encode("utf-8", "replace")).digest()[:8], "big")
        random.Random(seed).shuffle(distinct)
    return distinct[:rules.keep_per_problem], len(candidates) - len(distinct)
