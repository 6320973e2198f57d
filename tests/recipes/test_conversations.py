"""What is a valid conversation, and the pieces it is cut into."""

import pytest

from recipes.conversations import as_messages, check_conversation, drop_oldest_turn, split_reasoning, split_turns


def chat(*contents, system=None):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + messages


TOOLS = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "It rains."},
]


@pytest.mark.parametrize("messages", [
    chat("a", "b"), chat("a", "<think>\nx\n</think>\n\nb"), chat("a", "b", "c", "d", system="s"), TOOLS,
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "x"}],
])  # fmt: skip
def test_good_conversations_pass(messages):
    check_conversation(messages)


@pytest.mark.parametrize("messages, reason", [
    ([], "must be a list"), ("text", "must be a list"), (None, "must be a list"),
    (["a"], "message 0 must be a mapping"),
    ([{"role": "user"}], "message 0 must be a mapping"), (chat("a"), "last message has role 'user'"),
    ([{"role": "human", "content": "a"}], "role 'human'; known roles"),
    ([{"role": "assistant", "content": "a"}], "role 'assistant' first"),
    (chat("a", "b", system="s")[1:] + chat("c", system="t"), "role 'system' after 'assistant'"),
    (chat("a", "b") + chat("c", "d")[1:], "role 'assistant' after 'assistant'"),
    ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "role 'user' after 'user'"),
    (chat("a", ""), "message 1 .assistant. is empty"), (chat("  ", "b"), "message 0 .user. is empty"),
    (chat("a", None), "message 1 .assistant. is empty"), (chat("a", 3), "content of type int"),
    (chat("a", "<think>\nx"), "never closes it"), (chat("a", "x</think>b"), "without opening it"),
    (chat("a", "<think>x</think>b<think>y</think>c"), "at most one"),
    (chat("a", "b <think>x</think> c"), "at its start"),
    ([*chat("a"), {"role": "assistant", "content": "<think>x</think>b", "reasoning_content": "y"}], "keep one form"),
    (chat("a", "<think>\nx\n</think>\n"), "no answer after"), (chat("a </think>", "b"), "only assistant turns reason"),
    (TOOLS[:1] + [{"role": "assistant", "content": "x"}] + TOOLS[2:], "without tool_calls"),
])  # fmt: skip
def test_bad_conversations_say_what_is_wrong(messages, reason):
    with pytest.raises(ValueError, match=reason):
        check_conversation(messages)


def test_a_role_that_is_no_text():
    with pytest.raises(ValueError, match="has role"):
        check_conversation(as_messages([{"role": ["user"], "content": "a"}, {"role": "assistant", "content": "b"}]))


def test_reasoning_and_answer():
    assert split_reasoning("<think>\n1 + 1\n</think>\n\n2 ") == ("1 + 1", "2")
    assert split_reasoning("1 + 1 </think> 2") == ("1 + 1", "2")
    assert split_reasoning(" 2 ") == (None, "2")


def test_turns():
    messages = chat("a", "b", "c", "d", system="s")
    assert split_turns(messages) == [messages[:3], messages]
    assert split_turns(TOOLS) == [TOOLS]
    assert drop_oldest_turn(messages) == [messages[0], *messages[3:]]
    assert drop_oldest_turn(messages[:3]) is None
