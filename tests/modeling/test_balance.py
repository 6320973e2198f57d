"""Expert balancing: the balance loss, the counts, the bias, under every way of splitting a batch."""

import pytest
import torch
from datasets import Dataset
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from benchmarks.bench_balance import run
from modeling_deepseek_r1 import DeepSeekR1Config, DeepSeekR1ForCausalLM
from modeling_deepseek_r1.routing import sequence_balance_loss
from recipes.callbacks import ExpertBalanceCallback, balanced_model, micro_batches_of_step
from tests.recipes.processes import run_ranks


def tiny_model(seed=0, **changes):
    fields = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1, q_lora_rank=None,
        first_k_dense_replace=1, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
        max_position_embeddings=64, num_nextn_predict_layers=0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        seq_aux_loss_alpha=1.0, initializer_range=0.1,
    )
    torch.manual_seed(seed)
    return DeepSeekR1ForCausalLM(DeepSeekR1Config(**{**fields, **changes}))


def rows(count=8, length=16, seed=0):
    tokens = torch.randint(3, 64, (count, length), generator=torch.Generator().manual_seed(seed))
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": tokens.tolist()})


def plain_balance_loss(affinities, indices, documents):
    """Eqs. 17-20 of DeepSeek-V3, one document at a time with Python loops; documents: lists of (row, position)."""
    num_experts, top_k, losses = affinities.shape[-1], indices.shape[-1], []
    for places in documents:
        loss = 0.0
        for expert in range(num_experts):
            chosen = sum(int(expert in indices[place].tolist()) for place in places)
            frequency = num_experts / (top_k * len(places)) * chosen
            probability = sum(affinities[place][expert] / affinities[place].sum() for place in places) / len(places)
            loss = loss + frequency * probability
        losses.append(loss)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("by_document", [False, True])
def test_balance_loss_equals_its_definition(masked, by_document):
    torch.manual_seed(0)
    affinities = torch.rand(3, 7, 6, requires_grad=True)
    indices = torch.rand(3, 7, 6).topk(2).indices
    mask = torch.ones(3, 7, dtype=torch.bool)
    if masked:
        mask[0, :3] = False
        mask[2, 5:] = False
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2]] * 3) if by_document else torch.zeros(3, 7, dtype=torch.long)
    documents = [
        [(r, s) for s in range(7) if segments[r, s] == d and mask[r, s]] for r in range(3) for d in range(3)
    ]
    reference = plain_balance_loss(affinities, indices, [places for places in documents if places])
    loss, counts = sequence_balance_loss(
        affinities, indices, mask if masked else None, segments if by_document else None
    )
    torch.testing.assert_close(loss, reference)
    for ours, theirs in zip(torch.autograd.grad(loss, affinities), torch.autograd.grad(reference, affinities)):
        torch.testing.assert_close(ours, theirs)
    assert counts.tolist() == torch.bincount(indices[mask].flatten(), minlength=6).tolist()


def test_even_routing_has_balance_loss_one():
    affinities, indices = torch.full((1, 4, 4), 0.5), torch.arange(4).view(1, 4, 1)
    assert sequence_balance_loss(affinities, indices)[0].item() == pytest.approx(1.0)


def test_bias_moves_by_the_sign_of_the_gap():
    model = tiny_model(bias_update_speed=0.25)
    router = model.routers[1]
    router.load_counts.copy_(torch.tensor([8, 0, 2, 2, 1, 3, 0, 0]))        # mean 2
    load = model.update_expert_bias()
    assert router.e_score_correction_bias.tolist() == [-0.25, 0.25, 0, 0, 0.25, -0.25, 0.25, 0.25]
    assert load[1].tolist() == [8, 0, 2, 2, 1, 3, 0, 0] and router.load_counts.sum() == 0
    assert model.routers[2].e_score_correction_bias.abs().sum() == 0           # counted nothing: left alone
    assert model.expert_load_max_over_mean() == {1: 4.0}


