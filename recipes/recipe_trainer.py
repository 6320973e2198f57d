"""What the trainers of all stages share: optimizers, safe checkpoints, speed without warm-up, MTP and load metrics."""

import contextlib
import math
import time

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, ProgressCallback

from recipes.checkpoints import CheckpointMixin
from recipes.fsdp_setup import FsdpSetupMixin
from recipes.garbage import collect_at_step, collecting_at_steps
from recipes.hub_push import HubPushMixin
from recipes.optimizers import OptimizerMixin
from recipes.parallel_trainer import ParallelMixin
from recipes.zero_setup import ZeroSetupMixin, whole_shape


class SpeedMeter:
    """Seconds and tokens of training alone: no warm-up steps, no evaluation, saving or sampling."""

    def __init__(self, warmup_steps, device):
        self.device, self._left = torch.device(device), warmup_steps
        self._mark = None  # running since; None: stopped
        self.seconds, self.steps, self.tokens, self.all_tokens = 0.0, 0, 0, 0

    def _now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def add_tokens(self, count):
        """Called before each micro-batch."""
        self.all_tokens = self.all_tokens + count
        if self._left == 0:
            self._mark = self._now() if self._mark is None else self._mark
            self.tokens = self.tokens + count

    def step_done(self):
        if self._left > 0:
            self._left -= 1
            self._mark = self._now() if self._left == 0 else None
        else:
            self.steps += 1

    @contextlib.contextmanager
    def paused(self):
        running = self._mark is not None
        if running:
            self.seconds += self._now() - self._mark
            self._mark = None
        try:
            yield
        finally:
            if running:
                self._mark = self._now()

    def read(self):
        """(tokens, seconds, steps, tokens with warm-up) since the last reading."""
        if self._mark is not None:
            now = self._now()
            self.seconds, self._mark = self.seconds + now - self._mark, now
        result = (self.tokens, self.seconds, self.steps, self.all_tokens)
        self.seconds, self.steps, self.tokens, self.all_tokens = 0.0, 0, 0, 0
        return result


class Strided(Dataset):
    """Every `step`-th row of a data set, from `first` on: the share of one process in an evaluation."""

    def __init__(self, rows, first, step):
        self.rows, self.indices = rows, range(first, len(rows), step)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return self.rows[self.indices[index]]


