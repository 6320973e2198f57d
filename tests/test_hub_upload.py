"""hub_upload.py and `push_to_hub` against the stand-in of hub_server.py: push, load elsewhere, what goes wrong."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from copy import copy as shallow
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import httpx2
import huggingface_hub
import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard, ModelCardData, constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

import hub_upload
from data_scripts.train_tokenizer import train_tokenizer
from recipes import hub_commit, logging_callbacks, pretrain
from recipes.hub_commit import UploadError, commit_files, hub_api, is_generated_card
from recipes.hub_files import select_files
from recipes.hub_paths import public_results
from recipes.hub_push import HubPushMixin
from recipes.model_card import build_card
from recipes.pretrain_config import PretrainConfig
from tests.hub_server import OTHER_TOKEN, READ_TOKEN, TOKEN, HubServer
from tests.recipes.tiny_run import SIZES

ROOT = Path(hub_upload.__file__).resolve().parent
IDS = torch.arange(12).view(1, -1)
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


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
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


# ---------------------------------------------------------------- what works


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


# ---------------------------------------------------------------- the network, and kills

OLD = {"config.json": b'{"model_type": "old"}', "model.safetensors": b"old weights"}
NEW = {"config.json": b'{"model_type": "new"}', "model-00001-of-00002.safetensors": b"new weights",
       "model-00002-of-00002.safetensors": b"more weights"}  # fmt: skip


def content(hub, name):
    return {key: value for key, value in hub.files(name).items() if key != ".gitattributes"}


@pytest.fixture(scope="module")
def requests(hub):
    """How many requests the push of NEW over OLD makes."""
    commit_files(hub_api(), "user/count", OLD, "old")
    hub.requests.clear()
    commit_files(hub_api(), "user/count", NEW, "new")
    assert content(hub, "user/count") == NEW
    return len(hub.requests)


@pytest.mark.parametrize("fault", ["drop", "lose", 500, 503])
def test_network_failures_are_retried(hub, requests, fault):
    for number in range(requests):
        name, said = f"user/fails-{fault}-{number}", []
        commit_files(hub_api(), name, OLD, "old")
        hub.requests.clear()
        hub.faults[number] = fault
        commit_files(hub_api(), name, NEW, "new", say=said.append)
        assert content(hub, name) == NEW and not hub.faults
        assert [c["message"] for c in hub.repos[name].commits.values()] == ["initial commit", "old", "new"]


def test_a_network_that_stays_away(hub, requests):
    commit_files(hub_api(), "user/away", OLD, "old")
    hub.requests.clear()
    hub.faults.update(dict.fromkeys(range(3, 200), "drop"))
    try:
        with pytest.raises(UploadError, match="cannot be reached, after 5 attempts"):
            commit_files(hub_api(), "user/away", NEW, "new", say=lambda text: None)
    finally:
        hub.faults.clear()
    assert content(hub, "user/away") == OLD


def test_a_push_beside_another_one(hub, monkeypatch):
    """Somebody's commit between our look at the branch and ours is not lost."""
    commit_files(hub_api(), "user/both", OLD, "old")
    stale = hub_commit._stale
    monkeypatch.setattr(hub_commit, "_stale", lambda *a: hub.repos["user/both"].add(
        "main", "theirs", {"notes.txt": (b"x", False)}) and stale(*a))  # fmt: skip
    with pytest.raises(UploadError, match="somebody else has pushed"):
        commit_files(hub_api(), "user/both", NEW, "new")
    assert content(hub, "user/both") == {"notes.txt": b"x"}


