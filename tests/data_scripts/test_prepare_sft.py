"""Sets of conversations: sides, shares, styles, columns, bad rows, sameness, and that TRL's loader reads them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from data_scripts.finetuning.sft_rows import parse_tasks
from data_scripts.finetuning.sft_sources import conversations, parse_columns, to_messages, with_blocks
from data_scripts.prepare_sft import assert_disjoint, main, parse_column_options, prepare, summary
from data_scripts.reasoning.dialogues import dialogues
from data_scripts.reasoning.traces import content
from recipes.conversations import check_conversation, split_reasoning
from recipes.task_base import Problem, split_of
from recipes.tasks import get_task

ROOT = Path(__file__).parents[2]
SMALL = {"tasks": "chain_sum:1-2,number_filtering:1", "problems": 60, "test_problems": 10, "dialogues": 40,
         "progress": False}


def rows_of(folder, split="train"):
    return [json.loads(line) for line in (Path(folder) / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft") / "small"
    return folder, prepare(folder, **SMALL)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_rows_sides_and_manifest(small):
    folder, manifest = small
    for split in ("train", "test"):
        rows = rows_of(folder, split)
        assert manifest["splits"][split]["rows"] == len(rows) > 25
        for row in rows:
            assert list(row) == ["messages", "source", "task", "difficulty", "style", "key"]
            check_conversation(row["messages"])
            assert split_of(row["key"]) == split
            said = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
            assert all(split_reasoning(text)[0] is not None for text in said)
    keys = [{row["key"] for row in rows_of(folder, split)} for split in ("train", "test")]
    assert not keys[0] & keys[1]
    assert manifest["splits"]["train"]["tasks"]["chain_sum:1"]["rows"] <= 60 + 40
    assert set(manifest["sources"]) == {"traces", "dialogues"}
    assert "Apache-2.0" in manifest["sources"]["traces"]["licence"]
    assert "chain_sum:2" in summary(manifest)


def test_trls_loader_reads_it(small):
    loaded = datasets.load_dataset("json", data_files=str(small[0] / "train.jsonl"), split="train", cache_dir=str(
        small[0].parent / "cache"))
    assert loaded[0]["messages"][0]["role"] == "user" and loaded.features["difficulty"].dtype == "int64"


def test_same_settings_same_bytes_and_no_second_run(small, tmp_path):
    folder, manifest = small
    again = prepare(tmp_path / "again", **SMALL)
    assert (tmp_path / "again" / "train.jsonl").read_bytes() == (folder / "train.jsonl").read_bytes()
    assert again["fingerprint"] == manifest["fingerprint"]
    stamp = (folder / "train.jsonl").stat().st_mtime_ns
    assert prepare(folder, **SMALL) == manifest and (folder / "train.jsonl").stat().st_mtime_ns == stamp
    other = prepare(tmp_path / "again", **{**SMALL, "seed": 1})
    assert other["splits"]["train"]["sha256"] != manifest["splits"]["train"]["sha256"]
    (tmp_path / "again" / "test.jsonl").write_text("")  # damage is noticed
    assert prepare(tmp_path / "again", **{**SMALL, "seed": 1}) == other
    (tmp_path / "again" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"holds mine\.txt, which is no part of a set of conversations"):
        prepare(tmp_path / "again", **SMALL)


def test_style_shares_are_settings(tmp_path):
    manifest = prepare(tmp_path / "prose", **{**SMALL, "dialogues": 0}, voices={"prose": 1}, check=1, backtrack=0)
    assert set(manifest["splits"]["train"]["styles"]) == {"prose+check", "prose"}  # filtering has no second way
    assert manifest["splits"]["train"]["styles"]["prose+check"] >= 60


def test_dialogues_are_right_and_stay_on_their_side():
    tasks = {"chain_sum": [1, 2], "spell_backward": [1], "letter_counting": [1], "gcd": [1]}
    found = {split: list(dialogues(0, split, tasks, 80, 2_000)) for split in ("train", "test")}
    moves = {move for row in found["train"] for move in row["style"].split("+")}
    assert moves >= {"another", "doubt", "wrong claim", "right claim", "how", "greet", "about", "thank"}
    for split, rows in found.items():
        assert len(rows) == 80
        for row in rows:
            check_conversation(row["messages"])
            assert len(row["messages"]) >= 4 and {split_of(key) for key in row["keys"]} == {split}
    claims = [row for row in found["train"] if "wrong claim" in row["style"]]
    for row in claims:
        texts = [message["content"] for message in row["messages"]]
        place = next(i for i, text in enumerate(texts) if "No, it is not " in text)
        wrong, right = re.search(r"No, it is not (\S+)\. The answer is (\S+)\.$", texts[place]).groups()
        task, answered = get_task(row["task"]), texts[place - 2]
        assert wrong in texts[place - 1] and wrong != right
        assert task.score(answered, Problem(row["task"], 0, "", right)).correct
        assert not task.score(answered, Problem(row["task"], 0, "", wrong)).correct
    assert len(claims) > 3


def test_leaking_problems_are_caught():
    row = {"messages": [{"role": "user", "content": "q"}], "key": "k", "task": ""}
    with pytest.raises(AssertionError, match="2 problems are in both splits, for instance 'k'"):
        assert_disjoint({"train": [row], "test": [row]})


TOLD = content("two, two", "4")
SPELLINGS = [
    ({"problem": "2+2?", "solution": "4", "thought": "two, two"},
     ["question=problem,answer=solution,reasoning=thought"]),
    ({"question": "2+2?", "answer": "4", "reasoning": "two, two"}, []),
    ({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": TOLD}]}, []),
    ({"talk": [{"role": "user", "content": "2+2?"},
               {"role": "assistant", "content": "4", "reasoning_content": "two, two"}]},
     ["messages=talk"]),
    ({"prompt": [{"role": "user", "content": "2+2?"}],
      "completion": [{"role": "assistant", "content": TOLD}]}, []),
]  # fmt: skip


@pytest.mark.parametrize("row, columns", SPELLINGS)
def test_columns_and_spellings_give_the_same_conversation(row, columns, tmp_path):
    location = write_lines(tmp_path / "a.jsonl", [row])
    mapping = parse_column_options(columns, {"a": location}).get("a")
    expected = [{"role": "user", "content": "2+2?"},
                {"role": "assistant", "content": "<think>\ntwo, two\n</think>\n\n4"}]
    assert [found["messages"] for found in conversations(location, mapping)] == [expected]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "b.parquet")
    assert [found["messages"] for found in conversations(str(tmp_path / "b.parquet"), mapping)] == [expected]


def test_explicit_columns_go_before_messages_and_alpaca_keeps_its_input():
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "problem": "p",
           "solution": "s"}
    assert [m["content"] for m in to_messages(row, {"question": "problem", "answer": "solution"})] == ["p", "s"]
    assert [m["content"] for m in to_messages(row, {})] == ["x", "y"]
    alpaca = {"instruction": "Summarise.", "input": "A long text.", "output": "Text."}
    assert to_messages(alpaca, {})[0]["content"] == "Summarise.\n\nA long text."
    assert to_messages({**alpaca, "input": ""}, {})[0]["content"] == "Summarise."
    assert to_messages(alpaca, {"question": "instruction", "answer": "output"})[0]["content"] == "Summarise."


def test_a_downloaded_hub_folder(tmp_path):
    """Cards and held-out parts are passed over; odd columns do not reach the set, which one schema must hold."""
    folder = tmp_path / "set"
    for name in ("data", ".cache", "validation"):
        (folder / name).mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "dataset_infos.json").write_text("{}")
    (folder / ".cache" / "x.jsonl").write_text("no JSON")
    def rows(name, count):
        return [{"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": f"{name} {i}?"},
                                   {"from": "gpt", "value": str(i)}], "id": i, "difficulty": "hard", "task": ["chat"],
                 "key": 7, "style": None} for i in range(count)]
    for name, count in (("train-00000-of-00002", 3), ("train-00001-of-00002", 2), ("test-00000-of-00001", 4)):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(name, count)), folder / "data" / f"{name}.parquet")
    write_lines(folder / "validation" / "a.jsonl", rows("v", 2))
    (tmp_path / "array.json").write_text(json.dumps(rows("array", 2)), encoding="utf-8-sig")
    sources = {"a": str(folder), "b": str(tmp_path / "array.json"), "traces": "built-in"}
    prepare(tmp_path / "out", sources=sources, **{**SMALL, "dialogues": 0}, test_share=0)
    found = [row for row in rows_of(tmp_path / "out") if row["source"] != "traces"]
    assert len(found) == 7 and {row["source"] for row in found} == {"a", "b"}
    assert {(row["difficulty"], row["task"], row["key"], row["style"]) for row in found} == {(0, "", "", "")}
    assert all([turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"] for row in found)
    loaded = datasets.load_dataset("json", data_files=str(tmp_path / "out" / "train.jsonl"), split="train",
                                   cache_dir=str(tmp_path / "cache"))
    assert loaded.features["difficulty"].dtype == "int64" and loaded.features["key"].dtype == "string"
    (folder / "data" / "train-00002-of-00002.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(ValueError, match="train-00002-of-00002.parquet cannot be read"):
        list(conversations(str(folder)))
    only = tmp_path / "only"
    only.mkdir()
    write_lines(only / "test.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(ValueError, match="holds no training file .*held-out parts are passed over"):
        list(conversations(str(only)))


def test_what_is_held_out_is_left_out_of_every_source(small, tmp_path):
    """Rows of the test file, offered as training rows under other names, stay out; so do those of an evaluation set."""
    test = [row for row in rows_of(small[0], "test") if row["source"] == "traces"]
    renamed = [{"question": row["messages"][0]["content"].upper(), "answer": "x", "key": f"mine {i}"}
               for i, row in enumerate(test)]
    renamed += [{"question": "def f():", "answer": "x", "task": "human_eval"}, {"question": "Hello", "answer": "Hi"}]
    location = write_lines(tmp_path / "a.jsonl", renamed)
    manifest = prepare(tmp_path / "out", **SMALL, sources={"traces": "built-in", "own": location}, test_share=0)
    assert manifest["splits"]["train"]["sources"]["own"] == 1
    assert manifest["left_out"]["own"]["held out"] == len(test) == 30
    assert "human_eval" in {row["task"] for row in rows_of(tmp_path / "out", "test")}


def test_dialogues_end_where_nothing_fits():
    assert list(dialogues(0, "train", {"letter_counting": [1]}, 5, 10)) == []


@pytest.mark.slow
def test_sets_are_the_same_in_every_process(small, tmp_path):
    """Nothing may hang on the order of a set of strings, which another PYTHONHASHSEED changes."""
    command = [sys.executable, "-m", "data_scripts.prepare_sft", "--output_dir", str(tmp_path / "out"),
               "--tasks", SMALL["tasks"], "--problems", "60", "--test_problems", "10", "--dialogues", "40"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "4242"})
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (small[0] / name).read_bytes()


def test_direct_answers():
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    block = with_blocks(turns, "empty_block")
    assert block[1]["content"] == "<think>\n\n</think>\n\nHello" and with_blocks(block, "bare") == turns
    kept = [turns[0], {"role": "assistant", "content": content("so", "Hello")}]
    assert with_blocks(kept, "empty_block") == with_blocks(kept, "bare") == kept


def test_unknown_columns_name_the_way_out():
    with pytest.raises(ValueError, match="no conversation in the columns x, y: pass --columns messages=NAME"):
        to_messages({"x": 1, "y": 2}, {})
    with pytest.raises(ValueError, match="no column 'zz' for answer; columns present: x"):
        to_messages({"x": "q"}, {"question": "x", "answer": "zz"})
    with pytest.raises(ValueError, match="must be FIELD=COLUMN, with FIELD one of messages, question"):
        parse_columns("quest=x")


def asked(answer):
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]}


BAD = [
    ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "message 1 has role 'user'"),
    (asked(" "), r"message 1 \(assistant\) is empty"),
    (asked("<think>\nhm"), "never closes it"),
    ({"messages": "hello"}, "column messages holds text that is no JSON"),
    ({"question": "a", "answer": 7}, "answer is a int, expected text"),
    ({"question": "a", "answer": "b", "reasoning": ["c"]}, "reasoning is a list, expected text"),
    ({"messages": [{"role": "narrator", "content": "a"}]}, "message 0 has role 'narrator'"),
    ({"messages": {"role": ["user"], "content": ["a"]}}, "column messages must hold a list"),
    ({"question": "a", "answer": "b\ud800"}, "surrogates not allowed"),
    ({"question": "3 + 4?", "answer": "7", "task": "chain_sum"}, "told apart by a key"),
]  # fmt: skip


@pytest.mark.parametrize("row, reason", BAD)
def test_bad_rows_stop_or_are_counted(row, reason, tmp_path):
    good = [{"question": f"q{i}", "answer": "a"} for i in range(3)]
    location = write_lines(tmp_path / "a.jsonl", [good[0], row, *good[1:]])
    with pytest.raises(ValueError, match=rf"a\.jsonl line 2: .*{reason}.*--errors skip"):
        list(conversations(location))
    manifest = prepare(tmp_path / "out", sources={"a": location}, errors="skip", test_share=0, progress=False)
    assert manifest["splits"]["train"]["rows"] == 3 and manifest["left_out"]["a"]["skipped"] == 1
    assert "line 2" in manifest["left_out"]["a"]["examples"][0]


def test_mixture_counts_and_task_keys_of_outside_rows(tmp_path):
    """Outside rows with a task's key lie on the task's side, whatever the share of other rows that is held out."""
    keys = [f"{a}+{b}" for a in range(10, 20) for b in range(10, 20)]
    rows = [{"question": f"What is {key}?", "answer": "x", "task": "chain_sum", "key": key} for key in keys]
    rows += [{"question": "long", "answer": "y" * 5_000}]
    location = write_lines(tmp_path / "a.jsonl", rows)
    manifest = prepare(tmp_path / "out", **{**SMALL, "dialogues": 0}, sources={"traces": "built-in", "own": location},
                       mixture={"traces": 75, "own": 25})
    counts = manifest["splits"]["train"]["sources"]
    assert abs(counts["own"] / (counts["own"] + counts["traces"]) - 0.25) < 0.01
    assert manifest["left_out"]["own"]["too long"] == 1
    for split in ("train", "test"):
        assert all(split_of(row["key"]) == split for row in rows_of(tmp_path / "out", split))


def test_duplicates_are_left_out(tmp_path):
    location = write_lines(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}] * 5)
    manifest = prepare(tmp_path / "out", sources={"a": location}, test_share=0, progress=False)
    assert manifest["splits"]["train"]["rows"] == 1 and manifest["left_out"]["a"]["duplicates"] == 4


@pytest.mark.parametrize("options, message", [
    (["--tasks", "gsm_symbolic"], "has no worked traces; tasks that have are"),
    (["--tasks", "gcd:7"], "asks for levels that gcd does not have"),
    (["--tasks", "gcd:x"], "must be NAME, NAME:LEVEL or NAME:LOW-HIGH"),
    (["--check", "2"], "check=2.0 must lie in"),
    (["--mixture", "traces=50"], "must sum to 100"),
    (["--source", "x=built-in"], "source 'x' is not built in; built in are traces, dialogues"),
    (["--columns", "y:question=a"], "columns for 'y', which is no source"),
    (["--only_given"], "no sources"),
    (["--dialogues", "-1"], "dialogues=-1 must be at least 0"),
    (["--source", "a=x", "--source", "a=y"], "--source names 'a' twice"),
    (["--source", "a=./missing.jsonl"], "does not exist"),
])  # fmt: skip
def test_errors_name_field_and_way_out(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--output_dir", str(tmp_path / "out"), *options])
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_command_line(tmp_path, capsys):
    main(["--output_dir", str(tmp_path / "out"), "--tasks", "spell_backward:1", "--problems", "20",
          "--test_problems", "5", "--dialogues", "10", "--voices", "terse=100"])
    assert "spell_backward:1" in capsys.readouterr().out
    assert parse_tasks("gcd:2,gcd:1,lcm") == {"gcd": [1, 2], "lcm": [1, 2, 3]}