class RecipeTrainerMixin(OptimizerMixin, HubPushMixin, CheckpointMixin, ParallelMixin, FsdpSetupMixin, ZeroSetupMixin):
    """Put before `transformers.Trainer` or one of TRL's trainers in the list of bases.

    A subclass calls `start_metering(flops_per_token)` at the end of its `__init__`, says how to count the tokens of a
    batch (`count_tokens`), and hands each micro-batch's MTP loss to `add_mtp_loss`, divided as the loss is.
    """

    def start_metering(self, flops_per_token=None, peak_flops=None):
        """`flops_per_token`, `peak_flops` (FLOP/s of a device): for MFU, which is left out without them. The model is
        complete by now, and sharded where it is to be."""
        self.shard_model()
        for callback in (ProgressCallback, PrinterCallback):  # recipes/logging_callbacks.py replaces them
            self.remove_callback(callback)
        self.speed = SpeedMeter(self.args.timing_warmup_steps, self.args.device)
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self._mtp_loss, self.first_step, self._step_counted, self._step_logged = None, 0, 0, 0

    def count_tokens(self, batch):
        """Tokens of a batch that are not padding: an int or a tensor (no device synchronisation)."""
        raise NotImplementedError

    def add_mtp_loss(self, mtp_loss):
        """Adds a micro-batch's part of the step's MTP loss, so scaled that its sum is what the optimizer sees."""
        mtp_loss = mtp_loss.detach()
        self._mtp_loss = mtp_loss if self._mtp_loss is None else self._mtp_loss + mtp_loss

    # -- optimisation

    def get_decay_parameter_names(self, model):
        """Matrices only. Norm weights have names that the library's patterns miss (enorm, hnorm)."""
        return [name for name, parameter in model.named_parameters() if len(whole_shape(parameter)) >= 2]

    def train(self, *args, **kwargs):
        with collecting_at_steps(self.args.gc_steps > 0):
            return super().train(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.speed.add_tokens(self.count_tokens(inputs))
        return super().training_step(model, inputs, num_items_in_batch)

    # -- logs

    def _init_training_state(self, *args, **kwargs):
        result = super()._init_training_state(*args, **kwargs)
        self.first_step = self._step_counted = self._step_logged = self.state.global_step
        self._mtp_loss = None
        return result

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if self.state.global_step > self._step_counted:  # also called at the end of an epoch
            self.speed.step_done()
            self._step_counted = self.state.global_step
            collect_at_step(self.state.global_step, self.args.gc_steps)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs.update(self._interval_metrics(logs["loss"]))
            if not math.isfinite(logs["loss"]):
                self._stop_on_bad_loss(logs["loss"])
        super().log(logs, start_time)

    def _stop_on_bad_loss(self, loss):
        raise FloatingPointError(
            f"loss={loss} at step {self.state.global_step}: the run diverged. Resume from an earlier checkpoint with "
            "--allow_config_change and a lower --learning_rate, a longer --warmup_steps or a lower --max_grad_norm"
        )

    def _interval_metrics(self, loss):
        """Speed, MFU, MTP loss and expert load of the steps since the last log; called on every rank."""
        steps = self.state.global_step - self._step_logged
        tokens, seconds, timed, all_tokens = self.speed.read()
        counts = torch.tensor([float(tokens), float(all_tokens)], dtype=torch.float64, device=self.args.device)
        tokens, all_tokens = self.sum_over_rows(counts).tolist()
        metrics = {"tokens": int(all_tokens)}
        if self._mtp_loss is not None:
            metrics["mtp_loss"] = self.accelerator.reduce(self._mtp_loss.double(), "mean").item() / steps
            metrics["next_token_loss"] = loss - self.model.config.mtp_loss_coef * metrics["mtp_loss"]
        self._mtp_loss, self._step_logged = None, self.state.global_step
        if timed:
            metrics["step_seconds"] = seconds / timed
            metrics["tokens_per_second"] = tokens / seconds
            if self.peak_flops and self.flops_per_token:
                peak = self.peak_flops * self.accelerator.num_processes
                metrics["mfu"] = metrics["tokens_per_second"] * self.flops_per_token / peak
        load = getattr(self.accelerator.unwrap_model(self.model), "expert_load_max_over_mean", None)
        for layer, value in (load() if load else {}).items():
            metrics[f"load_max_over_mean_layer_{layer}"] = float(value)
        return metrics

    # -- evaluation and saving, outside the clock

    def evaluate(self, *args, **kwargs):
        with self.speed.paused():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        with self.speed.paused():
            return super()._save_checkpoint(*args, **kwargs)

    def strided_eval_dataloader(self, dataset, rows_class=Strided):
        """Every n-th row on n processes: nothing is repeated to even out batches, so sums are exact."""
        rank, world = self.data_rank, self.data_processes
        if len(dataset) < world:
            raise ValueError(f"{len(dataset)} held-out rows are fewer than the {world} processes: hold out more text")
        rows = rows_class(dataset, rank, world)
        return DataLoader(rows, batch_size=self.args.eval_batch_size, collate_fn=self.data_collator)

    def equal_batches(self, dataloader):
        """(batch, True), then the last one with False until every process has had as many batches:
        sharded models compute together."""
        most = torch.tensor([len(dataloader)], device=self.args.device)
        if self.accelerator.num_processes > 1:
            most = self.accelerator.gather(most).max()
        for batch in dataloader:
            yield batch, True
        for _ in range(int(most) - len(dataloader)):
            yield batch, False


class RolloutMeterMixin:
    """Put before `RecipeTrainerMixin` where a trainer samples its own completions: tokens/s of both."""

    def count_tokens(self, batch):
        return 0  # prompts as text: what becomes of them is counted below

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.model.training:
            self.speed.add_tokens(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())
        return super().compute_loss(model, inputs, *args, **kwargs)
