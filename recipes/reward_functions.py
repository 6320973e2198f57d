"""What stands between a trainer and its reward functions: their results checked, and reward models as functions.

    rewards = [checked(function) for function in get_rewards(["accuracy"])]
    rewards += [checked(ModelReward(model, tokenizer, policy_tokenizer, name="reward_tiny"))]
"""

import contextlib
import functools
import math
import numbers
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from trl.data_utils import is_conversational
from trl.trainer.utils import get_callable_name, is_async_callable

from recipes.conversations import CLOSE, OPEN
from recipes.rewards import completion_text

# ---------------------------------------------------------------- checked results


def _shorten(value, width=200):
    text = str(value).replace("\n", "\\n")
    return text if len(text) <= width else text[: width - 3] + "..."


def _failure(name, arguments, error):
    """The ValueError for an exception inside of a reward function: where it was, and on what."""
    state = arguments.get("trainer_state")
    step = "" if state is None else f" at step {state.global_step}"
    prompt, completion = ((arguments.get(part) or ["none"])[0] for part in ("prompts", "completions"))
    return ValueError(
        f"the reward function {name!r} raised {type(error).__name__}{step}: {error}. The first prompt was "
        f"{_shorten(prompt)!r}, its completion {_shorten(completion)!r}"
    )


def _as_number(name, position, value):
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        kind = "" if isinstance(value, numbers.Real) else f" ({type(value).__name__})"
        raise ValueError(
            f"the reward function {name!r} returned {_shorten(repr(value), 80)}{kind} for completion {position}; a "
            "reward is a finite number: return None for a completion it cannot judge"
        )
    return float(value)


def check_rewards(name, values, count):
    """The values of a reward function as a list of floats and None.

    Raises:
        ValueError: for another count, no number, NaN or infinity, naming function, position, value and way out.
    """
    if isinstance(values, torch.Tensor) or hasattr(values, "tolist"):  # numpy arrays too
        values = values.tolist()
    if values is None or not isinstance(values, (list, tuple)):
        raise ValueError(
            f"the reward function {name!r} returned {_shorten(repr(values), 80)} ({type(values).__name__}); it must "
            "return a list with one number for each completion"
        )
    if len(values) != count:
        raise ValueError(
            f"the reward function {name!r} returned {len(values)} rewards for {count} completions; return one for "
            "each, in their order, and None for a completion it cannot judge"
        )
    return [None if value is None else _as_number(name, place, value) for place, value in enumerate(values)]


def checked(function):
    """The function (or coroutine function) with its results checked and its exceptions explained; same name."""
    name = get_callable_name(function)

    def finish(values, arguments):
        return check_rewards(name, values, len(arguments["completions"]))

    if is_async_callable(function):

        async def call(**arguments):
            try:
                values = await function(**arguments)
            except Exception as error:
                raise _failure(name, arguments, error) from error
            return finish(values, arguments)
    else:

        def call(**arguments):
            try:
                values = function(**arguments)
            except Exception as error:
                raise _failure(name, arguments, error) from error
            return finish(values, arguments)

    call = functools.wraps(function, updated=())(call)
    call.__name__ = name
    return call


# ---------------------------------------------------------------- reward models


@torch.inference_mode()
def score_ids(model, rows, batch_size):
    """Scores (a list of floats) of token sequences, in their order.

    Rows of like length are scored together, padded on the right and masked: with causal attention no score depends on
    what else is in its batch.
    """
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
    scores, pad = [0.0] * len(rows), getattr(model, "module", model).config.pad_token_id  # module: DeepSpeed's engine
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        longest = len(rows[places[0]])
        ids = torch.full((len(places), longest), 0 if pad is None else pad)
        mask = torch.zeros_like(ids)
        for line, place in enumerate(places):
            ids[line, : len(rows[place])] = torch.tensor(rows[place])
            mask[line, : len(rows[place])] = 1
        ids, mask = send_to_device((ids, mask), next(model.parameters()).device)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, 0].float()
        for place, value in zip(places, logits.tolist()):
            scores[place] = value
    return scores


def _check_reward_model(name, model, tokenizer):
    config = model.config
    if config.num_labels != 1:
        raise ValueError(
            f"the reward model {name} has num_labels={config.num_labels}, but a reward is one number; train one with "
            "recipes/reward.py, or wrap a classifier in a reward function that says which label counts"
        )
    rows = model.get_input_embeddings().num_embeddings
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ValueError(
            f"the tokenizer of the reward model {name} has ids up to {largest}, its embedding only {rows} rows; it is "
            "not the tokenizer that the model was trained with"
        )
    if config.pad_token_id is None:
        raise ValueError(
            f"the reward model {name} has no pad_token_id, so that it cannot tell padding from text in a batch; set "
            "model.config.pad_token_id and save it"
        )


