"""Checkpoints: killed, damaged, full disk, resumed bit for bit, refused with another config."""

import errno
import json
import os
import pydoc
import shutil
import traceback

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from recipes import checkpoints
from recipes.checkpoint_files import (
    MARKER,
    IncompleteCheckpointError,
    find_problem,
    newest_complete_checkpoint,
    resolve_resume,
)
from recipes.checkpoints import CheckpointMixin, CheckpointSaveError
from recipes.ema import EMACallback
from tests.recipes.tiny_run import losses, tiny_config, tiny_model, tiny_trainer


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    """An uninterrupted run of six steps with checkpoints at 2, 4 and 6: its folder."""
    folder = tmp_path_factory.mktemp("full") / "run"
    tiny_trainer(folder, ema_decay=0.9).train()
    return folder


def copy_until(run, folder, step):
    """A copy of the run as a kill right after `step` would have left it."""
    shutil.copytree(run, folder)
    for _, path in checkpoints.list_checkpoints(folder):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    return folder


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


# ---------------------------------------------------------------- resuming

VARIANTS = {  # arguments, model config
    "single file": ({}, {}),
    "sharded": ({"max_shard_size": "60KB"}, {}),
    "best model": ({"load_best_model_at_end": True, "save_total_limit": 1}, {}),
    "dropout": ({"lr_scheduler_type": "cosine_with_restarts"}, {"hidden_dropout": 0.1, "drop_path_rate": 0.1}),
}


