"""Gradients, gradient norm and checkpoints of a model whose experts are split by `parallelise_experts`.

Expert parameters are parts of tensors that lie on W processes; all other parameters are whole on each, or DTensors
under FSDP2. What trainers do to all parameters alike is done here with that difference: see `expert_parallel`.
"""

import torch
import torch.distributed as dist

from .checkpoint_shapes import EXPERT_KEY
from .expert_parallel import ExpertParallelExperts, is_expert_parallel

BUCKET_ELEMENTS = 1 << 24  # gradients reduced at a time: 64 MiB in fp32

# ---- gradients -----------------------------------------------------------------------------------------------------


def expert_parameters(model):
    """The parameters that differ by process; give FSDP2's `fully_shard` their set as `ignored_params`."""
    return [parameter for parameter in model.parameters() if is_expert_parallel(parameter)]


def dense_parameters(model):
    """The others."""
    return [parameter for parameter in model.parameters() if not is_expert_parallel(parameter)]


@torch.no_grad()
def reduce_dense_gradients(model, group=None):
    """Averages the gradients of all but the expert parameters over `group` (None: all processes), in place.

    For loops without DDP and FSDP, which do it themselves; once a step, after the last micro-batch. A gradient that is
    None on some processes counts as 0 there; one that is None on all stays so. Waits for the device once.
    """
    parameters = [parameter for parameter in dense_parameters(model) if parameter.requires_grad]
    if not parameters:
        return
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(present, group=group)
    average_gradients([parameter for parameter, there in zip(parameters, present.tolist()) if there], group)


@torch.no_grad()
def reduce_expert_gradients(model):
    """Averages the expert gradients over the processes with the same experts; nothing to do without replicas. Needed
    under DDP too, which leaves expert parameters alone."""
    experts = expert_parameters(model)
    replicas = experts[0].expert_replica_group if experts else None
    if replicas is not None:
        average_gradients(experts, replicas)


@torch.no_grad()
def average_gradients(parameters, group=None):
    """Averages the gradients of `parameters` over `group` in place; one that is None is 0, then also in the update.
    Does not wait for the device."""
    by_dtype = {}
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            by_dtype.setdefault((parameter.grad.dtype, parameter.grad.device), []).append(parameter.grad)
    for gradients in by_dtype.values():
        for bucket in _buckets(gradients):
            _average_bucket(bucket, group)


def _buckets(gradients):
    bucket, size = [], 0
    for gradient in gradients:
        if bucket and size + gradient.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel()
    yield bucket


def _average_bucket(gradients, group):
    flat = torch.cat([gradient.flatten() for gradient in gradients]) if len(gradients) > 1 else gradients[0].flatten()
    dist.all_reduce(flat, group=group)
    parts = flat.div_(dist.get_world_size(group)).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts):
        gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def global_gradient_norm(model):
    """() fp32: the 2-norm of all gradients, each expert counted once, the same on every process; after the reductions.
    Does not wait for the device."""
    dense, experts = dense_parameters(model), expert_parameters(model)
    device = next(model.parameters()).device
    total = _squared_norm(dense, device)
    if experts:
        split = _squared_norm(experts, device)
        dist.all_reduce(split, group=experts[0].expert_parallel_group)
        total = total + split
    return total.sqrt()


def _squared_norm(parameters, device):
    whole, sharded = _by_kind([parameter.grad for parameter in parameters if parameter.grad is not None])
    total = torch.zeros((), dtype=torch.float32, device=device)
    if whole:
        total = total + _squared_norm_of(whole, device)
    by_mesh = {}
    for gradient in sharded:
        by_mesh.setdefault((gradient.device_mesh, gradient.placements), []).append(gradient.to_local())
    for (mesh, placements), parts in by_mesh.items():
        part = _squared_norm_of(parts, device)
        for dimension, placement in enumerate(placements):
            assert placement.is_shard() or placement.is_replicate(), placement
            if placement.is_shard():
                dist.all_reduce(part, group=mesh.get_group(dimension))
        total = total + part
    return total


