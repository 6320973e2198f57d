"""Activation checkpointing: what a training step keeps for its backward pass, and what it computes again there.

- `none` keeps everything.
- `selective` computes again what is wide and cheap: the experts' gathered rows and gate-up products, and the gate-up
  products of the shared experts and dense MLPs. Attention and routing are kept.
- `full` keeps each layer's input and computes the layer again: the library's `activation_checkpointing_enable`, which
  trainers call for `activation_checkpointing=True`. A router does not choose twice: a token's experts are kept from the
  first pass and replayed in the second (`DeepSeekR1Router.replayed`), so that near-tied experts, or a routing bias that
  moved in between, cannot send it elsewhere. Only the gate values are computed again. (A router whose output a hook
  may have changed chooses anew: what the hook made of its choice is not known to be one.)

Gradients are those of `none`, and the load of experts is counted once, in the backward pass.
"""

import torch
from torch.utils.checkpoint import checkpoint

MODES = ("none", "selective", "full")


def computed_again(module, function, *args):
    """function(*args); in a training step the backward pass calls it again instead of keeping what it computes.

    `module` is asked whether it trains. Random numbers, of adapters' dropout say, are the same in both passes.
    """
    if module.training and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)


class ActivationCheckpointingMixin:
    """`set_activation_checkpointing` for a `PreTrainedModel`, put before it in the list of bases.

    Modules that can compute a part of themselves again have an attribute `recompute`, read at run time and no part of
    the config.
    """

    def set_activation_checkpointing(self, mode, activation_checkpointing_kwargs=None, every_n_layers=1, offload=False):
        """Chooses what is computed again: "none", "selective" or "full", see the head of this file.

        The other arguments are the library's, of its `activation_checkpointing_enable`, and belong to "full".
        Raises:
            ValueError: for another mode, or arguments that it does not have.
        """
        if mode not in MODES:
            raise ValueError(f"activation checkpointing mode={mode!r} must be one of {', '.join(MODES)}")
        if mode != "full" and (activation_checkpointing_kwargs or every_n_layers != 1 or offload):
            raise ValueError(
                f"activation_checkpointing_kwargs={activation_checkpointing_kwargs}, every_n_layers={every_n_layers}, "
                f"offload={offload} are for the mode 'full'; leave them out with mode={mode!r}"
            )
        self.activation_checkpointing_disable()
        if mode == "selective":
            self._set_recompute(True)
        elif mode == "full":
            super().activation_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def activation_checkpointing_disable(self):
        """The mode `none`."""
        self._set_recompute(False)
        if self.is_activation_checkpointing:
            super().activation_checkpointing_disable()

    def _set_recompute(self, value):
        for module in self.modules():
            if hasattr(module, "recompute"):
                module.recompute = value

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, **options):
        """The library's, which is `full`; {"mode": "selective"} among the keyword arguments asks for that.

        Trainers call this for activation_checkpointing=True, so that activation_checkpointing_kwargs={"mode":
        "selective"} brings any of them to it. `use_reentrant`, which some add, says nothing there.
        """
        kwargs = dict(activation_checkpointing_kwargs or {})
        mode = kwargs.pop("mode", "full")
        if mode == "selective":
            kwargs.pop("use_reentrant", None)
        self.set_activation_checkpointing(mode, kwargs or None, **options)
