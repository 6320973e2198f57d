"""R1GRPOTrainer as a whole: learning, resuming, dynamic sampling, schedules, the reference, two ranks."""

import numpy
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from recipes.grpo_reference import REFERENCE_FILE
from tests.recipes.plain_grpo import log_probs_of, mean_number, rows_of, value_of
from tests.recipes.processes import run_ranks
from tests.recipes.test_ppo_control import KillAfter, Killed, curve, weights
from tests.recipes.tiny_grpo import build
from tests.recipes.tiny_ppo import (
    LENGTH,
    logged,
    one_thread,  # noqa: F401
    policy,
    rollout_of,
    words,
)


def accuracy(completions, **_):
    """1 where the mean number is over a bound: about half of what a random policy writes."""
    return [float(value_of(completion) > 0.42) for completion in completions]


def rarely(completions, **_):
    return [float("t5" in completion.split()[:3]) for completion in completions]


def test_the_reward_rises(tmp_path):
    trainer = build(
        tmp_path, mean_number, per_device_train_batch_size=32, num_generations=8, steps_per_generation=2, max_steps=32,
        beta=0.001, route_probe_rows=0, train_dataset=words(64),
    )  # fmt: skip
    trainer.train()
    rewards = logged(trainer, "reward")  # one a rollout
    assert len(rewards) == 16 and sum(rewards[:2]) / 2 < 0.5
    assert sum(rewards[-3:]) / 3 > 0.75


# ---------------------------------------------------------------- resuming

# Rollouts of two optimizer steps of two micro-batches, gone through twice.
RESUMED = {
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2,
    "max_steps": 10, "beta": 0.05, "sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.7,
    "curriculum": "pass_rate", "dynamic_sampling": True, "dynamic_sampling_rounds": 2, "lr_scheduler_type": "linear",
}  # fmt: skip


def resumable(output_dir, reward=accuracy, callbacks=(), **changes):
    arguments = {"callbacks": list(callbacks)}
    return build(output_dir, reward, train_dataset=words(20), arguments=arguments, **(RESUMED | changes))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainer = resumable(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    trainer = resumable(folder, save_strategy="steps", save_steps=1, callbacks=[KillAfter(6)])
    with pytest.raises(Killed):
        trainer.train()
    return folder


@pytest.mark.parametrize("step", [2, 5], ids=["before the reference moved", "second pass, after it moved"])
def test_a_resumed_run_is_the_uninterrupted_one(uninterrupted, killed, tmp_path, step):
    """Bit for bit: weights, reference, routing biases, curriculum, in the middle of a rollout."""
    asked = []

    def counted(completions, **columns):
        asked.append(trainer.state.global_step)
        return accuracy(completions)

    counted.__name__ = "accuracy"
    trainer = resumable(tmp_path, reward=counted)
    torch.manual_seed(99)  # nothing that was drawn in this process may matter
    trainer.train(resume_from_checkpoint=str(killed / f"checkpoint-{step}"))
    expected, found = curve(uninterrupted), curve(trainer)
    assert set(found) == set(range(1, 11)) and min(asked) == (4 if step < 4 else 8)
    for at in found:
        assert found[at] == expected[at], at
    for ours, whole in ((trainer.model, uninterrupted.model), (trainer.ref_model, uninterrupted.ref_model)):
        whole = weights(whole)
        assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(ours).items())
    assert same_state(trainer.curriculum.state_dict(), uninterrupted.curriculum.state_dict())
    assert (killed / f"checkpoint-{step}" / REFERENCE_FILE).exists() == (step > 2)


def same_state(one, two):
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same_state(one[name], two[name]) for name in one)
    if isinstance(one, (torch.Tensor, numpy.ndarray)):
        return bool((torch.as_tensor(one) == torch.as_tensor(two)).all())
    return one == two


@pytest.mark.parametrize("name, message", [("reference.pt", "the reference had moved"),
                                           ("rollout_0.pt", "save_only_model")])  # fmt: skip
def test_a_checkpoint_without_its_parts(killed, tmp_path, name, message):
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    for path in (killed / "checkpoint-5").iterdir():
        if path.name != name and path.is_file():
            (folder / path.name).symlink_to(path)
    with pytest.raises(ValueError, match=f"{name} is missing.*{message}"):
        resumable(tmp_path).train(resume_from_checkpoint=str(folder))


def test_the_rest_of_a_rollout_is_not_split_anew(killed, tmp_path):
    with pytest.raises(ValueError, match="a rollout made with gradient_accumulation_steps=2, .*, now 1, 2: go on"):
        trainer = resumable(tmp_path, gradient_accumulation_steps=1, steps_per_generation=2)
        trainer.train(resume_from_checkpoint=str(killed / "checkpoint-5"))


