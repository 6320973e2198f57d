"""Rewards of a trained reward model, for PPO, best-of-n and evaluation.

    model, tokenizer = load_reward_model("runs/reward_nano")
    score(model, tokenizer, prompts, completions)                   # one float a completion

Scores depend neither on the batch size nor on the tokenizer's padding side. `model.config.reward_mean` and
`reward_std` are those of the held-out completions that it was evaluated on: `score(..., normalise=True)` is
(reward - mean) / std. A constant in the reward changes nothing in whitened advantages.
"""

from pathlib import Path

import torch
from transformers import AutoTokenizer

import modeling_deepseek_r1  # noqa: F401  (registers the model type deepseek_r1)
from recipes.data import check_vocabulary
from recipes.reward_functions import score_ids
from recipes.reward_models import KINDS, check_head, full_precision_head
from recipes.reward_rendering import render, render_steps


def load_reward_model(folder, kind="preference", dtype=torch.float32, device="cpu", trust_remote_code=False):
    """(model in evaluation mode, tokenizer) of a folder or Hub name; `kind` "process": rewards of steps.

    Raises:
        ValueError: for another head or number of labels, an adapter without its base, a tokenizer that does not fit.
    """
    if (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds an adapter; give {Path(folder) / 'merged'}, or train with merge_adapter=true")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    model = KINDS[kind].auto_class.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    if not check_head(str(folder), model.config, kind):
        raise ValueError(f"{folder} is no reward model; train one from it with recipes/reward.py")
    check_vocabulary(tokenizer, model.config.get_text_config())
    if model.config.get_text_config().pad_token_id is None:
        raise ValueError(f"{folder} has no pad_token_id in its config.json: set it to that of its tokenizer")
    return full_precision_head(model).to(device).eval(), tokenizer


def _same_count(prompts, **others):
    for name, values in others.items():
        if len(values) != len(prompts):
            raise ValueError(f"{len(values)} {name} for {len(prompts)} prompts: one for each is needed")


def _check_context(model, rows):
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, rows), default=0)
    if context and longest > context:
        raise ValueError(
            f"a prompt and completion of {longest} tokens exceed the context of the reward model ({context}); shorten "
            "it, or leave it out"
        )


def score(model, tokenizer, prompts, completions, batch_size=64, finished=None, thinking=None, normalise=False):
    """Rewards, one a completion, as a list of floats.

    Args:
        prompts: lists of messages, or texts. completions: what a model wrote after the generation prompt, as text; or
            lists with one assistant message, which the chat template brings into form.
        finished: whether each completion has its end token (False: it was cut off). None: all have.
        thinking: see `reward_rendering.render_texts`.
    Raises:
        ValueError: for lists of different lengths, a text longer than the model's context, and `normalise` without
            figures in the model's config.
    """
    finished = [True] * len(prompts) if finished is None else finished
    _same_count(prompts, completions=completions, finished=finished)
    parts = [render(tokenizer, *pair, thinking, end) for *pair, end in zip(prompts, completions, finished)]
    rows = [prompt_ids + ids for prompt_ids, ids in parts]
    _check_context(model, rows)
    rewards = score_ids(model, rows, batch_size)
    if not normalise:
        return rewards
    mean, std = (getattr(model.config, name, None) for name in ("reward_mean", "reward_std"))
    if mean is None or not std:
        raise ValueError(
            f"normalise=True: the model's config has reward_mean={mean}, reward_std={std}; recipes/reward.py stores "
            "them where there are held-out pairs"
        )
    return [(reward - mean) / std for reward in rewards]


@torch.inference_mode()
def step_probabilities(model, rows, places, batch_size=64):
    """Probability of being right, a list for each row: at the `places` (indices of tokens) of its ids."""
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
    found, device = [None] * len(rows), next(model.parameters()).device
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids = torch.full((len(chosen), len(rows[chosen[0]])), model.config.get_text_config().pad_token_id)
        mask = torch.zeros_like(ids)
        for line, place in enumerate(chosen):
            ids[line, : len(rows[place])] = torch.tensor(rows[place])
            mask[line, : len(rows[place])] = 1
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float()
        right = logits.softmax(-1)[..., 1].cpu()
        for line, place in enumerate(chosen):
            found[place] = right[line, places[place]].tolist()
    return found


def score_steps(model, tokenizer, prompts, steps, batch_size=64, separator="\n"):
    """Probability that each step is right: a list of floats for each list of step texts (kind "process")."""
    _same_count(prompts, steps=steps)
    rows, places = [], []
    for prompt, own in zip(prompts, steps):
        prompt_ids, ids, ends = render_steps(tokenizer, prompt, own, separator)
        rows.append(prompt_ids + ids)
        places.append([len(prompt_ids) + end for end in ends])
    _check_context(model, rows)
    return step_probabilities(model, rows, places, batch_size)
