r"""School mathematics with symbolic answers, compared by math-verify.

Questions are our own templates; answers are fractions, radicals, polynomials, sets, pairs and
intervals in LaTeX. `verify_mathematics` also serves data sets from elsewhere: reference and answer as
text, equal up to notation ("1/2", "0.5", "\frac{1}{2}").
"""

import atexit
import json
import math
import os
import queue
import random
import re
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

from recipes.task_answers import LONGEST_ANSWER, plain, read_number, undressed
from recipes.task_base import UNPARSABLE, Candidate, Task, Verdict

WORKER = Path(__file__).with_name("task_math_worker.py")
ANSWER_SECONDS, START_SECONDS = 8.0, 60.0


class MathWorker:
    """Starts the comparing process when first needed, and again whenever it was killed."""

    def __init__(self, seconds=ANSWER_SECONDS):
        self.seconds = seconds
        self._forget()

    def _forget(self):
        self.process, self.lock, self.owner = None, threading.Lock(), os.getpid()

    def _start(self):
        self.process = subprocess.Popen([sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True, encoding="utf-8")
        self.replies = queue.Queue()
        threading.Thread(target=self._listen, args=(self.process.stdout, self.replies), daemon=True).start()
        if self._reply(START_SECONDS) is None:
            raise ModuleNotFoundError("the process that compares mathematical answers did not start: "
                                      "`pip install math-verify`")

    @staticmethod
    def _listen(stream, replies):
        for line in stream:
            replies.put(line)
        replies.put(None)

    def _reply(self, seconds):
        try:
            return self.replies.get(timeout=seconds)
        except queue.Empty:
            return None

    def compare(self, reference, answer):
        """(correct, parsed); (False, False) where it takes too long."""
        if self.owner != os.getpid():  # after a fork: the pipes belong to the parent
            self._forget()
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self._start()
            try:
                self.process.stdin.write(json.dumps({"reference": reference, "answer": answer}) + "\n")
                self.process.stdin.flush()
                line = self._reply(self.seconds)
            except BrokenPipeError:
                line = None
            if line is None:
                self.close()
                return False, False
            reply = json.loads(line)
            return reply["correct"], reply["parsed"]

    def close(self):
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process = None


_WORKER = MathWorker()
atexit.register(_WORKER.close)


def verify_mathematics(answer, reference, worker=None):
    """A Verdict on an extracted answer: equal text, equal numbers, else math-verify in its own process."""
    answer = undressed(answer)
    control = any(ord(c) < 32 and c not in "\t\n" for c in answer)
    if not answer or control or len(answer) > LONGEST_ANSWER["mathematics"]:
        return UNPARSABLE
    if plain(answer) == plain(reference):
        return Verdict(True, True, answer)
    numbers = [read_number(text) if not set(text) & set("\\{}^_()[]|") else None for text in (answer, reference)]
    if None not in numbers and all(c not in answer for c in "=xy"):
        return Verdict(numbers[0] == numbers[1], True, answer)
    correct, parsed = (worker or _WORKER).compare(reference, answer)
    return Verdict(correct, parsed, answer) if parsed else UNPARSABLE


def _latex(value):
    value = Fraction(value)
    sign = "-" if value < 0 else ""
    return str(value) if value.denominator == 1 else f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def _polynomial(coefficients):
    """[2, 0, -1] (highest power first) -> "2x^{2} - 1"."""
    text, degree = "", len(coefficients) - 1
    for power, c in zip(range(degree, -1, -1), coefficients):
        if c:
            body = "" if abs(c) == 1 and power else str(abs(c))
            body += "" if not power else "x" if power == 1 else f"x^{{{power}}}"
            text += (" - " if c < 0 else " + ") + body if text else ("-" if c < 0 else "") + body
    return text or "0"


def _nonzero(rng, limit):
    return rng.choice([-1, 1]) * rng.randint(1, limit)


def add_fractions(rng, d):
    a, b, c, e = (rng.randint(1, 4 * d) for _ in range(4))
    b, e, sign = b + 1, e + 1, rng.choice("+-")
    value = Fraction(a, b) + (1 if sign == "+" else -1) * Fraction(c, e)
    return f"Compute $\\frac{{{a}}}{{{b}}} {sign} \\frac{{{c}}}{{{e}}}$ as a fraction in lowest terms.", _latex(value)


def percentage(rng, d):
    share, whole = rng.choice((5, 10, 20, 25, 50, 75)) if d < 3 else rng.randint(1, 99), rng.randint(1, 20 * d) * 10
    return f"What is ${share}\\%$ of ${whole}$?", _latex(Fraction(share * whole, 100))


def radical(rng, d):
    outside, inside = rng.randint(2, 2 + 2 * d), rng.choice((2, 3, 5, 6, 7, 10, 11, 13, 14, 15))
    return f"Simplify $\\sqrt{{{outside ** 2 * inside}}}$.", f"{outside}\\sqrt{{{inside}}}"


def expand(rng, d):
    a, c = (1, 1) if d == 1 else (rng.randint(1, d), rng.randint(1, d))
    b, e = _nonzero(rng, 3 * d), _nonzero(rng, 3 * d)
    return (f"Expand $({_polynomial([a, b])})({_polynomial([c, e])})$.", _polynomial([a * c, a * e + b * c, b * e]))


def derivative(rng, d):
    coefficients = [_nonzero(rng, 3 * d)] + [rng.randint(-3 * d, 3 * d) for _ in range(1 + (d + 1) // 2)]
    degree = len(coefficients) - 1
    return (f"Find the derivative of ${_polynomial(coefficients)}$ with respect to $x$.",
            _polynomial([c * (degree - i) for i, c in enumerate(coefficients[:-1])]))


def quadratic(rng, d):
    first, second = rng.sample(range(-3 * d, 3 * d + 1), 2)
    scale = 1 if d < 3 else rng.randint(1, d - 1)
    low, high = sorted((first, second))
    left = _polynomial([scale, -scale * (first + second), scale * first * second])
    return f"Solve ${left} = 0$. Give the set of all solutions.", f"\\{{{low}, {high}\\}}"


def linear_system(rng, d):
    x, y = rng.randint(-2 * d, 2 * d), rng.randint(-2 * d, 2 * d)
    while True:
        a, b, c, e = (rng.randint(1, 1 + d) for _ in range(4))
        if a * e != b * c:
            break
    return (f"Solve ${a}x + {b}y = {a * x + b * y}$ and ${c}x + {e}y = {c * x + e * y}$. Give the pair $(x, y)$.",
            f"({x}, {y})")


def inequality(rng, d):
    a, b, edge = rng.randint(2, 2 + d), _nonzero(rng, 4 * d), rng.randint(-3 * d, 3 * d)
    return (f"Solve ${_polynomial([a, b])} < {a * edge + b}$ for real $x$. Give the solution as an interval.",
            f"(-\\infty, {edge})")


def series(rng, d):
    first, step, terms = rng.randint(1, 5 * d), rng.randint(1, 2 * d), rng.randint(3, 3 + 4 * d)
    total = terms * (2 * first + (terms - 1) * step) // 2
    return (f"An arithmetic sequence starts with ${first}$ and has common difference ${step}$. "
            f"What is the sum of its first ${terms}$ terms?"), str(total)


def combinations(rng, d):
    n = rng.randint(4, 4 + 2 * d)
    k = rng.randint(2, n - 2)
    return f"In how many ways can ${k}$ objects be chosen from ${n}$ different objects?", str(math.comb(n, k))


# math-verify accepts whatever is equal, the question itself too: "expand" and "simplify" ask for a form.
NUMBERS = {"add_fractions", "percentage", "series", "combinations"}


def has_asked_form(answer, template, reference):
    """Whether an answer is worked out, rather than the question repeated."""
    if template in NUMBERS:
        return read_number(answer) is not None
    if template == "radical":
        inside = re.findall(r"sqrt\s?[{(]?\s?([0-9]+)", answer)
        return inside == re.findall(r"sqrt\{([0-9]+)", reference)
    if template in ("expand", "derivative"):
        return not re.search(r"[()\[\]']|frac|int|left", answer)
    if template == "quadratic":
        return not re.search(r"x\s?(\^|\*\*)|x\s?\(|\)\s?\(", answer)
    return template != "linear_system" or not re.search(r"\+|[0-9]\s?\*?\s?[xy]", answer)


TEMPLATES = (add_fractions, percentage, radical, expand, derivative, quadratic, linear_system, inequality, series,
             combinations)


class MathematicsTask(Task):
    """Our templates, in turn; math-verify decides."""

    kind, source, licence = "mathematics", "templates of recipes/task_mathematics.py", "Apache-2.0"
    difficulty_means = "sizes of numbers, degree, number of terms"

    def candidates(self, seed, level):
        rng = random.Random(seed)
        while True:
            for template in TEMPLATES:
                question, answer = template(rng, level)
                yield Candidate(question, answer, question, {"template": template.__name__})

    def verify(self, answer, problem):
        verdict = verify_mathematics(answer, problem.reference)
        asked = has_asked_form(answer, problem.metadata["template"], problem.reference)
        return verdict if asked or not verdict.correct else verdict._replace(correct=False)
