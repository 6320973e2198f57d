"""recipes/reward_functions.py: bad results are named, and reward models read what the policy wrote."""

import asyncio
import math
from types import SimpleNamespace

import numpy
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    set_seed,
)
from trl.trainer.utils import get_callable_name, is_async_callable

import modeling_deepseek_r1
from data_scripts.train_tokenizer import train_tokenizer
from recipes.reward_functions import ModelReward, checked, score_ids
from recipes.rl_rewards import build_rewards
from tests.recipes.tiny_run import SIZES

STATE = SimpleNamespace(global_step=7)
PROMPTS = [[{"role": "user", "content": text}] for text in ("What is 2 + 3?", "And the sum of 10, 20 and 30?", "Hi")]
TEXTS = ["two and three</think>5", "first thirty", ""]


def call(function, count=2):
    return function(prompts=["p"] * count, completions=["c"] * count, completion_ids=[[1]] * count, trainer_state=STATE)


# ---------------------------------------------------------------- checked


@pytest.mark.parametrize(
    "values", ([1, None], [True, 0.5], (0.25, None), numpy.array([1.5, 2]), torch.tensor([1.0, 2.0]),
               [numpy.float32(1.5), torch.tensor(2.0)])
)  # fmt: skip
def test_good_results_pass(values):
    expected = [None if value is None else float(value) for value in values]
    assert call(checked(lambda **_: values)) == expected


@pytest.mark.parametrize(
    "values, message",
    [
        ([1.0], "'judge' returned 1 rewards for 2 completions"),
        ([1.0, math.nan], "'judge' returned nan for completion 1; .*return None for a completion it cannot judge"),
        ([math.inf, 1.0], "'judge' returned inf for completion 0"),
        (["good", 1.0], r"'judge' returned 'good' \(str\) for completion 0"),
        ([1j, 1.0], r"returned 1j \(complex\) for completion 0"),
        (None, r"'judge' returned None \(NoneType\); it must return a list"),
        (1.0, r"'judge' returned 1.0 \(float\); it must return a list"),
    ],
)
def test_bad_results_are_named(values, message):
    def judge(**_):
        return values

    with pytest.raises(ValueError, match=message):
        call(checked(judge))


def test_an_exception_says_where():
    def judge(**_):
        raise KeyError("reference")

    said = "'judge' raised KeyError at step 7: 'reference'.*first prompt was 'p'"
    with pytest.raises(ValueError, match=said) as info:
        call(checked(judge))
    assert isinstance(info.value.__cause__, KeyError)


def test_async_functions_stay_async():
    async def judge(completions, **_):
        return [1.0, math.nan]

    wrapped = checked(judge)
    assert is_async_callable(wrapped) and get_callable_name(wrapped) == "judge"
    with pytest.raises(ValueError, match="'judge' returned nan for completion 1"):
        asyncio.run(call(wrapped))


# ---------------------------------------------------------------- reward models


@pytest.fixture(scope="module")
def tokenizers():
    """Two tokenizers: another vocabulary in the second."""
    texts = [prompt[0]["content"] for prompt in PROMPTS] * 4 + TEXTS
    return train_tokenizer(texts, 320), train_tokenizer([text[::-1] for text in texts], 330)


def reward_model(tokenizer, **changes):
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = SIZES | special | {"vocab_size": 400, "num_labels": 1, "num_nextn_predict_layers": 0} | changes
    config = modeling_deepseek_r1.DeepSeekR1Config(**sizes)
    set_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    torch.nn.init.normal_(model.score.weight)  # wide: scores differ
    return model


@pytest.fixture(scope="module")
def model(tokenizers):
    return reward_model(tokenizers[0])


def sampled(tokenizer):
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    ids[0] = [*ids[0], tokenizer.eos_token_id]  # the second was cut off, the third is empty
    ids[2] = [tokenizer.eos_token_id]
    return ids


def conversations():
    return [[{"role": "assistant", "content": text}] for text in TEXTS]


def test_the_same_tokens_are_read_as_they_were_sampled(tokenizers, model):
    tokenizer, ids = tokenizers[0], sampled(tokenizers[0])
    reward = ModelReward(model, tokenizer, tokenizer, name="judge")
    rows = reward.sequences(PROMPTS, conversations(), ids)
    for row, prompt, completion in zip(rows, PROMPTS, ids):
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        assert row == tokenizer(text, add_special_tokens=False)["input_ids"] + completion
    one_by_one = [model(input_ids=torch.tensor([row])).logits.item() for row in rows]
    found = reward(prompts=PROMPTS, completions=conversations(), completion_ids=ids)
    assert found == pytest.approx(one_by_one, abs=1e-5) and len({round(value, 3) for value in found}) == 3


