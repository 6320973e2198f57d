"""Compressed gradients: what is sent and kept, bytes, and training on two gloo processes against plain DDP."""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from recipes.compression_trainer import STATE_FILE, CompressionMixin, load_compression, save_compression
from recipes.distributed_settings import DistributedSettings
from recipes.gradient_compression import (
    BF16Reduction,
    PlainReduction,
    PowerSGDReduction,
    TopKReduction,
    _Words,
    dequantise,
    quantise,
)
from tests.recipes.processes import run_ranks

ROOT = Path(__file__).resolve().parents[2]
STEPS, RESUMED, SPLIT = 40, 12, 7
KINDS = {
    "plain": lambda: PlainReduction(),
    "everything": lambda: TopKReduction(fraction=1.0, bits=32),
    "bf16": lambda: BF16Reduction(),
    "top_k": lambda: TopKReduction(fraction=0.05, block=32, start=2, whole=16),
    "powersgd": lambda: PowerSGDReduction(rank=2, start=2),
}


class TinyExperts(nn.Module):
    """Two linear layers with four experts between them, all used: (experts, A, B) as in the model."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(12, 24), nn.Linear(24, 4)
        self.experts = nn.Parameter(torch.randn(4, 24, 24) * 0.2)
        self.norm = nn.Parameter(torch.ones(24))

    def forward(self, x, y=None):
        hidden = self.first(x).tanh()
        hidden = hidden + torch.einsum("td,edf->tf", hidden, self.experts.tanh()) * self.norm / 4
        logits = self.last(hidden)
        return logits if y is None else {"loss": F.cross_entropy(logits, y), "logits": logits}


def batch(step, rank):
    """16 rows of a fixed problem, others on each rank and step."""
    generator = torch.Generator().manual_seed(2 * step + rank)
    x = torch.randn(16, 12, generator=generator)
    return x, (x[:, :4] * torch.tensor([2.0, -1.0, 1.5, 1.0])).argmax(-1)


# ---------------------------------------------------------------- on two processes


def train_ddp(compression, rank, steps, model=None, folder=None, find_unused=False):
    """(losses averaged over ranks, model) of `steps`, a range; the state is loaded from `folder` where given."""
    torch.manual_seed(1)
    model = model or TinyExperts()
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.004, find_unused_parameters=find_unused)
    compression.attach(ddp)
    if folder is not None:
        load_compression(compression, folder, rank, 2)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.3), []
    for step in steps:
        x, y = batch(step, rank)
        optimizer.zero_grad()
        loss = F.cross_entropy(ddp(x), y)
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / 2)
    return losses, model


def compare_kinds(rank, folder):
    found = {}
    for kind, make in KINDS.items():
        compression = make()
        losses, model = train_ddp(compression, rank, range(STEPS))
        found[kind] = {"losses": losses, "weights": model.state_dict(), "megabytes": compression.megabytes_per_step()}
    for kind, find_unused in (("top_k", False), ("powersgd", True)):
        whole, _ = train_ddp(KINDS[kind](), rank, range(RESUMED), find_unused=find_unused)
        half = KINDS[kind]()
        first, model = train_ddp(half, rank, range(SPLIT), find_unused=find_unused)
        save_compression(half, folder, rank, 2)
        rest, _ = train_ddp(KINDS[kind](), rank, range(SPLIT, RESUMED), model, folder, find_unused)
        found[f"{kind} resumed"] = {"whole": whole, "resumed": first + rest}
    return found


@dataclass
class Arguments(DistributedSettings, TrainingArguments):
    """Fields of ours in front of the library's, as in a stage's config."""


class RecordingTrainer(CompressionMixin, Trainer):
    def log(self, logs, start_time=None):
        super().log(logs, start_time)
        if "loss" in logs:
            self.records = [*getattr(self, "records", []), (logs["loss"], logs["gradient_megabytes"])]


def train_with_trainer(folder, resume=None, **changes):
    torch.manual_seed(2)
    rows = [{"x": x, "y": y} for step in range(6) for x, y in zip(*batch(step, 0))]
    options = {"use_cpu": True, "max_steps": 6, "logging_steps": 1, "save_steps": 3, "report_to": "none",
               "disable_tqdm": True, "per_device_train_batch_size": 8, "learning_rate": 0.02, "logging_nan_inf_filter":
               False, "ddp_find_unused_parameters": False, "gradient_compression": "top_k",
               "gradient_compression_start": 1, "collective_timeout_s": 60, "top_k_fraction": 0.1}  # fmt: skip
    args = Arguments(output_dir=str(folder), **(options | changes))
    trainer = RecordingTrainer(model=TinyExperts(), args=args, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def worker(folder):
    rank = int(os.environ["RANK"])
    whole = train_with_trainer(folder / "whole")
    timeout = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    dist.barrier()
    resumed = train_with_trainer(folder / "resumed", str(folder / "whole" / "checkpoint-3"))
    none = train_with_trainer(folder / "none", gradient_compression="none", save_strategy="no")
    found = compare_kinds(rank, folder)
    found["trainer"] = {"whole": whole.records, "resumed": resumed.records, "none": none.records, "timeout": timeout}
    torch.save(found, folder / f"found-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def start_two(module, *arguments):
    """Processes of this machine, rank 0 and 1 of a gloo group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
                           "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}  # fmt: skip
    return [
        subprocess.Popen([sys.executable, "-m", module, *arguments], cwd=ROOT, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True, env=common | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in (0, 1)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Both ranks' results of `worker`."""
    folder = tmp_path_factory.mktemp("two")
    run_ranks(2, lambda rank: worker(folder), folder)
    return [torch.load(folder / f"found-{rank}.pt") for rank in (0, 1)], folder


def test_everything_sent_equals_plain_ddp_to_the_bit(found):
    (first, second), _ = found
    assert first["everything"]["losses"] == first["plain"]["losses"]
    for name, weight in first["plain"]["weights"].items():
        assert torch.equal(first["everything"]["weights"][name], weight), name
    for kind in KINDS:  # the ranks hold the same weights after compressed steps
        for name, weight in first[kind]["weights"].items():
            assert torch.equal(second[kind]["weights"][name], weight), (kind, name)


def test_compressed_training_follows_plain_training(found):
    losses = {kind: first["losses"] for kind, first in found[0][0].items() if kind in KINDS}
    end = {kind: sum(values[-8:]) / 8 for kind, values in losses.items()}
    assert losses["plain"][0] > 1.2 and end["plain"] < 0.6  # there was something to learn
    assert end["bf16"] == pytest.approx(end["plain"], rel=0.005)
    # A twentieth of the values, and rank 2 of up to 24: behind (6 % and 1.3 % here), as errors arrive some steps late.
    assert end["powersgd"] == pytest.approx(end["plain"], rel=0.03)
    assert end["top_k"] == pytest.approx(end["plain"], rel=0.12)
    assert losses["top_k"][:2] == losses["plain"][:2] and losses["top_k"][5] != losses["plain"][5]


def test_bytes_are_those_of_the_buffers(found):
    sent = {kind: round(found[0][0][kind]["megabytes"] * 1e6 * STEPS) for kind in KINDS}
    sizes = [12 * 24, 24, 24 * 4, 4, 4 * 24 * 24, 24]
    assert sent["plain"] == 4 * sum(sizes) * STEPS and sent["bf16"] == sent["plain"] // 2  # a ring of two: once
    assert sent["everything"] == sent["plain"]  # n - 1 = 1 times all values, without indices
    kept = [size if size <= 16 else -(-size // 20) for size in sizes]
    words = [(0 if k == size else k) + -(-k // 32) + -(-k // 4) for k, size in zip(kept, sizes)]
    assert sent["top_k"] == 4 * (2 * sum(sizes) + (STEPS - 2) * sum(words))
    low = [2 * (12 + 24), 24, 24 * 4 if 2 * 2 * 28 >= 96 else 2 * 28, 4, 4 * 2 * 48, 24]  # each expert for itself
    assert sent["powersgd"] == 4 * (2 * sum(sizes) + (STEPS - 2) * sum(low))


@pytest.mark.parametrize("kind", ["top_k", "powersgd"])
def test_resumed_runs_equal_uninterrupted_ones(found, kind):
    runs = found[0][0][f"{kind} resumed"]
    assert runs["resumed"] == runs["whole"]


def test_trainer_logs_saves_and_resumes(found):
    (first, second), folder = found
    runs = first["trainer"]
    assert runs["resumed"] == runs["whole"][3:] and len(runs["whole"]) == 6
    assert all((folder / "whole" / "checkpoint-3" / STATE_FILE.format(rank=rank)).is_file() for rank in (0, 1))
    plain = runs["none"][0][1]
    assert plain == 4 * sum([12 * 24, 24, 24 * 4, 4, 4 * 24 * 24, 24]) / 1e6
    assert [record[1] for record in runs["whole"]][:2] == [plain, pytest.approx(plain * 0.55 / 4, rel=0.3)]
    assert runs["timeout"] == 60 and runs["none"][0][0] == runs["whole"][0][0]


# ---------------------------------------------------------------- on one process


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fraction, bits", [(0.05, 8), (0.3, 32), (1.0, 8)])
def test_sent_and_kept_are_the_gradient_exactly(dtype, fraction, bits):
    reduction, size = TopKReduction(fraction, bits, block=64), 5000
    kept = reduction._kept(size)
    before, largest = torch.zeros(size), 0.0
    for step in range(6):
        gradient = (torch.randn(size) * torch.logspace(-6, 0, size)).to(dtype)
        words = torch.cat(reduction._encode("w", gradient))
        indices, values = reduction._read(_Words(words), size)
        sent = torch.zeros(size)
        sent[slice(None) if indices is None else indices] = values
        after = reduction.residuals["w"]
        total = before + gradient.float()
        assert torch.equal(sent + after, total)
        assert len(values) == kept == (size if fraction == 1 else round(fraction * size))
        if indices is not None:
            assert len(indices.unique()) == kept and total[indices].abs().min() >= after.abs().max() - 1e-6
        largest = max(largest, float(values.abs().max()))
        before = after.clone()
    assert largest > 1


def test_quantisation_is_within_half_a_step_and_keeps_what_is_not_finite():
    values = torch.randn(1000) * torch.logspace(-8, 8, 1000)
    codes, scales = quantise(values, 64)
    step = (scales / 127).repeat_interleave(64)[:1000]
    assert codes.dtype == torch.int8 and len(codes) == 1000 and len(scales) == 16
    assert ((dequantise(codes, scales, 64) - values).abs() <= 0.5001 * step).all()
    assert torch.equal(dequantise(*quantise(torch.zeros(5), 4), 4), torch.zeros(5))
    for bad in (float("nan"), float("inf")):
        broken = torch.tensor([1.0, bad, 2.0])
        assert not dequantise(*quantise(broken, 4), 4)[1].isfinite()


def test_another_number_of_processes_keeps_what_was_unsent(tmp_path):
    """Three processes' errors on two: the mean gradient that they owe is the same."""
    owed = torch.zeros(40)
    for rank in range(3):
        reduction = TopKReduction(whole=8)
        reduction.iteration = 7
        reduction._encode("w", torch.randn(40))
        owed += reduction.residuals["w"] / 3
        save_compression(reduction, tmp_path, rank, 3)
    loaded = [TopKReduction(whole=8) for _ in range(2)]
    for rank, reduction in enumerate(loaded):
        load_compression(reduction, tmp_path, rank, 2)
    torch.testing.assert_close(sum(r.residuals["w"] for r in loaded) / 2, owed)
    assert loaded[1].iteration == 7
    with pytest.raises(ValueError, match="is of TopKReduction, gradient_compression asks for BF16Reduction"):
        load_compression(BF16Reduction(), tmp_path, 0, 3)
    (tmp_path / STATE_FILE.format(rank=1)).unlink()
    with pytest.raises(ValueError, match="lacks gradient_compression_1.pt: 3 processes"):
        load_compression(TopKReduction(), tmp_path, 0, 2)


@pytest.mark.parametrize("changes, message", [
    ({"gradient_compression": "topk"}, "gradient_compression='topk' must be one of none, bf16, powersgd, top_k"),
    ({"gradient_compression": "top_k", "fp16": True}, "fp16 changes the gradients' scale"),
    ({"gradient_compression": "bf16", "fsdp": True}, "FSDP and DeepSpeed have their own reduction"),
    ({"gradient_compression": "powersgd", "gradient_compression_start": 1}, "must be at least 2 with"),
    ({"top_k_fraction": 0.0}, r"top_k_fraction=0.0 must be in \(0, 1\]"),
    ({"top_k_bits": 4}, "top_k_bits=4 must be 8 or 32"),
    ({"ddp_timeout": 90}, "set collective_timeout_s instead"),
    ({"dead_rank_s": 1.0}, "dead_rank_s=1.0 must be at least 5 seconds"),
])  # fmt: skip
def test_settings_that_cannot_work(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Arguments(output_dir=str(tmp_path), use_cpu=True, **changes)
