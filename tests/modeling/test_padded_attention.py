"""Attention of padded batches in training: which of torch's kernels may serve, and gradients that are numbers."""

from types import SimpleNamespace

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_deepseek_r1 import attention

from .helpers import tiny_model


def states(**changes):
    return SimpleNamespace(**{"is_cuda": True, "requires_grad": True, **changes})


def test_only_masked_training_on_cuda_leaves_cudnn_out():
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    assert attention.misses_masked_rows(states(), mask)
    assert not attention.misses_masked_rows(states(), None)
    assert not attention.misses_masked_rows(states(is_cuda=False), mask)
    assert not attention.misses_masked_rows(states(requires_grad=False), mask)
    with torch.no_grad():
        assert not attention.misses_masked_rows(states(), mask)


@pytest.mark.parametrize("masked", [True, False])
def test_cudnn_is_off_during_the_call_and_as_it_was_behind_it(masked, monkeypatch):
    found = []

    def sdpa(module, queries, keys, values, mask, **kwargs):
        found.append(torch.backends.cuda.cudnn_sdp_enabled())
        raise RuntimeError("stopped")

    monkeypatch.setattr(attention, "misses_masked_rows", lambda queries, mask: mask is not None)
    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "get_interface", lambda implementation, default: sdpa)
    layer = tiny_model(implementation="sdpa").model.layers[0].self_attn
    queries, values = torch.randn(1, 2, 3, layer.config.qk_head_dim), torch.randn(1, 2, 3, layer.config.v_head_dim)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with pytest.raises(RuntimeError, match="stopped"):
        layer.attend(queries, queries, values, torch.ones(1, 1, 3, 3, dtype=torch.bool) if masked else None)
    assert before and found == [not masked]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("length", [64, 100, 192, 256, 448])
def test_padding_on_the_left_leaves_gradients_finite(length):
    """64 modulo 128 is where cuDNN's gradients of queries that see nothing were NaN."""
    model = tiny_model(
        implementation="sdpa", hidden_size=128, num_attention_heads=4, qk_nope_head_dim=64, qk_rope_head_dim=32,
        v_head_dim=64, moe_intermediate_size=64, max_position_embeddings=512,
    ).cuda().train()  # fmt: skip
    ids = torch.randint(3, 64, (4, length), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, : length // 2] = mask[1, :3] = mask[2, length // 2 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    wrong = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    assert loss.isfinite() and not wrong, wrong
