"""Worked traces: every one scored correct by its task, slips always mended, styles told apart, statements true."""

import random
import re
from fractions import Fraction
from itertools import islice

import pytest

from data_scripts import traces_columns
from data_scripts.traces import SOLVERS, NoProcedure, WrongTrace, content, make, pick_style, solve
from data_scripts.traces_base import WRONG, Step, Working, parse_style, put_answer, render, spaced
from recipes.conversations import check_conversation, split_reasoning
from recipes.task_answers import evaluate_expression
from recipes.task_base import Problem
from recipes.tasks import TASKS, get_task

STYLES = ["terse", "prose", "numbered", "terse+check", "prose+backtrack", "numbered+check+backtrack", "terse+backtrack"]
EQUATION = re.compile(r"(?<![\w.])(-?\d[\d*/+()-]*)=(-?\d+)(?![\d.=*/+-]|\+)")


def problems_of(name, count=8):
    return [problem for level in TASKS[name].levels for problem in islice(TASKS[name].stream("train", 5, level), count)]


def worked(name, count=8):
    for problem in problems_of(name, count):
        try:
            yield problem, solve(problem)
        except NoProcedure:
            continue


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_every_trace_is_scored_correct_and_well_formed(name):
    """The verifier decides inside `make`; here again, on the turn as a model would have to write it."""
    told, without = set(), 0
    problems = problems_of(name)
    for place, problem in enumerate(problems):
        for style in (STYLES[place % len(STYLES)], STYLES[(place + 3) % len(STYLES)]):
            try:
                found = make(problem, random.Random(place), style)
            except NoProcedure:
                without += 1
                continue
            turn = content(found.reasoning, found.answer)
            assert get_task(name).score(turn, problem, untagged="unparsable").correct
            check_conversation([{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": turn}])
            assert split_reasoning(turn) == (found.reasoning, found.answer)
            assert found.reasoning == found.reasoning.strip() and "think>" not in found.reasoning
            told.add(found.style.split("+")[0])
    assert told == {"terse", "prose", "numbered"} and without <= 0.7 * 2 * len(problems)


def test_at_least_twenty_tasks():
    assert len(SOLVERS) >= 20 and set(SOLVERS) <= set(TASKS)


def test_a_wrong_solver_is_refused(monkeypatch):
    problem = problems_of("chain_sum", 1)[0]
    monkeypatch.setitem(SOLVERS, "chain_sum", lambda problem: Working("add", [Step("x")], "123456"))
    with pytest.raises(WrongTrace, match="the steps give '123456'"):
        make(problem, random.Random(0), "terse", "bare")


def test_written_equations_hold():
    """All plain equations in the steps and checks of the arithmetic tasks, by an independent evaluator; slips do not."""
    counted, slips = 0, 0
    for name in ("chain_sum", "products", "gcd", "lcm", "leg_counting", "base_conversion", "simple_geometry"):
        for _, working in worked(name, 4):
            for text in [step.text for step in working.steps] + [working.check]:
                for left, right in EQUATION.findall(text):
                    found = evaluate_expression(left)
                    assert found and found[0] == Fraction(right), (name, left, right, text)
                    counted += 1
            for step in working.steps:
                match = EQUATION.fullmatch(step.slip)
                if match:
                    assert evaluate_expression(match[1])[0] != Fraction(match[2]), (name, step.slip)
                    slips += 1
    assert counted > 1_500 and slips > 300, (counted, slips)


@pytest.mark.parametrize("a, b", [(0, 0), (9, 9), (47, 85), (99, 1), (100, 900), (5, 123), (999, 999)])
def test_columns_agree_with_arithmetic(a, b):
    assert traces_columns.add(a, b)[1] == a + b
    assert traces_columns.subtract(max(a, b), min(a, b))[1] == abs(a - b)
    assert traces_columns.multiply(a, b)[1] == a * b
    for sign, x, y in (("+", a, -b), ("-", -a, b), ("-", a, b), ("+", -a, -b), ("-", -a, -b)):
        assert traces_columns.combine(x, sign, y)[1] == (x + y if sign == "+" else x - y)
    if b:
        assert traces_columns.divide(a, b)[1:] == divmod(a, b)


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_slips_are_noticed_and_mended(name):
    """Right behind the slip stands what shows it, the word wrong, and then the step as it should be."""
    seen = 0
    for _, working in worked(name, 6):
        for place, step in enumerate(working.steps):
            if not step.slip:
                continue
            seen += 1
            assert step.notice and step.slip not in (step.text, working.answer)
            only = working._replace(steps=[other if i == place else other._replace(slip="", notice="")
                                           for i, other in enumerate(working.steps)])
            for voice in ("terse", "prose", "numbered"):
                text, told = render(only, random.Random(1), f"{voice}+backtrack")
                clean, _ = render(only, random.Random(1), voice)
                tell = {"terse": str, "prose": spaced, "numbered": spaced}[voice]
                first, mended = text.index(tell(step.slip)), text.rindex(tell(step.text))
                assert told == f"{voice}+backtrack" and text.count(f" {WRONG}") + clean.count(f" {WRONG}") >= 1
                behind = text[first:mended]
                assert tell(step.notice) in behind and WRONG in behind, (name, voice, text)
                if voice == "terse":  # without the line of the slip it is the text without slip
                    assert clean == "\n".join(line for line in text.split("\n") if not line.endswith(f", {WRONG}"))
    if name != "countdown":  # its failed attempts are its backtracking
        assert seen


def test_voices_and_features_differ():
    problem = next(iter(islice(TASKS["gcd"].stream("train", 1, 3), 1)))
    texts = {style: make(problem, random.Random(0), style).reasoning for style in STYLES}
    assert len(set(texts.values())) == len(STYLES)
    assert texts["terse+check"].startswith(texts["terse"]) and "check: " in texts["terse+check"]
    assert "I " in texts["prose"] and "\n" not in texts["prose"] and texts["numbered"].count("\n") > 2


def test_features_without_use_are_not_claimed():
    text, told = render(Working("do", [Step("a"), Step("b")], "b"), random.Random(0), "terse+check+backtrack")
    assert (text, told) == ("a\nb", "terse")


def test_style_shares_and_errors():
    rng = random.Random(0)
    drawn = [pick_style(rng) for _ in range(4_000)]
    assert 0.66 < sum(style.startswith("terse") for style in drawn) / 4_000 < 0.74
    assert 0.08 < sum("backtrack" in style for style in drawn) / 4_000 < 0.12
    assert pick_style(rng, {"prose": 1}, 1, 1) == "prose+check+backtrack"
    for style in ("loud", "terse+twice", "terse+check+check"):
        with pytest.raises(ValueError, match="must be one of terse, prose, numbered"):
            parse_style(style)
    with pytest.raises(ValueError, match="answer form 'sung' must be one of bare"):
        put_answer("1", "number", "sung")
    with pytest.raises(ValueError, match="has no worked traces; tasks that have are"):
        make(Problem("gsm_symbolic", 0, "How many?", "1"), random.Random(0))


def test_same_seed_same_text():
    for problem in problems_of("letter_counting", 3):
        assert make(problem, random.Random(7), "prose+backtrack") == make(problem, random.Random(7), "prose+backtrack")
