"""recipes/rewards.py: every rule on right, wrong, malformed and empty answers; names, settings, users' functions."""

import asyncio

import pytest

from recipes.rewards import LANGUAGES, REWARDS, get_rewards, language_share, overlong_punishment
from recipes.task_puzzles import PUZZLE_TASKS

PROBLEM = PUZZLE_TASKS["chain_sum"].problems("train", 0, 1, 1)[0]


def reward(name, *texts, settings=None, ids=None, conversational=True, **columns):
    """The reward of texts, as a trainer would ask for it."""
    (function,) = get_rewards([name], {name: settings} if settings else None)
    completions = [[{"role": "assistant", "content": text}] for text in texts] if conversational else list(texts)
    ids = ids or [list(range(len(text))) for text in texts]
    return function(prompts=["?"] * len(texts), completions=completions, completion_ids=ids, trainer_state=None,
                    log_extra=None, log_metric=None, **columns)  # fmt: skip


def verifier_columns(count):
    row = PROBLEM.to_row()
    row["question"] = row.pop("prompt")
    return {name: [value] * count for name, value in row.items()}


@pytest.mark.parametrize("conversational", (True, False))
def test_accuracy_asks_the_task(conversational):
    right = PROBLEM.reference
    texts = [f"so </think> {right}", f"</think> The answer is {right}.", f"so </think> {right}1", f"so {right}", "",
             "</think>", f"{right} </think>"]  # fmt: skip
    found = reward("accuracy", *texts, conversational=conversational, **verifier_columns(len(texts)))
    assert found == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    whole = reward("accuracy", right, settings={"untagged": "whole"}, **verifier_columns(1))
    assert whole == [1.0]


def test_accuracy_without_a_verifier():
    columns = verifier_columns(2)
    columns["task"][1] = None  # a row of another source in the same set
    assert reward("accuracy", f"</think>{PROBLEM.reference}", "</think>x", **columns) == [1.0, None]
    assert reward("accuracy", "a", "b") == [None, None]
    del columns["metadata"]
    with pytest.raises(ValueError, match="needs the column metadata beside task"):
        reward("accuracy", "a", "b", **columns)


def test_format():
    texts = ["thought</think>answer", "<think>thought</think>answer", "answer", "thought</think>", "thought</think> \n",
             "a</think>b</think>c", "a<think>b</think>c", "", "<think>thought"]  # fmt: skip
    assert reward("format", *texts) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_language_counts_words():
    texts = ["so it is</think>答案", "so 我们</think>so", "2 + 3 = 5</think>5", "我们</think>so", ""]
    texts += ["  </think>answer"]
    assert reward("language", *texts) == [1.0, pytest.approx(1 / 3), 1.0, 0.0, 0.0, 0.0]
    assert reward("language", *texts[:2], settings={"target": "zh"}) == [0.0, pytest.approx(2 / 3)]
    with pytest.raises(ValueError, match="reward_kwargs.language.target='xx' must be one of ar, de"):
        reward("language", "a", settings={"target": "xx"})
    samples = {"ru": "да", "el": "ναι", "ja": "はい", "ko": "네", "ar": "نعم", "he": "כן", "hi": "हाँ", "th": "ใช่"}
    for target, text in samples.items():
        assert language_share(text, target) > 0.5 and language_share(text, "en") < 0.5, target
    assert set(samples) <= set(LANGUAGES)


def test_length_is_dapos_equation():
    # Eq. 13 with L_max = 10, L_cache = 4: 0 up to 6 tokens, -1 at 10 and beyond.
    assert [overlong_punishment(length, 10, 4) for length in (0, 6, 7, 8, 10, 11)] == [0, 0, -0.25, -0.5, -1, -1]
    settings = {"max_length": 10, "buffer": 4}
    assert reward("length", "", "x", settings=settings, ids=[[], [1] * 9]) == [0.0, -0.75]
    assert reward("length", "x", settings={"max_length": 20}, ids=[[1] * 18]) == [-0.5]  # a fifth: 4
    for wrong in ({"max_length": 10, "buffer": 11}, {"max_length": 10, "buffer": 0}, {"buffer": 4}):
        with pytest.raises(ValueError, match="0 < buffer <= max_length"):
            reward("length", "x", settings=wrong)


def test_repetition():
    once, twice = "a b c d e", "a b c a b c"
    assert reward("repetition", once, twice, "", settings={"ngram": 3}) == [0.0, -0.25, 0.0]
    assert reward("repetition", "a " * 40)[0] < -0.9
    with pytest.raises(ValueError, match="ngram=0"):
        reward("repetition", once, settings={"ngram": 0})


def test_names():
    assert [function.__name__ for function in get_rewards(list(REWARDS))] == list(REWARDS)
    with pytest.raises(ValueError, match="unknown reward 'acuracy'; did you mean accuracy"):
        get_rewards(["acuracy"])
    with pytest.raises(ValueError, match="reward_kwargs.language holds 'lang'; language takes target"):
        get_rewards(["language"], {"language": {"lang": "en"}})
    with pytest.raises(ValueError, match="reward_kwargs holds length, which is not among the rewards format"):
        get_rewards(["format"], {"length": {"buffer": 3}})


def test_functions_of_a_users_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def short(completions, limit=3, **columns):\n"
                    "    return [float(len(c) < limit) for c in completions]\n"
                    "async def later(completions, **columns):\n    return [2.0] * len(completions)\n")  # fmt: skip
    short, later = get_rewards([f"{path}:short", f"{path}:later"], {"short": {"limit": 2}})
    assert short.__name__ == "short" and short(prompts=[], completions=["a", "ab"], completion_ids=[]) == [1.0, 0.0]
    assert asyncio.run(later(prompts=[], completions=["a"], completion_ids=[])) == [2.0]
    with pytest.raises(ValueError, match="has no function 'long'; it has short, later"):
        get_rewards([f"{path}:long"])
    with pytest.raises(ValueError, match="there is no file .*none.py"):
        get_rewards([f"{tmp_path / 'none.py'}:short"])
    path.write_text("import nothing_of_the_kind")
    with pytest.raises(ValueError, match="cannot be imported .ModuleNotFoundError"):
        get_rewards([f"{path}:short"])
