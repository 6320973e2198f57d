"""The pretraining trainer: HF Trainer with decay groups, exact speed accounting and bits per byte."""

import contextlib
import itertools
import math
import time

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_utils import EvalLoopOutput

from recipes.checkpoints import CheckpointMixin
from recipes.data import bits_per_byte
from recipes.sizing import device_peak_flops, flops_per_token

MODEL_INPUTS = ("input_ids", "labels", "position_ids", "attention_mask")


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


def count_tokens(batch):
    """Tokens of a batch that are not padding, as a tensor (no device synchronisation).

    A padded row ends in two or more labels of -100; a single one is a document's first token.
    """
    labels = batch["labels"]
    tail = (labels.ne(-100).flip(-1).cumsum(-1) == 0).sum(-1)
    return labels.numel() - tail.masked_fill(tail <= 1, 0).sum()


class EndlessStream(IterableDataset):
    """Passes over a stream without an end, each in its own order.

    Trainer would drop the gradients of an unfinished step at the end of a pass, and resume in the
    first one; so it sees one pass that lasts for `max_steps`.
    """

    def __init__(self, stream):
        self.stream = stream

    def __iter__(self):
        for epoch in itertools.count():
            if hasattr(self.stream, "set_epoch"):
                self.stream.set_epoch(epoch)
            empty = True
            for row in self.stream:
                empty = False
                yield row
            if empty:
                raise ValueError(
                    "the stream gave no row of sequence_length tokens" + (
                        " to one of its dataloader_num_workers: it has fewer shards than workers; lower that number"
                        if get_worker_info() else ": it has too little text; lower sequence_length or add text"
                    )
                )  # fmt: skip


class RowsWithSources(Dataset):
    """Every `step`-th held-out row, from `first` on, with the source of each token beside it."""

    def __init__(self, rows, first, step):
        self.rows, self.indices = rows, range(first, len(rows), step)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        row = self.indices[index]
        return {**self.rows[row], "sources": torch.as_tensor(self.rows.sources_of(row)).long()}


