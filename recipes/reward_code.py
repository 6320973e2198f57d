"""The reward of programs: the completion's code, run in the sandbox against the row's tests.

A row brings tests in its column `tests` (a list, or JSON text of one), each of one kind:

| test                                                | passes if                                                   |
|-----------------------------------------------------|-------------------------------------------------------------|
| {"stdin": "3 4", "stdout": "7"}                     | the program, given that input, prints that (line ends and   |
|                                                     | spaces at the ends of lines do not count) and ends well     |
| "assert add(3, 4) == 7", or {"assert": "..."}       | the statements run after the program                        |
| {"arguments": [3, 4], "result": 7}                  | the function `entry_point` returns that (JSON's values; a   |
|                                                     | tuple equals a list, floats to 1e-6)                        |

`entry_point` is a column of its own or a test's field `function`. Rows of the code tasks (`recipes/task_code.py`) have
theirs in `metadata`, as data_scripts/prepare_prompts.py writes them: `check(candidate)`, split into its assertions if
it has nothing else. A row without tests has no reward.

The code is what `recipes.task_answers` takes for it: the last fenced block after `</think>`, else all of the answer.
Each input is a process of its own; assertions and calls share one, are sent after the program has been loaded, and
results are plain values, as in `recipes/task_code.py`. What the sandbox holds and what not: `recipes/sandbox.py`.
"""

import ast
import json
import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from recipes.conversations import drop_none
from recipes.sandbox import Limits, run_python
from recipes.task_answers import extract_answer
from recipes.task_base import Problem
from recipes.task_code import PLAIN_RESULTS, CodeTask

KINDS = '{"stdin", "stdout"}, "assert ...", {"assert"} or {"arguments", "result"} with an entry_point'
# Runs a program on an input: errors and a wrong exit code fail, leaving by sys.exit(0) is fine.
ON_INPUT = """
import io, sys
sys.stdin = io.TextIOWrapper(io.BytesIO({stdin!r}), encoding="utf-8")
try:
    exec(compile({program!r}, "answer.py", "exec"), {{"__name__": "__main__"}})
except SystemExit as leaving:
    if leaving.code not in (None, 0):
        raise
"""
# Runs each check, whatever the others did, and says on standard output which passed. The word is not in the program.
CHECKS = """
def _run_checks(names):
    import ast, os
    def same(a, b):
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        if isinstance(a, bool) or isinstance(b, bool):
            return a is b
        if isinstance(a, float) or isinstance(b, float):
            numbers = isinstance(a, (int, float)) and isinstance(b, (int, float))
            return numbers and abs(a - b) <= 1e-6 * max(1, abs(a), abs(b))
        return a == b
    {plain}
    for place, (kind, function, content) in enumerate({checks}):
        try:
            space = dict(names)
            if function is not None:
                space[function] = _plain_results(names[function])
            if kind == "assert":
                exec(compile(content, "test", "exec"), space)
            else:
                given, expected = ast.literal_eval(content)
                assert same(space[function](*given), expected)
        except BaseException:
            continue
        os.write(1, b"\\n{word} %d\\n" % place)
_run_checks(globals())
"""


@dataclass(frozen=True)
class CodeTests:
    """A row's tests: `inputs` ((stdin, stdout), ...) and `checks` ((kind, function or None, text), ...)."""

    inputs: tuple = ()
    checks: tuple = ()

    def __len__(self):
        return len(self.inputs) + len(self.checks)


# ---------------------------------------------------------------- a row's tests


def _bad_test(test, where):
    return ValueError(f"{where}: a test must be {KINDS}; got {test!r:.200}")


def _text(value, test, where):
    if not isinstance(value, str):
        raise _bad_test(test, where)
    return value


def parse_tests(tests, entry_point=None, where="tests"):
    """`CodeTests` of a column's value, a list or JSON text of one.

    Raises:
        ValueError: for text that is no JSON, and for a test of no known kind, naming it and its place.
    """
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: the column tests holds no JSON ({error}): {tests!r:.80}") from error
    tests, inputs, checks = [tests] if isinstance(tests, dict) else tests, [], []
    if not isinstance(tests, (list, tuple)):
        raise ValueError(f"{where}: the column tests must hold a list of tests, got {tests!r:.80}")
    for place, test in enumerate(tests):
        at = f"{where}, test {place}"
        fields = {"assert": test} if isinstance(test, str) else drop_none(test) if isinstance(test, dict) else {}
        function = fields.get("function", entry_point)
        if "stdin" in fields and "stdout" in fields:
            inputs.append((_text(fields["stdin"], test, at), _text(fields["stdout"], test, at)))
        elif "assert" in fields:
            checks.append(("assert", None, _text(fields["assert"], test, at)))
        elif isinstance(fields.get("arguments"), list) and "result" in test and function:
            checks.append(("call", function, repr((fields["arguments"], test["result"]))))
        else:
            raise _bad_test(test, at)
    return CodeTests(tuple(inputs), tuple(checks))


