"""The pretraining trainer: HF Trainer with decay groups, exact speed accounting and bits per byte."""

import itertools

import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from recipes.compression_trainer import CompressionMixin
from recipes.data import bits_per_byte
from recipes.expert_loads import ExpertLoadCounter
from recipes.recipe_trainer import RecipeTrainerMixin, Strided
from recipes.row_order import RowOrder
from recipes.sizing import device_peak_flops, flops_per_token

MODEL_INPUTS = ("input_ids", "labels", "shift_labels", "position_ids", "attention_mask")


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


class RowsWithSources(Strided):
    """Held-out rows with the source of each token beside them."""

    def __getitem__(self, index):
        row = self.indices[index]
        return {**self.rows[row], "sources": torch.as_tensor(self.rows.sources_of(row)).long()}


class PretrainTrainer(RecipeTrainerMixin, CompressionMixin, Trainer):
    """`Trainer` for packed rows (recipes/packed_rows.py); loss, MTP loss and balance are the model's.

    `eval_dataset` is a `PackedRows` with its evaluation stride: every token is predicted once, and its
    `bytes_by_source()` are what the summed losses are divided by.
    """

    def __init__(self, model=None, args=None, train_dataset=None, **kwargs):
        if isinstance(train_dataset, IterableDataset):
            train_dataset = EndlessStream(train_dataset)
        if args.activation_checkpointing == "selective" and not hasattr(model, "set_activation_checkpointing"):
            raise ValueError(
                f"activation_checkpointing=selective: {type(model).__name__} knows only the library's; use full, or a "
                "deepseek_r1 model"
            )
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        self._take_over_label_smoothing()
        peak_flops, self.peak_source = device_peak_flops(args.device, args.device_peak_tflops)
        self.start_metering(flops_per_token(self.model.config, args.sequence_length), peak_flops)

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

    def _get_train_sampler(self, train_dataset=None):
        """Whole optimizer steps, the same on any number of processes (`RowOrder`); streams have their own order."""
        dataset, args = self.train_dataset if train_dataset is None else train_dataset, self.args
        if isinstance(dataset, IterableDataset) or args.train_sampling_strategy not in ("random", "sequential"):
            return super()._get_train_sampler(train_dataset)
        curriculum = args.shuffle_rows == "auto" and getattr(dataset, "curriculum", False)
        seed = args.seed if args.data_seed is None else args.data_seed
        shuffle = args.shuffle_rows != "false" and not curriculum and args.train_sampling_strategy == "random"
        return RowOrder(len(dataset), args.tokens_per_step // args.sequence_length, seed if shuffle else None)

    def count_tokens(self, batch):
        return count_tokens(batch)

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
            mtp_loss = mtp_loss * (self.accelerator.num_processes // self.get_tp_size())
        self.add_mtp_loss(mtp_loss)

    # -- evaluation

    def get_eval_dataloader(self, eval_dataset=None):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluation needs held-out rows: set validation_fraction > 0, or eval_strategy=no")
        return self.strided_eval_dataloader(dataset, RowsWithSources)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Sums of nats and predicted tokens by source, over all processes. No logits are kept.

        `self.expert_loads`: the table of `recipes.expert_loads` of the same text; empty for models without routers.
        """
        rows, model, was_training = dataloader.dataset.rows, self.model, self.model.training
        model.eval()
        sums = torch.zeros(len(rows.sources), 2, dtype=torch.float64, device=self.args.device)
        loads = ExpertLoadCounter(self.accelerator.unwrap_model(model), len(rows.sources))
        with loads.listening():
            for batch, counted in self.equal_batches(dataloader):
                part = self._evaluate_batch(model, batch, len(rows.sources))
                sums += part if counted else 0
                loads.add(batch["sources"].to(self.args.device) if counted else torch.full_like(
                    batch["sources"], -1, device=self.args.device))
                self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(was_training)
        sums = self.sum_over_rows(sums).cpu()
        self.expert_loads = loads.table(rows.sources, self.sum_over_rows)
        metrics = bits_per_byte_metrics(sums, rows.sources, rows.bytes_by_source())
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(rows))

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
