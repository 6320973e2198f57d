"""What of a model and its optimizer lies in this process: local tensors, and where they belong in the whole ones.

The common view of all layouts: whole weights (one process, DDP), DTensors (FSDP2, tensor parallel) and our expert
parallelism. `recipes/sharded_checkpoints.py` writes and reads pieces, so that a checkpoint of one layout fits another.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from modeling_deepseek_r1.expert_parallel import is_expert_parallel

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


@dataclass(frozen=True)
class Piece:
    """A part of a tensor.

    local: the part, on its device, sharing memory with the model; shape: of the whole tensor; offset: of the part's
    first element in it; owner: whether this process writes it (of equal parts one process does), None where every
    process has the whole tensor (see `deal_whole`).
    """

    local: torch.Tensor
    shape: tuple
    offset: tuple
    owner: bool | None = None

    @property
    def bytes(self):
        return self.local.numel() * self.local.element_size()


def piece_of(tensor, parameter=None):
    """The `Piece` of a weight, or of an optimizer's state beside its `parameter`; None where this process has no part.

    Raises:
        ValueError: for sums that are not reduced yet.
    """
    with torch.no_grad():
        if isinstance(tensor, DTensor):
            return _piece_of_dtensor(tensor)
        source = tensor if parameter is None else parameter
        if is_expert_parallel(source) and tensor.shape == source.shape:
            return _piece_of_experts(tensor.detach(), source)
        return Piece(tensor.detach(), tuple(tensor.shape), (0,) * tensor.dim())


def _piece_of_dtensor(tensor):
    mesh, placements = tensor.device_mesh, tensor.placements
    place = mesh.get_coordinate()
    if place is None:
        return None
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is a sum over processes that is not reduced yet")
    sizes, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    local = tensor.detach().to_local()
    assert tuple(local.shape) == tuple(sizes), (local.shape, sizes)
    first = all(at == 0 for at, placement in zip(place, placements) if placement.is_replicate())
    return Piece(local, tuple(tensor.shape), tuple(offset), first)


def _piece_of_experts(local, parameter):
    group, replicas = parameter.expert_parallel_group, parameter.expert_replica_group
    experts = local.shape[0]
    shape = (experts * dist.get_world_size(group), *local.shape[1:])
    offset = (experts * dist.get_rank(group), *(0 for _ in local.shape[1:]))
    return Piece(local, shape, offset, replicas is None or dist.get_rank(replicas) == 0)


# ---------------------------------------------------------------- models and optimizers


def named_tensors(model, trained_only=False):
    """{name: parameter or saved buffer}, also those that bear two names, each with its sharded form under FSDP2.

    trained_only: leaves out frozen parameters, which an adapter's checkpoint finds in its base model.
    """
    found = model.state_dict(keep_vars=True)  # FSDP2 puts the sharded parameters back for it
    frozen = lambda t: isinstance(t, torch.nn.Parameter) and not t.requires_grad
    return {n: t for n, t in found.items() if torch.is_tensor(t) and not (trained_only and frozen(t))}


def model_pieces(model, trained_only=False):
    """{name: Piece} of parameters and saved buffers, each tensor once, under the first of its names."""
    seen, pieces = set(), {}
    for name, tensor in named_tensors(model, trained_only).items():
        if id(tensor) not in seen and (piece := piece_of(tensor)) is not None:
            seen.add(id(tensor))
            pieces[name] = piece
    return pieces


def parameter_names(model):
    """{id(parameter): the first of its names}."""
    names = {}
    for name, tensor in named_tensors(model).items():
        names.setdefault(id(tensor), name)
    return names


def optimizer_pieces(names, optimizer):
    """({"<parameter>.<state>": Piece}, {parameter: {state: value}} of what is no tensor).

    Args:
        names: `parameter_names` of the model.
        optimizer: a torch.optim.Optimizer, without accelerate's wrapper.
    Raises:
        ValueError: for a state that is neither laid out as its sharded parameter nor a single number.
    """
    pieces, numbers = {}, {}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in state.items():
            if not torch.is_tensor(value):
                numbers.setdefault(name, {})[key] = value
                continue
            if not _has_a_place(value, parameter):
                raise ValueError(
                    f"{type(optimizer).__name__} keeps a state {key!r} of shape {tuple(value.shape)} for the sharded "
                    f"{name}, which a checkpoint cannot place; use optim=adamw_torch, or save_only_model=true"
                )
            if (piece := piece_of(value, parameter)) is not None:
                pieces[f"{name}.{key}"] = piece
    return pieces, numbers


def _has_a_place(value, parameter):
    """Whether it is known which part of the whole a state of a sharded parameter is."""
    if isinstance(value, DTensor) or value.numel() == 1:
        return True
    return not isinstance(parameter, DTensor) and (not is_expert_parallel(parameter) or value.shape == parameter.shape)


def deal_whole(pieces, rank, world):
    """The same pieces, those that every process has whole dealt out so that each writes about as many bytes."""
    load, dealt = [0] * world, dict(pieces)
    for name, piece in pieces.items():
        if piece.owner is None:
            to = load.index(min(load))
            load[to] += piece.bytes
            dealt[name] = replace(piece, owner=to == rank)
    return dealt


def staged(pieces, buffers):
    """The pieces that this process owns, copied to the CPU: training may go on. Waits for the device once.

    buffers: {name: tensor} of an earlier call, written anew and extended; pinned where the pieces are on CUDA.
    """
    copies, cuda = {}, False
    for name, piece in pieces.items():
        if not piece.owner:
            continue
        local = piece.local
        kept = buffers.get(name)
        if kept is None or kept.shape != local.shape or kept.dtype != local.dtype:
            kept = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            buffers[name] = kept
        kept.copy_(local, non_blocking=local.is_cuda)
        cuda = cuda or local.is_cuda
        copies[name] = replace(piece, local=kept)
    if cuda:
        torch.cuda.synchronize()
    return copies


# ---------------------------------------------------------------- sums of bits


def is_sharded(model):
    """Whether any parameter is spread over processes."""
    return any(isinstance(p, DTensor) or is_expert_parallel(p) for p in model.parameters())


@torch.no_grad()
def weight_sums(model, reduce=None):
    """{name: sum of the tensor's bits as integers, modulo 2**64}: exact on any device, in any order, in any layout.

    Tells trained weights from others after a load.

    Args:
        reduce: function that adds an int64 CPU tensor up over all processes, in place; for sharded models.
    """
    tensors = {n: t for n, t in named_tensors(model).items() if t.numel() and not t.is_meta}
    unique = {id(tensor): tensor for tensor in tensors.values()}
    pieces = {key: piece for key, tensor in unique.items() if (piece := piece_of(tensor)) is not None}
    if reduce is not None:
        pieces = deal_whole(pieces, dist.get_rank(), dist.get_world_size())
    zero = torch.zeros((), dtype=torch.int64)
    sums = [_bit_sum(pieces[k].local) if k in pieces and pieces[k].owner is not False else zero for k in unique]
    sums = torch.stack([s.cpu() for s in sums]) if sums else torch.zeros(0, dtype=torch.int64)
    if reduce is not None:
        reduce(sums)
    sums = dict(zip(unique, sums.tolist()))
    return {name: sums[id(tensor)] for name, tensor in tensors.items()}


def _bit_sum(tensor):
    if not tensor.numel():
        return torch.zeros((), dtype=torch.int64)
    return tensor.contiguous().view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
