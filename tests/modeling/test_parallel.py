"""transformers' own sharding by our plans, on two processes: the same loss, gradients, counts and checkpoints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

TWO_RANKS = """
import sys, torch, torch.distributed as dist
from transformers.distributed import DistributedConfig
from modeling_deepseek_r1 import DeepSeekR1ForCausalLM
from modeling_deepseek_r1.checkpoint_files import weight_files

folder = sys.argv[1]
dist.init_process_group("gloo")
ids = torch.arange(3, 23).view(2, 10)
whole = DeepSeekR1ForCausalLM.from_pretrained(folder).train()
whole_loss = whole(input_ids=ids, labels=ids).loss
whole_loss.backward()
gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
plans = dict(tp=dict(tp_size=2, tp_plan="auto"), fsdp=dict(fsdp_size=2), ep=dict(fsdp_size=2, ep_size=2))
for name, plan in plans.items():
    model = DeepSeekR1ForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**plan)).train()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, whole_loss, rtol=1e-6, atol=1e-6)
    compared = 0
    for key, parameter in model.named_parameters():
        gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        if gradient.shape == gradients[key].shape:
            torch.testing.assert_close(gradient, gradients[key], rtol=1e-5, atol=1e-6)
            compared += 1
    assert compared > 0.7 * len(gradients), (name, compared)
    for ours, theirs in zip(model.routers.values(), whole.routers.values()):
        assert torch.equal(ours.load_counts, theirs.load_counts)
    model.update_expert_bias()
    model.save_pretrained(f"{folder}-{name}")
    dist.barrier()
    again = DeepSeekR1ForCausalLM.from_pretrained(f"{folder}-{name}")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters())), name
    assert set(weight_files(f"{folder}-{name}")) == set(weight_files(folder)), name
    dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_tensor_fsdp_and_expert_parallel_equal_one_process(tmp_path):
    from tests.modeling.test_checkpoints import tiny_model

    tiny_model().save_pretrained(tmp_path / "model")
    (tmp_path / "two_ranks.py").write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(tmp_path / "two_ranks.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "model")], check=True, env=environment, timeout=300)