# ---------------------------------------------------------------- dynamic sampling


def test_only_groups_with_variance_are_trained(tmp_path):
    trainer = build(tmp_path, rarely, dynamic_sampling=True, dynamic_sampling_rounds=30, per_device_train_batch_size=16,
                    train_dataset=words(60), curriculum="pass_rate", curriculum_reward="rarely")  # fmt: skip
    rollout, log, tokenizer = rollout_of(trainer, 16), trainer._metrics["train"], trainer.processing_class
    for rows in torch.arange(16).view(4, 4):
        rewards = rarely(tokenizer.batch_decode(rollout["completion_ids"][rows], skip_special_tokens=True))
        assert 0 < sum(rewards) < 4 and rollout["advantages"][rows].any()
        assert len({tuple(ids.tolist()) for ids in rollout["prompt_ids"][rows]}) == 1
        torch.testing.assert_close(rollout["advantages"][rows].sum(), torch.zeros(()), atol=1e-5, rtol=0)
    assert log["sampling rounds"][0] > 1 and log["groups filled up"] == [0]
    assert rollout["num_items_in_batch"] == rollout["completion_mask"].sum()
    asked = trainer.curriculum.rates.asked  # no prompt twice in a rollout
    assert asked.max() == 1 and asked.sum() == 4 * log["sampling rounds"][0] == log["groups generated"][0]


def test_a_rollout_is_filled_up_where_rounds_run_out(tmp_path):
    constant = lambda completions, **_: [1.0] * len(completions)
    trainer = build(tmp_path, constant, dynamic_sampling=True, dynamic_sampling_rounds=2, max_steps=1)
    before = weights(trainer.model)
    trainer.train()
    (log,) = [row for row in trainer.state.log_history if "sampling rounds" in row]
    assert (log["sampling rounds"], log["groups filled up"], log["sampling stopped early"]) == (2, 2, 1)
    assert log["frac_reward_zero_std"] == 1 and len(trainer._buffered_inputs[0]["prompt_ids"]) == 8
    moved = {name for name, tensor in weights(trainer.model).items() if not tensor.equal(before[name])}
    assert all("gate.weight" in name or "embed" in name or "layers." in name for name in moved)  # balance loss alone


# ---------------------------------------------------------------- schedules


def test_rewards_and_prompts_enter_at_their_step(tmp_path):
    seen, rows = [], words(24)
    rows = rows.add_column("task", [None if place % 2 else "sums" for place in range(24)])

    def late(completions, task, trainer_state, **_):
        seen.append((trainer_state.global_step, set(task)))
        return [100.0] * (len(completions) // 2) + [0.0] * (len(completions) // 2)

    trainer = build(
        tmp_path, [mean_number, late], train_dataset=rows, num_generations=4, max_steps=6, reward_from_step={"late": 4},
        prompts_from_step=2, per_device_train_batch_size=4, steps_per_generation=2, num_iterations=1,
    )  # fmt: skip
    trainer.train()
    assert [step for step, _ in seen] == [0, 2, 4]
    assert seen[0][1] == {"sums"} and None in seen[1][1] | seen[2][1]
    rewards = logged(trainer, "reward")
    assert max(rewards[:2]) < 1 and rewards[2] > 40
    assert logged(trainer, "rewards/late/mean") == [50.0] * 3  # logged from the beginning


def test_schedules_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="reward_from_step names 'lat'; the rewards are mean_number"):
        build(tmp_path, mean_number, reward_from_step={"lat": 3})
    with pytest.raises(ValueError, match="reward_from_step.mean_number='soon' must be a step, zero or more"):
        build(tmp_path, mean_number, reward_from_step={"mean_number": "soon"})
    with pytest.raises(ValueError, match="prompts_from_step=3 .* the prompts have no column task"):
        build(tmp_path, mean_number, prompts_from_step=3)


# ---------------------------------------------------------------- the reference


class Snapshots(TrainerCallback):
    def __init__(self):
        self.kept = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.kept.append((weights(model), weights(self.trainer.ref_model)))


@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_the_reference_follows_with_its_routing_biases(tmp_path, alpha):
    snapshots = Snapshots()
    trainer = build(tmp_path, mean_number, beta=0.2, sync_ref_model=True, ref_model_sync_steps=2, max_steps=5,
                    ref_model_mixup_alpha=alpha, arguments={"callbacks": [snapshots]})  # fmt: skip
    snapshots.trainer = trainer
    trainer.train()
    kept = snapshots.kept
    for step in range(1, 5):
        (now, reference), before = kept[step], kept[step - 1][1]
        for name, tensor in reference.items():
            expected = before[name] if step % 2 else (1 - alpha) * before[name] + alpha * now[name]
            torch.testing.assert_close(tensor, expected, atol=1e-7, rtol=1e-6, msg=name)
    biases = [name for name in kept[0][0] if name.endswith("e_score_correction_bias") and "layers.1." in name]
    assert biases and all(not kept[2][1][name].equal(kept[0][1][name]) for name in biases)


