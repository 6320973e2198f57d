"""Weights and optimizer states written by all processes, each its part, and read by any number in any layout.

The files are torch.distributed.checkpoint's, in `checkpoint-N/shards`; `Piece`s (recipes/tensor_pieces.py) say what
goes where, so that FSDP2's, DDP's and our expert parallelism's tensors are written and read alike. Names are the
model's own: `weights.<name>` and `optimizer.<parameter>.<state>`. Reading takes no communication: each process finds
the parts that overlap its own. `python recipes/export_checkpoint.py` makes a plain model folder of one.

The index (`.metadata`) is a pickle, as torch writes it: read only checkpoints whose origin you know.
"""

import contextlib
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from recipes.tensor_pieces import model_pieces, named_tensors, optimizer_pieces, parameter_names, piece_of

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # of `no_dist`: it does as asked

SHARDS, INDEX = "shards", ".metadata"
GROUPS = "optimizer_groups.pt"  # hyperparameters and numbers beside the tensors, by parameter names
WEIGHTS, OPTIMIZER = "weights.", "optimizer."


class ShardError(OSError):
    """Shards that could not be written or read; the message names the ranks and what each of them met."""


class LayoutError(ValueError):
    """A checkpoint that does not fit the model or the optimizer; the message names what differs."""


def holds_shards(folder):
    """Whether a checkpoint's weights are in the layout of this module."""
    return (Path(folder) / SHARDS / INDEX).is_file()


def files_of_rank(folder, rank):
    """The files in `folder`/shards that this rank wrote."""
    return sorted((Path(folder) / SHARDS).glob(f"__{rank}_*.distcp"))


@contextlib.contextmanager
def _with_plain_errors():
    """torch's own error is no Exception, and holds tracebacks of all ranks."""
    try:
        yield
    except CheckpointException as error:
        met = (f"rank {rank}: {type(each).__name__}: {each}" for rank, (each, _) in error.failures.items())
        raise ShardError("; ".join(met)) from error


# ---------------------------------------------------------------- torch's planners, for pieces


def _chunk(piece):
    return ChunkStorageMetadata(offsets=torch.Size(piece.offset), sizes=piece.local.shape)


class _SavePlanner(dcp.DefaultSavePlanner):
    """Writes the pieces that this process owns."""

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self):
        self.plan = SavePlan([
            WriteItem(
                index=MetadataIndex(name, torch.Size(piece.offset)), type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(piece), properties=TensorProperties.create_from_tensor(piece.local),
                    size=torch.Size(piece.shape),
                ),
            )
            for name, piece in self.state_dict.items() if piece.owner is not False and piece.local.numel()
        ])  # fmt: skip
        return self.plan

    def lookup_object(self, index):
        return self.state_dict[index.fqn].local


class _LoadPlanner(dcp.DefaultLoadPlanner):
    """Reads into the pieces of this process, in place."""

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self):
        saved, items = self.metadata.state_dict_metadata, []
        for name, piece in self.state_dict.items():
            if piece.local.numel():
                items += create_read_items_for_chunk_list(name, saved[name], [_chunk(piece)])
        return LoadPlan(items)

    def lookup_tensor(self, index):
        return self.state_dict[index.fqn].local


def write_pieces(folder, pieces, group=None):
    """Writes what this process owns into `folder`/shards. All processes of `group` (one of gloo's) call it.

    group: None on a single process.
    Raises:
        ShardError: on every rank, for an error of one.
    """
    # torch's writer looks ahead on a CUDA stream of its thread's device: for pieces on the CPU, which a thread beside
    # training writes, that would be a context on the first GPU and a wait for what training has queued there.
    ahead = {} if any(piece.local.is_cuda for piece in pieces.values()) else {"per_thread_copy_ahead": 0}
    with _with_plain_errors():
        dcp.save(
            pieces, storage_writer=dcp.FileSystemWriter(Path(folder) / SHARDS, overwrite=True, **ahead),
            planner=_SavePlanner(), process_group=group, no_dist=group is None,
        )  # fmt: skip


def saved_tensors(folder):
    """{name: torch's metadata with size, properties.dtype and chunks} of everything in `folder`/shards."""
    return dcp.FileSystemReader(Path(folder) / SHARDS).read_metadata().state_dict_metadata


def read_pieces(folder, pieces):
    """Fills the pieces' local tensors. Each process calls it for itself.

    Raises:
        LayoutError: for names that the checkpoint lacks, other shapes or dtypes.
        ShardError: for files that cannot be read.
    """
    saved = saved_tensors(folder)
    for name, piece in pieces.items():
        if name not in saved:
            raise LayoutError(f"{folder} holds no {name}: another model or optimizer wrote it")
        shape, dtype = tuple(saved[name].size), saved[name].properties.dtype
        if (shape, dtype) != (tuple(piece.shape), piece.local.dtype):
            raise LayoutError(
                f"{folder}: {name} is {shape} {dtype}, here it is {tuple(piece.shape)} {piece.local.dtype}; resume "
                "with the config and the weights_dtype that wrote it"
            )
    with _with_plain_errors():
        dcp.load(
            dict(pieces), storage_reader=dcp.FileSystemReader(Path(folder) / SHARDS), planner=_LoadPlanner(),
            no_dist=True,
        )  # fmt: skip


