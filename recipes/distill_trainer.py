"""The trainers of distillation: on the teacher's logits for given traces, and on the student's own completions."""

import torch
from trl import DistillationTrainer

from recipes.distill_features import FeatureProjections, ProjectionCallback, layer_pairs
from recipes.distill_forward import add_distillation_forward, check_head, decoder_layers, teacher_states
from recipes.distill_losses import combined_loss
from recipes.distill_students import check_same_head
from recipes.recipe_trainer import RecipeTrainerMixin, RolloutMeterMixin
from recipes.rl_setup import EpochSampler, count_alone, never_empty, prepare_frozen
from recipes.sft_trainer import RecipeSFTTrainer, causal_lm, examples_see_each_other


def freeze_prediction_layers(model):
    """Multi-token-prediction layers out of training: a teacher's distribution is one of the next token."""
    if hasattr(causal_lm(model), "freeze_mtp"):
        causal_lm(model).freeze_mtp()


class RecipeLogitsTrainer(RecipeSFTTrainer):
    """`RecipeSFTTrainer` whose loss compares the student with a teacher on the same tokens (recipes/distill_losses.py).

    loss = alpha T^2 KL + (1 - alpha) cross-entropy + feature_coef x feature loss, each the mean over the tokens that
    are trained. Multi-token-prediction layers are frozen. The maps of feature matching are trained with the student's
    learning rate and not saved with it. Every process holds the whole teacher.

    Raises:
        ValueError: for models whose logits are not head(last hidden states), and for packed rows whose examples the
            teacher does not keep apart.
    """

    def __init__(self, model, args, teacher, callbacks=(), **kwargs):
        student = causal_lm(model)
        freeze_prediction_layers(model)
        check_same_head(args, student.config, teacher.config)
        for each, which in ((student, "student"), (teacher, "teacher")):
            check_head(each, which)
        self.projections, pairs, callbacks = None, [], list(callbacks)
        if args.feature_coef:
            depths = (len(decoder_layers(each)) for each in (student, teacher))
            pairs = layer_pairs(args.feature_layers, *depths)
            widths = (each.config.get_text_config().hidden_size for each in (student, teacher))
            self.projections = FeatureProjections(pairs, *widths)
            callbacks.append(ProjectionCallback(self.projections))
        self.feature_places = [teacher_place for _, teacher_place in pairs]
        super().__init__(model, args, callbacks=callbacks, **kwargs)
        if self.aux_loss_enabled:
            raise ValueError("router_aux_loss_coef has no place in method=logits: set it to 0")
        add_distillation_forward(student, [place for place, _ in pairs])
        self.teacher_model = prepare_frozen(teacher, self, shard=False)
        self.wrapped_projections = self.projections
        if self.projections is not None:
            self.projections.to(args.device)
            if any(True for _ in self.projections.parameters()):
                if self.is_fsdp_enabled:
                    raise ValueError(f"feature_coef={args.feature_coef}: under FSDP the maps between the widths of "
                                     "student and teacher would not be trained; use 0, or ddp.yaml")  # fmt: skip
                self.wrapped_projections = self.accelerator.prepare_model(self.projections)
        if self.padding_free and not hasattr(teacher, "routers") and examples_see_each_other(self.teacher_model):
            raise ValueError(
                f"packing=true: in the teacher, a {teacher.config.model_type} model, the examples of a row see each "
                "other; set packing=false"
            )
        self._sums = torch.zeros(5, dtype=torch.float64, device=args.device)

    def _flops_per_token(self, length):
        return None  # the teacher's are not the student's: no MFU

    def create_optimizer(self, *args, **kwargs):
        """The maps of feature matching in a group of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        known = {id(each) for group in optimizer.param_groups for each in group["params"]}
        maps = list(self.projections.parameters()) if self.projections is not None else []
        if maps and id(maps[0]) not in known:
            optimizer.add_param_group({"params": maps, "weight_decay": self.args.weight_decay})
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        args = self.args
        with self.accelerator.autocast():
            target = teacher_states(self.teacher_model, inputs, self.feature_places, args.temperature)
        found = model(**inputs, teacher=target)
        loss = combined_loss(found["divergence"], found["cross_entropy"], args.alpha, args.temperature)
        features = torch.zeros_like(loss)
        if self.projections is not None:
            features = self.wrapped_projections(found["features"], target.features)
            loss = loss + args.feature_coef * features
        tokens = loss.new_tensor(len(target.hidden))
        parts = (found["divergence"], found["cross_entropy"], found["correct"], features, tokens)
        self._sums += torch.stack([part.detach().double() for part in parts])
        if num_items_in_batch is None:
            loss = loss / tokens.clamp_min(1)
        else:
            loss = loss / torch.as_tensor(num_items_in_batch, device=loss.device).clamp_min(1)
            if args.average_tokens_across_devices:
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())  # DDP takes the mean
        return (loss, found) if return_outputs else loss

    def _interval_metrics(self, loss):
        sums = self.accelerator.reduce(self._sums, "sum").tolist()
        self._sums.zero_()
        tokens = max(sums[4], 1)
        names = ("kl", "next_token_loss", "mean_token_accuracy", "feature_loss")
        found = {name: value / tokens for name, value in zip(names, sums)}
        if self.projections is None:
            del found["feature_loss"]
        return super()._interval_metrics(loss) | found


class RecipeDistillationTrainer(RolloutMeterMixin, RecipeTrainerMixin, DistillationTrainer):
    """TRL's `DistillationTrainer` (on-policy distillation, arXiv:2306.13649) in a run folder.

    What it adds: checkpoints that survive a kill and resume exactly, tokens/s of prompts and completions, frozen
    multi-token-prediction layers, completions that are never empty, prompts whose order depends on the epoch alone.
    Sampling and loss use the same `temperature`. No completion is used in more than one optimizer step.
    """

    def __init__(self, model, args, teacher, **kwargs):
        freeze_prediction_layers(model)
        check_same_head(args, causal_lm(model).config, teacher.config)
        if args.use_vllm and hasattr(causal_lm(model), "routers"):
            raise ValueError(
                "use_vllm=true: TRL sends parameters by this package's names, which vLLM's DeepSeek model does not "
                "know; leave it out, or distil into a dense student"
            )
        given, args.teacher_model_init_kwargs = args.teacher_model_init_kwargs, None  # the teacher is there
        init_kwargs, args.model_init_kwargs = args.model_init_kwargs, None  # and so is the student
        try:
            super().__init__(model=model, args=args, teacher_model=teacher, **kwargs)
        finally:
            args.teacher_model_init_kwargs, args.model_init_kwargs = given, init_kwargs
        if self.is_fsdp_enabled:
            raise ValueError("method=on_policy keeps the whole teacher on each device and samples from the student: "
                             "launch it without FSDP")  # fmt: skip
        count_alone(self.model)
        self.start_metering()

    def compute_loss(self, model, inputs, *args, **kwargs):
        with self.accelerator.autocast():
            return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluate(self, *args, **kwargs):
        """The same random numbers in every evaluation, whatever was drawn before; training's go on as if there had
        been none."""
        device = self.args.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.args.seed + self.args.process_index)
            return super().evaluate(*args, **kwargs)

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        return EpochSampler(
            sampler.data_source, sampler.mini_repeat_count, sampler.batch_size, sampler.repeat_count, sampler.shuffle,
            sampler.seed, epoch=lambda: int(self.state.epoch or 0),
        )  # fmt: skip

    def _generate_single_turn(self, *args, **kwargs):
        with self.accelerator.autocast():
            ids = super()._generate_single_turn(*args, **kwargs)
        return never_empty(lambda: {"completion_ids": ids}, self.eos_token_ids[0])()["completion_ids"]

    def log(self, logs, start_time=None):
        self._metrics["train" if self.model.training else "eval"].pop("num_tokens", None)  # we log `tokens`
        super().log(logs, start_time)
