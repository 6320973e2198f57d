"""DeepSpeed's ZeRO-2 and ZeRO-3: what the recipes say to it and read from it; with DeepSpeed, the stages on two
processes against one, sampling, and resumed runs."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modeling_deepseek_r1.decoding import changed_module, gathered, sharded
from recipes.distill_config import DistillRecipeConfig
from recipes.logging_callbacks import read_metrics
from recipes.sampling import is_spread
from recipes.sft_config import SFTRecipeConfig
from recipes.stage_results import sizes_of
from recipes.zero_setup import (
    check_zero_checkpoint,
    ready_for_zero,
    saved_by_zero,
    whole_shape,
    whole_size,
    zero_stage,
)
from tests.recipes.processes import ZERO, run_ranks
from tests.recipes.test_layouts_of_stages import command, scripted
from tests.recipes.tiny_run import tiny_config, tiny_model
from tests.recipes.tiny_stages import make_base

# ---------------------------------------------------------------- without DeepSpeed


def leave_empty(parameter):
    """What ZeRO-3 makes of a parameter until it gathers it."""
    parameter.ds_id, parameter.ds_shape = 1, parameter.shape
    parameter.data = torch.empty(0)


def plugin(stage, **enabled):
    config = SimpleNamespace(is_true=lambda name: enabled.get(name.partition(".")[0], False))
    return SimpleNamespace(zero_stage=stage, hf_ds_config=config)


def test_sizes_of_a_spread_model(tmp_path):
    model = tiny_model(tiny_config(tmp_path))
    expected, shapes = sizes_of(model), [tuple(p.shape) for p in model.parameters()]
    for parameter in model.parameters():
        leave_empty(parameter)
    assert sizes_of(model) == expected and [whole_shape(p) for p in model.parameters()] == shapes
    assert sum(map(whole_size, model.parameters())) == int(expected["parameters"].replace(",", ""))


def test_the_fast_path_serves_a_gathered_model_only(tmp_path):
    model = tiny_model(tiny_config(tmp_path))
    values = {parameter: parameter.data for parameter in model.parameters()}
    refusal = lambda: model.decoding_refusal(torch.ones(1, 2, dtype=torch.long), model.generation_config, True, {})
    assert sharded(model) is None and not gathered(model) and "sharded over processes" in refusal()
    for parameter in values:
        leave_empty(parameter)
    assert sharded(model) == "model.embed_tokens.weight" and "sharded over processes" in refusal() and is_spread(model)
    for parameter, value in values.items():
        parameter.data = value
    assert gathered(model) and refusal() is None

    def hook(*args):
        return None

    hook.__module__ = "deepspeed.runtime.engine"
    model.register_forward_pre_hook(hook)  # what stays on the whole model when DeepSpeed's others are removed
    assert changed_module(model) is None
    own = model.model.norm.register_forward_pre_hook(hook)
    assert "model.norm has hooks" in changed_module(model)
    own.remove()
    model.register_forward_pre_hook(lambda *args: None)
    assert changed_module(model) == "the model has hooks"


def test_what_deepspeed_is_given(tmp_path):
    """Layers as wholes; what is new goes to the dtype of the rest, buffers keep theirs."""
    model = tiny_model(tiny_config(tmp_path))
    model.value_head = nn.Linear(4, 1)
    old = model.model.norm.weight
    old.ds_id = 1
    model.model.layers[1].mlp.gate.e_score_correction_bias.fill_(0.1)
    accelerator = SimpleNamespace(device=torch.device("cpu"), state=SimpleNamespace(deepspeed_plugin=plugin(2)))
    ready_for_zero(model, accelerator)
    leaves = [name for name, module in model.named_modules() if getattr(module, "_z3_leaf", False)]
    assert leaves == [f"model.layers.{place}" for place in range(3)]  # the last one for multi-token prediction
    assert model.value_head.weight.dtype == torch.float32
    accelerator.state.deepspeed_plugin = plugin(3, bf16=True)
    ready_for_zero(model, accelerator)
    assert model.value_head.weight.dtype == torch.bfloat16 and old.dtype == torch.float32
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32


def checkpoint(folder, stage, processes):
    states = folder / "global_step2"
    states.mkdir(parents=True)
    for rank in range(processes):
        (states / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
        name = f"zero_pp_rank_{rank}_mp_rank_00" if stage == 3 else "mp_rank_00"
        (states / f"{name}_model_states.pt").touch()
    (folder / "latest").write_text("global_step2")
    return folder


def test_checkpoints_that_cannot_be_resumed_are_named(tmp_path):
    two, three = checkpoint(tmp_path / "two", 2, 4), checkpoint(tmp_path / "three", 3, 2)
    plain = tmp_path / "plain"
    plain.mkdir()
    assert [saved_by_zero(each) for each in (two, three, plain)] == [(2, 4), (3, 2), (0, 0)]
    for folder, stage, processes in ((two, 2, 4), (three, 3, 2), (plain, 0, 7)):
        check_zero_checkpoint(folder, stage, processes)
    for folder, stage, processes, message in (
        (two, 2, 2, "ZeRO-2 on 4 processes.*on 2; go on with zero2.yaml --num_processes 4, or start a new run"),
        (two, 3, 4, "ZeRO-2 on 4 processes.*for ZeRO-3 on 4"),
        (three, 0, 1, "ZeRO-3 on 2 processes.*a run without DeepSpeed on 1"),
        (plain, 3, 2, "plain was not written under DeepSpeed.*go on without zero3.yaml, or start"),
    ):
        with pytest.raises(ValueError, match=message):
            check_zero_checkpoint(folder, stage, processes)


def test_stages_that_need_whole_weights(tmp_path):
    """Said by the settings alone."""
    given = {"output_dir": str(tmp_path), "dataset_name": "x", "use_cpu": True}
    args = SFTRecipeConfig(model_name_or_path="m", **given)
    args.deepspeed_plugin, args.eval_tasks = plugin(3), ["chain_sum"]
    assert zero_stage(args) == 3
    with pytest.raises(ValueError, match="eval_tasks=.*spread over processes.*recipes/eval.py"):
        args.check_tasks()
    args.deepspeed_plugin = plugin(2)
    args.check_tasks()
    given |= {"teacher_model_name_or_path": "m", "model_name_or_path": "s"}
    for changes, message in (({"method": "logits"}, "method=logits .*use zero2.yaml, or method=traces"),
                             ({"method": "on_policy"}, "method=on_policy .*use zero2.yaml, or method=traces")):
        args = DistillRecipeConfig(**given, **changes)
        args.deepspeed_plugin = plugin(3)
        with pytest.raises(ValueError, match=message):
            args.check_zero()
        args.deepspeed_plugin = plugin(2)
        args.check_zero()


# ---------------------------------------------------------------- with DeepSpeed, on gloo


CLOCKS = ("tok/s", "mfu", "seconds", "lr", "eta", "megabytes")
OPTIONS = {"pretrain": ("--ema_decay", "0")}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    pytest.importorskip("deepspeed")
    return make_base(tmp_path_factory.mktemp("base"))


def run(base, stage, folder, world, zero=None, *options, sampled=False):
    """The records of three steps of a stage, but for clocks."""
    environment = {} if zero is None else ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(zero)}

    def work(rank):
        import trl

        if not sampled:
            trl.GRPOTrainer._generate_single_turn = scripted
        recipe, given = command(base, stage, folder, world, *OPTIONS.get(stage, ()), *options)
        recipe.main(given)

    run_ranks(world, work, folder.parent / f"logs {folder.name}", environment, timeout_s=400)
    return [
        {name: value for name, value in record.items() if not name.endswith(CLOCKS) and name != "eval reward std"}
        for record in read_metrics(folder / "metrics.jsonl") if record["kind"] in ("train", "eval")
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("stage, stages", [
    ("pretrain", (2, 3)), ("sft", (2, 3)), ("reward", (2, 3)), ("process", (3,)), ("grpo", (2, 3)), ("ppo", (2, 3)),
    ("logits", (2,)),
])  # fmt: skip
def test_two_processes_equal_one(base, tmp_path, stage, stages):
    expected = run(base, stage, tmp_path / "one", 1)
    for zero in stages:
        found = run(base, stage, tmp_path / f"zero{zero}", 2, zero)
        assert [record.keys() for record in found] == [record.keys() for record in expected]
        for mine, other in zip(found, expected):
            for name, value in other.items():
                if not isinstance(value, (str, dict, list)):
                    where = (zero, mine["kind"], mine["step"], name)
                    assert mine[name] == pytest.approx(value, rel=1e-3, abs=2e-5), where
        assert (tmp_path / f"zero{zero}" / "model.safetensors").is_file()


@pytest.mark.slow
def test_grpo_samples_by_the_fast_path_and_replays_routes(base, tmp_path):
    """Its parameters gathered for a rollout; the library's loop records no routes, which would be an error here."""
    found = run(base, "grpo", tmp_path / "run", 2, 3, "--router_replay", "true", sampled=True)
    assert len([record for record in found if record["kind"] == "train"]) == 3
    assert {record["routes differ"] for record in found if record["kind"] == "train"} == {0.0}


@pytest.mark.slow
@pytest.mark.parametrize("zero", (2, 3))
def test_a_run_goes_on_where_it_was(base, tmp_path, zero):
    folder = tmp_path / "run"
    whole = {r["step"]: r["loss"] for r in run(base, "sft", folder, 2, zero) if r["kind"] == "train"}
    shutil.rmtree(folder / "checkpoint-3")
    os.remove(folder / "metrics.jsonl")
    rest = run(base, "sft", folder, 2, zero, "--resume_from_checkpoint", "true")
    assert {r["step"]: r["loss"] for r in rest if r["kind"] == "train"} == {3: whole[3]}

    def refused(rank):
        recipe, given = command(base, "sft", folder, 1, "--resume_from_checkpoint", "true")
        with pytest.raises(ValueError, match=f"written under ZeRO-{zero} on 2 processes"):
            recipe.main(given)

    run_ranks(1, refused, tmp_path / "logs refused")
