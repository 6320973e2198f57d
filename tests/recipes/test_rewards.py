"""recipes/rewards.py: every rule on right, wrong, malformed and empty answers; names, settings, users' functions."""

import asyncio
import math
import multiprocessing

import pytest
import torch.distributed as dist

from recipes import rewards as registry
from recipes.chat_format import set_chat_template
from recipes.reward_format import template_form
from recipes.reward_shaping import by_group, cosine_reward, group_length_reward, overlong_punishment
from recipes.rewards import LANGUAGES, REWARDS, get_rewards, language_share, run_settings
from recipes.task_puzzles import PUZZLE_TASKS
from tests.recipes.tiny_ppo import word_tokenizer

PROBLEM = PUZZLE_TASKS["chain_sum"].problems("train", 0, 1, 1)[0]


def reward(name, *texts, settings=None, ids=None, conversational=True, prompts=None, **columns):
    """The reward of texts, as a trainer would ask for it."""
    (function,) = get_rewards([name], {name: settings} if settings else None)
    completions = [[{"role": "assistant", "content": text}] for text in texts] if conversational else list(texts)
    ids = ids or [list(range(len(text))) for text in texts]
    prompts = prompts or [[{"role": "user", "content": "?"}] if conversational else "?"] * len(texts)
    return function(prompts=prompts, completions=completions, completion_ids=ids, trainer_state=None,
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


BOTH_FORMS = ["thought</think>answer", "<think>thought</think>answer", " <think>thought</think>answer"]
NO_FORM = ["answer", "thought</think>", "thought</think> \n", "a</think>b</think>c", "a<think>b</think>c", "",
           "<think>thought", "<think><think>thought</think>answer", "<think>a</think>b<think>"]  # fmt: skip
ZERO = ["<think>a</think> <answer>b</answer>", "<think>a</think><answer>\nb\n</answer>\n"]
NOT_ZERO = ["<think>a</think> b", "<think>a</think> <answer>b", "<think>a</think> <answer> </answer>",
            "<think>a</think> so <answer>b</answer>", "<think>a</think> <answer>b</answer> end",
            "<think>a</think> <answer>b</answer><answer>c</answer>", "<think><answer>b</answer></think> b",
            "<think>a <answer>b</answer></think> <answer>b</answer>", "<answer>b</answer>"]  # fmt: skip


def test_format_where_the_prompt_is_not_seen_rendered():
    assert reward("format", *BOTH_FORMS, *NO_FORM) == [1.0] * 3 + [0.0] * len(NO_FORM)
    assert reward("format", *BOTH_FORMS, settings={"opened": True}) == [1.0, 0.0, 0.0]
    assert reward("format", *BOTH_FORMS, settings={"opened": False}) == [0.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="style='r1' must be one of auto, think, answer"):
        reward("format", "x", settings={"style": "r1"})


def test_format_read_off_prompts_that_are_text():
    for prompt, wanted in (("Q: ? A: <think>\n", [1.0, 0.0, 0.0]), ("Q: ? A:", [0.0, 1.0, 1.0])):
        texts = [*BOTH_FORMS, *NO_FORM]
        found = reward("format", *texts, conversational=False, prompts=[prompt] * len(texts))
        assert found == wanted + [0.0] * len(NO_FORM)
    prompt = "Use <think> </think> and <answer> </answer>. User: ? Assistant:"
    texts = [*ZERO, *NOT_ZERO, *NO_FORM]
    found = reward("format", *texts, conversational=False, prompts=[prompt] * len(texts))
    assert found == [1.0, 1.0] + [0.0] * (len(texts) - 2)
    opened = [text.removeprefix("<think>") for text in texts]
    found = reward("format", *opened, conversational=False, prompts=[prompt + "<think>"] * len(texts))
    assert found[:2] == [1.0, 1.0] and not any(found[2 : 2 + len(NOT_ZERO)])


def test_format_of_both_chat_templates():
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>", "<｜User｜>", "<｜Assistant｜>"])
    system = [{"role": "system", "content": "Put it in <answer> </answer>."}, {"role": "user", "content": "?"}]
    completions = {"opened": "a</think> b", "whole": "<think>a</think> b", "twice": "<think><think>a</think> b",
                   "zero": ZERO[0], "zero, opened": ZERO[0].removeprefix("<think>")}  # fmt: skip
    right = {"deepseek_r1": {"opened", "zero, opened"}, "deepseek_r1_zero": {"zero"}}
    for template, wanted in right.items():
        set_chat_template(tokenizer, template)
        settings = run_settings(["format", "length"], {"length": {"buffer": 2}}, tokenizer, 7)
        assert settings["length"] == {"max_length": 7, "buffer": 2}
        found = reward("format", *completions.values(), settings=settings["format"])
        assert {name for name, value in zip(completions, found) if value} == wanted, template
    set_chat_template(tokenizer, "deepseek_r1")
    assert template_form(tokenizer, {"thinking": False}) == {"opened": False}
    settings = run_settings(["format"], None, tokenizer, 7)["format"]  # a system message that asks for the tags
    found = reward("format", *completions.values(), settings=settings, prompts=[system] * len(completions))
    assert {name for name, value in zip(completions, found) if value} == {"zero, opened"}
    settings = run_settings(["format"], {"format": {"style": "think", "opened": False}}, tokenizer, 7)["format"]
    found = reward("format", *completions.values(), settings=settings)
    assert {name for name, value in zip(completions, found) if value} == {"whole", "zero"}


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


def kimi_by_hand(length, correct, lengths):
    if max(lengths) == min(lengths):
        return 0.0
    slope = 0.5 - (length - min(lengths)) / (max(lengths) - min(lengths))
    return slope if correct else min(0.0, slope)


def test_length_among_the_samples_of_a_prompt():
    assert group_length_reward([10, 20, 30], [True, True, True]) == [0.5, 0.0, -0.5]
    assert group_length_reward([10, 20, 30], [False, True, False]) == [0.0, 0.0, -0.5]
    assert group_length_reward([7, 7], [True, False]) == [0.0, 0.0]
    answers = [PROBLEM.reference, "no", PROBLEM.reference, PROBLEM.reference, PROBLEM.reference, "no"]
    lengths, columns = [4, 2, 12, 30, 10, 40], verifier_columns(6)
    columns["task"][5] = None
    prompts = ["a", "a", "a", "b", "b", "b"]
    found = reward("length_group", *[f"</think>{each}" for each in answers], prompts=prompts,
                   ids=[[0] * length for length in lengths], **columns)  # fmt: skip
    groups = {"a": [4, 2, 12], "b": [30, 10]}
    wanted = [kimi_by_hand(*row) for row in zip(lengths, [r != "no" for r in answers], map(groups.get, prompts))]
    assert found == pytest.approx(wanted[:5] + [None]) and found[0] > 0 > found[2]
    assert reward("length_group", "a", "b") == [None, None]  # no verifier at all


def test_groups_are_runs_of_equal_prompts():
    sizes = lambda prompts: by_group(prompts, prompts, lambda group: [len(group)] * len(group))
    messages = [[{"role": "user", "content": text}] for text in "aabb"]
    assert sizes(messages) == [2] * 4 and sizes(["a", "a", "b", "b", "b", "b"]) == [2, 2, 4, 4, 4, 4]
    for broken in ("aabbb", "aaabbbccaa"):
        with pytest.raises(ValueError, match=r"runs of \[2, 3\] equal prompts.*a group is cut"):
            sizes(list(broken))


def _share_a_group(rank, file, results):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    own = [("aaa", [10, 20, 30]), ("abbbb", [50, 1, 2, 3, 5])][rank]  # the first group ends on the other process
    found = by_group(list(own[0]), own[1], lambda group: group_length_reward(group, [True] * len(group)))
    results.put((rank, found))
    dist.destroy_process_group()


def test_a_group_may_lie_on_two_processes(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    file = tmp_path / "store"
    processes = [
        context.Process(target=_share_a_group, args=(rank, file, results), daemon=True) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert found == {0: [0.5, 0.25, 0.0], 1: [-0.5, 0.5, 0.25, 0.0, -0.5]}


def test_length_cosine():
    ends = {"right": (2.0, 1.0), "wrong": (-10.0, 0.0), "exceeded": -9.0}
    found = [cosine_reward(length, right, 100, **ends) for right in (True, False) for length in (0, 50, 99.999, 100)]
    assert found == pytest.approx([2, 1.5, 1, -9, -10, -5, 0, -9], abs=1e-3)
    eta_min, eta_max, length = 0.5, 1.0, 30  # as the paper writes it: from eta_max at 0 to eta_min at the limit
    wanted = eta_min + 0.5 * (eta_max - eta_min) * (1 + math.cos(length * math.pi / 100))
    assert cosine_reward(length, True, 100) == pytest.approx(wanted)
    columns = verifier_columns(3)
    columns["task"][2] = None
    found = reward("length_cosine", f"</think>{PROBLEM.reference}", "</think>no", "x", ids=[[0] * 30, [0] * 100, []],
                   settings={"max_length": 100}, **columns)  # fmt: skip
    assert found == [pytest.approx(wanted), -1.0, None]
    with pytest.raises(ValueError, match="needs max_length > 0"):
        reward("length_cosine", "x")


def test_completions_are_judged_once(monkeypatch):
    calls, judge = [], registry.score
    monkeypatch.setattr(registry, "score", lambda *given: calls.append(given) or judge(*given))
    texts, columns = ["</think>41", "</think>41", "</think>42"], verifier_columns(3)
    first = reward("accuracy", *texts, **columns)
    assert reward("accuracy", *texts, **columns) == first and len(calls) == 2
    reward("length_group", *texts, **columns)
    assert len(calls) == 2
    reward("accuracy", "</think>43", **verifier_columns(1))
    reward("accuracy", *texts, **columns)  # only the last batch is kept
    assert len(calls) == 5
    reward("accuracy", *texts, settings={"untagged": "whole"}, **columns)
    assert len(calls) == 7


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
    with pytest.raises(ValueError, match="reward_kwargs.length holds 'prompts'; length takes max_length, buffer"):
        get_rewards(["length"], {"length": {"prompts": 3}})  # the trainer's to give
    for function in (lambda names, given: run_settings(names, given, word_tokenizer(), 8), get_rewards):
        with pytest.raises(ValueError, match="reward_kwargs.length=3 must be its settings, e.g. {length: {"):
            function(["length"], {"length": 3})
    with pytest.raises(ValueError, match="two numbers each for right and wrong, got max_length=8, right=1.0"):
        reward("length_cosine", "a", settings={"max_length": 8, "right": 1.0})
    with pytest.raises(ValueError, match="language.target=.'en'. must be one of"):
        reward("language", "a", settings={"target": ["en"]})


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
