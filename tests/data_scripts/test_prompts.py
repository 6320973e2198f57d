"""Prompt sets: sides, weights, wording, columns that verify, conversations, bad input, sameness."""

import json
from itertools import islice

import datasets
import pytest

from data_scripts.prepare_prompts import main, parse_weighted, prepare, quotas, summary
from recipes.rewards import accuracy_reward
from recipes.sft_data import read_splits
from recipes.task_base import Problem
from recipes.tasks import get_task

SMALL = {"tasks": ["chain_sum:2-3=3", "gcd:1"], "train": 80, "test": 20}


def rows_of(folder, split="train"):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts") / "small"
    return folder, prepare(folder, **SMALL)


def test_rows_verify_their_reference(small):
    folder, manifest = small
    for split, count in (("train", 80), ("test", 20)):
        rows = rows_of(folder, split)
        assert len(rows) == count
        for row in rows:
            assert list(row) == ["prompt", "question", "task", "index", "reference", "metadata"]
            problem, task = Problem.from_row({**row, "prompt": row["question"]}), get_task(row["task"])
            assert row["prompt"] == [{"role": "user", "content": row["question"]}]
            assert task.score(f"<think>\n</think>\n\n{row['reference']}", problem).correct
            assert not task.score("<think>\n</think>\n\n-98765", problem).correct
            assert problem.metadata["split"] == split
    assert manifest["splits"]["train"]["kinds"] == {"chain_sum:2": 30, "chain_sum:3": 30, "gcd:1": 20}
    assert "chain_sum:2 30" in summary(manifest)


def test_no_problem_and_no_question_on_both_sides(small):
    train, test = (rows_of(small[0], split) for split in ("train", "test"))
    assert not {row["question"] for row in train} & {row["question"] for row in test}
    keys = [{json.loads(row["metadata"])["key"] for row in rows} for rows in (train, test)]
    assert not keys[0] & keys[1] and len(keys[0]) == 80


def test_wording_is_that_of_the_sft_set(small, tmp_path):
    from data_scripts import prepare_sft

    prepare_sft.prepare(tmp_path / "sft", tasks="gcd:1", problems=200, test_problems=5, dialogues=0, progress=False,
                        sources={"traces": "built-in"})
    told = {row["messages"][0]["content"] for row in rows_of(tmp_path / "sft")}
    asked = [row["question"] for row in rows_of(small[0]) if row["task"] == "gcd"]
    assert set(asked) <= told


def test_trainers_read_it(small):
    loaded = datasets.load_dataset("json", data_files=str(small[0] / "train.jsonl"), split="train",
                                   cache_dir=str(small[0].parent / "cache"))
    assert loaded[0]["prompt"][0]["role"] == "user" and loaded.features["metadata"].dtype == "string"


def test_same_settings_same_bytes(small, tmp_path):
    folder, manifest = small
    assert prepare(tmp_path / "again", **SMALL)["splits"] == manifest["splits"]
    stamp = (folder / "train.jsonl").stat().st_mtime_ns
    assert prepare(folder, **SMALL) == manifest and (folder / "train.jsonl").stat().st_mtime_ns == stamp
    assert prepare(tmp_path / "again", **SMALL, seed=1)["splits"] != manifest["splits"]


def test_what_a_level_lacks_the_others_give(tmp_path):
    manifest = prepare(tmp_path / "x", tasks=["products:1", "gcd:1"], train=200, test=0, system="Be brief.")
    kinds = manifest["splits"]["train"]["kinds"]
    assert sum(kinds.values()) == 200 and kinds["products:1"] < 60
    assert manifest["left_out"]["train: fewer than their share"]["products:1"] == 100 - kinds["products:1"]
    assert rows_of(tmp_path / "x")[0]["prompt"][0] == {"role": "system", "content": "Be brief."}
    train, held_out = read_splits(str(tmp_path / "x"))  # test.jsonl is empty
    assert len(train) == 200 and held_out is None
    with pytest.raises(ValueError, match=r"train=500: the tasks have only \d+ distinct"):
        prepare(tmp_path / "y", tasks=["products:1"], train=500, test=0)


