"""The recipes' trainer under every layout against one process: losses, gradients, norms, loads, evaluation, weights."""

import os
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_gather
from torch.distributed.tensor import DTensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, TrainerCallback
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_deepseek_r1.expert_parallel import is_expert_parallel
from modeling_deepseek_r1.expert_parallel_state import gather_full_state_dict
from modeling_deepseek_r1.fused import set_fused_kernels
from recipes.logging_callbacks import read_metrics
from recipes.model_loading import check_spread, spread
from recipes.packed_rows import PackedRows
from tests.recipes.processes import FSDP, run_ranks
from tests.recipes.test_row_order import stop_after
from tests.recipes.tiny_run import LENGTH, SIZES, RandomRows, losses, tiny_config, tiny_model, tiny_trainer

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
        self.trainer, self.found, self.reduced = trainer, {}, set()

    def _sharded(self):
        parameters = self.trainer.accelerator.unwrap_model(self.trainer.model).named_parameters()
        return {name for name, p in parameters if isinstance(p, DTensor) and p.grad is not None}

    def on_substep_end(self, args, state, control, **kwargs):
        self.reduced = self._sharded()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer._sharded_here:
            assert self._sharded() == self.reduced, "gradients lie whole on each process between micro-batches"
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


def enter(layout):
    """Sets what the launch file would; -> the settings."""
    environment, settings = LAYOUTS[layout]
    for name in FSDP:
        os.environ.pop(name, None)
    os.environ.update(environment)
    return settings


def build(folder, settings):
    """A trainer with `ROWS` rows a micro-batch over all processes."""
    rows = ROWS * settings.get("tensor_parallel_size", 1) // int(os.environ["WORLD_SIZE"])
    settings = settings | {"per_device_train_batch_size": rows}
    args = tiny_config(folder, **settings)
    return tiny_trainer(folder, model=spread(args, tiny_model(args)), **settings)


def run(folder, layout="ddp", **changes):
    """Trains three steps of two micro-batches -> what to compare, the same on every rank but for the weights."""
    settings = enter(layout)
    settings = {
        "max_steps": 3, "eval_steps": 3, "save_strategy": "no", "max_grad_norm": 0.0, "check_processes": False,
        "model_config": dict(SIZES, n_routed_experts=8),
    } | settings | changes  # fmt: skip
    trainer, world = build(folder, settings), int(os.environ["WORLD_SIZE"])
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
        say = lambda text: f"{name}: {text}"
        torch.testing.assert_close(found[name], value, msg=say, check_dtype=False, **tolerance)


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


@pytest.mark.parametrize("name, size, changes, message", [
    ("expert_parallel_size", 4, {"n_routed_experts": 6}, r"must divide n_routed_experts=6; use one of \[1, 2\] on 8"),
    ("expert_parallel_size", 2, {"n_routed_experts": None}, "must divide n_routed_experts=None; use 1 on 8"),
    ("tensor_parallel_size", 4, {"num_attention_heads": 4, "intermediate_size": 6}, "intermediate_size=6; use one of"),
])  # fmt: skip
def test_sizes_that_the_model_cannot_be_divided_by(name, size, changes, message):
    config = CONFIG_MAPPING["deepseek_r1"](**(SIZES | changes))
    args = SimpleNamespace(world_size=8, **{name: size})
    with pytest.raises(ValueError, match=f"{name}={size} .*{message}"):
        check_spread(args, config)
    config.model_type = "llama"
    with pytest.raises(ValueError, match=f"{name}={size} is for DeepSeek models, this is a llama"):
        check_spread(args, config)


def test_two_processes_equal_one(tmp_path):
    """Those that no other test of seconds looks at; the others are in the slow one below."""
    expect(tmp_path)
    run_ranks(2, lambda rank: compare(tmp_path, ("ep", "fsdp x ep", "tp")), tmp_path / "logs")


@pytest.mark.slow
def test_four_processes_equal_one_under_every_layout(tmp_path):
    """Experts over two of four, so that each is there twice; tensors over two, and FSDP over the pairs."""
    expect(tmp_path)
    run_ranks(4, lambda rank: compare(tmp_path, LAYOUTS), tmp_path / "logs")
    run_ranks(4, lambda rank: compare(tmp_path, ("ep", "fsdp x ep"), expert_parallel_size=4), tmp_path / "logs_4")


# ---------------------------------------------------------------- resume


def train_until(folder, step, layout="ddp", last=5, **changes):
    """Goes on with the run in `folder` up to `step`; at the last one saves the model."""
    trainer = build(folder, {
        "max_steps": last, "save_steps": 2, "eval_strategy": "no", "resume_from_checkpoint": "auto",
        "check_processes": False, "model_config": dict(SIZES, n_routed_experts=8), **enter(layout), **changes,
    })  # fmt: skip
    if step < last:
        stop_after(trainer, step)
    trainer.train()
    if step == last:
        trainer.save_model()


