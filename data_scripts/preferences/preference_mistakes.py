"""Worked traces with one mistake that is carried through to a wrong answer.

Three ways to go wrong, each giving a whole `Working` whose steps after the mistake follow from it:

    operation   one sum, product or quotient comes out wrong; the solver goes on with the wrong value
    misread     a number, word or cell is copied wrongly from the question
    last        all steps are right but the last one, which states the answer

Puzzles in which a misreading would not show at one step have their own way (`OWN`): a wrong cell of a sudoku, a wrong
gender, a wrong shift. The task's verifier must refuse the answer, and the first step that differs from the right
working is the mistake: labels for process rewards come from it.
"""

import contextlib
import dataclasses
import re
from typing import NamedTuple

from data_scripts.reasoning import traces_arithmetic, traces_columns, traces_numbers
from data_scripts.reasoning.traces import solve
from data_scripts.reasoning.traces_base import NoProcedure, Step, Working
from data_scripts.reasoning.traces_columns import digits
from data_scripts.reasoning.traces_grids import _cell
from data_scripts.reasoning.traces_logic import RELATED
from data_scripts.reasoning.traces_words import _shift
from recipes.tasks import get_task

ATTEMPTS = 12  # draws of one way before the next is tried
STOPPED = (ValueError, AssertionError, LookupError, ArithmeticError)  # how solvers refuse values that cannot be
# Where a prompt holds its data; other tasks' numbers are looked for in the whole prompt. (A base misread as 1 would
# never end.)
DATA = {"base_conversion": r" number (\w+) to", "letter_counting": r'text: "(.*)"', "spell_backward": r"nus\): (\S+)$",
        "binary_alternation": r": ([01]+)$",
        "word_sequence_reversal": r"words: (.*)$", "word_sorting": r"list: (.*)$",
        "number_sorting": r"order: ([-0-9., ]+)\n", "number_filtering": r"than (.*)\]",
        "largest_island": r"grid:\n([01 \n]+)\n\n"}


class Mistake(NamedTuple):
    """`place` is the first step that differs from the right working."""

    working: Working
    place: int
    way: str


def near_number(value, rng):
    """A wrong value such as slips give: off by one, two or ten, two digits swapped; of the same sign."""
    size = abs(value)
    found = {size + 1, size + 2, size - 1, size - 2, *((size + 10, size - 10) if size >= 10 else ())}
    text = str(size)
    found |= {int(text[:i] + text[i + 1] + text[i] + text[i + 2:]) for i in range(len(text) - 1)}
    found = sorted(other for other in found - {size} if other >= 0)
    return rng.choice(found) * (-1 if value < 0 else 1)


def near_word(word, rng):
    """A word with a letter lost, doubled, or two swapped; the same word where it has one letter."""
    place = rng.randrange(max(1, len(word) - 1))
    way = rng.choice(("swap", "swap", "lose", "double"))
    if way == "swap" or len(word) < 3:
        return word[:place] + word[place + 1:place + 2] + word[place] + word[place + 2:]
    return word[:place] + word[place] * (2 if way == "double" else 0) + word[place + 1:]


def near_answer(answer, rng):
    """A wrong answer that looks like the right one; None where none is known."""
    if re.fullmatch(r"-?\d+", answer):
        return str(near_number(int(answer), rng))
    if answer in ("Yes", "No"):
        return "No" if answer == "Yes" else "Yes"
    parts = answer.split(", ")
    if len(parts) > 1:
        place = rng.randrange(len(parts) - 1)
        parts[place:place + 2] = parts[place + 1], parts[place]
        return ", ".join(parts)
    found = list(re.finditer(r"\d+", answer))
    if found:
        part = rng.choice(found)
        return answer[:part.start()] + str(near_number(int(part.group()), rng)) + answer[part.end():]
    return near_word(answer, rng) if answer.isalpha() else None


# ---------------------------------------------------------------- operation


def _retold(text, value, wrong):
    """A step's text that ends in another value, its digits too where they were spelled out."""
    assert text.endswith(f"={value}"), text
    head = text[:len(text) - len(str(value))]
    spelled, at = f"; {digits(abs(value))}; ", head.rfind(f"; {digits(abs(value))}; ")
    if at >= 0:
        head = head[:at] + f"; {digits(abs(wrong))}; " + head[at + len(spelled):]
    return head + str(wrong)


