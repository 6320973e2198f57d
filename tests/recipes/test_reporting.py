"""report.html from a metrics file, and its reference values."""

import json
import lzma
import math
import re

import pytest
import yaml

from recipes import reporting
from recipes.logging_callbacks import console_line, eval_record, read_metrics, train_record
from recipes.reporting import build_report, text_baselines

LOGS = {
    "loss": 3.4123, "learning_rate": 3e-4, "grad_norm": 0.921, "tokens": 100, "tokens_per_second": 41200.4,
    "mfu": 0.25, "step_seconds": 0.63, "load_max_over_mean_layer_1": 1.31, "load_max_over_mean_layer_10": 1.2,
    "epoch": 0.5,
}  # fmt: skip


def make_run(folder):
    records = []
    for step in (10, 20, 30):
        logs = LOGS | {"loss": 3.0 - step / 100, "mtp_loss": 2.0, "next_token_loss": 2.4 - step / 100}
        records.append(train_record(step, logs, eta_seconds=5))
        scores = {"eval_loss": 2.0, "eval_bits_per_byte": 1.9, "eval_bits_per_byte_code": 1.5}
        records.append(eval_record(step, scores))
        sample = {"prompt": "<b>Once", "completion": " upon & a time"}
        records.append({"kind": "samples", "step": step, "samples": [sample]})
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(r) for r in records))
    experts = {"n_routed_experts": 16, "num_experts_per_tok": 4}
    config = {"commit": "abc", "model": experts, "sizes": {"parameters": "5"}, "baselines": {"uniform": 8.0, "xz": 2.9}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    weights = {"bits_per_byte": 1.9, "loss": 2.0, "bytes": 10, "sources": {"code": 1.5}}
    (folder / "eval.json").write_text(json.dumps({"step": 30, "weights": weights, "ema": weights}))
    return folder


def test_console_line_is_the_documented_one():
    line = console_line(train_record(120, LOGS | {"mfu": None}, eta_seconds=240), 500)
    assert line == "step  120/500 | loss 3.412 | lr 3.0e-04 | grad 0.92 | tok/s 41,200 | load max/mean 1.31 | eta 4m"


def test_names_of_the_record_and_layer_order():
    record = train_record(120, LOGS)
    assert list(record)[:5] == ["kind", "step", "loss", "lr", "grad"]
    assert record["load max/mean per layer"] == {"1": 1.31, "10": 1.2} and record["load max/mean"] == 1.31


def test_page_is_complete_and_self_contained(tmp_path):
    page = build_report(make_run(tmp_path))
    for words in (
        "loss, nats per token",
        "bits per byte",
        "learning rate",
        "gradient norm",
        "tokens per second",
        "expert load, max / mean",
        "optimizer step",
        "worst (4)",
        "xz (2.90)",
        "1.9000 bits per byte",
    ):
        assert words in page, words
    assert page.count("<svg") == 6
    links = re.findall(r"""(?:src|href)\s*=\s*["'](?!#)([^"']+)""", page)
    assert not [link for link in links if not link.startswith("#")], links
    assert "&lt;b&gt;Once" in page and "<b>Once" not in page  # text of a sample is never markup


def test_command_makes_the_page_again(tmp_path, capsys):
    reporting.main([str(make_run(tmp_path))])
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_a_cut_off_line_is_left_out(tmp_path):
    with open(make_run(tmp_path) / "metrics.jsonl", "a") as file:
        file.write('\n{"kind": "train", "st')
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert len(records) == 9 and records[-1]["step"] == 30


def test_no_run_folder(tmp_path):
    with pytest.raises(ValueError, match="is it a run folder"):
        build_report(tmp_path)


def test_baselines_equal_plain_computations():
    texts, held_out, training = ["abab", "abé"], [[1, 2, 1, 2], [1, 2, 3]], [[1, 1, 2], [0]]
    found = text_baselines(texts, held_out, training, vocab_size=4)
    shares = {0: 2 / 8, 1: 3 / 8, 2: 2 / 8, 3: 1 / 8}
    bits = -sum(math.log2(shares[token]) for row in held_out for token in row)
    assert found["unigram"] == pytest.approx(bits / (4 + 4))
    data = "abab\nabé".encode()
    assert found["xz"] == 8 * len(lzma.compress(data, preset=9)) / len(data)
    assert text_baselines([], []) == {"uniform": 8.0}


def test_many_sources_get_a_table_and_curves_by_kind(tmp_path, monkeypatch):
    labels = []  # make_run has a source "code" of no kind, which joins those of its name
    monkeypatch.setattr(reporting, "plot", lambda curves, *rest, **named: labels.extend(c[0] for c in curves) or "")
    names = [f"source{number:02}" for number in range(12)]
    kinds = {name: "code" if number % 3 == 0 else "text" for number, name in enumerate(names)}
    folder, values = make_run(tmp_path), {name: 1 + number / 10 for number, name in enumerate(names)}
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"data": {"kinds": kinds}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    weights = {"bits_per_byte": 1.9, "loss": 2.0, "bytes": 10, "sources": values}
    (folder / "eval.json").write_text(json.dumps({"step": 30, "weights": weights}))
    record = eval_record(40, {"eval_loss": 2.0, "eval_bits_per_byte": 1.9} | {
        f"eval_bits_per_byte_{name}": value for name, value in values.items()})
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("\n" + json.dumps(record))
    text = build_report(folder)
    assert "1.0000 (source00) to 2.1000 (source11) bits per byte" in text
    assert "<td>code</td><td>source03</td><td>1.3000</td>" in text
    assert {"code (5 sources)", "text (8 sources)"} <= set(labels) and "source05" not in labels
    assert "held out, source05" not in text
