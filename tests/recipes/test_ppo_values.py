"""The value function of PPO: its head against a plain loop, what it learns, what it starts from, what it trains."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from recipes.value_head import VALUE_FILE, ValueHead, build_value_head
from tests.recipes.tiny_ppo import build, logged, one_thread, policy  # noqa: F401


def random_head(size=16):
    torch.manual_seed(0)
    head = ValueHead(size)
    torch.nn.init.normal_(head.linear.weight)
    return head


def test_the_head_against_a_plain_loop():
    head, states = random_head(), torch.randn(7, 16)
    values = head(states[None], {"attention_mask": torch.ones(1, 7)})[0]
    steps = []
    for place in range(7):
        previous = states[place - 1] if place else torch.zeros(16)
        steps.append(F.silu(head.step(torch.cat([states[place], previous]))))
        mean = torch.stack(steps).mean(0)
        expected = head.linear(F.silu(head.hidden(torch.cat([steps[-1], mean])))).squeeze()
        torch.testing.assert_close(values[place], expected)


def test_the_head_does_not_see_padding_or_the_future():
    head, states = random_head(), torch.randn(2, 7, 16)
    values = head(states, {})
    padded = torch.cat([torch.full((2, 3, 16), 9.0), states, torch.full((2, 2, 16), 9.0)], 1)
    mask = torch.tensor([[0] * 3 + [1] * 7 + [0] * 2] * 2)
    torch.testing.assert_close(head(padded, {"attention_mask": mask})[:, 3:10], values)
    torch.testing.assert_close(head(states[:, :4], {}), values[:, :4])


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_values_are_learned(tmp_path, kind):
    """The reward is known from the prompt alone: values can explain all of the returns."""
    trainer = build(
        tmp_path, reward=lambda prompts, **_: [float(prompt < "t2") for prompt in prompts], value_function=kind,
        max_steps=40, kl_coef=0.0, learning_rate=5e-3, logging_steps=4, per_device_train_batch_size=32,
        num_ppo_epochs=4, max_completion_length=4, value_trunk_gradient=True,
    )  # fmt: skip
    trainer.train()
    explained = logged(trainer, "explained_variance")
    assert sum(explained[-4:]) / 4 > 0.5 > explained[0]


def test_an_optimizer_made_before_the_value_function(tmp_path):
    model = policy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = build(tmp_path, model=model, arguments={"optimizers": (optimizer, None)}, value_learning_rate=1e-2)
    trainer.train()
    assert trainer.model.value_head.linear.weight.any()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-2]


def test_a_quantised_policy_is_not_copied(tmp_path):
    model = policy()
    model.is_quantized = True
    with pytest.raises(ValueError, match="cannot copy a policy that is quantised.*value_model_name_or_path"):
        build_value_head(model, "separate")


@pytest.mark.parametrize("reaches", [False, True])
def test_whether_the_value_loss_trains_the_trunk(tmp_path, reaches):
    trainer = build(tmp_path, value_trunk_gradient=reaches)
    with torch.no_grad():
        trainer.model.value_head.linear.weight.normal_()
    values = trainer.model(
        input_ids=torch.arange(3, 12)[None], labels=torch.arange(3, 12)[None], fused_lm_head=True
    ).value_preds
    values.sum().backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    found = {name.partition(".")[0] for name, gradient in gradients.items() if gradient.any()}
    assert found == ({"value_head", "model"} if reaches else {"value_head"})


def test_a_separate_value_model_starts_from_a_reward_model(tmp_path):
    model = policy()
    model.save_pretrained(tmp_path / "base")
    reward_model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    reward_model.save_pretrained(tmp_path / "reward")
    trainer = build(
        tmp_path / "run", model=model, value_function="separate", value_model_name_or_path=str(tmp_path / "reward"),
        value_learning_rate=1e-3,
    )  # fmt: skip
    head = trainer.model.value_head
    torch.testing.assert_close(head.linear.weight, reward_model.score.weight)
    ids = torch.arange(3, 12)[None]
    expected = reward_model(input_ids=ids).logits[0, 0]
    torch.testing.assert_close(head(None, {"input_ids": ids})[0, -1], expected, atol=1e-5, rtol=1e-4)
    rates = {id(p): g["lr"] for g in trainer.create_optimizer().param_groups for p in g["params"]}
    assert {rates[id(p)] for p in head.parameters() if p.requires_grad} == {1e-3}
    assert {rates[id(p)] for n, p in trainer.model.named_parameters() if p.requires_grad and "value" not in n} == {1e-2}


def test_values_in_the_precision_of_their_weights(tmp_path):
    """FSDP's and DeepSpeed's mixed precision hands out the weights in bfloat16."""
    head = ValueHead(16).bfloat16()
    with torch.no_grad():
        head.linear.weight.normal_()
    states = torch.randn(2, 3, 16)
    values = head(states, {})
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, head.float()(states, {}), atol=0.1, rtol=0.1)


LORA = LoraConfig(
    r=4, target_modules=["q_a_proj", "kv_b_proj"], task_type="CAUSAL_LM", init_lora_weights=False,
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
)  # fmt: skip


def test_a_separate_value_model_of_an_adapted_policy(tmp_path):
    """It is a plain model with the adapter merged, also where the experts are adapted; all of it is trained."""
    changes = {"value_function": "separate", "arguments": {"peft_config": LORA}, "max_steps": 3}
    trainer = build(tmp_path, save_strategy="steps", save_steps=1, **changes)
    policy_trunk, trunk = trainer.model.get_base_model().model, trainer.model.get_base_model().value_head.trunk
    assert not any("lora" in name or "base_layer" in name for name in trunk.state_dict())
    frozen = {name for name, parameter in trunk.named_parameters() if not parameter.requires_grad}
    assert all(name.startswith(f"layers.{len(trunk.layers) - 1}.") or "mtp" in name for name in frozen), frozen
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        states = [model.eval()(input_ids=ids).last_hidden_state for model in (trunk, policy_trunk)]
    torch.testing.assert_close(*states, atol=1e-5, rtol=1e-4)
    trainer.train()
    resumed = build(tmp_path / "resumed", **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert logged(resumed, "loss") == logged(trainer, "loss")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_other_models_and_adapters(tmp_path):
    """A dense model, with LoRA: the base stays as it is and is the reference."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = build(
        tmp_path, model=model, max_steps=8, kl_coef=0.1, save_strategy="steps", save_steps=8,
        arguments={"peft_config": lora},
    )  # fmt: skip
    assert trainer.ref_model is None
    trainer.train()
    assert logged(trainer, "kl")[0] == pytest.approx(0.0, abs=1e-6) and abs(logged(trainer, "kl")[-1]) > 1e-4
    for name, value in trainer.model.get_base_model().state_dict().items():
        if "lora" not in name and "value_head" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")]), name
    saved = tmp_path / "checkpoint-8"
    assert not any("value" in name for name in load_file(saved / "adapter_model.safetensors"))
    assert load_file(saved / VALUE_FILE)["linear.weight"].any()
