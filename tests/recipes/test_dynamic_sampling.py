"""Selecting and joining rollouts against plain loops over rows, and against GRPOTrainer's own loss."""

import math

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from recipes.dynamic_sampling import (
    GroupBuffer,
    Layout,
    count_items,
    group_mask,
    join_rollouts,
    take_groups,
    trim_padding,
)
from tests.recipes.tiny_ppo import one_thread, policy, share_of_t5, word_tokenizer, words  # noqa: F401

PAD = 9
TOKENS = ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps", "importance_sampling_ratio")


def rows_of(count, seed, masked=False):
    """Rows without padding: (prompt, completion, {name: (T,)}, routes (P + C, 2, 3), advantage); one is the widest."""
    generator = torch.Generator().manual_seed(seed)
    length = lambda high: int(torch.randint(1, high, (1,), generator=generator))
    found = []
    for place in range(count):
        sizes = (12, 12) if (place, seed) == (2, 0) else (length(5 + seed), length(max(3, 9 - 3 * seed)))
        prompt, completion = (torch.randint(0, 9, (size,), generator=generator) for size in sizes)
        values = {name: torch.randn(len(completion), generator=generator) for name in TOKENS}
        values["tool_mask"] = torch.randint(0, 2, (len(completion),), generator=generator)
        values["completion_mask"] = torch.full((len(completion),), int(not masked))
        size = (len(prompt) + len(completion), 2, 3)
        routes = torch.randint(0, 8, size, dtype=torch.int16, generator=generator)
        found.append((prompt, completion, values, routes, torch.randn(1, generator=generator)))
    return found


def rollout_from(rows):
    """What GRPOTrainer makes of such rows, one row after the other."""
    width, length = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
    left = lambda value, filling: torch.cat([torch.full((width - len(value),), filling, dtype=value.dtype), value])
    right = lambda value, filling: torch.cat([value, torch.full((length - len(value),), filling, dtype=value.dtype)])
    both = lambda p, routes: torch.cat([
        torch.full((width - p, 2, 3), -1, dtype=torch.int16), routes,
        torch.full((width + length - (width - p) - len(routes), 2, 3), -1, dtype=torch.int16),
    ])  # fmt: skip
    rollout = {
        "prompt_ids": torch.stack([left(row[0], PAD) for row in rows]),
        "prompt_mask": torch.stack([left(torch.ones_like(row[0]), 0) for row in rows]),
        "completion_ids": torch.stack([right(row[1], PAD) for row in rows]),
        "advantages": torch.cat([row[4] for row in rows]),
    }
    fillings = {"tool_mask": 1, "importance_sampling_ratio": 1.0, "completion_mask": 0}
    for name in rows[0][2]:
        rollout[name] = torch.stack([right(row[2][name], fillings.get(name, 0.0)) for row in rows])
    rollout["routes"] = torch.stack([both(len(row[0]), row[3]) for row in rows])
    rollout["num_items_in_batch"] = sum((row[2]["completion_mask"] * row[2]["tool_mask"]).sum() for row in rows)
    return rollout


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)
        assert found[name].dtype == value.dtype


