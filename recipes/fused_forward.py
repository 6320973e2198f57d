"""Further outputs of the forward pass that TRL's trainers use.

TRL replaces `model.forward` by a function with a fused output head (`trl.trainer.utils.add_fused_lm_head`): with
`fused_lm_head=True` it runs the backbone and the head itself and never calls the causal LM's own forward. What a
stage needs besides (the loss of the multi-token-prediction layers, values, ...) must still be computed *inside* the
forward pass, where DDP and FSDP see the weights that take part. `extend_fused_forward` puts one more function around
TRL's: it keeps the backbone's last hidden states and adds fields to the output.
"""

import functools
import types
from dataclasses import dataclass

import torch
from trl.trainer.utils import FusedCausalLMOutput

from modeling_deepseek_r1.mtp import document_ids, shifted_labels


@dataclass
class SFTOutput(FusedCausalLMOutput):
    """`FusedCausalLMOutput` and, each a sum over the batch in nats that the caller divides by its token count:

    mtp_loss: () mean over the prediction depths of their summed cross-entropy (DeepSeek-V3, Eqs. 24, 25).
    smoothed_loss: () summed next-token cross-entropy with the config's `label_smoothing`.
    """

    mtp_loss: torch.Tensor | None = None
    smoothed_loss: torch.Tensor | None = None


def extend_fused_forward(model, output_class, *extras):
    """Makes `model(..., fused_lm_head=True)` return an `output_class` with the fields that `extras` compute.

    Args:
        model: the causal LM whose `forward` TRL has patched (not its PEFT wrapper).
        output_class: a dataclass derived from `FusedCausalLMOutput` that declares every added field: DDP builds the
            output anew from its fields.
        extras: functions (model, hidden_states (B, S, D), inputs: dict of the forward's arguments) -> {field: tensor}.
    """
    fused = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(self, *args, fused_lm_head=False, **kwargs):
        if not fused_lm_head:
            return fused(*args, **kwargs)
        if args:
            raise TypeError("pass the inputs of a fused forward by name")
        kept = []
        hook = self.base_model.register_forward_hook(lambda _, __, output: kept.append(output.last_hidden_state))
        try:
            output = fused(fused_lm_head=True, **kwargs)
        finally:
            hook.remove()
        fields = {name: value for extra in extras for name, value in extra(self, kept[0], kwargs).items()}
        return output_class(**output, **fields)

    model.forward = types.MethodType(forward, model)


def _documents(inputs, labels):
    """(B, S) number of the document of each token in a padding-free row; None: one document a row."""
    position_ids = inputs.get("position_ids")
    if inputs.get("attention_mask") is not None or position_ids is None:
        return None
    return document_ids(position_ids).expand(labels.shape)


def mtp_loss(model, hidden_states, inputs):
    """{"mtp_loss"} in training, where the model has multi-token-prediction layers that are trained."""
    if not (model.training and getattr(model, "trains_mtp", False)):
        return {}
    labels = inputs["labels"].to(hidden_states.device)
    skipped = ("labels", "shift_labels", "num_items_in_batch", "use_cache", "past_key_values", "output_router_logits")
    mtp_inputs = dict.fromkeys(("input_ids", "inputs_embeds", "attention_mask", "position_ids"))
    mtp_inputs |= {name: value for name, value in inputs.items() if name not in skipped}
    return {"mtp_loss": model.mtp_loss(hidden_states, labels, _documents(inputs, labels), mtp_inputs)}


def smoothed_loss(model, hidden_states, inputs):
    """{"smoothed_loss"} in training, where the model's config asks for label smoothing."""
    if not (model.training and getattr(model.config, "label_smoothing", 0.0)):
        return {}
    labels = inputs["labels"].to(hidden_states.device)
    targets = shifted_labels(labels, 1, _documents(inputs, labels))
    return {"smoothed_loss": model.cross_entropy(hidden_states, targets)[0]}
