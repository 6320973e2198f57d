"""FSDP2 for DeepSeek-R1 models, laid out for them, under accelerate's launcher and Hugging Face's trainers.

accelerate 1.15 would shard such a model itself, by the names of layer classes. It would then reduce gradients, and
return losses, in the 16-bit compute dtype, round the routers' weights to it, fail at the routing bias (a buffer) where
only the first process reads the weights, and put hooks around the head, which our cross-entropy multiplies with
directly, chunk by chunk. So the model is sharded here when its trainer has been built; accelerate takes it as it is.

What lies where:
    a decoder or MTP layer    a group of its own, gathered when it is computed, the next one meanwhile
    a frozen MTP layer        sharded without a group: nobody computes it, for which FSDP2 has no place
    the embedding             a group of its own, unless it is the head too
    head, norm, other heads   the model's own group, gathered before the first layer and kept until the backward
    routers                   whole on each process, in fp32: small, and routing in 16 bits swaps near-tied experts;
                              so is what has another dtype than the rest, such as a value head beside a bf16 trunk,
                              or fewer rows than there are processes
    split experts             where they are: see modeling_deepseek_r1/expert_parallel.py
Gradients of what is whole are averaged by `reduce_replicated_gradients`.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from modeling_deepseek_r1.decoder import DeepSeekR1DecoderLayer
from modeling_deepseek_r1.expert_parallel import is_expert_parallel
from modeling_deepseek_r1.expert_parallel_state import average_gradients
from modeling_deepseek_r1.mtp import DeepSeekR1MTPLayer
from modeling_deepseek_r1.routing import DeepSeekR1Router


def is_sharded(model):
    """Whether FSDP2 has sharded the model, here or elsewhere."""
    return isinstance(model, FSDPModule)


def can_shard(model):
    """Whether `shard` knows the model: it has our layers, perhaps inside of adapters or beside a value head."""
    return any(isinstance(module, DeepSeekR1DecoderLayer) for module in model.modules())


def shard(model, device, compute_dtype=None, reshard_after_forward=True, offload=False, mesh=None):
    """Shards `model` over all processes in place and returns it; all of them call it, before the optimizer is made.

    Weights and buffers are the first process' everywhere afterwards, where others may have empty ones (on the meta
    device, as the library leaves them under `fsdp_cpu_ram_efficient_loading`); only split experts are each process'
    own. On the way a device holds one whole layer at a time.

    Args:
        compute_dtype: what weights are gathered in, and computed with; None: their own. Gradients are reduced in fp32.
        reshard_after_forward: whether layers are gathered again in the backward.
        offload: keep the shards, and what the optimizer does with them, in host memory.
        mesh: the devices to shard over, two-dimensional for replicas; None: all.
    Raises:
        ValueError: for split experts with `offload`, or on the meta device.
    """
    experts = {parameter for parameter in model.parameters() if is_expert_parallel(parameter)}
    if experts and offload:
        raise ValueError("fsdp_offload_params: true keeps what is sharded in host memory, and experts split by "
                         "expert_parallel_size are not sharded; use false, or expert_parallel_size=1")  # fmt: skip
    if any(parameter.is_meta for parameter in experts):
        raise ValueError("fsdp_cpu_ram_efficient_loading: true leaves the weights to the first process, and each needs "
                         "its own experts under expert_parallel_size; set it to false in the launch file")  # fmt: skip
    layers = [module for module in model.modules() if isinstance(module, DeepSeekR1DecoderLayer)]
    idle = [layer for layer in layers if isinstance(layer, DeepSeekR1MTPLayer) and not _is_trained(layer)]
    layers = [layer for layer in layers if layer not in idle]
    embedding = None if _is_tied(model) else model.get_input_embeddings()
    mesh, placed = init_device_mesh(device.type, (dist.get_world_size(),)) if mesh is None else mesh, {}
    for layer in idle:
        _place(layer, device, experts, placed)
        _lay_out(layer, mesh, experts)
    for unit in (*layers, embedding, model):
        if unit is not None:
            _place(unit, device, experts, placed)
            fully_shard(unit, **_options(unit, model, experts, compute_dtype, offload, mesh, reshard_after_forward))
    for layer, following in zip(layers, layers[1:]):
        layer.set_modules_to_forward_prefetch([following])
    return model


def _is_tied(model):
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _is_trained(module):
    return any(parameter.requires_grad for parameter in module.parameters())


def _lay_out(layer, mesh, experts):
    """Makes the layer's parameters sharded tensors, as `fully_shard` lays them out."""
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    for module in layer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in experts:
                part = distribute_tensor(parameter.data, mesh, placements, src_data_rank=None)
                module._parameters[name] = nn.Parameter(part, requires_grad=False)


def _options(unit, model, experts, compute_dtype, offload, mesh, reshard_after_forward):
    """What `fully_shard` is given for one group."""
    precision = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
    laid_out = {p for p in unit.parameters() if isinstance(p, DTensor) and not p.requires_grad}
    options = {
        "ignored_params": experts | replicated_parameters(unit) | laid_out, "mp_policy": precision, "mesh": mesh,
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }  # fmt: skip
    # The model's own group is needed first in the backward: fully_shard keeps a root's weights unless told otherwise.
    return options if unit is model else options | {"reshard_after_forward": reshard_after_forward}


@torch.no_grad()
def _place(unit, device, experts, placed):
    """Moves the parameters and buffers of `unit` to the device, with the first process' values but in `experts`.

    `placed`: {id of an empty parameter: what has taken its place}, so that tied ones stay one.
    """
    for module in unit.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                continue
            if parameter.is_meta:
                new = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
                parameter = module._parameters[name] = placed.setdefault(id(parameter), new)
            parameter.data = parameter.data.to(device)
            if parameter not in experts:
                dist.broadcast(parameter.data, 0)
        for name, buffer in module.named_buffers(recurse=False):
            buffer = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
            module._buffers[name] = buffer
            if name not in module._non_persistent_buffers_set:
                dist.broadcast(buffer, 0)


def replicated_parameters(model):
    """The set of parameters that are whole and the same on each process, although the model is, or will be, sharded."""
    routers = {p for module in model.modules() if isinstance(module, DeepSeekR1Router) for p in module.parameters()}
    dense = [p for p in model.parameters() if not is_expert_parallel(p) and not isinstance(p, DTensor)]
    if is_sharded(model):
        return set(dense)
    sizes = {}
    for parameter in dense:
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    common = max(sizes, key=sizes.get, default=None)
    few = lambda parameter: parameter.dim() == 0 or parameter.shape[0] < dist.get_world_size()
    return {parameter for parameter in dense if parameter in routers or parameter.dtype != common or few(parameter)}


def reduce_replicated_gradients(model):
    """Averages over all processes what FSDP2 leaves alone; once a step, after the last micro-batch."""
    replicated = replicated_parameters(model)
    average_gradients([parameter for parameter in model.parameters() if parameter in replicated])
