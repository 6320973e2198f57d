"""Exponential moving average of the weights, as an option of any trainer.

    shadow <- decay_t * shadow + (1 - decay_t) * weights,  decay_t = min(decay, (1 + t) / (10 + t))

after every optimizer step t that was taken (Polyak and Juditsky 1992; DeepSeek-V3, arXiv:2412.19437,
Sec. 3.2.3 keeps one too; the warm-up of the decay, so that short runs are not dominated by the
initial weights, is the usual one of TensorFlow's ExponentialMovingAverage). The shadow is fp32 on the
model's device; buffers (the routing bias) are taken from the model as they are.
"""

import contextlib
import logging
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

EMA_FILE = "ema.safetensors"


class EMACallback(TrainerCallback):
    """Keeps the shadow, saves it in every checkpoint, resumes it exactly.

    Raises:
        ValueError: unless 0 < decay < 1; if the weights are sharded (FSDP, ZeRO-3).
    """

    def __init__(self, decay):
        if not 0.0 < decay < 1.0:
            raise ValueError(f"ema_decay={decay} must lie in (0, 1), e.g. 0.999; 0 in a config turns it off")
        self.decay = decay
        self.updates = 0
        self.shadow = {}

    # -- the average

    @torch.no_grad()
    def start(self, model):
        """Shadow = the weights now. Frozen parameters do not move, so they have none."""
        parameters = _trainable(model)
        if any(isinstance(p, DTensor) or p.numel() == 0 for p in parameters.values()):
            raise ValueError("ema_decay needs whole weights on each device: use DDP or one device, or ema_decay=0")
        self.shadow = {n: p.detach().to(torch.float32, copy=True) for n, p in parameters.items()}
        self.updates = 0

    @torch.no_grad()
    def update(self, model):
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = _trainable(model)
        weights = [parameters[name].detach().float() for name in self.shadow]
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1.0 - decay)

    @contextlib.contextmanager
    def applied(self, model):
        """Inside the block the model has the averaged weights (in its own dtype)."""
        parameters = _trainable(model)
        kept = {name: parameters[name].detach().clone() for name in self.shadow}
        _copy(parameters, self.shadow)
        try:
            yield model
        finally:
            _copy(parameters, kept)

    # -- trainer hooks

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        unwrapped = _unwrap(model)
        if not self.shadow:
            self.start(unwrapped)
        else:  # loaded before the model moved to its device
            devices = {name: parameter.device for name, parameter in _trainable(unwrapped).items()}
            self.shadow = {name: tensor.to(devices[name]) for name, tensor in self.shadow.items()}

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if not getattr(optimizer, "step_was_skipped", False):  # an fp16 overflow
            self.update(_unwrap(model))

    # -- checkpoints (see recipes/checkpoints.py)

    def checkpoint_bytes(self):
        return sum(4 * tensor.numel() for tensor in self.shadow.values())

    def save_to_checkpoint(self, folder, model):
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.shadow.items()}
        save_file(tensors, Path(folder) / EMA_FILE, metadata={"updates": str(self.updates)})

    def load_from_checkpoint(self, folder, model):
        path, unwrapped = Path(folder) / EMA_FILE, _unwrap(model)
        if not path.is_file():
            logger.warning("ema: %s holds no average, starting one from its weights", folder)
            self.start(unwrapped)
            return
        with safe_open(path, framework="pt") as file:
            names, expected = set(file.keys()), set(_trainable(unwrapped))
            if names != expected:
                raise ValueError(
                    f"{path} averages other parameters than this model trains, e.g. "
                    f"{sorted(names ^ expected)[:3]}; resume with the same frozen parameters, or with ema_decay=0"
                )
            self.shadow = {name: file.get_tensor(name) for name in _trainable(unwrapped)}
            self.updates = int(file.metadata()["updates"])


def _unwrap(model):
    return getattr(model, "module", model)


def _trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _copy(parameters, values):
    for name, value in values.items():
        parameters[name].copy_(value)
