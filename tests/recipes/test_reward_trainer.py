"""The reward trainers against the losses' definitions, and their way through accumulation, padding and processes."""

import math

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import CONFIG_MAPPING, set_seed
from transformers.modeling_outputs import TokenClassifierOutput
from trl import RewardTrainer

import modeling_deepseek_r1  # noqa: F401  (registers the model type)
from data_scripts.train_tokenizer import train_tokenizer
from modeling_deepseek_r1 import DeepSeekR1ForSequenceClassification, DeepSeekR1ForTokenClassification
from recipes.reward_config import RewardRecipeConfig
from recipes.reward_functions import score_ids
from recipes.reward_models import full_precision_head
from recipes.reward_scoring import step_probabilities
from recipes.reward_trainer import ProcessRewardTrainer, RecipeRewardTrainer, bradley_terry, centring
from tests.recipes.tiny_run import SIZES

VOCABULARY = 320


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some words"], VOCABULARY)


def sequences(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 20, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def pairs(count=8, seed=0, margins=True):
    chosen, rejected = sequences(count, seed), sequences(count, seed + 1)
    columns = {
        "chosen_ids": chosen, "rejected_ids": rejected, "chosen_tokens": list(map(len, chosen)),
        "rejected_tokens": list(map(len, rejected)), "problem": [str(i // 2) for i in range(count)],
        "source": ["a"] * count, "kind": ["a"] * count,
    }  # fmt: skip
    return Dataset.from_dict(columns | ({"margin": [0.25 * (i % 3) for i in range(count)]} if margins else {}))


def solutions(count=8, seed=0):
    rows = sequences(count, seed)
    labels = [
        [-100 if place % (2 + i % 3) else (place + i) % 2 for place in range(len(ids))] for i, ids in enumerate(rows)
    ]
    labels = [[-100, *row[1:]] for row in labels]
    return Dataset.from_dict({"input_ids": rows, "step_labels": labels, "problem": list(map(str, range(count))),
                              "source": ["a"] * count, "kind": ["a"] * count})  # fmt: skip


def build(tmp_path, tokenizer, kind="preference", **changes):
    settings = {
        "model_name_or_path": "in memory", "dataset_name": "in memory", "output_dir": str(tmp_path), "use_cpu": True,
        "max_length": 40, "per_device_train_batch_size": 8, "max_steps": 1, "logging_steps": 1, "save_strategy": "no",
        "learning_rate": 1e-2, "report_to": "none", "disable_tqdm": True, "optim": "sgd", "weight_decay": 0.0,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "kind": kind,
    }  # fmt: skip
    args = RewardRecipeConfig(**(settings | changes))
    set_seed(0)
    process = kind == "process"
    config = CONFIG_MAPPING["deepseek_r1"](**(SIZES | {"vocab_size": VOCABULARY, "num_labels": 1 + process,
                                                       "pad_token_id": tokenizer.pad_token_id}))  # fmt: skip
    model = (DeepSeekR1ForTokenClassification if process else DeepSeekR1ForSequenceClassification)(config)
    make = solutions if process else pairs
    trainer = ProcessRewardTrainer if process else RecipeRewardTrainer
    return trainer(model=full_precision_head(model), args=args, train_dataset=make(), eval_dataset=make(7, seed=5),
                   processing_class=tokenizer)  # fmt: skip


def test_the_losses_are_those_of_their_papers():
    chosen, rejected, margin = torch.tensor([1.0, -0.5]), torch.tensor([0.2, 0.7]), torch.tensor([0.0, 1.0])
    by_hand = [math.log(1 + math.exp(-(c - r - m))) for c, r, m in ((1.0, 0.2, 0.0), (-0.5, 0.7, 1.0))]
    assert bradley_terry(chosen, rejected, margin).item() == pytest.approx(sum(by_hand) / 2)
    assert bradley_terry(chosen + 3, rejected + 3).item() == pytest.approx(bradley_terry(chosen, rejected).item())
    assert centring(chosen, rejected).item() == pytest.approx((1.2**2 + 0.2**2) / 2)


@pytest.mark.parametrize("centre", [None, 0.1])
def test_the_loss_is_that_of_trl(tmp_path, tokenizer, centre):
    trainer = build(tmp_path, tokenizer, center_rewards_coefficient=centre)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["margin"].tolist() == pairs()["margin"]
    trainer.model.train()
    ours = trainer.compute_loss(trainer.model, dict(batch))
    theirs = RewardTrainer.compute_loss(trainer, lambda margin, **inputs: trainer.model(**inputs | {"margin": None}),
                                        dict(batch))  # fmt: skip
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["preference", "process"])
def test_the_step_does_not_depend_on_its_micro_batches(tmp_path, tokenizer, kind):
    found = []
    for rows, accumulation in ((8, 1), (2, 4)):
        trainer = build(tmp_path / str(rows), tokenizer, kind, per_device_train_batch_size=rows,
                        gradient_accumulation_steps=accumulation)  # fmt: skip
        for router in trainer.model.routers.values():
            router.seq_aux_loss_alpha = 0.0  # that of a bare trainer: ExpertBalanceCallback divides it
        trainer.train()
        parameters = {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}
        found.append((trainer.state.log_history[0], parameters))
    (one, weights), (other, others) = found
    for name in ("loss", "accuracy"):
        assert one[name] == pytest.approx(other[name], rel=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["preference", "process"])
def test_the_evaluation_does_not_depend_on_batches_and_processes(tmp_path, tokenizer, kind, monkeypatch):
    trainer = build(tmp_path, tokenizer, kind, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    scores, figures = trainer.held_out_scores, trainer.held_out
    other = build(tmp_path, tokenizer, kind, per_device_eval_batch_size=100)
    assert other.evaluate()["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    # Two processes, one after the other: each computes its share, as `gather_object` would put them together.
    shares = []
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr("recipes.reward_trainer.gather_object", lambda share: shares.append(share) or shares[0] * 2)
    for rank in (0, 1):
        monkeypatch.setattr(Accelerator, "process_index", rank)
        trainer.scores_of(trainer.eval_dataset)
    assert len(shares[0]) == len(shares[1]) == 4
    monkeypatch.setattr("recipes.reward_trainer.gather_object", lambda share: shares[0] + shares[1])
    together = trainer.scores_of(trainer.eval_dataset)
    flat = lambda rows: [value for row in rows for value in row]
    assert flat(together) == pytest.approx(flat(scores), abs=1e-5)
    assert trainer.figures(together, trainer.eval_dataset)["accuracy"] == figures["accuracy"]


def test_padding_changes_nothing(tmp_path, tokenizer):
    """Neither its side nor its amount, nor the batch size."""
    model, rows = build(tmp_path, tokenizer).model.eval(), sequences(9)
    alone = [model(input_ids=torch.tensor([ids])).logits.item() for ids in rows]
    for size in (1, 4, 9):
        assert score_ids(model, rows, size) == pytest.approx(alone, abs=1e-5)
    length, pad = 30, tokenizer.pad_token_id
    for side in ("left", "right"):
        filled = [[pad] * (length - len(r)) + r if side == "left" else r + [pad] * (length - len(r)) for r in rows]
        mask = (torch.tensor(filled) != pad).long()
        logits = model(input_ids=torch.tensor(filled), attention_mask=mask).logits
        assert logits.flatten().tolist() == pytest.approx(alone, abs=1e-5)


def test_steps_are_scored_the_same_in_any_batch(tmp_path, tokenizer):
    model, rows = build(tmp_path, tokenizer, "process").model.eval(), sequences(5)
    places = [[2, len(ids) - 1] for ids in rows]
    alone = [model(input_ids=torch.tensor([ids])).logits[0, own].softmax(-1)[:, 1].tolist()
             for ids, own in zip(rows, places)]  # fmt: skip
    for size in (1, 5):
        found = step_probabilities(model, rows, places, size)
        assert [p for row in found for p in row] == pytest.approx([p for row in alone for p in row], abs=1e-5)


def test_the_head_keeps_full_precision(tmp_path, tokenizer):
    model, ids = build(tmp_path, tokenizer).model.eval(), torch.tensor(sequences(1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids).logits
    assert logits.dtype == torch.float32 and logits.item() != logits.bfloat16().item()


def test_the_first_step_is_where_the_steps_end(tmp_path, tokenizer):
    """Only labelled tokens have a gradient, and all rows of the step share one denominator."""
    trainer = build(tmp_path, tokenizer, "process")
    batch = next(iter(trainer.get_train_dataloader()))
    logits = torch.randn(*batch["labels"].shape, 2, requires_grad=True)
    model = lambda **inputs: TokenClassifierOutput(logits=logits)
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(50))
    loss.backward()
    kept = batch["labels"] != -100
    by_hand = -logits.log_softmax(-1)[kept][range(int(kept.sum())), batch["labels"][kept]].sum() / 50
    torch.testing.assert_close(loss, by_hand)
    assert torch.equal(logits.grad.abs().sum(-1) > 0, kept)
