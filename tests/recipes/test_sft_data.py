"""Data of fine-tuning, token by token: what is trained, what is shortened, what is refused."""

import json

import pytest
from datasets import Dataset

from data_scripts.train_tokenizer import train_tokenizer
from recipes import sft_data
from recipes.chat_format import set_chat_template
from recipes.sft_data import (
    Encoding,
    checksum,
    encode_dataset,
    encode_row,
    fit,
    hold_out,
    read_splits,
    to_messages,
    training_template,
)

THOUGHT = "<think>\nfour and three\n</think>\n\nseven"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 4 + 3?"},
    {"role": "assistant", "content": THOUGHT},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "You are welcome."},
    {"role": "user", "content": "And 4 + 4?"},
    {"role": "assistant", "content": "<think>\nfour and four\n</think>\n\neight"},
]
END = "<｜end▁of▁sentence｜>"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["".join(m["content"] for m in TALK), "some more words of a text"] * 3, 400)


def parts(tokenizer, labels):
    """The texts of the runs of trained tokens."""
    found, run = [], []
    for label in [*labels, -100]:
        if label != -100:
            run.append(label)
        elif run:
            found.append(tokenizer.decode(run))
            run = []
    return found


def encoded(tokenizer, multi_turn="split", messages=TALK, **settings):
    return encode_row({"messages": messages}, tokenizer, Encoding(500, multi_turn, **settings))


def test_each_answer_is_trained_once_as_it_is_seen_at_inference(tokenizer):
    examples = encoded(tokenizer)
    assert [parts(tokenizer, labels) for _, labels, _ in examples] == [
        [THOUGHT + END], ["You are welcome." + END], ["<think>\nfour and four\n</think>\n\neight" + END],
    ]  # fmt: skip
    for turn, (ids, labels, status) in zip((3, 5, 7), examples):
        settings = {"add_generation_prompt": True, "thinking": False}
        prompt = tokenizer.apply_chat_template(TALK[: turn - 1], **settings)["input_ids"]
        assert ids[: len(prompt)] == prompt and labels[: len(prompt)] == [-100] * len(prompt)
        assert labels[len(prompt) :] == ids[len(prompt) :] and status == "kept"
        assert all(label in (-100, token) for label, token in zip(labels, ids))


