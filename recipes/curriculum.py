"""Which prompts the next rollout asks: shuffled epochs, or those whose pass rate promises the most to learn.

    curriculum = PromptCurriculum(rows, seed=0, mode="pass_rate")
    indices = curriculum.draw(32, step)                    # places in `rows`
    curriculum.update(indices, pass_rates, samples=16)     # what came of them; once a rollout

A group of completions teaches nothing where all pass or all fail: its advantages are zero (DAPO, arXiv:2503.14476,
Sec. 3.2). The signal of a group is the variance p (1 - p) of its outcomes; asking by it is sampling for learnability
(arXiv:2502.12272). Kimi k1.5 (arXiv:2501.12599) asks in proportion to 1 - p, and easy problems first.

p is not known and moves with the policy. Here each prompt has a Beta posterior (`PassRates`), and its weight is

    w = E[p (1 - p)] / max + exploration * 2 * std(p)                                                  (ours)

so that prompts that were never asked are tried. The draw is weighted and without replacement (Efraimidis and Spirakis,
2006: the n smallest of Exp(1) / w). Everything is float64 in NumPy with one generator: processes that are given the
same updates draw the same prompts.
"""

import hashlib
import json

import numpy
import torch

MODES = ("none", "pass_rate")
REVISITED = 0.1  # weight of a solved or hopeless prompt at most; a prompt at the target has about 1


def _column(rows, name):
    """The column as a list, or None where there is none; `rows`: a Dataset or a list of dicts."""
    if hasattr(rows, "column_names"):
        return rows[name][:] if name in rows.column_names else None
    return [row.get(name) for row in rows] if any(name in row for row in rows) else None


def _level(metadata):
    metadata = json.loads(metadata) if isinstance(metadata, str) and metadata else metadata or {}
    return metadata.get("level", metadata.get("difficulty"))


def group_names(rows):
    """[(task, level)] of rows with the columns of data_scripts/prepare_prompts.py; (None, None) where they are absent.

    The level is `metadata`'s level or difficulty.
    """
    tasks, metadata = _column(rows, "task"), _column(rows, "metadata")
    if tasks is None:
        return [(None, None)] * len(rows)
    levels = map(_level, metadata) if metadata is not None else [None] * len(rows)
    return [(task, level if task is not None else None) for task, level in zip(tasks, levels)]


class PassRates:
    """A Beta posterior of each prompt's pass rate, forgetting as the policy moves.

    Evidence (passed and failed samples) halves every `half_life` updates. The prior is Beta(k m, k (1 - m)) with
    k = `strength` and m the mean pass rate of the prompt's group: each prompt that was asked counts once there, however
    often it was asked, by the share n / (n + k) of its n remembered samples, beside one imagined prompt at `start`.
    A prompt that was not asked for long thus goes back to what its group does now.

    Args:
        groups: (N,) int64, the group of each prompt.
    """

    def __init__(self, groups, strength, half_life, start):
        self.groups, self.strength, self.half_life, self.start = groups, strength, half_life, start
        self.passed, self.failed = numpy.zeros(len(groups)), numpy.zeros(len(groups))  # as of `seen_at`
        self.seen_at, self.asked = (numpy.zeros(len(groups), dtype=numpy.int64) for _ in range(2))
        self.clock = 0

    def _remembered(self, indices=slice(None)):
        return numpy.exp2((self.seen_at[indices] - self.clock) / self.half_life)

    def observe(self, indices, rates, samples):
        """Adds what one rollout found and moves the clock; a rate of NaN (nothing was scored) leaves no evidence."""
        numpy.add.at(self.asked, indices, 1)
        scored = numpy.isfinite(rates) & (samples > 0)
        indices, rates, samples = indices[scored], rates[scored], samples[scored]
        touched = numpy.unique(indices)
        kept = self._remembered(touched)
        self.passed[touched] *= kept
        self.failed[touched] *= kept
        self.seen_at[touched] = self.clock
        numpy.add.at(self.passed, indices, rates * samples)
        numpy.add.at(self.failed, indices, (1 - rates) * samples)
        self.clock += 1

    def posterior(self):
        """(alpha, beta) of all prompts, (N,) float64 each."""
        kept = self._remembered()
        passed, failed = self.passed * kept, self.failed * kept
        count = passed + failed
        trust = count / (count + self.strength)
        rate = passed / numpy.maximum(count, 1e-300)
        size = int(self.groups.max()) + 1
        sums, weights = (numpy.bincount(self.groups, each, size) for each in (trust * rate, trust))
        prior = ((sums + self.start) / (weights + 1.0))[self.groups]
        return self.strength * prior + passed, self.strength * (1 - prior) + failed


