"""The command that times the experts' products: its tables."""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import bench_experts  # noqa: E402

RECORD = Path(bench_experts.__file__).parent / "results/2026-11-23_expert_products/grouped.json"


def test_the_table_of_a_record(capsys, tmp_path):
    lines = bench_experts.main(["--record", str(RECORD), "--output", str(tmp_path / "lines.jsonl")])
    assert [line["product"] for line in lines] == [*bench_experts.PRODUCTS, "whole, forward", "whole, with backward"]
    record = json.loads(RECORD.read_text())
    assert lines[-1]["torch_us"] == record["whole_torch"][1]
    assert lines[-1]["ours_us"] == min(each["us"][1] for each in record["whole_ours"])
    for line in lines[:-2]:  # the cuts that were the quickest together
        assert line["ours_us"] == record["ours_us"][f"{line['product']} {line['cut']}"]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + len(lines) and " 0.82 " in printed[-1]
    assert [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()] == lines


def test_errors(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for argv, message in ((["--record", "nowhere.json"], "--record nowhere.json: no such file"),
                          ([], "set TRITON_INTERPRET=1")):  # fmt: skip
        with pytest.raises(SystemExit):
            bench_experts.main(argv)
        assert message in capsys.readouterr().err
