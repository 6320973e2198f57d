"""The released layout: exchange with the library's classes both ways, remote code, resuming, damaged folders."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)
from transformers.trainer_utils import load_sharded_checkpoint

from modeling_deepseek_r1 import DeepSeekR1Config, DeepSeekR1ForCausalLM, DeepSeekR1Model
from modeling_deepseek_r1.checkpoint import export, main
from modeling_deepseek_r1.checkpoint_files import weight_files, write_manifest

FIELDS = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
    num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, q_lora_rank=12,
    first_k_dense_replace=1, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.1,
)  # fmt: skip
IDS = torch.arange(3, 23).view(2, 10)


def tiny_model(**changes):
    model = DeepSeekR1ForCausalLM(DeepSeekR1Config(**{**FIELDS, "num_nextn_predict_layers": 1, **changes})).eval()
    for router in model.routers.values():
        if router.has_bias:
            router.e_score_correction_bias.normal_(std=0.01)
    return model


def keys_on_disk(folder):
    return set(weight_files(folder))


def logits(model, **kwargs):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **kwargs).logits


@pytest.fixture
def saved(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "ours")
    return model, tmp_path / "ours"


def released_keys(mtp=True):
    """The key set of a released checkpoint of these sizes, written out by hand from the R1 index."""
    attention = ["q_a_proj.weight", "q_a_layernorm.weight", "q_b_proj.weight", "kv_a_proj_with_mqa.weight",
                 "kv_a_layernorm.weight", "kv_b_proj.weight", "o_proj.weight"]  # fmt: skip
    mlp = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    keys = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(4 if mtp else 3):
        base = f"model.layers.{layer}."
        keys |= {base + name for name in ("input_layernorm.weight", "post_attention_layernorm.weight")}
        keys |= {f"{base}self_attn.{name}" for name in attention}
        if layer == 0:
            keys |= {f"{base}mlp.{name}" for name in mlp}
            continue
        keys |= {f"{base}mlp.gate.weight", f"{base}mlp.gate.e_score_correction_bias"}
        keys |= {f"{base}mlp.shared_experts.{name}" for name in mlp}
        keys |= {f"{base}mlp.experts.{expert}.{name}" for expert in range(8) for name in mlp}
    if mtp:
        own = ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head")
        keys |= {f"model.layers.3.{name}.weight" for name in own}
    return keys


def test_saves_the_released_key_set_and_reads_it_back_bit_for_bit(saved):
    model, folder = saved
    assert keys_on_disk(folder) == released_keys()
    tensors = load_file(folder / "model.safetensors")
    assert torch.equal(tensors["model.layers.3.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], model.lm_head.weight)
    again, info = DeepSeekR1ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for (name, ours), theirs in zip(model.state_dict().items(), again.state_dict().values()):
        assert torch.equal(ours, theirs), name
    again.save_pretrained(folder.parent / "again")
    assert keys_on_disk(folder.parent / "again") == released_keys()


def test_loads_a_library_folder_to_the_same_logits(tmp_path):
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**FIELDS, num_key_value_heads=2, num_mtp_layers=0)).eval()
    theirs.save_pretrained(tmp_path / "v3")
    ours, info = DeepSeekR1ForCausalLM.from_pretrained(tmp_path / "v3", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert ours.config.model_type == "deepseek_r1"
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    assert keys_on_disk(tmp_path / "ours") == keys_on_disk(tmp_path / "v3") == released_keys(mtp=False)


def test_exports_to_the_librarys_class(saved):
    model, folder = saved
    assert main(["export", str(folder), str(folder.parent / "v3")]) == 0
    theirs, info = DeepseekV3ForCausalLM.from_pretrained(folder.parent / "v3", output_loading_info=True)
    assert not info["missing_keys"]
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder.parent / "v3"), DeepseekV3ForCausalLM)
    assert keys_on_disk(folder.parent / "v3") == released_keys() and not list((folder.parent / "v3").glob("*.py"))


def test_exports_softmax_routing_as_v2(tmp_path):
    model = tiny_model(scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False,
                       num_nextn_predict_layers=0)  # fmt: skip
    model.save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "v2")
    theirs = DeepseekV2ForCausalLM.from_pretrained(tmp_path / "v2")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "v2_again")
    torch.testing.assert_close(logits(DeepSeekR1ForCausalLM.from_pretrained(tmp_path / "v2_again")), logits(model))


def test_exports_fused_and_sharded_folders(saved):
    model, folder = saved
    model.save_pretrained(folder.parent / "fused", save_original_format=False, max_shard_size="20KB")
    assert not any(".experts.0." in key for key in keys_on_disk(folder.parent / "fused"))
    export(folder.parent / "fused", folder.parent / "v3")
    theirs = DeepseekV3ForCausalLM.from_pretrained(folder.parent / "v3")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes, field", [
    ({"moe_layer_freq": 2}, "moe_layer_freq"), ({"n_shared_experts": 0}, "n_shared_experts"),
    ({"n_routed_experts": None}, "n_routed_experts"),
])  # fmt: skip
def test_export_refuses_what_the_library_cannot_express(tmp_path, capsys, changes, field):
    tiny_model(**changes).save_pretrained(tmp_path / "ours")
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "v3")]) == 1
    assert field in capsys.readouterr().err and not (tmp_path / "v3").exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "ours"]                     # nothing half-made is left


def test_sharded_folder_loads(saved):
    model, folder = saved
    model.save_pretrained(folder.parent / "sharded", max_shard_size="20KB")
    assert len(list((folder.parent / "sharded").glob("*.safetensors"))) > 3
    torch.testing.assert_close(logits(DeepSeekR1ForCausalLM.from_pretrained(folder.parent / "sharded")), logits(model))


FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
assert "modeling_deepseek_r1" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert "transformers_modules" in type(model).__module__, type(model).__module__
assert model.config._experts_implementation == "grouped_mm" and model.config._attn_implementation == "sdpa"
from unittest import mock
interface = sys.modules[type(model.routers[1]).__module__.replace("routing", "experts")].EXPERTS
with mock.patch.dict(interface._local_mapping, grouped_mm=lambda *a: (_ for _ in ()).throw(RuntimeError("dispatched"))):
    try:
        model(torch.ones(1, 2, dtype=torch.long)); raise SystemExit("grouped_mm was not dispatched")
    except RuntimeError as error:
        assert str(error) == "dispatched"
ids = torch.arange(3, 23).view(2, 10)
with torch.no_grad():
    torch.save(model(input_ids=ids).logits, sys.argv[2] + "/logits.pt")
model.save_pretrained(sys.argv[2] + "/resaved")
reward = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True, num_labels=1)
assert reward(input_ids=ids).logits.shape == (2, 1)
"""