PATH = (("ep", 2), ("ddp", 1), ("fsdp x ep", 4), ("ep", 4), ("fsdp", 2))


@pytest.mark.slow
def test_a_run_goes_on_under_other_layouts(tmp_path):
    """One step a layout, from each other's checkpoints: the curve and the model of a run that nobody interrupted."""
    run_ranks(1, lambda rank: train_until(tmp_path / "one", 5), tmp_path / "logs")
    for step, (layout, world) in enumerate(PATH, start=1):
        work = lambda rank: train_until(tmp_path / "many", step, layout, save_steps=1)
        run_ranks(world, work, tmp_path / f"logs_{step}")
    curves = [losses(tmp_path / name) for name in ("one", "many")]
    assert curves[1] == pytest.approx(curves[0], rel=2e-6) and set(curves[1]) == set(range(1, 6))
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "many"))
    assert_close(many.state_dict(), one.state_dict(), rtol=0, atol=1e-4)
    files = [{path.name for path in (tmp_path / name).iterdir() if path.is_file()} for name in ("one", "many")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_a_tensor_parallel_run_saves_plain_folders(tmp_path):
    changes = {"save_only_model": True, "save_steps": 4, "resume_from_checkpoint": None}
    run_ranks(1, lambda rank: train_until(tmp_path / "one", 5), tmp_path / "logs")
    run_ranks(2, lambda rank: train_until(tmp_path / "two", 5, "tp", **changes), tmp_path / "logs_2")
    for folder, other in (("two", "one"), ("two/checkpoint-4", "one/checkpoint-4")):
        models = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in (folder, other)]
        assert_close(*models, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- context parallelism

CUT = FSDP | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2",
              "PARALLELISM_CONFIG_CP_COMM_STRATEGY": "alltoall"}  # fmt: skip


class OneDocument(RandomRows):
    """No row has an end of a document in it."""

    def __init__(self, rows, seed=0, stride=None):
        self._ids = numpy.random.default_rng(seed).integers(0, SIZES["vocab_size"], rows * LENGTH)
        only = numpy.zeros(1, numpy.int16)
        PackedRows.__init__(self, len(self._ids), only, only + 3 * rows * LENGTH, only, ["all"], LENGTH, stride)


def ring_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, is_causal=None, **kwargs):
    """What torch's ring attention computes, which has no kernels for CPUs; rows are whole in evaluation."""
    order = torch.arange(LENGTH)
    if module.training:
        assert attention_mask is None and is_causal and query.shape[2] == LENGTH // 2
        order = order.view(4, -1)[[0, 3, 1, 2]].flatten()  # each process has one part of the front and one of the back
        query, key, value = (torch.cat(all_gather(part.contiguous()), 2)[:, :, order.argsort()]
                             for part in (query, key, value))  # fmt: skip
    scores = query @ key.transpose(2, 3) * scaling
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
    output = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value)[:, :, order]
    if module.training:
        output = output.chunk(2, 2)[dist.get_rank()]
    return output.transpose(1, 2), None


def train_cut(folder, **changes):
    settings = {
        "max_steps": 3, "eval_steps": 3, "save_strategy": "no", "check_processes": False,
        "model_config": dict(SIZES, mtp_loss_coef=0.0, seq_aux_loss_alpha=0.0), "per_device_train_batch_size": 2,
    } | changes  # fmt: skip
    set_fused_kernels(False)
    args = tiny_config(folder, **settings)
    model = tiny_model(args)
    model.freeze_mtp()
    tiny_trainer(folder, model=model, train_dataset=OneDocument(20), eval_dataset=OneDocument(5, 1, LENGTH - 1),
                 **settings).train()  # fmt: skip


@pytest.mark.slow
def test_rows_cut_over_two_processes(tmp_path):
    """Through accelerate's context parallelism: it cuts the batch and takes the masks away, the rest is ours."""
    run_ranks(1, lambda rank: train_cut(tmp_path / "one"), tmp_path / "logs")

    def work(rank):
        ALL_ATTENTION_FUNCTIONS["sdpa"] = ring_attention
        train_cut(tmp_path / "two")
        with pytest.raises(ValueError, match="mtp_loss_coef is positive under context parallelism"):
            tiny_trainer(tmp_path / "three", check_processes=False)

    run_ranks(2, work, tmp_path / "logs_2", CUT)
    for ours, theirs in zip(records(tmp_path / "two"), records(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
