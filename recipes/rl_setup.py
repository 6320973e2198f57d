"""What PPO and GRPO are built of besides the policy: reference, rewards, prompts' limits, sampler, expert balance."""

import contextlib
import copy

from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import (
    RepeatSampler,
    create_model_from_path,
    disable_dropout_in_model,
    get_config_model_id,
)

from modeling_deepseek_r1.expert_parallel import parallelise_experts
from modeling_deepseek_r1.expert_parallel_state import expert_parameters
from modeling_deepseek_r1.moe import DeepSeekR1MoE
from recipes.callbacks import ExpertBalanceCallback, balanced_model, leave_to_each_process
from recipes.reward_functions import ModelReward, checked
from recipes.reward_scoring import load_reward_model
from recipes.zero_setup import ready_for_zero


def causal_lm(model):
    """The causal LM inside PEFT's wrapper, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def load_named(field, path, load):
    """`load(path)`; its failure as a ValueError that names the field."""
    try:
        return load(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{field}={path!r} cannot be loaded: {error}; give an existing folder or Hub name") from error


def load_causal_lm(path, args, **defaults):
    """A causal LM as `args.model_init_kwargs` want it. Each of several processes loads all of it: no device map."""
    kwargs = defaults | {"trust_remote_code": args.trust_remote_code} | dict(args.model_init_kwargs or {})
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    return create_model_from_path(path, **kwargs)


def share_experts(model, policy):
    """Splits the experts of `model`, if it has some, over the processes that share those of `policy`, if any do."""
    split = next(iter(expert_parameters(policy)), None)
    if split is not None and any(isinstance(module, DeepSeekR1MoE) for module in model.modules()):
        parallelise_experts(model, split.expert_parallel_group, split.expert_replica_group)


def build_reference(model, ref_model, args, adapted, wanted):
    """The frozen model that KL is measured against, or None where it is not needed: without KL, or with PEFT, where
    the base without its adapter takes the place.

    Args:
        ref_model: a model, a folder or Hub name, or None: a copy of the policy as it is now.
        adapted: whether the policy has an adapter, or is about to get one.
        wanted: whether there is a KL to measure.
    """
    if not wanted or (adapted and ref_model is None):
        return None
    if ref_model is None and is_deepspeed_zero3_enabled():  # the policy's weights are shards already
        ref_model = get_config_model_id(model.config)
    if ref_model is None:
        ref_model = copy.deepcopy(model)
    elif isinstance(ref_model, str):
        ref_model = load_named("ref_model", ref_model, lambda path: load_causal_lm(path, args, dtype=model.dtype))
        share_experts(ref_model, model)
    if ref_model is model:
        raise ValueError("ref_model is the policy itself: KL would be 0; leave it out, and a copy is made")
    policy, reference = (each.config.get_text_config().vocab_size for each in (model, ref_model))
    if policy != reference:
        raise ValueError(f"ref_model has a vocabulary of {reference} tokens, the policy {policy}: KL compares tokens")
    disable_dropout_in_model(ref_model)
    return ref_model.eval().requires_grad_(False)


def prompt_budget(args, config, train_dataset):
    """The longest prompt in tokens, or None. Raises ValueError for too few prompts, or too long a completion."""
    prompts = args.generation_batch_size // args.num_generations
    if hasattr(train_dataset, "__len__") and len(train_dataset) < prompts:
        raise ValueError(
            f"{len(train_dataset)} prompts are fewer than the {prompts} of a rollout: lower "
            "per_device_train_batch_size, gradient_accumulation_steps or the mini-batches of a rollout, or raise "
            "num_generations"
        )
    context = getattr(config, "max_position_embeddings", None)
    if context is None:
        return args.max_prompt_length
    budget = context - args.max_completion_length
    if budget < 1 or (args.max_prompt_length or 1) > budget:
        raise ValueError(
            f"max_completion_length={args.max_completion_length} and max_prompt_length={args.max_prompt_length} exceed "
            f"the model's context of {context} tokens; lower one of them"
        )
    return args.max_prompt_length or budget


@contextlib.contextmanager
def same_trained(model):
    """After it the same weights are trained as before: PEFT, once an adapter was off, trains frozen parts of it too."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)


@contextlib.contextmanager
def without_adapter(model):
    """The base of a PEFT model for the time being."""
    with same_trained(model), model.disable_adapter():
        yield


def prepare_frozen(model, trainer, shard=True):
    """A model that is only read, as the trainer's accelerator wants it; `shard`: spread over the processes by FSDP."""
    if trainer.is_deepspeed_enabled:
        ready_for_zero(model, trainer.accelerator)
        return prepare_deepspeed(model, trainer.accelerator)
    if trainer.is_fsdp_enabled and shard:  # as the policy, so that both compute alike
        own = hasattr(trainer, "shards") and trainer.shards(model)
        return model if own else prepare_fsdp(model, trainer.accelerator)
    return trainer.accelerator.prepare_model(model, evaluation_mode=True, device_placement=True)


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
            reward, own = load_named("reward_funcs", reward, load_reward_model)
            tokenizer = own if tokenizer is None else tokenizer
        if isinstance(reward, PreTrainedModel):
            if tokenizer is None:
                path = reward.config._name_or_path
                tokenizer = load_named("tokenizer of the reward model", path, AutoTokenizer.from_pretrained)
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
        if "completion_ids" not in output:
            return output  # GRPOTrainer says what is missing
        empty = {place for place, ids in enumerate(output["completion_ids"]) if not len(ids)}
        output, new = dict(output), {"completion_ids": eos_token_id, "logprobs": 0.0, "env_mask": 1}
        for name in new.keys() & output.keys():
            if output[name] is not None:
                output[name] = [[new[name]] if place in empty else row for place, row in enumerate(output[name])]
        return output

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


def optimizer_steps_of_rollout(args):
    """Optimizer steps from one rollout to the next."""
    return max(1, args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps)


class RolloutBalanceCallback(ExpertBalanceCallback):
    """Moves the routing biases after the last optimizer step of a rollout, or never (`expert_balance`).

    In between they stay as they were when the rollout was sampled and its log-probabilities were taken: the ratio of
    probabilities measures the update, and not a change of the routing. A separate value model is balanced alike.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for part in balanced_parts(model):
            super().on_train_begin(args, state, control, model=part, **kwargs)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        for part in balanced_parts(model):
            super().on_step_begin(args, state, control, model=part, **kwargs)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if (state.global_step + 1) % optimizer_steps_of_rollout(args):
            return  # the counts add up
        for part in balanced_parts(model):
            if args.expert_balance == "update":
                super().on_optimizer_step(args, state, control, model=part, **kwargs)
            else:
                part.update_expert_bias(speed=0.0)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        for part in balanced_parts(model):
            super().on_train_end(args, state, control, model=part, **kwargs)


def count_alone(model):
    """`leave_to_each_process`, for a model that now has a value model in it too."""
    if hasattr(model, "_ddp_params_and_buffers_to_ignore"):
        leave_to_each_process(model)


def balanced_parts(model):
    """The DeepSeek models inside `model` whose experts are balanced: the policy and a value model of its own."""
    policy = balanced_model(model)
    trunk = getattr(getattr(policy, "value_head", None), "trunk", None)
    return [policy, trunk] if hasattr(type(trunk), "update_expert_bias") else [policy]
