"""Our optimizers inside the pre-training trainer: against torch's, resumed, learning, refused."""

import pytest
import torch
from accelerate.utils import DistributedType

from recipes.ema import EMACallback
from recipes.optimizers import FusedAdamW, MuonAdamW, muon_groups, muon_kinds
from recipes.packed_rows import PackingCollator
from recipes.pretrain_config import PretrainConfig
from recipes.pretrain_trainer import PretrainTrainer
from tests.recipes.tiny_run import SIZES, RandomRows, tiny_config, tiny_model


class AveragedLosses(EMACallback):
    """Evaluates the averaged weights after every step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        ids = torch.arange(24).view(2, 12)
        with self.applied(model), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            self.losses = [*getattr(self, "losses", []), model.eval()(input_ids=ids, labels=ids).loss.item()]
        model.train()


class Recorder(PretrainTrainer):
    """Keeps the losses and the reported gradient norms of every step."""

    def log(self, logs, start_time=None):
        if "loss" in logs:
            self.records = [*getattr(self, "records", []), (self.state.global_step, logs["loss"])]
            self.norms = [*getattr(self, "norms", []), float(logs["grad_norm"])]
        super().log(logs, start_time)


def trainer_of(folder, **changes):
    base = tiny_config(folder)
    fields = {name: getattr(base, name) for name in (
        "output_dir", "model_config", "sequence_length", "per_device_train_batch_size", "gradient_accumulation_steps",
        "learning_rate", "use_cpu", "disable_tqdm", "seed", "device_peak_tflops")}  # fmt: skip
    fields |= {"max_steps": 10, "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no", "max_grad_norm": 0.5}
    args = PretrainConfig(**(fields | changes))
    return Recorder(
        model=tiny_model(args), args=args, train_dataset=RandomRows(40), data_collator=PackingCollator()
    )


def train(folder, resume=None, **changes):
    trainer = trainer_of(folder, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_trainer_losses_and_norms_equal_torchs(tmp_path):
    plain, fused = (train(tmp_path / kind, optimizer=kind) for kind in ("torch", "fused"))
    assert type(fused.optimizer.optimizer) is FusedAdamW and type(plain.optimizer.optimizer) is torch.optim.AdamW
    assert len(plain.records) == 10 and min(plain.norms) > 0.5  # every step clips
    for (step, loss), (_, expected) in zip(fused.records, plain.records):
        assert loss == pytest.approx(expected, rel=1e-5), step
    assert fused.norms == pytest.approx(plain.norms, rel=2e-4)
    unclipped = [train(tmp_path / f"unclipped_{kind}", optimizer=kind, max_grad_norm=0.0, max_steps=3)
                 for kind in ("torch", "fused")]  # fmt: skip
    assert unclipped[1].norms == pytest.approx(unclipped[0].norms, rel=1e-5)
    assert unclipped[1].records[2][1] == pytest.approx(unclipped[0].records[2][1], rel=1e-5)
    assert abs(unclipped[0].norms[2] / plain.norms[2] - 1) > 1e-4  # clipping does change the run


@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_copies_change_no_number(tmp_path, accumulation):
    """bf16 compute, and other weights in the model after every step, for an evaluation."""
    runs = []
    for copies in (True, False):
        trainer = trainer_of(tmp_path / str(copies), compute_copies=copies, optimizer="fused", bf16=True, max_steps=3,
                             gradient_accumulation_steps=accumulation)  # fmt: skip
        average = AveragedLosses(0.9)
        trainer.add_callback(average)
        trainer.train()
        runs.append((trainer.records, trainer.norms, average.losses))
        if copies:
            experts = trainer.model.model.layers[1].mlp.experts.down_proj
            assert trainer.optimizer.optimizer.copies.kept[experts].current() is None  # the last change was its return
    assert runs[0] == runs[1] and len(set(runs[0][2])) == 3


@pytest.mark.parametrize("changes, expected", [
    ({}, True), ({"activation_checkpointing": "selective"}, True), ({"activation_checkpointing": "full"}, "gradients"),
    ({"compute_copies": False}, False), ({"bf16": False}, False),
])  # fmt: skip
def test_when_copies_are_kept(tmp_path, changes, expected):
    trainer = trainer_of(tmp_path, **({"optimizer": "fused", "bf16": True} | changes))
    assert trainer._compute_copies() == expected
    trainer.accelerator.state.distributed_type = DistributedType.MULTI_CPU
    try:
        assert trainer._compute_copies() is False  # DDP averages gradients in buckets of the weights' dtype
    finally:
        trainer.accelerator.state.distributed_type = DistributedType.NO


@pytest.mark.parametrize("kind", ["fused", "muon"])
def test_trainer_resumes_exactly(tmp_path, kind):
    options = {"optimizer": kind, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "bf16": kind == "fused"}
    whole = train(tmp_path / "whole", **options)
    resumed = train(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-2"), **options)
    assert resumed.records == whole.records[2:]
    for found, expected in zip(resumed.model.parameters(), whole.model.parameters()):
        assert torch.equal(found, expected)


def test_trainer_learns_with_muon(tmp_path):
    options = {"learning_rate": 5e-3, "max_steps": 25, "max_grad_norm": 1.0, "lr_scheduler_type": "constant"}
    trainer = train(tmp_path, optimizer="muon", muon_learning_rate=1e-2, **options)
    assert type(trainer.optimizer.optimizer) is MuonAdamW
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {1e-2, 5e-3}
    first, last = (sum(loss for _, loss in part) / 5 for part in (trainer.records[:5], trainer.records[-5:]))
    assert last < first - 0.15, (first, last)


@pytest.mark.parametrize("changes, message", [
    ({"optimizer": "adam"}, "optimizer='adam'"), ({"muon_adjust_lr": "x"}, "muon_adjust_lr='x'"),
    ({"optimizer": "fused", "optim": "adafactor"}, "optim="), ({"stochastic_rounding": True}, "stochastic_rounding"),
])  # fmt: skip
def test_settings_that_exclude_each_other(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, **changes)


def test_groups_of_muon(tmp_path):
    model = tiny_model(tiny_config(tmp_path))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = [name for name, p in model.named_parameters() if p.ndim >= 2]
    groups = muon_groups(model, decayed, 0.1, 0.02)
    found = [sorted(names[id(p)] for p in group["params"]) for group in groups]
    assert sum(map(len, found)) == len(names) == len(set(sum(found, [])))
    assert [(g.get("muon"), g.get("stacked"), g["weight_decay"]) for g in groups] == [
        (True, 1, 0.1), (True, 1, 0.1), (True, 2, 0.1), (None, None, 0.1), (None, None, 0.0)
    ]  # fmt: skip
    assert all(name.endswith("experts.down_proj") for name in found[1])
    assert all(name.endswith("experts.gate_up_proj") for name in found[2]) and len(found[2]) == 2
    assert found[3] == ["lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.gate.weight",
                        "model.layers.2.mlp.gate.weight"]  # fmt: skip
    assert all("norm" in name for name in found[4])
    assert any(name.endswith("eh_proj.weight") for name in found[0])
    scored = torch.nn.ModuleDict({"trunk": model.model, "score": torch.nn.Linear(SIZES["hidden_size"], 1)})
    assert muon_kinds(scored)["score.weight"] == "adamw"  # a head for one value is a vector


def test_resuming_names_a_changed_muon(tmp_path):
    """Its momentum is not in the checkpoint and its rate is: a change would act in part, or not at all."""
    options = {"optimizer": "muon", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    train(tmp_path, **options, muon_momentum=0.9)
    with pytest.raises(ValueError, match="muon_momentum: 0.9 -> 0.95"):
        train(tmp_path, resume=str(tmp_path / "checkpoint-2"), **options)
    with pytest.raises(ValueError, match='optimizer: "muon" -> "\\(not set\\)"'):
        train(tmp_path, resume=str(tmp_path / "checkpoint-2"), **(options | {"optimizer": "fused"}))


def test_resuming_goes_from_torchs_adamw_to_ours_and_back(tmp_path):
    """The same trajectory up to rounding: `auto` chooses by the machine."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = train(tmp_path / "torch", optimizer="torch", **options)
    train(tmp_path / "fused", optimizer="fused", **options)
    for first, second in (("torch", "fused"), ("fused", "torch")):
        resumed = train(tmp_path / f"to_{second}", str(tmp_path / first / "checkpoint-2"), optimizer=second, **options)
        losses = [[loss for _, loss in each] for each in (resumed.records, whole.records[2:])]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
