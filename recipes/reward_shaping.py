"""Rewards of a completion's length, as functions of numbers, and the groups of samples that some of them compare.

| function              | of                                     | source                                     |
|-----------------------|----------------------------------------|--------------------------------------------|
| `overlong_punishment` | length                                 | DAPO (arXiv:2503.14476), Eq. 13            |
| `group_length_reward` | lengths and verdicts of a group        | Kimi k1.5 (arXiv:2501.12599), Sec. 2.3.3   |
| `cosine_reward`       | length and verdict                     | arXiv:2502.03373, cosine reward (App. C.1) |

They are made into rewards with settings in `recipes/rewards.py`.
"""

import hashlib
import json
import math
from itertools import groupby

import torch.distributed as dist


def overlong_punishment(length, max_length, buffer):
    """DAPO, Eq. 13: 0 up to `max_length - buffer` tokens, then down a straight line to -1 at `max_length` and on."""
    if length > max_length:
        return -1.0
    return min(0.0, (max_length - buffer - length) / buffer)


def group_length_reward(lengths, correct):
    """Kimi k1.5: within the samples of one prompt the shortest gets 0.5, the longest -0.5, wrong ones at most 0.

        lambda_i = 0.5 - (len_i - min) / (max - min)        right: lambda_i        wrong: min(0, lambda_i)

    All get 0 where all are equally long.
    """
    low, high = min(lengths), max(lengths)
    if low == high:
        return [0.0] * len(lengths)
    slopes = [0.5 - (length - low) / (high - low) for length in lengths]
    return [slope if right else min(0.0, slope) for slope, right in zip(slopes, correct)]


def cosine_reward(length, correct, max_length, right=(1.0, 0.5), wrong=(-1.0, -0.5), exceeded=-1.0):
    """From the first value of `right` or `wrong` at length 0 to the second at `max_length`, along half a cosine:

        r(l) = r_L + (r_0 - r_L) (1 + cos(pi l / max_length)) / 2

    A right answer is worth more the shorter it is, a wrong one less: where the model is wrong, thinking on pays.
    `exceeded` for a completion that reached the limit.
    """
    if length >= max_length:
        return float(exceeded)
    start, end = right if correct else wrong
    return end + (start - end) * (1 + math.cos(math.pi * length / max_length)) / 2


# ---------------------------------------------------------------- groups


def _digest(prompt):
    text = json.dumps(prompt, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _from_all_processes(values):
    """(the lists of all processes one after the other, where this process's own begins)."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values, 0
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, values)
    return sum(gathered, []), sum(map(len, gathered[: dist.get_rank()]))


def by_group(prompts, values, function):
    """`function(values of a group)`, one number for each, for the groups of samples of one prompt.

    Groups are runs of equal prompts: trainers pass the samples of a prompt side by side. A group may lie on several
    processes: the values of all are gathered, so that all processes must call this at the same time, as TRL's do.

    Args:
        values: one picklable value for each prompt of this process.
    Raises:
        ValueError: for runs whose lengths do not fit each other: a group was cut, or samples are out of order.
    """
    rows, start = _from_all_processes([(_digest(prompt), value) for prompt, value in zip(prompts, values)])
    runs = [[value for _, value in run] for _, run in groupby(rows, key=lambda row: row[0])]
    sizes = sorted(set(map(len, runs)))
    if any(size % sizes[0] for size in sizes):  # a prompt drawn twice in a row makes one run of double length
        raise ValueError(
            f"rewards that compare the samples of a prompt need them side by side, found runs of {sizes} equal prompts "
            "in the rollout of all processes: a group is cut, or the samples are out of order; pass whole groups of "
            "num_generations samples"
        )
    results = [number for run in runs for number in function(run)]
    return results[start : start + len(prompts)]
