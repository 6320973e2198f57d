"""Saved on n processes, resumed on m, whole or sharded, at once or beside training: one curve, and a plain end."""

import errno
import json
import os
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modeling_deepseek_r1.expert_parallel import expert_groups, parallelise_experts
from recipes import elastic_checkpoints
from recipes.checkpoint_files import IncompleteCheckpointError, find_problem, list_checkpoints
from recipes.checkpoints import CheckpointSaveError
from recipes.export_checkpoint import export_checkpoint
from recipes.resume_guard import check_unchanged, keep_step
from recipes.sharded_checkpoints import (
    GROUPS,
    LayoutError,
    holds_shards,
    load_optimizer,
    load_weights,
    optimizer_state,
    read_pieces,
    saved_tensors,
    weight_pieces,
    write_pieces,
)
from recipes.sharding import shard
from recipes.tensor_pieces import Piece, deal_whole, weight_sums
from tests.recipes.processes import FSDP, run_ranks, start_ranks, wait_for
from tests.recipes.test_row_order import stop_after
from tests.recipes.tiny_run import losses, tiny_config, tiny_model, tiny_trainer

STEPS, ROWS = 6, 8  # an epoch has three steps: every run is resumed within one
LAYOUTS = {"ddp": {}, "fsdp": FSDP}


def train(folder, world, until=STEPS, layout="ddp", sizes=None, then=None, **options):
    """Trains in `folder` on `world` processes up to step `until`, from where it is; `then(trainer)` on every rank."""
    settings = {
        "per_device_train_batch_size": ROWS // world, "gradient_accumulation_steps": 1, "max_steps": STEPS,
        "eval_strategy": "no", "save_steps": 2, "resume_from_checkpoint": "auto",
    } | options  # fmt: skip

    def work(rank):
        trainer = tiny_trainer(folder, model=tiny_model(tiny_config(folder), **(sizes or {})), **settings)
        if until < settings["max_steps"]:
            stop_after(trainer, until)
        trainer.train()
        if then is not None:
            then(trainer)
        if until == settings["max_steps"]:
            trainer.save_model()

    run_ranks(world, work, f"{folder}_logs_{world}_{until}", LAYOUTS[layout])


def largest_difference(one, two):
    """Of two runs' losses and of the models they saved."""
    curves, weights = zip(*((losses(folder), load_file(folder / "model.safetensors")) for folder in (one, two)))
    assert curves[0].keys() == curves[1].keys() == set(range(1, STEPS + 1)) and weights[0].keys() == weights[1].keys()
    of_weights = [(weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0]]
    return max(abs(curves[0][step] - curves[1][step]) for step in curves[0]), max(of_weights)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of one process that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder, 1)
    return folder


# ---------------------------------------------------------------- 2 -> 1 -> 4


def resume_on_others(whole, folder, layout, **options):
    for world, until in ((2, 2), (1, 4), (4, STEPS)):
        train(folder, world, until, layout=layout if world > 1 else "ddp", **options)
        checkpoint = folder / f"checkpoint-{until}"
        assert find_problem(checkpoint) is None
        assert holds_shards(checkpoint) == (options.get("async_save", False) or layout == "fsdp" and world > 1)
    of_losses, of_weights = largest_difference(whole, folder)
    assert of_losses < 3e-6 and of_weights < 5e-5  # the order of sums; AdamW divides by small second moments


def test_sharded_run_goes_on_with_other_processes_and_saves_beside_training(whole, tmp_path):
    """FSDP2 on two processes, one process, FSDP2 on four; each saves in a thread."""
    folder = tmp_path / "run"
    resume_on_others(whole, folder, "fsdp", async_save=True)
    names = {path.name for path in folder.iterdir()}
    assert "modeling_deepseek_r1.py" in names and not any("fsdp" in name for name in names)  # the model's code
    config, expected = (json.loads((path / "config.json").read_text()) for path in (folder, whole))
    assert config == expected

    checkpoint = folder / f"checkpoint-{STEPS}"
    shards = {path.name for path in (checkpoint / "shards").iterdir()}
    assert shards == {".metadata", *(f"__{rank}_0.distcp" for rank in range(4))}
    marker = json.loads((checkpoint / "COMPLETE.json").read_text())
    assert {f"shards/{name}" for name in shards} <= marker["files"].keys()
    assert {f"rng_state_{rank}.pth" for rank in range(4)} <= marker["files"].keys()
    assert export_checkpoint(checkpoint, tmp_path / "plain") == len(marker["weights"])
    plain, final = (load_file(path / "model.safetensors") for path in (tmp_path / "plain", folder))
    assert plain.keys() == final.keys() and all(torch.equal(plain[name], final[name]) for name in final)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert weight_sums(model) == marker["weights"]
    damage_a_shard(checkpoint, tmp_path)


