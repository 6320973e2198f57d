"""recipes/sft.py on a GPU: bf16 compute, quantised bases."""

import importlib.util

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from recipes import sft
from recipes.logging_callbacks import read_metrics
from tests.recipes.test_sft import TASKS, arguments, base  # noqa: F401  (a fixture)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_gpu(base, output_dir, *more):  # noqa: F811
    return [argument for argument in arguments(base, output_dir, *more) if argument != "--use_cpu"]


def test_a_run_in_bf16(base, tmp_path):  # noqa: F811
    results = sft.main(on_gpu(base, tmp_path / "gpu", *TASKS))
    expected = sft.main(arguments(base, tmp_path / "cpu"))
    assert results["held_out"]["loss"] == pytest.approx(expected["held_out"]["loss"], rel=0.03)
    assert results["tasks"]["after"]["tasks"]["chain_sum"]["problems"] == 4


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_adapters_on_a_quantised_base(base, tmp_path, bits, capsys):  # noqa: F811
    lora = ("--lora_rank", "4", "--lora_groups", "attention", "shared_experts", "--weights_dtype", "bfloat16")
    results = sft.main(on_gpu(base, tmp_path, f"--{bits}", "true", *lora))
    out = capsys.readouterr().out
    assert "weights quantised" in out and "routed experts" in out
    assert "merged_logits_difference" not in results and not (tmp_path / "merged").exists()
    losses = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "train"]
    assert losses[-1] < losses[0]
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()  # on the base in full precision
    assert torch.isfinite(model(input_ids=torch.arange(3, 40)[None].to(model.device)).logits).all()
