"""Worked traces: every one scored correct by its task, slips always mended, styles told apart, statements true."""

import random
import re
from itertools import islice

import pytest

from data_scripts.reasoning import traces_columns
from data_scripts.reasoning.traces import SOLVERS, NoProcedure, WrongTrace, content, make, pick_style, solve
from data_scripts.reasoning.traces_base import WRONG, Step, Working, parse_style, put_answer, render, spaced
from recipes.conversations import check_conversation, split_reasoning
from recipes.task_answers import evaluate_expression
from recipes.task_base import Problem
from recipes.tasks import TASKS, get_task

STYLES = ["terse", "prose", "numbered", "terse+check", "prose+backtrack", "numbered+check+backtrack", "terse+backtrack"]
# 12-(-5)=17, 47+85=132, -(-(3)+1)=2=2: any number of equal expressions; and 4<7, -2.5>-3.
EQUATION = re.compile(r"(?<![\w.=*/+()-])(\(*-?\d[\d*/+()-]*(?:=\(*-?\d[\d*/+()-]*)+)")
COMPARISON = re.compile(r"(?<![\w.])(-?\d+(?:\.\d+)?)([<>])(-?\d+(?:\.\d+)?)(?![\d.])")


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


def statements(text):
    """(statement, whether it holds) of the equations and comparisons in a text, by an independent evaluator."""
    for said in EQUATION.findall(text):
        yield said, len({evaluate_expression(side)[0] for side in said.split("=")}) == 1
    for left, sign, right in COMPARISON.findall(text):
        yield left + sign + right, float(left) < float(right) if sign == "<" else float(left) > float(right)


def test_written_statements_hold():
    """All equations and comparisons in steps, notices and checks of every task are true; those of slips are not."""
    counted, slips = 0, 0
    for name in SOLVERS:
        for _, working in worked(name, 3):
            for text in [working.check, *(text for step in working.steps for text in (step.text, step.notice))]:
                for said, holds in statements(text):
                    assert holds, (name, said, text)
                    counted += 1
            for step in working.steps:
                for said, holds in statements(step.slip):
                    # A remainder that is too large stands in a true equation: what is wrong is said behind it.
                    assert said != step.slip or not holds or "is not below" in step.notice, (name, step)
                    slips += 1
    assert counted > 2_500 and slips > 500, (counted, slips)


def family(question):
    return "Andrew is married to Eleanor. They have a child called Jacob.\n\n" + question


@pytest.mark.parametrize("name, prompt, reference, present, absent", [
    ("count_primes", "Count how many prime numbers there are between 1 and 5 (inclusive) ?", "3",
     ["1 is no prime", "2 or odd: 2 3 5"], ["not even"]),
    ("family_relationships", family("What is Eleanor to Andrew? Respond only with a word."), "wife",
     ["Eleanor is the husband"], ["Andrew is Eleanor's spouse"]),  # true, so it is no slip
    ("family_relationships", family("What is Jacob to Andrew? Respond only with a word."), "son",
     ["Andrew is Jacob's child"], []),
    ("coin_flip", "What is the probability of getting exactly 1 heads in 2 fair coin flips?", "0.5",
     ["outcomes: 2 4"], ["doubles"]),  # 2*2 outcomes are right for two flips
    ("word_sequence_reversal", "Reverse this list of words: a, the, the", "the, the, a",
     ["3 the, 2 the, 1 a"], ["last is"]),
    ("number_sequence", "2, 4, 8, 16, ?", "32", ["add 2", "8-4=4", "times 2"], ["add 3"]),
    ("base_conversion", "Now, convert the hexadecimal number 1b to base-10", "27", ["b is 11"], []),
])  # fmt: skip
def test_slips_are_false_and_steps_are_complete(name, prompt, reference, present, absent):
    working = solve(Problem(name, 0, prompt, reference))
    told = "\n".join(text for step in working.steps for text in step)
    assert working.answer == reference or name == "coin_flip"
    assert all(text in told for text in present) and not any(text in told for text in absent), told


@pytest.mark.parametrize("name, prompt", [
    ("simple_equations", "Solve for x: 0 = 0"),
    ("letter_counting", 'How many times does the letter "4" appear in the text: "4 words about 44"?'),
    ("number_sequence", "1, 5, 2, 9, 3, ?"),
])  # fmt: skip
def test_what_has_no_procedure_says_so(name, prompt):
    with pytest.raises(NoProcedure):
        solve(Problem(name, 0, prompt, "1"))


@pytest.mark.parametrize("left, right, answer", [
    ("-a - 13", -14, 1), ("a + 3", 5, 2), ("-a", 4, -4), ("7 - a", 2, 5), ("-3*a + 1", 7, -2), ("-13 - a", -14, 1),
])  # fmt: skip
def test_equations_whose_unknown_is_negative(left, right, answer):
    working = SOLVERS["simple_equations"](Problem("simple_equations", 0, f"Solve for a: {left} = {right}", str(answer)))
    assert working.answer == str(answer)


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
    for problem in problems_of("word_sorting", 3):
        assert make(problem, random.Random(7), "prose+backtrack") == make(problem, random.Random(7), "prose+backtrack")
