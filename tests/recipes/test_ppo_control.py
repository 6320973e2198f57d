"""PPOTrainer as a whole on a control problem: it learns, two ranks are one, a resumed run is the uninterrupted one."""

import hashlib

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    set_seed,
)

import modeling_deepseek_r1  # noqa: F401  (registers the model type)
from data_scripts.train_tokenizer import train_tokenizer
from recipes.ppo_trainer import PPOConfig, PPOTrainer
from recipes.value_head import KINDS
from tests.recipes.processes import run_ranks
from tests.recipes.tiny_ppo import one_thread  # noqa: F401
from tests.recipes.tiny_run import SIZES

VOCABULARY, LENGTH, WANTED = 320, 8, 13
WORDS = [f"{first}{second}" for first in "abcd" for second in "efgh"]


def wanted_tokens(prompts, completions, completion_ids, **columns):
    """Share of LENGTH that are multiples of WANTED, 1/13 by chance: pays for every such token, and for not ending."""
    return [sum(token % WANTED == 0 for token in ids) / LENGTH for ids in completion_ids]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with a random DeepSeek-R1 and its tokenizer."""
    folder = tmp_path_factory.mktemp("ppo_start")
    train_tokenizer(["some words"], VOCABULARY).save_pretrained(folder)
    set_seed(0)
    config = CONFIG_MAPPING["deepseek_r1"](**(SIZES | {"vocab_size": VOCABULARY}))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def build(start, output_dir, prompts=WORDS, reward=wanted_tokens, callbacks=(), rollout_func=None, **changes):
    settings = {
        "output_dir": str(output_dir), "max_completion_length": LENGTH, "per_device_train_batch_size": 8,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "seed": 3,
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True,
        "kl_coef": 0.01,
    }  # fmt: skip
    set_seed(3)
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    return PPOTrainer(
        model=model, reward_funcs=reward, args=PPOConfig(**(settings | changes)), callbacks=list(callbacks),
        train_dataset=Dataset.from_dict({"prompt": prompts}), rollout_func=rollout_func,
        processing_class=PreTrainedTokenizerFast.from_pretrained(start),
    )  # fmt: skip


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def curve(trainer):
    """{step: what was logged}, but for clocks."""
    clocks = ("seconds", "step_time", "runtime", "per_second")
    return {
        row["step"]: {name: value for name, value in row.items() if not any(clock in name for clock in clocks)}
        for row in trainer.state.log_history
        if "loss" in row
    }


def test_the_reward_rises(start, tmp_path):
    trainer = build(
        start, tmp_path, prompts=WORDS * 4, per_device_train_batch_size=32, num_mini_batches=2, num_ppo_epochs=4,
        max_steps=128, logging_steps=8,
    )  # fmt: skip
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]  # one a rollout
    assert len(rewards) == 16
    assert sum(rewards[:3]) / 3 < 0.1
    assert sum(rewards[-3:]) / 3 > 0.5


# ---------------------------------------------------------------- resuming

# Two rollouts of four steps are an epoch of the prompts: step 8 begins the second one.
RESUMED = {
    "per_device_train_batch_size": 4, "num_mini_batches": 2, "num_ppo_epochs": 2, "max_steps": 14, "kl_target": 0.01,
    "kl_horizon": 10, "value_learning_rate": 5e-3, "lr_scheduler_type": "linear",
}  # fmt: skip


class Killed(Exception):
    pass


class KillAfter(TrainerCallback):
    """Ends a run without ceremony once the checkpoint of a step is written."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            raise Killed


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    trainer = build(start, tmp_path_factory.mktemp("whole"), **RESUMED)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def killed(start, tmp_path_factory):
    """The folder of a run that saved at every step and was killed after its 12th."""
    folder = tmp_path_factory.mktemp("killed")
    trainer = build(start, folder, save_strategy="steps", save_steps=1, callbacks=[KillAfter(12)], **RESUMED)
    with pytest.raises(Killed):
        trainer.train()
    return folder


@pytest.mark.parametrize("step", [9, 11, 12], ids=["inside an epoch of a rollout", "last step of a rollout", "between"])
def test_a_resumed_run_is_the_uninterrupted_one(start, uninterrupted, killed, tmp_path, step):
    """Bit for bit, value head, routing biases and adapted KL coefficient included, in a later epoch of the prompts."""
    trainer = build(start, tmp_path, **RESUMED)
    torch.manual_seed(99)  # nothing that was drawn in this process may matter
    trainer.train(resume_from_checkpoint=str(killed / f"checkpoint-{step}"))
    expected, found = curve(uninterrupted), curve(trainer)
    assert {at for at in found if at > step} == set(range(step + 1, 15))
    for at in range(1, 15):
        assert found[at] == expected[at], at
    assert trainer.kl_coef == uninterrupted.kl_coef != RESUMED["kl_target"]
    whole = weights(uninterrupted.model)
    assert {name for name in whole if "value_head" in name and whole[name].any()}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(trainer.model).items())


