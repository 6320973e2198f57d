"""What every task is made of: problems, verdicts, and the split that keeps training and test apart.

**Split.** Whether a problem belongs to training or to test is decided by a hash of what it asks (its
`key`: the expression, the word, the question), not by seed, position or task. The same content
therefore falls on the same side in every task, at every difficulty and for every seed: the two never
overlap, by construction. `recipes.tasks.check_disjoint` generates both and compares them all the same.
"""

import hashlib
import json
import unicodedata
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from recipes.sandbox import SandboxUnavailable
from recipes.task_answers import extract_answer

SPLITS = ("train", "test")
LEVELS = (1, 2, 3, 4, 5)
TEST_SHARE = 0.2
WORDED = " || "  # in a key: what stands behind it tells wordings of one problem apart and does not decide the side
PATIENCE = 2_000  # candidates in a row that bring nothing new: then a level has no more problems


class Verdict(NamedTuple):
    """`parsed` is False where no answer could be read; such an answer always counts as wrong."""

    correct: bool
    parsed: bool
    answer: str | None = None


UNPARSABLE = Verdict(False, False)


@dataclass(frozen=True)
class Problem:
    """One question. `metadata` holds difficulty, split, seed, key and what the verifier needs (JSON values)."""

    task: str
    index: int
    prompt: str
    reference: str
    metadata: dict = field(default_factory=dict)

    def to_row(self):
        """A flat row for a data set: the metadata as JSON text, so that rows of all tasks have one schema."""
        return {"task": self.task, "index": self.index, "prompt": self.prompt, "reference": self.reference,
                "metadata": json.dumps(self.metadata, ensure_ascii=False)}

    @classmethod
    def from_row(cls, row):
        return cls(row["task"], row["index"], row["prompt"], row["reference"], json.loads(row["metadata"]))


class Candidate(NamedTuple):
    """A problem before it is given a place: what `Task.candidates` yields."""

    prompt: str
    reference: str
    key: str
    extra: dict = {}


def split_of(key, test_share=TEST_SHARE):
    """The side on which a problem with this content lies: "train" or "test"."""
    canonical = " ".join(unicodedata.normalize("NFKC", str(key).partition(WORDED)[0]).casefold().split())
    number = int.from_bytes(hashlib.sha256(b"split|" + canonical.encode("utf-8", "replace")).digest()[:8], "big")
    return "test" if number < test_share * 2 ** 64 else "train"


def mix_seed(*parts):
    """A 48-bit seed for one stream. Generators that add an index to their seed never meet each other's."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:6], "big")


class Task:
    """A registry entry. Subclasses give `candidates` and, where the kind's own comparison does not do, `verify`.

    Attributes:
        name, kind: the kind decides how answers are read (`recipes.task_answers`).
        source, licence: where the problems come from.
        splits: the splits it has; a pure evaluation set has only "test".
        levels: the values that `difficulty` takes; `difficulty_means` says what they do.
        generated: whether it needs no files.
    """

    kind = "text"
    source = licence = difficulty_means = ""
    splits, levels, generated = SPLITS, LEVELS, True

    def __init__(self, name):
        self.name = name

    def candidates(self, seed, level):
        """Yield `Candidate`s of one level in an order fixed by `seed`; may end, may repeat itself."""
        raise NotImplementedError

    def verify(self, answer, problem):
        """A Verdict on the extracted answer (text, not empty)."""
        raise NotImplementedError

    def split_of(self, candidate):
        return split_of(candidate.key) if len(self.splits) > 1 else self.splits[0]

    def _check(self, split, difficulty):
        if split not in self.splits:
            why = "it is for evaluation only" if split in SPLITS else f"splits are {', '.join(SPLITS)}"
            raise ValueError(f"task {self.name!r} has no split {split!r}: {why}")
        if difficulty is not None and difficulty not in self.levels:
            raise ValueError(f"difficulty={difficulty!r} of task {self.name!r} must be one of {list(self.levels)} "
                             "or None (all of them in turn)")

    def _level(self, split, seed, level):
        """New problems of one level; ends after PATIENCE candidates without one."""
        seen, fruitless = set(), 0
        for candidate in self.candidates(mix_seed(self.name, seed, level), level):
            if candidate.key not in seen and self.split_of(candidate) == split:
                seen.add(candidate.key)
                fruitless = 0
                yield candidate
            elif (fruitless := fruitless + 1) >= PATIENCE:
                return

    def stream(self, split="train", seed=0, difficulty=None):
        """Yield distinct problems until there are no more. The first n are the same however many are taken."""
        self._check(split, difficulty)
        levels = self.levels if difficulty is None else (difficulty,)
        open_levels = {level: self._level(split, seed, level) for level in levels}
        seen, index = set(), 0
        while open_levels:
            for level in list(open_levels):
                candidate = next((c for c in open_levels[level] if c.key not in seen), None)
                if candidate is None:
                    del open_levels[level]
                    continue
                seen.add(candidate.key)
                yield Problem(self.name, index, candidate.prompt, candidate.reference, {
                    "difficulty": level, "split": split, "seed": seed, "key": candidate.key, **candidate.extra})
                index += 1

    def problems(self, split="train", seed=0, difficulty=None, size=100, repeat=False):
        """A list of `size` distinct problems.

        Args:
            difficulty: one of `levels`, or None for all in turn.
            repeat: start again from the first problem where there are fewer than `size`.
        Raises:
            ValueError: for an unknown split or difficulty, or if there are too few and `repeat` is False.
        """
        found = list(islice(self.stream(split, seed, difficulty), size))
        if len(found) < size and not (repeat and found):
            raise ValueError(f"task {self.name!r} has only {len(found)} distinct {split} problems at "
                             f"difficulty={difficulty}; ask for fewer than size={size}, for another difficulty, "
                             "or pass repeat=True")
        return [found[i % len(found)] for i in range(size)] if found else []

    def score(self, answer_text, problem, untagged="whole"):
        """A Verdict on a completion. Never raises on account of the text.

        Args:
            untagged: what a text without `</think>` is: the "whole" is the answer, or "unparsable".
        Raises:
            ModuleNotFoundError, SandboxUnavailable: if this machine lacks what the task verifies with.
        """
        if untagged not in ("whole", "unparsable"):
            raise ValueError(f"untagged={untagged!r} must be 'whole' or 'unparsable'")
        answer = extract_answer(answer_text, self.kind, untagged)
        if answer is None:
            return UNPARSABLE
        try:
            return self.verify(answer, problem)
        except (SandboxUnavailable, ModuleNotFoundError):  # nothing can be verified here: not the answer's fault
            raise
        except Exception:  # a library's verifier may raise anything on hostile text: no readable answer
            return UNPARSABLE
