"""Parameter counts and FLOPs against known models, hand counts and the real modules."""

from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING, DeepseekV3Config

import recipes
from recipes.model_loading import build_config
from recipes.pretrain_config import PretrainConfig, parse_config
from recipes.sizing import (
    count_parameters,
    device_peak_flops,
    fitting_devices,
    flops_per_token,
    format_duration,
    memory_per_device,
    sizing_table,
)
from tests.recipes.tiny_run import SIZES, tiny_config, tiny_model

CONFIGS = Path(recipes.__file__).parent / "configs"
REFERENCE = {
    "vocab_size": 65536, "hidden_size": 1024, "num_hidden_layers": 12, "first_k_dense_replace": 1,
    "intermediate_size": 4096, "num_attention_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
    "num_experts_per_tok": 6, "n_shared_experts": 2, "moe_intermediate_size": 704, "n_group": 1, "topk_group": 1,
}  # fmt: skip


def ours(**fields):
    return CONFIG_MAPPING["deepseek_r1"](**fields)


def shipped(size):
    args = parse_config(PretrainConfig, ["--config", str(CONFIGS / f"pretrain_{size}.yaml"), "--use_cpu"])
    return build_config(args), args


def test_reference_config():
    for config in (
        ours(**REFERENCE, num_nextn_predict_layers=0),
        DeepseekV3Config(**REFERENCE, num_key_value_heads=16),
    ):
        counts = count_parameters(config)
        assert counts.total == 1_812_823_040
        assert counts.active == 365_919_232
        # 6 N + 6 L H (d_qk + d_v) S / 2
        expected = 6 * counts.matmul + 6 * 12 * 16 * (192 + 128) * 4096 / 2
        assert flops_per_token(config, 4096) == expected


def test_released_r1():
    config, args = shipped("r1")
    counts = count_parameters(config)
    assert counts.total - counts.mtp == pytest.approx(671.03e9, rel=1e-4)
    assert counts.active - counts.mtp_active == pytest.approx(36.6e9, rel=2e-3)
    assert counts.total + counts.mtp_copies == pytest.approx(684.5e9, rel=1e-4)  # the released files
    assert fitting_devices(config, args, 80e9, counts) == 1024
    assert "671.026 B + MTP 11.610 B" in sizing_table(config, args)


@pytest.mark.parametrize("size, low, high", [
    ("tiny", 1e6, 6e6), ("nano", 15e6, 24e6), ("small", 200e6, 300e6), ("base", 10e9, 20e9),
])  # fmt: skip
def test_shipped_sizes(size, low, high):
    config, _ = shipped(size)
    counts = count_parameters(config)
    assert low <= counts.total + (counts.mtp_copies if size == "nano" else 0) <= high
    if size == "nano":
        assert 2 * (counts.total + counts.mtp_copies) <= 48 * 2**20


def test_counts_of_the_real_model(tmp_path):
    args = tiny_config(tmp_path)
    model, counts = tiny_model(args), count_parameters(ours(**SIZES))
    assert counts.total == sum(p.numel() for p in model.parameters())
    expert = 3 * 32 * 16
    idle = 2 * (4 - 2) * expert  # two layers with experts (one of them MTP), two of four experts idle
    assert counts.active == counts.total - 64 * 32 - idle
    mtp = count_parameters(ours(**SIZES | {"num_nextn_predict_layers": 0}))
    assert counts.mtp == counts.total - mtp.total
    heads, widths = 2, 16 + 8
    attention = 6 * 3 * heads * widths * 32 / 2
    assert flops_per_token(ours(**SIZES), 32) == 6 * (counts.matmul + 64 * 32) + attention


def test_memory_falls_with_sharding_and_checkpointing(tmp_path):
    args = tiny_config(tmp_path, ema_decay=0.9, sequence_length=4096)  # enough that activations outweigh the head
    config = ours(**REFERENCE, num_nextn_predict_layers=0)
    counts = count_parameters(config)
    one = memory_per_device(config, args)
    assert one["weights"] == one["gradients"] == one["ema"] == 4 * counts.total
    assert one["optimizer"] == 8 * counts.total
    assert one["total"] == pytest.approx(sum(v for k, v in one.items() if k != "total"), abs=8)
    assert memory_per_device(config, args, 8, sharded=True)["optimizer"] == counts.total
    assert memory_per_device(config, args, checkpointing=True)["activations"] < one["activations"] / 3


def test_cpu_peak_and_override():
    peak, source = device_peak_flops("cpu")
    assert 1e8 < peak < 1e14 and "measured" in source
    assert device_peak_flops("cpu", 2.0) == (2e12, "device_peak_tflops")


def test_durations():
    assert [format_duration(s) for s in (5, 240, 7200, 864000)] == ["5s", "4m", "2.0h", "10d"]