class PromptCurriculum:
    """Draws prompts and learns from their outcomes.

    Args:
        rows: the training prompts, a Dataset or a list of dicts; `task` and `metadata` make groups (`group_names`).
        mode: "none": shuffled epochs, no prompt twice before all were asked; "pass_rate": by weight. Pass rates are
            estimated and logged either way.
        target: pass rate with the largest weight. 0.5 is p (1 - p); else p^2t (1 - p)^2(1 - t) at the posterior's mean.
        min_pass_rate, max_pass_rate: outside of them a prompt is hopeless or solved.
        revisit_share: share of the draws, at most, that goes to these all together, so that they can come back.
        exploration: weight of the uncertainty; 0: none.
        prior_strength: samples that the group's pass rate counts as.
        half_life: updates after which evidence counts half.
        from_step: name of a column with the step from which on a prompt is asked (without such a column: all from the
            first on), or a function of a row that returns it, or one number a row; None is 0. R1's general prompts
            enter its second RL stage for the last 400 steps (arXiv:2501.12948).
    Raises:
        ValueError: for settings that cannot work, naming the field.
    """

    def __init__(
        self, rows, seed, mode="pass_rate", target=0.5, min_pass_rate=0.05, max_pass_rate=0.95, revisit_share=0.05,
        exploration=0.5, prior_strength=1.0, half_life=50.0, from_step="from_step",
    ):  # fmt: skip
        self.mode, self.target, self.exploration = mode, target, exploration
        self.min_pass_rate, self.max_pass_rate, self.revisit_share = min_pass_rate, max_pass_rate, revisit_share
        self._check(len(rows), prior_strength, half_life)
        names = group_names(rows)
        known = {name: place for place, name in enumerate(dict.fromkeys(names))}
        self.tasks = [name[0] for name in known]  # of each group
        self.rates = PassRates(numpy.array([known[name] for name in names]), prior_strength, half_life, target)
        self.from_step = _steps(rows, from_step)
        told = json.dumps([names, self.from_step.tolist()], default=str)
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()
        self.generator = numpy.random.Generator(numpy.random.PCG64(seed))
        self.epoch, self.queue = 0, numpy.zeros(0, dtype=numpy.int64)
        self.entered = numpy.zeros(len(rows), dtype=bool)  # prompts that this epoch has asked or queued

    def _check(self, rows, prior_strength, half_life):
        rules = (
            ("mode", self.mode, self.mode in MODES, f"one of {', '.join(MODES)}"),
            ("rows", rows, rows > 0, "at least one prompt"),
            ("target", self.target, 0 < self.target < 1, "in (0, 1)"),
            ("min_pass_rate", self.min_pass_rate, 0 <= self.min_pass_rate < self.target, f"in [0, {self.target})"),
            ("max_pass_rate", self.max_pass_rate, self.target < self.max_pass_rate <= 1, f"in ({self.target}, 1]"),
            ("revisit_share", self.revisit_share, 0 < self.revisit_share < 1, "in (0, 1)"),
            ("exploration", self.exploration, self.exploration >= 0, "zero or more"),
            ("prior_strength", prior_strength, prior_strength > 0, "positive"),
            ("half_life", half_life, half_life > 0, "positive, in rollouts"),
        )  # fmt: skip
        for name, value, holds, allowed in rules:
            if not holds:
                raise ValueError(f"curriculum: {name}={value} must be {allowed}")

    # -- weights

    def estimates(self):
        """(mean, standard deviation) of each prompt's pass rate, (N,) float64."""
        alpha, beta = self.rates.posterior()
        total = alpha + beta
        mean = alpha / total
        return mean, numpy.sqrt(mean * (1 - mean) / (total + 1))

    def weights(self, mean=None, spread=None):
        """(N,) float64, positive; solved and hopeless prompts share `revisit_share` of the sum, or less."""
        if mean is None:
            mean, spread = self.estimates()
        t = self.target
        peak = t ** (2 * t) * (1 - t) ** (2 - 2 * t)
        # E[p (1 - p)] = m (1 - m) - std^2 for a Beta posterior; the same factor is taken at other targets.
        certain = 1 - spread**2 / numpy.maximum(mean * (1 - mean), 1e-300)
        if t == 0.5:
            signal = mean * (1 - mean) / peak
        else:
            signal = mean ** (2 * t) * (1 - mean) ** (2 - 2 * t) / peak
        weights = signal * certain + self.exploration * 2 * spread
        outside = (mean > self.max_pass_rate) | (mean < self.min_pass_rate)
        if outside.any():
            inside = weights[~outside].sum()
            share = self.revisit_share / (1 - self.revisit_share) * inside / outside.sum()
            weights[outside] = min(REVISITED, share) if inside > 0 else REVISITED
        return numpy.maximum(weights, 1e-9)

    # -- drawing

    def draw(self, n, step=0, exclude=()):
        """(n,) int64 places in the rows, none twice unless there are fewer prompts; `step`: see `from_step`.

        Args:
            exclude: places already asked in this rollout (further rounds of dynamic sampling).
        Raises:
            ValueError: where no prompt may be asked yet.
        """
        eligible = self.from_step <= step
        if not eligible.any():
            raise ValueError(
                f"curriculum: no prompt may be asked at step {step}, the first from step {self.from_step.min()} on; "
                "lower from_step"
            )
        pick = self._by_weight if self.mode == "pass_rate" else self._by_epoch
        taken, drawn = numpy.zeros(len(eligible), dtype=bool), []
        taken[numpy.asarray(exclude, dtype=numpy.int64)] = True
        while n > 0:
            allowed = eligible & ~taken
            if not allowed.any():  # fewer prompts than asked for: once more from the beginning
                allowed, taken = eligible, numpy.zeros(len(eligible), dtype=bool)
            drawn.append(pick(min(n, int(allowed.sum())), allowed, eligible))
            taken[drawn[-1]] = True
            n -= len(drawn[-1])
        return numpy.concatenate(drawn) if drawn else numpy.zeros(0, dtype=numpy.int64)

    def _by_weight(self, n, allowed, eligible):
        places = numpy.flatnonzero(allowed)
        keys = self.generator.standard_exponential(len(places)) / self.weights()[places]
        smallest = numpy.argpartition(keys, n - 1)[:n]
        return places[smallest[numpy.argsort(keys[smallest], kind="stable")]]

    def _by_epoch(self, n, allowed, eligible):
        """The next of the queue; what was drawn in this rollout already stays in it for later."""
        new = numpy.flatnonzero(eligible & ~self.entered)
        if len(new):  # the first epoch, or prompts that enter at this step
            self.entered[new] = True
            self.queue = self.generator.permutation(numpy.concatenate([self.queue, new]))
        if not allowed[self.queue].any():
            everything = self.generator.permutation(numpy.flatnonzero(eligible))
            self.queue, self.epoch = numpy.concatenate([self.queue, everything]), self.epoch + 1
        usable = numpy.flatnonzero(allowed[self.queue])
        first = usable[:n]
        if len(set(self.queue[first].tolist())) < len(first):  # a prompt of this epoch's end and of the next one
            first = usable[numpy.sort(numpy.unique(self.queue[usable], return_index=True)[1])][:n]
        drawn = self.queue[first]
        self.queue = numpy.delete(self.queue, first)
        return drawn

    # -- learning

    def update(self, indices, pass_rates, samples):
        """What came of a rollout's prompts; once a rollout, with all rounds of dynamic sampling together.

        Args:
            pass_rates: share of each prompt's completions that passed, in [0, 1]; NaN: none could be scored.
            samples: completions of each prompt that were scored, one number or one a prompt.
        """
        indices, pass_rates = numpy.asarray(indices, dtype=numpy.int64), numpy.asarray(pass_rates, dtype=numpy.float64)
        if indices.shape != pass_rates.shape:
            raise ValueError(f"curriculum: {indices.size} indices but {pass_rates.size} pass_rates; one for each")
        wrong = pass_rates[numpy.isfinite(pass_rates) & ((pass_rates < 0) | (pass_rates > 1))]
        if wrong.size:
            raise ValueError(f"curriculum: pass_rates holds {wrong[0]}; a pass rate is in [0, 1]")
        samples = numpy.broadcast_to(numpy.asarray(samples, dtype=numpy.float64), indices.shape)
        self.rates.observe(indices, pass_rates, samples)

    def metrics(self, step=0):
        """Figures of the prompts that may be asked at `step`; "effective prompts" is (sum w)^2 / sum w^2."""
        eligible = self.from_step <= step
        mean, spread = self.estimates()
        weights = self.weights(mean, spread)[eligible] if self.mode == "pass_rate" else numpy.ones(eligible.sum())
        mean = mean[eligible]
        solved, hopeless = float((mean > self.max_pass_rate).mean()), float((mean < self.min_pass_rate).mean())
        figures = {
            "prompts": int(eligible.sum()), "asked": float((self.rates.asked[eligible] > 0).mean()),
            "solved": solved, "hopeless": hopeless, "learnable": 1 - solved - hopeless,
            "pass rate": float(mean.mean()),
            "effective prompts": float(weights.sum() ** 2 / (weights**2).sum()),
        }  # fmt: skip
        if any(task is not None for task in self.tasks):
            figures["pass rate per task"] = self._per_task(mean, eligible)
        if self.mode == "none":
            figures["epoch"] = self.epoch
        return {f"curriculum {name}": value for name, value in figures.items()}

    def _per_task(self, mean, eligible):
        known = {task: place for place, task in enumerate(dict.fromkeys(self.tasks))}
        places = numpy.array([known[task] for task in self.tasks])[self.rates.groups[eligible]]
        sums, counts = numpy.bincount(places, mean, len(known)), numpy.bincount(places, minlength=len(known))
        return {str(task or "other"): float(sums[at] / counts[at]) for task, at in known.items() if counts[at]}

    # -- checkpoints

    _ARRAYS = ("passed", "failed", "seen_at", "asked")

    def state_dict(self):
        """Tensors, numbers and texts, which `torch.load(weights_only=True)` reads."""
        tensor = lambda array: torch.from_numpy(array.copy())
        return {
            "fingerprint": self.fingerprint, "mode": self.mode, "epoch": self.epoch, "clock": self.rates.clock,
            "generator": json.dumps(self.generator.bit_generator.state),
            "queue": tensor(self.queue), "entered": tensor(self.entered),
            **{name: tensor(getattr(self.rates, name)) for name in self._ARRAYS},
        }  # fmt: skip

    def load_state_dict(self, state):
        """Goes on as the curriculum that made `state` would have, bit for bit.

        Raises:
            ValueError: for a state of other prompts or another mode.
        """
        if state["mode"] != self.mode:
            raise ValueError(f"curriculum: mode={self.mode}, but the checkpoint was made with mode={state['mode']}")
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                "curriculum: the checkpoint was made with other prompts (their number, tasks, levels or from_step "
                "differ); resume with the same dataset_name, or start a new run"
            )
        array = lambda name: state[name].cpu().numpy().copy()  # the trainer reads a checkpoint onto its device
        self.epoch, self.queue, self.entered = state["epoch"], array("queue"), array("entered")
        self.rates.clock = state["clock"]
        for name in self._ARRAYS:
            setattr(self.rates, name, array(name))
        self.generator.bit_generator.state = json.loads(state["generator"])


def _steps(rows, from_step):
    """(N,) int64: the step from which on each row may be asked."""
    if from_step is None:
        given = [0] * len(rows)
    elif callable(from_step):
        given = [from_step(row) for row in rows]
    elif isinstance(from_step, str):
        given = _column(rows, from_step)
        if given is None and from_step != "from_step":
            raise ValueError(f"curriculum: from_step={from_step!r} is no column of the prompts")
        given = given if given is not None else [0] * len(rows)
    else:
        given = list(from_step)
    if len(given) != len(rows):
        raise ValueError(f"curriculum: from_step holds {len(given)} steps for {len(rows)} prompts; one for each")
    return numpy.array([0 if step is None else int(step) for step in given], dtype=numpy.int64)
