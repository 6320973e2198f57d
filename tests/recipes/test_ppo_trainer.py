"""PPOTrainer: what a rollout becomes, what a step does, what is on disk, what is refused."""

import inspect
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import add_fused_lm_head

from modeling_deepseek_r1 import DeepSeekR1ForCausalLM
from recipes.ppo_losses import adapted_kl_coef, generalized_advantages
from recipes.ppo_trainer import PPOConfig, PPOTrainer
from recipes.rl_setup import load_causal_lm
from recipes.vllm_policy import attach
from tests.recipes.tiny_ppo import (
    LENGTH,
    build,
    logged,
    one_thread,  # noqa: F401
    policy,
    rollout_of,
    share_of_t5,
    word_tokenizer,
    words,
)

# ---------------------------------------------------------------- the seams


def test_the_private_seams_of_trl():
    """What PPOTrainer overrides and reads. A failure here: read TRL's changes before anything else."""
    parameters = {
        "_generate_and_score_completions": ["self", "inputs"], "_prepare_inputs": ["self", "generation_batch"],
        "_compute_loss": ["self", "model", "inputs"], "_generate": ["self", "prompts"],
        "_tokenize_prompts": ["self", "prompts"], "log": ["self", "logs", "start_time"],
        "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        "_generate_single_turn": ["self", "prompt_ids", "images", "multimodal_fields", "num_generations"],
        "_get_train_sampler": ["self", "dataset"],
        "_get_per_token_logps_and_entropies": [
            "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy",
            "compute_aux_loss",
        ],
    }  # fmt: skip
    for name, expected in parameters.items():
        found = list(inspect.signature(getattr(GRPOTrainer, name)).parameters)
        assert found[: len(expected)] == expected, name
    source = inspect.getsource(GRPOTrainer)
    for attribute in ("_buffered_inputs", "_step", "_metrics", "eos_token_ids", "reward_weights", "epsilon_low",
                      "epsilon_high", "num_iterations", "current_gradient_accumulation_steps", "ref_model",
                      "rollout_func", '_logs["advantages"]',
                      'output["importance_sampling_ratio"]', "advantages.dim() == 1"):  # fmt: skip
        assert attribute in source, attribute
    for name in ("beta", "num_iterations", "steps_per_generation", "generation_batch_size", "entropy_coef"):
        assert name in GRPOConfig.__dataclass_fields__
    assert "_iter_named_params" in vars(VLLMGeneration)
    assert "fused_lm_head" in inspect.getsource(add_fused_lm_head)


def test_the_trainer_is_small():
    from recipes import ppo_trainer

    assert len(inspect.getsource(ppo_trainer).splitlines()) <= 410


# ---------------------------------------------------------------- rollouts


