"""What PPO is built of besides the policy: reference and rewards, checked before training; sampler; expert balance."""

import copy

from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import RepeatSampler, create_model_from_path, disable_dropout_in_model, get_config_model_id

from recipes.callbacks import ExpertBalanceCallback, balanced_model
from recipes.reward_functions import ModelReward, checked


def causal_lm(model):
    """The causal LM inside PEFT's wrapper, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _from_path(field, path, load):
    try:
        return load(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{field}={path!r} cannot be loaded: {error}; give an existing folder or Hub name") from error


def build_reference(model, ref_model, args, adapted):
    """The frozen model that KL is measured against, or None where it is not needed: without KL, or with PEFT, where
    the base without its adapter takes the place.

    Args:
        ref_model: a model, a folder or Hub name, or None: a copy of the policy as it is now.
        adapted: whether the policy has an adapter, or is about to get one.
    """
    if not args.kl_coef or (adapted and ref_model is None):
        return None
    if ref_model is None and is_deepspeed_zero3_enabled():  # the policy's weights are shards already
        ref_model = get_config_model_id(model.config)
    if ref_model is None:
        ref_model = copy.deepcopy(model)
    elif isinstance(ref_model, str):
        kwargs = dict(args.model_init_kwargs or {}) | {"trust_remote_code": args.trust_remote_code}
        kwargs.setdefault("dtype", model.dtype)
        ref_model = _from_path("ref_model", ref_model, lambda path: create_model_from_path(path, **kwargs))
    if ref_model is model:
        raise ValueError("ref_model is the policy itself: KL would be 0; leave it out, and a copy is made")
    policy, reference = (each.config.get_text_config().vocab_size for each in (model, ref_model))
    if policy != reference:
        raise ValueError(f"ref_model has a vocabulary of {reference} tokens, the policy {policy}: KL compares tokens")
    disable_dropout_in_model(ref_model)
    return ref_model.eval().requires_grad_(False)


def prepare_frozen(model, trainer):
    """A model that is only read, as the trainer's accelerator wants it."""
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(model, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(model, trainer.accelerator)
    return trainer.accelerator.prepare_model(model, evaluation_mode=True)


def reward_functions(rewards, tokenizers, policy_tokenizer, batch_size, chat_template_kwargs):
    """Reward functions of TRL's signature from callables, models and folder names, their results checked.

    Returns:
        the functions, and those `ModelReward`s among them: their model still has to be placed.
    """
    rewards = list(rewards) if isinstance(rewards, (list, tuple)) else [rewards]
    tokenizers = list(tokenizers) if isinstance(tokenizers, (list, tuple)) else [tokenizers] * len(rewards)
    if len(tokenizers) != len(rewards):
        raise ValueError(f"{len(tokenizers)} reward_processing_classes for {len(rewards)} reward_funcs: one for each")
    functions, models = [], []
    for reward, tokenizer in zip(rewards, tokenizers):
        if isinstance(reward, str):
            reward = _from_path("reward_funcs", reward, AutoModelForSequenceClassification.from_pretrained)
        if isinstance(reward, PreTrainedModel):
            if tokenizer is None:
                path = reward.config._name_or_path
                tokenizer = _from_path("tokenizer of the reward model", path, AutoTokenizer.from_pretrained)
            if reward.config.pad_token_id is None:
                reward.config.pad_token_id = tokenizer.pad_token_id
            reward = ModelReward(
                reward, tokenizer, policy_tokenizer, batch_size=batch_size, chat_template_kwargs=chat_template_kwargs
            )
        if not callable(reward):
            raise ValueError(f"reward_funcs holds {reward!r}; give functions, sequence classifiers or their folders")
        if isinstance(reward, ModelReward):
            models.append(reward)
        functions.append(checked(reward))
    return functions, models


def never_empty(rollout, eos_token_id):
    """The rollout function with an end token in completions that have no token: such a completion ended at once."""

    def call(*args):
        output = rollout(*args)
        empty = [place for place, ids in enumerate(output["completion_ids"]) if not ids]
        completion_ids, log_probs = list(output["completion_ids"]), output.get("logprobs")
        for place in empty:
            completion_ids[place] = [eos_token_id]
            if log_probs is not None:
                log_probs[place] = [0.0]
        return {**output, "completion_ids": completion_ids, "logprobs": log_probs}

    return call


class EpochSampler(RepeatSampler):
    """TRL's sampler with an order that depends on the epoch alone: a resumed run sees the prompts it would have had."""

    def __init__(self, *args, epoch, **kwargs):
        super().__init__(*args, **kwargs)
        self.epoch = epoch

    def __iter__(self):
        if self.shuffle:
            self.generator.manual_seed(self.seed + self.epoch())
        return super().__iter__()


class RolloutBalanceCallback(ExpertBalanceCallback):
    """Moves the routing biases after the last optimizer step of a rollout, or never (`expert_balance`).

    In between they stay as they were when the rollout was sampled and its log-probabilities were taken: the ratio of
    probabilities measures the update, and not a change of the routing.
    """

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if (state.global_step + 1) % (args.num_ppo_epochs * args.num_mini_batches):
            return  # the counts add up
        if args.expert_balance == "update":
            super().on_optimizer_step(args, state, control, model=model, optimizer=optimizer, **kwargs)
        else:
            balanced_model(model).update_expert_bias(speed=0.0)