def _squared_norm_of(tensors, device):
    """() fp32 on `device`, of plain tensors."""
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)).square().sum().to(device)


def _by_kind(tensors):
    """-> plain tensors, DTensors: operations over lists do not mix them."""
    sharded = [tensor for tensor in tensors if hasattr(tensor, "full_tensor")]
    return [tensor for tensor in tensors if not hasattr(tensor, "full_tensor")], sharded


@torch.no_grad()
def clip_gradient_norm(model, max_norm):
    """As `torch.nn.utils.clip_grad_norm_` over the whole model: gradients times max_norm / norm where the norm is
    larger -> the norm () before."""
    norm = global_gradient_norm(model)
    whole, sharded = _by_kind([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    by_kind = {}
    for gradient in (*whole, *(each.to_local() for each in sharded)):  # an operation on a DTensor costs as much as many
        by_kind.setdefault((gradient.dtype, gradient.device), []).append(gradient)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for (_, device), gradients in by_kind.items():
        torch._foreach_mul_(gradients, factor.to(device))
    return norm


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def split_experts(model):
    """{prefix in the state dict: the split experts} of every layer that has some."""
    return {f"{name}.": module for name, module in model.named_modules() if isinstance(module, ExpertParallelExperts)}


@torch.no_grad()
def gather_full_state_dict(model):
    """The state dict of the unsplit model, on the CPU of rank 0, and {} elsewhere. All processes call it.

    On the way a device holds one whole tensor. `save_pretrained(folder, state_dict=...)` on rank 0 writes it in the
    released layout, and any number of processes loads that.
    """
    rank, copies, full = dist.get_rank(), {}, {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in model.state_dict().items():
        parameter = parameters.get(name)
        if parameter is not None and is_expert_parallel(parameter):
            value = _gather_parts(value.detach(), parameter)
        elif hasattr(value, "full_tensor"):
            value = value.full_tensor()
        if rank == 0:
            # Tied weights stay one tensor, which is how the library knows them.
            key = name if parameter is None else id(parameter)
            full[name] = copies[key] = copies[key] if key in copies else value.detach().cpu()
    return full


def _gather_parts(part, parameter):
    """The whole tensor on rank 0, None or a part elsewhere."""
    group = parameter.expert_parallel_group
    if 0 not in dist.get_process_group_ranks(group):
        return part
    target = dist.get_group_rank(group, 0)
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))] if dist.get_rank() == 0 else None
    dist.gather(part.contiguous(), parts, group=group, group_dst=target)
    return torch.cat(parts) if parts else part


def load_full_state_dict(model, state_dict, strict=True):
    """`model.load_state_dict` for a state dict of the unsplit model, the same on every process, with the experts in
    whole tensors or one by one, as on disk.

    Raises:
        ValueError: if it holds another number of experts; RuntimeError as `load_state_dict`.
    """
    layers, own = split_experts(model), {}
    for name, value in state_dict.items():
        prefix = next((name[: cut + 8] for cut in [name.rfind("experts.")] if cut >= 0), None)
        experts = layers.get(prefix)
        if experts is None:
            own[name] = value
            continue
        rest, first, last = name[len(prefix) :], experts.first_expert, experts.first_expert + experts.num_experts
        if match := EXPERT_KEY.fullmatch(rest):
            expert = int(match[1])
            _check_count(name, expert < experts.global_num_experts, experts)
            if first <= expert < last:
                own[f"{prefix}{expert - first}.{match[2]}_proj.weight"] = value
        else:
            _check_count(name, value.shape[0] == experts.global_num_experts, experts)
            own[name] = value[first:last]
    return model.load_state_dict(own, strict=strict)


def _check_count(name, right, experts):
    if not right:
        raise ValueError(f"{name}: the state dict holds another number of experts than n_routed_experts="
                         f"{experts.global_num_experts}; give the one of the whole, unsplit model")  # fmt: skip
