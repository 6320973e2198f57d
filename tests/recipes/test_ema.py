"""The averaged weights: the formula, the checkpoint, the exported folder."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from recipes.ema import EMACallback
from tests.recipes.tiny_run import tiny_config, tiny_model, tiny_trainer


def test_average_equals_the_plain_formula():
    model = torch.nn.Linear(3, 2)
    ema = EMACallback(0.5)
    ema.start(model)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for update in range(1, 12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        ema.update(model)
        decay = min(0.5, (1 + update) / (10 + update))
        for name, parameter in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
    for name, value in expected.items():
        torch.testing.assert_close(ema.shadow[name], value, rtol=1e-6, atol=1e-6)


def test_bf16_weights_are_averaged_in_fp32():
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    torch.nn.init.constant_(model.weight, 1.0)
    ema = EMACallback(0.999)
    ema.start(model)
    ema.updates = 10**6
    torch.nn.init.constant_(model.weight, 2.0)
    ema.update(model)
    assert ema.shadow["weight"].item() == pytest.approx(1.001)  # bf16 would round to 1.0
    with ema.applied(model):
        assert model.weight.item() == 1.0
    assert model.weight.item() == 2.0


def test_skipped_steps_do_not_count():
    model, ema = torch.nn.Linear(2, 2), EMACallback(0.9)
    ema.start(model)
    ema.on_optimizer_step(None, None, None, model=model, optimizer=type("O", (), {"step_was_skipped": True}))
    assert ema.updates == 0
    ema.on_optimizer_step(None, None, None, model=model, optimizer=type("O", (), {"step_was_skipped": False}))
    assert ema.updates == 1


def test_exported_average_loads(tmp_path):
    trainer = tiny_trainer(tmp_path, ema_decay=0.9, save_strategy="no", max_steps=3)
    trainer.train()
    ema = next(c for c in trainer.callback_handler.callbacks if isinstance(c, EMACallback))
    raw = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with ema.applied(trainer.model):
        trainer._save(str(tmp_path / "ema"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ema")
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter, ema.shadow[name], rtol=0, atol=0)
    assert all(torch.equal(p, raw[name]) for name, p in trainer.model.named_parameters())


def test_frozen_parameters_must_be_the_same_on_load(tmp_path):
    model = tiny_model(tiny_config(tmp_path))
    ema = EMACallback(0.9)
    ema.start(model)
    ema.save_to_checkpoint(tmp_path, model)
    model.lm_head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="lm_head.weight"):
        EMACallback(0.9).load_from_checkpoint(tmp_path, model)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match=f"ema_decay={decay}"):
        EMACallback(decay)
