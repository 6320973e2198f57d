"""The trainer's own parts: decay groups, bits per byte, accumulation, speed, samples, streams."""

import math
import time

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import IterableDataset

from recipes.logging_callbacks import SampleCallback, read_metrics
from recipes.packed_rows import make_row
from recipes.pretrain_trainer import count_tokens
from recipes.recipe_trainer import SpeedMeter
from tests.recipes.tiny_run import LENGTH, RandomRows, losses, tiny_config, tiny_model, tiny_trainer


def test_no_decay_on_norms_and_biases(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = {
        group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in trainer.optimizer.param_groups
    }
    assert groups.keys() == {0.1, 0.0}
    assert any("enorm" in name for name in groups[0.0]) and any("hnorm" in name for name in groups[0.0])
    assert not any("norm" in name or "bias" in name for name in groups[0.1])
    assert len(groups[0.1]) + len(groups[0.0]) == len(names)
    assert trainer.optimizer.param_groups[0]["betas"] == (0.9, 0.95)


def test_bits_per_byte_equals_a_plain_computation(tmp_path):
    trainer = tiny_trainer(tmp_path)
    found = trainer.evaluate()
    rows, model = trainer.eval_dataset, trainer.model.eval()
    nats, tokens = [0.0, 0.0], 0
    for index in range(len(rows._starts)):  # each document by itself, no packing
        begin = rows._starts[index]
        end = rows._starts[index + 1] if index + 1 < len(rows._starts) else rows.total_tokens
        # ... but cut where a row of the evaluation ends, as a row's context does
        for piece in cut_at_rows(int(begin), int(end), rows.stride):
            ids = torch.as_tensor(rows.tokens(*piece))[None]
            if ids.shape[1] < 2:
                continue
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1]
            loss = F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            nats[rows._sources[index]] += loss
            tokens += ids.shape[1] - 1
    size = rows.bytes_by_source()
    assert found["eval_bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / sum(size.values()), rel=1e-5)
    assert found["eval_bits_per_byte_even"] == pytest.approx(nats[0] / math.log(2) / size["even"], rel=1e-5)
    assert found["eval_bits_per_byte_odd"] == pytest.approx(nats[1] / math.log(2) / size["odd"], rel=1e-5)
    assert found["eval_loss"] == pytest.approx(sum(nats) / tokens, rel=1e-5)


def cut_at_rows(begin, end, stride):
    """[begin, end) in pieces that share one token at every multiple of `stride`."""
    while begin < end:
        edge = (begin // stride + 1) * stride
        yield begin, min(end, edge + 1)
        begin = edge if edge + 1 < end or edge < end - 1 else end


def test_accumulation_equals_one_big_batch(tmp_path):
    """Loss, MTP loss, gradient norm and tokens, rows with different numbers of labels."""
    runs = {}
    for batch, accumulation in ((8, 1), (2, 4), (1, 8)):
        folder = tmp_path / f"{batch}x{accumulation}"
        trainer = tiny_trainer(
            folder, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=3,
            save_strategy="no", max_grad_norm=0.5,
        )  # fmt: skip
        trainer.train()
        runs[folder.name] = [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"]
    for name in ("2x4", "1x8"):
        for ours, big in zip(runs[name], runs["8x1"]):
            assert ours["tokens"] == big["tokens"] == 8 * LENGTH
            for key in ("loss", "mtp loss", "next-token loss", "grad", "load max/mean"):
                assert ours[key] == pytest.approx(big[key], rel=2e-4), (name, key)


def test_losses_are_means_over_the_logged_steps(tmp_path):
    for folder, every in (("one", 1), ("three", 3)):
        tiny_trainer(tmp_path / folder, logging_steps=every, max_steps=6, save_strategy="no").train()
    each, means = losses(tmp_path / "one"), losses(tmp_path / "three")
    assert means[3] == pytest.approx((each[1] + each[2] + each[3]) / 3, rel=1e-5)
    records = [r for r in read_metrics(tmp_path / "one" / "metrics.jsonl") if r["kind"] == "train"]
    three = [r for r in read_metrics(tmp_path / "three" / "metrics.jsonl") if r["kind"] == "train"]
    assert three[1]["mtp loss"] == pytest.approx(sum(r["mtp loss"] for r in records[3:]) / 3, rel=1e-5)
    for record in three:
        coef = 0.3
        assert record["loss"] == pytest.approx(record["next-token loss"] + coef * record["mtp loss"])


def test_a_nan_loss_stops_the_run(tmp_path):
    trainer = tiny_trainer(tmp_path)
    torch.nn.init.constant_(trainer.model.lm_head.weight, math.nan)
    with pytest.raises(FloatingPointError, match="loss=nan at step 1.*--learning_rate"):
        trainer.train()


def test_label_smoothing_without_a_field_for_it(tmp_path):
    trainer = tiny_trainer(tmp_path, label_smoothing_factor=0.1)
    assert trainer.label_smoother is None and trainer.model.config.label_smoothing == 0.1


def test_padding_is_not_counted():
    whole = make_row(torch.arange(10) % 7 + 1, [0, 4], 10)
    padded = make_row(torch.arange(6) % 7 + 1, [0, 4], 10)
    ends_with_bos = make_row(torch.arange(10) % 7 + 1, [0, 9], 10)
    batch = {"labels": torch.stack([row["labels"] for row in (whole, padded, ends_with_bos)])}
    assert count_tokens(batch) == 10 + 6 + 10


def test_speed_leaves_out_warm_up_and_pauses():
    meter = SpeedMeter(2, "cpu")
    for _ in range(2):
        meter.add_tokens(100)
        time.sleep(0.05)
        meter.step_done()
    for _ in range(3):
        meter.add_tokens(100)
        time.sleep(0.01)
        meter.step_done()
        with meter.paused():
            time.sleep(0.05)
    tokens, seconds, steps, everything = meter.read()
    assert (tokens, steps, everything) == (300, 3, 500)
    assert 0.03 <= seconds < 0.12  # not the 0.1 s of warm-up, not the 0.15 s of pauses
    assert meter.read()[0] == 0


class Stream(IterableDataset):
    """Three optimizer steps and a half a pass, another order each."""

    def __init__(self):
        self.rows, self.epoch = RandomRows(60), 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for index in range(14):
            yield self.rows[(index * 3 + self.epoch) % 14]


def test_a_stream_goes_on_and_resumes_beyond_its_first_pass(tmp_path):
    options = {"max_steps": 6, "save_steps": 4, "dataset_name": "x", "streaming": True, "eval_strategy": "no"}
    tiny_trainer(tmp_path / "whole", train_dataset=Stream(), **options).train()
    assert list(losses(tmp_path / "whole")) == list(range(1, 7))
    trainer = tiny_trainer(tmp_path / "part", train_dataset=Stream(), **options)
    trainer.train()
    for step in (6,):
        (tmp_path / "part" / f"checkpoint-{step}" / "COMPLETE.json").unlink()
    tiny_trainer(tmp_path / "part", train_dataset=Stream(), resume_from_checkpoint="true", **options).train()
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")


def test_plateau_lowers_the_rate(tmp_path):
    trainer = tiny_trainer(
        tmp_path, lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs={"patience": 0, "factor": 0.5},
        eval_steps=1, save_strategy="no", max_steps=6,
    )  # fmt: skip
    score = iter([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    trainer.evaluate = lambda **kwargs: {"eval_bits_per_byte": next(score)}
    trainer.train()
    rates = [r["lr"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
    assert rates[:2] == [1e-2, 1e-2] and rates[-1] < rates[2] < 1e-2


class WordTokenizer:
    """Characters as ids; what SampleCallback needs of a tokenizer."""

    pad_token_id = 0

    def __call__(self, text, return_tensors=None, return_token_type_ids=None):
        from transformers import BatchEncoding

        return BatchEncoding({"input_ids": torch.tensor([[ord(c) % 64 for c in text]])})

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(str(int(i)) for i in ids)


def test_samples_leave_the_losses_alone(tmp_path):
    options = {"max_steps": 4, "save_strategy": "no", "eval_strategy": "no"}
    sizes = {"hidden_dropout": 0.1}
    for folder in ("with", "without"):
        model = tiny_model(tiny_config(tmp_path), **sizes)
        trainer = tiny_trainer(tmp_path / folder, model=model, **options)
        if folder == "with":
            log = trainer.callback_handler.callbacks[-1]
            trainer.add_callback(SampleCallback(log, WordTokenizer(), ["hello"], 2, 5, trainer.speed))
        trainer.train()
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    samples = [r for r in read_metrics(tmp_path / "with" / "metrics.jsonl") if r["kind"] == "samples"]
    assert [r["step"] for r in samples] == [2, 4]
    assert len(samples[0]["samples"][0]["completion"].split()) == 5
