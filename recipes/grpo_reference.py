"""The reference model of GRPO that follows the policy: moved every so many steps, kept by checkpoints."""

from pathlib import Path

import torch
from transformers import TrainerCallback
from trl.trainer.callbacks import SyncRefModelCallback

from modeling_deepseek_r1.expert_parallel_state import gather_full_state_dict, load_full_state_dict, split_experts
from recipes.rollout_checkpoints import loading_device

REFERENCE_FILE = "reference.pt"


@torch.no_grad()
def mix_into(reference, policy, alpha):
    """reference = (1 - alpha) reference + alpha policy: weights, and buffers such as the routing biases."""
    SyncRefModelCallback.sync_target_model(policy, reference, alpha)
    own = dict(policy.named_buffers())
    for name, buffer in reference.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.mul_(1.0 - alpha).add_(own[name], alpha=alpha)


class ReferenceCallback(TrainerCallback):
    """Every `ref_model_sync_steps` steps the reference takes `ref_model_mixup_alpha` of the policy; 1.0 replaces it.

    Source: DeepSeek-R1 (arXiv:2501.12948), supplement: the reference is replaced every 400 steps. TRL's own callback
    leaves buffers, that is the routing biases, behind.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.ref_model_sync_steps == 0:
            trainer = self.trainer
            reference = trainer.accelerator.unwrap_model(trainer.ref_model)
            mix_into(reference, trainer._policy(), args.ref_model_mixup_alpha)
            trainer.reference_moved = True


class ReferenceCheckpointMixin:
    """Put before `RolloutMixin`: checkpoints hold a reference that has moved, as nothing else does."""

    reference_moved = False

    def _reference_state(self):
        """The whole reference; where experts are split, all processes call it and the first alone gets it."""
        reference = self.accelerator.unwrap_model(self.ref_model)
        return gather_full_state_dict(reference) if split_experts(reference) else reference.state_dict()

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if not self.reference_moved:
            return
        state = self._reference_state()
        if self.args.should_save:
            torch.save(state, Path(output_dir) / REFERENCE_FILE)

    def rollout_state(self):
        return super().rollout_state() | {"reference_moved": self.reference_moved}

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is None or not self.reference_moved:
            return
        path = Path(checkpoint) / REFERENCE_FILE
        if not path.is_file():
            raise ValueError(f"{path} is missing: the reference had moved when the checkpoint was saved; copy it too")
        state = torch.load(path, map_location=loading_device(self.args), weights_only=True)
        load_full_state_dict(self.accelerator.unwrap_model(self.ref_model), state)

    def load_rollout_state(self, state):
        super().load_rollout_state(state)
        self.reference_moved = state["reference_moved"]