def split_check(source, entry_point):
    """`CodeTests` of `def check(candidate)`: one for each assertion where its body has nothing else, or one in all."""
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        raise ValueError(f"metadata: the tests of {entry_point} are no Python ({error}): {source!r:.80}") from error
    whole = (("assert", entry_point, f"{source}\ncheck({entry_point})\n"),)
    found = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == "check"]
    if len(found) != 1 or not all(isinstance(node, ast.Assert) for node in found[0].body):
        return CodeTests(checks=whole)
    name = found[0].args.args[0].arg
    return CodeTests(checks=tuple(
        ("assert", entry_point, f"{name} = {entry_point}\n{ast.unparse(node)}") for node in found[0].body
    ))  # fmt: skip


def row_tests(row, where="row"):
    """(`CodeTests`, metadata) of a row (dict of its columns), or None where it has no tests."""
    metadata = row.get("metadata")
    metadata = json.loads(metadata) if isinstance(metadata, str) and metadata else metadata or {}
    if row.get("tests"):
        tests = parse_tests(row["tests"], row.get("entry_point") or metadata.get("entry_point"), where)
        return (tests, metadata) if len(tests) else None
    if metadata.get("tests") and metadata.get("entry_point"):
        return split_check(metadata["tests"], metadata["entry_point"]), metadata
    return None


# ---------------------------------------------------------------- running them


def _lines(text):
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _passed_inputs(program, inputs, limits):
    for stdin, stdout in inputs:
        source = ON_INPUT.format(stdin=stdin.encode("utf-8", "surrogatepass"), program=program)
        result = run_python(source, "", limits)
        yield result.passed and _lines(result.stdout) == _lines(stdout), result.status


def _passed_checks(program, checks, limits):
    """(how many passed, status of the process). What passed before a timeout has passed."""
    word = secrets.token_hex(16)
    plain = PLAIN_RESULTS.strip().replace("\n", "\n    ")
    result = run_python(program, CHECKS.format(plain=plain, checks=repr(checks), word=word), limits)
    said = {line for line in result.stdout.splitlines() if line.startswith(word)}
    return len(said & {f"{word} {place}" for place in range(len(checks))}), result.status


def run_tests(program, tests, limits, partial=True):
    """(share of the tests that pass, whether a limit was hit); without `partial` it stops at a failed input, for 0."""
    passed, statuses = 0, []
    if tests.checks:
        passed, status = _passed_checks(program, tests.checks, limits)
        statuses.append(status)
    if partial or passed == len(tests.checks):
        for good, status in _passed_inputs(program, tests.inputs, limits):
            passed += good
            statuses.append(status)
            if not good and not partial:
                break
    share = passed / len(tests)
    return share if partial else float(share == 1), any(status in ("timeout", "output") for status in statuses)


# ---------------------------------------------------------------- the reward


def code_reward(
    prompts, completions, partial=False, seconds=5.0, memory_mb=512, workers=None, untagged="unparsable", **columns
):
    """1.0 where all tests of the row pass, else 0.0; None for a row without tests. Columns: see this file's head.

    Args:
        partial: the share of the tests that pass instead. Easier to learn from, and to be satisfied with.
        seconds: a program's time for each input, and for all assertions and calls together.
        memory_mb: its memory, in MiB.
        workers: programs at a time; default: the processor's cores, at most 8.
        untagged: what a completion without `</think>` is: "unparsable" (0.0), or the "whole" is the answer.
    """
    for name, value in (("seconds", seconds), ("memory_mb", memory_mb), ("workers", workers or 1)):
        if value <= 0:
            raise ValueError(f"reward_kwargs.code.{name}={value} must be above 0")
    limits, jobs, found = Limits(seconds=seconds, memory_bytes=int(memory_mb) << 20), {}, []
    wanted = [name for name in ("tests", "entry_point", "metadata") if columns.get(name) is not None]
    for place, completion in enumerate(completions):
        known = row_tests({name: columns[name][place] for name in wanted}, f"completion {place}")
        if known is None:
            found.append(None)
            continue
        tests, metadata = known
        text = completion if isinstance(completion, str) else "".join(turn.get("content") or "" for turn in completion)
        answer = extract_answer(text, "code", untagged)
        program = None
        if answer is not None:
            program = _program(answer, metadata)
            jobs.setdefault((program, tests), None)  # samples of a prompt are often alike: each program runs once
        found.append((program, tests))
    if jobs:
        with ThreadPoolExecutor(min(workers or min(8, os.cpu_count() or 1), len(jobs))) as pool:
            jobs = dict(zip(jobs, pool.map(lambda job: run_tests(*job, limits, partial), jobs)))
        if columns.get("log_metric") is not None:
            columns["log_metric"]("code/programs over a limit", sum(over for _, over in jobs.values()) / len(jobs))
    return [None if job is None else jobs[job][0] if job[0] is not None else 0.0 for job in found]


def _program(answer, metadata):
    """The answer, behind the code of its question where it has some."""
    if not metadata.get("entry_point"):
        return answer
    return CodeTask("code").program(answer, Problem("code", 0, "", "", metadata))