# ---------------------------------------------------------------- weights


def weight_pieces(model, trained_only=False):
    """What `write_pieces` takes of a model; `trained_only`: without frozen parameters, of a model with adapters."""
    return {WEIGHTS + name: piece for name, piece in model_pieces(model, trained_only).items()}


def load_weights(folder, model, trained_only=False):
    """Reads the weights of a sharded checkpoint into `model`, whole or sharded, in place.

    Raises:
        LayoutError: unless names, shapes and dtypes are those of the checkpoint.
    """
    names = {WEIGHTS + name for name in named_tensors(model, trained_only)}
    extra = sorted(name for name in saved_tensors(folder) if name.startswith(WEIGHTS) and name not in names)
    if extra:
        raise LayoutError(f"{folder} holds {len(extra)} weights that the model lacks, e.g. {extra[0]}; resume with the "
                          "config that wrote it")  # fmt: skip
    read_pieces(folder, weight_pieces(model, trained_only))


def read_whole_weights(folder):
    """{name: whole tensor on the CPU} of a sharded checkpoint's weights; for an export, without a model."""
    saved = {name: data for name, data in saved_tensors(folder).items() if name.startswith(WEIGHTS)}
    whole = {name: torch.empty(data.size, dtype=data.properties.dtype) for name, data in saved.items()}
    read_pieces(folder, {name: piece_of(tensor) for name, tensor in whole.items()})
    return {name.removeprefix(WEIGHTS): tensor for name, tensor in whole.items()}


# ---------------------------------------------------------------- optimizers


def _groups_by_name(optimizer, names):
    """The parameter groups with names in place of parameters: plain values."""
    return [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]


def optimizer_state(model, optimizer):
    """(pieces for `write_pieces`, plain values for `optimizer_groups.pt`)."""
    names = parameter_names(model)
    pieces, numbers = optimizer_pieces(names, optimizer)
    groups = {"optimizer": type(optimizer).__name__, "groups": _groups_by_name(optimizer, names), "numbers": numbers}
    return {OPTIMIZER + name: piece for name, piece in pieces.items()}, groups


def load_optimizer(folder, model, optimizer):
    """Reads the states of a sharded checkpoint into `optimizer`, laid out as the model is now.

    Args:
        optimizer: may be in accelerate's wrapper.
    Raises:
        LayoutError: for other parameter groups than those saved.
    """
    bare = getattr(optimizer, "optimizer", optimizer)
    saved = torch.load(Path(folder) / GROUPS, map_location="cpu", weights_only=True)
    names = parameter_names(model)
    now = _groups_by_name(bare, names)
    if [set(group["params"]) for group in now] != [set(group["params"]) for group in saved["groups"]]:
        raise LayoutError(
            f"{folder} was written by {saved['optimizer']} with {[len(group['params']) for group in saved['groups']]} "
            f"parameters in its groups, {type(bare).__name__} has {[len(group['params']) for group in now]} or others; "
            "resume with the same optimizer, weight decay groups and frozen parameters"
        )
    parameters = {names[id(p)]: p for group in bare.param_groups for p in group["params"]}
    states = _allocate(folder, parameters)
    for name, values in saved["numbers"].items():
        states.setdefault(name, {}).update(values)
    order = {name: index for index, name in enumerate(n for group in now for n in group["params"])}
    groups = [
        {**theirs, "params": [order[name] for name in ours["params"]]} for ours, theirs in zip(now, saved["groups"])
    ]
    optimizer.load_state_dict({"state": {order[name]: state for name, state in states.items()}, "param_groups": groups})


def _allocate(folder, parameters):
    """{parameter: {state: tensor}} with the values of the checkpoint, each laid out as its parameter."""
    states, pieces = {}, {}
    for key, data in saved_tensors(folder).items():
        if not key.startswith(OPTIMIZER):
            continue
        name, _, state = key.removeprefix(OPTIMIZER).rpartition(".")
        parameter, dtype = parameters[name], data.properties.dtype
        if data.size and tuple(data.size) == tuple(piece_of(parameter).shape):
            tensor = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        else:
            tensor = torch.empty(data.size, dtype=dtype)
        states.setdefault(name, {})[state] = tensor
        pieces[key] = piece_of(tensor, parameter)
    read_pieces(folder, pieces)
    return states
