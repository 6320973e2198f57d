"""What DeepSpeed's ZeRO needs beside its launch file (recipes/launch/zero2.yaml, zero3.yaml).

Under ZeRO-3 the library spreads a model while it builds or loads it: until DeepSpeed has gathered it a parameter is an
empty tensor, whose own shape is in `ds_shape`. What looks at sizes before training asks `whole_shape` and `whole_size`.

A decoder layer is gathered as one. DeepSpeed would gather each submodule when that is called; our layers use some
weights without calling their module, and fewer, larger messages take less time.
"""

import math
from pathlib import Path

import torch

from modeling_deepseek_r1.decoder import DeepSeekR1DecoderLayer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


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


def ready_for_zero(model, accelerator):
    """Makes a model, ours or another, one that `deepspeed.initialize` takes as it is; before that is called.

    Our decoder layers are gathered as wholes. Under ZeRO-3, what is not yet DeepSpeed's (buffers, a value head) goes to
    the device, and new parameters to the compute dtype: those of two dtypes are not gathered together.
    """
    for module in model.modules():
        if isinstance(module, DeepSeekR1DecoderLayer):
            module._z3_leaf = True  # what deepspeed.utils.set_z3_leaf_modules sets, which misses subclasses
    plugin = accelerator.state.deepspeed_plugin
    if plugin.zero_stage < 3:
        return
    dtype = next((DTYPES[name] for name in DTYPES if plugin.hf_ds_config.is_true(f"{name}.enabled")), torch.float32)
    for parameter in model.parameters():
        if not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(accelerator.device, dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(accelerator.device)


def saved_by_zero(checkpoint):
    """(stage, processes) of a checkpoint that DeepSpeed wrote, by its files; (0, 0) for any other."""
    latest = Path(checkpoint) / "latest"
    if not latest.is_file():
        return 0, 0
    folder = Path(checkpoint) / latest.read_text(encoding="utf-8").strip()
    processes = len(list(folder.glob("*zero_pp_rank_*_optim_states.pt")))
    return 3 if any(folder.glob("*zero_pp_rank_*_model_states.pt")) else 2, processes


def check_zero_checkpoint(checkpoint, stage, processes):
    """Raises ValueError unless a run under ZeRO `stage` (0: without DeepSpeed) can go on from a checkpoint."""
    saved, ranks = saved_by_zero(checkpoint)
    anew = f"or start a new run from its weights with --model_name_or_path {checkpoint}"
    if saved == stage and (not saved or ranks == processes):
        return
    if not saved:
        raise ValueError(f"{checkpoint} was not written under DeepSpeed, which resumes its own checkpoints only; go on "
                         f"without zero{stage}.yaml, {anew}")  # fmt: skip
    raise ValueError(
        f"{checkpoint} was written under ZeRO-{saved} on {ranks} processes, and its states cannot be divided anew for "
        f"{f'ZeRO-{stage}' if stage else 'a run without DeepSpeed'} on {processes}; go on with zero{saved}.yaml "
        f"--num_processes {ranks}, {anew}"
    )


class ZeroSetupMixin:
    """Put before `transformers.Trainer` in the list of bases."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if not self.is_deepspeed_enabled:
            return
        if getattr(self.args, "weights_dtype", "float32") != "float32":
            raise ValueError(f"weights_dtype={self.args.weights_dtype} under DeepSpeed, which keeps fp32 masters of "
                             "16-bit weights by itself: leave it out, with bf16=true")  # fmt: skip
        prepare = self.accelerator.prepare

        def prepare_for_zero(*objects, **options):
            for model in (thing for thing in objects if isinstance(thing, torch.nn.Module)):
                ready_for_zero(model, self.accelerator)
            return prepare(*objects, **options)

        self.accelerator.prepare = prepare_for_zero
