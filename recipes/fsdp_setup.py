"""What accelerate's FSDP2 needs beside its launch file: buffers that are saved with the weights, and CPUs.

- `fsdp_cpu_ram_efficient_loading` spreads the first process' weights over the others and takes every saved tensor for
  a sharded parameter, which the routers' biases are not (`AttributeError: 'Tensor' object has no attribute
  'device_mesh'`). They stay whole here, and are sent from the first process.
- A launch file names all classes of layers that are sharded each for itself. A model without one of them, such as a
  reward model without multi-token prediction, is an error to accelerate; here those that it has are taken.
- accelerate enters FSDP on accelerators only; on CPUs it drops the launch file's wish without a word and trains under
  DDP, and refuses device meshes. Here a CPU's processes (gloo) shard and share rows too: for tests, and to look at such
  training without a GPU.

Our own models are sharded by recipes/sharding.py; then accelerate has nothing left to do.
"""

import contextlib

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType

from recipes.parallel_settings import data_parallel_size, launched_with


def allow_meshes_on_cpu(args):
    """Before the Accelerator is made: lets it shard over, and share rows between, the processes of CPUs, where that is
    asked for."""
    meshes = launched_with(args, "FSDP") or data_parallel_size(args) < args.world_size
    if meshes and args.device.type == "cpu" and dist.is_available() and dist.is_initialized():
        PartialState()
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # which FSDP then replaces


@contextlib.contextmanager
def whole_buffers(model):
    """Inside the block no buffer counts as saved; afterwards those that were do, with the first process' values."""
    saved = [
        (module, name) for module in model.modules() for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]  # fmt: skip
    for module, name in saved:
        module._non_persistent_buffers_set.add(name)
    try:
        yield
    finally:
        for module, name in saved:
            module._non_persistent_buffers_set.discard(name)
    for module, name in saved:
        dist.broadcast(module._buffers[name], src=0)


@contextlib.contextmanager
def own_layers(plugin, model):
    """Inside the block the plugin names only those classes of layers that the model has, if it has any of them."""
    named = plugin.transformer_cls_names_to_wrap
    classes = {type(module).__name__ for module in model.modules()}
    plugin.transformer_cls_names_to_wrap = [name for name in named or () if name in classes] or named
    try:
        yield
    finally:
        plugin.transformer_cls_names_to_wrap = named


class FsdpSetupMixin:
    """Put before `transformers.Trainer` in the list of bases."""

    def create_accelerator_and_postprocess(self):
        allow_meshes_on_cpu(self.args)
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None or plugin.fsdp_version != 2:
            return
        prepare = self.accelerator.prepare

        def prepare_for_fsdp(*objects, **options):
            with contextlib.ExitStack() as stack:
                for model in (thing for thing in objects if isinstance(thing, torch.nn.Module)):
                    stack.enter_context(own_layers(plugin, model))
                    if plugin.cpu_ram_efficient_loading:
                        stack.enter_context(whole_buffers(model))
                return prepare(*objects, **options)

        self.accelerator.prepare = prepare_for_fsdp