def test_the_kl_is_k3(tmp_path):
    trainer = build(tmp_path, mean_number, beta=0.5, max_steps=1, arguments={"ref_model": policy(seed=1)},
                    router_replay=False)  # fmt: skip
    first = policy().eval()
    first.load_state_dict(trainer.model.state_dict())
    trainer.train()
    rows = rows_of({"parts": trainer._buffered_inputs})
    with torch.no_grad():
        new, ref = (torch.cat(log_probs_of(model, rows, 1.0)) for model in (first, policy(seed=1).eval()))
    expected = ((ref - new).exp() - (ref - new) - 1).mean().item()
    assert logged(trainer, "kl") == [pytest.approx(expected, rel=1e-4)] and expected > 0.01


def test_references_that_cannot_follow(tmp_path):
    adapter, follow = LoraConfig(r=2, target_modules=["o_proj"]), {"beta": 0.1, "sync_ref_model": True}
    with pytest.raises(ValueError, match="sync_ref_model=true with an adapter: .*lora_rank=0"):
        build(tmp_path, arguments={"peft_config": adapter}, **follow)
    with pytest.raises(ValueError, match="sync_ref_model=true: the reference is no copy of the policy"):
        build(tmp_path, arguments={"peft_config": adapter, "ref_model": policy(seed=1)}, **follow)
    with pytest.raises(ValueError, match="the reference is no copy of the policy"):
        build(tmp_path, arguments={"ref_model": policy(hidden_size=16)}, **follow)


# ---------------------------------------------------------------- the look before the first step


def test_the_sample_before_the_first_step_leaves_no_trace(tmp_path):
    """Three prompts in parts of one rollout at most; training after it is what it would have been."""
    runs = []
    for look in (False, True):
        trainer = build(tmp_path, mean_number, beta=0.1)
        if look:
            widths, generate = [], trainer._generate
            trainer._generate = lambda prompts: widths.append(len(prompts)) or generate(prompts)
            found = trainer.sample_groups(3, 4)
            trainer._generate = generate
            assert max(widths) <= 8 and sum(widths) == 12
            assert found["rewards"].shape == (3, 4, 1) and len(found["completions"]) == 12 == len(found["prompts"])
            texts = [value_of(text) for text in found["completions"]]
            torch.testing.assert_close(found["rewards"].flatten(), torch.tensor(texts))
            groups = [found["prompts"][at : at + 4] for at in (0, 4, 8)]
            assert all(len(set(group)) == 1 for group in groups) and len(set(found["prompts"])) == 3
            assert [cut for cut in found["truncated"]] == [n == LENGTH and cut for n, cut in
                                                          zip(found["lengths"], found["truncated"])]  # fmt: skip
        trainer.train()
        runs.append((curve(trainer), weights(trainer.model)))
    assert runs[0][0] == runs[1][0]
    assert all(tensor.equal(runs[1][1][name]) for name, tensor in runs[0][1].items())


def test_evaluations_leave_no_trace(tmp_path):
    """In the middle of a rollout and before it is sampled: rewards, curriculum, replay and weights are the same."""
    runs = []
    for more in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer = build(tmp_path, accuracy, num_iterations=2, max_steps=4, arguments={"eval_dataset": words(8, seed=5)},
                        curriculum="pass_rate", **more)  # fmt: skip
        trainer.train()
        runs.append((logged(trainer, "reward"), weights(trainer.model), trainer.curriculum.state_dict()))
        assert len(logged(trainer, "eval_reward")) == (4 if more else 0)
    assert runs[0][0] == runs[1][0] and same_state(runs[0][1], runs[1][1]) and same_state(runs[0][2], runs[1][2])


def test_the_sample_is_of_what_counts_at_the_first_step(tmp_path):
    """Neither prompts that are held back, nor rewards that weigh nothing yet."""
    rows = words(24).add_column("task", [None if place % 3 else "sums" for place in range(24)])
    late = lambda completions, **_: [float(place) for place, _ in enumerate(completions)]
    late.__name__ = "late"
    changes = {"prompts_from_step": 3, "reward_from_step": {"late": 2}}
    trainer = build(tmp_path, [mean_number, late], train_dataset=rows, **changes)
    found = trainer.sample_groups(16, 4)
    assert set(found["prompts"]) == set(rows["prompt"][::3]) and found["weights"] == [1, 0]
    with pytest.raises(ValueError, match="prompts_from_step=3 holds back all prompts"):
        nothing = words(24).add_column("task", [None] * 24)
        build(tmp_path, mean_number, train_dataset=nothing, prompts_from_step=3)


