"""Tokens, private repositories, paths of this machine, and what others wrote stay as they are."""

import pickle
import shutil
import sys
import time
from copy import copy as shallow
from copy import deepcopy
from types import SimpleNamespace

import pytest
import transformers
import yaml
from huggingface_hub import ModelCard, ModelCardData

import hub_upload
from recipes import logging_callbacks
from recipes.hub_commit import UploadError, commit_files, hub_api, is_generated_card
from recipes.hub_push import HubPushMixin
from recipes.pretrain_config import PretrainConfig
from tests.hub.conftest import NEW, content
from tests.hub.hub_server import READ_TOKEN, TOKEN


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
