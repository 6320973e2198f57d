"""Checkpoints of PPO: the policy as a plain causal LM, the value function in a file of its own."""

from recipes.checkpoint_files import find_problem, is_ours, list_checkpoints
from recipes.rl_setup import optimizer_steps_of_rollout
from recipes.value_head import load_value_head, save_value_head, without_value_head


def _is_complete(checkpoint):
    """Whether its save ended: by our marker, or by the file that transformers writes last."""
    if is_ours(checkpoint):
        return find_problem(checkpoint, hashes=False) is None
    return (checkpoint / "trainer_state.json").is_file()


class PPOCheckpointMixin:
    """Put before `RolloutMixin` in the list of bases."""

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
        of_a_rollout = optimizer_steps_of_rollout(args)
        measured = (step - 1) // of_a_rollout * of_a_rollout  # by then the rollout before this one had been fine
        kept = [path for at, path in list_checkpoints(args.output_dir) if at <= measured and _is_complete(path)]
        good = f"The last good checkpoint is {kept[-1]}" if kept else "There is no checkpoint from before"
        raise FloatingPointError(
            f"KL to the reference is {kl:.3g} nats per token at step {step}, above max_kl={args.max_kl}: the policy "
            f"has left it. {good}; go on from one with a lower learning_rate={args.learning_rate:g} or a higher "
            f"kl_coef={args.kl_coef}, or raise max_kl"
        )

    def rollout_state(self):
        return super().rollout_state() | {"kl_coef": self.kl_coef}

    def load_rollout_state(self, state):
        super().load_rollout_state(state)
        self.kl_coef = state["kl_coef"]