def test_a_rollout_is_what_the_equations_say(tmp_path):
    """Rewards, KL, values and advantages of a rollout against the model's own forward passes, row by row."""
    trainer = build(tmp_path, kl_coef=0.3, lam=0.9, gamma=0.95, whiten_advantages=False)
    with torch.no_grad():  # a policy that has left its reference
        trainer.model.lm_head.weight.add_(0.05 * torch.randn_like(trainer.model.lm_head.weight))
        trainer.model.value_head.linear.weight.normal_()
    rollout = rollout_of(trainer)
    trainer.model.eval()
    for row in range(8):
        prompt = rollout["prompt_ids"][row][rollout["prompt_mask"][row].bool()]
        completion = rollout["completion_ids"][row][rollout["completion_mask"][row].bool()]
        ids, count = torch.cat([prompt, completion])[None], len(completion)
        with torch.no_grad():
            backbone = trainer.model.model(input_ids=ids).last_hidden_state
            values = trainer.model.value_head(backbone, {})[0, -count - 1 : -1]
            log_probs, ref = (
                model(input_ids=ids).logits[0, -count - 1 : -1].log_softmax(-1).gather(1, completion[:, None])[:, 0]
                for model in (trainer.model, trainer.ref_model)
            )
        torch.testing.assert_close(rollout["old_per_token_logps"][row, :count], log_probs, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(rollout["old_values"][row, :count], values, atol=1e-4, rtol=1e-4)
        rewards = -0.3 * (log_probs - ref)
        rewards[-1] += share_of_t5([trainer.processing_class.decode(completion)])[0]
        expected, returns = generalized_advantages(rewards[None], values[None], torch.ones(1, count), 0.95, 0.9)
        torch.testing.assert_close(rollout["advantages"][row, :count], expected[0], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(rollout["returns"][row, :count], returns[0], atol=1e-3, rtol=1e-3)
        assert not rollout["advantages"][row, count:].any()


def scripted(completions):
    """A rollout function with given completions, by the prompt's number of words, and end tokens where they end."""

    def rollout(prompts, trainer):
        ids = trainer.processing_class(prompts)["input_ids"]
        return {"prompt_ids": ids, "completion_ids": [list(completions(p)) for p in prompts], "logprobs": None}

    return rollout


def test_extra_padding_on_either_side_changes_nothing(tmp_path):
    trainer = build(tmp_path, kl_coef=0.1)
    rollout = rollout_of(trainer)
    trainer._step = 1  # else the old log-probabilities are the new ones
    padded = dict(rollout)
    for name, value in rollout.items():
        if value.ndim == 2:
            noise = 5 if name.endswith("ids") else 0
            left = name.startswith("prompt")
            padded[name] = torch.nn.functional.pad(value, (3, 0) if left else (0, 4), value=noise)
    padded["routes"] = torch.nn.functional.pad(rollout["routes"], (0, 0, 0, 0, 3, 4), value=-1)
    losses = []
    for batch in (rollout, padded):
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        gradients = [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
        losses.append((loss.item(), torch.cat([gradient.flatten() for gradient in gradients])))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    torch.testing.assert_close(losses[0][1], losses[1][1], atol=1e-6, rtol=1e-3)


def test_the_first_step_of_a_rollout_has_ratio_one(tmp_path):
    trainer = build(tmp_path, num_ppo_epochs=1, max_steps=3)
    trainer.train()
    assert logged(trainer, "ratio") == [1.0, 1.0, 1.0]
    assert logged(trainer, "clip_fraction") == [0.0, 0.0, 0.0] and logged(trainer, "approx_kl") == [0.0, 0.0, 0.0]
    several = build(tmp_path, num_ppo_epochs=3, max_steps=3)
    several.train()
    ratios = logged(several, "ratio")
    assert ratios[0] == 1.0 and ratios[1] != 1.0
    assert not any(value is None for row in several.state.log_history for value in row.values())


def test_any_split_into_micro_batches_gives_the_same_step(tmp_path):
    """The loss is a mean over the tokens of the whole step, for completions of any length."""
    long_or_short = scripted(lambda prompt: [7] * (7 if len(prompt) > 8 else 1) + [2])
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        trainer = build(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=2,
            num_ppo_epochs=2, arguments={"rollout_func": long_or_short},
            reward=lambda completions, **_: [len(text) / 30 for text in completions],
        )  # fmt: skip
        trainer.train()
        found.append((logged(trainer, "loss"), trainer.model.state_dict()))
    assert found[0][0] == pytest.approx(found[1][0], abs=2e-5)
    for name, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][name], atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("choice", ["score", "bootstrap", "mask"])
def test_truncated_completions(tmp_path, choice):
    """Half of the completions are cut off; the reward is 1."""
    cut = scripted(lambda prompt: [7] * LENGTH if prompt.startswith("t1") else [7, 7, 2])
    trainer = build(
        tmp_path, reward=lambda completions, **_: [1.0] * len(completions), truncated_completions=choice, kl_coef=0.0,
        arguments={"rollout_func": cut}, whiten_advantages=False, lam=1.0,
        missing_eos_penalty=0.25 if choice == "score" else None,
    )  # fmt: skip
    with torch.no_grad():
        trainer.model.value_head.linear.bias.fill_(0.5)
    rollout = rollout_of(trainer)
    is_cut = torch.tensor([prompt.startswith("t1") for prompt in trainer.train_dataset["prompt"][:8]])
    assert 0 < is_cut.sum() < 8
    ended = rollout["returns"][~is_cut]
    assert (ended[:, :3] == 1.0).all() and not ended[:, 3:].any()
    expected = {"score": 0.75, "bootstrap": 0.5, "mask": 0.0}[choice]
    torch.testing.assert_close(rollout["returns"][is_cut], torch.full((int(is_cut.sum()), LENGTH), expected))
    assert rollout["loss_mask"][is_cut].any().item() == (choice != "mask")


def test_text_of_a_tool_is_stepped_over(tmp_path):
    """Tokens that the policy did not choose: no loss, no reward, no KL; the score is at the last one it chose."""
    def rollout(prompts, trainer):
        count = len(prompts)
        return {
            "prompt_ids": trainer.processing_class(prompts)["input_ids"], "logprobs": None,
            "completion_ids": [[7, 8, 9, 10, 2], [7, 8, 2], [], [7, 2]] * (count // 4),
            "env_mask": [[1, 1, 0, 0, 1], [1, 1, 0], [], [1, 1]] * (count // 4),
        }  # fmt: skip

    trainer = build(
        tmp_path, reward=lambda completions, **_: [1.0] * len(completions), arguments={"rollout_func": rollout},
        whiten_advantages=False, gamma=0.5, lam=1.0, num_ppo_epochs=1, max_steps=1,
    )  # fmt: skip
    returns = torch.tensor([[0.25, 0.5, 0, 0, 1], [0.5, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0.5, 1, 0, 0, 0]])
    torch.testing.assert_close(rollout_of(trainer)["returns"], returns.repeat(2, 1))
    trainer.train()
    assert logged(trainer, "completions/empty") == [0.25]


def test_importance_sampling_against_another_sampler(tmp_path):
    """vLLM's probabilities differ from the trainer's: TRL's ratio, truncated, weighs each token's policy loss."""
    half = scripted(lambda prompt: [7, 8, 9, 2])
    sampled = lambda prompts, trainer: half(prompts, trainer) | {"logprobs": [[-3.0] * 4 for _ in prompts]}
    trainer = build(tmp_path, arguments={"rollout_func": sampled}, vllm_importance_sampling_mode="token_truncate")
    trainer.use_vllm, trainer._last_loaded_step = True, 0
    rollout = rollout_of(trainer)
    ratio = (rollout["old_per_token_logps"] + 3.0).exp().clamp(max=trainer.vllm_importance_sampling_clip_max)
    torch.testing.assert_close(rollout["importance_sampling_ratio"], ratio)
    assert ratio.std() > 0.01 and not rollout["returns"].isnan().any()
    trainer.args.vf_coef = trainer.args.entropy_coef = 0.0
    expected = -(ratio * rollout["advantages"] * rollout["loss_mask"]).sum() / rollout["loss_mask"].sum()
    torch.testing.assert_close(trainer._compute_loss(trainer.model, rollout), expected)


def test_completions_without_a_token_and_without_a_score(tmp_path):
    """Both are outcomes that are counted: the first ended at once, the second teaches nothing."""
    trainer = build(
        tmp_path, reward=lambda completions, **_: [None if "t9" in text else 1.0 for text in completions],
        arguments={"rollout_func": scripted(lambda prompt: [] if prompt < "t2" else [12, 2])}, num_ppo_epochs=1,
    )  # fmt: skip
    trainer.train()
    for name in ("completions/empty", "completions/unscored"):
        assert all(0 < share < 1 for share in logged(trainer, name))
    rollout = rollout_of(trainer)
    assert torch.equal(rollout["loss_mask"].any(1), rollout["completion_ids"][:, 0] == 2)


def test_the_kl_coefficient_adapts_and_is_logged(tmp_path):
    trainer = build(tmp_path, kl_coef=0.1, kl_target=0.01, kl_horizon=40, max_steps=8, num_ppo_epochs=2)
    trainer.train()
    coefficients, measured = logged(trainer, "kl_coef"), logged(trainer, "kl")
    assert measured[0] == pytest.approx(0.0, abs=1e-6)
    for coefficient, kl, after in zip(coefficients, measured, coefficients[1:]):
        assert after == pytest.approx(adapted_kl_coef(coefficient, kl, 0.01, 8, 40))
    assert coefficients[0] == 0.1 and len(set(coefficients)) > 2


def test_the_table_of_completions_has_their_advantages(tmp_path):
    trainer = build(tmp_path)
    rollout = rollout_of(trainer)
    mask = rollout["loss_mask"]
    expected = (rollout["advantages"] * mask).sum(1) / mask.sum(1)
    assert list(trainer._logs["advantages"]) == pytest.approx(expected.tolist()) and expected.abs().max() > 0.1
    assert len(trainer._logs["prompt"]) == 8


# ---------------------------------------------------------------- disk


def test_the_saved_policy_is_a_plain_causal_lm(tmp_path):
    trainer = build(tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    model, report = DeepSeekR1ForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.arange(3, 12)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)
    again = build(tmp_path, model=model, value_model_name_or_path=str(tmp_path / "saved"))
    torch.testing.assert_close(again.model.value_head.linear.weight, trainer.model.value_head.linear.weight)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == ["DeepSeekR1ForCausalLM"]


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_vllm_gets_the_policy_and_the_routing_biases(tmp_path, kind):
    trainer = build(tmp_path, value_function=kind)

    class Engine:  # vLLM is not here; TRL's own loop over the parameters is
        model, accelerator = trainer.model, trainer.accelerator
        _dist = trainer._dist
        _iter_named_params = VLLMGeneration._iter_named_params
        _fix_param_name_to_vllm = VLLMGeneration._fix_param_name_to_vllm
        model_impl, mode = "auto", "server"

    trainer.vllm_generation = Engine()
    assert any("value_head" in name for name, _ in trainer.vllm_generation._iter_named_params())
    attach(trainer)
    names = [name for name, _ in trainer.vllm_generation._iter_named_params()]
    assert not any("value_head" in name for name in names)
    assert any(name.endswith("e_score_correction_bias") for name in names)


# ---------------------------------------------------------------- experts


@pytest.mark.parametrize("balance", ["update", "frozen"])
def test_routing_biases_move_once_a_rollout_or_never(tmp_path, balance):
    """Those of a separate value model as well; the gradient of the balance loss is a mean over micro-batches."""
    trainer = build(
        tmp_path, expert_balance=balance, num_ppo_epochs=2, num_mini_batches=2, max_steps=8, value_function="separate",
        model=policy(bias_update_speed=0.01), per_device_train_batch_size=4, gradient_accumulation_steps=2,
    )  # fmt: skip
    models = trainer.model, trainer.model.value_head.trunk
    routers = [model.routers[1] for model in models]
    seen, step = [], trainer.training_step

    def recorded(*args, **kwargs):
        seen.append([router.e_score_correction_bias.clone() for router in routers])
        assert {router.balance_loss_scale.item() for router in routers} == {0.5}
        return step(*args, **kwargs)

    trainer.training_step = recorded
    trainer.train()
    for biases in zip(*seen[::2]):
        changes = [not torch.equal(a, b) for a, b in zip(biases, biases[1:])]
        assert changes == [False, False, False, balance == "update", False, False, False]
    assert all(model.expert_load[1].sum() > 0 for model in models)  # measured either way


def test_tokens_counted_before_a_resume_count(tmp_path):
    """The load that moves the biases is that of the whole rollout, also where a run resumes in the middle of one."""
    settings = {"num_ppo_epochs": 2, "num_mini_batches": 2, "max_steps": 4}
    whole = build(tmp_path, save_strategy="steps", save_steps=3, **settings)
    whole.train()
    resumed = build(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert whole.model.expert_load[1].sum() > 0
    assert torch.equal(resumed.model.expert_load[1], whole.model.expert_load[1])


def test_multi_token_prediction_is_frozen(tmp_path):
    trainer = build(tmp_path)
    parameters = [parameter for layer in trainer.model.model.mtp_layers for parameter in layer.parameters()]
    before = [parameter.clone() for parameter in parameters]
    trainer.train()
    assert parameters and not any(parameter.requires_grad for parameter in parameters)
    assert all(map(torch.equal, parameters, before))


# ---------------------------------------------------------------- evaluation, bad input


def test_evaluation_leaves_training_as_it_is(tmp_path):
    trainer = build(tmp_path, arguments={"eval_dataset": words(9, seed=5)}, per_device_eval_batch_size=4, kl_target=1.0)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    metrics = trainer.evaluate()
    assert {"eval_reward", "eval_value_loss", "eval_kl", "eval_completions/empty"} <= metrics.keys()
    assert trainer.kl_coef == trainer.args.kl_coef and trainer._buffered_inputs is None
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_kl_that_explodes_stops_the_run(tmp_path):
    """The checkpoint that is named is older than the update that went too far, and can be gone on from."""
    def speed_up(args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group["lr"] = 0.5 if state.global_step >= 4 else 1e-3

    callback = TrainerCallback()
    callback.on_step_begin = speed_up
    changes = {"max_steps": 20, "max_kl": 0.5, "learning_rate": 1e-3}
    trainer = build(tmp_path, save_strategy="steps", save_steps=2, arguments={"callbacks": [callback]}, **changes)
    expected = r"KL to the reference is .* at step 6, above max_kl=0.5.*is .*checkpoint-4;.*lower learning_rate=0.001"
    with pytest.raises(FloatingPointError, match=expected):
        trainer.train()
    again = build(tmp_path / "again", **(changes | {"max_steps": 6}))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.state.global_step == 6
    trainer = build(tmp_path / "other", learning_rate=0.5, max_steps=4, max_kl=0.5)
    with pytest.raises(FloatingPointError, match="There is no checkpoint from before"):
        trainer.train()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"beta": 0.1}, "beta=0.1 has no effect in PPO; leave it out and use kl_coef"),
        ({"loss_type": "grpo"}, "loss_type='grpo' has no effect"),
        ({"num_iterations": 3}, "num_iterations=3 .* num_ppo_epochs"),
        ({"mask_truncated_completions": True}, "truncated_completions: mask"),
        ({"truncated_completions": "drop"}, "truncated_completions='drop' must be one of score, bootstrap, mask"),
        ({"kl_estimator": "k2"}, "kl_estimator='k2' must be one of k1, k3"),
        ({"gamma": 1.5}, r"gamma=1.5 must be in \[0, 1\]"),
        ({"kl_coef": 0.0, "kl_target": 0.1}, "kl_target=0.1 needs a kl_coef above 0"),
        ({"num_generations": 3}, "num_generations=3 must divide the 8 completions"),
        ({"per_device_train_batch_size": 1}, "a rollout of 1 completion"),
        ({"max_completion_length": 64}, "exceed the model's context of 64 tokens"),
        ({"per_device_train_batch_size": 64}, "32 prompts are fewer than the 64 of a rollout"),
        ({"value_model_name_or_path": "nowhere"}, "value_function=shared reads only"),
        ({"value_function": "separate", "value_model_name_or_path": "none"}, "value_model_name_or_path='none' cannot"),
        ({"reward_weights": [1.0, 2.0]}, "reward weights"),
        ({"reward_weights": [0.0]}, r"reward_weights=\[0.0\] must be other than 0"),
        ({"ref_model_sync_steps": 5}, "ref_model_sync_steps=5 has no effect"),
        ({"missing_eos_penalty": 1.0, "truncated_completions": "mask"}, "missing_eos_penalty=1.0 has no effect with"),
    ],
)
def test_settings_that_cannot_work(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **changes)


def test_references_and_rewards_that_cannot_be_found(tmp_path):
    with pytest.raises(ValueError, match="ref_model='nowhere' cannot be loaded"):
        build(tmp_path, arguments={"ref_model": "nowhere"})
    with pytest.raises(ValueError, match="reward_funcs='nowhere' cannot be loaded"):
        build(tmp_path, reward="nowhere")
    with pytest.raises(ValueError, match="reward_funcs holds 3"):
        build(tmp_path, reward=[share_of_t5, 3])
    with pytest.raises(ValueError, match="vocabulary of 40 tokens, the policy 32"):
        build(tmp_path, arguments={"ref_model": policy(vocab_size=40)})


def test_a_rollout_function_without_completions(tmp_path):
    trainer = build(tmp_path, arguments={"rollout_func": lambda prompts, trainer: {"prompt_ids": [[3]] * len(prompts)}})
    with pytest.raises(ValueError, match="rollout_func must return keys"):
        trainer.train()


def test_a_checkpoint_that_cannot_be_resumed(tmp_path):
    build(tmp_path, save_strategy="steps", save_steps=2, save_only_model=True).train()
    with pytest.raises(ValueError, match="rollout_0.pt is missing: the checkpoint was saved with save_only_model"):
        build(tmp_path / "again", max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_prompts_longer_than_the_budget(tmp_path):
    trainer = build(tmp_path, max_prompt_length=3)
    with pytest.raises(ValueError, match="a prompt has 5 tokens, max_prompt_length=3.*It begins 't"):
        trainer.train()


@pytest.mark.parametrize(
    "reward, message",
    [
        (lambda completions, **_: [1.0], "returned 1 rewards for 8 completions"),
        (lambda completions, **_: [float("nan")] * 8, "returned nan for completion 0"),
        (lambda completions, **_: [float("inf")] * 8, "returned inf for completion 0"),
        (lambda completions, **_: 1 / 0, "raised ZeroDivisionError at step 0"),
    ],
)
def test_rewards_that_cannot_be_used(tmp_path, reward, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, reward=reward).train()


def test_a_reward_model_with_the_policys_tokens(tmp_path):
    """A sequence classifier as reward reads exactly the sampled ids; beside a function, by weight."""
    model = AutoModelForSequenceClassification.from_config(policy(num_labels=1).config)
    model.save_pretrained(tmp_path / "reward")
    word_tokenizer().save_pretrained(tmp_path / "reward")
    trainer = build(tmp_path / "run", reward=[str(tmp_path / "reward"), share_of_t5], reward_weights=[1.0, 0.5])
    rollout = rollout_of(trainer)
    for row in range(8):
        ids = torch.cat([
            rollout[f"{part}_ids"][row][rollout[f"{part}_mask"][row].bool()] for part in ("prompt", "completion")
        ])  # fmt: skip
        with torch.no_grad():
            read = model.eval()(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None])  # also a sampled <pad>
        expected = read.logits[0, 0].item()
        assert trainer._rewards_per_func[row, 0].item() == pytest.approx(expected, abs=1e-5)


def test_prompts_as_conversations(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}t0{% endif %}"
    )
    prompts = words().map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    seen = []
    trainer = PPOTrainer(
        policy(), lambda completions, **_: [seen.append(c) or 0.0 for c in completions],
        PPOConfig(str(tmp_path), use_cpu=True, bf16=False, max_steps=1, per_device_train_batch_size=4, report_to="none",
                  max_completion_length=4, num_ppo_epochs=1, disable_tqdm=True),
        train_dataset=prompts, processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert len(seen) == 4 and seen[0][0]["role"] == "assistant"
    assert trainer.num_generations == 1


def test_a_policy_given_as_a_folder(tmp_path, caplog):
    policy().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    args = PPOConfig(
        str(tmp_path / "run"), use_cpu=True, bf16=False, max_steps=1, report_to="none", disable_tqdm=True,
        max_completion_length=4, per_device_train_batch_size=4, num_ppo_epochs=1,
        model_init_kwargs={"dtype": "bfloat16"},
    )  # fmt: skip
    trainer = PPOTrainer(str(tmp_path / "base"), share_of_t5, train_dataset=words(), args=args)
    trainer.train()
    assert isinstance(trainer.model, DeepSeekR1ForCausalLM)
    assert trainer.model.dtype == torch.bfloat16 and args.model_init_kwargs == {"dtype": "bfloat16"}
    assert "will be ignored" not in caplog.text
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    assert saved.keys() < trainer.model.state_dict().keys()
    card = (tmp_path / "run" / "README.md").read_text() if trainer.create_model_card() is None else ""
    assert "1707.06347" in card and "DeepSeekMath" not in card


def test_processes_load_the_policy_whole(monkeypatch, tmp_path):
    """On several GPUs `device_map=auto`, TRL's default, would spread each process's model over all of them."""
    policy().save_pretrained(tmp_path)
    args = PPOConfig(str(tmp_path / "run"), use_cpu=True, bf16=False)
    seen = []
    monkeypatch.setattr("recipes.rl_setup.create_model_from_path", lambda path, **kwargs: seen.append(kwargs))
    load_causal_lm(str(tmp_path), args)
    monkeypatch.setattr(args, "distributed_state", SimpleNamespace(distributed_type="MULTI_GPU"))
    load_causal_lm(str(tmp_path), args, quantization_config="some")
    assert "device_map" not in seen[0] and seen[1]["device_map"] is None and seen[1]["quantization_config"] == "some"


def test_the_defaults_work_without_a_gpu(tmp_path):
    """TRL's own ask for bf16, which is an error there."""
    args = PPOConfig(str(tmp_path))
    assert args.bf16 == (torch.cuda.is_available() and torch.cuda.is_bf16_supported())