def _spoiled(result, rng):
    """The result of an operation of `traces_columns`, wrong in its text and in its value."""
    first, value = result[0], result[1]
    if len(result) == 3:  # divide: a=q*b+r
        rest = result[2]
        times = first.text.rpartition("=")[2].split("*")[1].split("+")[0]
        quotient, left = (near_number(value, rng), rest) if rng.random() < 0.5 else (value, near_number(rest, rng))
        head = first.text.rpartition("=")[0]
        return Step(f"{head}={quotient}*{times}+{left}"), quotient, left
    wrong = near_number(value, rng)
    if isinstance(first, list):  # multiply, of one digit by one digit
        return [Step(_retold(first[-1].text, value, wrong))], wrong
    return (_retold(first, value, wrong) if isinstance(first, str) else Step(_retold(first.text, value, wrong))), wrong


class Operations:
    """Counts what a solver computes and spoils the operation number `at` (from 0; None spoils none).

    Solvers take their operations by name from `traces_columns`; within `watching` those names stand for these.
    """

    NAMES = ("combine", "add", "times_digit", "divide", "count_on")

    def __init__(self, rng, at=None):
        self.rng, self.at, self.count = rng, at, 0

    def _one(self, result):
        self.count += 1
        return _spoiled(result, self.rng) if self.count - 1 == self.at else result

    def _watched(self, operation):
        return lambda *args: self._one(operation(*args))

    def _multiply(self, a, b):
        with self._replaced((traces_columns,), {name: self._watched(getattr(traces_columns, name))
                                                for name in ("add", "times_digit")}):
            before = self.count
            result = traces_columns.multiply(a, b)
        return self._one(result) if self.count == before and len(result[0]) == 1 else result

    @staticmethod
    @contextlib.contextmanager
    def _replaced(modules, functions):
        kept = [(module, name, getattr(module, name)) for module in modules for name in functions
                if hasattr(module, name)]
        try:
            for module, name, _ in kept:
                setattr(module, name, functions[name])
            yield
        finally:
            for module, name, function in kept:
                setattr(module, name, function)

    def watching(self):
        functions = {name: self._watched(getattr(traces_columns, name)) for name in self.NAMES}
        return self._replaced((traces_arithmetic, traces_numbers), {**functions, "multiply": self._multiply})


def operation(problem, right, rng):
    """A working in which one operation comes out wrong."""
    counted = Operations(rng)
    with counted.watching():
        solve(problem)
    if not counted.count:
        raise NoProcedure("nothing is computed")
    with Operations(rng, rng.randrange(counted.count)).watching():
        return solve(problem)


# ---------------------------------------------------------------- misread and last


def altered(text, rng, words):
    """A text with one number, item of a list or (with `words`) word copied wrongly."""
    binary, parts = set(text) <= set("01 \n"), text.split(", ")
    if words and len(parts) > 2 and rng.random() < 0.3:
        place = rng.randrange(len(parts) - 1)
        parts[place:place + 2] = parts[place + 1], parts[place]
        return ", ".join(parts)
    tokens = list(re.finditer(r"[01]" if binary else r"\d+|[A-Za-z]{2,}" if words else r"\d+", text))
    if not tokens:
        raise NoProcedure("nothing to misread")
    token = rng.choice(tokens)
    said = token.group()
    new = str(1 - int(said)) if binary else str(near_number(int(said), rng)) if said.isdigit() else near_word(said, rng)
    return text[:token.start()] + new + text[token.end():]


def misread(problem, right, rng):
    """The working of a question that differs in one place."""
    metadata = problem.metadata
    if problem.task == "countdown":
        numbers = list(metadata["numbers"])
        place = rng.randrange(len(numbers))
        numbers[place] = near_number(numbers[place], rng)
        return solve(dataclasses.replace(problem, metadata={**metadata, "numbers": numbers}))
    if problem.task == "shortest_path":
        grid = [list(row) for row in metadata["matrix"]]
        row, column = rng.choice([(r, c) for r, line in enumerate(grid) for c, v in enumerate(line) if v in "XO"])
        grid[row][column] = "O" if grid[row][column] == "X" else "X"
        return solve(dataclasses.replace(problem, metadata={**metadata, "matrix": grid}))
    start, end = re.search(DATA.get(problem.task, r"(.*)"), problem.prompt, re.DOTALL).span(1)
    copied = altered(problem.prompt[start:end], rng, problem.task in DATA)  # elsewhere words are the wording
    prompt = problem.prompt[:start] + copied + problem.prompt[end:]
    return solve(dataclasses.replace(problem, prompt=prompt))