def test_speed_zero_freezes_the_bias_and_still_reports_load():
    model = tiny_model(bias_update_speed=0).train()
    ids = torch.randint(3, 64, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    assert sum(model.update_expert_bias()[1].tolist()) == 2 * 8 * 2
    assert all(not router.e_score_correction_bias.any() for router in model.routers.values())


@pytest.mark.parametrize("mode", ["none", "reentrant", "non_reentrant"])
def test_tokens_are_counted_once_and_never_outside_training(mode):
    model = tiny_model().train()
    if mode != "none":
        model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
        model.enable_input_require_grads()
    ids = torch.randint(3, 64, (2, 8))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    model.eval()
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    model.generate(ids, max_new_tokens=2, do_sample=False)
    assert [int(router.load_counts.sum()) for router in model.routers.values()] == [13 * 2, 13 * 2]


def test_losses_of_a_nested_checkpoint_count_once():
    model = tiny_model().train()
    ids = torch.randint(3, 64, (2, 8))
    checkpoint(lambda: model(input_ids=ids, labels=ids).loss, use_reentrant=False).backward()
    assert int(model.routers[1].load_counts.sum()) == 2 * 8 * 2


class Record(TrainerCallback):
    """Keeps each step's router gradient and, after the update, its bias and load."""

    def __init__(self):
        self.grads, self.biases, self.loads = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        routers = balanced_model(model).routers.values()
        self.grads.append(torch.stack([router.weight.grad.clone() for router in routers]))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model = balanced_model(model)
        self.biases.append(torch.stack([r.e_score_correction_bias.clone() for r in model.routers.values()]))
        self.loads.append(torch.stack(list(model.expert_load.values())))


def arguments(tmp_path, batch, steps, **changes):
    fields = dict(
        output_dir=str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch,
        max_steps=steps, learning_rate=0.0, max_grad_norm=0.0, report_to=[], use_cpu=True, save_strategy="no", seed=0,
        logging_strategy="no", disable_tqdm=True,
    )
    return {**fields, **changes}


def train_hf(tmp_path, batch, steps, alpha=1.0, data=None, **changes):
    record = Record()
    trainer = Trainer(
        tiny_model(seq_aux_loss_alpha=alpha, bias_update_speed=0.01),
        TrainingArguments(**arguments(tmp_path, batch, steps, **changes)),
        train_dataset=data or rows(40),
        callbacks=[ExpertBalanceCallback(), record],
    )
    trainer.train()
    return record


def test_counts_and_biases_do_not_depend_on_the_micro_batches(tmp_path):
    whole = train_hf(tmp_path, 8, 20)
    assert whole.loads[0].sum(-1).tolist() == [8 * 16 * 2] * 2 and whole.biases[-1].abs().max() > 0.02
    for batch, changes in ((2, {}), (1, {}), (2, {"gradient_checkpointing": True})):
        split = train_hf(tmp_path, batch, 20, **changes)
        assert all(torch.equal(a, b) for a, b in zip(whole.loads, split.loads))
        assert all(torch.equal(a, b) for a, b in zip(whole.biases, split.biases))


def injected_gradients(train):
    """Router gradients with the balance loss minus those without, for 8x1, 2x4 and 1x8 micro-batches."""
    return [train(batch, 1.0).grads[0] - train(batch, 0.0).grads[0] for batch in (8, 2, 1)]


def assert_equal_and_present(gradients):
    assert gradients[0].abs().max() > 1e-5
    for other in gradients[1:]:
        # The language-modelling part cancels only to fp32 rounding of a sum over 128 tokens.
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=2e-7)


def test_injected_gradient_is_equal_in_hf_trainer(tmp_path):
    assert_equal_and_present(injected_gradients(lambda batch, alpha: train_hf(tmp_path, batch, 1, alpha)))


def test_injected_gradient_of_an_incomplete_last_step(tmp_path):
    data = rows(12)                                                # 8 rows, then 4: half a group of micro-batches
    whole, split = (train_hf(tmp_path, batch, 2, data=data) for batch in (4, 1))
    assert [g.shape for g in whole.grads] == [g.shape for g in split.grads]
    torch.testing.assert_close(whole.grads[1], split.grads[1], rtol=1e-4, atol=1e-6)


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"t{i}": i for i in range(3, 64)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def test_injected_gradient_is_equal_in_sft_trainer(tmp_path):
    from trl import SFTConfig, SFTTrainer

    def train(batch, alpha):
        record = Record()
        SFTTrainer(
            tiny_model(seq_aux_loss_alpha=alpha),
            SFTConfig(**arguments(tmp_path, batch, 1, bf16=False, gradient_checkpointing=True)),
            train_dataset=rows(8).remove_columns("labels"),
            processing_class=tiny_tokenizer(),
            callbacks=[ExpertBalanceCallback(), record],
        ).train()
        return record

    assert_equal_and_present(injected_gradients(train))


def test_injected_gradient_is_equal_in_grpo_trainer(tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    def train(batch, alpha):
        record = Record()
        changes = dict(bf16=False, num_generations=8, max_completion_length=6, gradient_checkpointing=False)
        GRPOTrainer(
            tiny_model(seq_aux_loss_alpha=alpha),
            reward_funcs=lambda completions, **columns: [0.0] * len(completions),   # no advantage: no other gradient
            args=GRPOConfig(**arguments(tmp_path, batch, 1, **changes)),
            train_dataset=Dataset.from_dict({"prompt": ["t5 t6 t7", "t9 t8"] * 4}),
            processing_class=tiny_tokenizer(),
            callbacks=[ExpertBalanceCallback(), record],
        ).train()
        return record

    assert_equal_and_present(injected_gradients(train))


def test_injected_gradient_under_a_loss_scaler():
    """The callback reads the scale from the optimizer; after unscaling, the gradient is what it is without a scaler."""

    class ScaledOptimizer:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)

    def gradient(optimizer):
        model = tiny_model().train()
        args, state = TrainingArguments(output_dir="unused", use_cpu=True, gradient_accumulation_steps=4), None
        ids = torch.randint(3, 64, (8, 12), generator=torch.Generator().manual_seed(0))
        state = type("State", (), {"global_step": 0})()
        given = {"model": model, "optimizer": optimizer, "train_dataloader": range(8)}
        ExpertBalanceCallback().on_step_begin(args, state, None, **given)
        scale = optimizer.scaler.scale(torch.ones(())) if optimizer else torch.ones(())
        for part in ids.split(2):
            (model(input_ids=part, labels=part, num_items_in_batch=88).loss * scale).backward()
        return torch.stack([router.weight.grad / scale for router in model.routers.values()])

    torch.testing.assert_close(gradient(ScaledOptimizer()), gradient(None))


