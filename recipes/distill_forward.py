"""Hidden states of teacher and student on the same tokens, the student's losses inside its forward pass.

As TRL's fused head does (recipes/fused_forward.py), the student's `forward` is replaced by one that runs backbone and
head itself when it is told to: DDP, mixed precision and PEFT see an ordinary call of the model.
"""

import contextlib
import functools
import types
from dataclasses import dataclass

import torch

from recipes.distill_losses import distillation_sums

LOSS_INPUTS = ("labels", "num_items_in_batch", "token_mask", "use_cache")  # what a teacher has no use for


@dataclass
class TeacherStates:
    """What the student is compared with: last hidden states (N, D) of the trained tokens, those of chosen layers."""

    hidden: torch.Tensor
    features: list
    head: torch.nn.Module
    temperature: float


def decoder_layers(model):
    """The decoder layers of a causal LM, without multi-token-prediction layers.

    Raises:
        ValueError: for a model that has no list called `layers`.
    """
    layers = getattr(model.base_model, "layers", None)
    if layers is None:
        raise ValueError(
            f"a {model.config.model_type} model has no list of layers by the name of layers: set feature_coef=0, and "
            "take another student than student_layers"
        )
    return layers[: model.config.get_text_config().num_hidden_layers]


@contextlib.contextmanager
def kept_outputs(model, places):
    """Inside the block, the outputs (B, S, D) of these decoder layers are put into the dict that it gives."""
    kept, hooks = {}, []

    def keep(place, output):
        kept.setdefault(place, output[0] if isinstance(output, tuple) else output)  # not those of a recomputation

    try:
        for place in places:
            layer = decoder_layers(model)[place]
            hooks.append(layer.register_forward_hook(lambda _, __, output, place=place: keep(place, output)))
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def trained_tokens(labels):
    """(B, S - 1) bool: positions whose next token is trained."""
    return labels[:, 1:] != -100


def run_backbone(model, inputs, labels, places):
    """(last hidden states (N, D), [states (N, D) of each of `places`]) at the positions of `trained_tokens`."""
    mask = trained_tokens(labels)
    with kept_outputs(model, set(places)) as kept:
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    return hidden[:, :-1][mask], [kept[place][:, :-1][mask] for place in places]


@torch.no_grad()
def teacher_states(teacher, inputs, places, temperature):
    """The teacher's `TeacherStates` on a batch of the student's."""
    labels, inputs = inputs["labels"], {name: each for name, each in inputs.items() if name not in LOSS_INPUTS}
    hidden, features = run_backbone(teacher, inputs, labels, places)
    return TeacherStates(hidden, features, teacher.get_output_embeddings(), temperature)


@torch.no_grad()
def check_head(model, which):
    """ValueError unless the logits of a model are its head on its last hidden states, as the losses here take them."""
    was_training, ids = model.training, torch.arange(4, 8, device=model.device).unsqueeze(0)
    model.eval()
    expected = model(input_ids=ids, use_cache=False).logits.float()
    found = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
    model.train(was_training)
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item()):
        raise ValueError(
            f"the {which}, a {model.config.model_type} model, scales or caps its logits after the head, which "
            "method=logits cannot take apart; use method=on_policy or method=traces"
        )


def add_distillation_forward(model, places):
    """Makes `model(..., labels=..., teacher=TeacherStates)` return {"divergence", "cross_entropy", "correct": sums over
    the trained tokens; "features": [(N, D) of each of `places`]}. Without `teacher` nothing changes."""
    original = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(self, *args, teacher=None, labels=None, **kwargs):
        if teacher is None:
            if labels is not None:
                kwargs["labels"] = labels
            return original(*args, **kwargs)
        kwargs.pop("use_cache", None)
        hidden, features = run_backbone(self, kwargs, labels, places)
        targets = labels[:, 1:][trained_tokens(labels)]
        head = self.get_output_embeddings()
        sums = distillation_sums(hidden, teacher.hidden, targets, head, teacher.head, teacher.temperature)
        return sums._asdict() | {"features": features}

    model.forward = types.MethodType(forward, model)