class PretrainTrainer(CheckpointMixin, Trainer):
    """`Trainer` for packed rows (recipes/packed_rows.py); loss, MTP loss and balance are the model's.

    `eval_dataset` is a `PackedRows` with its evaluation stride: every token is predicted once, and its
    `bytes_by_source()` are what the summed losses are divided by.
    """

    def __init__(self, model=None, args=None, train_dataset=None, **kwargs):
        if isinstance(train_dataset, IterableDataset):
            train_dataset = EndlessStream(train_dataset)
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        for callback in (ProgressCallback, PrinterCallback):  # recipes/logging_callbacks.py replaces them
            self.remove_callback(callback)
        self._take_over_label_smoothing()
        self.speed = SpeedMeter(args.timing_warmup_steps, args.device)
        self.flops_per_token = flops_per_token(self.model.config, args.sequence_length)
        self.peak_flops, self.peak_source = device_peak_flops(args.device, args.device_peak_tflops)
        self._mtp_loss, self._step_counted, self._step_logged = None, 0, 0

    def _take_over_label_smoothing(self):
        """Trainer's own smoother bypasses the model's loss (and, for custom classes, the label shift)."""
        factor = self.args.label_smoothing_factor
        self.label_smoother = None
        if factor != getattr(self.model.config, "label_smoothing", 0.0):
            if not hasattr(self.model.config, "label_smoothing"):
                raise ValueError(
                    f"label_smoothing_factor={factor}: {type(self.model).__name__} has no config field "
                    "label_smoothing for it; use 0, or a deepseek_r1 model"
                )
            self.model.config.label_smoothing = factor

    # -- optimisation

    def get_decay_parameter_names(self, model):
        """Matrices only. Norm weights have names that the library's patterns miss (enorm, hnorm)."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.speed.add_tokens(count_tokens(inputs))
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {name: inputs[name] for name in MODEL_INPUTS if name in inputs}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        mtp_loss = outputs.get("mtp_loss") if isinstance(outputs, dict) else None
        if model.training and mtp_loss is not None:
            self._add_mtp_loss(mtp_loss.detach(), num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _add_mtp_loss(self, mtp_loss, num_items_in_batch):
        """The same weighting over micro-batches and processes as Trainer gives the loss."""
        if not (self.model_accepts_loss_kwargs and num_items_in_batch is not None):
            mtp_loss = mtp_loss / self.current_gradient_accumulation_steps
        elif self.args.average_tokens_across_devices:
            mtp_loss = mtp_loss * self.accelerator.num_processes
        self._mtp_loss = mtp_loss if self._mtp_loss is None else self._mtp_loss + mtp_loss

    # -- logs

    def _init_training_state(self, *args, **kwargs):
        result = super()._init_training_state(*args, **kwargs)
        self._mtp_loss, self._step_counted, self._step_logged = None, self.state.global_step, self.state.global_step
        return result

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if self.state.global_step > self._step_counted:  # also called at the end of an epoch
            self.speed.step_done()
            self._step_counted = self.state.global_step
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
        tokens, all_tokens = self.accelerator.reduce(counts, "sum").tolist()
        metrics = {"tokens": int(all_tokens)}
        if self._mtp_loss is not None:
            metrics["mtp_loss"] = self.accelerator.reduce(self._mtp_loss.double(), "mean").item() / steps
            metrics["next_token_loss"] = loss - self.model.config.mtp_loss_coef * metrics["mtp_loss"]
        self._mtp_loss, self._step_logged = None, self.state.global_step
        if timed:
            metrics["step_seconds"] = seconds / timed
            metrics["tokens_per_second"] = tokens / seconds
            if self.peak_flops:
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

    def get_eval_dataloader(self, eval_dataset=None):
        """Every `world_size`-th row: nothing is repeated to even out batches, so sums are exact."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluation needs held-out rows: set validation_fraction > 0, or eval_strategy=no")
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if len(dataset) < world:
            raise ValueError(f"{len(dataset)} held-out rows are fewer than the {world} processes: hold out more text")
        rows = RowsWithSources(dataset, rank, world)
        return DataLoader(rows, batch_size=self.args.eval_batch_size, collate_fn=self.data_collator)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Sums of nats and predicted tokens by source, over all processes. No logits are kept."""
        rows, model, was_training = dataloader.dataset.rows, self.model, self.model.training
        model.eval()
        sums = torch.zeros(len(rows.sources), 2, dtype=torch.float64, device=self.args.device)
        for batch, counted in self._equal_batches(dataloader):
            part = self._evaluate_batch(model, batch, len(rows.sources))
            sums += part if counted else 0
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(was_training)
        sums = self.accelerator.reduce(sums, "sum").cpu()
        metrics = bits_per_byte_metrics(sums, rows.sources, rows.bytes_by_source())
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(rows))

    def _equal_batches(self, dataloader):
        """(batch, True), then the last one with False until every process has had as many batches:
        sharded models compute together."""
        most = torch.tensor([len(dataloader)], device=self.args.device)
        if self.accelerator.num_processes > 1:
            most = self.accelerator.gather(most).max()
        for batch in dataloader:
            yield batch, True
        for _ in range(int(most) - len(dataloader)):
            yield batch, False

    def _evaluate_batch(self, model, batch, source_count):
        batch = self._prepare_inputs(batch)
        inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        with torch.no_grad(), self.accelerator.autocast():
            losses = model(**inputs, skip_logits=True, return_token_losses=True).token_losses
        sources = batch["sources"][:, 1:].flatten()  # entry i of the losses predicts label i + 1
        losses, kept = losses[:, :-1].flatten().double(), sources >= 0
        sums = torch.zeros(source_count, 2, dtype=torch.float64, device=losses.device)
        return sums.index_add_(0, sources[kept], torch.stack([losses, torch.ones_like(losses)], dim=1)[kept])


def bits_per_byte_metrics(sums, sources, sizes):
    """(source, [nats, tokens]) sums -> {"loss", "bits_per_byte", "bytes", "bits_per_byte_<source>"}."""
    (nats, tokens), size = sums.sum(0).tolist(), sum(sizes.values())
    if not tokens:
        raise ValueError("the held-out rows have no token to predict; raise validation_fraction or add text")
    metrics = {"loss": nats / tokens, "bits_per_byte": bits_per_byte(nats, size), "bytes": size}
    for source, (nats, _) in zip(sources, sums.tolist()):
        if sizes[source]:
            metrics[f"bits_per_byte_{source}"] = bits_per_byte(nats, sizes[source])
    return metrics
