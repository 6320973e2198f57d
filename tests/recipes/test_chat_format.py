import random
import re
from itertools import pairwise

import pytest
from datasets import Dataset
from jinja2 import TemplateError
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template

from data_scripts.train_tokenizer import BOS, EOS, train_tokenizer
from recipes.chat_format import (
    FOLDER,
    NEEDED_TOKENS,
    ReasoningStream,
    check_training_template,
    missing_tokens,
    set_chat_template,
)
from tests.recipes.tiny_run import tiny_config, tiny_model
from tests.recipes.tiny_stages import tokenizer_without_marks

NAMES = ["deepseek_r1", "deepseek_r1_zero"]
REASONED = "<think>\nTwo and two.\n</think>\n\nFour."
ZERO = "<think>\nTwo and two.\n</think>\n<answer>\nFour.\n</answer>"
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def user(content="What is 2 + 2?"):
    return {"role": "user", "content": content}


def assistant(content=REASONED, **fields):
    return {"role": "assistant", "content": content, **fields}


SYSTEM = {"role": "system", "content": "Be brief."}
MULTI_TURN = [SYSTEM, user(), assistant(), user("And 3 + 3?"), assistant("Six.", reasoning_content="Three and three."),
              user("Thanks"), assistant("Welcome!")]  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    texts = ["the cat sat on the mat. What is 12345?\n\n User: Assistant:\n", "学而时习之，不亦说乎？"]
    return train_tokenizer([text * 20 for text in texts], 400)


@pytest.fixture(scope="module", params=NAMES)
def tokenizer(request, trained, tmp_path_factory):
    """As it comes back from its folder: the template travels with it."""
    folder = tmp_path_factory.mktemp(request.param)
    set_chat_template(trained, request.param).save_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.chat_template == (FOLDER / f"{request.param}.jinja").read_text(encoding="utf-8")
    loaded.name = request.param
    return loaded


def spans(tokenizer, messages, **settings):
    """Texts of the masked runs of tokens."""
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **settings)
    return decoded_runs(tokenizer, encoded["input_ids"], encoded["assistant_masks"])


def decoded_runs(tokenizer, ids, mask):
    runs, before = [], 0
    for token, masked in zip(ids, mask):
        if masked:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = masked
    return [tokenizer.decode(run) for run in runs]


def answers_of(name):
    """What is trained of MULTI_TURN with past_reasoning="keep"."""
    if name == "deepseek_r1":
        return [REASONED + EOS, "<think>\nThree and three.\n</think>\n\nSix." + EOS, "Welcome!" + EOS]
    return [ZERO + EOS, "<think>\nThree and three.\n</think>\n<answer>\nSix.\n</answer>" + EOS, "Welcome!" + EOS]


def test_trained_is_reasoning_answer_and_end_and_nothing_else(tokenizer):
    whole = answers_of(tokenizer.name)
    assert spans(tokenizer, MULTI_TURN, past_reasoning="keep") == whole
    # As served: earlier reasoning is gone, and what is left of these turns is context.
    assert spans(tokenizer, MULTI_TURN[:5]) == whole[1:2]
    assert spans(tokenizer, MULTI_TURN) == whole[2:]
    text = tokenizer.apply_chat_template(MULTI_TURN, tokenize=False)
    assert "Four." in text and "Six." in text and "Two and two" not in text and "Three and three" not in text


def test_first_messages_are_the_beginning_of_the_whole(tokenizer):
    def ids(messages, **settings):
        return tokenizer.apply_chat_template(messages, return_dict=False, **settings)
    whole = ids(MULTI_TURN, past_reasoning="keep")
    for end in range(1, len(MULTI_TURN)):
        first = ids(MULTI_TURN[:end], past_reasoning="keep")
        assert whole[: len(first)] == first and len(first) < len(whole)
        if MULTI_TURN[end]["role"] == "assistant" and end < 6:
            prompt = ids(MULTI_TURN[:end], past_reasoning="keep", add_generation_prompt=True)
            assert whole[: len(prompt)] == prompt and len(prompt) > len(first)
    dropped = ids(MULTI_TURN[:3])
    assert ids(MULTI_TURN)[: len(dropped)] != dropped