class StopAt(TrainerCallback):
    """A Ctrl-C when the given step is logged."""

    def __init__(self, step):
        self.step = step

    def on_log(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_run_is_bit_equal(variant, tmp_path):
    options, sizes = VARIANTS[variant]

    def fresh(folder, **more):
        model = tiny_model(tiny_config(folder), **sizes)
        return tiny_trainer(folder, model=model, ema_decay=0.9, max_steps=4, **options, **more)

    whole = fresh(tmp_path / "whole")
    whole.train()

    stopped = fresh(tmp_path / "killed")
    stopped.add_callback(StopAt(3))  # after the checkpoint at 2
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert losses(tmp_path / "killed").keys() == {1, 2, 3}

    resumed = fresh(tmp_path / "killed", resume_from_checkpoint="true")
    start = {name: value.clone() for name, value in resumed.model.state_dict().items()}
    resumed.train()
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    weights = resumed.model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
        if ".experts." in name:
            assert not torch.equal(value, start[name]), f"{name} equals its initial value"
    averages = [next(c for c in t.callback_handler.callbacks if isinstance(c, EMACallback)) for t in (whole, resumed)]
    assert all(torch.equal(value, averages[1].shadow[name]) for name, value in averages[0].shadow.items())


def test_metrics_beyond_the_resumed_step_are_dropped(full_run, tmp_path):
    folder = copy_until(full_run, tmp_path / "run", 4)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 7, "lo')  # cut off by the kill
    tiny_trainer(folder, ema_decay=0.9, resume_from_checkpoint="auto").train()
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert losses(folder) == losses(full_run)
    assert steps.count(5) == 1


# ---------------------------------------------------------------- kills

KILLS = {  # what is called in the second save, and the how many-th call of it is the last
    "before anything": ("recipes.checkpoints.estimate_save_bytes", 1),
    "ema file": ("recipes.ema.save_file", 1),
    "weights": ("transformers.modeling_utils.PreTrainedModel.save_pretrained", 1),
    "training arguments": ("torch.save", 1),
    "optimizer": ("torch.save", 2),
    "rng state": ("torch.save", 4),
    "hashing": ("recipes.checkpoint_files.hash_file", 3),
    "marker": ("os.replace", 1),
    "rotation": ("shutil.rmtree", 1),
}


def run_and_die(folder, target, count, monkeypatch):
    """Train in a forked child whose `count`-th call of `target` in the save at step 4 is its last act."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    torch.set_num_threads(1)  # threads do not survive a fork
    try:
        trainer = tiny_trainer(folder, ema_decay=0.9, save_total_limit=1, metric_for_best_model=None)  # no best to keep
        saving, calls = trainer._save_checkpoint, [0]

        def save(*args, **kwargs):
            if trainer.state.global_step == 4:
                real = pydoc.locate(target)

                def last(*args, **kwargs):
                    calls[0] += 1
                    if calls[0] == count:
                        os._exit(9)
                    return real(*args, **kwargs)

                monkeypatch.setattr(target, last)
            return saving(*args, **kwargs)

        trainer._save_checkpoint = save
        trainer.train()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("point", KILLS)
def test_kill_during_a_save_leaves_a_good_checkpoint(point, tmp_path, monkeypatch, full_run):
    folder = tmp_path / "run"
    assert run_and_die(folder, *KILLS[point], monkeypatch) == 9
    path, skipped = newest_complete_checkpoint(folder)
    assert path.name == ("checkpoint-4" if point == "rotation" else "checkpoint-2")
    assert all(MARKER in reason for _, reason in skipped)
    if point in ("optimizer", "rotation"):
        tiny_trainer(folder, ema_decay=0.9, save_total_limit=1, metric_for_best_model=None,
                     resume_from_checkpoint="true").train()
        assert losses(folder) == losses(full_run)
        assert [p.name for _, p in checkpoints.list_checkpoints(folder)] == ["checkpoint-6"]


# ---------------------------------------------------------------- damage


def test_damaged_checkpoints_are_skipped_and_named(full_run, tmp_path, caplog):
    folder = copy_until(full_run, tmp_path / "run", 6)
    (folder / "checkpoint-6" / MARKER).write_text("{")
    flip_a_bit(folder / "checkpoint-4" / "model.safetensors")
    with caplog.at_level("WARNING"):
        assert resolve_resume("auto", folder) == str(folder / "checkpoint-2")
    assert f"checkpoint-6: an unreadable {MARKER}" in caplog.text
    assert "checkpoint-4: model.safetensors differs from what was written" in caplog.text


@pytest.mark.parametrize("damage, words", [
    (flip_a_bit, "optimizer.pt differs from what was written"),
    (lambda path: os.truncate(path, 1000), "optimizer.pt has 1,000 bytes, "),
    (os.remove, "optimizer.pt is missing"),
])  # fmt: skip
def test_a_damaged_explicit_path_is_an_error(full_run, tmp_path, damage, words):
    folder = copy_until(full_run, tmp_path / "run", 4)
    damage(folder / "checkpoint-4" / "optimizer.pt")
    trainer = tiny_trainer(folder, ema_decay=0.9, resume_from_checkpoint=str(folder / "checkpoint-4"))
    with pytest.raises(IncompleteCheckpointError, match=words):
        trainer.train()


def test_nothing_to_resume(tmp_path):
    with pytest.raises(IncompleteCheckpointError, match="holds no complete checkpoint"):
        resolve_resume("true", tmp_path)
    with pytest.raises(IncompleteCheckpointError, match="no such folder"):
        resolve_resume(tmp_path / "checkpoint-9", tmp_path)
    assert resolve_resume("auto", tmp_path) is None
    assert resolve_resume(None, tmp_path) is None


def test_weights_that_did_not_arrive_are_an_error(full_run, tmp_path, monkeypatch):
    """A trainer that drops keys while loading (as HF does with fused experts) must not go on."""
    folder = copy_until(full_run, tmp_path / "run", 4)
    trainer = tiny_trainer(folder, ema_decay=0.9, resume_from_checkpoint="true")
    real = trainer.model.load_state_dict

    def without_experts(state, *args, **kwargs):
        return real({k: v for k, v in state.items() if ".experts." not in k}, *args, **kwargs)

    monkeypatch.setattr(trainer.model, "load_state_dict", without_experts)
    with pytest.raises(IncompleteCheckpointError, match="experts.*did not take"):
        trainer.train()


# ---------------------------------------------------------------- full disk


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("[enforce fail at inline_container.cc:862] . PytorchStreamWriter failed writing file"),
])  # fmt: skip
def test_full_disk_while_writing(full_run, tmp_path, monkeypatch, error):
    folder = copy_until(full_run, tmp_path / "run", 4)
    trainer = tiny_trainer(folder, ema_decay=0.9, resume_from_checkpoint="true")

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(CheckpointSaveError, match=r"bytes needed, [\d,]+ free.*checkpoint-4 is intact"):
        trainer.train()
    assert not (folder / "checkpoint-6").exists()
    assert find_problem(folder / "checkpoint-4") is None


def test_too_little_space_is_said_before_writing(full_run, tmp_path, monkeypatch):
    folder = copy_until(full_run, tmp_path / "run", 4)
    usage = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    trainer = tiny_trainer(folder, ema_decay=0.9, resume_from_checkpoint="true")
    with pytest.raises(CheckpointSaveError, match="nothing was written.*1,000 free"):
        trainer.train()
    assert not (folder / "checkpoint-6").exists()


# ---------------------------------------------------------------- another configuration


def test_resume_with_another_config_is_refused(full_run, tmp_path, caplog):
    folder = copy_until(full_run, tmp_path / "run", 4)
    changed = {"ema_decay": 0.9, "learning_rate": 2e-2, "max_steps": 8, "resume_from_checkpoint": "true"}
    with pytest.raises(ValueError) as error:
        tiny_trainer(folder, **changed).train()
    for words in ("learning_rate: 0.01 -> 0.02", "max_steps: 6 -> 8", "--allow_config_change"):
        assert words in str(error.value)
    model = tiny_model(tiny_config(tmp_path / "other"), routed_scaling_factor=1.0)
    with pytest.raises(ValueError, match="model config, routed_scaling_factor: 2.5 -> 1.0"):
        tiny_trainer(folder, model=model, ema_decay=0.9, resume_from_checkpoint="true").train()
    tiny_trainer(folder, allow_config_change=True, **changed).train()
    assert "as allowed: learning_rate: 0.01 -> 0.02" in caplog.text
    assert max(losses(folder)) == 8


def test_a_longer_run_is_allowed_where_the_schedule_does_not_look_ahead(tmp_path):
    options = {"lr_scheduler_type": "constant_with_warmup", "eval_strategy": "no"}
    tiny_trainer(tmp_path / "run", max_steps=2, **options).train()
    tiny_trainer(tmp_path / "run", max_steps=4, resume_from_checkpoint="true", **options).train()
    tiny_trainer(tmp_path / "whole", max_steps=4, **options).train()
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_fresh_start_does_not_touch_another_run(full_run, tmp_path):
    folder = copy_until(full_run, tmp_path / "run", 4)
    with pytest.raises(ValueError, match="already holds checkpoint-4.*--resume_from_checkpoint true"):
        tiny_trainer(folder).train()
    tiny_trainer(folder, overwrite_output_dir=True, max_steps=1, save_strategy="no").train()
    assert not checkpoints.list_checkpoints(folder)


def test_a_finished_run_takes_no_further_step(full_run, tmp_path):
    folder = copy_until(full_run, tmp_path / "run", 6)
    before = torch.load(folder / "checkpoint-6" / "optimizer.pt")["state"][0]["step"]
    trainer = tiny_trainer(folder, ema_decay=0.9, resume_from_checkpoint="auto")
    trainer.train()
    assert trainer.state.global_step == 6 and losses(folder) == losses(full_run)
    assert trainer.optimizer.state_dict()["state"][0]["step"] == before == 6


def test_another_programs_checkpoints_are_left_alone(tmp_path):
    foreign = tmp_path / "checkpoint-2"
    foreign.mkdir()
    (foreign / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="already holds checkpoint-2"):
        tiny_trainer(tmp_path).train()
    trainer = tiny_trainer(tmp_path)
    trainer.require_fresh_output_dir = lambda: None
    with pytest.raises(CheckpointSaveError, match="not written by this code"):
        trainer.train()
    assert (foreign / "trainer_state.json").exists()
    unfinished = tmp_path / "other" / "checkpoint-2"
    unfinished.mkdir(parents=True)
    (unfinished / "run_config.json").write_text("{")
    tiny_trainer(tmp_path / "other", max_steps=2).train()
    assert find_problem(unfinished) is None


def test_checkpoints_of_an_abandoned_future_are_set_aside(full_run, tmp_path):
    folder = copy_until(full_run, tmp_path / "run", 6)
    path = str(folder / "checkpoint-2")
    tiny_trainer(folder, ema_decay=0.9, resume_from_checkpoint=path, max_steps=6, save_strategy="no").train()
    assert {p.name for p in folder.glob("*checkpoint-*")} == {
        "checkpoint-2", "abandoned-checkpoint-4", "abandoned-checkpoint-6"
    }  # fmt: skip
    assert losses(folder) == losses(full_run)


# ---------------------------------------------------------------- rotation, other trainers


def test_rotation_keeps_the_best_and_the_newest(tmp_path, monkeypatch):
    order = []
    write, remove = checkpoints.write_marker, checkpoints.CheckpointMixin._remove
    monkeypatch.setattr(checkpoints, "write_marker", lambda f, w=None: order.append(f"mark {f.name}") or write(f, w))
    removing = staticmethod(lambda f: (f.is_dir() and order.append(f"drop {f.name}"), remove(f))[1])
    monkeypatch.setattr(checkpoints.CheckpointMixin, "_remove", removing)
    trainer = tiny_trainer(
        tmp_path, save_total_limit=2, load_best_model_at_end=True, greater_is_better=True, max_steps=8
    )
    evaluation = iter((1.0, 3.0, 2.0, 2.0, 1.0, 1.0))  # the fourth and the last: at the end of an epoch
    trainer.evaluate = lambda **kwargs: {"eval_bits_per_byte": next(evaluation)}
    trainer.train()
    left = {path.name for _, path in checkpoints.list_checkpoints(tmp_path)}
    assert left == {"checkpoint-4", "checkpoint-8"}
    for entry in (e for e in order if e.startswith("drop")):
        assert order[order.index(entry) - 1].startswith(("mark", "drop"))
    assert order.index("mark checkpoint-6") < min(order.index(e) for e in order if e.startswith("drop"))


def test_any_trainer_takes_the_mixin(tmp_path):
    class PlainTrainer(CheckpointMixin, Trainer):
        pass

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    rows = [{"input_ids": [i, i + 1, i + 2], "labels": [i, i + 1, i + 2]} for i in range(8)]

    def train(folder, resume=None, **options):
        torch.manual_seed(0)
        args = TrainingArguments(
            str(folder), max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=2, use_cpu=True,
            disable_tqdm=True, lr_scheduler_type="constant", **options,
        )  # fmt: skip
        trainer = PlainTrainer(model=LlamaForCausalLM(config), args=args, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = train(tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "checkpoint-4")
    assert train(tmp_path / "a", resume=True) == whole