def damage_a_shard(checkpoint, tmp_path):
    path = sorted((checkpoint / "shards").glob("*.distcp"))[-1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    assert find_problem(checkpoint) == f"shards/{path.name} differs from what was written (sha256)"
    with pytest.raises(IncompleteCheckpointError, match=f"shards/{path.name} differs"):
        export_checkpoint(checkpoint, tmp_path / "again")
    path.unlink()
    assert find_problem(checkpoint, hashes=False) == f"shards/{path.name} is missing"


@pytest.mark.slow
@pytest.mark.parametrize("layout, beside", [("ddp", False), ("ddp", True), ("fsdp", False)])
def test_other_processes_continue_the_curve(whole, tmp_path, layout, beside):
    resume_on_others(whole, tmp_path / "run", layout, **({"async_save": True} if beside else {}))


@pytest.mark.slow
def test_a_plain_checkpoint_is_resumed_sharded_and_a_sharded_one_whole(whole, tmp_path):
    folder = tmp_path / "run"
    train(folder, 1, 2)
    assert (folder / "checkpoint-2" / "model.safetensors").is_file()
    train(folder, 2, 4, layout="fsdp")
    assert holds_shards(folder / "checkpoint-4")
    train(folder, 2, layout="ddp")
    of_losses, of_weights = largest_difference(whole, folder)
    assert of_losses < 3e-6 and of_weights < 5e-5


# ---------------------------------------------------------------- the same number of processes


@pytest.mark.slow
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_as_many_processes_go_on_bit_for_bit(tmp_path, layout, beside):
    """With dropout: each process goes on with its own random numbers."""
    options = {"layout": layout, "async_save": beside, "sizes": {"hidden_dropout": 0.1, "drop_path_rate": 0.1}}
    train(tmp_path / "whole", 2, **options)
    train(tmp_path / "parts", 2, 4, **options)
    shutil.rmtree(tmp_path / "parts" / "checkpoint-4")
    train(tmp_path / "parts", 2, **options)
    assert largest_difference(tmp_path / "whole", tmp_path / "parts") == (0, 0)


@pytest.mark.slow
def test_saving_beside_training_changes_nothing(tmp_path):
    """Every step is saved while the next ones are taken; what is written is what the weights were."""
    for name, beside in (("at_once", False), ("beside", True)):
        train(tmp_path / name, 2, layout="fsdp", async_save=beside, save_steps=1)
    folders = [tmp_path / name for name in ("at_once", "beside")]
    assert largest_difference(*folders) == (0, 0)
    assert [step for step, _ in list_checkpoints(folders[1])] == list(range(1, STEPS + 1))
    for step in range(1, STEPS + 1):
        marks = [json.loads((path / f"checkpoint-{step}" / "COMPLETE.json").read_text()) for path in folders]
        assert marks[0]["weights"] == marks[1]["weights"] and find_problem(folders[1] / f"checkpoint-{step}") is None
        shards = [path / f"checkpoint-{step}" / "shards" / "__1_0.distcp" for path in folders]
        assert shards[0].read_bytes() == shards[1].read_bytes()


@pytest.mark.slow
def test_the_best_model_of_a_sharded_run(tmp_path):
    """Loaded at the end, kept by the rotation, and saved in the plain layout."""
    def note(trainer):
        best = {trainer.state.best_global_step}
        sums = trainer._sum_weights()
        marker = json.loads((tmp_path / "run" / f"checkpoint-{best.pop()}" / "COMPLETE.json").read_text())
        assert sums == marker["weights"]

    train(tmp_path / "run", 2, layout="fsdp", async_save=True, eval_strategy="steps", eval_steps=2, save_total_limit=1,
          load_best_model_at_end=True, metric_for_best_model="bits_per_byte", greater_is_better=False, then=note)
    kept = [path for _, path in list_checkpoints(tmp_path / "run")]
    assert 1 <= len(kept) <= 2 and all(find_problem(path) is None for path in kept)


# ---------------------------------------------------------------- writers that fail


def failing_writer(rank, at):
    """From its `at`-th save on, `rank` finds no space for its shards; the others write theirs."""
    real, calls = dcp.FileSystemWriter.write_data, [0]

    def write_data(*args):
        calls[0] += 1
        if calls[0] >= at and dist.get_rank() == rank:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    dcp.FileSystemWriter.write_data = write_data


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 3])
def test_an_error_of_one_writer_comes_up_on_all_ranks(tmp_path, at):
    """At the next save, or at the end; the checkpoint before is intact, and the run is resumed from it."""
    folder = tmp_path / "run"
    options = dict(per_device_train_batch_size=ROWS // 2, gradient_accumulation_steps=1, eval_strategy="no",
                   save_steps=2, async_save=True, resume_from_checkpoint="auto")

    def work(rank):
        failing_writer(1, at)
        trainer = tiny_trainer(folder, **options)
        with pytest.raises(CheckpointSaveError, match=f"could not save .*checkpoint-{2 * at} .*rank 1.*No space left"):
            trainer.train()
        assert trainer.state.global_step == min(2 * at + 2, STEPS)

    run_ranks(2, work, tmp_path / "logs", FSDP)
    assert [step for step, _ in list_checkpoints(folder)] == list(range(2, 2 * at, 2))
    train(folder, 2, layout="fsdp")
    assert find_problem(folder / f"checkpoint-{STEPS}") is None


