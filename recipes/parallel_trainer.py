"""What a trainer does when its model is spread over processes: sharding it, averaging what stayed whole, global norms."""

import torch
from torch.distributed.fsdp import CPUOffloadPolicy

from modeling_deepseek_r1.expert_parallel import is_expert_parallel
from modeling_deepseek_r1.expert_parallel_state import (
    clip_gradient_norm,
    global_gradient_norm,
    reduce_expert_gradients,
)
from recipes.sharding import can_shard, is_sharded, reduce_replicated_gradients, shard, under_its_own_name


class ParallelMixin:
    """Put after the optimizer's and the checkpoints' mixins and before `transformers.Trainer` in the list of bases.

    A trainer calls `shard_model` when its `__init__` is done. The model may be one of `parallelise_experts`, under DDP
    or FSDP2; the dense gradients are then averaged over all processes, an expert's over those that hold it, and norms
    are of all gradients, each counted once.
    """

    def shard_model(self):
        """Shards our models by FSDP2 where the launch file asks for it; others are left to accelerate."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None or plugin.fsdp_version != 2 or is_sharded(self.model) or not can_shard(self.model):
            return
        mesh, parallelism = self.accelerator.torch_device_mesh, self.accelerator.parallelism_config
        shard(
            self.model, self.accelerator.device, self._compute_dtype(), plugin.reshard_after_forward,
            offload=isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            mesh=None if mesh is None else mesh[tuple(parallelism.fsdp_dim_names)],
        )  # fmt: skip
        # What is left for accelerate to do is nothing: it must not look for layer classes, nor spread weights again.
        plugin.auto_wrap_policy, plugin.cpu_ram_efficient_loading = None, False

    def _compute_dtype(self):
        names = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return names.get(self.accelerator.mixed_precision)

    @property
    def gradients_are_split(self):
        """Whether no process has all gradients, so that torch's functions over `model.parameters()` do not serve."""
        return is_sharded(self.model) or any(is_expert_parallel(parameter) for parameter in self.model.parameters())

    # -- the step

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:  # the last micro-batch of a step
            reduce_expert_gradients(self.model)
            if is_sharded(self.model):
                reduce_replicated_gradients(self.model)
        return loss

    def _clip_grad_norm(self, model):
        if not self.gradients_are_split:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        return clip_gradient_norm(self.model, self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None and self.gradients_are_split:
            self.accelerator.unscale_gradients()
            return global_gradient_norm(self.model)
        return super()._get_grad_norm(model, grad_norm)

    # -- saving

    def _save(self, output_dir=None, state_dict=None):
        with under_its_own_name(self.model):
            super()._save(output_dir, state_dict)
