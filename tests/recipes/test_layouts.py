"""The recipes' trainer under every layout against one process: losses, gradients, norms, loads, evaluation, weights."""

import os

import pytest
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from modeling_deepseek_r1.expert_parallel import is_expert_parallel
from modeling_deepseek_r1.expert_parallel_state import gather_full_state_dict
from recipes.logging_callbacks import read_metrics
from recipes.model_loading import spread
from tests.recipes.processes import FSDP, run_ranks
from tests.recipes.tiny_run import SIZES, tiny_config, tiny_model, tiny_trainer

# As recipes/launch/fsdp2_ep.yaml: each process has its own experts, and reads them itself.
FSDP_EP = FSDP | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
LAYOUTS = {
    "ddp": ({}, {}),
    "ep": ({}, {"expert_parallel_size": 2}),
    "fsdp": (FSDP, {}),
    "fsdp x ep": (FSDP_EP, {"expert_parallel_size": 2}),
    "tp": ({}, {"tensor_parallel_size": 2}),
}
ROWS = 4  # of a micro-batch, over all processes


class Gradients(TrainerCallback):
    """Keeps the whole gradients of the first step, which is not clipped; later ones are, hard."""

    def __init__(self, trainer):
        self.trainer, self.found = trainer, {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 0:
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            self.found = {name: whole_gradient(p) for name, p in model.named_parameters() if p.grad is not None}

    def on_step_end(self, args, state, control, **kwargs):
        args.max_grad_norm = 0.1


def whole_gradient(parameter):
    gradient = parameter.grad
    if hasattr(gradient, "full_tensor"):
        return gradient.full_tensor()
    if is_expert_parallel(parameter):
        parts = [torch.empty_like(gradient) for _ in range(dist.get_world_size(parameter.expert_parallel_group))]
        dist.all_gather(parts, gradient, group=parameter.expert_parallel_group)
        return torch.cat(parts)
    return gradient.clone()


def run(folder, layout="ddp", **changes):
    """Trains three steps of two micro-batches -> what to compare, the same on every rank but for the weights."""
    environment, settings = LAYOUTS[layout]
    for name in FSDP:
        os.environ.pop(name, None)
    os.environ.update(environment)
    settings = {
        "max_steps": 3, "eval_steps": 3, "save_strategy": "no", "max_grad_norm": 0.0, "check_processes": False,
        "model_config": dict(SIZES, n_routed_experts=8),
    } | settings | changes  # fmt: skip
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    settings["per_device_train_batch_size"] = ROWS * settings.get("tensor_parallel_size", 1) // world
    args = tiny_config(folder, **settings)
    trainer = tiny_trainer(folder, model=spread(args, tiny_model(args)), **settings)
    gradients = Gradients(trainer)
    trainer.add_callback(gradients)
    trainer.train()
    model, whole = trainer.accelerator.unwrap_model(trainer.model), None
    if world == 1:
        whole = model.state_dict()
    else:
        whole = gather_full_state_dict(model)
    loads = {layer: load / trainer._sharing for layer, load in model.expert_load.items()}
    biases = {layer: router.e_score_correction_bias for layer, router in model.routers.items()}
    return {"gradients": gradients.found, "weights": whole, "loads": loads, "biases": biases,
            "optimizer": type(trainer.optimizer.optimizer).__name__}  # fmt: skip


def records(folder):
    keys = ("loss", "grad", "mtp loss", "tokens", "bits/byte", "eval loss")
    return [{key: record[key] for key in keys if key in record} for record in read_metrics(f"{folder}/metrics.jsonl")]


def assert_close(found, expected, **tolerance):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text: f"{name}: {text}", check_dtype=False, **tolerance)


def compare(folder, layouts, **changes):
    """In a process of `run_ranks`: every layout against what one process left in `folder`/one."""
    expected = torch.load(f"{folder}/expected.pt")
    for layout in layouts:
        where = f"{folder}/{layout}"
        try:
            found = run(where, layout, **changes)
            # fp32: sums in another order, of some hundred terms.
            assert_close(found["gradients"], expected["gradients"], rtol=1e-4, atol=3e-6)
            assert set(found["gradients"]) == set(expected["gradients"])
            assert_close(found["loads"], expected["loads"], rtol=0, atol=0)
            assert_close(found["biases"], expected["biases"], rtol=0, atol=0)
            if dist.get_rank() == 0:
                assert_close(found["weights"], expected["weights"], rtol=0, atol=2e-4)  # AdamW divides by small moments
                one = records(f"{folder}/one")
                for ours, theirs in zip(records(where), one, strict=True):
                    assert ours == pytest.approx(theirs, rel=1e-5), layout
        except BaseException as error:
            raise AssertionError(f"{layout} on rank {dist.get_rank()}: {error!r}") from error


def expect(folder):
    """One process' run, in a process of its own, too: nothing of it is left here."""
    run_ranks(1, lambda rank: torch.save(run(f"{folder}/one"), f"{folder}/expected.pt"), f"{folder}/logs_one")


def test_two_processes_equal_one_under_every_layout(tmp_path):
    expect(tmp_path)
    run_ranks(2, lambda rank: compare(tmp_path, LAYOUTS), tmp_path / "logs")


@pytest.mark.slow
def test_four_processes_equal_one_under_every_layout(tmp_path):
    """Experts over two of four, so that each is there twice; tensors over two, and FSDP over the pairs."""
    expect(tmp_path)
    run_ranks(4, lambda rank: compare(tmp_path, LAYOUTS), tmp_path / "logs")
    run_ranks(4, lambda rank: compare(tmp_path, ("ep", "fsdp x ep"), expert_parallel_size=4), tmp_path / "logs_4")
