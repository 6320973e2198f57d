"""recipes/vllm_policy.py: what is sent to vLLM, by TRL's own VLLMGeneration, to an engine that holds another library's
model and was started from the exported folder."""

import types
from pathlib import Path

import pytest
import torch
import trl.generation.vllm_generation as vllm_generation
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from modeling_deepseek_r1.checkpoint_export import export
from recipes.value_head import ValueHead
from recipes.vllm_policy import (
    ENGINE_FOLDER,
    attach,
    export_for_vllm,
    released_weights,
    vllm_engine,
    vllm_starts_from,
)
from tests.modeling.helpers import randomise_biases
from tests.recipes.tiny_ppo import LENGTH, one_thread, policy, word_tokenizer, words  # noqa: F401

IDS = torch.arange(3, 23).view(2, 10)


class Engine:
    """Stands in for vllm.LLM: transformers' DeepseekV3ForCausalLM, loaded from the folder it is given, fed by names."""

    def __init__(self, model, seed=0, **settings):
        self.folder, self.settings, self.sent = model, settings, {}
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        assert type(self.model) is DeepseekV3ForCausalLM
        config = types.SimpleNamespace(hf_config=self.model.config, max_model_len=64)
        runner = types.SimpleNamespace(model=self)
        executor = types.SimpleNamespace(driver_worker=types.SimpleNamespace(model_runner=runner))
        self.llm_engine = types.SimpleNamespace(model_config=config, model_executor=executor)
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def load_weights(self, weights):
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name, value in weights:
            self.sent[name] = value.clone()
            prefix, _, last = name.partition(".experts.")
            if last:
                expert, kind, _ = last.split(".")
                fused = "down_proj" if kind == "down_proj" else "gate_up_proj"
                place = tensors[f"{prefix}.experts.{fused}"][int(expert)]
                place = {"down_proj": place, "gate_proj": place[: len(value)], "up_proj": place[-len(value) :]}[kind]
            else:
                place = tensors[name]
            assert place.shape == value.shape, name
            place.copy_(value)

    def reset_prefix_cache(self):
        pass

    @torch.no_grad()
    def generate(self, prompts, sampling_params, use_tqdm):
        return [self._sample(row["prompt_token_ids"], sampling_params) for row in prompts]

    def _sample(self, prompt, params):
        ids, log_probs = list(prompt), []
        for _ in range(params.max_tokens):
            scores = self.model(torch.tensor([ids])).logits[0, -1].div(params.temperature).log_softmax(-1)
            token = int(torch.multinomial(scores.exp(), 1, generator=self.generator))
            ids.append(token)
            log_probs.append({token: types.SimpleNamespace(logprob=float(scores[token]), rank=1)})
            if token == 2:
                break
        output = types.SimpleNamespace(token_ids=ids[len(prompt) :], logprobs=log_probs)
        return types.SimpleNamespace(prompt_token_ids=prompt, outputs=[output])