def test_remote_code_in_a_process_without_the_package(saved, tmp_path):
    model, folder = saved
    script = tmp_path / "fresh.py"
    script.write_text(FRESH)
    # -I: no PYTHONPATH and not the current folder; -c paths of an editable install are blocked by name.
    block = "import sys; sys.modules['modeling_deepseek_r1'] = None; del sys.modules['modeling_deepseek_r1']; "
    block += "sys.path[:] = [p for p in sys.path if not (__import__('os').path.isdir(p + '/modeling_deepseek_r1'))]; "
    block += "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; "
    run = f"{block}sys.argv = {[str(script), str(folder), str(tmp_path)]!r}; exec(open({str(script)!r}).read())"
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment |= {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", run], check=True, env=environment, cwd=tmp_path, timeout=200)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model))
    assert keys_on_disk(tmp_path / "resaved") == released_keys()
    files = {path.name for path in (tmp_path / "resaved").glob("*.py")}
    there = {path.name for path in folder.glob("*.py")}
    assert files == there >= {"modeling_deepseek_r1.py", "experts.py", "layout.py"}


def test_auto_map_names_every_class(saved):
    _, folder = saved
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification",
                             "AutoModelForTokenClassification"}  # fmt: skip


@pytest.mark.parametrize("shard_size", ["1GB", "30KB"])
def test_plain_load_state_dict_restores_the_experts(tmp_path, shard_size):
    """How a trainer resumes: `load_state_dict` of what `save_pretrained` wrote, shard by shard."""
    model, fresh = tiny_model(), tiny_model()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    if shard_size == "1GB":
        fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    else:
        where = weight_files(tmp_path)
        experts = {file for key, file in where.items() if "layers.1.mlp.experts" in key}
        assert len(experts) > 1                                            # experts of one layer in several shards
        load_sharded_checkpoint(fresh, tmp_path, strict=False)
    for (name, ours), theirs in zip(model.state_dict().items(), fresh.state_dict().values()):
        assert torch.equal(ours, theirs), name