def test_quotas_sum_and_follow_the_weights():
    assert quotas({"a": 1, "b": 1, "c": 1}, 10) in ({"a": 4, "b": 3, "c": 3}, {"a": 3, "b": 4, "c": 3},
                                                    {"a": 3, "b": 3, "c": 4})
    assert quotas({"a": 3, "b": 1}, 8) == {"a": 6, "b": 2}
    assert parse_weighted(["chain_sum:2-3=3", "gcd:1"]) == {
        ("chain_sum", 2): 1.5, ("chain_sum", 3): 1.5, ("gcd", 1): 1.0}


@pytest.mark.parametrize("tasks, message", [
    (["gcd:9"], "levels that gcd does not have"), (["gcd=0"], "a number above 0"), (["gdc"], "unknown task 'gdc'"),
    (["human_eval"], "evaluation only"), ([], "give tasks, from_messages or both")])
def test_impossible_tasks(tasks, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--output_dir", str(tmp_path / "x"), "--train", "5", *(["--tasks", *tasks] if tasks else [])])
    assert message in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_questions_of_conversations(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": "Yes."},
                          {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "No."}]}
            for n in range(60)]
    rows += [{"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "question  7?"},
                           {"role": "assistant", "content": "Again."}]}, {"prompt": "Only a prompt"}]
    path = write_lines(tmp_path / "chats.jsonl", rows)
    manifest = prepare(tmp_path / "out", from_messages=path, test_share=0.2)
    train, test = (rows_of(tmp_path / "out", split) for split in ("train", "test"))
    assert len(train) + len(test) == 61 and len(test) > 4 and manifest["left_out"]["asked before"] == 1
    assert all(list(row) == ["prompt", "question"] and "now" not in row["question"] for row in train)
    write_lines(tmp_path / "chats.jsonl", [*rows, {"messages": [{"role": "assistant", "content": "x"}]}])
    with pytest.raises(ValueError, match=r"chats\.jsonl line 63: no user turn.*--errors skip"):
        prepare(tmp_path / "out", from_messages=path)
    assert prepare(tmp_path / "out", from_messages=path, errors="skip")["left_out"]["skipped"] == 1


def test_tasks_and_conversations_together(tmp_path):
    """Each question once, a task's held-out problem never trained on, and only the task's rows are judged."""
    task = get_task("gcd")
    known = {split: next(task.stream(split, 0, 1)) for split in ("train", "test")}
    *_, unseen = islice(task.stream("test", 0, 1), 20)  # a problem of the test side that is not drawn below
    told = [{"messages": [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": "1"}]}
            for problem in known.values()]  # fmt: skip
    reworded = {"messages": [{"role": "user", "content": "Largest common divisor, in other words?"},
                             {"role": "assistant", "content": "1"}],
                "task": "gcd", "key": unseen.metadata["key"]}  # fmt: skip
    chats = [{"messages": [{"role": "user", "content": f"Who is number {n}?"}, {"role": "assistant", "content": "I."}]}
             for n in range(40)]  # fmt: skip
    path = write_lines(tmp_path / "chats.jsonl", [*chats, *told, reworded])
    manifest = prepare(tmp_path / "out", from_messages=path, tasks=["gcd:1"], train=20, test=5, test_share=0.2)
    train, test = (rows_of(tmp_path / "out", split) for split in ("train", "test"))
    asked = [row["question"] for row in train + test]
    assert len(asked) == len(set(asked)) and reworded["messages"][0]["content"] not in [r["question"] for r in train]
    kinds = [manifest["splits"][split]["kinds"] for split in ("train", "test")]
    assert kinds[0]["gcd:1"] == 20 and kinds[1]["gcd:1"] == 5 and sum(kind["messages"] for kind in kinds) == 41
    assert manifest["left_out"]["asked by a task"] == 2
    loaded = datasets.load_dataset("json", data_files=str(tmp_path / "out" / "train.jsonl"), split="train",
                                   cache_dir=str(tmp_path / "cache"))  # fmt: skip
    columns = {name: loaded[name][:] for name in loaded.column_names if name != "prompt"}
    said = [f"<think>\n</think>\n\n{reference or 1}" for reference in columns["reference"]]
    found = accuracy_reward(loaded["prompt"][:], said, **columns)
    assert found == [None if task is None else 1.0 for task in columns["task"]] and {None, 1.0} == set(found)
