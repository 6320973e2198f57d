"""The reward functions that a run's settings name: rules, a user's own functions, reward models."""

from pathlib import Path

from recipes.reward_functions import ModelReward
from recipes.reward_scoring import load_reward_model
from recipes.rewards import REWARDS, get_rewards, is_function_path, run_settings


def _is_reward_model(name):
    """A folder, or org/name of the Hub; rules go first: a folder called `format` in the working directory is none."""
    if name in REWARDS or is_function_path(name):
        return False
    return "/" in name or Path(name).expanduser().is_dir()


def _model_reward(name, args, policy_tokenizer):
    folder = Path(name).expanduser()
    try:
        model, tokenizer = load_reward_model(str(folder), trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the reward model {name} cannot be loaded: {error}; recipes/reward.py trains one and saves its tokenizer "
            "beside it"
        ) from error
    return ModelReward(
        model, tokenizer, policy_tokenizer, batch_size=args.reward_batch_size, name=folder.resolve().name,
        chat_template_kwargs=args.chat_template_kwargs, normalise=args.normalise_rewards,
    )  # fmt: skip


def build_rewards(args, policy_tokenizer):
    """Reward functions for `args.all_rewards`, in that order: rules, functions and `ModelReward`s.

    Raises:
        ValueError: for an unknown name, settings of a reward that is not there, a reward model that cannot be used.
    """
    names = args.all_rewards
    settings = run_settings(
        names, args.reward_kwargs, policy_tokenizer, args.max_completion_length, args.chat_template_kwargs
    )
    rules = [name for name in names if not _is_reward_model(name)]
    rules = dict(zip(rules, get_rewards(rules, settings)))
    rewards = [rules[name] if name in rules else _model_reward(name, args, policy_tokenizer) for name in names]
    labels = [reward.__name__ for reward in rewards]
    if len(set(labels)) < len(labels):
        raise ValueError(f"rewards have the same names in the log: {', '.join(labels)}; rename a function or folder")
    return rewards
