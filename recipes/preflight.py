"""Before the first step of reinforcement learning: does it fit, and can anything be learned?

    report = survey(rewards, completions, truncated=flags, prompts=prompts, memory=memory_plan(args, policy))
    print(report.table())
    for line in report.check(): ...             # warnings; ValueError "nothing can be learned" with what to change
    (folder / "preflight.json").write_text(json.dumps(report.to_json()))

The policy answers a sample of prompts in groups, as it will in training, and the rewards judge them. Where all
completions of a group have the same reward, the group's advantages are zero (DeepSeekMath, arXiv:2402.03300, Sec. 4.1)
and nothing but a KL term moves the policy; where this holds for all groups, training would run without learning.
"""

import math
import statistics
from dataclasses import asdict, dataclass, field

import torch

from recipes.dynamic_sampling import group_mask
from recipes.eval_tables import aligned, percent
from recipes.memory_plan import MemoryPlan, MemoryRow, memory_plan

__all__ = ["MemoryPlan", "MemoryRow", "PreflightReport", "memory_plan", "survey", "verdict"]

MIN_GROUPS = 16  # fewer groups without variance refuse nothing: it may be chance
CERTAIN_GROUPS = 4  # enough where nothing was scored or all texts of a group are the same
FEW_INFORMATIVE, MANY_TRUNCATED, MANY_EMPTY = 0.2, 0.3, 0.1  # shares that warn
HISTOGRAM = ("none", "under 1/4", "1/4 to 1/2", "1/2 to 3/4", "over 3/4", "all")
SHOWN_CHARACTERS = 400


@dataclass
class PreflightReport:
    """Figures of the sample. Shares are in [0, 1]; None: not known.

    Fields:
        rewards: {name: {"mean", "std", "scored", "weight"}}, of the scored completions.
        informative: share of groups whose weighted rewards differ; unscored: share of completions without any reward.
        pass_histogram: {class of HISTOGRAM: groups} by the share of a group's completions with `passed_by` > 0.5.
        distinct: share of different completions in a group, mean over groups.
        readable: share of completions whose answer could be read; settings: those of the run that advice names.
    """

    groups: int
    group_size: int
    rewards: dict
    informative: float
    unscored: float
    passed_by: str | None
    pass_rate: float | None
    pass_histogram: dict
    truncated: float | None
    lengths: dict
    empty: float
    distinct: float
    readable: float | None
    samples: list
    settings: dict = field(default_factory=dict)
    memory: MemoryPlan | None = None

    def table(self):
        """What a terminal shows."""
        known = lambda share: "not known" if share is None else f"{percent(share)} %"
        rows = [
            ("groups x completions", f"{self.groups} x {self.group_size}"),
            ("groups that teach something", known(self.informative)),
            ("groups with zero variance", known(1 - self.informative)),
            ("completions cut off", known(self.truncated)),
            ("completions empty", known(self.empty)),
            ("different completions in a group", known(self.distinct)),
            ("without any reward", known(self.unscored)),
        ]
        rows += [(f"{what} length, {self.lengths['unit']}", f"{self.lengths[what]:.0f}")
                 for what in ("mean", "median", "longest")]  # fmt: skip
        parts = [self.memory.table()] if self.memory else []
        parts.append(aligned(["sample before the first step", ""], rows))
        number = lambda value: "" if value is None else f"{value:.3f}"
        rewards = [(name, number(f["mean"]), number(f["std"]), known(f["scored"]), f"{f['weight']:g}")
                   for name, f in self.rewards.items()]  # fmt: skip
        parts.append(aligned(["reward", "mean", "std", "scored", "weight"], rewards))
        if self.passed_by:
            header = [f"passed ({self.passed_by})", *self.pass_histogram]
            parts.append(aligned(header, [("groups", *self.pass_histogram.values())]))
        parts += [_shown(sample) for sample in self.samples]
        return "\n\n".join(parts)

    def to_json(self):
        """A dictionary of JSON values, with the verdict."""
        kind, lines = verdict(self)
        content = asdict(self) | {"verdict": kind, "advice": lines}
        content["memory"] = self.memory.to_dict() if self.memory else None
        return _plain(content)

    def check(self, min_groups=MIN_GROUPS):
        """[warning].

        Raises:
            ValueError: where nothing can be learned, or the models do not fit into memory.
        """
        warnings = self.memory.check() if self.memory else []
        kind, lines = verdict(self, min_groups)
        if kind == "nothing can be learned":
            raise ValueError(f"{kind}: {' '.join(lines)}")
        return warnings + lines


