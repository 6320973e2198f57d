"""Expert loads by source against counting from recorded router logits, one row at a time."""

import json

import numpy
import pytest
import torch

from recipes.expert_loads import ExpertLoadCounter, affinity, favourite_rows, favourites, group_counts, max_over_mean
from recipes.reporting import build_report
from recipes.run_results import finish_run
from tests.recipes.tiny_run import tiny_trainer


def test_counts_equal_those_from_recorded_logits(tmp_path):
    trainer = tiny_trainer(tmp_path)
    bias = trainer.model.model.layers[1].mlp.gate.e_score_correction_bias
    bias.copy_(torch.tensor([0.3, -0.2, 0.1, -0.1]))
    trainer.evaluate()
    rows, expected = trainer.eval_dataset, numpy.zeros((2, 4), int)
    for index in range(len(rows)):
        row = rows[index]
        with torch.no_grad():
            logits = trainer.model(input_ids=row["input_ids"][None], position_ids=row["position_ids"][None],
                                   output_router_logits=True).router_logits[0]
        chosen = (logits.reshape(-1, 4).sigmoid() + bias).topk(2, dim=-1).indices
        for source, experts in zip(rows.sources_of(index), chosen.tolist()):
            for expert in experts if source >= 0 else ():
                expected[source, expert] += 1
    assert trainer.expert_loads == {"1": {"even": expected[0].tolist(), "odd": expected[1].tolist()}}
    assert expected.sum() == 2 * sum((rows.sources_of(i) >= 0).sum() for i in range(len(rows)))


def test_listening_ends(tmp_path):
    trainer = tiny_trainer(tmp_path)
    counter = ExpertLoadCounter(trainer.model, 2)
    assert list(counter.counts) == [1]  # one layer of experts; that of the MTP layer is not counted
    with counter.listening():
        pass
    trainer.model(input_ids=torch.zeros(1, 4, dtype=torch.int64))
    counter.add(torch.zeros(1, 4, dtype=torch.int64))
    assert not counter.counts[1].any()


TABLE = {"1": {"novels": [30, 10, 0, 0], "plays": [10, 10, 10, 10], "python": [0, 0, 0, 40], "empty": [0, 0, 0, 0]}}


def test_shares():
    sources, values = affinity(TABLE)["1"]
    assert sources == ["novels", "plays", "python"]
    assert values.tolist() == [[3.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 4.0]]
    assert favourites(TABLE, "python", 1) == [(4.0, "1", 3)]
    assert max_over_mean(TABLE)["1"] == pytest.approx(
        {"novels": 3.0, "plays": 1.0, "python": 4.0, "all": 50 * 4 / 120})
    grouped = group_counts(TABLE, {"novels": "text", "plays": "text"})
    assert grouped["1"]["text"] == [40, 20, 10, 10] and grouped["1"]["python"] == [0, 0, 0, 40]
    assert dict(favourite_rows(TABLE))["python"].startswith("layer 1 expert 3 (4.0 x)")


def test_the_report_shows_them(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=2)
    trainer.train()
    finish_run(trainer)
    written = json.loads((tmp_path / "eval.json").read_text())["expert_load"]
    assert list(written) == ["1"] and set(written["1"]) == {"even", "odd"}
    assert "expert of layer 1" in build_report(tmp_path) or "Layer 1:" in build_report(tmp_path)