def killed_push(name, number, when):
    """Pushes NEW in a process that ends at once before or after its `number`-th request; its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        send, count = httpx2.Client.send, [0]

        def counted(self, *args, **kwargs):
            mine, count[0] = count[0], count[0] + 1
            if mine == number and when == "before":
                os._exit(9)
            response = send(self, *args, **kwargs)
            if mine == number:
                os._exit(9)
            return response

        httpx2.Client.send = counted
        commit_files(hub_api(), name, NEW, "new")
    finally:
        os._exit(0)


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_every_request(hub, requests, when):
    killed = 0
    for number in range(requests):
        name = f"user/killed-{when}-{number}"
        commit_files(hub_api(), name, OLD, "old")
        hub.sent.clear()
        killed += killed_push(name, number, when) == 9
        assert content(hub, name) in (OLD, NEW), number
        commit_files(hub_api(), name, NEW, "new")
        assert content(hub, name) == NEW
        assert [c["message"] for c in hub.repos[name].commits.values()] == ["initial commit", "old", "new"]
        assert len(hub.sent) == 2 and set(hub.sent.values()) == {1}, (number, dict(hub.sent))
    assert killed >= requests - 1


def test_select_files_leaves_training_state(stages):
    kept, left = select_files(stages / "pretrain")
    assert left["checkpoint-4/"] == "training state" and "pickle" in left["training_args.bin"]
    assert "model.safetensors.index.json" in kept and not any(name.endswith((".bin", ".pt")) for name in kept)


# ---------------------------------------------------------------- secrets, privacy, what others wrote


@pytest.mark.parametrize("words", [
    ["--hub-token", "hf_s"], ["--hub_token", "hf_s"], ["--hub-token=hf_s"], ["--hub_token=hf_s"],
    ["--push-to-hub-token", "hf_s"], ["--push_to_hub_token=hf_s"],
])  # fmt: skip
def test_a_token_is_not_in_the_command(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["train.py", *words, "--seed", "1"])
    said = logging_callbacks.command_line()
    assert "hf_s" not in said and "..." in said and said.endswith("--seed 1")


def test_no_token_is_in_config_yaml(hub, monkeypatch, tmp_path):
    """Also where an abbreviated option or another field holds it."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_tok", "hf_given", "--run_name", TOKEN])
    args = transformers.TrainingArguments(str(tmp_path), hub_token="hf_given", run_name=TOKEN, use_cpu=True)
    args.mixed_precision = "no"
    model = SimpleNamespace(config=transformers.PreTrainedConfig())
    logging_callbacks.write_run_config(args, model, tmp_path, {})
    text = (tmp_path / "config.yaml").read_text()
    assert "hf_given" not in text and TOKEN not in text and yaml.safe_load(text)["arguments"]["run_name"] == "..."


def test_copies_of_the_settings_keep_the_token_and_pickles_do_not(tmp_path):
    args = PretrainConfig(
        output_dir=str(tmp_path), dataset_name="x", hub_token="hf_given", use_cpu=True, model_name_or_path="y",
        tokenizer_name_or_path="z",
    )  # fmt: skip
    assert deepcopy(args).hub_token == shallow(args).hub_token == "hf_given" and deepcopy(args) == args
    assert pickle.loads(pickle.dumps(args)).hub_token is None


class Pushes(HubPushMixin):
    """The part of a trainer that pushes."""

    hub_model_id, push_in_progress, state, control = "user/run", None, SimpleNamespace(global_step=3), None
    callback_handler = SimpleNamespace(on_push_begin=lambda *_: None)

    def __init__(self, folder, **settings):
        self.args = SimpleNamespace(**{
            "output_dir": str(folder), "push_to_hub": True, "hub_token": None, "hub_revision": None,
            "hub_private_repo": None, "hub_strategy": "every_save", "hub_always_push": True} | settings)  # fmt: skip

    def is_world_process_zero(self):
        return True

    def _finish_current_push(self):
        pass


@pytest.mark.parametrize(
    "damage", [lambda f: (f / "config.json").unlink(), lambda f: (f / "eval.json").write_text("[")]
)
def test_a_finished_run_says_so_if_it_cannot_be_pushed(hub, copy, damage):
    damage(copy)
    with pytest.raises(UploadError, match="The run is finished and saved; push it by: python hub_upload.py"):
        Pushes(copy).push_results({})


def test_training_survives_a_push_that_fails(hub, copy, caplog, monkeypatch):
    """Before it starts; in the background; and where the checkpoint's own upload fails."""
    (copy / "routing.py").unlink()
    Pushes(copy)._push_from_checkpoint(copy)
    assert "lacks routing.py" in caplog.text and "training goes on" in caplog.text
    caplog.clear()
    monkeypatch.setattr("recipes.hub_push.write_card", lambda *_, **__: 1 / 0)
    Pushes(copy)._push_from_checkpoint(copy)
    assert "ZeroDivisionError" in caplog.text
    caplog.clear()
    monkeypatch.undo()
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    monkeypatch.setattr("recipes.hub_push.Path.read_bytes", lambda path: b"{}")
    monkeypatch.setattr("recipes.hub_push.select_files", lambda *_: ({}, {}))
    pushes = Pushes(copy, hub_strategy="checkpoint", hub_token=READ_TOKEN)
    pushes._push_from_checkpoint(copy)
    pushes.push_in_progress.wait_until_done()
    time.sleep(0.1)
    assert "step 3): " in caplog.text and "step 3, checkpoint): " in caplog.text and not list(copy.glob(".pushing*"))


