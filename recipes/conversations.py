"""Conversations: what a valid one is, where its reasoning ends, and which training examples it gives.

A conversation is a list of {"role", "content"} in TRL's format: optionally a system message, then user and assistant
in turn, assistant turns with their reasoning as "<think>\\n...\\n</think>\\n\\nanswer" (or in `reasoning_content`).
Tool calls and their outputs stand between an assistant turn and the next one. `as_messages` brings other spellings
into this form.
"""

import json

OPEN, CLOSE = "<think>", "</think>"
ROLES = ("system", "user", "assistant", "tool")
FOLLOWS = {None: ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user", "tool"),
           "tool": ("tool", "assistant")}  # fmt: skip
ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
              "observation": "tool", "function": "tool"}  # fmt: skip


# ---------------------------------------------------------------- spellings


def drop_none(value):
    """Without fields that are None, at any depth: a column of structs gives each every field of any."""
    if isinstance(value, dict):
        return {name: drop_none(part) for name, part in value.items() if part is not None}
    return [drop_none(part) for part in value] if isinstance(value, (list, tuple)) else value


def read_json(value, name):
    """A value that a data set may also hold as JSON text. Raises ValueError naming the column."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except json.JSONDecodeError as error:
        raise ValueError(f"column {name} holds text that is no JSON ({error}): {value!r:.80}") from error


def _as_message(turn):
    if not isinstance(turn, dict):
        raise ValueError(f"a turn must be a mapping with role and content, got {turn!r:.80}")
    fields = drop_none(turn)
    role = fields.pop("role", fields.pop("from", None))
    content = fields.pop("content", fields.pop("value", None))
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(part.get("text", "") for part in content)
    if "tool_calls" in fields:
        fields["tool_calls"] = read_json(fields["tool_calls"], "tool_calls")
    role = ROLE_NAMES.get(role, role) if isinstance(role, str) else role
    return {"role": role, "content": content, **fields}


def as_messages(turns, name="messages"):
    """Messages from role/content or ShareGPT's from/value, in a list or as JSON text; content in text parts is joined.

    Raises:
        ValueError: for anything else, naming the column `name`.
    """
    turns = read_json(turns, name)
    if not isinstance(turns, (list, tuple)):
        raise ValueError(f"column {name} must hold a list of messages, got {turns!r:.80}")
    return [_as_message(turn) for turn in turns]


# ---------------------------------------------------------------- what is valid


def split_reasoning(content):
    """(reasoning, answer) of an assistant turn, both stripped; reasoning is None where there is no `</think>`."""
    reasoning, tag, answer = content.partition(CLOSE)
    if not tag:
        return None, content.strip()
    return reasoning.strip().removeprefix(OPEN).strip(), answer.strip()


def _check_assistant(place, message):
    content = message["content"] or ""
    opened, closed, reasoning = content.count(OPEN), content.count(CLOSE), message.get("reasoning_content") or ""
    if reasoning and (opened or closed or OPEN in reasoning or CLOSE in reasoning):
        raise ValueError(f"message {place} (assistant) has reasoning_content and also {OPEN} or {CLOSE}; keep one form")
    if opened > closed:
        raise ValueError(f"message {place} (assistant) opens {OPEN} and never closes it: the trace was cut off")
    if closed > opened:
        raise ValueError(f"message {place} (assistant) closes {CLOSE} without opening it; begin it with {OPEN}\\n")
    if closed > 1 or (opened and not content.lstrip().startswith(OPEN)):
        raise ValueError(f"message {place} (assistant) must hold at most one {OPEN}...{CLOSE}, at its start")
    if closed and not split_reasoning(content)[1] and not message.get("tool_calls"):
        raise ValueError(f"message {place} (assistant) has no answer after {CLOSE}")


def check_conversation(messages):
    """Returns nothing if a conversation can be trained on.

    Raises:
        ValueError: naming the message (counted from 0) and what is wrong with it.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"messages must be a list with at least one user and one assistant turn, got {messages!r:.80}")
    previous = None
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f"message {place} must be a mapping with role and content, got {message!r:.80}")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise ValueError(f"message {place} has role {role!r}; known roles are {', '.join(ROLES)}")
        if role not in FOLLOWS[previous]:
            after = f"after {previous!r}" if previous else "first"
            raise ValueError(f"message {place} has role {role!r} {after}; expected {' or '.join(FOLLOWS[previous])}")
        if role == "tool" and previous == "assistant" and not messages[place - 1].get("tool_calls"):
            raise ValueError(f"message {place} (tool) answers an assistant turn without tool_calls")
        if content is not None and not isinstance(content, str):
            raise ValueError(f"message {place} ({role}) has content of type {type(content).__name__}; expected text")
        if not (content or "").strip() and not (role == "assistant" and message.get("tool_calls")):
            raise ValueError(f"message {place} ({role}) is empty")
        if role == "assistant":
            _check_assistant(place, message)
        elif OPEN in content or CLOSE in content:
            raise ValueError(f"message {place} ({role}) holds {OPEN} or {CLOSE}; only assistant turns reason")
        previous = role
    if previous != "assistant":
        raise ValueError(f"the last message has role {previous!r}; training needs an assistant turn at the end")


# ---------------------------------------------------------------- pieces


def user_turns(messages):
    """Places of the user messages."""
    return [place for place, message in enumerate(messages) if message["role"] == "user"]


def split_turns(messages):
    """One conversation for each answered user message, cut after its answer: what the model sees at inference.

    The answer is all that stands before the next user message, tool calls included.
    """
    starts = user_turns(messages)
    return [messages[:end] for end in [*starts[1:], len(messages)]]


def drop_oldest_turn(messages):
    """The conversation without its first user message and the answer to it; None if there is only one."""
    starts = user_turns(messages)
    if len(starts) < 2:
        return None
    return [*messages[: starts[0]], *messages[starts[1] :]]
