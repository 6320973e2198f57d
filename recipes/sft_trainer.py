"""The trainer of supervised fine-tuning: TRL's SFTTrainer with MTP, label smoothing, exact evaluation and resume."""

import contextlib

import torch
from peft import PeftModel
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from recipes.packed_rows import ExamplesCollator
from recipes.recipe_trainer import RecipeTrainerMixin
from recipes.sizing import device_peak_flops, flops_per_token


@contextlib.contextmanager
def _settings(args, values):
    """Other values of some fields, for the time being."""
    before = {name: getattr(args, name) for name in values}
    try:
        for name, value in values.items():
            setattr(args, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)


def causal_lm(model):
    """The causal LM inside PEFT's wrapper, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


class RecipeSFTTrainer(RecipeTrainerMixin, SFTTrainer):
    """`SFTTrainer` on encoded examples (`input_ids`, `labels`: recipes/sft_data.py).

    What it adds: the loss of trained multi-token-prediction layers (`mtp_loss_coef` times, over the same number of
    tokens as the main loss), label smoothing inside the model's own loss, held-out loss as the exact mean over
    tokens for any batch size and number of processes, checkpoints that resume exactly, tokens/s.
    """

    def __init__(self, model, args, **kwargs):
        config, done_already = causal_lm(model).config, {"assistant_only_loss": False}  # the labels say it
        if hasattr(config, "label_smoothing"):
            config.label_smoothing = args.label_smoothing_factor
            done_already["label_smoothing_factor"] = 0.0  # TRL's way would hold all logits
        with _settings(args, done_already):
            super().__init__(model=model, args=args, **kwargs)
        self.own_loss = hasattr(causal_lm(self.model), "routers") and args.loss_type == "nll"
        if self.padding_free and "flash" not in config._attn_implementation:  # which wants one row and its offsets
            own = hasattr(causal_lm(self.model), "routers")  # others do not know the argument
            self.data_collator = ExamplesCollator(self._tokenizer.pad_token_id, token_mask=own)
        peak_flops, self.peak_source = device_peak_flops(args.device, args.device_peak_tflops)
        length = sum(map(len, self._sample_lengths())) / max(len(self._sample_lengths()), 1)
        self.start_metering(self._flops_per_token(int(length)), peak_flops)

    def _sample_lengths(self):
        """Documents of the first rows: attention reaches over a document, not over a packed row."""
        rows = self.train_dataset.select(range(min(256, len(self.train_dataset))))
        if "seq_lengths" not in rows.column_names:
            return rows["input_ids"]
        return [range(length) for lengths in rows["seq_lengths"] for length in lengths]

    def _flops_per_token(self, length):
        config = causal_lm(self.model).config
        return flops_per_token(config, length) if config.model_type == "deepseek_r1" else None

    # -- loss

    def count_tokens(self, batch):
        mask = batch.get("attention_mask", batch.get("token_mask"))
        return batch["input_ids"].numel() if mask is None else mask.sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """A DeepSeek model's own loss. TRL would run the backbone and a head of its own, which knows neither MTP nor
        label smoothing and costs more: it looks at every token where there is no GPU, and at each one's entropy."""
        if not (self.own_loss and self.model.training):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            self._metrics["train" if self.model.training else "eval"].pop("num_tokens", None)  # we log `tokens`
            return loss
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        factor = 1.0
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            factor = self.accelerator.num_processes // self.get_tp_size()  # DDP takes the mean
        if outputs.mtp_loss is not None:
            accumulated = 1 if num_items_in_batch is not None else self.current_gradient_accumulation_steps
            self.add_mtp_loss(outputs.mtp_loss * factor / accumulated)
        loss = outputs.loss * factor
        return (loss, outputs) if return_outputs else loss

    # -- held-out loss

    def get_eval_dataloader(self, eval_dataset=None):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluation needs held-out examples: set validation_fraction > 0, or eval_strategy=no")
        return self.strided_eval_dataloader(dataset)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Mean next-token loss (nats, no smoothing) and share of most likely tokens that are right, over all trained
        tokens of the held-out examples."""
        model, was_training = self.model, self.model.training
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        for batch, counted in self.equal_batches(dataloader):
            batch = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                output = model(**batch, fused_lm_head=True)
            part = [-output.log_probs.double().sum(), output.is_top1.double().sum(), output.label_mask.double().sum()]
            sums += torch.stack(part) if counted else 0
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(was_training)
        nats, right, tokens = self.accelerator.reduce(sums, "sum").tolist()
        metrics = {"loss": nats / tokens, "token_accuracy": right / tokens, "tokens": int(tokens)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(dataloader.dataset))
