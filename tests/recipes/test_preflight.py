"""The memory plan against sums by hand, and the verdict on samples of every kind."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import modeling_deepseek_r1  # noqa: F401  (registers the model type)
from recipes.memory_plan import cache_bytes_per_token
from recipes.preflight import memory_plan, survey, verdict
from recipes.reward_functions import checked
from recipes.rewards import format_reward
from recipes.sizing import GIB, USABLE_SHARE
from tests.recipes.tiny_run import SIZES

GROUPS, SIZE = 16, 4


def arguments(**changes):
    settings = {
        "bf16": False, "fp16": False, "world_size": 1, "optim": "adamw_torch", "max_prompt_length": 16,
        "max_completion_length": 48, "generation_batch_size": 32, "per_device_train_batch_size": 8,
        "gradient_checkpointing": False, "device": torch.device("cpu"), "router_replay": None,
    }  # fmt: skip
    return SimpleNamespace(**(settings | changes))


def tiny():
    config = CONFIG_MAPPING["deepseek_r1"](**(SIZES | {"num_nextn_predict_layers": 0}))
    config.auto_map = {}
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


# ---------------------------------------------------------------- memory


def test_memory_by_hand():
    policy, judge = tiny(), lambda **columns: []
    judge.model = nn.Linear(10, 5)  # as ModelReward has it
    plan = memory_plan(arguments(), policy, copy.deepcopy(policy), [checked(format_reward), checked(judge)])
    found = {row.name: row.bytes for row in plan}
    count = sum(p.numel() for p in policy.parameters())
    buffers = sum(b.numel() * b.element_size() for b in policy.buffers())
    assert found["weights of the policy"] == found["reference"] == 4 * count + buffers
    assert found["gradients"] == 4 * count and found["optimizer (adamw_torch)"] == 8 * count
    assert found["reward models"] == 4 * 55
    # 2 layers x (16 latent + 8 rotary) x 4 bytes a token, and the logits of one step.
    assert found["cache and logits of the rollout"] == 32 * (64 * 2 * 24 * 4 + 4 * 64)
    assert found["recorded routes"] == 32 * 64 * 1 * 2 * 2  # one sparse layer, top-2, int16
    assert found["activations of a micro-batch"] > 8 * 64 * 2 * SIZES["hidden_size"] * 4
    assert plan.peak("training") - plan.peak("sampling") == (
        found["gradients"] + found["activations of a micro-batch"] - found["cache and logits of the rollout"]
    )
    assert "peak while training" in plan.table() and json.dumps(plan.to_dict())


def test_memory_follows_the_settings():
    policy = tiny()
    size = lambda name, **changes: {r.name: r.bytes for r in memory_plan(arguments(**changes), policy)}.get(name, 0)
    acts = "activations of a micro-batch"
    assert size(acts, gradient_checkpointing=True) < size(acts)
    assert size(acts, per_device_train_batch_size=16) > 1.5 * size(acts)
    assert size("recorded routes", router_replay=False) == 0 < size("recorded routes")
    cache = "cache and logits of the rollout"
    assert size(cache, generation_batch_size=64) == 2 * size(cache) == 2 * size(cache, generation_batch_size=64,
                                                                               world_size=2)  # fmt: skip
    assert size("optimizer (adafactor)", optim="adafactor") < size("gradients") / 10
    muon = size("optimizer (muon)", optimizer="muon")  # one state of matrices, two of the rest
    assert size("optimizer (adamw_torch)") / 2 < muon < size("optimizer (adamw_torch)")
    assert size("16-bit copy of the weights", bf16=True) == size("gradients") / 2
    policy.requires_grad_(False)
    policy.lm_head.requires_grad_(True)
    assert size("gradients") == 4 * 64 * 32 and size("optimizer (adamw_torch)") == 8 * 64 * 32
    assert size("optimizer (muon)", optimizer="muon") == 8 * 64 * 32  # a head is AdamW's


def test_the_cache_of_other_models():
    """Against the bytes that the library's own cache holds after a forward pass."""
    config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    with torch.no_grad():
        cache = LlamaForCausalLM(config)(torch.zeros(1, 7, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 7 * cache_bytes_per_token(config, 4)
    assert {row.name for row in memory_plan(arguments(), LlamaForCausalLM(config))} >= {"gradients", "rollout"}


def test_memory_that_does_not_fit_names_the_field():
    policy, weights = tiny(), "weights, gradients and optimizer take"
    plan = memory_plan(arguments(), policy, limit=64 * GIB)
    assert plan.check() == []
    args = arguments(per_device_train_batch_size=1 << 15, generation_batch_size=1 << 15)
    (line,) = memory_plan(args, policy, limit=GIB // 4).check()
    assert "training is expected to take" in line and "lower per_device_train_batch_size=32768" in line
    args = arguments(per_device_train_batch_size=1, generation_batch_size=1 << 16)
    (line,) = memory_plan(args, policy, limit=GIB // 4).check()
    assert "sampling is expected" in line and "lower steps_per_generation or generation_batch_size" in line
    fixed = sum(row.bytes for row in plan if row.phase == "always" or row.name == "gradients")
    with pytest.raises(ValueError, match=f"{weights} .* set lora_rank"):
        memory_plan(arguments(), policy, limit=fixed - 1).check()
    assert memory_plan(arguments(), policy, limit=100).usable == int(100 * USABLE_SHARE)


# ---------------------------------------------------------------- the sample


def sampled(accuracy, texts=None, groups=GROUPS, **changes):
    """A survey of `groups` groups of SIZE; `accuracy`: one number, a row of a group, or all."""
    accuracy = torch.as_tensor(accuracy, dtype=torch.float32)
    rewards = {"accuracy": accuracy.expand(groups, SIZE) if accuracy.ndim < 2 else accuracy}
    rewards |= {name: torch.as_tensor(v, dtype=torch.float32).expand(groups, SIZE)
                for name, v in changes.pop("further", {}).items()}  # fmt: skip
    texts = texts or [f"completion {place}" for place in range(groups * SIZE)]
    return survey(rewards, texts, **changes)


def test_figures_of_a_sample():
    rewards = torch.zeros(8, SIZE)
    rewards[0], rewards[1, 0], rewards[2, :2], rewards[3, :3], rewards[2, 3] = 1, 1, 1, 1, torch.nan
    truncated = torch.zeros(8, SIZE, dtype=torch.bool)
    truncated[7] = True
    texts = ["" if place >= 30 else f"text {place // 2}" for place in range(32)]
    prompts = [[{"role": "user", "content": f"question {place}"}] for place in range(8)]
    report = sampled(
        rewards, texts, 8, further={"format": [0.0, 1.0, 0.0, 1.0]}, weights={"format": 0.0}, truncated=truncated,
        lengths=torch.arange(32).view(8, 4), prompts=prompts,
    )  # fmt: skip
    assert report.informative == pytest.approx(3 / 8)  # format is only tracked
    assert report.pass_histogram == {"none": 4, "under 1/4": 0, "1/4 to 1/2": 1, "1/2 to 3/4": 2, "over 3/4": 0,
                                     "all": 1}  # fmt: skip
    assert report.pass_rate == pytest.approx((1 + 0.25 + 2 / 3 + 0.75) / 8)
    assert (report.truncated, report.empty, report.unscored) == (1 / 8, 2 / 32, 1 / 32)
    assert report.distinct == pytest.approx(0.5) and report.lengths["longest"] == 31
    figures = report.rewards["accuracy"]
    assert figures["mean"] == pytest.approx(10 / 31) and figures["scored"] == pytest.approx(31 / 32)
    best, worst = report.samples
    assert (best["prompt"], best["rewards"]["accuracy"], worst["rewards"]["accuracy"]) == ("question 0", 1.0, 0.0)
    table = report.table()
    for part in ("groups that teach something", "37.5 %", "12.5 %", "question 0", "format", "over 3/4"):
        assert part in table
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert content["informative"] == 0.375 and content["verdict"] in ("ok", "warning")
    counted = sampled(rewards, texts, 8, further={"format": [0.0, 1.0, 0.0, 1.0]})
    assert counted.informative == 1.0


SETTINGS = {"temperature": 0.7, "max_completion_length": 64, "num_generations": 4}
NAN = float("nan")
NOTHING = {
    "all wrong": (dict(accuracy=0.0), ["no completion has accuracy above 0", "Add the reward format",
                                       "Fine-tune first", "num_generations=4", "temperature=0.7"]),
    "cut off": (dict(accuracy=0.0, truncated=torch.ones(GROUPS, SIZE)), ["100.0 % are cut off",
                                                                         "raise max_completion_length=64"]),
    "unreadable": (dict(accuracy=0.0, further={"format": 1.0}, readable=torch.zeros(GROUPS, SIZE)),
                   ["no answer can be read", "how answers are written"]),
    "readable and wrong": (dict(accuracy=0.0, further={"format": 1.0}, readable=torch.ones(GROUPS, SIZE)),
                           ["the answers are wrong: take easier levels"]),
    "all right": (dict(accuracy=1.0), ["the prompts are solved", "harder tasks or levels"]),
    "unscored": (dict(accuracy=NAN), ["no completion was scored by accuracy", "prepare_prompts"]),
    "identical": (dict(accuracy=0.0, texts=[f"{i // SIZE}" for i in range(GROUPS * SIZE)]),
                  ["the same text", "raise temperature=0.7"]),
    "empty": (dict(accuracy=0.0, texts=[""] * (GROUPS * SIZE)), ["every completion is empty", "chat template"]),
    "all or nothing": (dict(accuracy=(torch.arange(GROUPS) % 2).float().view(-1, 1).expand(GROUPS, SIZE)),
                       ["each group is all right or all wrong"]),
}  # fmt: skip


@pytest.mark.parametrize("case", NOTHING)
def test_nothing_can_be_learned(case):
    given, said = NOTHING[case]
    report = sampled(**given, settings=SETTINGS)
    with pytest.raises(ValueError, match="^nothing can be learned: in 16 groups of 4") as caught:
        report.check()
    for part in said:
        assert part in str(caught.value), (part, str(caught.value))
    others = {line for name, (_, lines) in NOTHING.items() if name != case for line in lines[:1]} - set(said)
    shared = {"no completion has accuracy above 0"}  # also said of those that are cut off or unreadable
    assert not [line for line in others - shared if line in str(caught.value)]
    assert report.to_json()["verdict"] == "nothing can be learned" and report.table()


def test_a_reward_that_is_no_verdict():
    rewards = {"politeness": torch.full((GROUPS, SIZE), 0.3)}
    kind, lines = verdict(survey(rewards, [str(i) for i in range(GROUPS * SIZE)]))
    assert kind == "nothing can be learned" and "politeness 0.3" in lines[1]


def test_few_groups_warn_and_more_refuse():
    few = sampled(0.0, groups=6)
    kind, lines = verdict(few)
    assert kind == "warning" and "none of 6 groups has variance, too few" in lines[0]
    with pytest.raises(ValueError, match="in 6 groups"):
        few.check(min_groups=6)
    with pytest.raises(ValueError, match="in 4 groups"):
        sampled(NAN, groups=4).check()


def test_warnings():
    good = sampled([1.0, 0.0, 0.0, 1.0])
    assert verdict(good) == ("ok", []) and good.check() == []
    accuracy = torch.zeros(GROUPS, SIZE)
    accuracy[0, 0], accuracy[1] = 1, NAN
    report = sampled(accuracy, truncated=torch.ones(GROUPS, SIZE), further={"format": 1.0}, settings=SETTINGS)
    text = " ".join(report.check())
    for part in ("only 6.2 % of the groups", "100.0 % of the completions are cut off: raise max_completion_length=64",
                 "the reward format is 1 for every completion"):  # fmt: skip
        assert part in text
    plan = memory_plan(arguments(per_device_train_batch_size=1 << 15), tiny(), limit=GIB // 4)
    (line,) = sampled([1.0, 0.0, 0.0, 1.0], memory=plan).check()
    assert "is expected to take" in line
    assert "peak while training" in sampled([1.0, 0.0, 0.0, 1.0], memory=plan).table()


def test_bad_input():
    with pytest.raises(ValueError, match="3 completions for rewards of 2 x 2"):
        survey({"accuracy": torch.zeros(2, 2)}, ["a"] * 3)
    with pytest.raises(ValueError, match="groups of one completion"):
        survey({"accuracy": torch.zeros(2, 1)}, ["a"] * 2)
    with pytest.raises(ValueError, match="of one shape"):
        survey({"accuracy": torch.zeros(2, 2), "format": torch.zeros(4)}, ["a"] * 4)
