"""What DeepSpeed's ZeRO needs beside its launch file (recipes/launch/zero2.yaml, zero3.yaml).

Under ZeRO-3 the library spreads a model while it builds or loads it: until DeepSpeed has gathered it a parameter is an
empty tensor, whose own shape is in `ds_shape`. What looks at sizes before training asks `whole_shape` and `whole_size`.

A decoder layer is gathered as one (`gather_by_layer`). DeepSpeed would gather each submodule when it is called; our
layers use some weights without calling their module, and which experts are used differs from process to process.
"""

import math

from modeling_deepseek_r1.decoder import DeepSeekR1DecoderLayer


def zero_stage(args):
    """The stage of ZeRO that training arguments run under; 0 without DeepSpeed."""
    plugin = getattr(args, "deepspeed_plugin", None)
    return 0 if plugin is None else plugin.zero_stage


def whole_shape(parameter):
    """The shape of a parameter, also where ZeRO-3 has left only a part of it here."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def whole_size(parameter):
    """The number of a parameter's values, as `whole_shape`."""
    return math.prod(whole_shape(parameter))


def gather_by_layer(model):
    """Tells DeepSpeed to gather each decoder layer of ours as a whole; to be called before `deepspeed.initialize`.
    Models without such layers are left alone."""
    for module in model.modules():
        if isinstance(module, DeepSeekR1DecoderLayer):
            module._z3_leaf = True  # what deepspeed.utils.set_z3_leaf_modules sets, which misses subclasses


class ZeroSetupMixin:
    """Put before `transformers.Trainer` in the list of bases.

    Raises:
        ValueError: in `check_saving`, for checkpoints that cannot be resumed.
    """

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if not self.is_deepspeed_enabled:
            return
        prepare = self.accelerator.prepare

        def prepare_for_zero(*objects, **options):
            for thing in objects:
                if hasattr(thing, "modules"):
                    gather_by_layer(thing)
            return prepare(*objects, **options)

        self.accelerator.prepare = prepare_for_zero
