"""Whatever samples goes through the fast path of `generate` without asking for it: TRL's GRPOTrainer, our PPOTrainer,
chat, evaluation, the samples of a training run."""

import logging
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.generation.utils import GenerationMixin
from trl import GRPOConfig, GRPOTrainer

from data_scripts.train_tokenizer import train_tokenizer
from modeling_deepseek_r1 import decoding
from modeling_deepseek_r1.decoding_step import ModuleStep
from recipes.chat import ChatModel
from recipes.logging_callbacks import SampleCallback
from recipes.sampling import SamplingSettings, sample_completions
from tests.modeling.helpers import tiny_model
from tests.recipes.tiny_ppo import (
    LENGTH,
    build,
    one_thread,  # noqa: F401
    policy,
    word_tokenizer,
    words,
)

ADAPTER = {"r": 4, "target_modules": ["kv_b_proj", "o_proj"], "init_lora_weights": False}


def mean_number(completions, **_):
    """A reward that differs between any two completions, so that every step moves the weights."""
    numbers = [[int(word[1:]) for word in completion.split()] for completion in completions]
    return [sum(row) / (29 * LENGTH) for row in numbers]


def grpo(output_dir, model, peft_config=None, **changes):
    settings = {
        "output_dir": str(output_dir), "use_cpu": True, "bf16": False, "gradient_checkpointing": True,
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": LENGTH, "learning_rate": 3e-2,
        "lr_scheduler_type": "constant", "max_steps": 2, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return GRPOTrainer(
        model, mean_number, GRPOConfig(**(settings | changes)), train_dataset=words(),
        processing_class=word_tokenizer(), peft_config=peft_config,
    )  # fmt: skip


def ppo(output_dir, model, peft_config=None, **changes):
    settings = {"num_ppo_epochs": 1, "max_steps": 2, "gradient_checkpointing": True, "learning_rate": 3e-2}
    return build(output_dir, mean_number, model, arguments={"peft_config": peft_config}, **(settings | changes))


def plain(model):
    """The model itself inside of an adapter's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def expected_log_probs(model, rows, completions):
    """(B, LENGTH) by one full forward pass a row, without padding, a cache or autocast; 0 after a row's end."""
    found, training, outer = torch.zeros(len(rows), LENGTH), model.training, model
    model = plain(model).eval()
    for row, (prompt, completion) in enumerate(zip(rows, completions)):
        ids = torch.tensor([list(prompt) + completion])
        # The class's own forward: trainers put theirs around the instance's.
        logits = type(model).forward(model, input_ids=ids).logits[0, -len(completion) - 1 : -1].float()
        found[row, : len(completion)] = logits.log_softmax(-1).gather(1, ids[0, -len(completion) :, None])[:, 0]
    outer.train(training)
    return found


def watch(trainer):
    """Keeps what every rollout was, and what the weights of that moment and of the moment before say about it."""
    model, seen, generate = trainer.accelerator.unwrap_model(trainer.model), [], trainer._generate_single_turn
    before = {}

    def watched(prompt_ids, *args, **kwargs):
        counts = [router.load_counts.clone() for router in plain(model).routers.values()]
        modes = [module.training for module in model.modules()]
        completions, log_probs = generate(prompt_ids, *args, **kwargs)
        assert [module.training for module in model.modules()] == modes and any(modes)
        routers = plain(model).routers.values()
        assert all(torch.equal(router.load_counts, count) for router, count in zip(routers, counts))
        now = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        record, expected, stale = model.decoding_record, expected_log_probs(model, prompt_ids, completions), None
        if before:
            model.load_state_dict(before, strict=False)
            stale = expected_log_probs(model, prompt_ids, completions)
            model.load_state_dict(now, strict=False)
        before.clear()
        before.update(now)
        widths = (max(map(len, prompt_ids)), max(map(len, completions)))
        seen.append({
            "record": record, "expected": expected[:, : widths[1]], "widths": widths,
            "stale": None if stale is None else stale[:, : widths[1]], "dtype": model.decoding_engine.step.dtype,
            "lengths": [(len(p), len(c)) for p, c in zip(prompt_ids, completions)],
        })  # fmt: skip
        return completions, log_probs

    trainer._generate_single_turn = watched
    return seen


@pytest.fixture
def loops(monkeypatch):
    """How often the library's loop and a step of ours ran."""
    counts = {"library": 0, "ours": 0}
    sample, step = GenerationMixin._sample, ModuleStep.__call__

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(GenerationMixin, "_sample", counted("library", sample))
    monkeypatch.setattr(ModuleStep, "__call__", counted("ours", step))
    return counts


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("adapted", [False, True], ids=["weights", "adapter"])
@pytest.mark.parametrize("make", [grpo, ppo])
def test_rollouts_come_from_the_weights_of_the_moment(make, adapted, bf16, tmp_path, loops, caplog, monkeypatch):
    """Two steps with checkpointing: recorded log-probabilities are those of a full pass with the current weights, not
    with the last step's; training mode and load counts stay; experts are recorded for every token."""
    monkeypatch.setattr(decoding, "_told", set())
    model = policy()
    if make is grpo and adapted and bf16:  # TRL's autocast is around the adapter's forward, which `generate` passes by:
        model.to(torch.bfloat16)           # with fp32 weights rollouts are in fp32, by the library's loop too
    model.decoding.record_log_probs = model.decoding.record_routes = True
    trainer = make(tmp_path, model, LoraConfig(**ADAPTER) if adapted else None, bf16=bf16)
    rollouts = watch(trainer)
    assert trainer.generation_config.disable_compile  # TRL's way, which is about the library's own compiled loop
    with caplog.at_level(logging.WARNING, logger=decoding.logger.name):
        trainer.train()
    assert loops["library"] == 0 and loops["ours"] > 0 and len(rollouts) == 2
    assert not [record for record in caplog.records if "library's loop" in record.message]
    tolerance = 0.1 if bf16 else 1e-4
    apart = lambda rollout, which: (rollout["record"].log_probs - rollout[which]).abs()
    for rollout in rollouts:
        prompt_width, width = rollout["widths"]
        assert apart(rollout, "expected").max() < tolerance
        assert rollout["dtype"] == (torch.bfloat16 if bf16 else torch.float32)
        routes = rollout["record"].routes
        assert routes.shape == (8, prompt_width + width - 1, 1, 2)
        computed = (routes[:, :, 0, 0] >= 0).sum(1).tolist()
        assert computed == [prompt + completion - 1 for prompt, completion in rollout["lengths"]]
        if rollout["stale"] is not None:
            assert apart(rollout, "stale").mean() > 20 * apart(rollout, "expected").mean()


@pytest.mark.parametrize("make", [grpo, ppo])
def test_it_can_be_turned_off(make, tmp_path, loops):
    model = policy()
    model.decoding.enabled = False
    make(tmp_path, model, max_steps=1).train()
    assert loops == {"library": 1, "ours": 0}


def test_rollouts_by_continuous_batching(tmp_path, loops, monkeypatch):
    """TRL's option for it calls `generate_batch`, which is ours too."""
    monkeypatch.setattr(GenerationMixin, "generate_batch", None)
    trainer = grpo(tmp_path, policy(), use_transformers_continuous_batching=True, max_steps=1)
    trainer.train()
    assert loops["library"] == 0 and loops["ours"] > 0 and trainer.state.log_history[-1]["completions/mean_length"] > 1


def test_chat_evaluation_and_samples_use_it(loops, caplog, monkeypatch):
    """A second turn of a chat too, whose conversation is read anew."""
    monkeypatch.setattr(decoding, "_told", set())
    tokenizer = train_tokenizer(["What is 12 + 30? It is 42."] * 20, 320)
    model = tiny_model(vocab_size=320, max_position_embeddings=256)
    messages, said = [{"role": "user", "content": "What is 12?"}], []
    chat = ChatModel(model, tokenizer, SimpleNamespace(temperature=0.6, top_p=0.95, max_new_tokens=9, zero=False))

    def turn():
        messages.append({"role": "assistant", "content": chat.reply(chat.prompt(messages), lambda *_: None).text})
        messages.append({"role": "user", "content": "And 30?"})

    samples = SampleCallback(None, tokenizer, ["What is"], 1, 9)
    prompts = tokenizer(["What is 12", "It"])["input_ids"]
    with caplog.at_level(logging.WARNING, logger=decoding.logger.name):
        for use in (turn, turn, lambda: said.append(samples.generate(model)),
                    lambda: sample_completions(model, tokenizer, prompts, SamplingSettings(8, 0.6, samples=2))):
            before = loops["ours"]
            use()
            assert loops["ours"] > before
    assert loops["library"] == 0 and not caplog.records and said[0][0]["completion"]


def test_graphs_are_recorded_anew_for_other_adapters():
    """Adapters are turned off, merged and exchanged without a weight changing its place; graphs would not see it."""
    model = get_peft_model(policy(), LoraConfig(**ADAPTER)).eval()
    model.add_adapter("other", LoraConfig(**ADAPTER))
    ids = torch.tensor([[5, 6, 7]])

    def key():
        model.generate(ids, max_new_tokens=2, do_sample=False)
        return model.decoding_engine.step_key

    first = key()
    assert key() == first
    with model.disable_adapter():
        off = key()
    model.set_adapter("other")
    other = key()
    model.merge_adapter()
    merged = key()
    model.unmerge_adapter()
    assert key() == other and len({first, off, other, merged}) == 4
