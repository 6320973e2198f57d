"""Pairs and steps as token ids: what a reward model reads is what a policy writes."""

import json

import pytest
from datasets import Dataset

from data_scripts.train_tokenizer import train_tokenizer
from recipes.chat_format import set_chat_template
from recipes.reward_data import (
    RewardEncoding,
    encode_pairs,
    encode_rows,
    encode_steps,
    split_rows,
    without_trained,
)
from recipes.reward_rendering import render, render_steps

PROMPT = [{"role": "user", "content": "What is 2 + 3?"}]
THOUGHT = "<think>\n2+3=5\n</think>\n\nThe answer is 5."
ENCODING = RewardEncoding("preference", 200)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([PROMPT[0]["content"] + THOUGHT] * 3, 400)


def encode_pair(row, tokenizer, encoding):
    found = encode_pairs([row], tokenizer, encoding)[0]
    if isinstance(found, Exception):
        raise found
    return found


def said(text):
    return [{"role": "assistant", "content": text}]


def generation_prompt(tokenizer, **form):
    form |= {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return tokenizer.apply_chat_template(PROMPT, **form)["input_ids"]


@pytest.mark.parametrize("template", ["deepseek_r1", "deepseek_r1_zero"])
def test_a_pair_is_what_a_policy_reads_and_writes(tokenizer, template):
    set_chat_template(tokenizer, template)
    prompt_ids, ids = render(tokenizer, PROMPT, said(THOUGHT))
    assert prompt_ids == generation_prompt(tokenizer)
    written = tokenizer.decode(ids)
    form = {"deepseek_r1": "2+3=5\n</think>\n\nThe answer is 5.",
            "deepseek_r1_zero": "<think>\n2+3=5\n</think>\n<answer>\nThe answer is 5.\n</answer>"}  # fmt: skip
    assert written == form[template] + tokenizer.eos_token
    whole = tokenizer.apply_chat_template(PROMPT + said(THOUGHT), tokenize=True, return_dict=True)["input_ids"]
    assert prompt_ids + ids == whole
    sampled = tokenizer(form[template], add_special_tokens=False)["input_ids"]
    assert render(tokenizer, PROMPT, form[template], finished=False) == (prompt_ids, sampled)
    assert render(tokenizer, PROMPT, form[template]) == (prompt_ids, [*sampled, tokenizer.eos_token_id])
    set_chat_template(tokenizer, "deepseek_r1")


@pytest.mark.parametrize(
    "content, written",
    [("<think>\n2+3=", "2+3="), ("<think>2+3=", "2+3="), ("2+3=5\n</think>\n\n5", "2+3=5\n</think>\n\n5"), ("5", "5")],
)
def test_both_sides_have_the_same_prompt(tokenizer, content, written):
    """Whatever is wrong with the format of a side; the tag is never doubled."""
    row = encode_pair({"prompt": PROMPT, "chosen": said(THOUGHT), "rejected": said(content)}, tokenizer, ENCODING)
    start = generation_prompt(tokenizer)
    assert row["chosen_ids"][: len(start)] == row["rejected_ids"][: len(start)] == start
    assert tokenizer.decode(row["rejected_ids"][len(start) :]) == written + tokenizer.eos_token
    assert row["rejected_tokens"] == len(row["rejected_ids"]) - len(start)


@pytest.mark.parametrize("form", [str, said], ids=["text", "message"])
def test_nothing_stands_behind_an_end_token(tokenizer, form):
    end = tokenizer.eos_token
    assert render(tokenizer, PROMPT, form("5" + end)) == render(tokenizer, PROMPT, form("5"))
    with pytest.raises(ValueError, match="before its end; no policy writes on behind it"):
        render(tokenizer, PROMPT, form(f"5{end} or 6"))


def test_direct_answers_have_a_prompt_without_reasoning(tokenizer):
    row = encode_pair({"prompt": PROMPT, "chosen": said("5"), "rejected": said("6")}, tokenizer, ENCODING)
    start = generation_prompt(tokenizer, thinking=False)
    assert row["chosen_ids"][: len(start)] == start and "<think>" not in tokenizer.decode(row["chosen_ids"])


def test_other_forms_of_the_columns(tokenizer):
    row = {"prompt": PROMPT, "chosen": said(THOUGHT), "rejected": said("<think>\n2+3=6\n</think>\n\n6")}
    expected = encode_pair(row, tokenizer, ENCODING)
    whole = {"chosen": PROMPT + row["chosen"], "rejected": PROMPT + row["rejected"]}
    assert encode_pair(whole, tokenizer, ENCODING) == expected
    with pytest.raises(ValueError, match="begin with different prompts"):
        encode_pair(whole | {"rejected": said("x") + row["rejected"]}, tokenizer, ENCODING)
    text = encode_pair({"prompt": "2 + 3 =", "chosen": " 5", "rejected": " 6"}, tokenizer, ENCODING)
    assert tokenizer.decode(text["chosen_ids"], skip_special_tokens=True) == "2 + 3 = 5"
    assert text["chosen_ids"][-1] == tokenizer.eos_token_id


def test_what_is_too_long_loses_its_prompt_or_goes(tokenizer):
    row = {"prompt": [{"role": "user", "content": "1 " * 60 + "What is 2 + 3?"}], "chosen": said(THOUGHT),
           "rejected": said("<think>\n2\n</think>\n\n2")}  # fmt: skip
    full = encode_pair(row, tokenizer, RewardEncoding("preference", 10**6))
    length = len(full["chosen_ids"]) - 20
    cut = encode_pair(row, tokenizer, RewardEncoding("preference", length, "shorten_prompt"))
    assert len(cut["chosen_ids"]) == length and cut["chosen_ids"][0] == tokenizer.bos_token_id
    assert cut["chosen_ids"][1:] == full["chosen_ids"][21:] and cut["rejected_ids"][1:] == full["rejected_ids"][21:]
    dropped = encode_pair(row, tokenizer, RewardEncoding("preference", length))
    assert dropped["chosen_ids"] == [] and dropped["status"] == "left out: longer than max_length"
    short = encode_pair(row, tokenizer, RewardEncoding("preference", 30, "shorten_prompt"))
    assert short["chosen_ids"] == []
    with pytest.raises(ValueError, match="exceed max_length=30"):
        encode_pair(row, tokenizer, RewardEncoding("preference", 30, "error"))


def test_step_labels_stand_at_the_last_token_of_each_step(tokenizer):
    steps = ["<think>\n2+3=5", "so 5 + 0 = 5.", "</think>\n\nThe answer is 5."]
    row = {"prompt": PROMPT, "completions": steps, "labels": [True, False, False]}
    example = encode_steps(row, tokenizer, RewardEncoding("process", 200))
    places = [place for place, label in enumerate(example["step_labels"]) if label != -100]
    assert [example["step_labels"][place] for place in places] == [1, 0, 0]
    start = len(generation_prompt(tokenizer))
    for place, step in zip(places, steps):
        before = tokenizer.decode(example["input_ids"][start : place + 1])
        own = step.removeprefix("<think>\n")
        assert before.rstrip().endswith(own) and not tokenizer.decode(example["input_ids"][start:place]).endswith(own)
    prompt_ids, ids, ends = render_steps(tokenizer, PROMPT, steps)
    assert (prompt_ids, ids) == render(tokenizer, PROMPT, said("\n".join(steps)))
    assert [len(prompt_ids) + end for end in ends] == places and prompt_ids + ids == example["input_ids"]


@pytest.mark.parametrize(
    "changes, match",
    [({"labels": [True]}, "2 completions .steps. have 1 labels"), ({"labels": [True, 2]}, "must be true"),
     ({"completions": ["a", " "]}, "step 1 is empty"), ({"completions": []}, "0 completions")],
)  # fmt: skip
def test_bad_steps_are_named(tokenizer, changes, match):
    row = {"prompt": PROMPT, "completions": ["a", "b"], "labels": [True, False]}
    with pytest.raises(ValueError, match=match):
        encode_steps(row | changes, tokenizer, RewardEncoding("process", 200))


def test_margins_and_problems(tokenizer, tmp_path):
    rows = [{"prompt": PROMPT, "chosen": said(f"a{i}"), "rejected": said(f"b{i}"), "problem": i // 3,
             "margin": None if i % 2 else 1.5} for i in range(60)]  # fmt: skip
    encoded, report = encode_rows(Dataset.from_list(rows), tokenizer, ENCODING, "here")
    assert encoded["margin"][:3] == [1.5, 0.0, 1.5] and encoded["problem"][:4] == ["0", "0", "0", "1"]
    assert report.lines()[0].startswith("60 pairs of 20 problems")
    without = RewardEncoding("preference", 200, use_margin=False)
    ignored, _ = encode_rows(Dataset.from_list(rows), tokenizer, without, "here")
    assert "margin" not in ignored.column_names
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    train, held_out = split_rows(str(file), 0.3, 0)
    assert len(train) + len(held_out) == 60 and not set(train["problem"]) & set(held_out["problem"])
    file.write_text("\n".join(json.dumps(row | {"key": number}) for number, row in enumerate(rows)))
    train, held_out = split_rows(str(file), 0.3, 0)  # a column of that name says nothing about problems
    assert not set(train["problem"]) & set(held_out["problem"]) and "key" in train.column_names
    kept, shared = without_trained(encoded, encoded.select(range(6)))
    assert len(kept) == 54 and shared == 6


def test_bad_rows_are_counted_or_stop(tokenizer):
    good = {"prompt": PROMPT, "chosen": said("a"), "rejected": said("b")}
    rows = Dataset.from_list([good, good | {"rejected": said("a")}])
    with pytest.raises(ValueError, match="here, row 1: chosen and rejected are the same"):
        encode_rows(rows, tokenizer, ENCODING, "here")
    encoded, report = encode_rows(rows, tokenizer, RewardEncoding("preference", 200, errors="skip"), "here")
    assert len(encoded) == 1 and report.counts["bad row"] == 1 and "row 1" in report.first_error
