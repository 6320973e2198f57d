"""Further outputs of the forward pass that TRL's trainers use.

TRL replaces `model.forward` by a function with a fused output head (`trl.trainer.utils.add_fused_lm_head`): with
`fused_lm_head=True` it runs the backbone and the head itself and never calls the causal LM's own forward. What a stage
needs besides (values, multi-token prediction, ...) must still be computed *inside* the forward pass, where DDP and FSDP
see the weights that take part. `extend_fused_forward` puts one more function around TRL's: it keeps the backbone's last
hidden states and adds fields to the output.
"""

import functools
import types


def extend_fused_forward(model, output_class, extra):
    """Makes `model(..., fused_lm_head=True)` return an `output_class` with the fields that `extra` computes.

    Args:
        model: the causal LM whose `forward` TRL has patched (not its PEFT wrapper).
        output_class: a dataclass derived from `trl.trainer.utils.FusedCausalLMOutput` that declares every added field:
            DDP builds the output anew from its fields. No field may be called like a method of dict (`values`).
        extra: function (model, hidden_states (B, S, D), inputs: the forward's keyword arguments) -> {field: tensor}.
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
        return output_class(**output, **extra(self, kept[0], kwargs))

    model.forward = types.MethodType(forward, model)
