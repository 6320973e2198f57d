"""Checkpoints that survive a kill at any moment, for every Hugging Face trainer.

`Trainer` writes straight into `checkpoint-N` and resumes from the highest N, complete or not.
`CheckpointMixin` adds what is missing: `COMPLETE.json` (size and sha256 of every file), written last
and atomically; rotation only after it; resume from the newest complete checkpoint, verified; a
refusal to resume with another config; a check that the weights in memory after loading are those
that were trained.

    class PretrainTrainer(CheckpointMixin, Trainer): ...

Fields of the training arguments that it reads, where they exist: `resume_from_checkpoint`
(`true`: the newest complete one or an error; `auto`: the newest complete one or a fresh start; a
path), `allow_config_change`, `overwrite_output_dir`, `max_shard_size`.
"""

import functools
import json
import logging
import os
import shutil
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from recipes.checkpoint_files import (
    CHECKPOINT_NAME,
    RUN_CONFIG,
    IncompleteCheckpointError,
    find_problem,
    is_ours,
    is_unfinished,
    list_checkpoints,
    read_marker,
    resolve_resume,
    write_marker,
)
from recipes.elastic_checkpoints import ElasticCheckpointMixin
from recipes.resume_guard import check_unchanged, describe_run
from recipes.row_order import set_sampler_epoch
from recipes.sharded_checkpoints import GROUPS, holds_shards
from recipes.zero_setup import check_zero_checkpoint, zero_stage

logger = logging.getLogger(__name__)


class CheckpointSaveError(OSError):
    """A checkpoint could not be written; what was half-written has been removed."""


