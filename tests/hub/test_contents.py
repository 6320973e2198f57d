"""Tokenizers, adapters, paths and stages of what is pushed."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import hub_upload
from recipes.hub_paths import public_results
from recipes.hub_push import HubPushMixin
from recipes.model_card import build_card


def test_a_tokenizer_that_is_another_elsewhere(copy, monkeypatch):
    verify = lambda: hub_upload._largest_difference(hub_upload.Upload(copy, ""), ([torch.zeros(1)], [1, 2]))
    monkeypatch.setattr(hub_upload, "compute", lambda *_: ("", [torch.zeros(1)]))
    with pytest.raises(ValueError, match="its tokenizer gives other ids"):
        verify()
    monkeypatch.setattr(hub_upload, "tokenize", lambda folder: [1, 2])
    assert verify() == 0


def test_a_damaged_tokenizer_is_refused(copy):
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not loaded by a process without this package"):
        hub_upload.verify_uploads([hub_upload.Upload(copy, "")])


def test_a_model_without_tokenizer(hub, copy, trusted, capsys):
    for path in [*copy.glob("*token*.json"), *copy.glob("*.jinja")]:
        path.unlink()
    assert hub_upload.main([str(copy), "user/mute"]) == 0
    assert "Warning" in capsys.readouterr().out and "AutoTokenizer" not in (copy / "README.md").read_text()


def test_adapters_have_checksums(hub, stages, tmp_path, trusted, capsys):
    save = {"_save": lambda self, folder, _: self.model.save_pretrained(folder)}

    class Saves(HubPushMixin, type("Trainer", (), save)):
        args = SimpleNamespace(should_save=True, output_dir=None)

    trainer, folder = Saves(), tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(stages / "pretrain")
    trainer.model = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM"))
    folder.mkdir()
    (folder / "README.md").write_text("# Mine")
    trainer._save(str(folder), None)
    assert (folder / "README.md").read_text() == "# Mine"
    assert list(json.loads((folder / "checksums.json").read_text())["files"]) == ["adapter_model.safetensors"]
    command = [str(folder), "user/adapter", "--base_model", "user/base"]
    weights = bytearray((folder / "adapter_model.safetensors").read_bytes())
    weights[-3] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(weights)
    assert hub_upload.main(command) == 1
    assert "differs from what was written" in capsys.readouterr().err and "user/adapter" not in hub.repos


def test_paths_of_this_machine_stay_here(hub, copy, trusted, stages):
    before = {path.name: path.read_bytes() for path in copy.glob("*.*") if path.name != "README.md"}
    assert hub_upload.main([str(copy), "user/paths"]) == 0
    for name, uploaded in hub.files("user/paths").items():
        assert str(stages).encode() not in uploaded and str(copy.parent).encode() not in uploaded, name
    assert all((copy / name).read_bytes() == content for name, content in before.items())
    arguments = yaml.safe_load(hub.files("user/paths")["config.yaml"])["arguments"]
    assert arguments["dataset_name"] in ("documents.jsonl", ["documents.jsonl"])


def test_which_paths_are_shortened():
    config = {"command": "python /opt/me/train.py --data='/home/me/My data/x' --base user/model ./runs/a",
              "arguments": {"a": "/home/me/1", "b": ["/data/x,/data/y"], "c": "https://host/a/b", "d": "a/b/c",
                            "e": "</think>\n<answer>", "f": 3, "g": "/My data/x"}}  # fmt: skip
    metrics = b'{"path": "/home/me/1", "text": "1 /2/3"}'
    found = public_results({"config.yaml": yaml.safe_dump(config).encode(), "metrics.jsonl": metrics})
    assert yaml.safe_load(found["config.yaml"]) == {
        "command": "python train.py --data=x --base user/model ./runs/a",
        "arguments": {"a": "1", "b": ["x,y"], "c": "https://host/a/b", "d": "a/b/c", "e": "</think>\n<answer>", "f": 3,
                      "g": "x"}}  # fmt: skip
    assert found["metrics.jsonl"] == b'{"path": "1", "text": "1 /2/3"}'


def test_stages_that_moved_or_are_elsewhere(stages, tmp_path):
    def card(stage, start, folder=tmp_path / "ppo", **arguments):
        folder.mkdir(exist_ok=True)
        arguments |= {"model_name_or_path": start} if start else {}
        (folder / "config.yaml").write_text(json.dumps({"stage": stage, "arguments": arguments}))
        return build_card(folder, "user/x", model_folder=stages / "pretrain")

    data = tmp_path / "data"
    data.mkdir()
    (data / "manifest.json").write_text(json.dumps({"sources": {"web": {"location": "a/b"}}}))
    card("pretrain", None, tmp_path / "base", dataset_name=str(data))
    moved = card("sft", "/elsewhere/base/checkpoint-3", dataset_name=str(data))
    assert "Stages: Pretraining -> " in moved and "not here" not in moved and "and nothing else" in moved
    assert "and nothing else" not in card("sft", "/elsewhere/base")  # data not recorded
    absent = card("sft", "/elsewhere/lost", dataset_name=str(data))
    assert "Stages: `lost` (its run folder is not here) -> " in absent and "and nothing else" not in absent
    hub = card("sft", "user/model", dataset_name=str(data))
    assert "Stages: `user/model` -> " in hub and "and nothing else" not in hub
