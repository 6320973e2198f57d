"""Checkpoints that another number of processes can resume, under DDP, FSDP2 and our expert parallelism.

Part of `CheckpointMixin`. Whole models have checkpoints in the plain layout, which any number of processes reads.
Sharded ones, and any with `async_save`, have their weights and optimizer states in shards that all processes write
(recipes/sharded_checkpoints.py); config, tokenizer, schedule, random states and the trainer's state lie beside them as
always. Either kind is resumed in either layout. The model saved at the end of a run is plain.
"""

import contextlib
import random
import re
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors import safe_open
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import safe_globals

from modeling_deepseek_r1.checkpoint_files import weight_files
from modeling_deepseek_r1.expert_parallel import is_expert_parallel
from modeling_deepseek_r1.expert_parallel_state import gather_full_state_dict, load_full_state_dict
from recipes.checkpoint_writer import CheckpointWriter, ShardJob
from recipes.sharded_checkpoints import (
    GROUPS,
    holds_shards,
    load_optimizer,
    load_weights,
    optimizer_state,
    weight_pieces,
)
from recipes.tensor_pieces import deal_whole, is_sharded, staged, weight_sums

LAYER = re.compile(r".*?\blayers\.\d+\.")


def saved_processes(checkpoint):
    """How many processes wrote a checkpoint, by their files of random states; 0 where there are none."""
    folder = Path(checkpoint)
    return 1 if (folder / "rng_state.pth").is_file() else len(list(folder.glob("rng_state_*.pth")))


def load_plain_weights(folder, model):
    """Reads a folder in the plain layout into a sharded `model`, in place; each process reads all and keeps its part.

    One layer after the other: what a device and a host hold besides is one whole layer, or a tensor outside of them.
    """
    units = {}
    for name, file in weight_files(folder).items():
        layer = LAYER.match(name)  # a layer's experts, one by one on disk, become one tensor
        units.setdefault(layer[0] if layer else name, []).append((name, file))
    device = next(model.parameters()).device
    with contextlib.ExitStack() as stack, torch.no_grad():
        stack.enter_context(implicit_replication())  # a whole tensor is copied into the part that is here
        files = {file for unit in units.values() for _, file in unit}
        opened = {file: stack.enter_context(safe_open(Path(folder) / file, "pt")) for file in files}
        for unit in units.values():
            state = {name: opened[file].get_tensor(name).to(device) for name, file in unit}
            load_full_state_dict(model, state, strict=False)


def load_plain_optimizer(folder, optimizer):
    """Reads an `optimizer.pt` of whole states into the optimizer of a sharded model."""
    bare = getattr(optimizer, "optimizer", optimizer)
    state = torch.load(Path(folder) / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
    ours = [p for group in bare.param_groups for p in group["params"]]
    theirs = [index for group in state["param_groups"] for index in group["params"]]
    if [len(g["params"]) for g in bare.param_groups] != [len(g["params"]) for g in state["param_groups"]]:
        raise ValueError(f"{folder}/{OPTIMIZER_NAME} has other parameter groups than this optimizer; resume with the "
                         "optimizer, weight decay and frozen parameters that wrote it")  # fmt: skip
    for parameter, index in zip(ours, theirs):
        if index in state["state"]:
            state["state"][index] = {key: _laid_out_as(parameter, v) for key, v in state["state"][index].items()}
    optimizer.load_state_dict(state)


def _laid_out_as(parameter, value):
    """This process' part of a whole state of its parameter; numbers stay as they are."""
    if not torch.is_tensor(value) or not value.dim():
        return value
    if is_expert_parallel(parameter) and value.shape == parameter.global_shape:
        group = parameter.expert_parallel_group
        return value.tensor_split(dist.get_world_size(group))[dist.get_rank(group)]
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    mesh = parameter.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)


def load_rng_of_other(checkpoint, saved, rank, device):
    """Random states for a run on another number of processes: rank r goes on with those of saved rank r modulo n."""
    number = rank % saved
    file = Path(checkpoint) / ("rng_state.pth" if saved == 1 else f"rng_state_{number}.pth")
    with safe_globals():
        states = torch.load(file, map_location="cpu", weights_only=True)
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    torch.random.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        of_devices = states["cuda"] if isinstance(states["cuda"], (list, tuple)) else [states["cuda"]]
        torch.cuda.set_rng_state(of_devices[number % len(of_devices)], device)


