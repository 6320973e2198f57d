"""Every stage stopped at awkward steps and resumed: the same records and weights, bit for bit; the best model at its
end; and a real kill -9 of each recipe's process."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from transformers import set_seed

from recipes.checkpoint_files import find_problem, list_checkpoints
from recipes.logging_callbacks import RunLogCallback
from tests.recipes.tiny_ppo import one_thread  # noqa: F401  (a fixture)
from tests.recipes.tiny_stages import RECIPES, arguments, differences, make_base, same_tensors, without_clocks

BEST = ("--load_best_model_at_end", "true", "--save_total_limit", "1", "--metric_for_best_model")
LORA = ("--lora_rank", "2", "--lora_groups", "attention", "routed_experts")
# Metrics are turned so that the best model is not the last one.
CASES = {  # stage, options, after which steps the run stops
    # the second pass over the text, its rows and those of the first read as a stream
    "pretrain": ("pretrain", ("--streaming", "true", *BEST, "bits_per_byte", "--greater_is_better", "true"), (4, 7)),
    # two micro-batches a step, noise on the embeddings; the second epoch; an interval of the log across a checkpoint
    "sft": ("sft", ("--gradient_accumulation_steps", "2", "--neftune_noise_alpha", "5", "--packing", "false",
                    "--logging_steps", "2", *BEST, "loss", "--greater_is_better", "true"), (4, 7)),
    "sft, adapters": ("sft", (*LORA, "--optimizer", "muon", *BEST, "loss", "--greater_is_better", "true"), (5,)),
    # checkpoint-6 is at the end of an epoch
    "reward": ("reward", ("--per_device_train_batch_size", "6", "--logging_steps", "2", "--optimizer", "muon", *BEST,
                          "accuracy"), (4, 7)),
    "reward, adapters": ("reward", (*LORA, *BEST, "accuracy"), (5,)),
    "process": ("process", (*BEST, "loss", "--greater_is_better", "true"), (5,)),
    # rollouts of four steps, two an epoch: stopped in the middle of one, and in the second epoch
    "ppo": ("ppo", ("--optimizer", "muon", "--value_learning_rate", "2e-2", "--validation_fraction", "0.6",
                    "--max_steps", "10", "--kl_target", "0.01", "--logging_steps", "2",
                    *BEST, "reward", "--greater_is_better", "true"), (3, 9)),
    # between two rollouts
    "ppo, adapters": ("ppo", (*LORA, "--ema_decay", "0.9", "--save_steps", "4", "--eval_steps", "4",
                              "--value_function", "separate", *BEST, "reward", "--greater_is_better", "false"), (4,)),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module", autouse=True)
def no_report():
    """Runs without report.html, which takes as long as their training."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("reward_results", "run_results"):
            patch.setattr(f"recipes.{module}.write_report", lambda folder: folder / "report.html")
        yield


@contextlib.contextmanager
def stopped_after(step):
    """Inside the block a run ends, as by a Ctrl-C, right after that optimizer step, its log and its checkpoint."""

    def stop(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLogCallback, "on_step_begin", stop)
        with pytest.raises(KeyboardInterrupt):
            yield


def launch(base, case, folder, *more):
    stage, options, _ = CASES[case]
    set_seed(random.randrange(2**31))  # whatever was drawn before must not matter
    return RECIPES[stage].main(arguments(base, stage, folder, *options, *more))


@pytest.fixture(scope="module", params=CASES)
def finished(request, base, tmp_path_factory):
    """(case, folder, results) of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return request.param, folder, launch(base, request.param, folder)


def test_a_resumed_run_is_the_uninterrupted_one(finished, base, tmp_path):
    case, folder, results = finished
    for step in CASES[case][2]:
        with stopped_after(step):
            launch(base, case, tmp_path, "--resume_from_checkpoint", "auto")
    # Once more, as after a kill in the last evaluation, which samples: nothing is left to train.
    for _ in range(2 if case == "ppo" else 1):
        again = launch(base, case, tmp_path, "--resume_from_checkpoint", "true")
        assert differences(tmp_path, folder) == []
        assert without_clocks(again) == without_clocks(results)


def test_the_best_model_is_loaded_and_kept(finished):
    case, folder, _ = finished
    kept = list_checkpoints(folder)
    newest = kept[-1][1]
    state = json.loads((newest / "trainer_state.json").read_text())
    best = folder / f"checkpoint-{state['best_global_step']}"
    assert {path for _, path in kept} == {best, newest} and best != newest
    assert all(find_problem(path) is None for _, path in kept)
    names = [path.name for path in best.glob("*.safetensors") if path.name != "ema.safetensors"]
    assert ("value_head.safetensors" in names) == case.startswith("ppo")
    assert ("adapter_model.safetensors" in names) == ("adapters" in case)
    for name in names:
        assert same_tensors(folder / name, best / name), name
        assert not same_tensors(folder / name, newest / name), name


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sft", "reward", "ppo"])
def test_kill_9_while_a_checkpoint_is_written(case, base, tmp_path):
    """The recipe's own process, killed as soon as the folder of its second checkpoint is there."""
    stage, options, _ = CASES[case]
    run = tmp_path / "run"
    command = [sys.executable, RECIPES[stage].__file__, *arguments(base, stage, run, *options)]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        deadline = time.monotonic() + 120
        while not (run / "checkpoint-6").is_dir() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
        complete = [path.name for _, path in list_checkpoints(run) if find_problem(path) is None]
        assert complete in (["checkpoint-3"], ["checkpoint-3", "checkpoint-6"])
        resume = [*command, "--resume_from_checkpoint", "true"]
        subprocess.run(resume, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    launch(base, case, tmp_path / "whole")
    assert differences(run, tmp_path / "whole") == []