def _plain(value):
    """JSON values: numbers rounded, what is no number None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def _shown(sample):
    shorten = lambda text: text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} [...]"
    rewards = ", ".join(f"{name} {value}" for name, value in sample["rewards"].items())
    cut = ", cut off" if sample["truncated"] else ""
    head = f"{sample['kind']} completion ({rewards}{cut})"
    return "\n".join([head, f"> {shorten(sample['prompt'])}", shorten(sample["completion"])])


# ---------------------------------------------------------------- the sample


def _total(rewards, weights):
    """(groups, G) weighted sum as GRPOTrainer has it: NaN only where no function scored."""
    stacked = torch.stack(list(rewards.values()), dim=-1)
    total = (stacked * torch.tensor([float(weights[name]) for name in rewards])).nansum(-1)
    return total.masked_fill(stacked.isnan().all(-1), torch.nan)


def _figures(values, weight):
    scored = values[~values.isnan()]
    mean = scored.mean().item() if scored.numel() else None
    std = scored.std(correction=0).item() if scored.numel() else None
    return {"mean": mean, "std": std, "scored": scored.numel() / max(1, values.numel()), "weight": float(weight)}


def _histogram(rates):
    """{class of HISTOGRAM: groups} of (groups,) pass rates, NaN left out."""
    counts = dict.fromkeys(HISTOGRAM, 0)
    for rate in rates[~rates.isnan()].tolist():
        inner = 1 + sum(rate >= edge for edge in (0.25, 0.5)) + (rate > 0.75)
        counts[HISTOGRAM[0 if rate == 0 else 5 if rate == 1 else inner]] += 1
    return counts


def _as_text(prompt):
    return prompt if isinstance(prompt, str) else "\n".join(message.get("content") or "" for message in prompt)


def _samples(total, rewards, completions, truncated, prompts):
    """The completions with the highest and the lowest reward, of different groups where there are several."""
    count, size = total.shape
    flat = total.flatten()
    best = int(flat.nan_to_num(nan=-torch.inf).argmax())
    others = flat.nan_to_num(nan=1e30)  # of those without a reward one is shown only where none has any
    hidden = slice(best // size * size, (best // size + 1) * size) if count > 1 else best
    others[hidden] = torch.inf
    places = {"best": best, "worst": int(others.argmin())}
    number = lambda value: None if math.isnan(value) else round(value, 4)
    return [
        {
            "kind": kind, "prompt": _as_text(prompts[place // size]) if prompts is not None else "",
            "completion": completions[place],
            "rewards": {name: number(values.flatten()[place].item()) for name, values in rewards.items()},
            "truncated": None if truncated is None else bool(truncated.flatten()[place]),
        }
        for kind, place in places.items()
    ]  # fmt: skip


def survey(
    rewards, completions, weights=None, truncated=None, lengths=None, prompts=None, readable=None, passed_by=None,
    settings=None, memory=None,
):  # fmt: skip
    """The `PreflightReport` of scored groups, n groups of G completions.

    Args:
        rewards: {name: (n, G) numbers}; NaN where a function could not judge.
        completions: n * G texts, group after group.
        weights: {name: weight}. Default: 1 each; 0 for rewards that are only tracked.
        truncated: (n, G) bool, cut off at `max_completion_length`; lengths: (n, G) tokens. Default: characters.
        prompts: n texts or conversations; readable: (n, G) bool, whether an answer could be read (`Verdict.parsed`).
        passed_by: the reward whose value over 0.5 means solved. Default: accuracy, where it is one.
        settings: {field: value} that advice may name: max_completion_length, num_generations, temperature.
        memory: a `MemoryPlan`.
    Raises:
        ValueError: for rewards without a completion, or of different shapes.
    """
    rewards = {name: torch.as_tensor(values, dtype=torch.float32) for name, values in rewards.items()}
    shapes = {tuple(values.shape) for values in rewards.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2 or not math.prod(next(iter(shapes))):
        raise ValueError(f"preflight: rewards must be (groups, completions) of one shape, got {sorted(shapes)}")
    groups, size = next(iter(shapes))
    if size < 2:
        raise ValueError("preflight: groups of one completion have no variance; set num_generations to 2 or more")
    if len(completions) != groups * size:
        raise ValueError(f"preflight: {len(completions)} completions for rewards of {groups} x {size}; one for each")
    weights = {name: 1.0 for name in rewards} | (weights or {})
    total = _total({name: values for name, values in rewards.items() if weights[name]} or rewards, weights)
    passed_by = "accuracy" if passed_by is None and "accuracy" in rewards else passed_by
    passed = rewards[passed_by] if passed_by else None
    rates = None if passed is None else (passed > 0.5).float().masked_fill(passed.isnan(), torch.nan).nanmean(1)
    known = rates is not None and not bool(rates.isnan().all())
    share = lambda flags: None if flags is None else torch.as_tensor(flags, dtype=torch.float32).mean().item()
    truncated = None if truncated is None else torch.as_tensor(truncated, dtype=torch.bool)
    sizes = [len(text) for text in completions]
    if lengths is not None:
        sizes = torch.as_tensor(lengths).flatten().tolist()
    distinct = [len(set(completions[at : at + size])) / size for at in range(0, len(completions), size)]
    return PreflightReport(
        groups=groups, group_size=size,
        rewards={name: _figures(values, weights[name]) for name, values in rewards.items()},
        informative=group_mask(total.flatten(), size).float().mean().item(),
        unscored=total.isnan().float().mean().item(), passed_by=passed_by if known else None,
        pass_rate=rates.nanmean().item() if known else None, pass_histogram=_histogram(rates) if known else {},
        truncated=share(truncated), empty=sum(not text.strip() for text in completions) / len(completions),
        lengths={"mean": statistics.fmean(sizes), "median": statistics.median(sizes), "longest": max(sizes),
                 "unit": "characters" if lengths is None else "tokens"},
        distinct=statistics.fmean(distinct), readable=share(readable),
        samples=_samples(total, rewards, completions, truncated, prompts), settings=dict(settings or {}),
        memory=memory,
    )  # fmt: skip


# ---------------------------------------------------------------- the verdict


def _setting(report, name):
    """`name=value` where the value is known, else the name."""
    value = report.settings.get(name)
    return name if value is None else f"{name}={value}"


def _identical(report):
    return report.distinct <= 1 / report.group_size + 1e-9


def _why_nothing(report):
    """[reason with advice] for a sample in which no group has variance; what explains most comes first."""
    temperature, length = _setting(report, "temperature"), _setting(report, "max_completion_length")
    if report.unscored == 1:
        names = ", ".join(name for name, figures in report.rewards.items() if figures["weight"])
        return [
            f"no completion was scored by {names}: the prompts lack the columns that they read (task, index, question, "
            "reference, metadata); make them with python -m data_scripts.prepare_prompts --tasks, or name a reward "
            "that judges every completion."
        ]
    if report.empty == 1:
        return [
            "every completion is empty: the policy ends at once. Look at the chat template and the end-of-text token, "
            "or fine-tune it first (recipes/sft.py)."
        ]
    if report.pass_rate == 1:
        return [
            f"every completion has {report.passed_by} 1: the prompts are solved. Take harder tasks or levels "
            "(data_scripts.prepare_prompts --tasks name:levels)."
        ]
    if _identical(report):
        return [
            f"all completions of a group are the same text: raise {temperature}, and look at top_p, top_k and min_p, "
            "which may leave one token to choose from."
        ]
    if report.pass_rate == 0:
        return _why_all_wrong(report)
    if report.pass_rate is not None:
        return [
            "each group is all right or all wrong: raise num_generations or the temperature, or take levels in between "
            "(the prompts that are solved and those that are hopeless lie far apart)."
        ]
    constant = ", ".join(f"{name} {figures['mean']:.3g}" for name, figures in report.rewards.items()
                         if figures["weight"] and figures["mean"] is not None)  # fmt: skip
    return [
        f"the rewards are the same for all completions of each group ({constant}): name a reward that tells them "
        f"apart, raise num_generations or {temperature}, or look whether {length} cuts all of them off."
    ]


def _why_all_wrong(report):
    lines = [f"no completion has {report.passed_by} above 0."]
    followed = report.rewards.get("format", {}).get("mean") or 0
    if (report.truncated or 0) > 0.5:
        lines.append(
            f"{percent(report.truncated)} % are cut off before an answer: raise "
            f"{_setting(report, 'max_completion_length')} first."
        )
    if report.readable is not None and report.readable < 0.1 and followed > 0.5:
        lines.append(
            f"The format is followed ({percent(followed)} %), but no answer can be read: show the policy how answers "
            "are written, by a few SFT examples or a sentence in the prompt."
        )
    elif followed > 0.5:
        lines.append(f"The format is followed ({percent(followed)} %) and the answers are wrong: take easier levels.")
    elif "format" not in report.rewards:
        lines.append("Add the reward format, which can be reached before a right answer is.")
    lines.append(
        "Fine-tune first (recipes/sft.py on worked examples), take easier tasks or levels, or raise "
        f"{_setting(report, 'num_generations')} or {_setting(report, 'temperature')}, so that a rare right answer is "
        "found."
    )
    return lines


def _warnings(report):
    """[what training will suffer from], each with a way out."""
    lines, truncated = [], report.truncated or 0
    if report.informative < FEW_INFORMATIVE:
        lines.append(
            f"only {percent(report.informative)} % of the groups teach something: use the curriculum or dynamic "
            f"sampling, other levels, or a larger {_setting(report, 'num_generations')}"
        )
    if truncated > MANY_TRUNCATED:
        lines.append(
            f"{percent(truncated)} % of the completions are cut off: raise {_setting(report, 'max_completion_length')}"
        )
    if report.empty > MANY_EMPTY:
        lines.append(f"{percent(report.empty)} % of the completions are empty: look at the chat template")
    if report.unscored > 0:
        lines.append(f"{percent(report.unscored)} % of the completions have no reward: their prompts teach nothing")
    if (report.pass_rate or 0) > 0.9:
        lines.append(f"{percent(report.pass_rate)} % of the completions pass already: harder levels teach more")
    for name, figures in report.rewards.items():
        if figures["weight"] and figures["std"] is not None and figures["std"] < 1e-6 and len(report.rewards) > 1:
            lines.append(f"the reward {name} is {figures['mean']:.3g} for every completion: it changes nothing now")
    return lines


def verdict(report, min_groups=MIN_GROUPS):
    """("ok" | "warning" | "nothing can be learned", [line]).

    No informative group among n means a share of at most about 3 / n (95 %); below `min_groups` groups that is no
    reason to refuse; where nothing was scored or all texts of a group are the same, CERTAIN_GROUPS are enough.
    """
    if report.informative == 0:
        lines = _why_nothing(report)
        certain = report.unscored == 1 or _identical(report)
        if report.groups >= (min(CERTAIN_GROUPS, min_groups) if certain else min_groups):
            return "nothing can be learned", [f"in {report.groups} groups of {report.group_size}", *lines]
        few = f"none of {report.groups} groups has variance, too few to say that nothing can be learned: ask more"
        return "warning", [few, *lines, *_warnings(report)[1:]]
    lines = _warnings(report)
    return ("warning" if lines else "ok"), lines
