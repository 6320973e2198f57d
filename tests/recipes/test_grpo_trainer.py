"""R1GRPOTrainer's gradients against losses written plainly from the logits, on real steps of a tiny policy."""

import inspect

import pytest
import torch
from trl import GRPOTrainer

from recipes import grpo_trainer
from tests.recipes.plain_grpo import (
    PLAIN,
    advantages_of,
    assert_gradient,
    load,
    log_probs_of,
    plain_objective,
    recorded,
    rows_of,
    value_of,
)
from tests.recipes.tiny_grpo import build
from tests.recipes.tiny_ppo import LENGTH, one_thread, policy  # noqa: F401

# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_the_on_policy_gradient_is_reinforce_with_a_group_baseline(tmp_path, temperature):
    changes = {"temperature": temperature, "scale_rewards": "none", "loss_type": "dr_grpo", "max_steps": 1}
    (step,) = recorded(tmp_path, **changes)
    model, rows = load(step["weights"]), rows_of(step)
    advantages = advantages_of([step], "none")
    loss = 0.0
    for (prompt, completion), log_probs in zip(rows, log_probs_of(model, rows, temperature)):
        loss = loss - advantages[tuple(prompt.tolist()), tuple(completion.tolist())] * log_probs.sum()
    assert_gradient(step, loss / (8 * LENGTH), model)


VARIANTS = {
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dapo, clip-higher": {"loss_type": "dapo", "epsilon_high": 0.28, "epsilon": 0.05},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
    "two-sided": {"loss_type": "grpo", "delta": 1.3},
    "r1": {"loss_type": "grpo", "epsilon": 10.0, "beta": 0.3, "use_bias_correction_kl": False},
    "kl, temperature": {"loss_type": "dapo", "beta": 0.3, "temperature": 1.4},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_loss_on_and_off_policy(tmp_path, name):
    """Two mini-batches of a rollout, twice: three of the four steps are off-policy, with ratios beyond the clip."""
    changes = VARIANTS[name]
    more = {"ref_model": policy(seed=1)} if "beta" in changes else {}
    steps = recorded(tmp_path, steps_per_generation=2, num_iterations=2, max_steps=4, learning_rate=1.0, **changes,
                     **more)  # fmt: skip
    assert {step["rollout"] for step in steps} == {1} and len(steps) == 4
    assert steps[0]["parts"][0]["completion_ids"].equal(steps[2]["parts"][0]["completion_ids"])
    for step in steps:
        assert_gradient(step, *plain_objective(step, steps, changes, policy(seed=1).eval()))
    changed = [(steps[-1]["weights"][n] - steps[0]["weights"][n]).abs().max() for n in steps[0]["grads"]]
    assert max(changed) > 1e-2


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_any_split_into_micro_batches_gives_the_same_step(tmp_path, loss_type):
    runs = [
        recorded(tmp_path, model=policy(), loss_type=loss_type, per_device_train_batch_size=size, beta=0.2,
                 gradient_accumulation_steps=8 // size, steps_per_generation=16 // size)  # fmt: skip
        for size in (8, 2)
    ]
    for whole, split in zip(*runs, strict=True):
        assert len(whole["parts"]) == 1 and len(split["parts"]) == 4
        scale = max(grad.abs().max() for grad in whole["grads"].values())
        for name, grad in whole["grads"].items():
            torch.testing.assert_close(split["grads"][name], grad, atol=1e-5 * scale, rtol=1e-3, msg=name)


# ---------------------------------------------------------------- advantages


def first_rollout(output_dir, reward, **changes):
    trainer = build(output_dir, reward, **(PLAIN | changes))
    trainer.model.train()
    torch.manual_seed(7)
    return trainer._generate_and_score_completions([None] * 8), trainer


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages_sum_to_zero_and_ignore_shifts(tmp_path, scale):
    change = lambda factor, shift: lambda completions, **_: [factor * value_of(c) + shift for c in completions]
    base, shifted, scaled = (
        first_rollout(tmp_path, change(*each), scale_rewards=scale)[0] for each in ((1, 0), (1, 5), (8, 0))
    )
    assert base["completion_ids"].equal(shifted["completion_ids"]) and base["advantages"].abs().min() > 1e-3
    groups = base["advantages"].view(2, 4)
    torch.testing.assert_close(groups.sum(1), torch.zeros(2), atol=2e-6, rtol=0)
    assert all(len({tuple(ids.tolist()) for ids in part}) == 1 for part in base["prompt_ids"].view(2, 4, -1))
    torch.testing.assert_close(shifted["advantages"], base["advantages"], atol=2e-4, rtol=1e-4)
    factor = 1.0 if scale == "group" else 8.0  # but for the 1e-4 beside the deviation
    torch.testing.assert_close(scaled["advantages"], factor * base["advantages"], atol=1e-3, rtol=2e-3)


def test_what_no_weighted_reward_scored_teaches_nothing(tmp_path):
    """Accuracy says None for one completion of each group: neither a baseline of 0 nor an advantage of its own, though
    a tracked reward judges every completion."""
    unscored = lambda completions, **_: [None if place % 4 == 1 else value_of(c) + 3 for place, c in
                                         enumerate(completions)]  # fmt: skip
    tracked = lambda completions, **_: [float(len(c)) for c in completions]
    unscored.__name__, tracked.__name__ = "unscored", "tracked"
    rollout, trainer = first_rollout(tmp_path, [unscored, tracked], reward_weights=[1.0, 0.0], scale_rewards="none")
    groups = rollout["advantages"].view(2, 4)
    assert not groups[:, 1].any() and (groups[:, [0, 2, 3]].abs() > 1e-4).all() and groups.abs().max() < 1
    torch.testing.assert_close(groups.sum(1), torch.zeros(2), atol=2e-6, rtol=0)
    assert trainer._metrics["train"]["reward"][0] > 3


# ---------------------------------------------------------------- the seams


def test_the_private_seams_of_trl():
    """What R1GRPOTrainer overrides and reads. A failure here: read TRL's changes before anything else."""
    for name, expected in {"_calculate_rewards": 5, "_generate": 2, "_generate_and_score_completions": 2,
                           "_compute_loss": 3, "_prepare_inputs": 2}.items():  # fmt: skip
        assert len(inspect.signature(getattr(GRPOTrainer, name)).parameters) == expected, name
    source = inspect.getsource(GRPOTrainer)
    for attribute in ("_pending_extra_logs", "_pending_metrics", "reward_func_names", "reward_weights", "ref_model",
                      "shuffle_sequence_dict", "num_items_in_batch", "eos_token_ids", "_tokenizer"):  # fmt: skip
        assert attribute in source, attribute
    assert len(inspect.getsource(grpo_trainer).splitlines()) <= 400