def last(problem, right, rng):
    """The right working up to its last step, which states a wrong answer."""
    answer, step = near_answer(right.answer, rng), right.steps[-1]
    if answer is None or not step.text.endswith(right.answer):
        raise NoProcedure("the last step does not end with the answer")
    text = step.text.removesuffix(right.answer) + answer
    return right._replace(steps=[*right.steps[:-1], Step(text)], answer=answer, check="")


# ---------------------------------------------------------------- ways of single tasks


def _relative(problem, right, rng):
    """The word for the other gender."""
    pair = next(pair for pair in RELATED.values() if right.answer in pair)
    answer = pair[1 - pair.index(right.answer)]
    who = "woman" if pair.index(answer) else "man"
    text = re.sub(r"is a (?:man|woman): .*", f"is a {who}: {answer}", right.steps[-1].text)
    return right._replace(steps=[*right.steps[:-1], Step(text)], answer=answer)


def _conclusion(problem, right, rng):
    """The premises are read rightly and judged wrongly."""
    answer = near_answer(right.answer, rng)
    text = f"{'it follows' if answer == 'Yes' else 'it does not follow'}: {answer}"
    return right._replace(steps=[*right.steps[:-1], Step(text)], answer=answer)


def _wrong_shift(problem, right, rng):
    return solve(dataclasses.replace(problem, reference=_shift(problem.reference, rng.choice((1, 2, 25)))))


def _wrong_cell(problem, right, rng):
    """A value that does not fit is put into a cell; the rest of the grid is filled on top of it."""
    place = rng.randrange(len(right.steps))
    lines = re.search(r"puzzle:\n([1-4_ \n]+?)\nFormat", problem.prompt)
    grid = [line.split() for line in lines[1].split("\n")]
    for number, step in enumerate(right.steps[:place + 1]):
        row, column, value = re.match(r"(\d)\.(\d): .*; so (\d)$", step.text).groups()
        value = rng.choice([other for other in "1234" if other != value]) if number == place else value
        grid[int(row) - 1][int(column) - 1] = value
    assert step.text.startswith(_cell((int(row) - 1, int(column) - 1)))
    prompt = problem.prompt.replace(lines[1], "\n".join(" ".join(row) for row in grid))
    after = solve(dataclasses.replace(problem, prompt=prompt))
    return right._replace(steps=[*right.steps[:place], Step(step.text[:-1] + value), *after.steps], answer=after.answer)


OWN = {"family_relationships": (_relative,), "syllogism": (_conclusion,), "caesar_cipher": (_wrong_shift,),
       "mini_sudoku": (_wrong_cell,)}
# Where the value of an operation is mostly worked out again, or a misreading is seen at once.
WAYS = {"count_bits": (misread, last), "number_sequence": (last,)}


def first_difference(right, wrong):
    """The first step of `wrong` that `right` does not have there; None if all are the same."""
    pairs = zip([step.text for step in right.steps] + [None] * len(wrong.steps), wrong.steps)
    return next((place for place, (text, step) in enumerate(pairs) if text != step.text), None)


def make_mistake(problem, rng):
    """A `Mistake` about a problem, its way drawn by `rng`.

    Raises:
        NoProcedure: if the problem has no working, or no mistake in it was found that changes the answer.
    """
    right, task = solve(problem), get_task(problem.task)
    ways = list(OWN.get(problem.task) or WAYS.get(problem.task) or (operation, misread, last))
    if len(ways) == 3:  # computing wrongly is the commonest, where anything is computed
        ways = rng.choice(([operation, misread, last], [operation, misread, last], [misread, operation, last],
                           [last, operation, misread]))
    for way in ways:
        for _ in range(ATTEMPTS):
            try:
                wrong = way(problem, right, rng)
            except STOPPED:
                continue
            place = first_difference(right, wrong)
            if place is not None and not task.score(wrong.answer, problem).correct:
                return Mistake(wrong, place, way.__name__.strip("_"))
    raise NoProcedure("no mistake that changes the answer")
