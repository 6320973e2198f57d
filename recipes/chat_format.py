"""Chat templates by name, a check that one is fit for training, and R1's format read from text.

    set_chat_template(tokenizer, "deepseek_r1")        # travels with tokenizer.save_pretrained
    check_training_template(tokenizer)                 # before SFT with assistant_only_loss=True

| name             | prompt                                                            | for                     |
|------------------|-------------------------------------------------------------------|-------------------------|
| deepseek_r1      | chat tokens, ends inside the reasoning ("<think>" and a line end) | SFT, RL after it, use   |
| deepseek_r1_zero | plain text, nothing forced; <think> and <answer> are asked for    | RL from a base model    |

Both take `past_reasoning="keep"` (see their files) for training on all turns of a conversation at once.
"""

import difflib
from pathlib import Path

from tokenizers import AddedToken
from trl.chat_template_utils import (
    has_generation_markers,
    is_chat_template_prefix_preserving,
    is_chat_template_stop_token_trained,
    supports_tool_calling,
)

from recipes.conversations import CLOSE, OPEN

FOLDER = Path(__file__).resolve().parent / "chat_templates"
NEEDED_TOKENS = {"deepseek_r1": ("<think>", "</think>", "<｜User｜>", "<｜Assistant｜>"), "deepseek_r1_zero": ()}


def missing_tokens(tokenizer, name):
    """The tokens that the template of that name is made of and the tokenizer lacks."""
    vocabulary = tokenizer.get_vocab()
    return [token for token in NEEDED_TOKENS.get(name, ()) if token not in vocabulary]


def set_chat_template(tokenizer, name, add_tokens=False):
    """Gives the tokenizer the template of that name, or of a .jinja file, and returns the tokenizer.

    `add_tokens`: adds the tokens that it lacks; the model's embeddings must then grow (`resize_token_embeddings`).
    They are not special ones, as DeepSeek's are not: decoding without special tokens must keep <think>.

    Raises:
        ValueError: for an unknown name, or if the tokenizer lacks tokens of the format: as mere text they would
            be split into pieces that a model never saw as marks.
    """
    if name in NEEDED_TOKENS:
        path = FOLDER / f"{name}.jinja"
        missing = missing_tokens(tokenizer, name)
        if missing and add_tokens:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in missing])
        elif missing:
            raise ValueError(f"the tokenizer has no tokens {', '.join(missing)}, which the template {name} is made of; "
                             "set add_template_tokens=true (sft, distill), or call tokenizer.add_tokens and "
                             "model.resize_token_embeddings, or use deepseek_r1_zero, which needs none")
    elif str(name).endswith(".jinja"):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"there is no chat template file {name}; known names are {', '.join(NEEDED_TOKENS)}")
    else:
        close = difflib.get_close_matches(str(name), NEEDED_TOKENS, n=1, cutoff=0.4)
        raise ValueError(f"unknown chat template {name!r}; " + (f"did you mean {close[0]}? " if close else "")
                         + f"Known are {', '.join(NEEDED_TOKENS)}, or the path of a .jinja file")
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    return tokenizer


def check_training_template(tokenizer):
    """Returns nothing if the chat template is fit for training on assistant turns only.

    Raises:
        ValueError: without a template, without generation marks, if the end token of a turn is outside of
            them (the model would never learn to stop), or if tool outputs change what stands before them.
    """
    way_out = 'call recipes.chat_format.set_chat_template(tokenizer, "deepseek_r1"), or set assistant_only_loss=false'
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer has no chat template; {way_out}")
    if not has_generation_markers(tokenizer.chat_template):
        raise ValueError("the chat template has no {% generation %} marks, so that nothing says which tokens are the "
                         f"assistant's; {way_out}")
    if not is_chat_template_stop_token_trained(tokenizer):
        raise ValueError("the chat template leaves the end token of an assistant turn outside of its "
                         "{% generation %} marks, so that the model would not learn to stop; move it before "
                         f"{{% endgeneration %}}, or {way_out}")
    if supports_tool_calling(tokenizer) and not is_chat_template_prefix_preserving(tokenizer):
        raise ValueError("the chat template writes a tool call in another way once its output follows, so that a "
                         f"conversation is not the beginning of its continuation; {way_out}")


def follows_format(completion):
    """Whether a completion is reasoning, one `</think>` and an answer that is not empty.

    The opening tag may be there or in the prompt, but nowhere else than at the start.
    """
    reasoning, _, answer = completion.lstrip().removeprefix(OPEN).partition(CLOSE)
    return bool(answer.strip()) and OPEN not in reasoning + answer and CLOSE not in answer


class ReasoningStream:
    """Splits text that arrives in pieces into reasoning and answer.

    `feed` and `close` give a list of (kind, text) with kind "reasoning" or "answer"; the tags are left out, also
    if a piece ends inside one. Text is reasoning from `<think>` on (or from the start, if the prompt had
    opened it) up to `</think>`. White space around the tags is left out too.
    """

    def __init__(self, opened=False):
        self.kind, self.held, self.fresh = "reasoning" if opened else "answer", "", True
        self.before = not opened  # <think> may still come

    def feed(self, piece):
        self.held += piece
        parts = []
        while True:
            tag = CLOSE if self.kind == "reasoning" else OPEN if self.before else None
            text = self.held.lstrip() if self.fresh else self.held
            if tag and tag in text and (tag == CLOSE or text.startswith(OPEN)):
                inside, _, self.held = text.partition(tag)
                self._add(parts, inside.rstrip())
                self.kind, self.fresh, self.before = "answer" if tag == CLOSE else "reasoning", True, False
                continue
            keep = self._unsure(text, tag)
            self._add(parts, text[: len(text) - keep])
            self.held = text[len(text) - keep :]
            if text and not (tag == OPEN and OPEN.startswith(text)):
                self.before = False
            return parts

    def close(self):
        """What was held back: no tag came of it."""
        parts, self.held = [], self.held.rstrip()
        self._add(parts, self.held)
        self.held = ""
        return parts

    def _add(self, parts, text):
        if text:
            parts.append((self.kind, text))
            self.fresh = False

    def _unsure(self, text, tag):
        """Characters at the end that may belong to a tag, or be white space before one."""
        longest = min(len(text), len(tag) - 1) if tag else 0
        begun = next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)
        rest = text[: len(text) - begun]
        return begun + len(rest) - len(rest.rstrip())