def test_private_is_not_public(hub, copy, trusted, capsys):
    commit_files(hub_api(), "user/public", {"notes.txt": b"x"}, "mine")
    assert hub_upload.main([str(copy), "user/public", "--private", "--overwrite"]) == 1
    assert "is public already" in capsys.readouterr().err and content(hub, "user/public") == {"notes.txt": b"x"}
    trainer = type("Trains", (Pushes, Initialises), {})(copy, hub_private_repo=True)
    trainer.hub_model_id = "user/public"
    with pytest.raises(UploadError, match="leave out --private"):
        trainer.init_hf_repo()
    with pytest.raises(UploadError, match="is public already"):
        commit_files(hub_api(), "user/public", NEW, "new", private=True)


class Initialises:
    def init_hf_repo(self, token=None, private=None):
        """In the place of Trainer's."""


@pytest.mark.parametrize(
    "edit", [lambda text: text + "More.\n", lambda text: text.replace("license: mit", "license: gpl")]
)
def test_an_edited_card_stays(hub, copy, trusted, capsys, edit):
    name = f"user/edited-{len(hub.repos)}"
    assert hub_upload.main([str(copy), name, "--license", "mit"]) == 0
    card = (copy / "README.md").read_text()
    assert is_generated_card(card) and not is_generated_card(edit(card))
    repo = hub.repos[name]
    repo.add("main", "by hand", repo.at("main")["files"] | {"README.md": (edit(card).encode(), False)})
    assert hub_upload.main([str(copy), name]) == 1
    assert "somebody wrote or edited" in capsys.readouterr().err
    (copy / "README.md").write_text(edit(card))
    assert hub_upload.main([str(copy), name]) == 0 and (copy / "README.md").read_text() == edit(card)
    assert hub.files(name)["README.md"].decode() == edit(card)


def test_only_pefts_empty_form_is_replaced(hub, stages, tmp_path, trusted):
    shutil.copytree(stages / "sft", tmp_path / "sft")
    form = ModelCard.from_template(ModelCardData(pipeline_tag="x")).content
    form += "\n### Framework versions\n\n- PEFT 0.17.0"
    (tmp_path / "sft" / "README.md").write_text(form)
    command = [str(tmp_path / "sft"), "user/form", "--base_model", "user/base", "--overwrite"]
    assert hub_upload.main(command) == 0
    assert (tmp_path / "sft" / "README.old.md").read_text() == form
    card = hub.files("user/form")["README.md"].decode()
    assert is_generated_card(card) and 'AutoTokenizer.from_pretrained("user/base")' in card
    mine = form.replace("[More Information Needed]", "Me", 1)
    (tmp_path / "sft" / "README.md").write_text(mine)
    assert hub_upload.main(command) == 0 and hub.files("user/form")["README.md"].decode() == mine


def test_what_an_overwritten_model_left_goes(hub, copy, trusted):
    gone = ["eval.json", "adapter_config.json", "vocab.txt", "adapter_model.safetensors", "merges.txt",
            "additional_chat_templates/a.jinja", "pytorch_model.bin"]  # fmt: skip
    stay = ["notes.txt", "LICENSE", "picture.svg", "last-checkpoint/model.safetensors", "data/eval.json", "own.py"]
    there = {name: name.encode() for name in [*gone, *stay]}
    commit_files(hub_api(), "user/left", there, "theirs")
    (copy / "eval.json").unlink()
    assert hub_upload.main([str(copy), "user/left", "--overwrite"]) == 0
    files = hub.files("user/left")
    assert not set(gone) & set(files) and {name: files[name] for name in stay} == {name: there[name] for name in stay}


# ---------------------------------------------------------------- tokenizer, adapters, paths, stages


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
