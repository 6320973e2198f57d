"""Saving over a folder: the manifest last, and a kill at any step leaves one version or a folder that is refused."""

import json
import os
import shutil
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model

from modeling_deepseek_r1 import DeepSeekR1ForCausalLM, checkpoint_files
from modeling_deepseek_r1.checkpoint_files import MANIFEST, WEIGHTS, verify_folder, write_manifest
from tests.modeling.test_damage import load, same_weights, tiny_model


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model", max_shard_size="60KB")
    return tmp_path / "model"


def test_the_manifest_is_written_once_and_by_the_writer_only(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "rank1", is_main_process=False)
    assert not (tmp_path / "rank1" / MANIFEST).exists()
    with mock.patch.object(checkpoint_files, "write_manifest", wraps=write_manifest) as writing:
        model.save_pretrained(tmp_path / "rank0")
    assert writing.call_count == 1 and not list((tmp_path / "rank0").glob("*.tmp"))
    with pytest.raises(ValueError, match="is a file; name a folder"):
        model.save_pretrained(tmp_path / "rank0" / MANIFEST)


def test_adapters_saved_alone_have_no_manifest(folder, tmp_path):
    peft = pytest.importorskip("peft")
    model = load(folder)
    model.add_adapter(peft.LoraConfig(target_modules=["o_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / MANIFEST).exists()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("push", ["save_pretrained", "push_to_hub"])
def test_the_manifest_is_pushed(tmp_path, push, monkeypatch):
    from transformers.utils import hub

    pushed = {}

    class Api:
        def create_repo(self, repo_id, **kwargs):
            return mock.Mock(repo_id=repo_id)

        def create_commit(self, operations, **kwargs):
            pushed.update({op.path_in_repo: Path(op.path_or_fileobj).read_bytes() for op in operations})

    for module in (hub, __import__("transformers.modeling_utils", fromlist=["x"])):
        monkeypatch.setattr(module, "hf_api", Api)
        monkeypatch.setattr(module, "create_and_tag_model_card", lambda *args, **kwargs: mock.Mock())
    if push == "save_pretrained":
        tiny_model().save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="user/model")
    else:
        tiny_model().push_to_hub("user/model")
    assert WEIGHTS in pushed and WEIGHTS in json.loads(pushed[MANIFEST])["files"]


def test_an_error_before_the_first_byte_leaves_the_folder_as_it_was(folder, monkeypatch):
    model, before = tiny_model(1), (folder / MANIFEST).read_bytes()
    fail = mock.Mock(side_effect=OSError("no space left"))
    for (name, intact) in (("custom_object_save", True), ("safe_save_file", False)):
        monkeypatch.setattr(f"transformers.modeling_utils.{name}", fail)
        with pytest.raises(OSError, match="no space"):
            model.save_pretrained(folder)
        monkeypatch.undo()
        assert intact == ((folder / MANIFEST).read_bytes() == before)
        if intact:
            verify_folder(folder)
    with pytest.raises(ValueError, match=rf"{MANIFEST}: a save into this folder was interrupted"):
        load(folder)
    model.save_pretrained(folder)
    assert same_weights(model, load(folder, verify=True))


def die_at_step(number, model, folder, size):
    """Saves in a forked child that exits at its `number`-th write, fsync, rename or removal; -> the child's exit code.

    Shards are cut in the middle at one step, and whole but unflushed at the next.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        import transformers.modeling_utils as library

        torch.set_num_threads(1)  # threads do not survive a fork
        steps = [0]

        def step(before=lambda: None):
            steps[0] += 1
            if steps[0] == number:
                before()
                os._exit(9)

        def wrap(real):
            return lambda *args, **kwargs: (step(), real(*args, **kwargs))[1]

        for name in ("replace", "unlink", "remove", "fsync"):
            setattr(os, name, wrap(getattr(os, name)))
        real = library.safe_save_file

        def save(tensors, path, metadata):
            step()
            real(tensors, path, metadata=metadata)
            step(lambda: os.truncate(path, Path(path).stat().st_size // 2))
            step()

        library.safe_save_file = save
        config = type(model.config)
        config.save_pretrained = wrap(config.save_pretrained)
        model.save_pretrained(folder, max_shard_size=size)
        code = 0
    finally:
        if code:
            traceback.print_exc()
        os._exit(code)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("sizes", [
    ("100KB", "100KB"), pytest.param(("1GB", "100KB"), marks=pytest.mark.slow),
    pytest.param(("100KB", "1GB"), marks=pytest.mark.slow),
])
def test_a_kill_at_any_step_of_an_overwrite_leaves_one_version_or_a_refusal(tmp_path, sizes):
    """Old and new weights have the same shapes, so that shards of both have equal sizes and headers."""
    old, new = tiny_model(0), tiny_model(1)
    old.save_pretrained(tmp_path / "old", max_shard_size=sizes[0])
    outcomes = []
    for number in range(1, 200):
        folder = Path(shutil.copytree(tmp_path / "old", tmp_path / str(number)))
        code = die_at_step(number, new, folder, sizes[1])
        assert code in (0, 9)
        try:
            loaded = load(folder)
            outcomes.append("old" if same_weights(old, loaded) else "new")
            assert same_weights(new if outcomes[-1] == "new" else old, loaded), f"step {number}: a mixture"
            verify_folder(folder)
        except (ValueError, OSError) as error:
            outcomes.append("refused")
            assert MANIFEST in str(error) and "interrupted" in str(error), error
        if code == 0:
            break
        if number % 4 == 0:
            new.save_pretrained(folder, max_shard_size=sizes[1])
            assert same_weights(new, load(folder, verify=True))
        shutil.rmtree(folder)
    assert code == 0 and len(outcomes) > 12
    order = [kind for kind, following in zip(outcomes, [*outcomes[1:], None]) if kind != following]
    assert order == ["old", "refused", "new"], outcomes


def test_an_adapter_on_an_unfinished_base_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    base = DeepSeekR1ForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=2, target_modules=["o_proj"])).save_pretrained(tmp_path / "adapter")
    DeepSeekR1ForCausalLM.from_pretrained(tmp_path / "adapter", verify=True)
    (tmp_path / "base" / "checksums.json").write_text('{"format": 1, "saving": true}')
    with pytest.raises(ValueError, match="base.*a save into this folder was interrupted"):
        DeepSeekR1ForCausalLM.from_pretrained(tmp_path / "adapter")
