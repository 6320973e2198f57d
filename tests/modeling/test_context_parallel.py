"""Rows cut over processes, as context parallelism does it: the parts of the loss add up to that of the whole rows.

torch's ring attention has no CPU kernels. What it computes is put in its place: here the parts are rows of one batch,
and an attention function puts the keys of a row together again.
"""

import inspect

import pytest
import torch
from accelerate.big_modeling import _attach_context_parallel_hooks
from torch.nn.functional import pad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import find_labels

from modeling_deepseek_r1.fused import set_fused_kernels
from tests.modeling.helpers import VOCAB, close, tiny_model

LENGTH = 12


@pytest.fixture(autouse=True)
def plain_attention():
    before = set_fused_kernels(False)
    yield
    set_fused_kernels(before)


def shifted(labels):
    """As Trainer does it before it cuts rows."""
    return pad(labels, (0, 1), value=-100)[:, 1:]


def test_shifted_labels_are_the_labels_one_further():
    model, ids = tiny_model(num_nextn_predict_layers=0).train(), torch.randint(3, VOCAB, (2, LENGTH))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.2, -100)
    for changes in ({}, {"num_items_in_batch": torch.tensor(50)}, {"return_token_losses": True}):
        whole = model(input_ids=ids, labels=labels, **changes)
        for given in ({"labels": labels}, {}):  # Trainer gives both
            output = model(input_ids=ids, shift_labels=shifted(labels), **given, **changes)
            assert torch.equal(output.loss, whole.loss) and output.logits is None
    assert torch.equal(output.token_losses, whole.token_losses)
    model.eval()
    close(model(input_ids=ids, shift_labels=shifted(labels)).loss, whole.loss)


def test_no_argument_is_named_for_them():
    """Trainer evaluates a loss only where a batch has every argument that has `label` in its name."""
    model = tiny_model()
    assert find_labels(type(model)) == ["labels"]
    assert "shift_labels" not in inspect.signature(model.forward).parameters


def test_multi_token_prediction_cannot_look_past_a_cut():
    model, ids = tiny_model(num_nextn_predict_layers=1).train(), torch.randint(3, VOCAB, (1, LENGTH))
    with pytest.raises(ValueError, match="shift_labels.*mtp_loss_coef=0"):
        model(input_ids=ids, shift_labels=shifted(ids))
    model.freeze_mtp()
    assert model(input_ids=ids, shift_labels=shifted(ids)).loss > 0


def parts_of_rows(order):
    """An attention function for a batch of parts: entry 2 r + p of the batch is part p of row r, whose tokens together
    are in `order`."""
    back = order.argsort()

    def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, is_causal=None, **kwargs):
        assert attention_mask is None and is_causal  # accelerate's hooks see to that
        join = lambda part: part.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2, 3)[:, :, back]
        scores = join(query) @ join(key).transpose(2, 3) * scaling
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
        output = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ join(value)
        output = output[:, :, order].unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)
        return output.transpose(1, 2), None

    return attention


@pytest.mark.parametrize("balanced", [False, True])
def test_parts_of_rows_add_up_to_the_rows(monkeypatch, balanced):
    """Loss and gradients; with the load balanced, where each process has a part from the front and one from the back,
    positions jump in the middle of a part without a document's end."""
    torch.manual_seed(0)
    model = tiny_model(implementation="sdpa", num_nextn_predict_layers=0, seq_aux_loss_alpha=0.0).train()
    ids = torch.randint(3, VOCAB, (3, LENGTH))
    order = torch.arange(LENGTH).view(4, -1)[[0, 3, 1, 2] if balanced else [0, 1, 2, 3]].flatten()
    cut = lambda rows: rows[:, order].unflatten(1, (2, -1)).flatten(0, 1)
    expected = model(input_ids=ids, labels=ids).loss
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()

    _attach_context_parallel_hooks(model)
    model.model.documents_apart = False
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", parts_of_rows(order))
    monkeypatch.setattr("modeling_deepseek_r1.modeling_deepseek_r1.create_causal_mask", without_documents)
    positions = torch.arange(LENGTH).expand(3, -1)
    loss = model(input_ids=cut(ids), position_ids=cut(positions), shift_labels=cut(shifted(ids))).loss
    close(loss, expected)
    loss.backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)


def without_documents(**inputs):
    """Jumps in the positions must not become a mask as large as the square of the row, which then is thrown away."""
    assert inputs["position_ids"] is None