def test_prompt_and_completion_are_tokenized_apart_as_together(tokenizer):
    completion = {"deepseek_r1": "Two and two.\n</think>\n\nFour.", "deepseek_r1_zero": ZERO}[tokenizer.name]
    for messages in ([user()], MULTI_TURN[:4], [SYSTEM, user("2 + 2 =")]):
        prompt = tokenizer.apply_chat_template(messages, return_dict=False, add_generation_prompt=True)
        continued = prompt + tokenizer(completion + EOS, add_special_tokens=False).input_ids
        for content in (REASONED, completion):  # also as it was generated, without the tag in the prompt
            whole = tokenizer.apply_chat_template([*messages, assistant(content)], return_dict=False)
            assert whole == continued
        assert prompt.count(tokenizer.bos_token_id) == 1 == whole.count(tokenizer.bos_token_id)


@pytest.mark.parametrize("content, fields", [
    ("<think>\n\n</think>\n\nFour.", {}), ("<think></think>Four.", {}), ("\n<think>\n\n  Two.</think>Four.", {}),
    ("Four.", {"reasoning_content": "\n\nTwo.\n\n"}), ("Four.", {"reasoning_content": "\n"}),
])  # fmt: skip
def test_every_way_to_write_reasoning_begins_as_the_prompt_ends(trained, content, fields):
    """Token by token: a line end that merges with the prompt's would train on what no prompt leads to."""
    tokenizer = set_chat_template(trained, "deepseek_r1")
    prompt = tokenizer.apply_chat_template([user()], return_dict=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([user(), assistant(content, **fields)], return_dict=False)
    assert whole[: len(prompt)] == prompt
    text = tokenizer.decode(whole[len(prompt) :])
    assert text.startswith("Two." if "Two." in content + str(fields) else "</think>")
    assert text.endswith(f"Four.{EOS}") and text.count("</think>") == 1


def test_trl_finds_the_templates_fit_for_training(tokenizer):
    check_training_template(tokenizer)
    assert get_training_chat_template(tokenizer) is None  # nothing to be patched


def test_labels_of_trl_sft(tokenizer, tmp_path):
    """What TRL's trainer makes of conversations, in both ways of treating past reasoning."""
    rows = [{"messages": MULTI_TURN[1:5], "chat_template_kwargs": {"past_reasoning": way}} for way in ("drop", "keep")]
    model = tiny_model(tiny_config(tmp_path), vocab_size=400)
    args = SFTConfig(output_dir=str(tmp_path), assistant_only_loss=True, max_length=None, report_to="none",
                     use_cpu=True)
    trainer = SFTTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    whole = answers_of(tokenizer.name)
    for labels, expected in zip(batch["labels"].tolist(), (whole[1:2], whole[:2])):
        assert decoded_runs(tokenizer, labels, [label != -100 for label in labels]) == expected


def test_r1_format_equals_the_released_one(trained):
    """Expected texts: the released template's output; it differs in leaving "<think>\\n" to the server."""
    tokenizer = set_chat_template(trained, "deepseek_r1")

    def text(messages, **settings):
        return tokenizer.apply_chat_template(messages, tokenize=False, **settings)
    prompt = text([SYSTEM, user("a"), assistant(), user("c")], add_generation_prompt=True, thinking=False)
    assert prompt == f"{BOS}Be brief.<｜User｜>a<｜Assistant｜>\n\nFour.{EOS}<｜User｜>c<｜Assistant｜>"
    assert text([SYSTEM, SYSTEM, user("a")]) == f"{BOS}Be brief.\n\nBe brief.<｜User｜>a"
    called = [user("w"), assistant("Wait.", tool_calls=[CALL]), {"role": "tool", "content": "9"}]
    expected = (f'{BOS}<｜User｜>w<｜Assistant｜>Wait.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function'
                f'<｜tool▁sep｜>add\n```json\n{{"a": 1}}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}'
                "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>9<｜tool▁output▁end｜><｜tool▁outputs▁end｜>")
    assert text(called, add_generation_prompt=True) == expected
    assert text([*called, assistant("9."), user("c")]) == f"{expected}9.{EOS}<｜User｜>c"
    late = [*called[:2], SYSTEM, called[2], SYSTEM, assistant("9.")]  # a system message between changes nothing there
    assert text(late) == text([SYSTEM, SYSTEM, *called, assistant("9.")])
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": " 2 + 2?"}]
    assert text([user(parts), assistant()]) == text([user(), assistant()])


def test_zero_prompt_forces_nothing_and_needs_no_chat_tokens(trained):
    tokenizer = set_chat_template(trained, "deepseek_r1_zero")
    prompt = tokenizer.apply_chat_template([SYSTEM, user()], tokenize=False, add_generation_prompt=True)
    assert prompt.startswith(f"{BOS}The following is a conversation")
    assert prompt.endswith("</answer>\n\nBe brief.\n\nUser: What is 2 + 2?\nAssistant:\n")
    assert "｜" not in prompt.removeprefix(BOS) and prompt.count("\n\n") == 2
    again = tokenizer.apply_chat_template([*MULTI_TURN[:5], user("c")], tokenize=False, add_generation_prompt=True)
    assert again.endswith(f"And 3 + 3?\nAssistant:\n<answer>\nSix.\n</answer>{EOS}\n\nUser: c\nAssistant:\n")
    # Its own form is left as it is, to the space.
    own = "<think> 2 + 2 </think> <answer> 4 </answer>"
    assert tokenizer.apply_chat_template([user(), assistant(own)], tokenize=False).endswith(f"Assistant:\n{own}{EOS}")
    with pytest.raises(TemplateError, match="no tools; use the template deepseek_r1"):
        tokenizer.apply_chat_template([user(), assistant("", tool_calls=[CALL])], tokenize=False)


@pytest.mark.parametrize("messages, settings, message", [
    ([{"role": "critic", "content": "x"}], {}, "role 'critic'"),
    ([user(None)], {}, "a user message has no content"),
    ([{"role": "system"}, user()], {}, "a system message has no content"),
    ([user([{"type": "image"}])], {}, "content of type 'image'"),
    ([user()], {"past_reasoning": "some"}, "past_reasoning='some' must be 'drop' or 'keep'"),
    ([user(), SYSTEM], {"past_reasoning": "keep"}, "system messages to stand before"),
])  # fmt: skip
def test_templates_refuse_what_they_cannot_render(tokenizer, messages, settings, message):
    with pytest.raises(TemplateError, match=message):
        tokenizer.apply_chat_template(messages, tokenize=False, **settings)


def test_set_chat_template_by_name_and_path(trained, tmp_path):
    assert sorted(path.stem for path in FOLDER.glob("*.jinja")) == sorted(NEEDED_TOKENS) == sorted(NAMES)
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }}")
    assert set_chat_template(trained, file).apply_chat_template([user("hi")], tokenize=False) == "hi"
    with pytest.raises(ValueError, match="unknown chat template 'deepseek_r2'; did you mean deepseek_r1"):
        set_chat_template(trained, "deepseek_r2")
    with pytest.raises(ValueError, match="no chat template file .*none.jinja"):
        set_chat_template(trained, tmp_path / "none.jinja")

    base = AutoTokenizer.from_pretrained(tokenizer_without_marks(tmp_path / "base"))
    with pytest.raises(ValueError, match="no tokens <think>, </think>.*add_template_tokens.*deepseek_r1_zero"):
        set_chat_template(base, "deepseek_r1")
    prompt = set_chat_template(base, "deepseek_r1_zero").apply_chat_template([user()], return_dict=False,
                                                                               add_generation_prompt=True)
    whole = base.apply_chat_template([user(), assistant(ZERO)], return_dict=False)
    assert whole == prompt + base(ZERO + EOS, add_special_tokens=False).input_ids  # "<think>" in pieces here
    check_training_template(base)