@pytest.mark.slow
def test_a_rank_that_dies_beside_a_save_leaves_the_one_before(tmp_path):
    """No marker without all files."""
    folder = tmp_path / "run"

    def work(rank):
        import recipes.checkpoint_writer as module

        real, calls = module.describe_files, [0]

        def describe(*args):
            calls[0] += 1
            if rank == 1 and calls[0] == 2:
                os._exit(9)
            return real(*args)

        module.describe_files = describe
        tiny_trainer(folder, per_device_train_batch_size=2, gradient_accumulation_steps=1, eval_strategy="no",
                     save_steps=2, async_save=True, collective_timeout_s=20).train()

    codes = wait_for(start_ranks(2, work, tmp_path / "logs", FSDP), 60)
    assert codes[1] == 9 and codes[0] == 1
    problems = {step: find_problem(path) for step, path in list_checkpoints(folder)}
    assert problems[2] is None and "no COMPLETE.json" in problems[4]


# ---------------------------------------------------------------- experts split over processes


@pytest.mark.slow
def test_split_experts_are_read_whole_and_whole_ones_split(tmp_path):
    def stepped(world):
        model = tiny_model(tiny_config(tmp_path / "unused"))
        if world > 1:  # the arguments made the process group
            model = parallelise_experts(model, *expert_groups(None))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return model, optimizer

    def values(model, optimizer):
        found = {}
        for name, parameter in model.named_parameters():
            for key, value in (("", parameter), *optimizer.state[parameter].items()):
                found[f"{name} {key}"] = value.detach().clone()
        return found

    def split_and_save(rank):
        model, optimizer = stepped(2)
        generator = torch.Generator().manual_seed(rank)
        for parameter in model.parameters():
            shared = torch.Generator().manual_seed(5) if not hasattr(parameter, "expert_parallel_group") else generator
            parameter.grad = torch.randn(parameter.shape, generator=shared)
        optimizer.step()
        pieces, groups = optimizer_state(model, optimizer)
        group = dist.new_group(backend="gloo")
        write_pieces(tmp_path, deal_whole(weight_pieces(model) | pieces, rank, 2), group)
        torch.save(values(model, optimizer), tmp_path / f"values_{rank}.pt")
        if rank == 0:
            torch.save(groups, tmp_path / GROUPS)
        dist.barrier()
        again, states = stepped_again()
        load_weights(tmp_path, again)
        load_optimizer(tmp_path, again, states)
        found = values(again, states)
        assert all(torch.equal(found[name], value) for name, value in values(model, optimizer).items())

    def stepped_again():
        torch.manual_seed(77)
        model = parallelise_experts(tiny_model(tiny_config(tmp_path / "unused", seed=9)), *expert_groups(None))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    run_ranks(2, split_and_save, tmp_path / "logs")
    model, optimizer = stepped(1)
    load_weights(tmp_path, model)
    load_optimizer(tmp_path, model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    parts, found, joined = [torch.load(tmp_path / f"values_{rank}.pt") for rank in (0, 1)], values(model, optimizer), 0
    for name, value in found.items():
        if value.shape == parts[0][name].shape:
            assert torch.equal(value, parts[0][name]), name
        else:
            assert torch.equal(value, torch.cat([part[name] for part in parts])), name
            joined += 1
    assert joined == 3 * 2 * 2  # weight and two moments of gate-and-up and down, in the layer and in the MTP layer


# ---------------------------------------------------------------- refusals


def test_what_keeps_a_step_is_said():
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "processes": 2, "device": "cpu"}
    assert keep_step(16, split) == (
        "keep 16 rows with per_device_train_batch_size=4, gradient_accumulation_steps=2 on 2 processes"
    )
    assert "per_device_train_batch_size=4, gradient_accumulation_steps=3 on 2 " in keep_step(24, split)
    assert "per_device_train_batch_size=3, gradient_accumulation_steps=1 on 2 " in keep_step(6, split)
    assert keep_step(16, split | {"processes": 3}) == "3 processes cannot share 16 rows; launch one of 1, 2, 4, 8, 16"

    run = {"model": {}, "training": {"sequences_per_step": 16}, "split": split, "versions": {}}
    now = run | {"training": {"sequences_per_step": 8}, "split": split | {"processes": 1}}
    with pytest.raises(ValueError, match=(
        r"rows of an optimizer step: 16 \(per_device_train_batch_size=4 x gradient_accumulation_steps=2 x 2 processes\)"
        r" -> 8 \(.* x 1 processes\); keep 16 rows with per_device_train_batch_size=4, gradient_accumulation_steps=4 "
        r"on 1 process")):  # fmt: skip
        check_unchanged(run, now, False, "checkpoint-2")
    kept = now | {"training": {"sequences_per_step": 16}}
    assert check_unchanged(run, kept, False, "checkpoint-2")[0].startswith("processes: 2 -> 1: losses will agree up to")


