"""Checkpoints of PPO: the policy as a plain causal LM, the value function in its own file, rollouts that go on."""

from pathlib import Path

import torch

from recipes.checkpoint_files import find_problem, is_ours, list_checkpoints
from recipes.ppo_setup import causal_lm
from recipes.value_head import load_value_head, save_value_head, without_value_head

SHOWN = ("prompt", "completion", "advantages")  # of a rollout, beside its rewards: what samples are taken from


def _is_complete(checkpoint):
    """Whether its save ended: by our marker, or by the file that transformers writes last."""
    if is_ours(checkpoint):
        return find_problem(checkpoint, hashes=False) is None
    return (checkpoint / "trainer_state.json").is_file()


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

    def _check_kl(self, kl):
        """FloatingPointError where KL, in nats per token, exceeds `max_kl`; names the last checkpoint before that."""
        args, step = self.args, self.state.global_step
        if args.max_kl is None or kl <= args.max_kl:  # NaN does not pass
            return
        of_a_rollout = args.num_ppo_epochs * args.num_mini_batches
        measured = (step - 1) // of_a_rollout * of_a_rollout  # by then the rollout before this one had been fine
        kept = [path for at, path in list_checkpoints(args.output_dir) if at <= measured and _is_complete(path)]
        good = f"The last good checkpoint is {kept[-1]}" if kept else "There is no checkpoint from before"
        raise FloatingPointError(
            f"KL to the reference is {kl:.3g} nats per token at step {step}, above max_kl={args.max_kl}: the policy "
            f"has left it. {good}; go on from one with a lower learning_rate={args.learning_rate:g} or a higher "
            f"kl_coef={args.kl_coef}, or raise max_kl"
        )

    # -- the state of the rollout, one file a process

    def _expert_counts(self):
        """The tokens counted at the routers since their biases moved: these buffers are not in the weights."""
        return {name: buffer for name, buffer in self._policy().named_buffers() if name.endswith("load_counts")}

    def _rollout_file(self, folder):
        return Path(folder) / f"rollout_{self.args.process_index}.pt"

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        state = {"step": self._step, "kl_coef": self.kl_coef, "rollout": None, "expert_counts": self._expert_counts()}
        state["expert_load"] = dict(getattr(self._policy(), "expert_load", {}))  # logged until the biases move again
        if self._step % (self.args.steps_per_generation * self.num_iterations):
            state["rollout"] = self._buffered_inputs
            logs = {name: list(self._logs[name]) for name in SHOWN}
            state["completions"] = logs | {"rewards": {n: list(v) for n, v in self._logs["rewards"].items()}}
        torch.save(state, self._rollout_file(output_dir))

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        path = self._rollout_file(checkpoint)
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: the checkpoint was saved with save_only_model, or by another number of processes "
                "than now; start a new run from its weights"
            )
        state = torch.load(path, map_location=self.args.device, weights_only=True)
        self._step, self.kl_coef, self._buffered_inputs = state["step"], state["kl_coef"], state["rollout"]
        for name, buffer in self._expert_counts().items():
            buffer.copy_(state["expert_counts"][name])
        if state.get("expert_load"):
            self._policy()._expert_load = state["expert_load"]
        completions = state.get("completions") or {}
        for name, values in (completions.pop("rewards", {})).items():
            self._logs["rewards"][name].extend(values)
        for name, values in completions.items():
            self._logs[name].extend(values)
