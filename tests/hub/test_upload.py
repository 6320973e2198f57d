"""hub_upload.py and `push_to_hub` against the stand-in: push, load elsewhere, cards, what is refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

import hub_upload
from recipes.hub_commit import commit_files, hub_api
from recipes.model_card import build_card
from tests.hub.conftest import ROOT, logits
from tests.hub.hub_server import OTHER_TOKEN, READ_TOKEN, TOKEN

USER_PROCESS = """
import sys
sys.path[:] = [p for p in sys.path if p != {root!r}]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
ids, found = torch.arange(12).view(1, -1), {{}}
with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained("user/my-pretrain", trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    found["pretrain"] = model(ids).logits
    found["sft"] = PeftModel.from_pretrained(model, "user/my-sft").eval()(ids).logits
    reward = AutoModelForSequenceClassification.from_pretrained("user/my-reward", trust_remote_code=True).eval()
    found["reward"] = reward(ids).logits
found["tokens"] = AutoTokenizer.from_pretrained("user/my-pretrain", trust_remote_code=True)("Item 3 costs")["input_ids"]
torch.save(found, {output!r})
"""


@pytest.mark.slow
def test_all_stages_are_pushed_and_load_elsewhere(hub, stages, tmp_path, capfd):
    assert hub_upload.main([str(stages), "user/my", "--each_stage", "--private", "--license", "apache-2.0"]) == 0
    said = capfd.readouterr()
    assert "training_args.bin (a pickle file" in said.out and TOKEN not in said.out + said.err
    assert all(hub.repos[f"user/my-{stage}"].private for stage in ("pretrain", "sft", "reward"))
    assert all(len(hub.repos[f"user/my-{stage}"].commits) == 2 for stage in ("pretrain", "sft", "reward"))

    output = str(tmp_path / "found.pt")
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0",
                                "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    environment.pop("PYTHONPATH", None)
    program = USER_PROCESS.format(root=str(ROOT), output=output)
    result = subprocess.run([sys.executable, "-c", program], check=False, cwd=tmp_path, env=environment,
                            capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    found = torch.load(output)
    model = AutoModelForCausalLM.from_pretrained(stages / "pretrain")
    torch.testing.assert_close(found["pretrain"], logits(model), atol=0, rtol=0)
    model.load_adapter(stages / "sft")
    torch.testing.assert_close(found["sft"], logits(model))
    assert not torch.allclose(found["sft"], found["pretrain"], atol=1e-3)
    reward = AutoModelForSequenceClassification.from_pretrained(stages / "reward")
    torch.testing.assert_close(found["reward"], logits(reward), atol=0, rtol=0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(stages / "tokenizer")
    assert found["tokens"] == tokenizer("Item 3 costs")["input_ids"]

    files = hub.files("user/my-pretrain")
    wanted = {"config.yaml", "eval.json", "metrics.jsonl", "report.html", "checksums.json", "value_head.safetensors",
              "model.safetensors.index.json", "chat_template.jinja", "generation_config.json", "README.md"}  # fmt: skip
    assert wanted <= set(files) and sum(name.endswith(".safetensors") for name in files) > 2
    assert not [name for name in files if name.endswith((".bin", ".pt")) or "checkpoint-" in name]
    adapter = hub.files("user/my-sft")
    assert json.loads(adapter["adapter_config.json"])["base_model_name_or_path"] == "user/my-pretrain"
    weights = {"adapter_config.json", "adapter_model.safetensors", "checksums.json"}
    assert set(adapter) == weights | {".gitattributes", "README.md"}


def test_a_run_pushes_while_it_trains(hub, stages):
    commits = list(hub.repos["user/live"].commits.values())
    assert [c["message"] for c in commits[1:]] == [
        "Training in progress, step 2", "Training in progress, step 4", "End of training"]  # fmt: skip
    code = {f"{name}.py" for name in ("modeling_deepseek_r1", "layout", "routing", "configuration_deepseek_r1")}
    for commit in commits[1:]:
        assert code | {"README.md", "config.yaml", "tokenizer.json", "checksums.json"} <= set(commit["files"])
        assert b"Pretraining of an open DeepSeek-R1" in commit["files"]["README.md"][0]
    assert {"eval.json", "report.html"} <= set(commits[-1]["files"])
    assert not [name for name in commits[-1]["files"] if name.endswith(".bin")]
    assert not list((stages / "pretrain").glob(".pushing*"))
    for path in [p for p in stages.rglob("*") if p.is_file()]:
        assert TOKEN.encode() not in path.read_bytes(), path


def test_dry_run_lists_and_pushes_nothing(hub, copy, trusted, capsys):
    (copy / "README.md").unlink()
    hub.requests.clear()
    assert hub_upload.main([str(copy), "user/dry", "--dry-run"]) == 0
    said = capsys.readouterr().out
    (card,) = re.findall(r"(\S+README.md): model card written", said)
    assert "Pretraining" in Path(card).read_text() and not (copy / "README.md").exists()
    assert "model.safetensors.index.json" in said and "README.md" in said.split("nothing is pushed")[1]
    assert "training_args.bin (a pickle file" in said and not hub.requests and "user/dry" not in hub.repos


def test_branches_second_pushes_and_stale_shards(hub, copy, trusted):
    assert hub_upload.main([str(copy), "user/again", "--revision", "trial"]) == 0
    assert set(hub.files("user/again")) == {".gitattributes"}
    assert any("-of-" in name for name in hub.files("user/again", "trial"))
    AutoModelForCausalLM.from_pretrained(copy).save_pretrained(copy)  # one file now
    assert hub_upload.main([str(copy), "user/again", "--revision", "trial"]) == 0
    files = hub.files("user/again", "trial")
    assert [name for name in files if name.startswith("model") and not name.endswith(".py")] == ["model.safetensors"]
    before = len(hub.repos["user/again"].commits)
    assert hub_upload.main([str(copy), "user/again", "--revision", "trial"]) == 0
    assert len(hub.repos["user/again"].commits) == before  # nothing has changed


# ---------------------------------------------------------------- the card


def test_card_says_what_the_run_holds(stages):
    run = ROOT / "benchmarks" / "results" / "2026-11-22_nano_ppo" / "model_0"
    card = ModelCard(build_card(run, "user/nano", model_folder=stages / "pretrain", licence="apache-2.0"))
    results = json.loads((run / "eval.json").read_text())["tasks"]["after"]["tasks"]
    (found,) = [r for r in card.data.eval_results if r.dataset_name == "spell_backward"]
    wanted = results["spell_backward"]
    assert found.metric_value == pytest.approx(100 * wanted["pass@1"]["value"]) and found.metric_type == "pass@1"
    assert f"interval {100 * wanted['pass@1']['low']:.1f} to" in found.metric_name
    assert "200 problems" in found.metric_name
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "text-generation"
    assert "Reinforcement learning (PPO)" in card.text and "trust_remote_code=True" in card.text
    assert "Command: not recorded" in card.text and "learning_rate: 6.0e-05" in card.text


def test_card_names_sources_licences_and_command(stages, tmp_path):
    run, data = tmp_path / "run", tmp_path / "data"
    run.mkdir(), data.mkdir()
    sources = {"chats": {"location": "built-in", "licence": "MIT"}, "web": {"location": "a/b", "licence": ""}}
    (data / "manifest.json").write_text(json.dumps({"sources": sources}))
    config = {"stage": "sft", "command": "python recipes/sft.py --seed 9", "arguments": {"dataset_name": str(data)}}
    (run / "config.yaml").write_text(json.dumps(config))
    text = build_card(run, "user/x", model_folder=stages / "reward")
    assert "| data: chats | built-in | MIT |" in text and "| data: web | a/b | not recorded |" in text
    assert "python recipes/sft.py --seed 9" in text and "AutoModelForSequenceClassification" in text
    corpus = {"sources": ["novels", "mine"], "licences": {"novels": "public domain", "mine": "CC0"},
              "origins": {"novels": "six novels", "mine": ""}, "locations": {"novels": "novels", "mine": "mine"}}
    (data / "manifest.json").write_text(json.dumps(corpus))
    text = build_card(run, "user/x", model_folder=stages / "reward")
    assert "| data: novels | six novels | public domain |" in text and "| data: mine | mine | CC0 |" in text


def test_a_card_written_by_hand_stays(hub, copy, trusted):
    mine = b"---\nlicense: mit\n---\n# Mine\n"
    (copy / "README.md").write_bytes(mine)
    assert hub_upload.main([str(copy), "user/hand"]) == 0
    assert hub.files("user/hand")["README.md"] == (copy / "README.md").read_bytes() == mine


# ---------------------------------------------------------------- what is refused


def _flip(folder):
    path = min(folder.glob("model-*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def _pickle(folder):
    for path in folder.glob("model*"):
        path.unlink() if path.suffix != ".py" else None
    (folder / "checksums.json").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _forget_code(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {}}))


@pytest.mark.parametrize("damage, message", [
    (_flip, "differs from what was written"),
    (_pickle, "pickle"),
    (_forget_code, "no auto_map"),
    (lambda folder: (folder / "routing.py").unlink(), "lacks routing.py"),
    (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    (lambda folder: min(folder.glob("model-*")).write_bytes(b"short"), "model-00001"),
    (lambda folder: (folder / "metrics.jsonl").write_text(TOKEN), "metrics.jsonl holds your access token"),
])  # fmt: skip
def test_damaged_folders_are_refused(hub, copy, trusted, capsys, damage, message):
    damage(copy)
    assert hub_upload.main([str(copy), "user/damaged"]) == 1
    said = capsys.readouterr()
    assert message in said.err and TOKEN not in said.err + said.out and "user/damaged" not in hub.repos


def test_an_adapter_needs_a_base_that_others_have(hub, stages, capsys):
    assert hub_upload.main([str(stages / "sft"), "user/alone"]) == 1
    assert "--base_model" in capsys.readouterr().err


def test_settings_that_lead_nowhere(hub, copy, trusted, capsys):
    assert hub_upload.main([str(copy), "user/a/b"]) == 1 and "user/a/b" in capsys.readouterr().err
    assert hub_upload.main([str(copy), "user/x", "--stages", "sft=/nowhere"]) == 1
    assert "/nowhere is no folder" in capsys.readouterr().err
    (copy / "config.yaml").write_text("a: [")
    assert hub_upload.main([str(copy), "user/x"]) == 1
    assert "config.yaml is damaged" in capsys.readouterr().err and "user/x" not in hub.repos


@pytest.mark.parametrize("token, message", [
    (None, "no access token"), (READ_TOKEN, "may not write to user/denied (403)"),
    (OTHER_TOKEN, "may not write"), ("hf_unknown", "does not accept the access token (401)"),
], ids=["none", "reads", "other", "unknown"])  # fmt: skip
def test_tokens(hub, copy, trusted, monkeypatch, capsys, token, message):
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    assert hub_upload.main([str(copy), "user/denied"]) == 1
    said = capsys.readouterr()
    assert message in said.err and "user/denied" not in hub.repos
    assert token is None or token not in said.out + said.err


def test_offline(hub, copy, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_upload.main([str(copy), "user/x"]) == 1
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err


@pytest.mark.parametrize("there, message", [
    ({"config.json": b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'}, "holds a llama model"),
    ({"tokenizer.json": b"{}"}, "would be overwritten: tokenizer.json"),
    ({"README.md": b"# My project\n"}, "would be overwritten: README.md"),
    ({"README.md": b"# By hand\n", "config.json": None}, "README.md that somebody wrote"),
])  # fmt: skip
def test_other_peoples_files(hub, copy, trusted, capsys, there, message):
    api, name = hub_api(), f"user/theirs-{len(hub.repos)}"
    there = {key: value or (copy / "config.json").read_bytes() for key, value in there.items()}
    commit_files(api, name, there, "theirs")
    assert hub_upload.main([str(copy), name]) == 1
    said = capsys.readouterr().err
    assert message in said and "--overwrite" in said
    assert {key: hub.files(name)[key] for key in there} == there
    assert hub_upload.main([str(copy), name, "--overwrite"]) == 0
    assert hub.files(name)["config.json"] == (copy / "config.json").read_bytes()