def test_a_skipped_step_drops_its_counts():
    model = tiny_model(bias_update_speed=0.01)
    model.routers[1].load_counts.copy_(torch.tensor([8, 0, 0, 0, 0, 0, 0, 0]))
    skipped = type("Optimizer", (), {"step_was_skipped": True})()
    ExpertBalanceCallback().on_optimizer_step(None, None, None, model=model, optimizer=skipped)
    assert model.routers[1].load_counts.sum() == 0 and not model.routers[1].e_score_correction_bias.any()


def test_micro_batches_of_the_last_step():
    args = TrainingArguments(output_dir="unused", use_cpu=True, gradient_accumulation_steps=4)
    states = [type("State", (), {"global_step": step})() for step in range(6)]
    assert [micro_batches_of_step(args, state, range(10)) for state in states] == [4, 4, 2, 4, 4, 2]
    assert micro_batches_of_step(args, states[0], iter([])) == 4


def test_callback_refuses_a_model_without_experts_to_balance():
    with pytest.raises(ValueError, match="Linear"):
        balanced_model(torch.nn.Linear(2, 2))


@pytest.mark.slow
def test_two_processes_balance_like_one(tmp_path):
    """2 processes x 4 micro-batches of 1, with activation checkpointing; the same 8 rows a step as one process."""

    def work(rank):
        record = train_hf(tmp_path, 1, 20, gradient_accumulation_steps=4, gradient_checkpointing=True)
        if rank == 0:
            torch.save([record.loads, record.biases, record.grads], tmp_path / "two.pt")

    run_ranks(2, work, tmp_path / "logs")
    loads, biases, grads = torch.load(tmp_path / "two.pt")
    one = train_hf(tmp_path, 2, 20)
    assert all(torch.equal(a, b) for a, b in zip(one.loads, loads, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.biases, biases, strict=True))
    torch.testing.assert_close(one.grads[0], grads[0], rtol=1e-4, atol=1e-6)


def test_bias_evens_the_load_of_a_learnable_stream():
    """200 steps at speed 0.01; without the bias the second layer's load grows to about 2.8 x the mean."""
    for layer in run(speed=0.01, seed=0, steps=200)["layers"]:
        assert layer["summed"] <= 1.15 and layer["worst"] <= 2.0


@pytest.mark.slow
def test_default_speed_evens_the_load_without_hurting_the_loss():
    plain, balanced = ([run(speed, seed, 600) for seed in range(2)] for speed in (0.0, 0.001))
    assert all(layer["summed"] <= 1.3 for result in balanced for layer in result["layers"])
    mean = lambda results: sum(result["loss"] for result in results) / len(results)
    assert mean(balanced) <= 1.01 * mean(plain)


def test_frozen_routers_keep_their_bias_and_are_measured(caplog):
    """As with adapters on other layers: an adapter file does not carry biases."""
    model = tiny_model(bias_update_speed=0.01).train()
    callback = ExpertBalanceCallback()
    for router in model.routers.values():
        router.weight.requires_grad_(False)
    callback.on_train_begin(TrainingArguments(output_dir="unused", use_cpu=True), None, None, model=model)
    assert "no router is trained" in caplog.text
    ids = torch.randint(3, 64, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    callback.on_optimizer_step(None, None, None, model=model)
    assert not any(router.e_score_correction_bias.any() for router in model.routers.values())
    assert int(model.expert_load[1].sum()) == 2 * 8 * 2


def test_z_loss_gradient_equals_its_definition():
    model = tiny_model(seq_aux_loss_alpha=0.0, router_z_loss_coef=0.1).train()
    router, states = model.routers[1], torch.randn(2, 6, 32)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, :2] = False
    (router(states, mask)[1].sum() * 0.0).backward()                       # only the injected part is left
    weight = router.weight.detach().clone().requires_grad_()
    z = (states @ weight.t()).logsumexp(-1).square()[mask].mean()
    torch.testing.assert_close(router.weight.grad, torch.autograd.grad(0.1 * z, weight)[0])


def test_callback_warns_of_the_trainers_own_label_smoothing(caplog):
    args = TrainingArguments(output_dir="unused", use_cpu=True, label_smoothing_factor=0.1)
    ExpertBalanceCallback().on_init_end(args, None, None, model=tiny_model())
    assert "config.label_smoothing=0.1" in caplog.text
