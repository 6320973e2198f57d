"""Sequence and token classification."""

import pytest
import torch
import torch.nn.functional as F

from modeling_deepseek_r1 import DeepSeekR1ForSequenceClassification, DeepSeekR1ForTokenClassification

from .helpers import close, padded, random_ids, tiny_config, tiny_model


def sequence_model(**changes):
    return tiny_model(DeepSeekR1ForSequenceClassification, **{"num_labels": 3} | changes)


@pytest.mark.parametrize("given", ["attention_mask", "pad_token_id"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_real_token_is_scored(side, given):
    model = sequence_model()
    ids, mask, _ = padded(random_ids(3, 10), side, (0, 4, 7))
    batched = model(ids, attention_mask=mask if given == "attention_mask" else None)
    # Without a mask the pads on the left are attended to, so only the right side has the logits of the rows alone.
    if given == "attention_mask" or side == "right":
        for row, real, logits in zip(ids, mask.bool(), batched.logits, strict=True):
            alone = model(row[real][None])
            close(logits, alone.logits[0])
            states = model.model(row[real][None]).last_hidden_state
            close(logits, model.score(states[0, -1]))
    else:
        states = model.model(ids, use_cache=False).last_hidden_state
        close(batched.logits, model.score(states[:, -1]))


def test_a_pad_id_inside_the_text_does_not_move_the_last_token():
    """Also at the very end of the text: only the mask knows."""
    model, ids = sequence_model(), random_ids(2, 8)
    ids[0, 3] = ids[0, 7] = ids[1, 4] = model.config.pad_token_id
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    logits = model(ids, attention_mask=mask).logits
    states = model.model(ids, attention_mask=mask).last_hidden_state
    close(logits, model.score(states[[0, 1], [7, 4]]))


def test_several_rows_with_neither_mask_nor_pad_id_are_refused():
    model, ids = sequence_model(pad_token_id=None), random_ids(2, 8)
    with pytest.raises(ValueError, match="pass attention_mask, or set pad_token_id"):
        model(ids)
    close(model(ids, attention_mask=torch.ones_like(ids)).logits[:1], model(ids[:1]).logits)
    close(model(inputs_embeds=model.get_input_embeddings()(ids[:1])).logits, model(ids[:1]).logits)


@pytest.mark.parametrize(
    "num_labels, labels, loss",
    [
        (3, torch.tensor([2, 0, 1]), lambda logits, labels: F.cross_entropy(logits, labels)),
        (1, torch.tensor([0.5, -1.0, 2.0]), lambda logits, labels: F.mse_loss(logits.squeeze(-1), labels)),
        (3, torch.tensor([[1.0, 0, 1]] * 3), lambda logits, labels: F.binary_cross_entropy_with_logits(logits, labels)),
    ],
)
def test_sequence_losses(num_labels, labels, loss):
    model, (ids, mask, _) = sequence_model(num_labels=num_labels), padded(random_ids(3, 8), "right", (0, 2, 5))
    output = model.train()(ids, attention_mask=mask, labels=labels)
    assert output.logits.shape == (3, num_labels)
    close(output.loss, loss(output.logits, labels))
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.score.weight.grad.abs().max() > 0


def test_token_classification():
    model = tiny_model(DeepSeekR1ForTokenClassification, num_labels=5, hidden_dropout=0.5)
    ids, mask, _ = padded(random_ids(3, 10), "right", (0, 4, 7))
    labels = torch.randint(0, 5, ids.shape).masked_fill(mask == 0, -100)
    output = model(ids, attention_mask=mask, labels=labels)
    states = model.model(ids, attention_mask=mask).last_hidden_state
    close(output.logits, states @ model.score.weight.T + model.score.bias)
    close(output.loss, F.cross_entropy(output.logits.flatten(0, 1), labels.flatten()))
    for row, real, logits in zip(ids, mask.bool(), output.logits, strict=True):
        close(model(row[real][None]).logits[0], logits[real])
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)  # the head's dropout


@pytest.mark.parametrize("model_class", [DeepSeekR1ForSequenceClassification, DeepSeekR1ForTokenClassification])
def test_gradient_accumulation_in_the_trainer(model_class, tmp_path):
    """1 x 4 rows and 4 x 1 rows take the same step: trainers that hand out `num_items_in_batch` do not divide."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, set_seed

    rows = {"input_ids": random_ids(4, 8).tolist(), "attention_mask": [[1] * 8] * 4}
    if model_class is DeepSeekR1ForTokenClassification:
        rows["labels"] = [[0, 1, 2, 0, 1, 2, 0, 1]] * 2 + [[2, 1, -100, -100, -100, -100, -100, -100]] * 2
    else:
        rows["labels"] = [0, 1, 2, 0]
    weights = []
    for batch in (4, 1):
        set_seed(1)
        model = tiny_model(model_class, num_labels=3, seq_aux_loss_alpha=0.0)
        arguments = TrainingArguments(
            tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=4 // batch, max_steps=1,
            optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0, report_to=[], use_cpu=True,
            save_strategy="no", bf16=False,
        )  # fmt: skip
        before = model.score.weight.detach().clone()
        Trainer(model, arguments, train_dataset=Dataset.from_dict(rows)).train()
        weights.append(model.score.weight.detach().clone())
        assert (weights[-1] - before).abs().max() > 1e-3
    close(weights[0], weights[1])


def test_one_label_per_token_is_a_regression():
    """Values and process rewards: the mean squared error over the tokens that have a target."""
    model = DeepSeekR1ForTokenClassification(tiny_config(num_labels=1)).train()
    ids, targets = random_ids(2, 6), torch.randn(2, 6)
    targets[0, :3] = -100
    output = model(input_ids=ids, labels=targets)
    expected = ((output.logits.squeeze(-1) - targets)[targets != -100] ** 2).mean()
    torch.testing.assert_close(output.loss, expected)
    pairs = zip(ids.split(1), targets.split(1))
    halves = sum(model(input_ids=i, labels=t, num_items_in_batch=9).loss for i, t in pairs)
    torch.testing.assert_close(halves, expected)


@pytest.mark.parametrize("training", [True, False])
def test_packed_documents_do_not_see_each_other_in_the_heads(training):
    model = DeepSeekR1ForTokenClassification(tiny_config()).train(training)
    ids, positions = random_ids(1, 9), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = model(input_ids=ids, position_ids=positions).logits
    torch.testing.assert_close(packed[:, 4:], model(input_ids=ids[:, 4:]).logits, rtol=1e-4, atol=1e-5)
