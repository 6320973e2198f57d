"""The callback that balances the experts under any trainer of transformers or TRL."""

import logging

from transformers import TrainerCallback

from modeling_deepseek_r1.expert_parallel import is_expert_parallel

logger = logging.getLogger(__name__)


def balanced_model(model):
    """The module inside `model` (a wrapper such as DDP or PEFT's, or the model itself) that balances its experts.

    Raises ValueError if there is none.
    """
    for module in model.modules():
        # On the class: a wrapper like PEFT's forwards reads of attributes, but would keep what is written.
        if hasattr(type(module), "update_expert_bias"):
            return module
    raise ValueError(
        f"ExpertBalanceCallback found no DeepSeek-R1 model in {type(model).__name__}; use it only with one"
    )


class ExpertBalanceCallback(TrainerCallback):
    """Keeps the load of the experts even while a HF or TRL trainer trains.

    Once per optimizer step it moves the routing bias (DeepSeek-V3, arXiv:2412.19437, Sec. 2.1.2), and before each step
    it sets the factor on the injected balance-loss gradient to loss scale / micro-batches of the step, so that this
    gradient is the mean over the step's micro-batches whatever their number and under an fp16 loss scaler.

    A step that an fp16 scaler skips drops its counts. Where no router is trained (adapters on other layers), the
    biases stay as they are and the load is only measured: an adapter file does not carry biases, and the model without
    its adapter must remain the base model. Where the training data have no length, the factor of a last,
    incomplete group of micro-batches is that of a complete one.
    """

    def on_init_end(self, args, state, control, model=None, **kwargs):
        # On the outermost module, which is the one DDP looks at; a wrapper changes the buffers' names.
        config = balanced_model(model).config
        smoothing = getattr(args, "label_smoothing_factor", 0.0)
        if smoothing and smoothing != config.label_smoothing:
            logger.warning(
                "label_smoothing_factor=%s makes the trainer compute the loss itself, with all logits in memory and "
                "without MTP; set config.label_smoothing=%s and leave label_smoothing_factor at 0",
                smoothing,
                smoothing,
            )
        counts = [name for name, _ in model.named_buffers() if name.endswith("load_counts")]
        split = [name for name, parameter in model.named_parameters() if is_expert_parallel(parameter)]
        model._ddp_params_and_buffers_to_ignore = counts + split

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model = balanced_model(model)
        padding_free = getattr(args, "padding_free", False) or getattr(args, "packing", False)
        getattr(model, model.base_model_prefix, model).balance_per_document = bool(padding_free)
        model.discard_expert_counts()
        if model.routers and not trains_routers(model):
            logger.warning("no router is trained: routing biases stay as they are, the expert load is only measured")

    def on_step_begin(self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs):
        scaler = getattr(optimizer, "scaler", None)
        loss_scale = scaler.get_scale() if scaler is not None else 1.0
        micro_batches = micro_batches_of_step(args, state, train_dataloader)
        balanced_model(model).balance_loss_scale = loss_scale / micro_batches

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        model = balanced_model(model)
        if getattr(optimizer, "step_was_skipped", False):
            model.discard_expert_counts()
        else:
            model.update_expert_bias(speed=None if trains_routers(model) else 0.0)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        balanced_model(model).balance_loss_scale = 1.0


def trains_routers(model):
    """Whether any router's weight is trained."""
    return any(router.weight.requires_grad for router in model.routers.values())


def micro_batches_of_step(args, state, train_dataloader):
    """Number of micro-batches in the coming optimizer step: fewer than configured at the end of an epoch."""
    accumulation = args.gradient_accumulation_steps
    try:
        in_epoch = len(train_dataloader)
    except TypeError:  # an iterable data set has no length
        return accumulation
    steps_in_epoch = max(-(-in_epoch // accumulation), 1)
    last = state.global_step % steps_in_epoch == steps_in_epoch - 1
    return (in_epoch - accumulation * (steps_in_epoch - 1)) if last else accumulation
