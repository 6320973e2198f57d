"""The planner: what it proposes, that its command is one the recipes take, its errors, and the committed table."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import recipes
from benchmarks.train_cases import REFERENCE, our_config
from recipes.launch_cards import cards_table
from recipes.launch_layouts import LAYOUTS, check_divides, check_global_batch
from recipes.launch_memory import Work, footprint, model_shape
from recipes.launch_plan import Batch, Machine, candidates, choose, micro_batches
from recipes.plan_launch import arguments, plan
from recipes.pretrain_config import PretrainConfig, parse_config
from recipes.sizing import GIB

ROOT = Path(recipes.__file__).parents[1]
SMALL, BASE = (str(ROOT / "recipes" / "configs" / f"pretrain_{name}.yaml") for name in ("small", "base"))


@pytest.fixture(scope="module")
def reference():
    return model_shape(our_config(REFERENCE))


def planned(*argv):
    return plan(*arguments(list(argv)))


def proposal(text):
    return re.search(r"^proposed  (.*)$", text, re.M)[1], text.strip().splitlines()[-1]


@pytest.mark.parametrize("argv, layout", [
    ((SMALL, "--gpus", "1", "--gpu_memory_gib", "80"), "one_gpu"),
    ((SMALL, "--gpus", "8", "--gpu_memory_gib", "23.6"), "ddp"),
    ((BASE, "--gpus", "8", "--gpu_memory_gib", "80"), "fsdp2"),
    ((BASE, "--gpus", "8", "--gpu_memory_gib", "48"), "fsdp2 + checkpointing"),
    ((BASE, "--gpus", "4", "--gpu_memory_gib", "24"), "fsdp2_checkpointing"),
    ((BASE, "--gpus", "8", "--gpu_memory_gib", "80", "--nodes", "2"), "several_nodes"),
])  # fmt: skip
def test_proposals(argv, layout):
    text = planned("--config", *argv)
    name, line = proposal(text)
    assert name == layout
    words = shlex.split(line)
    assert (ROOT / words[words.index("--config_file") + 1]).is_file()
    stage = next(i for i, word in enumerate(words) if word.endswith("pretrain.py"))
    given = words[stage + 1 :]
    args, asked = parse_config(PretrainConfig, [*given, "--use_cpu"]), parse_config(
        PretrainConfig, ["--config", argv[0], "--use_cpu"])  # fmt: skip
    devices = int(argv[2]) * (2 if "--nodes" in argv else 1)
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * devices
    assert rows == asked.per_device_train_batch_size * asked.gradient_accumulation_steps
    assert bool(args.activation_checkpointing) == ("checkpointing" in layout)


def test_what_is_proposed_fits_and_what_is_quicker_does_not(reference):
    machine, batch = Machine(2, 1, 40 * GIB), Batch(16, 4096, masters=True)
    found = candidates(reference, machine, batch)
    best = choose(found, machine)
    assert best.memory.peak <= 0.92 * 40 * GIB
    for each in found[: found.index(best)]:
        assert each.problem
    work = Work(2 * best.rows, 4096, True, best.checkpointing, best.accumulation > 2)
    larger = footprint(reference, best.layout, 2, work)
    assert not larger.fits(machine.device_bytes) or 16 % (4 * best.rows) or 2 * best.rows * 4096 > 32768


def test_settings_change_the_plan():
    weights = ("--config", BASE, "--gpus", "8", "--gpu_memory_gib", "80")
    assert "fp32 masters" in planned(*weights)
    assert "parameters, bf16\n" in planned(*weights, "--weights_dtype", "bfloat16")
    assert "512 rows" in planned(*weights, "--global_batch", "512")


def test_shares_by_hand(reference):
    total, work = reference.total, Work(1, 4096)
    parts = {name: footprint(reference, LAYOUTS[name], 8, work).parts for name in ("ddp", "fsdp2", "zero2", "zero3")}
    assert total == 1_812_823_040 and reference.experts == 11 * 64 * 3 * 704 * 1024
    assert parts["ddp"]["optimizer states"] == 8 * total and parts["fsdp2"]["optimizer states"] == total
    assert parts["ddp"]["buffers"] > 4 * total > parts["fsdp2"]["buffers"]  # gradients in buckets
    assert parts["zero2"]["parameters"] == int(2.5 * total) and parts["zero3"]["parameters"] == int(0.75 * total)
    offloaded = footprint(reference, LAYOUTS["fsdp2_checkpointing"], 8, work)
    assert offloaded.host == 2 * total and not offloaded.parts["parameters"]


def test_gradient_accumulation_keeps_gradients(reference):
    once, twice = (
        footprint(reference, LAYOUTS["one_gpu"], 1, Work(1, 1024, accumulates=kept)) for kept in (False, True)
    )
    moving = once.parts["activations"] + max(once.parts["logits"], once.parts["backward of a layer"])
    kept = twice.parts["gradients"]
    assert twice.peak - once.peak == pytest.approx(kept + moving - max(moving, once.parts["gradients"]))
    assert kept == 4 * reference.total  # added up in fp32; else bf16, but for embedding and head
    assert once.parts["gradients"] == 2 * reference.total + 2 * 2 * 65536 * 1024


def test_micro_batches():
    assert micro_batches(12, 1024) == [12, 6, 4, 3, 2, 1]
    assert micro_batches(12, 8192) == [4, 3, 2, 1]
    assert micro_batches(3, 65536) == [1]


@pytest.mark.parametrize("argv, message", [
    (("--gpus", "8", "--gpu_memory_gib", "80", "--global_batch", "60"),
     "global_batch=60 rows .* by 8 data-parallel ranks; use --global_batch 56 or 64, or 6 or 10 ranks"),
    (("--gpus", "3", "--gpu_memory_gib", "80", "--launch_file", "fsdp2_ep"),
     "gpus=3 does not divide n_routed_experts=32; use gpus=2 or 4"),
    (("--gpus", "2", "--gpu_memory_gib", "80", "--launch_file", "recipes/launch/ddp.yaml"),
     "num_processes=8 .* there are 2 GPUs; add --num_processes 2"),
    (("--gpus", "2", "--gpu_memory_gib", "80", "--launch_file", "pipeline"), "launch_file='pipeline' must be one of"),
    (("--gpus", "2", "--gpu_memory_gib", "80", "--launch_file", "one_gpu"), "one_gpu uses 1; use ddp or fsdp2"),
    (("--gpus", "1", "--gpu_memory_gib", "80", "--launch_file", "ddp"), "gpus=1: ddp spreads work over at least 2"),
    (("--gpus", "8", "--gpu_memory_gib", "80", "--nodes", "2", "--launch_file", "zero3"), "nodes=2: zero3 is for one"),
    (("--gpus", "1", "--gpu_memory_gib", "2"), "of 2.0 GiB do not suffice; the least is .* GiB a GPU; take more"),
    (("--gpus", "2", "--gpu_memory_gib", "-1"), "gpu_memory_gib=-1.0 must be positive"),
])  # fmt: skip
def test_errors(argv, message):
    with pytest.raises(ValueError, match=message):
        planned("--config", SMALL, *argv)


def test_nearest_numbers():
    with pytest.raises(ValueError, match="gpus=512 does not divide n_routed_experts=64; use gpus=64$"):
        check_divides("n_routed_experts", 64, "gpus", 512)
    with pytest.raises(ValueError, match="use --global_batch 16, or 8 ranks"):
        check_global_batch(8, 16)
    check_divides("n_routed_experts", 64, "gpus", 16)
    check_global_batch(64, 16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    text = planned("--config", SMALL)
    assert "recipes/launch/cpu.yaml" in text and "--per_device_train_batch_size 8 " in text
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert planned("--config", SMALL).splitlines()[-1].startswith("python recipes/pretrain.py")
    with pytest.raises(ValueError, match="gpus=2: this machine has none .* add --gpu_memory_gib"):
        planned("--config", SMALL, "--gpus", "2")
    with pytest.raises(ValueError, match="launch_file='fsdp2' needs GPUs and gpus=0; use recipes/launch/cpu.yaml"):
        planned("--config", SMALL, "--launch_file", "fsdp2")


def test_layouts_that_the_recipes_lack_are_never_proposed():
    missing = [name for name, layout in LAYOUTS.items() if layout.missing()]
    assert set(missing) <= {"fsdp2_ep", "tensor_parallel", "context_parallel"}
    for name in missing:
        with pytest.raises(ValueError, match="do not suffice"):
            planned("--config", SMALL, "--gpus", "2", "--gpu_memory_gib", "80", "--launch_file", name)


def test_the_committed_table_is_the_command_s():
    text = (ROOT / "docs" / "launch.md").read_text()
    assert cards_table() in text, "run python recipes/plan_launch.py --cards and put its output into docs/launch.md"


def test_the_committed_peaks_are_the_formula_s(reference):
    text = (ROOT / "docs" / "launch.md").read_text()
    for title, masters in (("bf16", False), ("fp32 masters, bf16 compute", True)):
        peak = footprint(reference, LAYOUTS["one_gpu"], 1, Work(4, 4096, masters)).peak / GIB
        assert f"| {title} | {peak:.1f} GiB |" in text
