"""Router replay in the trainers: on rollouts whose routing biases are moved between sampling and training."""

import types

import pytest
import torch
from peft import LoraConfig
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
    set_seed,
)
from trl import GRPOTrainer

from recipes.grpo_arguments import R1GRPOConfig
from recipes.router_replay import bytes_per_token, padded_routes, replay_obstacle
from tests.recipes import tiny_ppo
from tests.recipes.plain_grpo import (
    PLAIN,
    assert_gradient,
    load,
    log_probs_of,
    mean_number,
    plain_objective,
    recorded,
    routes_of,
    rows_of,
)
from tests.recipes.tiny_grpo import build
from tests.recipes.tiny_ppo import one_thread, policy, rollout_of  # noqa: F401

REPLAY = PLAIN | {"router_replay": True, "route_probe_rows": 16}


@torch.no_grad()
def perturb(model, seed=0):
    """Other biases: other experts for most tokens."""
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.copy_(0.3 * torch.linspace(1, -1, len(bias)).roll(seed))


class Perturb(TrainerCallback):
    """Moves the biases after every optimizer step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        perturb(model, state.global_step)


def perturbed_after_sampling(trainer):
    """Sampler and trainer route differently, as other kernels make them do."""
    generate = trainer._generate_single_turn

    def sampled(*args, **kwargs):
        found = generate(*args, **kwargs)
        perturb(trainer._policy())
        return found

    trainer._generate_single_turn = sampled
    return trainer


def test_mini_batches_train_with_the_routing_of_the_rollout(tmp_path):
    """Four steps on one rollout, other biases before each: gradients are those of the routing that was sampled."""
    changes = {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 4, "learning_rate": 0.3}
    steps = recorded(tmp_path, callbacks=[Perturb()], **(REPLAY | changes))
    assert {step["rollout"] for step in steps} == {1}
    for step in steps:
        assert_gradient(step, *plain_objective(step, steps, {}, replay=True))
    rows = rows_of(steps[-1])
    sampled, own = (routes_of(load(steps[-1][name]), rows) for name in ("sampled", "weights"))
    assert any(not a.sort(-1).values.equal(b.sort(-1).values) for a, b in zip(sampled, own))
    with pytest.raises(AssertionError):
        assert_gradient(steps[-1], *plain_objective(steps[-1], steps, {}))


@pytest.mark.parametrize("replay", [True, False])
def test_what_replay_changes_is_measured(tmp_path, replay):
    """Against passes of our own; the first weights have not moved, so that with replay the ratios are 1."""
    changes = {"router_replay": replay, "steps_per_generation": 2}
    trainer = perturbed_after_sampling(build(tmp_path, mean_number, **(REPLAY | changes)))
    first = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    rollout, log = rollout_of(trainer, 16), trainer._metrics["train"]
    rows = rows_of({"parts": [rollout]})
    sampler, now = load(first), load(trainer.model.state_dict())
    routes, own = routes_of(sampler, rows), routes_of(now, rows)
    with torch.no_grad():
        sampled, with_own = (log_probs_of(model, rows, 1.0) for model in (sampler, now))
        replayed = log_probs_of(now, rows, 1.0, routes)
    kl = lambda pairs: torch.cat([torch.expm1(a - b) - (a - b) for a, b in pairs]).mean().item()
    assert max((a - b).abs().max() for a, b in zip(sampled, replayed)) < 1e-5
    assert log["routing/kl_replayed"][0] < 1e-9 and log["routing/largest_difference"][0] < 1e-5
    assert log["routing/kl_own"][0] == pytest.approx(kl(zip(with_own, sampled)), rel=1e-3)
    assert log["routing/kl_own"][0] > 1e-5
    same = torch.cat([(a.unsqueeze(-1) == b.unsqueeze(-2)).any(-1)[0, :-1].flatten() for a, b in zip(routes, own)])
    sets = torch.cat([(a.sort(-1).values == b.sort(-1).values).all(-1)[0, :-1].flatten() for a, b in zip(routes, own)])
    assert log["routing/experts_differ"][0] == pytest.approx(1 - same.float().mean().item(), abs=1e-6)
    assert log["routing/tokens_differ"][0] == pytest.approx(1 - sets.float().mean().item(), abs=1e-6) != 0
    expected = replayed if replay else with_own
    assert ("routes" in rollout) == replay
    for row, values in enumerate(expected):
        torch.testing.assert_close(rollout["old_per_token_logps"][row, : len(values)], values, atol=1e-5, rtol=0)
    if replay:
        tokens = rollout["routes"][0, 0].numel() * rollout["routes"].element_size()
        assert tokens == bytes_per_token(policy()) == 4 and "4 bytes a token" in trainer.replay_line()
        for row, (prompt, completion) in enumerate(rows):
            start = rollout["prompt_ids"].size(1) - len(prompt)
            kept = rollout["routes"][row, start : start + len(prompt) + len(completion) - 1]
            assert kept.sort(-1).values.equal(routes[row][0, :-1].sort(-1).values)


def test_completions_out_of_the_loss_are_not_compared(tmp_path):
    """Of a completion that was cut off and is masked, the trainer sees no token: its routing is no routing at all."""
    changes = {"mask_truncated_completions": True, "route_probe_rows": 16, "max_completion_length": 4}
    trainer = build(tmp_path, mean_number, **changes)
    rollout, log = rollout_of(trainer, 16), trainer._metrics["train"]
    assert log["completions/clipped_ratio"][0] > 0.3 and not rollout["completion_mask"].any(1).all()
    assert log["routing/experts_differ"] == [0] and log["routing/largest_difference"][0] < 1e-5


@pytest.mark.parametrize("replay", [True, False])
def test_ppo_replays_too(tmp_path, replay):
    """The biases move after sampling and between the steps of a rollout; with next to no learning rate every ratio is
    1 with replay, and another without."""
    trainer = tiny_ppo.build(
        tmp_path, mean_number, router_replay=replay, num_mini_batches=2, max_steps=4, learning_rate=1e-12,
        arguments={"callbacks": [Perturb()]}, kl_coef=0.0,
    )  # fmt: skip
    perturbed_after_sampling(trainer).train()
    logged = [row for row in trainer.state.log_history if "ratio" in row]
    off = max(abs(row["approx_kl"]) for row in logged)
    assert (off < 1e-9) == replay
    assert logged[0]["routing/kl_replayed"] < 1e-9 < logged[0]["routing/kl_own"]


def test_an_adapter_is_replayed_and_its_base_goes_its_own_way(tmp_path):
    adapter = LoraConfig(r=4, target_modules=["kv_b_proj", "o_proj"], init_lora_weights=False)
    trainer = build(
        tmp_path, mean_number, arguments={"peft_config": adapter}, beta=0.1, steps_per_generation=2,
        **(REPLAY | {"route_probe_rows": 8}),
    )  # fmt: skip
    assert trainer.ref_model is None and trainer.router_replay
    base = policy()
    perturb(base)  # as the biases of the policy will be
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    rollout = rollout_of(perturbed_after_sampling(trainer), 16)
    with torch.no_grad():
        expected = log_probs_of(base.eval(), rows_of({"parts": [rollout]}), 1.0)
    apart = [rollout["ref_per_token_logps"][row, : len(values)] - values for row, values in enumerate(expected)]
    assert max(each.abs().max() for each in apart) < 1e-5
    assert trainer._metrics["train"]["routing/kl_replayed"][0] < 1e-9 < trainer._metrics["train"]["routing/kl_own"][0]
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == trainable
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not p.equal(before[name])}
    assert moved == trainable


def llama():
    set_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ))  # fmt: skip


def test_a_dense_policy_trains_without(tmp_path):
    with pytest.raises(ValueError, match="router_replay=true: LlamaForCausalLM is not a DeepSeek-R1 model"):
        build(tmp_path, model=llama(), router_replay=True)
    trainer = build(tmp_path, mean_number, model=llama(), beta=0.1, sync_ref_model=True, ref_model_sync_steps=1,
                    ref_model_mixup_alpha=1.0)  # fmt: skip
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    assert not trainer.router_replay and trainer.replay_line() == "off"
    trainer.train()
    after, reference = trainer.model.state_dict(), trainer.ref_model.state_dict()
    assert all(not after[name].equal(tensor) for name, tensor in before.items())
    assert all(after[name].equal(tensor) for name, tensor in reference.items())
    assert not [name for row in trainer.state.log_history for name in row if name.startswith("routing")]


def test_another_model_with_experts_keeps_its_balance_loss(tmp_path):
    """Mixtral's configuration declares one, and TRL adds it: the same step as on TRL's own passes."""
    grads = []
    for own in (False, True):
        set_seed(0)
        model = MixtralForCausalLM(MixtralConfig(
            vocab_size=32, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, router_aux_loss_coef=0.1,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ))  # fmt: skip
        trainer = build(tmp_path, mean_number, model=model, max_steps=1, max_grad_norm=1.0)
        if own:
            log_probs = types.MethodType(GRPOTrainer._get_per_token_logps_and_entropies, trainer)
            trainer._get_per_token_logps_and_entropies = log_probs
        trainer.train()
        (log,) = [row for row in trainer.state.log_history if "aux_loss" in row]
        grads.append([log["grad_norm"], log["aux_loss"]])
    assert grads[0] == pytest.approx(grads[1], rel=1e-5) and min(grads[0]) > 0


def test_what_cannot_be_replayed(tmp_path):
    for other in ("use_vllm", "use_transformers_continuous_batching"):
        with pytest.raises(ValueError, match=f"router_replay=true with {other}=true"):
            R1GRPOConfig(output_dir=str(tmp_path), router_replay=True, use_cpu=True, bf16=False, **{other: True})
    args = R1GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert replay_obstacle(policy(), args, None) is None
    assert "several calls of generate" in replay_obstacle(policy(), args, None, [print])
    assert "do not come from generate" in replay_obstacle(policy(), args, print)
    model = policy()
    model.decoding.enabled = False
    with pytest.raises(ValueError, match="router_replay=true: model.decoding.enabled is false"):
        build(tmp_path, mean_number, model, router_replay=True)


def test_a_generate_that_records_nothing(tmp_path, caplog):
    """Asked for, replay is an error then; by default it is off, and said to be."""
    slow = {"generation_kwargs": {"use_cache": False}, "max_steps": 1}
    with pytest.raises(ValueError, match="router_replay: generate did not take the fast path"):
        build(tmp_path, mean_number, router_replay=True, **slow).train()
    trainer = build(tmp_path, mean_number, **slow)
    trainer.train()
    assert "they are not replayed" in caplog.text and trainer.replay_line() == "off"


def test_padded_routes():
    routes = torch.arange(24, dtype=torch.int16).view(2, 3, 2, 2)
    for columns in (3, 4, 6):
        found = padded_routes(routes, columns)
        assert found.shape == (2, columns, 2, 2) and (found[:, -1] == -1).all()
        kept = min(3, columns - 1)
        assert found[:, :kept].equal(routes[:, :kept]) and (found[:, kept:] == -1).all()
