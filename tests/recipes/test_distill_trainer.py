"""The trainers of distillation against plain losses on single documents, and against each other."""

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

import modeling_deepseek_r1  # noqa: F401  (registers the model type)
from recipes.callbacks import ExpertBalanceCallback
from recipes.distill_config import DistillRecipeConfig
from recipes.distill_losses import feature_loss
from recipes.distill_trainer import RecipeDistillationTrainer, RecipeLogitsTrainer
from recipes.sft_config import SFTRecipeConfig
from recipes.sft_trainer import RecipeSFTTrainer
from tests.recipes.tiny_ppo import one_thread, word_tokenizer, words  # noqa: F401  (a fixture)
from tests.recipes.tiny_run import SIZES

VOCABULARY = 32
LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def moe(seed=0, **changes):
    set_seed(seed)
    special = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = CONFIG_MAPPING["deepseek_r1"](**(SIZES | special | {"initializer_range": 0.2} | changes))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def llama(seed=1, **changes):
    set_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(LLAMA | changes)))


def examples(count=12, seed=0):
    generator, rows = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        length = int(torch.randint(6, 15, (), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return Dataset.from_list(rows)


def settings(folder, **changes):
    return {
        "model_name_or_path": "in memory", "dataset_name": "in memory", "output_dir": str(folder), "use_cpu": True,
        "max_length": 40, "per_device_train_batch_size": 2, "max_steps": 1, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "device_peak_tflops": 0.1, "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "seed": 3,
    } | changes  # fmt: skip


def logits_trainer(folder, student, teacher, **changes):
    changes = {"teacher_model_name_or_path": "in memory too", "method": "logits"} | changes
    args = DistillRecipeConfig(**settings(folder, **changes))
    balanced = [ExpertBalanceCallback()] if hasattr(student, "update_expert_bias") else []
    teacher.eval().requires_grad_(False)
    return RecipeLogitsTrainer(
        model=student, args=args, teacher=teacher, train_dataset=examples(), eval_dataset=examples(5, 1),
        processing_class=word_tokenizer(), callbacks=balanced,
    )  # fmt: skip


def batch_of(trainer):
    trainer.model.train()
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def gradients(model):
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def assert_same(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys() and found
    largest = max(each.abs().max().item() for each in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=tolerance * largest, msg=name)


# ---------------------------------------------------------------- logits


@pytest.mark.parametrize("packing", [True, False])
def test_without_the_teacher_it_is_fine_tuning(packing, tmp_path):
    """alpha = 0: after two steps of two micro-batches the weights are those that RecipeSFTTrainer arrives at."""
    changes = {"packing": packing, "gradient_accumulation_steps": 2, "max_steps": 2}
    args = SFTRecipeConfig(**settings(tmp_path, mtp_loss_coef=0.0, **changes))
    plain = moe()
    plain.freeze_mtp()
    RecipeSFTTrainer(
        model=plain, args=args, train_dataset=examples(), processing_class=word_tokenizer(),
        callbacks=[ExpertBalanceCallback()],
    ).train()  # fmt: skip
    trainer = logits_trainer(tmp_path, moe(), moe(5), alpha=0.0, **changes)
    start = {name: each.clone() for name, each in trainer.model.state_dict().items()}
    trainer.train()
    moved = {name: each - start[name] for name, each in trainer.model.state_dict().items() if each.is_floating_point()}
    expected = {name: each - start[name] for name, each in plain.state_dict().items() if name in moved}
    assert_same(moved, expected)
    assert any(each.abs().max() > 1e-3 for each in moved.values())


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradients_are_those_of_single_documents(packing, checkpointing, tmp_path):
    """Packed, neither model sees another document; each part of the loss is the plain one."""
    alpha, temperature, weight = 0.7, 3.0, 0.4
    changes = {"alpha": alpha, "temperature": temperature, "feature_coef": weight, "feature_layers": ["0:1", "1:0"]}
    student, teacher = llama(), moe()
    trainer = logits_trainer(
        tmp_path, student, teacher, packing=packing, per_device_train_batch_size=12, dataloader_drop_last=False,
        gradient_checkpointing=checkpointing, **changes,
    )  # fmt: skip
    if checkpointing:
        student.activation_checkpointing_enable()
    batch = batch_of(trainer)
    tokens = int((batch["labels"] != -100).sum())
    trainer.compute_loss(student, batch, num_items_in_batch=tokens).backward()
    found, maps = gradients(student), [each.weight.grad.clone() for each in trainer.projections.maps]
    assert trainer.projections.maps[0].weight.shape == (32, 24)

    student.zero_grad()
    trainer.projections.zero_grad()
    total = 0.0
    for row in examples():
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        trained = labels != -100
        outputs = [each(input_ids=ids, output_hidden_states=True, use_cache=False) for each in (student, teacher)]
        own, other = (each.logits[0, :-1][trained] for each in outputs)
        p, q = ((each / temperature).softmax(-1) for each in (other, own))
        total = total + alpha * temperature**2 * (p * (p.log() - q.log())).sum()
        total = total + (1 - alpha) * F.cross_entropy(own, labels[trained], reduction="sum")
        kept = []
        for model, places in ((student, (0, 1)), (teacher, (1, 0))):
            hidden = {}
            hooks = [model.base_model.layers[place].register_forward_hook(
                lambda _, __, output, place=place: hidden.update({place: output})) for place in places]  # fmt: skip
            model(input_ids=ids, use_cache=False)
            [hook.remove() for hook in hooks]
            kept.append([hidden[place][0, :-1][trained] for place in places])
        pairs = zip(trainer.projections.maps, *kept)
        total = total + weight * sum(feature_loss(each(s), t.detach()).sum() for each, s, t in pairs) / 2
    (total / tokens).backward()
    assert_same(found, gradients(student))
    for grad, each in zip(maps, trainer.projections.maps):
        torch.testing.assert_close(grad, each.weight.grad, rtol=1e-4, atol=1e-6)
    assert all(each.grad is None for each in teacher.parameters())


def test_a_run_logs_the_parts_and_comes_closer(tmp_path):
    changes = {"max_steps": 30, "optim": "adamw_torch", "learning_rate": 1e-2, "feature_coef": 0.1, "packing": True}
    trainer = logits_trainer(tmp_path, llama(), moe(), **changes)
    weights = [each.weight.clone() for each in trainer.projections.maps]
    trainer.train()
    rows = [row for row in trainer.state.log_history if "kl" in row]
    assert rows[-1]["kl"] < 0.6 * rows[0]["kl"] and rows[-1]["feature_loss"] < 0.7 * rows[0]["feature_loss"]
    first = rows[0]
    parts = 0.9 * 4 * first["kl"] + 0.1 * first["next_token_loss"] + 0.1 * first["feature_loss"]
    assert first["loss"] == pytest.approx(parts, rel=1e-3)
    assert all(not each.weight.equal(old) for each, old in zip(trainer.projections.maps, weights))
    assert not any("projection" in name or "maps" in name for name in trainer.model.state_dict())


def test_teachers_that_cannot_be_compared(tmp_path):
    set_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="in the teacher, a bloom model, the examples of a row see each other"):
        logits_trainer(tmp_path, llama(), bloom, packing=True)
    with pytest.raises(ValueError, match="a bloom model has no list of layers .* set feature_coef=0"):
        logits_trainer(tmp_path, llama(), bloom, packing=False, feature_coef=1.0)
    sizes = {name: value for name, value in LLAMA.items() if name != "initializer_range"}
    gemma = Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=12, final_logit_softcapping=0.05))
    with pytest.raises(ValueError, match="the teacher, a gemma2 model, scales or caps its logits"):
        logits_trainer(tmp_path, llama(), gemma)
    with pytest.raises(ValueError, match="the student's head has 40 rows .* the teacher's 32"):
        logits_trainer(tmp_path, llama(vocab_size=40), moe())