@pytest.fixture
def vllm(monkeypatch):
    """TRL's VLLMGeneration with that engine in the place of vllm.LLM."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # set by TRL; not for other tests
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", Engine, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", types.SimpleNamespace, raising=False)


def spread_policy(**changes):
    model = policy(**changes)
    randomise_biases(model, mean=0.0)
    return model


def trainer_of(model, output_dir, around=True, **changes):
    settings = {
        "output_dir": str(output_dir), "use_vllm": True, "vllm_mode": "colocate", "use_cpu": True, "bf16": False,
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": LENGTH, "max_steps": 2,
        "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "gradient_checkpointing": False, "beta": 0.0,
    }  # fmt: skip
    args, tokenizer = GRPOConfig(**(settings | changes)), word_tokenizer()
    reward = lambda completions, **_: [float("t5" in text) + len(text) / 100 for text in completions]
    build = lambda: GRPOTrainer(model, reward, args, train_dataset=words(), processing_class=tokenizer)
    if not around:
        return build()
    with vllm_engine(model, tokenizer, args):
        return build()


def logits(model):
    return model.eval()(IDS).logits.detach()


def test_names_and_tensors_are_those_of_the_packages_export(tmp_path):
    model = spread_policy(num_nextn_predict_layers=1)
    assert any("layers.2." in name for name, _ in model.named_parameters())  # the prediction layer
    model.save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "plain")
    expected = load_file(tmp_path / "plain" / "model.safetensors")
    expected = {name: value for name, value in expected.items() if not name.startswith("model.layers.2.")}
    model.value_head = ValueHead(32)
    sent = dict(released_weights(model))
    assert sent.keys() == expected.keys() and any(name.endswith("e_score_correction_bias") for name in sent)
    assert all(sent[name].dtype == value.dtype and torch.equal(sent[name], value) for name, value in expected.items())
    names = export_for_vllm(model, word_tokenizer(), tmp_path / "start", max_shard_size="20KB")
    shards = sorted((tmp_path / "start").glob("*.safetensors"))
    stored = {name: value for shard in shards for name, value in load_file(shard).items()}
    assert len(shards) > 1 and names == sorted(stored) == sorted(expected)
    assert all(torch.equal(stored[name], value) for name, value in expected.items())
    engine = Engine(tmp_path / "start")
    torch.testing.assert_close(logits(engine.model), logits(model), rtol=0, atol=1e-5)


def test_the_exported_dtype(tmp_path):
    model = spread_policy()
    export_for_vllm(model, None, tmp_path / "start", "bf16")
    stored = load_file(tmp_path / "start" / "model.safetensors")
    for name, value in released_weights(model):
        kept = name.endswith("e_score_correction_bias")
        assert torch.equal(stored[name], value if kept else value.to(torch.bfloat16)), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "start").dtype == torch.bfloat16


def test_training_sends_every_change(tmp_path, vllm):
    model = spread_policy()
    name = model.name_or_path
    trainer = trainer_of(model, tmp_path)
    engine = trainer.vllm_generation.llm
    assert engine.folder == str(tmp_path / ENGINE_FOLDER) and model.name_or_path == name
    attach(trainer)
    model.value_head = ValueHead(32)
    start = logits(engine.model)
    torch.testing.assert_close(start, logits(model), rtol=0, atol=1e-5)
    trainer.train()  # its second rollout is sampled after the first update
    gaps = [row["sampling/sampling_logp_difference/max"] for row in trainer.state.log_history if "reward" in row]
    assert len(gaps) == 2 and max(gaps) < 1e-4
    with torch.no_grad():
        for router in model.routers.values():
            router.e_score_correction_bias.normal_()  # buffers, which TRL alone does not send
    assert (logits(engine.model) - logits(model)).abs().max() > 1e-2
    trainer.vllm_generation.sync_weights()
    torch.testing.assert_close(logits(engine.model), logits(model), rtol=0, atol=1e-5)
    assert (logits(model) - start).abs().max() > 1e-2
    assert engine.sent.keys() == dict(released_weights(model)).keys()


def test_an_adapter_is_sent_merged_and_stays_apart(tmp_path, vllm):
    model = spread_policy()
    experts = [name for name, _ in model.named_parameters() if name.endswith("experts.gate_up_proj")]
    lora = get_peft_model(model, LoraConfig(
        r=2, target_modules=["o_proj"], target_parameters=experts[:1], init_lora_weights=False
    ))  # fmt: skip
    before = {name: value.clone() for name, value in lora.state_dict().items()}
    changed = logits(lora)
    trainer = trainer_of(lora, tmp_path)  # exports merged weights
    for name, value in lora.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)
    attach(trainer)
    torch.testing.assert_close(logits(trainer.vllm_generation.llm.model), changed, rtol=0, atol=1e-4)
    with lora.disable_adapter():
        assert (logits(lora) - changed).abs().max() > 1e-2
    trainer.vllm_generation.sync_weights()
    torch.testing.assert_close(logits(trainer.vllm_generation.llm.model), changed, rtol=0, atol=1e-4)
    assert not any("lora" in name or "base_layer" in name for name in trainer.vllm_generation.llm.sent)
    for name, value in lora.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)


def test_what_cannot_work_is_refused(tmp_path, vllm):
    model, tokenizer = spread_policy(), word_tokenizer()
    with pytest.raises(ValueError, match="no config.json; make it with export_for_vllm"):
        with vllm_starts_from(model, tmp_path):
            pass
    trainer = trainer_of(model, tmp_path / "run", vllm_model_impl="transformers")
    with pytest.raises(ValueError, match="vllm_model_impl='transformers'"):
        attach(trainer)
    trainer.vllm_generation.model_impl = "auto"
    trainer.vllm_generation.llm.llm_engine.model_config.hf_config = model.config
    with pytest.raises(ValueError, match="started with model_type=deepseek_r1.*vllm_engine"):
        attach(trainer)
    with vllm_engine(model, tokenizer, trainer.args):  # a second run in the folder
        assert Path(model.name_or_path) == tmp_path / "run" / ENGINE_FOLDER
    with pytest.raises(ValueError, match="belongs to another model"):
        with vllm_engine(policy(moe_intermediate_size=8), tokenizer, trainer.args):
            pass
    with pytest.raises(FileExistsError):
        export_for_vllm(model, tokenizer, tmp_path / "run" / ENGINE_FOLDER)
    with pytest.raises(ValueError, match="dtype='int4' must be one of None, bf16"):
        export_for_vllm(model, tokenizer, tmp_path / "other", "int4")
