"""recipes/reward.py and recipes/ppo.py on a GPU: bf16 compute on fp32 weights, and bf16 weights."""

import pytest
import torch

from recipes import ppo, reward
from recipes.logging_callbacks import read_metrics
from tests.recipes import test_ppo, test_reward

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
policy_base, reward_base = test_ppo.base, test_reward.base


def on_gpu(arguments):
    return [argument for argument in arguments if argument != "--use_cpu"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_learns(policy_base, tmp_path, dtype):
    more = ("--max_steps", "80", "--weights_dtype", dtype, "--eval_strategy", "no", "--save_steps", "80",
            "--per_device_train_batch_size", "32", "--learning_rate", "3e-3")  # fmt: skip
    ppo.main(on_gpu(test_ppo.arguments(policy_base, tmp_path, *more)))
    records = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "train"]
    rewards = [record["reward"] for record in records if record.get("reward") is not None]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.03
    assert records[0]["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert all(record["update seconds"] > 0 for record in records if record.get("update seconds") is not None)


def test_a_reward_model_learns(reward_base, tmp_path):
    results = reward.main(on_gpu(test_reward.arguments(reward_base, tmp_path)))
    assert results["preferences"]["accuracy"]["value"] > 0.9
