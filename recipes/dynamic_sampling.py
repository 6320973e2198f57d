"""Dynamic sampling: ask further prompts until enough groups of completions teach something.

A group whose completions all have the same reward has advantages of zero: it dilutes the batch. DAPO (arXiv:2503.14476,
Sec. 3.2, Eq. 11) samples on and keeps the groups whose outcomes differ. Here on the dictionaries that
`GRPOTrainer._generate_and_score_completions` returns, each process for its own rows:

    buffer = GroupBuffer(needed=4, group_size=8, pad_token_id=0, max_rounds=4, agree=least_over_processes)
    while not buffer.done:
        rollout, rewards = generate(prompts := draw(...))
        buffer.add(rollout, rewards, prompts)
    batch, prompts = buffer.take()

Advantages stay those of their round: exact for rewards scaled per group or not at all, and per round, not over the
joined batch, where they are scaled by the batch's standard deviation.
"""

from dataclasses import dataclass

import torch

PROMPT, COMPLETION, BOTH, ROWS = "prompt", "completion", "prompt and completion", "rows"


@dataclass(frozen=True)
class Layout:
    """What the second axis of a rollout's tensor is, and what fills it up (None: the tokenizer's padding)."""

    axis: str
    filling: float | int | None = 0


# Keys of TRL 1.16's rollouts, of router replay and of PPO. Images have none: they are refused.
LAYOUTS = {
    "prompt_ids": Layout(PROMPT, None), "prompt_mask": Layout(PROMPT),
    "completion_ids": Layout(COMPLETION, None), "completion_mask": Layout(COMPLETION),
    "tool_mask": Layout(COMPLETION, 1), "advantages": Layout(COMPLETION),
    "old_per_token_logps": Layout(COMPLETION), "ref_per_token_logps": Layout(COMPLETION),
    "sampling_per_token_logps": Layout(COMPLETION), "importance_sampling_ratio": Layout(COMPLETION, 1),
    "routes": Layout(BOTH, -1),
}  # fmt: skip
SCALAR = "num_items_in_batch"


def group_mask(rewards, group_size, tolerance=1e-6):
    """(B,) rewards, groups in a row -> (B / group_size,) bool: two scored completions differ by over `tolerance`.

    NaN: a completion that no reward function scored; it does not count.
    """
    if rewards.ndim != 1 or len(rewards) % group_size:
        raise ValueError(
            f"rewards of shape {tuple(rewards.shape)} do not make groups of num_generations={group_size}; each process "
            "needs whole groups: choose per_device_train_batch_size x steps_per_generation as a multiple of "
            "num_generations"
        )
    groups = rewards.float().view(-1, group_size)
    unscored = groups.isnan()
    highest = groups.masked_fill(unscored, -torch.inf).amax(1)
    lowest = groups.masked_fill(unscored, torch.inf).amin(1)
    return highest - lowest > tolerance  # -inf where nothing was scored


def _check_keys(rollout, layouts):
    unknown = [name for name in rollout if name not in layouts and name != SCALAR]
    if unknown:
        raise ValueError(
            f"dynamic sampling cannot join {', '.join(unknown)} of a rollout: it knows {', '.join(layouts)}; pass "
            "their Layout as layouts, or turn dynamic sampling off (prompts with images)"
        )
    missing = [name for name in ("prompt_ids", "completion_ids", "completion_mask") if rollout.get(name) is None]
    assert not missing, f"a rollout without {', '.join(missing)}"
    rows = len(rollout["prompt_ids"])
    for name, value in rollout.items():
        assert name == SCALAR or value is None or len(value) == rows, f"{name}: {len(value)} rows, expected {rows}"


def count_items(rollout):
    """Completion tokens in the loss on this process, 0-dim int64; TRL sums them over the processes."""
    mask = rollout["completion_mask"]
    return (mask if rollout.get("tool_mask") is None else mask * rollout["tool_mask"]).sum()


def _finish(parts, rollout):
    """`parts` in the order of `rollout`'s keys, with the number of items where `rollout` had one."""
    if SCALAR in rollout:
        parts[SCALAR] = count_items(parts)
    return {name: parts[name] for name in rollout}


def take_groups(rollout, keep, group_size, layouts=None):
    """The rows of the groups that `keep` names, in that order.

    Args:
        keep: (groups,) bool, or places of groups. `num_items_in_batch` becomes this process's own count.
    """
    _check_keys(rollout, LAYOUTS | (layouts or {}))
    keep = torch.as_tensor(keep)
    groups = keep.nonzero().flatten() if keep.dtype == torch.bool else keep.long()
    count, rest = divmod(len(rollout["prompt_ids"]), group_size)
    assert not rest, f"{len(rollout['prompt_ids'])} rows are no groups of {group_size}"
    assert keep.dtype != torch.bool or len(keep) == count, f"{len(keep)} flags for {count} groups"
    rows = (groups.unsqueeze(1) * group_size + torch.arange(group_size, device=groups.device)).flatten()
    parts = {
        name: None if value is None else value[rows.to(value.device)]
        for name, value in rollout.items()
        if name != SCALAR
    }
    return _finish(parts, rollout)


