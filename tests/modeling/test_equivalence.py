"""Our model equals the library's DeepseekV3 (softmax routing: DeepseekV2) on shared weights, in fp32, to 1e-5."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from .helpers import YARN, close, gradients, library_twin, padded, random_ids, randomise_biases, tiny_model

CASES = {
    "groups": {},
    "one_group": {"n_group": 1, "topk_group": 1},
    "direct_queries": {"q_lora_rank": None},
    "yarn_equal_mscales": {"rope_parameters": YARN},
    "yarn_unequal_mscales": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}},
    "yarn_without_mscales": {"rope_parameters": {k: v for k, v in YARN.items() if "mscale" not in k}},
    "half_split": {"rope_interleave": False},
    "attention_bias": {"attention_bias": True},
    "unnormalised_gates": {"norm_topk_prob": False, "routed_scaling_factor": 1.7},
    "tied_wide_values": {"tie_word_embeddings": True, "v_head_dim": 16, "n_shared_experts": 2},
    "softmax_greedy": {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
    "softmax_groups": {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False},
}


def pair(case, **kwargs):
    model = tiny_model(**CASES[case], **kwargs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero at first
                parameter.normal_(std=0.2)
    return model, library_twin(model)


def assert_same(model, twin, ids, mask, labels):
    """Logits at real positions, the loss, and every parameter's gradient of the training step."""
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    with torch.no_grad():
        close(model(ids, attention_mask=mask).logits[real], twin(ids, attention_mask=mask).logits[real])
        evaluated = model(ids, attention_mask=mask, labels=labels)
    model.train().balance_loss_scale = 0.0  # the library has no balance loss
    twin.train()
    loss, expected = (m(ids, attention_mask=mask, labels=labels).loss for m in (model, twin))
    close(loss, expected)
    close(evaluated.loss, expected)
    loss.backward()
    expected.backward()
    ours, theirs = gradients(model), gradients(twin)
    assert ours.keys() == theirs.keys() == dict(model.named_parameters()).keys()
    for name, gradient in ours.items():
        assert gradient.abs().max() > 1e-4, f"{name} has no gradient to compare"
        close(gradient, theirs[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients(case, side):
    model, twin = pair(case, implementation="sdpa")
    assert_same(model, twin, *padded(random_ids(3, 12), side, (0, 5, 2)))


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_backend(implementation, experts, side):
    model, twin = pair("groups", implementation=implementation, experts=experts)
    assert model.config._experts_implementation == experts and model.config._attn_implementation == implementation
    assert_same(model, twin, *padded(random_ids(3, 12), side, (0, 5, 2)))


@pytest.mark.parametrize("mean", [-3.0, 0.0, 3.0])
@pytest.mark.parametrize("groups, kept, top_k", [(1, 1, 3), (2, 1, 4), (4, 2, 3), (4, 2, 4), (2, 2, 5)])
def test_wide_biases_with_group_limits(groups, kept, top_k, mean):
    model = tiny_model(n_group=groups, topk_group=kept, num_experts_per_tok=top_k)
    randomise_biases(model, mean)
    assert_same(model, library_twin(model), *padded(random_ids(2, 16), None))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("case", ["groups", "direct_queries", "yarn_unequal_mscales", "half_split", "softmax_greedy"])
def test_cached_decoding_equals_full_forward(case, kind, implementation):
    model, twin = pair(case, implementation=implementation)
    ids = random_ids(2, 13)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=20)
    with torch.no_grad():
        full, expected = model(ids).logits, twin(ids).logits
        steps = [model(ids[:, :5], past_key_values=cache, use_cache=True).logits]
        steps.append(model(ids[:, 5:8], past_key_values=cache, use_cache=True).logits)  # a chunk, as in drafting
        for i in range(8, 13):
            steps.append(model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
    assert cache.get_seq_length() == 13
    close(torch.cat(steps, dim=1), full)
    close(full, expected)


def test_the_cache_holds_the_latent_as_the_library_stores_it():
    model, twin = pair("half_split")
    ids = random_ids()
    ours, theirs = (m(ids, use_cache=True).past_key_values for m in (model, twin))
    for layer, expected in zip(ours.layers, theirs.layers, strict=True):
        assert layer.keys.shape == (2, 1, 11, 16) and layer.values.shape == (2, 1, 11, 4)
        close(layer.keys, expected.keys)
        close(layer.values, expected.values)


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}])
def test_other_rope_types_of_the_library(rope):
    model = tiny_model(rope_parameters=rope | {"rope_theta": 100.0}, max_position_embeddings=16)
    twin, ids = library_twin(model), random_ids(1, 24)  # longer than trained for: dynamic scaling sets in
    with torch.no_grad():
        close(model(ids).logits, twin(ids).logits)