# ---------------------------------------------------------------- on policy


def on_policy_trainer(folder, student, teacher, **changes):
    changes = {"teacher_model_name_or_path": "in memory too", "max_completion_length": 6} | changes
    changes["method"] = "on_policy"
    args = DistillRecipeConfig(**settings(folder, per_device_train_batch_size=4, **changes))
    balanced = [ExpertBalanceCallback()] if hasattr(student, "update_expert_bias") else []
    return RecipeDistillationTrainer(
        model=student, args=args, teacher=teacher.eval().requires_grad_(False), train_dataset=words(16),
        processing_class=word_tokenizer(), callbacks=balanced,
    )  # fmt: skip


@pytest.mark.parametrize("beta", [0.0, 0.2, 1.0])
def test_on_policy_gradients_are_those_of_the_divergence(beta, tmp_path):
    student, teacher = llama(), moe()
    trainer = on_policy_trainer(tmp_path, student, teacher, beta=beta)
    student.train()
    inputs = trainer._generate_and_score_completions([trainer.train_dataset[place] for place in range(4)])
    trainer.compute_loss(student, inputs).backward()
    found = gradients(student)
    student.zero_grad()
    total, kinds = 0.0, ("prompt", "completion")
    for row in range(4):
        parts = [inputs[f"{kind}_ids"][row][inputs[f"{kind}_mask"][row].bool()] for kind in kinds]
        ids, start = torch.cat(parts).unsqueeze(0), len(parts[0]) - 1
        q, p = (each(input_ids=ids, use_cache=False).logits[0, start:-1].softmax(-1) for each in (student, teacher))
        middle = beta * p + (1 - beta) * q
        kl = lambda one, other: (one * (one.log() - other.log())).sum()
        if beta in (0.0, 1.0):  # the limits, as TRL defines them
            total = total + (kl(p, q) if beta == 0.0 else kl(q, p))
        else:
            total = total + beta * kl(p, middle) + (1 - beta) * kl(q, middle)
    (total / inputs["completion_mask"].sum()).backward()
    assert_same(found, gradients(student))