# ---------------------------------------------------------------- joining


def _padded(value, before, after, filling):
    """`value` (B, S, ...) with `before` and `after` columns of `filling` around."""
    if not before and not after:
        return value
    new = lambda columns: value.new_full((len(value), columns, *value.shape[2:]), filling)
    return torch.cat([new(before), value, new(after)], dim=1)


def _join(name, values, rollouts, layout, pad_token_id):
    """One key of all rollouts: prompts filled up on the left, completions on the right."""
    prompts, completions = ([each[key].shape[1] for each in rollouts] for key in ("prompt_ids", "completion_ids"))
    filling = pad_token_id if layout.filling is None else layout.filling
    if layout.axis == ROWS or all(value.ndim == 1 for value in values):
        return torch.cat(values)
    wanted = {PROMPT: prompts, COMPLETION: completions, BOTH: [p + c for p, c in zip(prompts, completions)]}
    wanted, found = wanted[layout.axis], [value.shape[1] for value in values]
    if found != wanted and set(found) == {1}:  # one value a completion, kept as a column: sequence-level ratios
        return torch.cat(values)
    assert found == wanted, f"{name}: {found} columns, expected {wanted}"
    left = 0 if layout.axis == COMPLETION else max(prompts)
    right = 0 if layout.axis == PROMPT else max(completions)
    return torch.cat([
        _padded(value, max(0, left - p), max(0, right - c), filling)
        for value, p, c in zip(values, prompts, completions)
    ])  # fmt: skip


def join_rollouts(rollouts, pad_token_id, layouts=None):
    """One rollout with the rows of all, in order, padded to the widest prompt and the widest completion.

    Args:
        rollouts: dictionaries of the same keys (LAYOUTS); tensors of one row (B,), a token (B, T) or (B, P + C, ...).
        layouts: {name: Layout} of further keys.
    Returns:
        the dictionary; `num_items_in_batch` counts this process's rows (sum it over the processes, as TRL does).
    Raises:
        ValueError: for a key without a layout.
    """
    layouts = LAYOUTS | (layouts or {})
    for rollout in rollouts:
        _check_keys(rollout, layouts)
        assert rollout.keys() == rollouts[0].keys(), f"rollouts differ in {set(rollout) ^ set(rollouts[0])}"
    parts = {}
    for name in rollouts[0]:
        values = [rollout[name] for rollout in rollouts]
        if name == SCALAR:
            continue
        absent = [value is None for value in values]
        assert all(absent) or not any(absent), f"{name} is None in some rollouts only"
        parts[name] = None if all(absent) else _join(name, values, rollouts, layouts[name], pad_token_id)
    return _finish(parts, rollouts[0])