def test_strict_loading_names_a_missing_expert(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.experts\.5\.up_proj\.weight"):
        tiny_model().load_state_dict(tensors, strict=True)


def test_a_checkpoint_without_needed_weights_is_an_error(saved):
    _, folder = saved
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.self_attn.o_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_manifest(folder)
    with pytest.raises(ValueError, match=r"lacks 1 weights.*layers\.2\.self_attn\.o_proj\.weight"):
        DeepSeekR1ForCausalLM.from_pretrained(folder)


def test_absent_mtp_weights_name_the_way_out(saved):
    _, folder = saved
    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.startswith("model.layers.3.")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_manifest(folder)
    with pytest.raises(ValueError, match="num_nextn_predict_layers=0"):
        DeepSeekR1ForCausalLM.from_pretrained(folder)
    assert len(DeepSeekR1ForCausalLM.from_pretrained(folder, num_nextn_predict_layers=0).model.layers) == 3


def test_heads_and_base_model_load_from_a_language_model(saved, caplog):
    model, folder = saved
    base, info = DeepSeekR1Model.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and len(base.layers) == 3
    assert torch.equal(base.layers[2].mlp.experts.down_proj, model.model.layers[2].mlp.experts.down_proj)
    reward = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    assert torch.equal(reward.model.layers[1].mlp.experts.gate_up_proj, model.model.layers[1].mlp.experts.gate_up_proj)


@pytest.mark.parametrize("damage", ["truncated", "header", "absent shard", "no weights"])
def test_damaged_folders_are_named(saved, damage):
    model, folder = saved
    if damage == "absent shard":
        shutil.rmtree(folder)
        model.save_pretrained(folder, max_shard_size="20KB")
        victim = sorted(folder.glob("*.safetensors"))[1]
        victim.unlink()
    else:
        victim = folder / "model.safetensors"
        content = victim.read_bytes()
        victim.write_bytes({"truncated": content[:-100], "header": content[:8] + b"x" * 40, "no weights": b""}[damage])
    if damage == "no weights":
        victim.unlink()
    for load in (DeepSeekR1ForCausalLM.from_pretrained, lambda source: export(source, folder.parent / "v3")):
        with pytest.raises((ValueError, OSError), match=victim.name.replace(".", r"\.")):
            load(folder)
    assert not (folder.parent / "v3").exists()


def to_fp8(folder, block=8):
    """Casts the linear weights of a saved folder to block-scaled FP8 in place, as the released files are."""
    tensors, result = load_file(folder / "model.safetensors"), {}
    for key, value in tensors.items():
        linear = key.endswith("_proj.weight") or "kv_a_proj_with_mqa" in key
        if not linear or "eh_proj" in key:
            result[key] = value.bfloat16() if value.dtype == torch.float32 and "bias" not in key else value
            continue
        rows, columns = value.shape
        padded = torch.nn.functional.pad(value, (0, -columns % block, 0, -rows % block))
        tiles = padded.unflatten(0, (-1, block)).unflatten(2, (-1, block))
        scale = tiles.abs().amax((1, 3)).clamp_min(1e-12) / 448
        scaled = (tiles / scale[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :columns]
        result[key] = scaled.to(torch.float8_e4m3fn).contiguous()
        result[key + "_scale_inv"] = scale.contiguous()
    save_file(result, folder / "model.safetensors", metadata={"format": "pt"})
    write_manifest(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "bfloat16"
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                                     "weight_block_size": [block, block]}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with FP8 hardware the weights stay in FP8")
def test_fp8_folder_is_dequantised_and_can_be_saved(saved):
    model, folder = saved
    to_fp8(folder)
    loaded, info = DeepSeekR1ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    for (name, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values()):
        # e4m3 keeps 3 bits of mantissa: half a step is 1 / 16 of the value, at most
        torch.testing.assert_close(theirs.float(), ours.float(), rtol=0.0725, atol=2e-3, msg=lambda m: f"{name}: {m}")
    loaded.save_pretrained(folder.parent / "bf16")
    assert keys_on_disk(folder.parent / "bf16") == released_keys()
    again = DeepSeekR1ForCausalLM.from_pretrained(folder.parent / "bf16", dtype="auto")
    torch.testing.assert_close(logits(again), logits(loaded))


def test_released_config_loads_unchanged(tmp_path):
    """The fields of DeepSeek-R1's own config.json."""
    released = {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0, "eos_token_id": 1,
        "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
        "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
        "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                         "original_max_position_embeddings": 4096, "type": "yarn"},
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
        "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128,
        "vocab_size": 129280,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(released))
    config = DeepSeekR1Config.from_pretrained(tmp_path)
    others = {"auto_map", "rope_scaling", "rope_theta", "torch_dtype", "model_type", "architectures"}
    for field in released.keys() - others:
        assert getattr(config, field) == released[field], field
    assert config.rope_parameters["rope_type"] == "yarn" and config.rope_parameters["factor"] == 40
    assert config.model_type == "deepseek_r1" and config.auto_map == {} and config.dtype == torch.bfloat16
    assert config.to_dict() == DeepSeekR1Config(**config.to_dict()).to_dict()
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert round(parameters / 1e9, 1) == 682.6                               # 671.0 and the MTP layer's own 11.6
    assert isinstance(AutoConfig.for_model("deepseek_r1"), DeepSeekR1Config)


def test_safetensors_header_is_metadata_complete(saved):
    _, folder = saved
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_fp8_weights_stay_in_fp8_where_the_hardware_has_it(saved, monkeypatch):
    """The load path of a card with FP8, made on the CPU: `eh_proj` is in bf16 in the file and must be expected so."""
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda self, *args, **kwargs: None)
    _, folder = saved
    to_fp8(folder)
    loaded, info = DeepSeekR1ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.model.layers[3].eh_proj.weight.dtype == torch.bfloat16
    assert loaded.model.layers[0].self_attn.o_proj.weight.dtype == torch.float8_e4m3fn


def test_loading_by_assignment_takes_the_experts(saved):
    model, folder = saved
    tensors = load_file(folder / "model.safetensors")
    with torch.device("meta"):
        empty = DeepSeekR1ForCausalLM(model.config)
    empty.load_state_dict(tensors, strict=True, assign=True)
    assert torch.equal(empty.model.layers[1].mlp.experts.down_proj, model.model.layers[1].mlp.experts.down_proj)
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.experts: only 23 of 24"):
        tiny_model().load_state_dict(tensors, strict=True, assign=True)


def test_mtp_copies_are_those_of_the_given_state_dict(saved):
    model, folder = saved
    other = {key: value + 1 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    model.save_pretrained(folder.parent / "other", state_dict=other)
    tensors = load_file(folder.parent / "other" / "model.safetensors")
    assert set(tensors) == released_keys()
    assert torch.equal(tensors["model.layers.3.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], tensors["lm_head.weight"])


def test_export_refuses_a_reward_model(saved, capsys):
    _, folder = saved
    reward = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    reward.save_pretrained(folder.parent / "reward")
    assert main(["export", str(folder.parent / "reward"), str(folder.parent / "v3")]) == 1
    assert "DeepSeekR1ForSequenceClassification" in capsys.readouterr().err


def test_auto_tokenizer_serves_the_model_type(saved):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from tests.modeling.test_balance import tiny_tokenizer

    _, folder = saved
    tiny_tokenizer().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, PreTrainedTokenizerFast) and tokenizer("t5 t6")["input_ids"] == [5, 6]
