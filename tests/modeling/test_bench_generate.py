"""The generation benchmark at toy sizes, and the CPU's step for one token against the library's own loop."""

import json
import math

import pytest
import torch

from benchmarks import bench_generate
from benchmarks.bench_train import our_model
from benchmarks.generation_cases import CASES, FIELDS, Bench, generate
from benchmarks.generation_profile import bytes_of_a_step
from modeling_deepseek_r1.decoding_cpu import SingleTokenLayer
from tests.modeling.helpers import randomise_biases


def toy(**fields):
    torch.manual_seed(0)
    model = our_model(FIELDS["toy"] | {"initializer_range": 0.2} | fields).eval()
    randomise_biases(model)
    return model


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "out.json"
    cases = ["b1-1k", "rollouts", "prefill", "cache", "exact", "mtp"]
    found = bench_generate.main(
        ["--size", "toy", "--shrink", "256", "--repeats", "1", "--device", "cpu", "--out", str(path), "--cases", *cases]
    )
    assert json.loads(path.read_text())["lines"] == found
    return found


def test_every_case_answers(lines):
    failed = [(line["case"], line["error"]) for line in lines if "error" in line]
    assert [case for case, _ in failed] == ["mtp"] and "--model FOLDER" in failed[0][1], failed
    for case in ("b1-1k", "rollouts", "prefill"):
        for who in ("ours", "library"):
            speeds = [line["tokens_per_second"] for line in lines if (line["case"], line["who"]) == (case, who)]
            assert speeds and all(math.isfinite(speed) for speed in speeds)


def test_exact_case_says_that_they_agree_in_fp32(lines):
    exact = [line for line in lines if line["case"] == "exact"]
    assert exact[0]["share_equal"] == exact[0]["equal_before_the_first_difference"] == 1.0
    assert max(line["relative_error"] for line in exact[1:]) < 1e-5


def test_models_share_their_weights():
    bench = Bench("toy", "cpu", torch.float32)
    ours, theirs = bench.ours.state_dict(), bench.library.state_dict()
    assert all(theirs[name].data_ptr() == tensor.data_ptr() for name, tensor in ours.items())
    ids = bench.prompts(2, 9)
    torch.testing.assert_close(bench.ours(input_ids=ids).logits, bench.library(input_ids=ids).logits)


def test_bytes_of_a_step_count_what_a_token_touches():
    model, config = toy(), toy().config
    dense = sum(p.nbytes for n, p in model.named_parameters() if ".mlp.experts." not in n and "embed_tokens" not in n)
    inner, hidden = config.moe_intermediate_size, config.hidden_size
    expert = 3 * inner * hidden * 4  # one mixture layer
    cache = 2 * 3 * 100 * (config.kv_lora_rank + config.qk_rope_head_dim) * 4
    assert bytes_of_a_step(model, 3, 100, 2.0) == dense + 2 * expert + cache


@pytest.mark.parametrize("fields", [
    {}, {"rope_interleave": False}, {"q_lora_rank": 24}, {"n_shared_experts": 0, "norm_topk_prob": False},
    {"n_routed_experts": 8, "n_group": 4, "topk_group": 2},
], ids=str)  # fmt: skip
def test_single_token_layers_equal_the_librarys_loop(fields):
    model = toy(**fields)
    ids = torch.randint(2, 64, (1, 21))
    keep = {"output_logits": True, "return_dict_in_generate": True}
    ours = generate(model, ids, 24, **keep)
    assert len(model.decoding_engine.step.single_token) == model.config.num_hidden_layers
    model.decoding.enabled = False
    theirs = generate(model, ids, 24, **keep)
    assert torch.equal(ours.sequences, theirs.sequences)
    # Same sums in another order, logits of size 1 to 10.
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=1e-4, atol=2e-5)


def test_single_token_layers_follow_the_weights_and_leave_wrapped_layers_alone():
    model = toy()
    ids = torch.randint(2, 64, (1, 8))
    before = generate(model, ids, 12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.roll(1, 0))
    after = generate(model, ids, 12)
    model.decoding.enabled = False
    assert torch.equal(after, generate(model, ids, 12)) and not torch.equal(after, before)
    layer = model.model.layers[1]
    assert SingleTokenLayer.serves(layer)
    hook = layer.mlp.gate.register_forward_hook(lambda *_: None)
    assert not SingleTokenLayer.serves(layer)
    hook.remove()
    layer.self_attn.o_proj = torch.nn.Sequential(layer.self_attn.o_proj)
    assert not SingleTokenLayer.serves(layer)


def test_cases_are_named_in_the_help():
    assert set(CASES) - {"mtp", "cpu"} == set(bench_generate.DEFAULT)
    assert all(case in bench_generate.__doc__ for case in CASES)