def test_joined_and_selected_as_if_made_from_the_rows():
    parts = [rows_of(6, 0), rows_of(4, 1), rows_of(2, 2, masked=True)]
    joined = join_rollouts([rollout_from(rows) for rows in parts], PAD)
    everything = sum(parts, [])
    assert_same(joined, rollout_from(everything))
    keep = torch.tensor([True, False, False, True, True, False])
    chosen = [row for place, row in enumerate(everything) if keep[place // 2]]
    for wanted in (keep, keep.nonzero().flatten()):
        selected = take_groups(joined, wanted, 2)
        assert_same(trim_padding(selected), rollout_from(chosen))
    backwards = take_groups(joined, torch.tensor([4, 0]), 2)
    assert (backwards["advantages"] == joined["advantages"][[8, 9, 0, 1]]).all()
    assert count_items(joined) == sum(int(row[2]["tool_mask"].sum()) for row in everything[:10])
    wide = trim_padding(selected, multiple_of=4)
    assert all(wide[name].shape[1] % 4 == 0 or wide[name].shape[1] == joined[name].shape[1]
               for name in ("prompt_ids", "completion_ids"))  # fmt: skip


def test_ratios_of_sequences_keys_without_values_and_further_keys():
    rollouts = [rollout_from(rows_of(2, seed)) for seed in (0, 1)]
    for seed, rollout in enumerate(rollouts):
        rollout["importance_sampling_ratio"] = torch.tensor([[0.5], [seed]])
        rollout["ref_per_token_logps"] = None
        rollout["returns"] = torch.ones_like(rollout["old_per_token_logps"])
    with pytest.raises(ValueError, match="cannot join returns of a rollout"):
        join_rollouts(rollouts, PAD)
    layouts = {"returns": Layout("completion", 7.0)}
    joined = join_rollouts(rollouts, PAD, layouts)
    assert joined["importance_sampling_ratio"].tolist() == [[0.5], [0.0], [0.5], [1.0]]
    assert joined["ref_per_token_logps"] is None
    assert (joined["returns"] == torch.where(joined["completion_ids"] == PAD, 7.0, 1.0)).any()
    assert trim_padding(joined, layouts=layouts)["importance_sampling_ratio"].shape == (4, 1)
    with pytest.raises(ValueError, match="pixel_values"):
        take_groups(rollouts[0] | {"pixel_values": torch.zeros(2, 3)}, torch.tensor([0]), 2, layouts)
    with pytest.raises(AssertionError, match="rollouts differ in"):
        join_rollouts([rollouts[0], {k: v for k, v in rollouts[1].items() if k != "routes"}], PAD, layouts)


def test_group_mask_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 2, (400,), generator=generator).float()
    rewards[torch.rand(400, generator=generator) < 0.3] = torch.nan
    for size in (2, 4, 8):
        groups = [rewards[at : at + size].tolist() for at in range(0, 400, size)]
        expected = [len({value for value in group if not math.isnan(value)}) > 1 for group in groups]
        assert group_mask(rewards, size).tolist() == expected
    assert group_mask(torch.tensor([0.3, 0.3 + 1e-8, torch.nan, torch.nan]), 2).tolist() == [False, False]
    with pytest.raises(ValueError, match="multiple of num_generations"):
        group_mask(torch.zeros(6), 4)


def test_the_buffer_does_what_a_plain_loop_does():
    """Groups are tracked by a tag; three processes end their rounds together and keep their own first groups."""
    generator = torch.Generator().manual_seed(1)
    processes, needed, size = 3, 4, 2
    buffers = [GroupBuffer(needed, size, PAD, max_rounds=20, agree=lambda have: least) for _ in range(processes)]
    kept, rounds = [[] for _ in range(processes)], 0
    while not buffers[0].done:
        rounds += 1
        outcome = torch.randint(0, 2, (processes, 6), generator=generator).float()
        for process, rewards in enumerate(outcome):
            differs = [rewards[2 * g] != rewards[2 * g + 1] for g in range(3)]
            kept[process] += [(process, rounds, g) for g in range(3) if differs[g]]
        least = min(map(len, kept))
        for process, buffer in enumerate(buffers):
            rows = rows_of(6, rounds % 4)
            for group in range(3):
                for row in rows[2 * group : 2 * group + 2]:
                    row[4].fill_(100 * process + 10 * rounds + group)
            buffer.add(rollout_from(rows), outcome[process], [(process, rounds, g) for g in range(3)])
            assert buffer.missing == max(0, needed - least)
    assert least >= needed and {buffer.stopped for buffer in buffers} == {"full"}
    for process, buffer in enumerate(buffers):
        batch, tags = buffer.take()
        assert tags == kept[process][:needed]
        expected = [100 * p + 10 * r + g for p, r, g in tags for _ in range(size)]
        assert batch["advantages"].tolist() == expected
        metrics = buffer.metrics()
        assert metrics["sampling rounds"] == rounds and metrics["groups generated"] == 3 * rounds
        assert metrics["groups dropped"] == len(kept[process]) - needed
        assert metrics["groups informative"] == pytest.approx(len(kept[process]) / (3 * rounds))
        assert metrics["samples per trained sample"] == pytest.approx(3 * rounds / needed)


def test_a_buffer_that_stops_early_is_filled_up_with_the_latest():
    buffer = GroupBuffer(3, 2, PAD, max_rounds=2)
    with pytest.raises(ValueError, match="3 groups are missing after 0 rounds"):
        buffer.take()
    buffer.add(rollout_from(rows_of(4, 0)), torch.tensor([0.0, 1.0, 1.0, 1.0]), ["a", "b"])
    assert not buffer.done and buffer.missing == 2
    buffer.add(rollout_from(rows_of(4, 1)), torch.tensor([0.0, 0.0, torch.nan, torch.nan]), ["c", "d"])
    batch, tags = buffer.take()
    assert tags == ["a", "c", "d"] and len(batch["prompt_ids"]) == 6
    found = buffer.metrics()
    assert (found["groups filled up"], found["sampling stopped early"], found["groups unscored"]) == (2, 1.0, 0.25)
    late = GroupBuffer(3, 2, PAD, max_rounds=3)
    for rewards, tags in (([0.0] * 4, "ab"), ([1.0] * 2, "c"), ([0.0, 1.0], "d")):
        late.add(rollout_from(rows_of(len(rewards), 1)), torch.tensor(rewards), tags)
    assert late.take()[1] == ["d", "c", "a"]
    short = GroupBuffer(3, 2, PAD, max_rounds=1)
    short.add(rollout_from(rows_of(4, 0)), torch.tensor([0.0, 1.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="1 rounds brought 2 groups, the batch needs 3; raise max_rounds"):
        short.take()
    with pytest.raises(ValueError, match="max_rounds=0 must be"):
        GroupBuffer(3, 2, PAD, max_rounds=0)


def test_real_rollouts_have_the_loss_that_they_had_apart(tmp_path):
    """GRPOTrainer's rollouts of two widths: the loss of the joined one is the mean of theirs (a mean over rows)."""
    args = GRPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=4, num_generations=2,
        max_completion_length=8, loss_type="grpo", report_to="none", num_iterations=2, logging_steps=1,
        activation_checkpointing=False,
    )  # fmt: skip
    trainer = GRPOTrainer(policy(), share_of_t5, args, words(8), processing_class=word_tokenizer())
    trainer.ref_model, trainer.beta = policy(seed=1), 0.04
    add_fused_lm_head(trainer.ref_model, trainer.temperature, args.cast_lm_head_to_fp32)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    ask = lambda prompts: trainer._generate_and_score_completions([{"prompt": p} for p in prompts for _ in range(2)])
    rollouts = [ask(["t1 t2", "t3"]), ask(["t4 t5 t6 t7 t8", "t9 t2 t2"])]
    for rollout in rollouts:  # else the loss is 0 at the policy that sampled
        rollout["old_per_token_logps"] = rollout["old_per_token_logps"] + 0.3
        rollout["advantages"] = torch.tensor([1.0, -1.0, 0.5, -0.5])
    joined = join_rollouts(rollouts, trainer._tokenizer.pad_token_id)
    assert joined["num_items_in_batch"] == sum(rollout["num_items_in_batch"] for rollout in rollouts)
    with torch.no_grad():
        apart = torch.stack([trainer._compute_loss(trainer.model, rollout) for rollout in rollouts])
        together = trainer._compute_loss(trainer.model, joined)
        again = trainer._compute_loss(trainer.model, trim_padding(take_groups(joined, [True, True, False, False], 2)))
    assert apart.abs().min() > 1e-3
    torch.testing.assert_close(together, apart.mean(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(again, apart[0], atol=1e-6, rtol=1e-5)
