"""Checkpoints of PPO: the policy as a plain causal LM, the value function in its own file, rollouts that go on."""

from pathlib import Path

import torch

from recipes.ppo_setup import causal_lm
from recipes.value_head import load_value_head, save_value_head, without_value_head


class PPOCheckpointMixin:
    """Put before `trl.GRPOTrainer` in the list of bases.

    A checkpoint in the middle of a rollout holds what is left of it, so that a resumed run takes the same steps: TRL
    would sample anew and read the wrong part.
    """

    def _policy(self):
        return causal_lm(self.accelerator.unwrap_model(self.model))

    def _save(self, output_dir=None, state_dict=None):
        of_value = None
        if state_dict is not None:
            of_value = {k.partition("value_head.")[2]: v for k, v in state_dict.items() if "value_head." in k}
            state_dict = {k: v for k, v in state_dict.items() if "value_head." not in k}
        with without_value_head(self._policy()) as head:
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            save_value_head(head, output_dir or self.args.output_dir, of_value)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # their own files hold the value function too
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        with without_value_head(self._policy()) as head:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_value_head(head, resume_from_checkpoint)

    def _load_best_model(self):
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_best_model()
        with without_value_head(self._policy()) as head:
            super()._load_best_model()
        load_value_head(head, self.state.best_model_checkpoint)

    # -- the state of the rollout, one file a process

    def _expert_counts(self):
        """The tokens counted at the routers since their biases moved: these buffers are not in the weights."""
        return {name: buffer for name, buffer in self._policy().named_buffers() if name.endswith("load_counts")}

    def _rollout_file(self, folder):
        return Path(folder) / f"rollout_{self.args.process_index}.pt"

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        state = {"step": self._step, "kl_coef": self.kl_coef, "rollout": None, "expert_counts": self._expert_counts()}
        if self._step % (self.args.steps_per_generation * self.num_iterations):
            state["rollout"] = self._buffered_inputs
        torch.save(state, self._rollout_file(output_dir))

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        path = self._rollout_file(checkpoint)
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: a PPO run is resumed on as many processes as it was started on; start a new run "
                "from its weights with another number"
            )
        state = torch.load(path, map_location=self.args.device, weights_only=True)
        self._step, self.kl_coef, self._buffered_inputs = state["step"], state["kl_coef"], state["rollout"]
        for name, buffer in self._expert_counts().items():
            buffer.copy_(state["expert_counts"][name])