def test_missing_tokens_are_added(trained, tmp_path):
    base = AutoTokenizer.from_pretrained(tokenizer_without_marks(tmp_path / "base"))
    size = len(base)
    set_chat_template(base, "deepseek_r1", add_tokens=True).save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert len(loaded) == size + 4 and not missing_tokens(loaded, "deepseek_r1")
    ids = loaded.apply_chat_template([user(), assistant(ZERO)], return_dict=False)
    assert all(ids.count(loaded.convert_tokens_to_ids(token)) == 1 for token in NEEDED_TOKENS["deepseek_r1"])
    assert "<think>" in loaded.decode(ids, skip_special_tokens=True)  # answers are read from such text
    check_training_template(loaded)
    assert len(set_chat_template(trained, "deepseek_r1", add_tokens=True)) == len(trained)  # has them


def test_check_training_template_names_what_is_wrong(trained):
    def check(template):
        trained.chat_template = template
        check_training_template(trained)
    r1 = (FOLDER / "deepseek_r1.jinja").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="no chat template"):
        check(None)
    with pytest.raises(ValueError, match="no {% generation %} marks"):
        check(r1.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", ""))
    end = "{%- endgeneration -%}"
    moved = r1.replace("{{- eos_token -}}\n{%- endmacro", "{%- endmacro").replace(end, end + "{{- eos_token -}}")
    with pytest.raises(ValueError, match="would not learn to stop"):
        check(moved)
    with pytest.raises(ValueError, match="in another way once its output follows"):
        check(re.sub(r"{{- \(bos_token .* ns.system -}}", "{{- bos_token ~ messages | length -}}", r1))


def split(text, opened, cuts):
    stream = ReasoningStream(opened)
    edges = [0, *cuts, len(text)]
    parts = [part for a, b in pairwise(edges) for part in stream.feed(text[a:b])] + stream.close()
    whole = {"reasoning": "", "answer": ""}
    for kind, piece in parts:
        whole[kind] += piece
    return whole["reasoning"], whole["answer"]


@pytest.mark.parametrize("text, opened, expected", [
    ("Two.\n</think>\n\nFour.\n", True, ("Two.", "Four.")),
    ("<think>\nTwo.\n</think>\n\nFour.", False, ("Two.", "Four.")),
    ("\n <think>a</think>b", False, ("a", "b")),
    ("Hello < there </thin </think> x", False, ("", "Hello < there </thin </think> x")),
    ("Hello <think>x</think>", False, ("", "Hello <think>x</think>")),
    ("<thin ice", False, ("", "<thin ice")),
    ("a < b </ c </think>d </think> e <think>", True, ("a < b </ c", "d </think> e <think>")),
    ("a\n\nb  c</think>d\n\n e", True, ("a\n\nb  c", "d\n\n e")),
    ("cut </thi", True, ("cut </thi", "")),
    ("</think></think>x", True, ("", "</think>x")),
    ("", True, ("", "")),
])  # fmt: skip
def test_reasoning_stream_gives_the_same_for_all_pieces(text, opened, expected):
    rng = random.Random(0)
    every = list(range(1, len(text)))
    for cuts in ([], every, *(sorted(rng.sample(every, len(every) // 3)) for _ in range(40 if every else 0))):
        assert split(text, opened, cuts) == expected
    # Nothing is held back longer than a tag may still come of it.
    stream = ReasoningStream(opened=True)
    assert stream.feed("one < two") == [("reasoning", "one < two")]
    assert stream.feed(" three</thi") == [("reasoning", " three")]
    assert stream.feed("s") == [("reasoning", "</this")]