def estimate_save_bytes(model, optimizer, extra_bytes=0):
    """Bytes of weights and optimizer states held here: what a checkpoint needs at least."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    for state in optimizer.state.values() if optimizer is not None else ():
        tensors.update({id(t): t for t in state.values() if torch.is_tensor(t)})
    return extra_bytes + sum(t.numel() * t.element_size() for t in tensors.values())


def _is_write_failure(error):
    """torch and safetensors wrap a failed write in errors of their own."""
    text = str(error)
    wrapped = ("No space left", "PytorchStreamWriter", "inline_container", "I/O error", "iostream")
    return isinstance(error, (OSError, SafetensorError)) or any(word in text for word in wrapped)


def _protected(trainer):
    best = trainer.state.best_model_checkpoint
    return {Path(best).resolve()} if best else set()


# ---------------------------------------------------------------- the mixin


class CheckpointMixin(ElasticCheckpointMixin):
    """Put before a `transformers.Trainer` (or a subclass such as TRL's) in the list of bases.

    Callbacks with a state of their own offer `save_to_checkpoint(folder, model)` and
    `load_from_checkpoint(folder, model)`, and `checkpoint_bytes()` for the free-space check.
    """

    resume_guard = None  # further facts that must not change between runs, a flat dict

    def train(self, resume_from_checkpoint=None, **kwargs):
        self.check_saving()
        choice = resume_from_checkpoint
        if choice is None:
            choice = getattr(self.args, "resume_from_checkpoint", None)
        self._on_first_rank(self._sweep)
        path = self._on_first_rank(lambda: resolve_resume(choice, self.args.output_dir))
        if path is None:
            self.require_fresh_output_dir()
        else:
            self._on_first_rank(lambda: self._check_config(path))
            self._on_first_rank(lambda: self._set_later_checkpoints_aside(path))
        try:
            return super().train(resume_from_checkpoint=path, **kwargs)
        except BaseException:
            self.writer.join()  # a Ctrl-C too leaves the checkpoint whole that is being written
            raise

    def _on_first_rank(self, function):
        """Run `function` on rank 0 and give every rank its result, or its error."""
        outcome = [None, None]
        if self.accelerator.is_main_process:
            try:
                outcome = [function(), None]
            except (ValueError, OSError) as error:
                outcome = [None, error]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    # -- before training

    def _sweep(self):
        """What a kill in the middle of a removal left."""
        for doomed in Path(self.args.output_dir).glob(".removing-checkpoint-*"):
            shutil.rmtree(doomed, ignore_errors=True)

    def save_model(self, *args, **kwargs):
        """As in Trainer, but a full disk is named together with the checkpoint that is intact."""
        try:
            return super().save_model(*args, **kwargs)
        except Exception as error:
            if isinstance(error, CheckpointSaveError) or not _is_write_failure(error):
                raise
            existing = list_checkpoints(self.args.output_dir)
            kept = [path.name for _, path in existing if find_problem(path, False) is None]
            raise CheckpointSaveError(
                f"could not save the model in {self.args.output_dir} ({error}): "
                f"{shutil.disk_usage(self.args.output_dir).free:,} bytes free; "
                f"{kept[-1] + ' is intact' if kept else 'there is no checkpoint'}. Free space, then "
                "--resume_from_checkpoint true finishes the run"
            ) from error

    def require_fresh_output_dir(self):
        """Deletes an earlier run's checkpoints if `overwrite_output_dir` says so, else raises ValueError for them."""
        self._on_first_rank(self._remove_earlier_run)

    def _remove_earlier_run(self):
        existing = [path for _, path in list_checkpoints(self.args.output_dir)]
        kept = [path for path in existing if not is_unfinished(path)]
        if kept and not getattr(self.args, "overwrite_output_dir", False):
            raise ValueError(
                f"output_dir={self.args.output_dir} already holds {kept[-1].name} of an earlier run: pass "
                "--resume_from_checkpoint true to continue it, --overwrite_output_dir to delete its "
                "checkpoints, or another --output_dir"
            )
        for path in existing:
            logger.warning("output_dir: removing %s of an earlier run", path)
            self._remove(path)

    def _check_config(self, path):
        check_zero_checkpoint(path, zero_stage(self.args), self.args.world_size)
        states = GROUPS if holds_shards(path) else "optimizer.pt"
        if not self.is_deepspeed_enabled and not (Path(path) / states).is_file():
            raise ValueError(
                f"{path} has no {states} (save_only_model?): the optimizer and the schedule would start anew; "
                "start a new run from its weights with --model_name_or_path"
            )
        file = Path(path) / RUN_CONFIG
        if not file.is_file():
            logger.warning("resume: %s has no %s, the config is not compared", path, RUN_CONFIG)
            return
        saved = json.loads(file.read_text(encoding="utf-8"))
        allowed = getattr(self.args, "allow_config_change", False)
        for line in check_unchanged(saved, describe_run(self), allowed, path):
            logger.warning("resume: %s", line)

    def _set_later_checkpoints_aside(self, path):
        """A checkpoint of a step after the resumed one belongs to a future that is now abandoned."""
        resumed = CHECKPOINT_NAME.match(Path(path).resolve().name)
        for step, later in list_checkpoints(self.args.output_dir):
            if resumed and step > int(resumed[1]) and find_problem(later, hashes=False) is None:
                aside = later.with_name(f"abandoned-{later.name}")
                self._remove(aside)
                os.rename(later, aside)
                logger.warning("resume: %s is newer than %s; kept as %s", later, path, aside.name)

    def _run_epoch(self, *args, **kwargs):
        """A run that is resumed at its last step is finished: Trainer would take one step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            self._load_rng_state(kwargs["resume_from_checkpoint"])  # for a last evaluation that samples
        else:
            set_sampler_epoch(kwargs["train_dataloader"], kwargs["epoch"])
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args, **kwargs):
        """The last checkpoint is whole when training ends. And Trainer would delete the newest one where
        `save_total_limit` is 1 and another is the best: a run that is killed in the evaluation after training would
        train again."""
        self.finish_save()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    # -- loading

    def _callbacks_with(self, method):
        return [c for c in self.callback_handler.callbacks if hasattr(c, method)]

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._check_weights(resume_from_checkpoint)
        for callback in self._callbacks_with("load_from_checkpoint"):
            callback.load_from_checkpoint(resume_from_checkpoint, self.model)

    def _load_best_model(self):
        best = self.state.best_model_checkpoint
        if reason := find_problem(best):
            raise IncompleteCheckpointError(
                f"load_best_model_at_end: {best} is not a complete checkpoint: {reason}; the last "
                "weights are still in memory and in the newest checkpoint"
            )
        super()._load_best_model()
        self._check_weights(best)
        for callback in self._callbacks_with("load_from_checkpoint"):  # an average that belongs to these weights
            callback.load_from_checkpoint(best, self.model)

    def _check_weights(self, folder):
        """Loading drops keys that the model does not know with a warning only: compare the result."""
        saved = (read_marker(folder) or {}).get("weights") or {}
        if not saved or not self._knows_weights():
            return
        sums = self._sum_weights()
        wrong = [name for name, value in saved.items() if sums.get(name) != value]
        if wrong:
            raise IncompleteCheckpointError(
                f"{len(wrong)} of {len(saved)} tensors in memory differ from those saved in {folder} after "
                f"loading it, the first: {', '.join(wrong[:4])}. The model class or dtype did not take the "
                "checkpoint as it is; resume with the code and the dtype that wrote it"
            )

    def _init_training_state(self, max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial):
        result = super()._init_training_state(max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial)
        step = self.state.best_global_step
        if step and self.state.best_model_checkpoint is None:  # the run folder was moved
            moved = Path(self._get_output_dir(trial)) / f"checkpoint-{step}"
            if find_problem(moved, hashes=False) is None:
                self.state.best_model_checkpoint = str(moved)
        return result

    # -- saving

    def _save(self, output_dir=None, state_dict=None):
        size = getattr(self.args, "max_shard_size", None)
        if size is None:
            return super()._save(output_dir, state_dict)
        whole = self.model.save_pretrained
        self.model.save_pretrained = functools.partial(whole, max_shard_size=size)
        try:
            return super()._save(output_dir, state_dict)
        finally:
            del self.model.save_pretrained

    def _save_checkpoint(self, model, trial):
        self.finish_save()
        run_dir, shards = Path(self._get_output_dir(trial=trial)), self.saves_shards()
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        self._on_first_rank(lambda: self._make_room(folder))
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # ours rotates, later
        try:
            self._save_extras(folder)
            with self.into_shards(shards):
                super()._save_checkpoint(model, trial)
                if shards:
                    kept = _protected(self) | {folder.resolve()}
                    self.start_writing(folder, lambda: self._rotate(run_dir, kept, limit))
            if not shards:
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    write_marker(folder, self._sum_weights() if self._knows_weights() else {})
        except Exception as error:
            self._abandon(folder, error)
            raise
        finally:
            self.args.save_total_limit = limit
        if not shards:
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._rotate(run_dir, _protected(self) | {folder.resolve()}, limit)
        elif not getattr(self.args, "async_save", False):
            self.finish_save()

    def finish_save(self):
        """Waits for the save that is under way, on all ranks. Raises CheckpointSaveError on all if it failed on one."""
        folder = self.writer.folder
        error, found = self.writer.outcome()
        if not found:
            return
        texts = "; ".join(found)
        self._abandon(folder, RuntimeError(texts))
        raise CheckpointSaveError(f"could not save {folder} ({texts}); what was written of it is removed") from error

    def _make_room(self, folder):
        """An earlier folder of that name goes; too little space is said before anything is written."""
        if folder.is_dir() and not is_ours(folder):
            raise CheckpointSaveError(
                f"{folder} exists and was not written by this code; move it away or choose another output_dir"
            )
        self._remove(folder)
        extra = sum(c.checkpoint_bytes() for c in self._callbacks_with("checkpoint_bytes"))
        needed = estimate_save_bytes(self.accelerator.unwrap_model(self.model), self.optimizer, extra)
        free = shutil.disk_usage(folder.parent).free
        if free < needed:
            raise CheckpointSaveError(self._full_message(folder, needed, free, "nothing was written"))

    def _save_extras(self, folder):
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RUN_CONFIG).write_text(json.dumps(describe_run(self), indent=1), encoding="utf-8")
        for callback in self._callbacks_with("save_to_checkpoint"):
            callback.save_to_checkpoint(folder, self.model)

    def _knows_weights(self):
        elsewhere = self.is_deepspeed_enabled or self.is_distributed_loading_by_transformers
        return not elsewhere and (self.shards_model() or not self.is_fsdp_enabled)

    def _abandon(self, folder, error):
        if self.args.should_save:
            self._remove(folder)
        if not _is_write_failure(error):
            return
        extra = sum(c.checkpoint_bytes() for c in self._callbacks_with("checkpoint_bytes"))
        needed = estimate_save_bytes(self.accelerator.unwrap_model(self.model), self.optimizer, extra)
        free = shutil.disk_usage(folder.parent).free
        raise CheckpointSaveError(self._full_message(folder, needed, free, str(error))) from error

    def _full_message(self, folder, needed, free, reason):
        kept = [path.name for _, path in list_checkpoints(folder.parent) if find_problem(path, False) is None]
        return (
            f"could not save {folder} ({reason}): about {needed:,} bytes needed, {free:,} free. The half-written "
            f"folder is removed, {kept[-1] + ' is intact' if kept else 'there is no earlier checkpoint'}. Free "
            "space, lower save_total_limit or choose another output_dir, then --resume_from_checkpoint true"
        )

    def _rotate(self, run_dir, kept, limit):
        """Keep `limit` checkpoints: unfinished ones go first, those in `kept` (the newest and the best) stay."""
        if not limit or limit <= 0:
            return
        others = [path for _, path in list_checkpoints(run_dir) if path.resolve() not in kept and is_ours(path)]
        others.sort(key=lambda path: find_problem(path, hashes=False) is None)
        for path in others[: max(0, len(others) + len(kept) - max(limit, len(kept)))]:
            self._remove(path)

    @staticmethod
    def _remove(folder):
        """Renamed first: a folder half removed must not pass for a checkpoint."""
        if folder.is_dir():
            doomed = folder.with_name(f".removing-{folder.name}")
            if doomed.is_dir():
                shutil.rmtree(doomed)
            os.rename(folder, doomed)
            shutil.rmtree(doomed)