def trim_padding(rollout, multiple_of=None, layouts=None):
    """Without the columns in which no row has a token: what was left out had the longest ones.

    Args:
        multiple_of: the trainer's `pad_to_multiple_of`; widths stay multiples of it.
    """
    layouts, multiple = LAYOUTS | (layouts or {}), multiple_of or 1
    _check_keys(rollout, layouts)
    sizes = [rollout[name].shape[1] for name in ("prompt_ids", "completion_ids")]
    places = [rollout[name].any(0).nonzero().flatten() for name in ("prompt_mask", "completion_mask")]
    used = [int(sizes[0] - places[0][0]) if len(places[0]) else 1, int(places[1][-1]) + 1 if len(places[1]) else 1]
    used = [min(size, -(-width // multiple) * multiple) for size, width in zip(sizes, used)]
    start, end = sizes[0] - used[0], used[1]
    slices = {PROMPT: slice(start, None), COMPLETION: slice(None, end), BOTH: slice(start, sizes[0] + end)}
    parts = {}
    for name, value in rollout.items():
        if name == SCALAR:
            continue
        narrow = value is None or value.ndim == 1 or layouts[name].axis == ROWS
        column = not narrow and value.shape[1] == 1  # one value a completion
        parts[name] = value if narrow or column else value[:, slices[layouts[name].axis]]
    return _finish(parts, rollout)


# ---------------------------------------------------------------- the loop


class GroupBuffer:
    """Groups that teach something, collected over rounds until there are enough on every process.

    Args:
        needed: groups of this process's batch; group_size: completions of a group (`num_generations`).
        max_rounds: rounds after which the batch is filled up with groups that teach nothing (their advantages are zero;
            only a KL term moves by them), the latest first. DAPO has no such limit.
        agree: function of an int that returns the least one over all processes, called once in every `add`. Default:
            one process. All processes then ask the same number of rounds; what one has too many is dropped.
        tolerance: see `group_mask`; multiple_of: see `trim_padding`.
    Attributes:
        done; stopped: None, "full" or "max_rounds"; statistics for the log in `metrics()`.
    """

    def __init__(
        self, needed, group_size, pad_token_id, max_rounds=10, agree=None, layouts=None, tolerance=1e-6,
        multiple_of=None,
    ):  # fmt: skip
        for name, value in (("needed", needed), ("num_generations", group_size), ("max_rounds", max_rounds)):
            if value < 1:
                raise ValueError(f"dynamic sampling: {name}={value} must be at least 1")
        self.needed, self.group_size, self.pad_token_id = needed, group_size, pad_token_id
        self.max_rounds, self.agree, self.layouts, self.tolerance = max_rounds, agree, layouts, tolerance
        self.multiple_of = multiple_of
        self.kept, self.flat = [], []  # (rollout of one round, tags of its groups)
        self.informative = self.generated = self.unscored = self.rounds = self.least = 0
        self.stopped = None

    @property
    def done(self):
        return self.stopped is not None

    @property
    def missing(self):
        """Groups that the process with the fewest still lacks: what a further round should bring at least."""
        return max(0, self.needed - self.least)

    def add(self, rollout, rewards, tags=None):
        """One round.

        Args:
            rewards: (B,) what a group must differ in: the weighted sum, or one reward (DAPO: the accuracy).
            tags: one thing a group, e.g. the place of its prompt; `take` returns those of the batch.
        """
        assert not self.done, f"the buffer is done ({self.stopped})"
        mask = group_mask(rewards, self.group_size, self.tolerance).cpu()
        tags = list(tags) if tags is not None else [None] * len(mask)
        assert len(tags) == len(mask), f"{len(tags)} tags for {len(mask)} groups"
        self.rounds += 1
        self.generated += len(mask)
        self.informative += int(mask.sum())
        self.unscored += int(rewards.isnan().view(-1, self.group_size).all(1).sum())
        for store, chosen in ((self.kept, mask), (self.flat, ~mask)):
            if chosen.any():
                part = take_groups(rollout, chosen, self.group_size, self.layouts)
                store.append((part, [tag for tag, wanted in zip(tags, chosen.tolist()) if wanted]))
        self.least = self.informative if self.agree is None else int(self.agree(self.informative))
        if self.least >= self.needed:
            self.stopped = "full"
        elif self.rounds >= self.max_rounds:
            self.stopped = "max_rounds"
        self._forget_flat()

    def _forget_flat(self):
        """Keeps of the groups that teach nothing the latest rounds that could still be needed to fill up."""
        lacking, kept = max(0, self.needed - self.informative), []
        for part in reversed(self.flat):
            if lacking <= 0:
                break
            kept.insert(0, part)
            lacking -= len(part[1])
        self.flat = kept

    def take(self):
        """(rollout of `needed` groups, their tags): the first that were found, then those that fill up.

        Raises:
            ValueError: before the buffer is done, or where all rounds together brought fewer groups.
        """
        if not self.done:
            raise ValueError(
                f"dynamic sampling: {self.missing} groups are missing after {self.rounds} rounds; add more first"
            )
        stores = [*self.kept, *reversed(self.flat)]
        rollout = join_rollouts([part for part, _ in stores], self.pad_token_id, self.layouts)
        tags = [tag for _, part in stores for tag in part]
        if len(tags) < self.needed:
            raise ValueError(
                f"dynamic sampling: {self.rounds} rounds brought {len(tags)} groups, the batch needs {self.needed}; "
                "raise max_rounds or the prompts of a round"
            )
        rollout = take_groups(rollout, torch.arange(self.needed), self.group_size, self.layouts)
        return trim_padding(rollout, self.multiple_of, self.layouts), tags[: self.needed]

    def metrics(self):
        """Figures of this process's rounds."""
        filled = max(0, self.needed - self.informative) if self.done else 0
        return {
            "sampling rounds": self.rounds, "groups generated": self.generated,
            "groups informative": self.informative / max(1, self.generated),
            "groups unscored": self.unscored / max(1, self.generated),
            "groups dropped": max(0, self.informative - self.needed), "groups filled up": filled,
            "samples per trained sample": self.generated / self.needed,
            "sampling stopped early": float(self.stopped == "max_rounds"),
        }  # fmt: skip
