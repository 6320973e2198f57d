"""LoRA by PEFT on attention, shared experts and the routed 3-D experts: trains, merges, saves and reloads."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from modeling_deepseek_r1 import DeepSeekR1ForCausalLM

from .helpers import close, random_ids, tiny_model

# `kv_b_proj` included: whoever reads its weight directly would miss the adapter.
TARGETS = {
    "attention": {"target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]},
    "shared_experts": {"target_modules": r".*shared_experts\.(gate|up|down)_proj"},
    "routed_experts": {
        "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "everything": {
        "target_modules": "all-linear",
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}


def adapted(target, experts="grouped_mm", depth=0):
    model = tiny_model(num_nextn_predict_layers=depth, experts=experts)
    return model, get_peft_model(model, LoraConfig(r=2, lora_alpha=4, **TARGETS[target]))


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("target", TARGETS)
def test_trains_merges_saves_and_reloads(target, experts, tmp_path):
    torch.manual_seed(0)
    model, ids = tiny_model(experts=experts), random_ids(4, 12)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        plain = model(ids).logits
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    peft_model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, **TARGETS[target])).train()
    close(peft_model.eval()(input_ids=ids).logits, plain)  # LoRA starts as the identity
    adapters = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
    assert adapters and all("lora_" in name for name in adapters)
    start = {name: p.detach().clone() for name, p in adapters.items()}
    optimizer, losses = torch.optim.AdamW(adapters.values(), lr=2e-2), []
    peft_model.train()
    for _ in range(8):
        optimizer.zero_grad()
        loss = peft_model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.97 * losses[0]
    assert all(not torch.equal(p, start[name]) for name, p in adapters.items())
    with torch.no_grad():
        trained = peft_model.eval()(input_ids=ids).logits
        assert (trained - plain).abs().max() > 0.05
        full = peft_model(input_ids=ids[:, :6], use_cache=True)
        rest = peft_model(input_ids=ids[:, 6:], past_key_values=full.past_key_values).logits
        close(torch.cat((full.logits, rest), dim=1), trained)  # cached decoding sees the adapters too

    peft_model.save_pretrained(tmp_path / "adapter")
    base = DeepSeekR1ForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        close(reloaded(input_ids=ids).logits, trained)

    merged = peft_model.merge_and_unload()
    with torch.no_grad():
        close(merged(ids).logits, trained)
    assert {name for name, _ in merged.named_parameters()} == frozen.keys()
    merged.save_pretrained(tmp_path / "merged")
    again = DeepSeekR1ForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    with torch.no_grad():
        close(again(ids).logits, trained)


def test_every_adapter_gets_a_gradient_with_mtp():
    _, peft_model = adapted("everything", depth=1)
    ids = random_ids()
    output = peft_model.train()(input_ids=ids, labels=ids)
    output.loss.backward()
    for name, parameter in peft_model.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, name
    assert output.mtp_loss > 0


def test_a_disabled_adapter_is_the_base_model():
    model, ids = tiny_model(), random_ids()
    expected = model(ids).logits
    peft_model = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **TARGETS["attention"])).eval()
    assert not torch.allclose(peft_model(input_ids=ids).logits, expected, atol=0.05)
    with peft_model.disable_adapter():
        close(peft_model(input_ids=ids).logits, expected)


def test_generation_through_peft():
    ids = random_ids(2, 6)
    _, peft_model = adapted("everything")
    tokens = peft_model.eval().generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    uncached = peft_model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
    assert tokens.shape == (2, 10) and torch.equal(tokens, uncached)
