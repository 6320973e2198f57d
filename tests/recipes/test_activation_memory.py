"""The derived activation bytes against what a real model saves, and the whole formula against peaks on an H100."""

import os

import pytest
import torch

from benchmarks.train_cases import REFERENCE, our_config
from modeling_deepseek_r1 import DeepSeekR1Config, DeepSeekR1ForCausalLM
from modeling_deepseek_r1.fused import set_fused_kernels
from recipes.activation_memory import (
    activation_bytes,
    counting_saved_bytes,
    fused_chunk_rows,
    layer_bytes,
    loss_bytes,
    packed_weight_bytes,
)
from recipes.launch_layouts import LAYOUTS
from recipes.launch_memory import Work, footprint, model_shape
from recipes.sizing import GIB

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SIZES = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "first_k_dense_replace": 1, "num_attention_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.skipif(not INTERPRETED, reason="the fused functions run in Triton's interpreter")
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_saved_bytes_of_a_model(mode):
    config = DeepSeekR1Config(**SIZES, num_nextn_predict_layers=1)
    model, tokens = DeepSeekR1ForCausalLM(config).bfloat16().train(), 32
    model.set_activation_checkpointing(mode)
    ids = torch.randint(0, 32, (2, 16))
    before = set_fused_kernels(True)
    try:
        with counting_saved_bytes(model) as found:
            loss = model(input_ids=ids, labels=ids).loss
    finally:
        set_fused_kernels(before)
    chunk = fused_chunk_rows(tokens, 32, 2) * 32 * 2  # a work space, not saved
    activations = activation_bytes(config, tokens, 2, 2, "selective" if mode == "selective" else False)
    packed = packed_weight_bytes(config, 2)
    if mode == "selective":  # one layer's inside is made again in the backward only, and weights are joined there
        inside = [layer_bytes(config, sparse, 2, 2) - layer_bytes(config, sparse, 2, 2, True)
                  for sparse in (True, False)]  # fmt: skip
        activations, packed = activations - tokens * max(inside), 0
    expected = activations + packed + loss_bytes(config, tokens, 2) - chunk
    # 1 %: labels, positions, angles and counts, which grow with tokens but not with widths.
    assert loss.isfinite() and expected <= found[0] <= 1.015 * expected
    assert activations > 0.75 * expected  # the derived part is what is tested


def test_in_the_interpreter(interpreted):
    interpreted(__file__)


PEAKS = [("one_gpu", False, 25.15), ("one_gpu", True, 39.35), ("ddp", False, 28.48), ("fsdp2", True, 25.85),
         ("fsdp2_kept", True, 28.76), ("fsdp2_ep", True, 34.24)]  # fmt: skip


@pytest.mark.parametrize("layout, masters, measured", PEAKS)
def test_peaks_of_one_and_two_h100(layout, masters, measured):
    """benchmarks/LOG.md: bench_train.py and bench_multi.py, 4 rows of 4,096 a GPU, AdamW."""
    shape = model_shape(our_config(REFERENCE))
    work = Work(rows=4, length=4096, masters=masters)
    peak = footprint(shape, LAYOUTS[layout], 1 if layout == "one_gpu" else 2, work).peak / GIB
    assert peak == pytest.approx(measured, rel=0.03)


def test_a_layer_by_hand():
    config = DeepSeekR1Config(**SIZES)
    # residual sums 2 x (32 x 4 + 4), 1 / rms of two latents 8, log-sum-exp 2 x 4
    dense = 264 + 8 + 8 + 2 * (2 * 32 + 2 * 16 + 2 * 16 + 16 + 2 * (2 * 32 + 48 + 32) + 2 * 48)
    assert layer_bytes(config, False, 2, 4) == dense
    assert layer_bytes(config, True, 2, 4) == dense + 2 * 2 * (16 - 48) + 2 * 2 * (32 + 3 * 16) + 16 + 40