def test_a_curriculum_needs_a_pass_rate(tmp_path):
    percent = lambda completions, **_: [100 * value_of(completion) for completion in completions]
    percent.__name__ = "percent"
    trainer = build(tmp_path, percent, curriculum="pass_rate", curriculum_reward="percent")
    with pytest.raises(ValueError, match="curriculum_reward='percent' gave a group .*, which is no pass rate"):
        rollout_of(trainer)


# ---------------------------------------------------------------- two ranks


def scripted(prompts, trainer):
    """Completions that depend on prompt, place in the group and step alone: no rank can differ."""
    tokenizer, completions, seen = trainer.processing_class, [], {}
    for prompt in prompts:
        seen[prompt] = seen.get(prompt, -1) + 1
        seed = f"{prompt} {seen[prompt]} {trainer.state.global_step}"
        generator = torch.Generator().manual_seed(int.from_bytes(seed.encode()[-7:], "big") % 2**31 + len(seed))
        length = int(torch.randint(1, LENGTH + 3, (), generator=generator))
        ids = torch.randint(3, 32, (length,), generator=generator).tolist()
        completions.append((ids[:-1] + [2])[:LENGTH])
    return {"prompt_ids": tokenizer(text=prompts)["input_ids"], "completion_ids": completions, "logprobs": None}


CASES = {
    "dapo": {"loss_type": "dapo", "dynamic_sampling": True, "dynamic_sampling_rounds": 3, "num_iterations": 1},
    "grpo": {"loss_type": "grpo", "num_iterations": 2},
}


def run_scripted(output_dir, case, **changes):
    """Four steps on given completions: every part that adds up over ranks takes part."""
    settings = {
        "max_steps": 4, "optim": "sgd", "learning_rate": 0.1, "beta": 0.1, "curriculum": "pass_rate",
        "sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.5,
    }  # fmt: skip
    rows = Dataset.from_dict({"prompt": sorted(words(40)["prompt"])})
    trainer = build(
        output_dir, [accuracy, mean_number], train_dataset=rows, arguments={"rollout_func": scripted},
        **(settings | CASES[case] | changes),
    )  # fmt: skip
    found = trainer.sample_groups(3, 4) | {"names": None}
    trainer.train()
    state = trainer.curriculum.state_dict()
    return {"weights": weights(trainer._policy()), "curve": curve(trainer), "curriculum": state,
            "reference": weights(trainer.accelerator.unwrap_model(trainer.ref_model)), "sample": found}, trainer


def test_two_ranks_equal_one_with_the_doubled_batch(tmp_path):
    """Over gloo, against one process; one mini-batch is all of a rollout, whose rows are in another order then."""
    run_ranks(2, lambda rank: as_a_rank(tmp_path), tmp_path)
    whole = {case: run_scripted(tmp_path / "one", case, per_device_train_batch_size=16)[0] for case in CASES}
    first = weights(policy())
    for case, expected in whole.items():
        found = torch.load(tmp_path / f"two_ranks_{case}.pt", weights_only=False)
        assert found["ranks_equal"] and same_state(found["curricula"][0], found["curricula"][1])
        assert len(found["sample"]["completions"]) == 16 and found["sample"]["rewards"].shape == (4, 4, 2)
        assert len(expected["sample"]["completions"]) == 12
        for part in ("weights", "reference"):
            for name, tensor in expected[part].items():
                torch.testing.assert_close(found[part][name], tensor, rtol=1e-4, atol=2e-6, msg=name)
        assert any(not tensor.equal(first[name]) for name, tensor in expected["reference"].items())
        if case == "grpo":  # with dynamic sampling, groups of another round may take part: their own share of ranks
            assert same_state(found["curriculum"], expected["curriculum"])
        for step, logs in expected["curve"].items():
            assert found["curve"][step].keys() == logs.keys()
            for name, value in logs.items():
                assert found["curve"][step][name] == pytest.approx(value, rel=1e-3, abs=1e-5), (case, step, name)


def as_a_rank(output_dir):
    for case in CASES:
        result, trainer = run_scripted(output_dir, case, per_device_train_batch_size=8)
        flat = torch.cat([tensor.flatten().double() for tensor in result["weights"].values()])
        both = trainer.accelerator.gather(flat[None])
        states = [None, None]
        torch.distributed.all_gather_object(states, trainer.curriculum.state_dict())
        if trainer.accelerator.is_main_process:
            result |= {"ranks_equal": torch.equal(both[0], both[1]), "curricula": states}
            torch.save(result, output_dir / f"two_ranks_{case}.pt")
