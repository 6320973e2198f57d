"""Worked documents: sides, layouts, the token ids of R1-Zero's prompt, verified answers, sameness, bad input."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_scripts.worked_documents import LAYOUTS, document_of, main, prepare, summary
from recipes.chat_format import follows_format, set_chat_template
from recipes.encoding import encode_documents
from recipes.task_base import split_of
from recipes.tasks import get_task

TASKS = {"gcd": 1, "word_sequence_reversal": 1}
FORMS = ("\\boxed{{{}}}", "The answer is {}.", "Answer: {}", "{}")


def conversation(question, answer, reasoning="a step\nanother one", **columns):
    content = f"<think>\n{reasoning}\n</think>\n\n{answer}" if reasoning else f"<think>\n\n</think>\n\n{answer}"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": content}]
    return {"messages": turns, "task": "", "difficulty": 0, "style": "terse", "key": "", **columns}


def task_rows(split, count=12):
    """(row of a problem, its problem); the answer in one of FORMS."""
    found = []
    for name, level in TASKS.items():
        for place, problem in enumerate(get_task(name).problems(split, seed=3, difficulty=level, size=count)):
            answer = FORMS[place % len(FORMS)].format(problem.reference)
            row = conversation(problem.prompt, answer, task=name, difficulty=level, key=problem.metadata["key"])
            found.append((row, problem))
    return found


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_documents(folder):
    return [json.loads(line) for line in (folder / "documents.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """(folder of conversations with test-side rows among the training ones, {key: problem})."""
    folder = tmp_path_factory.mktemp("worked") / "set"
    train, test = task_rows("train"), task_rows("test", 4)
    greeting = [conversation(f"Who is number {number}?", "Nobody knows.", reasoning="") for number in range(40)]
    asked = next(row for row in greeting if split_of(row["messages"][0]["content"], 0.05) == "train")
    several = {**train[0][0], "messages": train[0][0]["messages"] * 2}
    write_rows(folder / "train.jsonl", [row for row, _ in train + test] + greeting + [several, train[0][0]])
    write_rows(folder / "test.jsonl", [asked])
    return folder, {problem.metadata["key"]: problem for _, problem in train}


@pytest.fixture(scope="module")
def zeros(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zeros") / "out"
    return folder, prepare(folder, conversations=given[0], layouts={"zero": 1}, tasks=list(TASKS))


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, and R1's marks as this project adds them: <think> is no special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={sign: place for place, sign in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<b>", "<e>"])
    backend.add_tokens([AddedToken(mark, normalized=False) for mark in ("<think>", "</think>")])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<b>", eos_token="<e>")
    return set_chat_template(made, "deepseek_r1_zero")


def test_training_side_only_and_what_is_left_out_is_counted(given, tmp_path):
    manifest = prepare(tmp_path / "out", conversations=given[0])
    rows = read_documents(tmp_path / "out")
    of_tasks = [row for row in rows if row["task"]]
    assert {row["key"] for row in of_tasks} == set(given[1])
    assert all(split_of(row["key"]) == "train" for row in of_tasks)
    greetings = [number for number in range(40) if split_of(f"Who is number {number}?", 0.05) == "train"]
    assert len(rows) - len(of_tasks) == len(greetings) - 1  # one of them is asked in test.jsonl
    assert manifest["left_out"] == {"test side": 8 + 40 - len(greetings), "asked in test.jsonl": 1, "skipped": 0,
                                    "not one question and one answer": 1, "the same document": 1, "too long": 0}
    assert sum(manifest["documents"]["layouts"].values()) == len(rows) == manifest["documents"]["documents"]
    assert "gcd:1 12" in summary(manifest) and "8" in summary(manifest)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_holds_question_working_and_answer_in_this_order(layout):
    row = conversation("What is 2 + 2?", "\\boxed{4}", task="gcd")
    text = document_of(row, layout)
    places = [text.index(part) for part in ("What is 2 + 2?", "a step\nanother one", "4", "4")]
    assert places == sorted(places) and text.rstrip("</answer>\n").endswith(("4", "{4}"))
    assert ("<think>" in text and "<answer>" in text) == (layout == "zero") and "｜" not in text
    assert "another one" not in document_of(conversation("What is 2 + 2?", "4", reasoning=""), layout)


def test_zero_documents_are_prompt_and_completion_of_the_template(zeros, given, tokenizer):
    for row in read_documents(zeros[0]):
        ids = encode_documents(tokenizer, [row["text"]])[0]
        asked = [{"role": "user", "content": given[1][row["key"]].prompt}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids[: len(prompt)] == prompt  # what a rollout begins with, to the token
        completion = tokenizer.decode(ids[len(prompt):], skip_special_tokens=True)
        assert completion.startswith("<think>\n") and ids[len(prompt)] == tokenizer.convert_tokens_to_ids("<think>")
        assert ids[-1] == tokenizer.eos_token_id


def test_zero_completions_have_the_format_and_the_right_answer(zeros, given):
    rows = read_documents(zeros[0])
    assert len(rows) == 24
    for row in rows:
        problem, completion = given[1][row["key"]], row["text"].rpartition("Assistant:\n")[2]
        assert follows_format(completion)
        assert get_task(row["task"]).score(completion, problem, untagged="unparsable").correct, completion
        assert f"<answer>\n{problem.reference}\n</answer>" in completion  # bare


def test_same_settings_same_bytes_and_finished_is_not_made_again(given, zeros, tmp_path):
    first = prepare(tmp_path / "a", conversations=given[0])
    stamp = (tmp_path / "a" / "documents.jsonl").stat().st_mtime_ns
    assert prepare(tmp_path / "a", conversations=given[0]) == first
    assert (tmp_path / "a" / "documents.jsonl").stat().st_mtime_ns == stamp
    assert prepare(tmp_path / "b", conversations=given[0])["documents"] == first["documents"]
    assert prepare(tmp_path / "b", conversations=given[0], seed=1)["documents"] != first["documents"]
    (tmp_path / "a" / "documents.jsonl").write_text("{}\n")
    assert prepare(tmp_path / "a", conversations=given[0]) == first
    assert len(read_documents(tmp_path / "a")) == first["documents"]["documents"]
    assert prepare(tmp_path / "c", conversations=given[0], documents=5)["left_out"]["more than documents"] > 0
    assert len(read_documents(tmp_path / "c")) == 5


def test_bad_input(given, tmp_path, capsys):
    for arguments, said in (
        (["--layouts", "zero=1,song=1"], "'song'; known are solution"),
        (["--tasks", "gcd:4"], "gave no document"),
        (["--tasks", "gdc"], "unknown task 'gdc'"),
        (["--documents", "0"], "documents=0 must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            main(["--output_dir", str(tmp_path / "out"), "--conversations", str(given[0]), *arguments])
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match="does not exist; make it with python -m data_scripts.prepare_sft"):
        prepare(tmp_path / "out", conversations=tmp_path / "nowhere")
    write_rows(tmp_path / "bad" / "train.jsonl", [{"messages": [{"role": "user", "content": "Alone"}]}])
    with pytest.raises(ValueError, match="line 1.*last message has role 'user'"):
        prepare(tmp_path / "out", conversations=tmp_path / "bad")
    assert not (tmp_path / "out").exists()