def test_the_generation_prompt_continues_into_the_trained_tokens(tokenizer):
    """With the forced <think> too: token by token, nothing merges over the seam."""
    ids, _, _ = encoded(tokenizer)[0]
    prompt = tokenizer.apply_chat_template(TALK[:2], add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(prompt).endswith("<think>\n") and ids[: len(prompt)] == prompt


def test_other_ways_with_several_turns(tokenizer):
    (last,) = encoded(tokenizer, "last")
    assert last[:2] == encoded(tokenizer)[-1][:2]
    ((ids, labels, _),) = encoded(tokenizer, "keep")
    assert parts(tokenizer, labels) == [
        THOUGHT + END, "You are welcome." + END, "<think>\nfour and four\n</think>\n\neight" + END,
    ]  # fmt: skip
    for turn in (3, 5):  # prefix-preserving: what stands before does not depend on what follows
        ((first, _, _),) = encoded(tokenizer, "keep", TALK[:turn])
        assert ids[: len(first)] == first
    ((ids, labels, _),) = encoded(tokenizer, "last", assistant_only_loss=False)
    assert labels == ids


def test_tool_calls_are_trained_and_their_outputs_are_not(tokenizer):
    call = [{"type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}]
    messages = [
        {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "", "tool_calls": call},
        {"role": "tool", "content": "rain"}, {"role": "assistant", "content": "It rains."},
    ]  # fmt: skip
    ((_, labels, _),) = encoded(tokenizer, messages=messages)
    first, second = parts(tokenizer, labels)
    assert "look" in first and first.endswith(END) and second == "It rains." + END


def test_zero_template(tokenizer):
    zero = set_chat_template(train_tokenizer([THOUGHT] * 3, 400), "deepseek_r1_zero")
    assert training_template(zero) is None
    ((ids, labels, _),) = encoded(zero, messages=TALK[1:3])
    (text,) = parts(zero, labels)
    assert "four and three" in text and "seven" in text and text.endswith(END)
    assert "4 + 3" not in text


LONG = [TALK[0], *TALK[1:3] * 6]


def test_the_oldest_turns_go_first(tokenizer):
    full, _, _ = fit(LONG, tokenizer, Encoding(10_000))
    ids, labels, status = fit(LONG, tokenizer, Encoding(len(full) - 1))
    expected, expected_labels, _ = fit([LONG[0], *LONG[3:]], tokenizer, Encoding(10_000))
    assert (ids, labels) == (expected, expected_labels) and "oldest turns" in status


def test_then_the_middle_of_the_question_and_never_the_answer(tokenizer):
    question = "first words " + "of a text " * 60 + "last words"
    messages = [{"role": "user", "content": question}, TALK[2]]
    ids, labels, status = fit(messages, tokenizer, Encoding(90))
    assert 80 <= len(ids) <= 90 and "middle of the question" in status
    assert parts(tokenizer, labels) == [THOUGHT + END]
    text = tokenizer.decode(ids)
    assert "first words" in text and "last words" in text and " ... " in text
    chinese = [{"role": "user", "content": "学而时习之，不亦说乎？" * 20}, TALK[2]]  # three tokens a character
    assert "\ufffd" not in tokenizer.decode(fit(chinese, tokenizer, Encoding(90))[0])
    assert fit(messages, tokenizer, Encoding(25))[0] is None
    assert fit(messages, tokenizer, Encoding(90, overlong="drop"))[0] is None
    with pytest.raises(ValueError, match="exceed max_length=90"):
        fit(messages, tokenizer, Encoding(90, overlong="error"))


def test_what_happened_is_counted(tokenizer, monkeypatch):
    rows = [{"messages": TALK[1:3]}, {"messages": [{"role": "user", "content": "of a text " * 90}, TALK[2]]},
            {"messages": [TALK[1], {"role": "assistant", "content": "some " * 300}]}]  # fmt: skip
    found, report = encode_dataset(Dataset.from_list(rows), tokenizer, Encoding(100), "here")
    assert found.column_names == ["input_ids", "labels"] and len(found) == report.examples == 2
    assert dict(report.counts) == {"kept": 1, "middle of the question left out to fit max_length": 1,
                                   "left out: longer than max_length": 1}  # fmt: skip
    assert report.tokens == sum(map(len, found["input_ids"]))
    assert report.trained_tokens == sum(label != -100 for labels in found["labels"] for label in labels)
    assert report.lines()[0].startswith("2 examples") and len(report.lines()) == 3
    again, _ = encode_dataset(Dataset.from_list(rows), tokenizer, Encoding(100), "here")
    monkeypatch.setattr(sft_data, "_code_version", lambda: "another")
    newer, _ = encode_dataset(Dataset.from_list(rows), tokenizer, Encoding(100), "here")
    assert found._fingerprint == again._fingerprint != newer._fingerprint  # what `datasets` finds in its cache
    other, _ = encode_dataset(Dataset.from_list(rows[:1]), tokenizer, Encoding(100), "here")
    assert checksum(found) == checksum(found) != checksum(other)


def test_bad_rows_are_named_or_counted(tokenizer):
    bad = [TALK[1], {"role": "assistant", "content": "<think>"}]
    rows = Dataset.from_list([{"messages": TALK[1:3]}, {"messages": bad}])
    with pytest.raises(ValueError, match="here, row 1: message 1 .assistant. opens <think> and never closes"):
        encode_dataset(rows, tokenizer, Encoding(100), "here")
    found, report = encode_dataset(rows, tokenizer, Encoding(100, errors="skip"), "here")
    assert len(found) == 1 and report.counts["bad row"] == 1 and "row 1" in report.lines()[-1]
    with pytest.raises(ValueError, match="no example is left"):
        encode_dataset(rows.select([1]), tokenizer, Encoding(100, errors="skip"), "here")


def test_other_spellings_of_a_conversation(tokenizer):
    pair = TALK[1:3]
    said = [{"from": "human", "value": pair[0]["content"]}, {"from": "gpt", "value": THOUGHT}]
    assert to_messages({"conversations": said}) == pair
    assert to_messages({"prompt": pair[:1], "completion": pair[1:]}) == pair
    assert to_messages({"prompt": pair[0]["content"], "completion": THOUGHT}) == pair
    with pytest.raises(ValueError, match="columns question, reply: expected messages"):
        to_messages({"question": "a", "reply": "b"})
    with pytest.raises(ValueError, match="assistant_only_loss=false"):
        encode_row({"text": "some text"}, tokenizer, Encoding(100))
    ((ids, labels, _),) = encode_row({"text": "some text"}, tokenizer, Encoding(100, assistant_only_loss=False))
    assert ids == labels and tokenizer.decode(ids).endswith("some text" + END)


def test_conversations_as_data_sets_hold_them(tokenizer):
    pair = TALK[1:3]
    assert to_messages({"conversations": pair}) == to_messages({"messages": json.dumps(pair)}) == pair
    assert to_messages({"conversations": [{"from": "user", "value": "a"}, {"from": "bot", "value": "b"}]})[1] == {
        "role": "assistant", "content": "b"}  # fmt: skip
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert to_messages({"messages": parts}) == [{"role": "user", "content": "ab"}]
    # A column of structs: every field of any row, at any depth.
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "Paris", "day": None}}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call], "name": None, "reasoning_content": None}
    fields = to_messages({"messages": [turn]})[0]
    assert fields.keys() == {"role", "content", "tool_calls"} and fields["content"] is None
    assert fields["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    assert to_messages({"messages": [turn | {"tool_calls": json.dumps(fields["tool_calls"])}]}) == [fields]
    for name, value, reason in (("messages", ["a"], "a turn must be a mapping"), ("messages", "{", "no JSON"),
                                ("conversations", {"a": 1}, "conversations must hold a list")):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            to_messages({name: value})


def test_declared_tools_that_the_template_leaves_out_are_counted(tokenizer):
    tool = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"x": None}}}
    for tools in ([tool], json.dumps([tool])):
        ((ids, labels, status),) = encode_row({"messages": TALK[1:3], "tools": tools}, tokenizer, Encoding(500))
        assert (ids, labels) == encoded(tokenizer, messages=TALK[1:3])[0][:2] and "no place for" in status
    for tools in ("", [], None):
        assert encode_row({"messages": TALK[1:3], "tools": tools}, tokenizer, Encoding(500))[0][2] == "kept"
    other = train_tokenizer([THOUGHT] * 3, 400)
    other.chat_template = "{{ tools | tojson }}" + other.chat_template
    ((ids, _, status),) = encode_row({"messages": TALK[1:3], "tools": json.dumps([tool])}, other, Encoding(500))
    assert status == "kept" and '"name": "look"' in other.decode(ids) and "null" not in other.decode(ids)
    with pytest.raises(ValueError, match="column tools holds text that is no JSON"):
        encode_row({"messages": TALK[1:3], "tools": "look"}, tokenizer, Encoding(500))


