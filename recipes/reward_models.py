"""Reward models from settings: a head on a causal LM, or a saved reward model to go on with."""

import contextlib
import logging
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from recipes.model_loading import load_causal_lm

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardKind:
    """What a kind of reward model is made of; `architecture`: how its class's name ends in config.json."""

    auto_class: type
    num_labels: int
    architecture: str
    task_type: str


KINDS = {
    "preference": RewardKind(AutoModelForSequenceClassification, 1, "ForSequenceClassification", "SEQ_CLS"),
    # Labels: 0 wrong, 1 right.
    "process": RewardKind(AutoModelForTokenClassification, 2, "ForTokenClassification", "TOKEN_CLS"),
}


def check_head(name, config, kind, replace=False):
    """Whether the weights called `name` bring the head that `kind` (a key of KINDS) needs.

    Args:
        replace: whether the other kind's head will do, since a new one takes its place.
    Raises:
        ValueError: if they bring another one.
    """
    wanted = KINDS[kind]
    found = next(iter(config.architectures or ()), "")
    if not found.endswith("Classification"):
        return False
    if replace and any(found.endswith(other.architecture) for key, other in KINDS.items() if key != kind):
        return False
    if not found.endswith(wanted.architecture):
        raise ValueError(
            f"{name} is a {found}; kind={kind} needs a ...{wanted.architecture} or a causal LM: choose another kind, "
            "or start from the model that it was made from"
        )
    if config.num_labels != wanted.num_labels:
        raise ValueError(
            f"{name} is a classifier with num_labels={config.num_labels}; kind={kind} needs {wanted.num_labels}: start "
            "from its base model, or from a reward model"
        )
    return True


def _in_float32(head, inputs, output):
    """Forward hook: under bf16 autocast a reward of 20 would be known to 0.06, and close pairs would tie."""
    with torch.autocast(inputs[0].device.type, enabled=False):
        bias = None if head.bias is None else head.bias.float()
        return F.linear(inputs[0].float(), head.weight.float(), bias)


def full_precision_head(model):
    """Makes the last linear layer with `num_labels` outputs compute in float32, whatever surrounds it."""
    heads = [
        module for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels
    ]  # fmt: skip
    if not heads:
        raise ValueError(
            f"{type(model).__name__} has no linear layer with num_labels={model.config.num_labels} outputs: it is no "
            "classifier with a linear head"
        )
    if _in_float32 not in heads[-1]._forward_hooks.values():
        heads[-1].register_forward_hook(_in_float32)
    return model


@contextlib.contextmanager
def _held_back(name):
    """Yields a list of the log records of the logger `name`, which it does not show."""
    records, logger_ = [], logging.getLogger(name)
    keep = lambda record: bool(records.append(record))  # False: not shown
    logger_.addFilter(keep)
    try:
        yield records
    finally:
        logger_.removeFilter(keep)


class HeadLoader:
    """In place of an Auto class: its report of what the weights lack is shown only if that is more than a head."""

    def __init__(self, auto_class):
        self.auto_class = auto_class

    def from_pretrained(self, name, **kwargs):
        lacking = ["the loading failed"]
        with _held_back("transformers.modeling_utils") as records:
            try:
                model, info = self.auto_class.from_pretrained(
                    name, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
                )
                body = f"{model.base_model_prefix}."
                lacking = [key for key in info["missing_keys"] if key.startswith(body)]
                wrong = [str(key[0]) for key in info["mismatched_keys"] if str(key[0]).startswith(body)]
                if wrong:
                    raise ValueError(f"{name}: weights of another shape than its config says: {', '.join(wrong[:4])}")
            finally:
                shown = [record for record in records if lacking or "LOAD REPORT" not in record.getMessage()]
        for record in shown:
            logging.getLogger(record.name).handle(record)
        return model


def load_for_training(args, tokenizer):
    """The model of `model_name_or_path` with the head of `args.kind`; a head that is new is said to be.

    Raises:
        ValueError: for another head; see `load_causal_lm` for the rest.
    """
    name, kind = args.model_name_or_path, KINDS[args.kind]
    found = AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    has_head = check_head(name, found, args.kind, replace=True)
    model = load_causal_lm(args, tokenizer, auto_class=HeadLoader(kind.auto_class), num_labels=kind.num_labels)
    config = model.config.get_text_config()
    if not has_head:
        logger.warning("%s brings no head of kind=%s: its reward head is new, with seed %d", name, args.kind, args.seed)
    if getattr(config, "num_nextn_predict_layers", 0) and hasattr(model, "routers"):
        logger.warning("the multi-token-prediction layers are left out: a reward model predicts no tokens")
        config.num_nextn_predict_layers = 0
    if tokenizer.pad_token_id == tokenizer.eos_token_id and not hasattr(model, "routers"):
        logger.warning(
            "pad_token is the end token %r: %s may take the token before it for a completion's last one; a pad_token "
            "of its own is better", tokenizer.eos_token, type(model).__name__,
        )  # fmt: skip
    config.pad_token_id = tokenizer.pad_token_id
    config.use_cache = False  # each sequence is read once
    return full_precision_head(model)
