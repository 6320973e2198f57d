"""The trainers of reward models: TRL's RewardTrainer for pairs, transformers' Trainer for steps; exact evaluation."""

import torch
from accelerate.utils import gather_object
from torch.nn import functional as F
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput
from trl import RewardTrainer

from recipes.recipe_trainer import RecipeTrainerMixin
from recipes.reward_functions import score_ids
from recipes.reward_metrics import preference_metrics, process_metrics
from recipes.reward_scoring import step_probabilities


def bradley_terry(chosen, rejected, margin=None):
    """() mean over the pairs of -log sigmoid(r_c - r_r - margin), in nats; rewards and margin (B,) float.

    Source: InstructGPT (arXiv:2203.02155), Eq. 1; the margin: Llama 2 (arXiv:2307.09288), Eq. 2.
    """
    difference = chosen - rejected
    return -F.logsigmoid(difference if margin is None else difference - margin).mean()


def centring(chosen, rejected):
    """() mean of (r_c + r_r)^2, which fixes the constant that pairs leave open. Source: arXiv:2312.09244, Eq. 2."""
    return (chosen + rejected).square().mean()


def step_loss(logits, labels):
    """() sum over the labelled tokens of the cross-entropy, in nats: logits (B, S, 2), labels (B, S), -100 ignored."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")


class RewardMixin(RecipeTrainerMixin):
    """What both trainers share: figures over an interval as exact sums, held-out rows shared by the processes.

    `held_out`: the figures of the last evaluation, `held_out_scores` their rewards, in the order of the rows.
    """

    held_out = held_out_scores = None

    def start_sums(self, names):
        """`names`: of the running sums; the last is the number that the others are divided by."""
        self._sum_names, self._sums = names, torch.zeros(len(names), dtype=torch.float64, device=self.args.device)
        self.start_metering()
        rows, needed = len(self.train_dataset), self.args.per_device_train_batch_size * self.args.world_size
        if self.args.dataloader_drop_last and rows < needed:
            raise ValueError(
                f"{rows} training rows fill no batch: per_device_train_batch_size="
                f"{self.args.per_device_train_batch_size} times {self.args.world_size} processes is {needed}; lower "
                "it, or set dataloader_drop_last=false"
            )

    @torch.no_grad()
    def add_sums(self, *values):
        if self.model.training:
            self._sums += torch.stack([torch.as_tensor(value, device=self._sums.device).double() for value in values])

    def _interval_metrics(self, loss):
        metrics = super()._interval_metrics(loss)
        *sums, count = self.accelerator.reduce(self._sums, "sum").tolist()
        self._sums.zero_()
        if count:
            metrics |= {name: value / count for name, value in zip(self._sum_names, sums)}
        return metrics

    def count_tokens(self, batch):
        return batch["attention_mask"].sum()

    def get_eval_dataloader(self, eval_dataset=None):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluation needs held-out rows: set validation_fraction > 0, or eval_strategy=no")
        return self.strided_eval_dataloader(dataset)

    def scores_of(self, rows):
        """Rewards of all rows of a data set, in their order; every process computes its share and gets all."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        most = -(-len(rows) // world)
        share = [rows[min(place, len(rows) - 1)] for place in range(rank, most * world, world)]
        self.model.eval()  # the next training step sets it back
        with self.compute_loss_context_manager():
            found = gather_object(self.score_rows(share))
        return [found[place % world * most + place // world] for place in range(len(rows))]

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        rows = dataloader.dataset.rows
        self.held_out_scores = self.scores_of(rows)
        self.held_out = self.figures(self.held_out_scores, rows)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.summary(self.held_out).items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(rows))


class RecipeRewardTrainer(RewardMixin, RewardTrainer):
    """`RewardTrainer` on encoded pairs (recipes/reward_data.py): the loss above, in full precision at the head."""

    def __init__(self, model, args, **kwargs):
        super().__init__(model=model, args=args, **kwargs)
        self.start_sums(["accuracy", "margin", "mean_reward", "pairs"])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        chosen, rejected = outputs.logits.float().squeeze(-1).chunk(2)
        loss = bradley_terry(chosen, rejected, inputs.get("margin"))
        if self.args.center_rewards_coefficient:
            loss = loss + self.args.center_rewards_coefficient * centring(chosen, rejected)
        difference = chosen - rejected
        right = ((difference.sign() + 1) / 2).sum()
        self.add_sums(right, difference.sum(), (chosen + rejected).sum() / 2, len(chosen))
        return (loss, outputs) if return_outputs else loss

    def score_rows(self, rows):
        ids = [row[side] for row in rows for side in ("chosen_ids", "rejected_ids")]
        rewards = score_ids(self.model, ids, 2 * self.args.eval_batch_size)
        return list(zip(rewards[::2], rewards[1::2]))

    def figures(self, scores, rows):
        margins = rows["margin"] if "margin" in rows.column_names else 0.0
        columns = (list(rows[name]) for name in ("chosen_tokens", "rejected_tokens", "problem", "source", "kind"))
        return preference_metrics(*zip(*scores), *columns, margins, self.args.center_rewards_coefficient or 0.0)

    @staticmethod
    def summary(figures):
        return {"loss": figures["loss"], "accuracy": figures["accuracy"]["value"], "margin": figures["margin"]["mean"]}


class StepCollator:
    """Pads `input_ids` and `step_labels` on the right; the latter become `labels`."""

    def __init__(self, pad_token_id, pad_to_multiple_of=None):
        self.pad_token_id, self.multiple = pad_token_id, pad_to_multiple_of or 1

    def __call__(self, rows):
        length = -(-max(len(row["input_ids"]) for row in rows) // self.multiple) * self.multiple

        def pad(values, fill):
            return values + [fill] * (length - len(values))

        return {
            "input_ids": torch.tensor([pad(row["input_ids"], self.pad_token_id) for row in rows]),
            "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows]),
            "labels": torch.tensor([pad(row["step_labels"], -100) for row in rows]),
        }


class ProcessRewardTrainer(RewardMixin, Trainer):
    """Trains a token classifier at the last token of each step; the loss is the mean over an optimizer step's steps."""

    loss_is_scaled_for_ga = True

    def __init__(self, model, args, processing_class, **kwargs):
        collator = StepCollator(processing_class.pad_token_id, args.pad_to_multiple_of)
        super().__init__(model=model, args=args, processing_class=processing_class, data_collator=collator, **kwargs)
        self.model_accepts_loss_kwargs = True  # whatever the model's forward takes, the loss here does
        self.start_sums(["accuracy", "steps"])

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["input_ids", "step_labels"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        labels, kept = inputs["labels"], inputs["labels"] != -100
        items, factor = num_items_in_batch, 1.0
        if items is None:
            items = kept.sum()
        elif self.args.average_tokens_across_devices:
            factor = self.accelerator.num_processes  # DDP takes the mean
        loss = step_loss(outputs.logits, labels) * factor / items
        self.add_sums((outputs.logits.argmax(-1) == labels)[kept].sum(), kept.sum())
        return (loss, outputs) if return_outputs else loss

    def score_rows(self, rows):
        places = [[place for place, label in enumerate(row["step_labels"]) if label != -100] for row in rows]
        return step_probabilities(self.model, [row["input_ids"] for row in rows], places, self.args.eval_batch_size)

    def figures(self, scores, rows):
        labels = [[label for label in row if label != -100] for row in rows["step_labels"]]
        return process_metrics(scores, labels, list(rows["problem"]), list(rows["source"]))

    @staticmethod
    def summary(figures):
        return {"loss": figures["loss"], "accuracy": figures["accuracy"]["value"]}
