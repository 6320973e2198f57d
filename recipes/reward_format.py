"""The format reward's rules: which form a prompt asks for, and whether a completion has it.

| form     | completion, behind a `<think>` of its own or of the prompt |
|----------|------------------------------------------------------------|
| `think`  | reasoning `</think>` answer                                |
| `answer` | reasoning `</think> <answer>` answer `</answer>`           |

`think` is DeepSeek-R1's form, `answer` DeepSeek-R1-Zero's (arXiv:2501.12948, Table 1). Each tag stands once and in its
place: a completion opens `<think>` itself if the prompt did not, and never twice. The answer is not empty.

What a prompt asks for is read off the rendered prompt. Reward functions see messages before they are rendered; then
`template_form(tokenizer)` says it for all prompts of a chat template.
"""

from recipes.chat_format import follows_format
from recipes.conversations import CLOSE, OPEN

STYLES = ("auto", "think", "answer")
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"


def asks_for_answer_tags(prompt):
    """Whether a text, or one of a prompt's messages, shows both answer tags."""
    texts = [prompt] if isinstance(prompt, str) else [message.get("content") or "" for message in prompt]
    return any(ANSWER_OPEN in text and ANSWER_CLOSE in text for text in texts)


def is_opened(prompt):
    """Whether a rendered prompt ends inside `<think>`; None for messages, which do not show it."""
    return prompt.rstrip().endswith(OPEN) if isinstance(prompt, str) else None


def template_form(tokenizer, template_kwargs=None):
    """What a chat template decides for prompts that are messages: {"opened": bool}, and "style" where it asks for
    answer tags itself. {} without a chat template."""
    if tokenizer.chat_template is None:
        return {}
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True, **(template_kwargs or {})
    )
    return {"opened": is_opened(prompt)} | ({"style": "answer"} if asks_for_answer_tags(prompt) else {})


def _in_answer_tags(answer):
    answer = answer.strip()
    inside = answer.removeprefix(ANSWER_OPEN).removesuffix(ANSWER_CLOSE)
    whole = answer.startswith(ANSWER_OPEN) and answer.endswith(ANSWER_CLOSE) and bool(inside.strip())
    return whole and ANSWER_OPEN not in inside and ANSWER_CLOSE not in inside


def has_form(text, style, opened):
    """Whether a completion has the form.

    Args:
        style: "think" or "answer".
        opened: whether the prompt ends inside `<think>`; None: not known, the completion may open it or not.
    """
    opens = text.lstrip().startswith(OPEN)
    if not follows_format(text) or (opened is not None and opens == opened):
        return False
    reasoning, _, answer = text.partition(CLOSE)
    if style == "think":
        return True
    return _in_answer_tags(answer) and ANSWER_OPEN not in reasoning and ANSWER_CLOSE not in reasoning


def form_of(prompt, style="auto", opened=None, template=None):
    """(style, opened) for one prompt. What is not given is read off a text, or, for messages, off what `template_form`
    said and the messages themselves."""
    known = {} if isinstance(prompt, str) else template or {}
    if style == "auto":
        style = known.get("style") or ("answer" if asks_for_answer_tags(prompt) else "think")
    if opened is None:
        opened = known.get("opened", is_opened(prompt))
    return style, opened
