"""Checkpoints in the middle of a rollout: what is left of it is saved, so that a resumed run takes the same steps."""

from pathlib import Path

import torch

from recipes.elastic_checkpoints import saved_processes

SHOWN = ("prompt", "completion", "advantages")  # of a rollout, beside its rewards: what samples are taken from


def loading_device(args):
    """`map_location` for torch.load, which does not know the "cpu:0" of accelerate's processes."""
    return "cpu" if args.device.type == "cpu" else args.device


class RolloutCheckpointMixin:
    """Put before `trl.GRPOTrainer` in the list of bases; TRL would sample anew and read the wrong part.

    Subclasses add to `rollout_state` and take it back in `load_rollout_state`.
    """

    def _expert_counts(self):
        """The tokens counted at the routers since their biases moved: these buffers are not in the weights."""
        return {name: buffer for name, buffer in self._policy().named_buffers() if name.endswith("load_counts")}

    def _rollout_file(self, folder, rank=None):
        return Path(folder) / f"rollout_{self.args.process_index if rank is None else rank}.pt"

    def rollout_state(self):
        """What a resumed run needs to go on in the middle of a rollout: tensors and plain values."""
        state = {"step": self._step, "accumulation": self.args.gradient_accumulation_steps, "rollout": None}
        state["expert_counts"] = self._expert_counts()
        state["expert_load"] = dict(getattr(self._policy(), "expert_load", {}))  # logged until the biases move again
        if self._step % (self.args.steps_per_generation * self.num_iterations):
            state["rollout"], state["split"] = self._buffered_inputs, self._split()
            logs = {name: list(self._logs[name]) for name in SHOWN}
            state["completions"] = logs | {"rewards": {n: list(v) for n, v in self._logs["rewards"].items()}}
        return state

    def _split(self):
        """What the rest of a rollout depends on."""
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations")
        return {name: getattr(self.args, name) for name in names}

    def load_rollout_state(self, state):
        now = self._split()
        changed = [name for name, value in (state.get("split") or now).items() if now[name] != value]
        if changed:
            was = ", ".join(f"{name}={state['split'][name]}" for name in changed)
            raise ValueError(
                f"the checkpoint lies within a rollout made with {was}, now "
                f"{', '.join(str(now[name]) for name in changed)}: go on with the same, or from a checkpoint "
                "between two rollouts"
            )
        now = self.args.gradient_accumulation_steps  # between rollouts it may be another: steps are micro-batches
        self._step = state["step"] * now // state.get("accumulation", now)
        self._buffered_inputs = state["rollout"]
        for name, buffer in self._expert_counts().items():
            buffer.copy_(state["expert_counts"][name])
        if state.get("expert_load"):
            self._policy()._expert_load = state["expert_load"]
        completions = state.get("completions") or {}
        for name, values in (completions.pop("rewards", {})).items():
            self._logs["rewards"][name].extend(values)
        for name, values in completions.items():
            self._logs[name].extend(values)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        torch.save(self.rollout_state(), self._rollout_file(output_dir))

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        saved = saved_processes(checkpoint)
        if saved not in (0, self.args.world_size):
            return self.load_rollout_state(self._state_of_others(checkpoint, saved))
        self.load_rollout_state(self._read_rollout(checkpoint))

    def _read_rollout(self, checkpoint, rank=None):
        path = self._rollout_file(checkpoint, rank)
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: the checkpoint was saved with save_only_model, or not copied whole; start a new "
                "run from its weights"
            )
        return torch.load(path, map_location=loading_device(self.args), weights_only=True)

    def _state_of_others(self, checkpoint, saved):
        """What `saved` processes left between two rollouts, for the present number; the first has all their counts."""
        states = [self._read_rollout(checkpoint, rank) for rank in range(saved)]
        if states[0]["rollout"] is not None:
            raise ValueError(
                f"{checkpoint} lies within a rollout, of which each of {saved} processes holds a part: go on with "
                f"{saved} processes, or from a checkpoint between two rollouts (save_steps a multiple of the optimizer "
                "steps that a rollout is trained for)"
            )
        for name, counts in states[0]["expert_counts"].items():
            others = sum(state["expert_counts"][name] for state in states[1:])
            counts.copy_(counts + others if self.args.process_index == 0 else torch.zeros_like(counts))
        return states[0]