@pytest.mark.parametrize("batch_size", (1, 2, 5))
@pytest.mark.parametrize("kind", ("deepseek", "llama"))
def test_a_score_depends_on_nothing_else_in_its_batch(model, kind, batch_size):
    if kind == "llama":
        set_seed(0)
        config = LlamaConfig(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, pad_token_id=2,
                             num_attention_heads=2, num_labels=1)  # fmt: skip
        model = LlamaForSequenceClassification(config).eval()
    rows = [torch.randint(3, 300, (length,)).tolist() for length in (5, 17, 3, 9, 17)]
    expected = [model(input_ids=torch.tensor([row])).logits.item() for row in rows]
    assert score_ids(model, rows, batch_size) == pytest.approx(expected, abs=1e-5)


def test_another_vocabulary_is_read_as_text(tokenizers):
    policy, own = tokenizers
    reward = ModelReward(reward_model(own), own, policy, name="judge")
    rows = reward.sequences(PROMPTS, conversations(), sampled(policy))
    text = own.decode(rows[0])
    assert "What is 2 + 3?" in text and "<think>\ntwo and three\n</think>" in text.replace("three</", "three\n</")
    assert text.count("<think>") == 1 and text.endswith(own.eos_token)
    found = reward(prompts=PROMPTS, completions=conversations(), completion_ids=sampled(policy))
    assert len(found) == 3 and all(math.isfinite(value) for value in found)
    plain = reward.sequences(["2 + 3 ="], [" 5"], [[1]])
    assert plain == [own("2 + 3 = 5")["input_ids"]]


def test_reward_models_that_cannot_be_used(tokenizers, model, tmp_path):
    tokenizer = tokenizers[0]
    with pytest.raises(ValueError, match="judge has num_labels=3, but a reward is one number"):
        ModelReward(reward_model(tokenizer, num_labels=3), tokenizer, tokenizer, name="judge")
    with pytest.raises(ValueError, match="has ids up to .*, its embedding only 64 rows"):
        ModelReward(reward_model(tokenizer, vocab_size=64), tokenizer, tokenizer, name="judge")
    with pytest.raises(ValueError, match="judge has no pad_token_id"):
        ModelReward(reward_model(tokenizer, pad_token_id=None), tokenizer, tokenizer, name="judge")
    bare = train_tokenizer([text[::-1] for text in TEXTS] * 9, 310)
    bare.chat_template = None
    reward = ModelReward(reward_model(bare), bare, tokenizer, name="judge")
    with pytest.raises(ValueError, match="the tokenizer of the reward model judge has no chat template"):
        reward(prompts=PROMPTS, completions=conversations(), completion_ids=sampled(tokenizer))
    with pytest.raises(ValueError, match="judge has reward_mean=None"):
        ModelReward(model, tokenizer, tokenizer, name="judge", normalise=True)
    model.save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match="the reward model .*alone cannot be loaded"):
        build_rewards(settings(all_rewards=[str(tmp_path / "alone")]), tokenizer)


def settings(**changes):
    return SimpleNamespace(**{"reward_kwargs": None, "max_completion_length": 8, "reward_batch_size": 4,
                              "chat_template_kwargs": None, "normalise_rewards": False, "trust_remote_code": False,
                              **changes})  # fmt: skip


def test_normalised_rewards(tokenizers):
    model, asked = reward_model(tokenizers[0], reward_mean=0.5, reward_std=2.0), {"prompts": PROMPTS}
    asked |= {"completions": conversations(), "completion_ids": sampled(tokenizers[0])}
    plain, normal = (ModelReward(model, *tokenizers[:1] * 2, normalise=flag)(**asked) for flag in (False, True))
    assert normal == pytest.approx([(value - 0.5) / 2 for value in plain])


def test_rewards_by_name_keep_their_order(tokenizers, model, tmp_path, monkeypatch):
    folder = tmp_path / "judge"
    model.save_pretrained(folder)
    tokenizers[0].save_pretrained(folder)
    args = settings(all_rewards=["format", str(folder), "length"], reward_kwargs={"length": {"buffer": 2}})
    found = build_rewards(args, tokenizers[0])
    assert [reward.__name__ for reward in found] == ["format", "judge", "length"]
    assert found[2](prompts=[], completions=["x"], completion_ids=[[1] * 7]) == [-0.5]
    direct = ModelReward(model, tokenizers[0], tokenizers[0])
    asked = {"prompts": PROMPTS, "completions": conversations(), "completion_ids": sampled(tokenizers[0])}
    assert found[1](**asked) == pytest.approx(direct(**asked), abs=1e-6)
    args.all_rewards, args.reward_kwargs = [str(folder) + "/", "format"], None
    (tmp_path / "format").mkdir()
    monkeypatch.chdir(tmp_path)  # a folder with a rule's name does not take its place
    assert [reward.__name__ for reward in build_rewards(args, tokenizers[0])] == ["judge", "format"]
    args.all_rewards = ["format", "formal"]
    with pytest.raises(ValueError, match="unknown reward 'formal'"):
        build_rewards(args, tokenizers[0])
