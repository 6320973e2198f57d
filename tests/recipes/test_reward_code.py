"""recipes/reward_code.py: programs against the tests of a row, in the real sandbox; few processes, they are slow."""

import json
import threading

import pytest

from recipes import reward_code
from recipes.reward_code import parse_tests, row_tests, split_check
from recipes.rewards import get_rewards
from recipes.task_code import ListFunctionsTask

ADD = "def add(a, b):\n    return a + b"
ADD_TESTS = [
    "assert add(1, 2) == 3", {"assert": "assert add(0, 0) == 0"}, {"arguments": [2, 3], "result": 5},
    {"arguments": [0.1, 0.2], "result": 0.3},
]  # fmt: skip


def answer(program):
    return f"so I write it.</think>\n```python\n{program}\n```"


def reward(*texts, settings=None, **columns):
    (function,) = get_rewards(["code"], {"code": settings} if settings else None)
    return function(prompts=["?"] * len(texts), completions=list(texts), completion_ids=[[]] * len(texts), **columns)


def test_programs_against_assertions_and_calls():
    """All in one call: a column of its own for each row, JSON text or lists, and rows without tests."""
    limits = {"partial": True, "seconds": 1.5, "workers": 4}
    slow = "def add(a, b):\n    while a == 2:\n        pass\n    return a + b"
    cheat = (
        "class Any:\n    __eq__ = lambda *_: True\n    __radd__ = __add__ = lambda *_: 0\n"
        "def add(a, b):\n    return Any()"
    )
    programs = {
        answer(ADD): 1.0,
        answer(ADD + "\nimport sys\nprint('noise', end='')"): 1.0,
        answer("def add(a, b):\n    return max(a, b) if a else b"): 0.25,  # right for 0 and 0 only
        answer("def add(a, b):\n    print('x' * 30)\n    if a == 1:\n        raise SystemExit\n    return a + b"): 0.75,
        answer(slow): 0.5,  # the third never ends: the first two have passed
        answer(cheat): 0.5,  # fools assertions without an entry_point, not the calls
        answer("def add(a, b:"): 0.0,
        answer("import os; os._exit(0)"): 0.0,
        "def add(a, b): return a + b": 0.0,  # no </think>
        answer(ADD) + " ": None,
    }
    texts, logged = [*programs, answer(ADD)], {}  # the first once more: it runs once
    tests = [ADD_TESTS[:2] + [dict(test, function="add") for test in ADD_TESTS[2:]]] * len(texts)
    tests[1], tests[list(programs.values()).index(None)] = json.dumps(tests[1]), None
    found = reward(*texts, settings=limits, tests=tests, log_metric=logged.__setitem__)
    assert dict(zip(programs, found)) == programs and found[-1] == 1.0
    assert logged == {"code/programs over a limit": 1 / 8}


def test_all_or_nothing_and_plain_results():
    almost = "def add(a, b):\n    return 0 if a == 2 else a + b"
    cheat = "class Any(int):\n    __eq__ = lambda *_: True\ndef add(a, b):\n    return Any()"
    columns = {"tests": [ADD_TESTS] * 3, "entry_point": ["add"] * 3}
    assert reward(*map(answer, (ADD, almost, cheat)), **columns) == [1.0, 0.0, 0.0]
    with_function = [["assert add(1, 2) == 3"]]
    assert reward(answer(cheat), tests=with_function, entry_point=["add"]) == [1.0]


def test_programs_that_read_input():
    tests = [{"stdin": "3 4\n", "stdout": "7\n"}, {"stdin": "1 1", "stdout": "2"}]
    right = "import sys\na, b = map(int, sys.stdin.read().split())\nprint(a + b, ' ')\nsys.exit(0)"
    once = "a, b = map(int, input().split())\nif a == 1:\n    raise ValueError\nprint(a + b)"
    coded = "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))\nsys.exit(1)"
    found = reward(*map(answer, (right, once, coded)), settings={"partial": True}, tests=[tests] * 3)
    assert found == [1.0, 0.5, 0.0]
    assert reward(answer(once), tests=[tests]) == [0.0]


def test_rows_of_the_code_tasks():
    problem = ListFunctionsTask("list_functions").problems("train", 0, 1, 1)[0]
    row = problem.to_row()
    tests, metadata = row_tests(row)
    count = problem.metadata["tests"].count("assert")
    assert len(tests) == count == 10 and metadata["entry_point"] == "transform"
    columns = {name: [value] * 2 for name, value in row.items()}
    empty_only = "def transform(xs):\n    return []"  # right at most for some inputs
    found = reward(answer(problem.reference), answer(empty_only), settings={"partial": True}, **columns)
    space = {}
    exec(problem.reference, space)  # our own
    checks = problem.metadata["tests"].splitlines()[1:]
    wanted = sum(eval(line.strip().removeprefix("assert "), {"candidate": lambda xs: []}) for line in checks) / count
    assert found == [1.0, pytest.approx(wanted)]
    other = {"task": ["gcd"], "metadata": ['{"difficulty": 1}']}
    assert reward(answer(ADD), **other) == [None] and reward(answer(ADD)) == [None]


def test_what_tests_are_made_of():
    whole = "def check(candidate):\n    for x in (1, 2):\n        assert candidate(x) == x\n"
    assert len(split_check(whole, "f")) == 1
    assert len(split_check("def check(c):\n    assert c(1) == 1\n    assert c(2) == 2\n", "f")) == 2
    struct = {"stdin": None, "stdout": None, "assert": "assert True", "arguments": None, "result": None}
    assert parse_tests([struct]).checks == (("assert", None, "assert True"),)  # as a column of structs has it
    assert parse_tests([{"arguments": [1], "result": None}], "f").checks == (("call", "f", "([1], None)"),)
    for wrong in ([{"stdin": "3"}], [{"arguments": [1], "result": 1}], [3], [{"stdin": 3, "stdout": "4"}]):
        with pytest.raises(ValueError, match='completion 7, test 0: a test must be {"stdin", "stdout"}'):
            parse_tests(wrong, None, "completion 7")
    with pytest.raises(ValueError, match="holds no JSON"):
        parse_tests("assert True")
    with pytest.raises(ValueError, match="must hold a list of tests, got 7"):
        parse_tests("7")
    with pytest.raises(ValueError, match="the tests of f are no Python .*: 'def check.c:'"):
        split_check("def check(c:", "f")
    with pytest.raises(ValueError, match="reward_kwargs.code.seconds=0 must be above 0"):
        reward("x", settings={"seconds": 0})


def test_programs_run_side_by_side(monkeypatch):
    """Three workers meet at a barrier, which one after the other would not pass; more than three never run at once."""
    barrier, running, most = threading.Barrier(3), [], []

    def run(program, *_):
        running.append(program)
        most.append(len(running))
        barrier.wait(timeout=20)
        running.remove(program)
        return float("2" in program), False

    monkeypatch.setattr(reward_code, "run_tests", run)
    texts = [answer(f"f = lambda: {number}") for number in range(6)]
    found = reward(*texts, settings={"workers": 3}, tests=[["assert f() == 2"]] * 6)
    assert found == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0] and max(most) == 3
