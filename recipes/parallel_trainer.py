"""What a trainer does when its model is spread over processes: shards it, averages what stayed whole, global norms."""

import torch
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.nn.parallel import DistributedDataParallel

from modeling_deepseek_r1 import DeepSeekR1Model
from modeling_deepseek_r1.expert_parallel import is_expert_parallel
from modeling_deepseek_r1.expert_parallel_state import (
    clip_gradient_norm,
    global_gradient_norm,
    reduce_expert_gradients,
)
from recipes.sharding import can_shard, is_sharded, reduce_replicated_gradients, shard


class ParallelMixin:
    """Put after the optimizer's and the checkpoints' mixins and before `transformers.Trainer` in the list of bases.

    A trainer calls `shard_model` when its `__init__` is done. The model may be one of `parallelise_experts`, under DDP
    or FSDP2; the dense gradients are then averaged over all processes, an expert's over those that hold it, and norms
    are of all gradients, each counted once.
    """

    _sharded_here = False

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.accelerator.ddp_handler is not None:
            # Gradients lie in the buckets that are averaged, not beside them: no copies there and back.
            self.accelerator.ddp_handler.gradient_as_bucket_view = True

    def shard_model(self):
        """Shards our models by FSDP2 where the launch file asks for it; others are left to accelerate."""
        self._prepare_for_cut_rows()
        if self.shards(self.model):
            self._sharded_here = True
            # Else every micro-batch but the last leaves its gradients whole on each process, in fp32.
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
            # What is left for accelerate is nothing: it must not look for layer classes, nor spread weights again.
            plugin = self.accelerator.state.fsdp_plugin
            plugin.auto_wrap_policy, plugin.cpu_ram_efficient_loading = None, False

    def shards(self, model):
        """Shards `model`, the trained one or one beside it, where it is one of ours and the launch file asks for FSDP2;
        -> whether it was."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None or plugin.fsdp_version != 2 or is_sharded(model) or not can_shard(model):
            return False
        mesh, parallelism = self.accelerator.torch_device_mesh, self.accelerator.parallelism_config
        shard(
            model, self.accelerator.device, self._compute_dtype(), plugin.reshard_after_forward,
            offload=isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            mesh=None if mesh is None else mesh[tuple(parallelism.fsdp_dim_names)],
        )  # fmt: skip
        return True

    def reshard_model(self):
        """Puts the sharded parameters back in place: a forward without a backward, such as a pre-flight's, leaves what
        it has gathered for the head, and an optimizer made then would update that."""
        for module in self.model.modules() if self._sharded_here else ():
            if is_sharded(module):
                module.reshard()

    def _prepare_for_cut_rows(self):
        """Under context parallelism attention has no masks, and no process sees the labels beyond its part of a row."""
        if self.get_cp_size() == 1 or not can_shard(self.model):
            return
        if getattr(self.model, "trains_mtp", False):
            raise ValueError("mtp_loss_coef is positive under context parallelism, where the tokens that multi-token "
                             "prediction looks ahead to are on another process; set it to 0")  # fmt: skip
        for module in self.model.modules():
            if isinstance(module, DeepSeekR1Model):
                module.documents_apart = False

    # -- who has which rows

    @property
    def _sharing(self):
        """Processes that compute the same rows, or parts of them: neighbours, by the order of the device meshes."""
        return self.get_tp_size() * self.get_cp_size() * self.get_sp_size()

    @property
    def data_processes(self):
        """Processes, or groups of them, with rows of their own."""
        return self.accelerator.num_processes // self._sharing

    @property
    def data_rank(self):
        return self.accelerator.process_index // self._sharing

    def sum_over_rows(self, tensor):
        """The sum over all rows of what each process has found in its own."""
        total = self.accelerator.reduce(tensor, "sum")
        return total / self._sharing if total.is_floating_point() else total // self._sharing

    def _compute_dtype(self):
        names = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return names.get(self.accelerator.mixed_precision)

    @property
    def gradients_are_split(self):
        """Whether no process has all gradients, so that torch's functions over `model.parameters()` do not serve."""
        return self._sharded_here or any(is_expert_parallel(parameter) for parameter in self.model.parameters())

    def _run_epoch(self, *args, **kwargs):
        if isinstance(self.model_wrapped, DistributedDataParallel):
            split = {name for name, p in self.model_wrapped.module.named_parameters() if is_expert_parallel(p)}
            assert split <= set(self.model_wrapped.parameters_to_ignore), "DDP would average experts that differ"
        return super()._run_epoch(*args, **kwargs)

    # -- the step

    def _prepare_context_parallel_inputs(self, model, inputs):
        if self.get_cp_size() > 1 and can_shard(self.model):
            # Positions of packed documents start again, but documents see each other here: the row is one.
            inputs = {name: value for name, value in inputs.items() if name not in ("position_ids", "seq_lengths")}
        return super()._prepare_context_parallel_inputs(model, inputs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:  # the last micro-batch of a step
            reduce_expert_gradients(self.model)
            if self._sharded_here:
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
