"""Every stage on two gloo processes: ranks that differ are named, runs end as they should, and go on on others."""

import contextlib
import json
import math
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from recipes import distill, grpo, ppo, pretrain, reward, run_results, sft
from recipes.checkpoint_files import find_problem
from recipes.process_checks import ProcessMismatchError
from tests.recipes import test_distill, test_grpo
from tests.recipes.processes import FSDP, run_ranks
from tests.recipes.test_resume_stages import no_report  # noqa: F401  (a fixture)
from tests.recipes.tiny_run import losses
from tests.recipes.tiny_stages import arguments, make_base

STAGES = {
    "pretrain": (pretrain, lambda base, folder: arguments(base, "pretrain", folder, "--ema_decay", "0")),
    "sft": (sft, lambda base, folder: arguments(base, "sft", folder, "--packing", "false")),
    "reward": (reward, lambda base, folder: arguments(base, "reward", folder)),
    "ppo": (ppo, lambda base, folder: arguments(base, "ppo", folder)),
    "grpo": (grpo, lambda base, folder: test_grpo.arguments(base, folder)),
    "distill": (distill, lambda base, folder: test_distill.arguments(
        base, "sft", folder, "--max_length", "96", *test_distill.DENSE, "--packing", "false")),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("stages"))


def start(stage, base, folder, *more, world=2, environment=None, of_rank=None):
    """The stage's command on `world` processes; `of_rank(rank)`: further arguments of one."""
    module, line = STAGES[stage]

    def work(rank):
        run_results.write_report = lambda folder: folder / "report.html"  # takes longer than the training
        module.main([*line(base, folder), *more, *(of_rank(rank) if of_rank else ())])

    run_ranks(world, work, f"{folder}_logs_{world}", environment, timeout_s=300)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_ranks_that_differ_are_named_before_the_first_step(stage, base, tmp_path):
    module, line = STAGES[stage]

    def work(rank):
        with pytest.raises(ProcessMismatchError, match="rank 1 from rank 0:\n  learning_rate: 0.5 on rank 1, 0.01 on"):
            module.main([*line(base, tmp_path / "run"), *(("--learning_rate", "0.5") if rank else ())])

    run_ranks(2, work, tmp_path / "logs", timeout_s=200)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_run_to_the_end(stage, base, tmp_path):
    folder = tmp_path / "run"
    start(stage, base, folder, "--per_device_train_batch_size", "4")
    curve = losses(folder)
    assert len(curve) >= 4 and all(math.isfinite(loss) for loss in curve.values())
    assert (folder / "model.safetensors").is_file() and json.loads((folder / "eval.json").read_text())
    assert find_problem(folder / "checkpoint-3") is None
    if stage not in ("reward", "distill"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_run_of_one_process_goes_on_on_two_and_in_shards(stage, base, tmp_path):
    """The curve of one process, within an epoch; the second half sharded, and saved beside training."""
    split = ("--eval_strategy", "no", "--num_train_epochs", "1", "--max_steps", "6", "--save_steps", "2")
    start(stage, base, tmp_path / "whole", *split, world=1)
    for world, batch, until, environment in ((1, "4", 2, None), (2, "2", 6, FSDP)):
        with stop_at(until):
            start(stage, base, tmp_path / "parts", *split, "--per_device_train_batch_size", batch,
                  "--resume_from_checkpoint", "auto", "--async_save", "true", world=world, environment=environment)
    found, expected = losses(tmp_path / "parts"), losses(tmp_path / "whole")
    assert found.keys() == expected.keys() == set(range(1, 7))
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-5)
    shards = {path.name for path in (tmp_path / "parts" / "checkpoint-6" / "shards").glob("*.distcp")}
    assert shards == {"__0_0.distcp", "__1_0.distcp"} and (tmp_path / "parts" / "model.safetensors").is_file()


@contextlib.contextmanager
def stop_at(step):
    """Runs that begin in the block end after that step."""
    from recipes.logging_callbacks import RunLogCallback

    def end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step >= step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLogCallback, "on_step_end", end)
        yield


ROLLOUT = ("--num_ppo_epochs", "1", "--num_mini_batches", "2", "--eval_strategy", "no", "--max_steps", "6")


@pytest.mark.slow
def test_ppo_goes_on_on_other_processes_between_rollouts(base, tmp_path):
    """Rollouts of two steps; within one the parts belong to their processes."""
    folder = tmp_path / "run"
    with stop_at(4):
        start("ppo", base, folder, *ROLLOUT, "--save_steps", "1", "--per_device_train_batch_size", "2")
    more = ("--per_device_train_batch_size", "4", "--resume_from_checkpoint")

    def refused(rank):
        with pytest.raises(ValueError, match="checkpoint-3 lies within a rollout, of which each of 2 processes holds"):
            ppo.main([*STAGES["ppo"][1](base, tmp_path / "other"), *ROLLOUT, *more, str(folder / "checkpoint-3")])

    run_ranks(1, refused, tmp_path / "logs")
    start("ppo", base, folder, *ROLLOUT, *more, "true", world=1)
    assert losses(folder).keys() == set(range(1, 7)) and Path(folder / "value_head.safetensors").is_file()
