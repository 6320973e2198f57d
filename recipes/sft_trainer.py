"""The trainer of supervised fine-tuning: TRL's SFTTrainer with MTP, label smoothing, exact evaluation and resume."""

import contextlib

import torch
from peft import PeftModel
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from recipes.packed_rows import ExamplesCollator
from recipes.parallel_settings import data_parallel_size
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


@torch.no_grad()
def examples_see_each_other(model, length=8):
    """Whether an example's logits depend on another one in its row, where both are told apart by positions alone."""
    vocab_size, was_training = model.config.get_text_config().vocab_size, model.training
    first, other, second = torch.arange(3 * length, device=model.device).remainder(vocab_size).view(3, 1, length)
    positions = torch.arange(length, device=model.device).repeat(1, 2)
    model.eval()
    one, two = (
        model(input_ids=torch.cat((before, second), 1), position_ids=positions, use_cache=False).logits[:, length:]
        for before in (first, other)
    )
    model.train(was_training)
    return not torch.allclose(one, two, rtol=1e-4, atol=1e-5 * one.abs().max().item())


class RecipeSFTTrainer(RecipeTrainerMixin, SFTTrainer):
    """`SFTTrainer` on encoded examples (`input_ids`, `labels`: recipes/sft_data.py).

    What it adds: the loss of trained multi-token-prediction layers (`mtp_loss_coef` times, over the same number of
    tokens as the main loss), label smoothing inside the model's own loss, held-out loss as the exact mean over
    tokens for any batch size and number of processes, checkpoints that resume exactly, tokens/s.
    """

    def __init__(self, model, args, **kwargs):
        # The labels say what is trained, and the model is there.
        config, done_already = causal_lm(model).config, {"assistant_only_loss": False, "model_init_kwargs": None}
        self.is_deepseek = hasattr(causal_lm(model), "routers")
        self.own_loss = self.is_deepseek and args.loss_type == "nll"
        if self.is_deepseek and causal_lm(model).trains_mtp and not self.own_loss:
            raise ValueError(f"loss_type={args.loss_type} has no multi-token-prediction loss; set mtp_loss_coef=0")
        if self.is_deepseek:
            config.label_smoothing = args.label_smoothing_factor
            done_already["label_smoothing_factor"] = 0.0  # TRL's way would hold all logits
        with _settings(args, done_already):
            super().__init__(model=model, args=args, **kwargs)
        if self.padding_free and "flash" not in config._attn_implementation:  # which wants one row and its offsets
            self.data_collator = ExamplesCollator(self._tokenizer.pad_token_id, args.pad_to_multiple_of or 64)
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            if not self.is_deepseek and not sharded and examples_see_each_other(self.model):
                raise ValueError(
                    f"packing=true: in a {config.model_type} model the examples of a row see each other; set "
                    "packing=false"
                )
        self._check_enough_rows()
        peak_flops, self.peak_source = device_peak_flops(args.device, args.device_peak_tflops)
        lengths = [len(document) for document in self._sample_documents()]
        self.start_metering(self._flops_per_token(sum(lengths) // max(len(lengths), 1)), peak_flops)

    def _check_enough_rows(self):
        args, rows = self.args, len(self.train_dataset)
        processes = data_parallel_size(args)
        needed = args.per_device_train_batch_size * processes if args.dataloader_drop_last else 1
        if rows < needed:
            raise ValueError(
                f"{rows} rows of examples fill no batch: per_device_train_batch_size="
                f"{args.per_device_train_batch_size} times {processes} processes is {needed}; lower it, or set "
                "dataloader_drop_last=false"
            )

    def _sample_documents(self):
        """Sequences as long as documents of the first rows: attention reaches over a document, not over a row."""
        rows = self.train_dataset.select(range(min(256, len(self.train_dataset))))
        if "seq_lengths" not in rows.column_names:
            return rows["input_ids"]
        return [range(length) for lengths in rows["seq_lengths"] for length in lengths]

    def _flops_per_token(self, length):
        config = causal_lm(self.model).config
        return flops_per_token(config, length) if self.is_deepseek else None

    # -- loss

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        if not self.is_deepseek:
            inputs.pop("token_mask", None)  # they have no expert balance of ours; `count_tokens` has seen it
        return inputs

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
        nats, right, tokens = self.sum_over_rows(sums).tolist()
        metrics = {"loss": nats / tokens, "token_accuracy": right / tokens, "tokens": int(tokens)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(dataloader.dataset))
