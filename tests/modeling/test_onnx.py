"""The ONNX graph against the model: prefill, decoding, padding, other batches and lengths; and its refusals."""

import importlib.util
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from modeling_deepseek_r1 import onnx_export
from tests.modeling.helpers import VOCAB, YARN, close, random_ids, tiny_model

ABSENT = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)} (pip install -e '.[test]')")

CHANGES = {"rope_parameters": YARN, "num_hidden_layers": 2}  # YaRN: both of its factors; one dense and one MoE layer


def write(folder, **changes):
    """Saves a tiny model as `folder`/ours and its graph as `folder`/graph; -> (model, differences)."""
    model = tiny_model(num_nextn_predict_layers=1, **changes)
    model.save_pretrained(folder / "ours")
    (folder / "ours" / "tokenizer_config.json").write_text("{}")
    return model, onnx_export.export(folder / "ours", folder / "graph", tolerance=1e-4)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("onnx")
    return *write(folder, **CHANGES), folder


@needs_onnx
def test_prefill_and_decoding_agree(exported):
    _, differences, folder = exported
    # fp32 sums in another order, of logits up to about 5: a few 1e-6 were measured
    assert len(differences) == 2 and max(differences) < 5e-5
    assert sorted(p.name for p in (folder / "graph").iterdir()) == [
        "generation_config.json", "model.onnx", "model.onnx.data", "tokenizer_config.json",
    ]  # fmt: skip
    graph = (folder / "graph" / "model.onnx").read_bytes()
    assert b"stack_trace" not in graph and __file__.split("/tests/")[0].encode() not in graph


@needs_onnx
@torch.no_grad()
@pytest.mark.parametrize("rows, lengths", [(1, (1, 1, 1)), (1, (9,)), (4, (6, 1, 3, 1))])
def test_pieces_of_any_size_equal_one_forward_without_cache(exported, rows, lengths):
    """Also a batch of one and a prompt of one token, sizes that exporters like to take for constants."""
    model, _, folder = exported
    decoder, ids, start = onnx_export.OnnxDecoder(folder / "graph"), random_ids(rows, sum(lengths)), 0
    assert decoder.session.get_outputs()[0].shape == ["batch", "new", VOCAB]
    expected = model(input_ids=ids, use_cache=False).logits
    for length in lengths:
        end = start + length
        positions = torch.arange(start, end).expand(rows, length).contiguous()
        logits = decoder(ids[:, start:end], torch.ones(rows, end, dtype=torch.int64), positions)
        close(logits, expected[:, start:end], atol=5e-5)
        start = end
    assert [past.shape[2] for past in decoder.past] == [sum(lengths)] * 2 * model.config.num_hidden_layers


@needs_onnx
@torch.no_grad()
def test_left_padding_changes_nothing(exported):
    model, _, folder = exported
    ids, pads = random_ids(2, 8), 3
    expected = model(input_ids=ids, use_cache=False).logits
    padded = torch.cat((torch.randint(3, VOCAB, (2, pads)), ids), dim=1)  # not the pad token: the mask must do it
    mask = torch.ones_like(padded)
    mask[:, :pads] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    decoder = onnx_export.OnnxDecoder(folder / "graph")
    prefill = decoder(padded[:, :-2], mask[:, :-2], positions[:, :-2])
    steps = [decoder(padded[:, i : i + 1], mask[:, : i + 1], positions[:, i : i + 1]) for i in (-2 + 11, -1 + 11)]
    close(torch.cat((prefill[:, pads:], *steps), dim=1), expected, atol=5e-5)


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {"q_lora_rank": None, "rope_interleave": False, "n_shared_experts": 0},
    {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False},
    {"n_group": 1, "topk_group": 1, "tie_word_embeddings": True, "first_k_dense_replace": 0},
])  # fmt: skip
def test_variants_agree(tmp_path, changes):
    _, differences = write(tmp_path, **changes)
    assert max(differences) < 5e-5


@needs_onnx
@pytest.mark.parametrize("weight", [float("nan"), None], ids=["nan", "other-weights"])
def test_what_does_not_agree_is_not_left_behind(exported, tmp_path, monkeypatch, capsys, weight):
    """The graph of another model in the place of this one's."""
    folder = exported[2]
    model = tiny_model(**CHANGES)
    if weight is not None:
        model.lm_head.weight.data.fill_(weight)
    model.save_pretrained(tmp_path / "ours")
    monkeypatch.setattr(
        onnx_export, "write_graph", lambda _, path: shutil.copytree(folder / "graph", path.parent, dirs_exist_ok=True)
    )
    assert onnx_export.main([str(tmp_path / "ours"), str(tmp_path / "graph")]) == 1
    assert "not <= tolerance=0.001" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@needs_onnx
def test_refuses_what_a_fixed_graph_cannot_do(tmp_path):
    model = tiny_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0})
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="rope_type='dynamic' takes other angles"):
        onnx_export.export(tmp_path / "ours", tmp_path / "graph")
    assert not (tmp_path / "graph").exists()


@needs_onnx
def test_refuses_a_reward_model_and_an_existing_target(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "ours")
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours", num_labels=1)
    reward.save_pretrained(tmp_path / "reward")
    assert onnx_export.main([str(tmp_path / "reward"), str(tmp_path / "graph")]) == 1
    assert "lm_head.weight" in capsys.readouterr().err
    assert onnx_export.main([str(tmp_path / "ours"), str(tmp_path)]) == 1
    assert "exists; remove it or name another folder" in capsys.readouterr().err


def test_names_the_packages_that_are_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert onnx_export.main([str(tmp_path), str(tmp_path / "graph")]) == 1
    assert "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err
