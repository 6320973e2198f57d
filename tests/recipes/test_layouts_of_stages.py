"""Every stage on two processes, under DDP, FSDP2 and expert parallelism, against one: losses, metrics, evaluation.

Slow, all of it. What each stage does on two processes under DDP is looked at more closely in its own tests.
"""

import hashlib
import json
import os
import shutil

import pytest
import torch
import trl

from recipes import distill, grpo
from recipes.logging_callbacks import read_metrics
from tests.recipes.processes import FSDP, run_ranks
from tests.recipes.tiny_stages import RECIPES, arguments, make_base

pytestmark = pytest.mark.slow

EP = ("--expert_parallel_size", "2")
LAYOUTS = {
    "ddp": ({}, ()), "ep": ({}, EP), "fsdp": (FSDP, ()),
    "fsdp x ep": (FSDP | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}, EP),
    "tp": ({}, ("--tensor_parallel_size", "2", "--save_strategy", "no", "--per_device_train_batch_size", "8")),
}  # fmt: skip
STUDENT = json.dumps({
    "model_type": "llama", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2,
})  # fmt: skip
DISTILL = ("--student_config", STUDENT, "--speed_tokens", "2", "--speed_prompts", "2")
OPTIONS = {
    "sft": ("--packing", "false"),
    "traces": (*DISTILL, "--packing", "false"),
    "logits": (*DISTILL, "--packing", "false", "--method", "logits"),
    "grpo": ("--num_generations", "4", "--preflight_prompts", "4", "--beta", "0.1", "--router_replay", "false"),
    "ppo": ("--router_replay", "false", "--num_mini_batches", "1"),  # a mini-batch's rows are drawn by each process
}
CLOCKS = ("tok/s", "mfu", "seconds", "lr", "eta")
OF_A_BATCH = ("eval reward std",)  # means over batches, whose size is that of a process


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def command(base, stage, folder, world, *more):
    """(the recipe, its arguments): eight rows a step, whatever the number of processes."""
    recipe = {"traces": distill, "logits": distill, "grpo": grpo}.get(stage) or RECIPES[stage]
    given = arguments(base, {"traces": "sft", "logits": "sft", "grpo": "ppo"}.get(stage, stage), folder)
    if stage == "grpo":
        given = given[: given.index("--num_ppo_epochs")] + given[given.index("--rewards") :]
        given += ["--max_completion_length", "8"]
    if recipe is distill:
        given = given[: given.index("--max_length")] if "--max_length" in given else given
        given[given.index("--model_name_or_path")] = "--teacher_model_name_or_path"
        given += ["--max_length", "96", "--device_peak_tflops", "0.1"]
    rows = ("--per_device_train_batch_size", str(8 // world), "--max_steps", "3", "--eval_steps", "2")
    return recipe, [*given, *rows, "--save_steps", "2", *OPTIONS.get(stage, ()), *more]


def scripted(trainer, prompt_ids, *args, **kwargs):
    """Completions in place of sampled ones, the same on any number of processes."""
    completions, group = [], trainer.num_generations
    for place, prompt in enumerate(prompt_ids):
        name = f"{list(map(int, prompt))} {place % group} {trainer.state.global_step}"
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
        generator = torch.Generator().manual_seed(seed)
        length = int(torch.randint(2, 8, (), generator=generator))
        completions.append(torch.randint(20, 300, (length,), generator=generator).tolist() + [trainer.eos_token_ids[0]])
    return completions, None


def run(base, stage, folder, world, layout="ddp", *options):
    environment, more = LAYOUTS[layout]

    def work(rank):
        trl.GRPOTrainer._generate_single_turn = scripted
        recipe, given = command(base, stage, folder, world, *more, *options)
        recipe.main(given)

    run_ranks(world, work, folder.parent / f"logs {folder.name}", environment, timeout_s=240)
    return [
        {name: value for name, value in record.items() if not name.endswith(CLOCKS) and name not in OF_A_BATCH}
        for record in read_metrics(folder / "metrics.jsonl") if record["kind"] in ("train", "eval")
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """Each stage on one process, once."""
    found = {}

    def of(stage):
        if stage not in found:
            found[stage] = run(base, stage, tmp_path_factory.mktemp("alone") / stage, 1)
        return found[stage]

    return of


@pytest.mark.parametrize("stage, layouts", [
    ("sft", ("ddp", "ep", "fsdp", "fsdp x ep", "tp")), ("reward", ("ddp", "fsdp x ep")), ("process", ("ddp", "fsdp")),
    ("grpo", ("ddp", "ep", "fsdp", "fsdp x ep")), ("ppo", ("ddp", "ep", "fsdp", "fsdp x ep")),
    ("traces", ("ddp", "fsdp")), ("logits", ("ddp", "fsdp")),
])  # fmt: skip
def test_two_processes_equal_one(base, alone, tmp_path, stage, layouts):
    expected = alone(stage)
    curve = [record["loss"] for record in expected if record["kind"] == "train"]
    assert len(set(curve)) == 3 and len(expected) > 3
    for layout in layouts:
        found = run(base, stage, tmp_path / layout, 2, layout)
        assert [r.keys() for r in found] == [r.keys() for r in expected]
        for mine, other in zip(found, expected):
            assert mine["kind"] == other["kind"]
            for name, value in other.items():
                if isinstance(value, str):
                    continue
                where = (layout, mine["kind"], mine["step"], name)
                assert mine[name] == pytest.approx(value, rel=1e-3, abs=2e-5), where
        assert (tmp_path / layout / "config.json").is_file() and (tmp_path / layout / "eval.json").is_file()


def test_a_reference_with_split_experts_follows_the_policy(base, tmp_path):
    """Loaded by name, moved at each step, kept whole by checkpoints and taken up from them."""
    follow = ("--beta", "0.5", "--sync_ref_model", "true", "--ref_model_sync_steps", "1", "--ref_model_mixup_alpha",
              "0.5", "--ref_model_name_or_path", str(base / "model"), "--save_only_model", "false")  # fmt: skip
    one = run(base, "grpo", tmp_path / "one", 1, "ddp", *follow)
    two = run(base, "grpo", tmp_path / "two", 2, "ep", *follow)
    kl = [record["kl"] for record in one if record["kind"] == "train"]
    assert kl[0] == 0 and min(kl[1:]) > 0
    assert [record["kl"] for record in two if record["kind"] == "train"] == pytest.approx(kl, rel=1e-3, abs=1e-7)
    files = [torch.load(tmp_path / name / "checkpoint-2/reference.pt") for name in ("one", "two")]
    torch.testing.assert_close(*files, rtol=1e-3, atol=2e-5)  # a step moves weights by 5e-3

    again = tmp_path / "again"
    shutil.copytree(tmp_path / "two", again, ignore=shutil.ignore_patterns("checkpoint-3", "metrics.jsonl"))
    found = run(base, "grpo", again, 2, "ep", *follow, "--resume_from_checkpoint", "true")
    last = [record for record in found if record["kind"] == "train"]
    assert [record["step"] for record in last] == [3] and last[0]["kl"] == pytest.approx(kl[2], rel=1e-3, abs=1e-7)


def test_what_a_stage_cannot_do_is_said_before_it_starts(base, tmp_path):
    """In the processes of a run: sizes are compared with their number."""

    def refused(stage, message, *more):
        recipe, given = command(base, stage, tmp_path / "no", 2, *more)
        with pytest.raises(ValueError, match=message):
            recipe.main(given)

    def work(rank):
        refused("sft", r"expert_parallel_size=3 must divide the 2 processes of this run; use one of \[1, 2\]",
                "--expert_parallel_size", "3")  # fmt: skip
        refused("sft", "expert_parallel_size=2 with tensor_parallel_size=2", *EP, "--tensor_parallel_size", "2")
        refused("sft", "eval_tasks=.*recipes/eval.py", *EP, "--eval_tasks", "chain_sum:1")
        refused("sft", "expert_parallel_size=2 with adapters", *EP, "--lora_rank", "2")
        refused("sft", "tensor_parallel_size=2 with checkpoints to resume from", "--tensor_parallel_size", "2")
        refused("traces", "expert_parallel_size=2: this stage is not made for it", *EP)
        refused("grpo", "tensor_parallel_size=2: this stage", "--tensor_parallel_size", "2")
        refused("pretrain", "expert_parallel_size=2 with ema_decay=0.9", *EP)
        os.environ.update(FSDP)
        refused("sft", "eval_tasks=.*spread over processes", "--eval_tasks", "chain_sum:1")

    run_ranks(2, work, tmp_path / "logs")
