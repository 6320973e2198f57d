"""Gradient compression in a trainer: registered where accelerate wraps the model, counted, saved and resumed."""

import dataclasses
import logging
from pathlib import Path

import torch
from accelerate.utils import DistributedDataParallelKwargs, DistributedType

from recipes.gradient_compression import COMPRESSIONS, HookedReduction

logger = logging.getLogger(__name__)

STATE_FILE = "gradient_compression_{rank}.pt"


def save_compression(compression, folder, rank, world):
    """The state of one process, in a file of its own: what it has not sent yet is its alone."""
    state = {"world": world} | compression.state_dict()
    torch.save(state, Path(folder) / STATE_FILE.format(rank=rank))


def load_compression(compression, folder, rank, world):
    """Loads what `save_compression` wrote. On another number of processes, each gets the mean of what was left unsent.

    Raises:
        ValueError: for another compression's state, for files that are missing.
    """
    first = Path(folder) / STATE_FILE.format(rank=0)
    if not first.is_file():
        logger.warning("%s has no state of gradient compression: starting without unsent gradients", folder)
        return
    head = torch.load(first, map_location="cpu", weights_only=True)
    saved = head["world"]
    if head["kind"] != type(compression).__name__:
        raise ValueError(f"{first} is of {head['kind']}, gradient_compression asks for {type(compression).__name__}; "
                         "resume with the compression of the checkpoint")  # fmt: skip
    wanted = [rank] if saved == world else range(saved)
    files = [Path(folder) / STATE_FILE.format(rank=number) for number in wanted]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}: {saved} processes wrote one each; copy them all")
    state = torch.load(files[0], map_location="cpu", weights_only=True)
    unsent = next((state[name] for name in ("residuals", "errors") if name in state), {})
    for tensor in unsent.values():
        tensor /= len(files)
    for file in files[1:]:
        other = torch.load(file, map_location="cpu", weights_only=True)
        theirs = other.get("residuals", other.get("errors", {}))
        for name, tensor in unsent.items():
            tensor.add_(theirs[name], alpha=1 / len(files))
    compression.load_state_dict(state)


class CompressionMixin:
    """Put before `transformers.Trainer`: `args.gradient_compression` chooses, and sent megabytes are logged.

    The hook is registered where accelerate wraps the model; the state lies beside the optimizer's in checkpoints.

    Raises:
        ValueError: for a compression where gradients are not all-reduced by DDP (FSDP, DeepSpeed, tensor parallel).
    """

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        kind = getattr(self.args, "gradient_compression", "none")
        self.compression = COMPRESSIONS[kind](self.args)
        accelerator = self.accelerator
        alone = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        sharded = accelerator.distributed_type not in alone or getattr(accelerator, "parallelism_config", None)
        if kind != "none" and sharded:
            raise ValueError(
                f"gradient_compression={kind} is a hook of DistributedDataParallel, but this run is "
                f"{str(getattr(accelerator.distributed_type, 'value', accelerator.distributed_type))}"
                f"{' with a parallelism_config' if getattr(accelerator, 'parallelism_config', None) else ''}; "
                "use none"
            )
        if kind != "none" and accelerator.num_processes == 1:
            logger.warning("gradient_compression=%s: one process sends no gradients", kind)
        if accelerator.ddp_handler is not None:
            accelerator.ddp_handler = _handler_with(self.compression, accelerator.ddp_handler)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)  # every process, like this one
        if isinstance(self.compression, HookedReduction) and self.compression.group is not None:
            save_compression(self.compression, output_dir, self.args.process_index, self.args.world_size)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)  # the model is wrapped by now
        if checkpoint is not None and isinstance(self.compression, HookedReduction) and self.compression.group:
            load_compression(self.compression, checkpoint, self.args.process_index, self.args.world_size)

    def log(self, logs, start_time=None):
        if "loss" in logs and (sent := self.compression.megabytes_per_step()) is not None:
            logs["gradient_megabytes"] = sent
        super().log(logs, start_time)


def _handler_with(compression, handler):
    """accelerate's settings of DDP, which attach our compression to the wrapped model."""

    class CompressedDDP(DistributedDataParallelKwargs):  # made anew by accelerate without arguments, to compare
        def register_comm_hook(self, model):
            compression.attach(model)

    return CompressedDDP(**{field.name: getattr(handler, field.name) for field in dataclasses.fields(handler)})
