"""The stand-in for the Hub as that of this process, and a small run of each stage to push to it."""

import json
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import hub_upload
from data_scripts.train_tokenizer import train_tokenizer
from recipes import pretrain
from tests.hub.hub_server import TOKEN, HubServer
from tests.recipes.tiny_run import SIZES

ROOT = Path(hub_upload.__file__).resolve().parent
IDS = torch.arange(12).view(1, -1)


@pytest.fixture(scope="package")
def hub(tmp_path_factory):
    """The stand-in, as the Hub of this process, with a token that may write; waiting takes no time."""
    wait = time.sleep
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "ENDPOINT", server.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
        patch.setattr(transformers.utils.hub, "_hf_api", None)  # made with another address if it is there already
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setattr(time, "sleep", lambda seconds: wait(min(seconds, 0.005)))
        huggingface_hub.utils.disable_progress_bars()
        yield server
        huggingface_hub.utils.enable_progress_bars()


@pytest.fixture(scope="package")
def stages(hub, tmp_path_factory):
    """pretrain/ (a run of the recipe, pushed to user/live as it went), sft/ (an adapter on it), reward/."""
    folder = tmp_path_factory.mktemp("stages")
    lines = [f"Item {i} of the list costs {i * 7 % 50} coins, and {i % 9} of them are silver." for i in range(200)]
    (folder / "documents.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    train_tokenizer(lines, 320).save_pretrained(folder / "tokenizer")
    sizes = {name: value for name, value in SIZES.items() if name != "vocab_size"}
    pretrain.main([
        "--dataset_name", str(folder / "documents.jsonl"), "--tokenizer_name_or_path", str(folder / "tokenizer"),
        "--output_dir", str(folder / "pretrain"), "--model_config", json.dumps(sizes), "--sequence_length", "32",
        "--max_steps", "4", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--save_steps", "2",
        "--use_cpu", "--disable_tqdm", "true", "--report_to", "none", "--validation_fraction", "0.1",
        "--max_shard_size", "100KB", "--device_peak_tflops", "0.1", "--push_to_hub", "--hub_model_id", "user/live",
        "--hub_token", TOKEN, "--hub_strategy", "every_save", "--hub_always_push",
    ])  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder / "pretrain")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2) if "lora" in name else None
    adapted.save_pretrained(folder / "sft")
    kwargs = {"num_labels": 1, "num_nextn_predict_layers": 0}
    AutoModelForSequenceClassification.from_pretrained(folder / "pretrain", **kwargs).save_pretrained(folder / "reward")
    save_file({"w": torch.ones(3)}, folder / "pretrain" / "value_head.safetensors")
    return folder


@pytest.fixture
def copy(stages, tmp_path):
    """A copy of pretrain/ to damage."""
    shutil.copytree(stages / "pretrain", tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*"))
    return tmp_path / "model"


@pytest.fixture
def trusted(monkeypatch):
    """For tests of what comes after the comparison of logits, which takes seconds."""
    monkeypatch.setattr(hub_upload, "verify_uploads", lambda uploads: [0.0] * len(uploads))


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


OLD = {"config.json": b'{"model_type": "old"}', "model.safetensors": b"old weights"}
NEW = {"config.json": b'{"model_type": "new"}', "model-00001-of-00002.safetensors": b"new weights",
       "model-00002-of-00002.safetensors": b"more weights"}  # fmt: skip


def content(hub, name):
    return {key: value for key, value in hub.files(name).items() if key != ".gitattributes"}
