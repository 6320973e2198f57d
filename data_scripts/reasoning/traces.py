"""Worked reasoning traces for the procedural tasks: a problem in, checked reasoning and answer out.

    from data_scripts.reasoning.traces import trace
    reasoning, answer = trace(problem, random.Random(0), "terse+check")

The steps are computed by the task's solver and the answer follows from them; the task's own verifier
has to score it correct, else `WrongTrace` is raised: a solver and a task that disagree is a fault of one
of them. Problems without a short procedure (a sequence whose rule is not found, a long sieve) raise
`NoProcedure`. All texts are made here from the problem's numbers and words; none is copied.
"""

import random
from typing import NamedTuple

from data_scripts.reasoning import traces_arithmetic, traces_grids, traces_logic, traces_numbers, traces_words
from data_scripts.reasoning.traces_base import ANSWER_FORMS, NoProcedure, parse_style, put_answer, render
from recipes.tasks import get_task

SOLVERS = {**traces_arithmetic.SOLVERS, **traces_numbers.SOLVERS, **traces_words.SOLVERS, **traces_logic.SOLVERS,
           **traces_grids.SOLVERS}
# Shares of voices, of features on top of any voice, and of the forms in which answers are put (ours). Mostly one
# short voice: a model of a few million parameters learns one way of working before it learns three of telling it.
VOICE_SHARES = {"terse": 0.7, "prose": 0.15, "numbered": 0.15}
CHECK_SHARE, BACKTRACK_SHARE = 0.15, 0.1
ANSWER_SHARES = {"bare": 0.5, "sentence": 0.3, "boxed": 0.15, "label": 0.05}


class WrongTrace(AssertionError):
    """A solver's answer that the task's verifier refuses."""


class Trace(NamedTuple):
    """What `make` returns: `style` is the one that was really told, without features the problem has no use for."""

    reasoning: str
    answer: str
    style: str


def has_tracer(task):
    return task in SOLVERS


def _pick(shares, rng):
    return rng.choices(list(shares), list(shares.values()))[0]


def pick_style(rng, voices=None, check=CHECK_SHARE, backtrack=BACKTRACK_SHARE):
    """A style drawn by the shares; the same number of draws whatever they are."""
    voice, checked, slipped = _pick(voices or VOICE_SHARES, rng), rng.random() < check, rng.random() < backtrack
    return voice + "+check" * checked + "+backtrack" * slipped


def solve(problem):
    """The `Working` of a problem, not yet told by a voice and not yet checked by the verifier."""
    if problem.task not in SOLVERS:
        raise ValueError(f"task {problem.task!r} has no worked traces; tasks that have are {', '.join(SOLVERS)}")
    return SOLVERS[problem.task](problem)


def make(problem, rng, style="terse", form=None):
    """A `Trace` of a problem.

    Args:
        rng: a `random.Random`; it chooses wordings and the step that goes wrong, never the result.
        style: see `traces_base.py`; form: one of ANSWER_FORMS, or None for one drawn by ANSWER_SHARES.
    Raises:
        ValueError: for a task without solver (naming those that have one) or an unknown style.
        NoProcedure: for a problem without a short procedure.
        WrongTrace: where the verifier refuses the derived answer.
    """
    parse_style(style)
    working, task = solve(problem), get_task(problem.task)
    reasoning, told = render(working, rng, style)
    answer = put_answer(working.answer, task.kind, form or _pick(ANSWER_SHARES, rng)).strip()
    if not task.score(content(reasoning, answer), problem).correct:
        raise WrongTrace(f"{problem.task}: the steps give {answer!r}, the reference is {problem.reference!r}, for "
                         f"{problem.prompt!r}")
    return Trace(reasoning, answer, told)


def trace(problem, rng=None, style="terse"):
    """(reasoning, answer) of a problem; see `make`."""
    return make(problem, rng or random.Random(0), style)[:2]


def content(reasoning, answer, empty_block=True):
    """An assistant turn. Without reasoning it gets an empty block, as a prompt that ends in "<think>\\n" asks for."""
    if not reasoning and not empty_block:
        return answer.strip()
    return f"<think>\n{reasoning.strip()}\n</think>\n\n{answer.strip()}"


__all__ = ["ANSWER_FORMS", "SOLVERS", "NoProcedure", "Trace", "WrongTrace", "content", "has_tracer", "make",
           "pick_style", "solve", "trace"]
