"""Prompts and completions as the text and the tokens that a policy reads and writes.

A prompt is rendered with the chat template's generation prompt, and what follows is a completion with its end token:
both are tokenised apart, as they are when a policy is sampled.
"""

import bisect

from recipes.conversations import CLOSE, OPEN, as_messages


def content_of(completion):
    """The text of a completion: a text, or a list with one assistant message.

    Raises:
        ValueError: for anything else, and for a completion without text.
    """
    if not isinstance(completion, str):
        messages = as_messages(completion, "completion")
        if len(messages) != 1 or messages[0]["role"] != "assistant" or not isinstance(messages[0]["content"], str):
            raise ValueError(f"a completion must be one assistant message with text, got {completion!r:.120}")
        completion = messages[0]["content"]
    if not completion.strip():
        raise ValueError("a completion is empty")
    return completion


def reasons(completion):
    """Whether a completion, text or message, holds reasoning, finished or not."""
    if isinstance(completion, str):
        return OPEN in completion or CLOSE in completion
    message = completion[-1]
    return bool(message.get("reasoning_content")) or reasons(message["content"] or "")


def _generated(opening, content):
    """What a policy writes after `opening`: the content without the tag that the prompt has already."""
    if opening.rstrip().endswith(OPEN) and content.lstrip().startswith(OPEN):
        return content.lstrip().removeprefix(OPEN).lstrip()
    return content


def opening_text(tokenizer, prompt, thinking):
    """The text up to where a policy begins to write."""
    if isinstance(prompt, str):
        return prompt
    form = {} if thinking else {"thinking": False}
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, **form)


def render_texts(tokenizer, prompt, completion, thinking=None, finished=True, opening=None):
    """(prompt text up to where a policy begins, what it writes then, with the end token if `finished`).

    A completion in messages is a turn of a conversation, brought into form by the chat template; a text is what a model
    wrote. `thinking`: whether the prompt ends inside the reasoning, where the template knows the word. None: where a
    message reasons, and for text. `opening`: what `opening_text` gives, if known.
    Raises:
        ValueError: for a completion that is empty, or goes on behind an end token.
    """
    end, written = tokenizer.eos_token, isinstance(completion, str)
    if not end:
        raise ValueError("the tokenizer has no eos_token, which ends a completion; set it and save the tokenizer")
    if thinking is None:
        thinking = written or reasons(completion)
    if opening is None:
        opening = opening_text(tokenizer, prompt, thinking)
    text = _generated(opening, content_of(completion)) if not isinstance(prompt, str) else content_of(completion)
    if not written and not isinstance(prompt, str):
        whole = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
        if whole.startswith(opening):
            text = whole[len(opening) :]
    while text.rstrip().endswith(end):  # some templates write a line end after it, some data the token itself
        text = text.rstrip().removesuffix(end)
    if end in text:
        raise ValueError(f"a completion holds the end token {end!r} before its end; no policy writes on behind it")
    return opening, text + (end if finished else "")


def render(tokenizer, prompt, completion, thinking=None, finished=True):
    """(ids of the prompt, ids of the completion) of what `render_texts` gives."""
    opening, text = render_texts(tokenizer, prompt, completion, thinking, finished)
    prompt_ids = tokenizer(opening, add_special_tokens=isinstance(prompt, str))["input_ids"]
    return prompt_ids, tokenizer(text, add_special_tokens=False)["input_ids"]


def step_ends(text, steps):
    """The place in `text` behind the last character of each step (none of them white space).

    Raises:
        ValueError: for an empty step, and for one that the chat template has changed.
    """
    ends, place = [], 0
    for number, step in enumerate(steps):
        wanted = step.strip()
        if not number and wanted.startswith(OPEN) and not text.startswith(OPEN):
            wanted = wanted.removeprefix(OPEN).strip()
        if not wanted:
            raise ValueError(f"step {number} is empty; join it with its neighbour")
        found = text.find(wanted, place)
        if found < 0:
            raise ValueError(
                f"step {number} is not in the rendered completion: the chat template changes it: {wanted!r:.80}"
            )
        place = found + len(wanted)
        ends.append(place)
    return ends


def render_steps(tokenizer, prompt, steps, separator="\n"):
    """(ids of the prompt, ids of the completion, the place in the latter of each step's last token).

    Raises:
        ValueError: for steps that end in the same token; see `step_ends`.
    """
    content = separator.join(steps)
    completion = content if isinstance(prompt, str) else [{"role": "assistant", "content": content}]
    opening, text = render_texts(tokenizer, prompt, completion)
    prompt_ids = tokenizer(opening, add_special_tokens=isinstance(prompt, str))["input_ids"]
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts, places = [start for start, _ in tokens["offset_mapping"]], []
    for end in step_ends(text, steps):
        places.append(bisect.bisect_left(starts, end) - 1)
        if len(places) > 1 and places[-1] == places[-2]:
            raise ValueError(f"two steps end in one token ({text[starts[places[-1]]:end]!r}); join them")
    return prompt_ids, tokens["input_ids"], places