def test_on_policy_forward_divergence_is_that_of_logits_on_the_same_tokens(tmp_path):
    student, teacher = llama(), moe()
    trainer = on_policy_trainer(tmp_path, student, teacher, beta=0.0)
    student.train()
    inputs = trainer._generate_and_score_completions([trainer.train_dataset[place] for place in range(4)])
    trainer.compute_loss(student, inputs).backward()
    found = gradients(student)
    student.zero_grad()
    ids, mask = (torch.cat([inputs[f"prompt_{kind}"], inputs[f"completion_{kind}"]], 1) for kind in ("ids", "mask"))
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : inputs["prompt_ids"].shape[1]] = -100
    logits = logits_trainer(tmp_path, student, teacher, alpha=1.0, temperature=1.0, packing=False)
    student.train()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    logits.compute_loss(student, batch, num_items_in_batch=int(inputs["completion_mask"].sum())).backward()
    assert_same(gradients(student), found)


def test_empty_completions_become_an_end_token(tmp_path, monkeypatch):
    trainer = on_policy_trainer(tmp_path, llama(), moe())
    monkeypatch.setattr("trl.DistillationTrainer._generate_single_turn", lambda *args, **kwargs: [[5, 6], [], [7], []])
    trainer.model.train()
    rollout = trainer._generate_and_score_completions([trainer.train_dataset[place] for place in range(4)])
    assert rollout["completion_ids"].tolist() == [[5, 6], [2, 0], [7, 0], [2, 0]]
    assert torch.isfinite(trainer.compute_loss(trainer.model, rollout))


def test_a_mixture_of_experts_learns_on_policy_and_stays_balanced(tmp_path):
    student = moe(1)
    biases = {name: each.clone() for name, each in student.named_buffers() if name.endswith("e_score_correction_bias")}
    mtp = [each.clone() for each in student.model.mtp_layers.parameters()]
    trainer = on_policy_trainer(
        tmp_path, student, moe(0), beta=0.0, max_steps=10, learning_rate=2e-2, optim="adamw_torch",
        gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    buffers = dict(student.named_buffers())
    assert any(not buffers[name].equal(old) for name, old in biases.items())
    assert all(each.equal(old) for each, old in zip(student.model.mtp_layers.parameters(), mtp))
    row = next(row for row in trainer.state.log_history if "loss" in row)
    assert {"entropy", "tokens", "completions/mean_length"} <= row.keys()