class ElasticCheckpointMixin:
    """What `CheckpointMixin` does for shards, for other numbers of processes and for saves beside training."""

    _pieces = None  # of a save into shards that is being prepared: {name: Piece}

    @property
    def writer(self):
        """The one `CheckpointWriter` of this trainer."""
        if not hasattr(self, "_writer"):
            self._writer, self._buffers = CheckpointWriter(getattr(self.args, "collective_timeout_s", 600)), {}
        return self._writer

    def _bare_model(self):
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def shards_model(self):
        """Whether weights are spread over processes in a way that we write: FSDP2, DTensors, our expert parallelism."""
        if self.is_deepspeed_enabled or self.is_distributed_loading_by_transformers:
            return False  # the library cuts stacked matrices (gate and up) into parts that are no blocks
        if self.is_fsdp_enabled:
            return self.accelerator.state.fsdp_plugin.fsdp_version == 2
        return is_sharded(self._bare_model())

    def saves_shards(self):
        """Whether checkpoints hold shards: of sharded models, and with `async_save`."""
        return bool(getattr(self.args, "async_save", False)) or self.shards_model()

    def check_saving(self):
        """Raises ValueError, before training, for settings that cannot be saved."""
        args, shards = self.args, self.saves_shards()
        if getattr(args, "async_save", False):
            if self.is_deepspeed_enabled or self.is_fsdp_enabled and not self.shards_model():
                raise ValueError("async_save=true: DeepSpeed and FSDP1 write their own checkpoints; leave it out")
            if isinstance(self._bare_model(), PeftModel) and not self.shards_model():
                raise ValueError("async_save=true: an adapter is written in a moment; leave async_save out")
        strategy = getattr(args.hub_strategy, "value", args.hub_strategy)
        if shards and args.push_to_hub and strategy != "end":
            raise ValueError(f"hub_strategy={strategy} pushes plain checkpoints; those of sharded models, and with "
                             "async_save, are in shards: set hub_strategy=end")  # fmt: skip

    def _has_adapter(self):
        return isinstance(self._bare_model(), PeftModel)

    def _sum_weights(self):
        """{name: sum of bits} over all processes; see `weight_sums`."""
        group = self.writer.group if self.shards_model() else None
        add_up = None if group is None else lambda sums: dist.all_reduce(sums, group=group)
        return weight_sums(self._bare_model(), add_up)

    # -- saving

    @contextlib.contextmanager
    def into_shards(self, shards):
        """Inside the block `save_model` and the optimizer's save collect pieces in place of writing tensors."""
        self._pieces = {} if shards else None
        try:
            yield
        finally:
            self._pieces = None

    def save_model(self, output_dir=None, _internal_call=False):
        if self._pieces is not None:
            self._pieces |= weight_pieces(self._bare_model(), self._has_adapter())
            if self.args.should_save:
                self._save_beside_weights(Path(output_dir))
        elif self.shards_model() and not self.is_distributed_loading_by_transformers:
            self._save(output_dir or self.args.output_dir, state_dict=gather_full_state_dict(self._bare_model()))
        else:
            super().save_model(output_dir, _internal_call)

    def _save_beside_weights(self, folder):
        """What a model folder holds but its tensors."""
        folder.mkdir(parents=True, exist_ok=True)
        model = self._bare_model()
        if self._has_adapter():
            model.peft_config[model.active_adapter].save_pretrained(folder)
        elif hasattr(model, "config"):
            model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
            model.config.save_pretrained(folder)
            if getattr(model, "generation_config", None) is not None:
                model.generation_config.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _save_optimizer_and_scheduler(self, output_dir):
        if self._pieces is None:
            return super()._save_optimizer_and_scheduler(output_dir)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        pieces, groups = optimizer_state(self._bare_model(), optimizer)
        self._pieces |= pieces
        if self.args.should_save:
            torch.save(groups, Path(output_dir) / GROUPS)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def start_writing(self, folder, afterwards):
        """Hands the pieces of this save to the writer; with `async_save` it returns when they are copied."""
        beside, group = bool(getattr(self.args, "async_save", False)), self.writer.group
        pieces = deal_whole(self._pieces, self.args.process_index, self.args.world_size)
        sums = self._sum_weights()
        if beside:
            pieces = staged(pieces, self._buffers)
        self.writer.start(ShardJob(folder, pieces, sums, group, afterwards), beside)

    # -- loading

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if holds_shards(resume_from_checkpoint):
            load_weights(resume_from_checkpoint, self._bare_model(), self._has_adapter())
        elif self.shards_model():
            if self._has_adapter():
                raise ValueError(f"{resume_from_checkpoint} holds a plain adapter, which is resumed without FSDP only")
            load_plain_weights(resume_from_checkpoint, self._bare_model())
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        best = self.state.best_model_checkpoint
        if holds_shards(best) or self.shards_model():
            ElasticCheckpointMixin._load_from_checkpoint(self, best)
        else:
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or not (holds_shards(checkpoint) or self.shards_model()):
            return super()._load_optimizer_and_scheduler(checkpoint)
        if holds_shards(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)  # finds no optimizer.pt; mixins may have more to load
            load_optimizer(checkpoint, self._bare_model(), self.optimizer)
        else:
            load_plain_optimizer(checkpoint, self.optimizer)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)  # takes this rank's file where there is one; mixins load more
        saved = 0 if checkpoint is None else saved_processes(checkpoint)
        if saved not in (0, self.args.world_size):
            load_rng_of_other(checkpoint, saved, self.args.process_index, self.args.device)