def test_templates_that_train_on_the_wrong_thing(tokenizer):
    other = train_tokenizer([THOUGHT] * 3, 400)
    assert training_template(other) is None
    other.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="no {% generation %} marks"):
        training_template(other)
    other.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'].split('</think>')[-1] + eos_token }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="deletes the reasoning"):
        training_template(other)
    other.chat_template = tokenizer.chat_template.replace("past_reasoning == 'keep' or", "")
    assert training_template(other) is None
    with pytest.raises(ValueError, match="under multi_turn=keep .* of 2 answers .*, or multi_turn=split"):
        training_template(other, "keep")


def test_reading_files_and_folders(tmp_path):
    rows = [{"messages": TALK[1:3], "key": str(i % 10)} for i in range(40)]
    text = "\n".join(map(json.dumps, rows))
    (tmp_path / "train.jsonl").write_text(text)
    train, held_out = read_splits(str(tmp_path))
    assert len(train) == 40 and held_out is None
    (tmp_path / "test.jsonl").write_text(text[: text.index("\n")])
    assert len(read_splits(str(tmp_path))[1]) == 1
    train, held_out = hold_out(read_splits(str(tmp_path / "train.jsonl"))[0], 0.3, seed=0)
    assert len(train) + len(held_out) == 40 and 0 < len(held_out) < 40
    assert not set(train["key"]) & set(held_out["key"])  # by problem, not by row
    # The same system prompt before every question does not make them one question.
    rows = [{"messages": [TALK[0], {"role": "user", "content": str(i // 2)}, TALK[2]]} for i in range(200)]
    sides = [{row["messages"][1]["content"] for row in part} for part in hold_out(Dataset.from_list(rows), 0.3, seed=0)]
    assert not sides[0] & sides[1] and 15 < len(sides[1]) < 45
    for text, reason in (("", "it is empty"), ('{"messages": [', "cannot be read as json")):
        (tmp_path / "broken").mkdir(exist_ok=True)
        (tmp_path / "broken" / "train.jsonl").write_text(text)
        with pytest.raises(ValueError, match=reason):
            read_splits(str(tmp_path / "broken"))
    with pytest.raises(FileNotFoundError, match="data_scripts.prepare_sft"):
        read_splits("data/sft_missing")
    (tmp_path / "train.jsonl").rename(tmp_path / "other.jsonl")
    with pytest.raises(ValueError, match=r"holds no train.jsonl or train.parquet \(found: other, test\)"):
        read_splits(str(tmp_path))