def test_another_model_does_not_take_the_shards(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    trainer = tiny_trainer(tmp_path, max_steps=1, save_steps=1, eval_strategy="no", async_save=True)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    assert len(saved_tensors(checkpoint)) > 100 and find_problem(checkpoint) is None
    for changes, message in (
        ({"vocab_size": 80}, r"weights.model.embed_tokens.weight is \(64, 32\) torch.float32, here it is \(80, 32\)"),
        ({"num_nextn_predict_layers": 0}, "weights that the model lacks, e.g. weights.model.layers.2"),
        ({"num_hidden_layers": 4}, "holds 4 weights that the model lacks, e.g. weights.model.layers.2.eh_proj"),
        ({"n_shared_experts": 0}, "shared_experts"), ({"q_lora_rank": 8}, "weights that the model lacks, e.g. "),
    ):
        with pytest.raises(LayoutError, match=message):
            load_weights(checkpoint, tiny_model(tiny_config(tmp_path / "other"), **changes))
    (checkpoint / "optimizer_groups.pt").unlink()
    (checkpoint / "COMPLETE.json").unlink()
    with pytest.raises(IncompleteCheckpointError, match="no COMPLETE.json"):
        export_checkpoint(checkpoint, tmp_path / "plain")


@pytest.fixture
def one_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_plain_folder_is_read_into_a_sharded_model_layer_by_layer(tmp_path, monkeypatch, one_process_group):
    saved = tiny_model(tiny_config(tmp_path), seed=1)
    saved.save_pretrained(tmp_path / "plain", max_shard_size="20KB")  # layers lie in several files
    model, together = shard(tiny_model(tiny_config(tmp_path), seed=2), torch.device("cpu")), []
    load = elastic_checkpoints.load_full_state_dict
    watched = lambda m, state, **kwargs: together.append(list(state)) or load(m, state, **kwargs)
    monkeypatch.setattr(elastic_checkpoints, "load_full_state_dict", watched)
    elastic_checkpoints.load_plain_weights(tmp_path / "plain", model)
    assert weight_sums(model) == weight_sums(saved)
    assert sum(map(len, together)) == len({name for names in together for name in names})
    layers = [{name.split(".")[2] for name in names} for names in together if len(names) > 1]
    assert len(layers) == len(model.model.layers) and all(len(numbers) == 1 for numbers in layers)


def test_pieces_on_the_cpu_are_written_without_a_look_at_a_gpu(tmp_path, monkeypatch):
    """A thread's CUDA device is the first one, whichever the process trains on; its default stream that of training."""
    def touched(*_):
        raise AssertionError("the thread that writes has asked for a CUDA stream")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", touched)
    tensor, read = torch.arange(12.0).view(3, 4), torch.zeros(3, 4)
    write_pieces(tmp_path, {"x": Piece(tensor, (3, 4), (0, 0), True)}, None)
    read_pieces(tmp_path, {"x": Piece(read, (3, 4), (0, 0))})
    assert torch.equal(read, tensor)


def test_whole_tensors_are_dealt_out_evenly():
    pieces = {str(size): Piece(torch.zeros(size), (size,), (0,)) for size in (8, 5, 4, 3, 2)}
    pieces["part"] = Piece(torch.zeros(4), (8,), (4,), True)
    dealt = [deal_whole(pieces, rank, 2) for rank in (0, 1)]
    assert all(sum(each[name].owner for each in dealt) == 1 for name in pieces if name != "part")
    assert all(each["part"].owner for each in dealt)
    loads = [sum(piece.local.numel() for piece in each.values() if piece.owner) for each in dealt]
    assert loads == [11 + 4, 11 + 4]