def test_a_rollout_goes_on_after_a_resume(start, killed, tmp_path):
    """A checkpoint inside a rollout brings the rollout along: nothing is sampled until its last step is done."""
    asked = []

    def counted(prompts, **columns):
        asked.append(trainer.state.global_step)
        return wanted_tokens(prompts, **columns)

    trainer = build(start, tmp_path, reward=counted, **RESUMED)
    trainer.train(resume_from_checkpoint=str(killed / "checkpoint-9"))
    assert asked == [12]


# ---------------------------------------------------------------- what is saved


def test_the_saved_policy_is_a_plain_causal_lm(start, uninterrupted, killed, tmp_path):
    uninterrupted.save_model(str(tmp_path))
    ids = torch.arange(3, 19).view(2, 8)
    for folder in (tmp_path, killed / "checkpoint-12"):
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        assert set(load_file(folder / "value_head.safetensors")) == {
            f"{layer}.{kind}" for layer in ("step", "hidden", "linear") for kind in ("weight", "bias")
        }
        stored = {name for file in folder.glob("model*.safetensors") for name in load_file(file)}
        assert stored and not any("value" in name for name in stored)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = uninterrupted.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=0, atol=0)
        before = AutoModelForCausalLM.from_pretrained(start).eval()(input_ids=ids).logits
    assert (before - logits).abs().max() > 0.1
    head = load_file(tmp_path / "value_head.safetensors")
    assert all(torch.equal(head[f"linear.{n}"], p) for n, p in uninterrupted.model.value_head.linear.named_parameters())


# ---------------------------------------------------------------- two ranks


def scripted(prompts, trainer):
    """Completions that depend on prompt and step alone, of 1 to LENGTH tokens, some cut off: no rank can differ."""
    tokenizer, completions = trainer.processing_class, []
    for prompt in prompts:
        seed = hashlib.sha256(f"{prompt} {trainer.state.global_step}".encode()).digest()[:4]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
        length = int(torch.randint(1, LENGTH + 3, (), generator=generator))
        ids = torch.randint(10, VOCABULARY, (length,), generator=generator).tolist()
        completions.append((ids[:-1] + [tokenizer.eos_token_id])[:LENGTH])
    return {"prompt_ids": tokenizer(text=prompts)["input_ids"], "completion_ids": completions, "logprobs": None}


def run_scripted(start, output_dir, **changes):
    """Six steps on given completions: every part that adds up over ranks takes part. -> weights, logs."""
    settings = {
        "num_ppo_epochs": 2, "max_steps": 6, "optim": "sgd", "learning_rate": 0.05, "kl_target": 0.01, "kl_horizon": 10,
        "whiten_rewards": True, "truncated_completions": "bootstrap",
    }  # fmt: skip
    trainer = build(start, output_dir, rollout_func=scripted, **(settings | changes))
    trainer.train()
    return {"weights": weights(trainer.accelerator.unwrap_model(trainer.model)), "curve": curve(trainer)}, trainer


@pytest.mark.slow
def test_two_ranks_equal_one_with_the_doubled_batch(start, tmp_path):
    """Over gloo, in micro-batches, against one process and one batch: biases equal, floats to the order of sums."""
    run_ranks(2, lambda rank: as_a_rank(start, tmp_path), tmp_path)
    whole = {}
    for kind in KINDS:
        whole[kind], _ = run_scripted(start, tmp_path, per_device_train_batch_size=8, value_function=kind)
    first = AutoModelForCausalLM.from_pretrained(start).state_dict()
    for kind, expected in whole.items():
        found = torch.load(tmp_path / f"two_ranks_{kind}.pt")
        assert found["ranks_equal"]
        for name, tensor in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], tensor, rtol=1e-4, atol=2e-6, msg=name)
            frozen = "layers.2." in name  # multi-token prediction
            begin = first.get(name.replace("value_head.trunk.", "model."))
            assert frozen or begin is None or not torch.equal(tensor, begin), f"{name} did not move"
        assert found["curve"].keys() == expected["curve"].keys() == set(range(1, 7))
        for step, logged in expected["curve"].items():
            assert found["curve"][step].keys() == logged.keys()
            for name, value in logged.items():
                assert found["curve"][step][name] == pytest.approx(value, rel=1e-3, abs=1e-5), (step, name)


def as_a_rank(start, output_dir):
    """What each of the two processes does."""
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    for kind in KINDS:
        result, trainer = run_scripted(start, output_dir, value_function=kind, **changes)
        flat = torch.cat([tensor.flatten().double() for tensor in result["weights"].values()])
        both = trainer.accelerator.gather(flat[None])
        if trainer.accelerator.is_main_process:
            result["ranks_equal"] = torch.equal(both[0], both[1])
            torch.save(result, output_dir / f"two_ranks_{kind}.pt")