class ModelReward:
    """A reward model as a reward function of TRL's signature: the logit of a sequence classifier with one label.

    If policy and reward model share a vocabulary, it reads the policy's prompt and the sampled ids exactly: a
    completion that was cut off has no end token. Otherwise the text is rendered with the reward model's own chat
    template, reasoning included.

    `PPOTrainer` places `model` (`rl_setup.prepare_frozen`: whole on every process) and sets `accelerator`, for
    its precision; without a trainer the model computes where and as it is.

    Args:
        chat_template_kwargs: what the policy's prompts are rendered with.
        normalise: (reward - mean) / std by the config's `reward_mean` and `reward_std` (recipes/reward.py).
    Raises:
        ValueError: for more than one label, a tokenizer that does not fit the model, conversational prompts without a
            chat template.
    """

    def __init__(
        self, model, tokenizer, policy_tokenizer, batch_size=64, name=None, chat_template_kwargs=None, normalise=False,
    ):  # fmt: skip
        self.__name__ = name or Path(model.config._name_or_path or "reward_model").name
        _check_reward_model(self.__name__, model, tokenizer)
        if batch_size < 1:
            raise ValueError(f"reward_batch_size={batch_size} must be at least 1")
        self.tokenizer, self.policy_tokenizer = tokenizer, policy_tokenizer
        self.accelerator, self.batch_size = None, batch_size
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.mean, self.std = self._normalisation(model.config) if normalise else (0.0, 1.0)
        self.same_tokens = tokenizer.get_vocab() == policy_tokenizer.get_vocab()
        self.model = model.eval().requires_grad_(False)

    def _normalisation(self, config):
        mean, std = (getattr(config, name, None) for name in ("reward_mean", "reward_std"))
        if mean is None or not std:
            raise ValueError(
                f"normalise_rewards=true: the config of the reward model {self.__name__} has reward_mean={mean}, "
                f"reward_std={std}; recipes/reward.py stores them where there are held-out pairs"
            )
        return mean, std

    def _check_template(self, tokenizer, whose):
        if tokenizer.chat_template is None:
            raise ValueError(
                f"the prompts are conversations, and the tokenizer of {whose} has no chat template; set one with "
                "recipes.chat_format.set_chat_template and save the tokenizer, or use prompts that are plain text"
            )

    def _prompt_ids(self, prompts):
        """As the trainer tokenises them."""
        if not is_conversational({"prompt": prompts[0]}):
            return self.policy_tokenizer(text=prompts)["input_ids"]
        self._check_template(self.policy_tokenizer, "the policy")
        return self.policy_tokenizer.apply_chat_template(
            conversation=prompts, add_generation_prompt=True, tokenize=True, return_dict=True,
            **self.chat_template_kwargs,
        )["input_ids"]  # fmt: skip

    def _foreign_ids(self, prompts, completions):
        texts = list(map(completion_text, completions))
        if not is_conversational({"prompt": prompts[0]}):
            return self.tokenizer(text=[prompt + text for prompt, text in zip(prompts, texts)])["input_ids"]
        self._check_template(self.tokenizer, f"the reward model {self.__name__}")
        opened = [ids[-8:] for ids in self._prompt_ids(prompts)]
        endings = [self.policy_tokenizer.decode(ids).rstrip() for ids in opened]
        whole = [
            f"{OPEN}\n{text}" if ending.endswith(OPEN) and CLOSE in text else text
            for ending, text in zip(endings, texts)
        ]
        turns = [[*prompt, {"role": "assistant", "content": text}] for prompt, text in zip(prompts, whole)]
        return self.tokenizer.apply_chat_template(conversation=turns, tokenize=True, return_dict=True)["input_ids"]

    def sequences(self, prompts, completions, completion_ids):
        """The token ids that the reward model reads, one list for each completion."""
        if not self.same_tokens:
            return self._foreign_ids(prompts, completions)
        return [[*prompt, *ids] for prompt, ids in zip(self._prompt_ids(prompts), completion_ids)]

    def __call__(self, prompts, completions, completion_ids, **columns):
        rows = self.sequences(prompts, completions, completion_ids)
        with contextlib.nullcontext() if self.accelerator is None else self.accelerator.autocast():
            scores = score_ids(self.model, rows, self.batch_size)
        return [(score - self.mean) / self.std for score in scores]
