import io
import json
import sys
import threading
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_scripts.train_tokenizer import train_tokenizer
from modeling_deepseek_r1 import DeepSeekR1ForCausalLM
from recipes import chat
from tests.modeling.helpers import tiny_config

REASONED = "<think>\nTwo and\n\ntwo < five.\n</think>\n\nIt is four."


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


# What the model is taught: the second question has one answer after the first, and another one alone.
LESSONS = [
    [user("What is 2 + 2?"), assistant(REASONED)],
    [user("What is 2 + 2?"), assistant(REASONED), user("Sure?"), assistant("<think>\nHm.\n</think>\n\nYes, four.")],
    [user("Sure?"), assistant("<think>\nOf what?\n</think>\n\nNo.")],
    [{"role": "system", "content": "In Latin."}, user("Sure?"), assistant("<think>\nLatin.\n</think>\n\nSic.")],
    [user("Five?"), assistant("<think>\nHm.\n</think>\n<answer> Yes </answer>\nUser: five?")],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that knows the lessons by heart."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([m["content"] for lesson in LESSONS for m in lesson] * 9, 330)
    sizes = {"num_hidden_layers": 1, "initializer_range": 0.1, "hidden_size": 48, "max_position_embeddings": 128}
    model = DeepSeekR1ForCausalLM(tiny_config(vocab_size=330, bos_token_id=0, eos_token_id=1, pad_token_id=2, **sizes))
    batch = tokenizer.apply_chat_template(LESSONS, return_dict=True, return_tensors="pt", padding=True,
                                          return_assistant_tokens_mask=True)
    labels = batch["input_ids"].masked_fill(torch.as_tensor(batch.pop("assistant_masks")) == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.02:
            break
    assert loss < 0.05, loss
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


class Terminal(io.StringIO):
    """A stream with a terminal behind it or not, that may press Ctrl-C when a text appears."""

    def __init__(self, text="", tty=False, interrupt_at=None):
        super().__init__(text)
        self.tty, self.interrupt_at, self.interrupted = tty, interrupt_at, threading.Event()

    def isatty(self):
        return self.tty

    def write(self, text):
        super().write(text)
        if self.interrupt_at and self.interrupt_at in self.getvalue():
            self.interrupt_at = None
            self.interrupted.set()
            raise KeyboardInterrupt
        return len(text)


@pytest.fixture
def talk(folder, monkeypatch):
    def run(text, *options, tty=False, interrupt_at=None):
        out = Terminal(tty=tty, interrupt_at=interrupt_at)
        monkeypatch.setattr(sys, "stdin", Terminal(text))
        monkeypatch.setattr(sys, "stdout", out)
        messages = chat.main(["--model_name_or_path", str(folder), "--use_cpu", "--temperature", "0",
                              "--max_new_tokens", "40", *options])
        return messages, out.getvalue()
    return run


def test_reasoning_history_and_reset(talk):
    messages, output = talk("What is 2 + 2?\nSure?\n/reset\nSure?\n")
    assert output == (
        "<think>\nTwo and\n\ntwo < five.\n</think>\n\nIt is four.\n"
        "<think>\nHm.\n</think>\n\nYes, four.\n"
        "[the conversation is forgotten]\n"
        "<think>\nOf what?\n</think>\n\nNo.\n")
    assert messages == LESSONS[2]
    messages, output = talk("What is 2 + 2?\n/nonsense\n//reset\n")
    assert messages[:2] == LESSONS[0] and messages[2] == user("/reset")
    assert "[unknown command /nonsense; known are /help /reset /system" in output


def test_system_prompt_retry_save_and_quit(talk, tmp_path):
    saved = tmp_path / "talk.jsonl"
    commands = f"/retry\n/system In Latin.\nSure?\n/retry\n/save {saved}\n/save {tmp_path}\n/save\n/quit\nSure?\n"
    messages, output = talk(commands)
    assert messages == LESSONS[3] == talk("Sure?\n", "--system", "In Latin.")[0]
    assert output.count("<think>\nLatin.\n</think>\n\nSic.\n") == 2 and "[there is no answer yet]" in output
    assert [json.loads(line) for line in saved.read_text().splitlines()] == [{"messages": LESSONS[3]}]
    assert "[not saved: " in output and "needs the name of a file" in output
    assert talk("/system In Latin.\n/system\n/reset\n")[0] == []


def test_colours_on_a_terminal_only(talk, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    _, output = talk("Sure?\n", tty=True)
    assert output == "\x1b[2mOf what?\n\n\x1b[0mNo.\x1b[0m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert talk("Sure?\n", tty=True)[1] == talk("Sure?\n")[1] == "<think>\nOf what?\n</think>\n\nNo.\n"


def test_several_lines_make_one_message(talk):
    messages, _ = talk('"""\nWhat\n\n/is\n"""\nSure\\\n ?\n"""\nend')
    assert [m["content"] for m in messages if m["role"] == "user"] == ["What\n\n/is", "Sure\n ?", "end"]


@pytest.fixture
def wait_for_interrupt(folder, monkeypatch):
    """Lets the model write a text and then wait for Ctrl-C: it would be done before anyone can press it."""
    def slow(text):
        tokens = len(AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids)
        forward, calls = DeepSeekR1ForCausalLM.forward, iter(range(1000))

        def wrapped(self, *args, **kwargs):
            if next(calls) > tokens:
                sys.stdout.interrupted.wait(30)
                time.sleep(0.1)
            return forward(self, *args, **kwargs)
        monkeypatch.setattr(DeepSeekR1ForCausalLM, "forward", wrapped)
    return slow


@pytest.mark.parametrize("question, written, at, begins, rest", [
    ("Sure?", "Of what?\n", "Of", "<think>\nOf", "No."),
    ("What is 2 + 2?", "Two and\n\ntwo < five.\n</think>\n\nIt is", "It", REASONED.removesuffix(" is four."), "four."),
])  # fmt: skip
def test_interrupt_keeps_what_was_said(talk, wait_for_interrupt, question, written, at, begins, rest):
    wait_for_interrupt(written)
    messages, output = talk(f"{question}\n", interrupt_at=at)
    content = messages[1]["content"]
    assert content.startswith(begins) and rest not in content and content.count("</think>") == 1
    assert output.endswith("\n[stopped]\n") and len(messages) == 2


def test_cut_off_answers_and_full_context(talk):
    messages, output = talk("What is 2 + 2?\n", "--max_new_tokens", "3")
    assert "\n</think>\n[cut off: the answer reached --max_new_tokens" in output
    assert messages[1]["content"].endswith("\n</think>\n\n")
    # 128 tokens: of the long questions only the last one leaves room for an answer of 40.
    long = "2 + 2? " * 12
    messages, output = talk(f"What is 2 + 2?\n{long}\n{long}\n")
    assert output.count("[the context is full: the oldest 1 turns are left out]") == 2
    assert len(messages) == 2 and messages[0] == user(long)
    messages, output = talk(f"{long * 8}\nSure?\n")
    assert "tokens and the context holds 128: shorten it" in output and messages == LESSONS[2]


def test_model_without_reasoning(talk, folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    messages, output = talk("Sure?\n", "--model_name_or_path", str(tmp_path), "--max_new_tokens", "5")
    assert messages[1]["content"].strip() in output and "<think>" not in output
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template.*--zero"):
        talk("Sure?\n", "--model_name_or_path", str(tmp_path))


def test_zero_prompt_and_stop_after_its_answer(talk, folder):
    # R1-Zero's instruction alone is longer than this model's context.
    messages, output = talk("Sure?\n", "--zero")
    assert "the context holds 128: shorten it" in output and not messages
    # A base model goes on with the User's part. The lesson does, too; its prompt is R1's, to be short.
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    for zero, text in (False, "</answer>\nUser: five?"), (True, "</answer>"):
        options = ["--model_name_or_path", "-", "--temperature", "0", "--max_new_tokens", "60"]
        chat_model = chat.ChatModel(model, tokenizer, chat.parse_arguments(options + ["--zero"] * zero))
        reply = chat_model.reply(chat_model.prompt(LESSONS[4][:1]), lambda kind, piece: None)
        assert reply.end == "end" and reply.text.rstrip().endswith(text)


@pytest.mark.parametrize("option, message", [
    (["--temperature", "-1"], "temperature=-1.0 must be 0 or positive"),
    (["--top_p", "0"], r"top_p=0.0 must be in \(0, 1\]"),
    (["--max_new_tokens", "0"], "max_new_tokens=0 must be at least 1"),
    (["--dtype", "int8"], "dtype=int8 must be float32"),
])  # fmt: skip
def test_bad_settings(talk, option, message):
    with pytest.raises(ValueError, match=message):
        talk("", *option)


def test_an_error_while_generating_is_not_swallowed(talk, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")
    monkeypatch.setattr(DeepSeekR1ForCausalLM, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        talk("Sure?\n")
