"""Choosing tokens on the device: the library's logits processors, the draw, the end of a row, without a host sync.

`generate` hands its loop a list of logits processors. A `TokenSelector` does the same work in device operations that a
CUDA graph can hold, if it knows every processor of the list: exact types only, in the order of the list. The numbers
(temperature, p, token ids, ...) are device tensors, rewritten in place for the next call, so that one captured graph
serves all values; what the graph does depend on is the `signature`.

On the CPU the tokens are those of the library at equal seeds. On a GPU seeds reproduce draws of the same distribution,
but others than the library's: its noise would be written to memory and read again (see kernels_sampling.py).
"""

from dataclasses import dataclass

import torch
from transformers.generation import logits_process
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.utils import logging

from .kernels_sampling import (
    draw_seed,
    draw_tokens,
    filter_scores,
    finish_rows,
    finish_rows_reference,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    race_reference,
    token_log_probs,
    token_log_probs_reference,
    triton,
)

logger = logging.get_logger(__name__)
MAX_EOS_IDS = 64
FILTERS = ("temperature", "top_k", "top_p", "min_p")  # what one kernel does, in this order


@dataclass
class SelectionState:
    """What the choice remembers of each row, on the device, changed in place.

    Shapes (B rows, V vocabulary): step () int64, tokens generated so far, or (B,) where rows differ in it;
    finished (B,) bool; seen (B, V) bool, tokens under the repetition penalty, or None without one;
    seen_from (B,) int64, the first position of the (padded) input that counts as seen.
    """

    step: torch.Tensor
    finished: torch.Tensor
    seen: torch.Tensor | None = None
    seen_from: torch.Tensor | None = None


class UnknownProcessor(Exception):
    """Why a list of processors is left to the library."""


def _scale(scores, factor, inverse):
    # The library divides by a Python number, which CUDA does by multiplying with the reciprocal. Same bits as there.
    return scores * inverse if scores.is_cuda else scores / factor


def _temperature(scores, state, temperature, inverse):
    return _scale(scores, temperature, inverse)


def _repetition_penalty(scores, state, penalty, inverse):
    penalised = torch.where(scores < 0, scores * penalty, _scale(scores, penalty, inverse))
    return torch.where(state.seen, penalised, scores)


def _steps(state):
    return state.step.reshape(-1, 1)


def _suppress_before(scores, state, tokens, step):
    return scores.masked_fill(tokens & (_steps(state) < step), -torch.inf)


def _suppress_at(scores, state, tokens, step):
    return scores.masked_fill(tokens & (_steps(state) == step), -torch.inf)


def _suppress(scores, state, tokens):
    return scores.masked_fill(tokens, -torch.inf)


def _bias(scores, state, bias):
    return scores + bias


def _force_at(scores, state, tokens, step):
    forced = torch.zeros_like(scores).masked_fill(~tokens, -torch.inf)
    return torch.where(_steps(state) == step, forced, scores)


def _exponential_decay(scores, state, tokens, factor, start):
    # The exponent in fp64, as the library computes it in Python.
    growth = (factor ** (_steps(state) - start).clamp_min(0) - 1.0).float()
    penalty = (scores.abs() * growth).masked_fill(~scores.isfinite(), 0.0)
    return torch.where(tokens & (_steps(state) > start), scores + penalty, scores)


def _top_k(scores, state, top_k):
    return keep_top_k(scores, top_k)


def _top_p(scores, state, one_minus_p):
    return keep_top_p(scores, one_minus_p)


def _min_p(scores, state, min_p):
    return keep_min_p(scores, min_p)


def _remove_invalid(scores, state):
    return torch.nan_to_num(scores, nan=0.0)  # infinities become the largest and the smallest fp32


def _normalise(scores, state):
    return scores.log_softmax(-1)


APPLY = {
    "temperature": _temperature, "repetition_penalty": _repetition_penalty, "suppress_before": _suppress_before,
    "suppress_at": _suppress_at, "suppress": _suppress, "bias": _bias, "force_at": _force_at,
    "exponential_decay": _exponential_decay, "top_k": _top_k, "top_p": _top_p, "min_p": _min_p,
    "remove_invalid": _remove_invalid, "normalise": _normalise,
}


class _Reader:
    """Turns one processor of the library into (kind, numbers): Python numbers, or (V,) tensors for sets of tokens."""

    def __init__(self, input_length, vocab_size):
        self.input_length, self.vocab_size = input_length, vocab_size

    def tokens(self, ids, what, must_exist=False):
        """Ids -> (V,) bool. The library ignores ids outside of the vocabulary, or fails on them (`must_exist`)."""
        ids = torch.as_tensor(ids).reshape(-1).cpu()
        inside = (ids >= 0) & (ids < self.vocab_size)
        if must_exist and not inside.all():
            raise UnknownProcessor(f"{what}={ids.tolist()} lies outside of the vocabulary of {self.vocab_size}")
        return torch.zeros(self.vocab_size, dtype=torch.bool).index_fill(0, ids[inside].long(), True)

    def warper(self, processor, kind, **numbers):
        kept = processor.min_tokens_to_keep
        if processor.filter_value != -float("inf") or (kept != 1 and kind != "top_k"):
            name = type(processor).__name__
            raise UnknownProcessor(f"{name} with filter_value={processor.filter_value}, min_tokens_to_keep={kept}")
        return kind, numbers

    def read_temperature(self, p):
        return "temperature", {"factor": p.temperature, "inverse": _reciprocal(p.temperature)}

    def read_repetition_penalty(self, p):
        return "repetition_penalty", {"factor": p.penalty, "inverse": _reciprocal(p.penalty)}

    def read_top_k(self, p):
        return self.warper(p, "top_k", top_k=p.top_k)

    def read_top_p(self, p):
        return self.warper(p, "top_p", one_minus_p=1 - p.top_p)  # in fp64, then rounded: as the library compares

    def read_min_p(self, p):
        return self.warper(p, "min_p", min_p=float(p.min_p))

    def read_min_length(self, p):
        return "suppress_before", {"tokens": self.tokens(p.eos_token_id, "eos_token_id"),
                                   "step": p.min_length - self.input_length}

    def read_min_new_tokens(self, p):
        return "suppress_before", {"tokens": self.tokens(p.eos_token_id, "eos_token_id"),
                                   "step": p.min_new_tokens + p.prompt_length_to_skip - self.input_length}

    def read_suppress(self, p):
        return "suppress", {"tokens": self.tokens(p.suppress_tokens, "suppress_tokens")}

    def read_suppress_at_begin(self, p):
        return "suppress_at", {"tokens": self.tokens(p.begin_suppress_tokens, "begin_suppress_tokens"),
                               "step": p.begin_index - self.input_length}

    def read_forced_eos(self, p):
        return "force_at", {"tokens": self.tokens(p.eos_token_id, "forced_eos_token_id", must_exist=True),
                            "step": p.max_length - 1 - self.input_length}

    def read_exponential_decay(self, p):
        return "exponential_decay", {"tokens": self.tokens(p.eos_token_id, "eos_token_id", must_exist=True),
                                     "factor": torch.tensor(p.regulation_factor, dtype=torch.float64),
                                     "step": p.regulation_start - self.input_length}

    def read_bias(self, p):
        longer = [ids for ids in p.sequence_bias if len(ids) > 1]
        if longer:
            raise UnknownProcessor(f"{type(p).__name__} with sequences of several tokens, such as {longer[0]}")
        ids = [ids[0] for ids in p.sequence_bias]
        self.tokens(ids, "biased token", must_exist=True)
        bias = torch.zeros(self.vocab_size)
        bias[ids] = torch.tensor(list(p.sequence_bias.values()), dtype=torch.float32)
        return "bias", {"bias": bias}

    def read_remove_invalid(self, p):
        return "remove_invalid", {}

    def read_normalise(self, p):
        return "normalise", {}


def _reciprocal(number):
    """1 / number as CUDA's division by a Python number computes it: both in fp32."""
    return (1.0 / torch.tensor(number, dtype=torch.float32)).item()


READERS = {
    logits_process.TemperatureLogitsWarper: _Reader.read_temperature,
    logits_process.TopKLogitsWarper: _Reader.read_top_k,
    logits_process.TopPLogitsWarper: _Reader.read_top_p,
    logits_process.MinPLogitsWarper: _Reader.read_min_p,
    logits_process.RepetitionPenaltyLogitsProcessor: _Reader.read_repetition_penalty,
    logits_process.MinLengthLogitsProcessor: _Reader.read_min_length,
    logits_process.MinNewTokensLengthLogitsProcessor: _Reader.read_min_new_tokens,
    logits_process.SuppressTokensLogitsProcessor: _Reader.read_suppress,
    logits_process.SuppressTokensAtBeginLogitsProcessor: _Reader.read_suppress_at_begin,
    logits_process.ForcedEOSTokenLogitsProcessor: _Reader.read_forced_eos,
    logits_process.ExponentialDecayLengthPenalty: _Reader.read_exponential_decay,
    logits_process.NoBadWordsLogitsProcessor: _Reader.read_bias,
    logits_process.SequenceBiasLogitsProcessor: _Reader.read_bias,
    logits_process.InfNanRemoveLogitsProcessor: _Reader.read_remove_invalid,
    logits_process.LogitNormalization: _Reader.read_normalise,
}


def _as_tensor(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float32, device=device)


class TokenSelector:
    """The choice of one token a row, as device operations.

    Attributes:
        signature: hashable; equal for two selectors whose captured graphs are interchangeable.
        parameters: name -> device tensor with the numbers; `load_parameters` rewrites them in place.
        do_sample: False for the largest score. has_eos: rows can finish.

    Build it with `from_processors`. A step: `tokens = choose(logits, state)`, then `finish(tokens, state)`.
    """

    def __init__(self, steps, parameters, do_sample, has_eos, vocab_size, device, prompt_ignore_length=None):
        self.steps, self.parameters, self.prompt_ignore_length = steps, parameters, prompt_ignore_length
        self.do_sample, self.has_eos, self.vocab_size = do_sample, has_eos, vocab_size
        self.device = torch.device(device)
        self.penalises = "repetition_penalty" in steps
        self.signature = (tuple(steps), do_sample, has_eos, vocab_size, self.device)
        # The trailing run of filters in the library's order, which the fused kernel serves.
        self.fused_from = len(steps)
        while self.fused_from and self._continues(self.fused_from):
            self.fused_from -= 1
        self.use_kernels = self.device.type == "cuda" and triton is not None
        if self.device.type == "cuda" and triton is None:
            logger.warning_once("Triton is not installed: tokens are filtered by sorting the vocabulary (slower).")

    def _continues(self, first):
        """Whether the step before `first` can join the fused run that starts there."""
        kind = self.steps[first - 1]
        if kind not in FILTERS:
            return False
        return first == len(self.steps) or FILTERS.index(kind) < FILTERS.index(self.steps[first])

    @classmethod
    def from_processors(cls, processors, generation_config, input_length, vocab_size, device, eos_token_ids=None):
        """-> (selector, None), or (None, reason) when a processor is unknown or not served exactly.

        Args:
            processors: the `LogitsProcessorList` that `_sample` was given.
            generation_config: as prepared by `generate`; `do_sample` and the pad token are read.
            input_length: width of the (padded) `input_ids` at the first step.
            eos_token_ids: those of `split_criteria`: None without an end-of-sequence criterion.
        """
        reader = _Reader(input_length, vocab_size)
        steps, parameters = [], {"input_length": input_length}
        try:
            for processor in processors:
                if type(processor) not in READERS:
                    raise UnknownProcessor(f"{type(processor).__name__} is not one that is served on the device")
                kind, numbers = READERS[type(processor)](reader, processor)
                if kind in steps and kind == "repetition_penalty":
                    raise UnknownProcessor("more than one RepetitionPenaltyLogitsProcessor")
                parameters.update({f"{len(steps)}.{name}": value for name, value in numbers.items()})
                steps.append(kind)
            parameters.update(cls._end_of_row(generation_config, eos_token_ids))
        except UnknownProcessor as reason:
            return None, str(reason)
        parameters = {name: _as_tensor(value, device) for name, value in parameters.items()}
        ignored = [p.prompt_ignore_length for p in processors if hasattr(p, "prompt_ignore_length")]
        do_sample, has_eos = bool(generation_config.do_sample), eos_token_ids is not None
        return cls(steps, parameters, do_sample, has_eos, vocab_size, device, *ignored), None

    @staticmethod
    def _end_of_row(generation_config, eos_token_ids):
        if eos_token_ids is None:
            return {}
        pad = getattr(generation_config, "_pad_token_tensor", None)
        pad = generation_config.pad_token_id if pad is None else int(pad)
        if pad is None:
            raise UnknownProcessor("pad_token_id=None with an end-of-sequence token")
        eos = torch.as_tensor(eos_token_ids, dtype=torch.int64).reshape(-1).cpu()
        if len(eos) > MAX_EOS_IDS:
            raise UnknownProcessor(f"{len(eos)} end-of-sequence ids, more than {MAX_EOS_IDS}")
        return {"eos_ids": torch.cat((eos, eos.new_full((MAX_EOS_IDS - len(eos),), -1))), "pad_id": int(pad)}

    def load_parameters(self, other):
        """Takes over the numbers of `other` in place (equal signatures), so that captured graphs see them."""
        if self.signature != other.signature:
            raise ValueError(f"signature={other.signature} differs from {self.signature}; capture a graph for it")
        for name, value in self.parameters.items():
            value.copy_(other.parameters[name])
        self.prompt_ignore_length = other.prompt_ignore_length

    def new_state(self, batch_size):
        """An empty `SelectionState` of `batch_size` rows."""
        zeros = {"device": self.device, "dtype": torch.int64}
        state = SelectionState(torch.zeros((), **zeros), torch.zeros(batch_size, dtype=torch.bool, device=self.device))
        if self.penalises:
            state.seen = torch.zeros(batch_size, self.vocab_size, dtype=torch.bool, device=self.device)
            state.seen_from = torch.zeros(batch_size, **zeros)
        return state

    def reset_state(self, state, input_ids, rows=slice(None), ignore=None):
        """In place: no token generated, no row finished, and the prompts' tokens seen.

        The library's penalty counts every id of `input_ids` from `prompt_ignore_length` on: a number, one a row
        (`generate` gives the left padding), or None for all of them, padding included.

        Args:
            input_ids: (N, S) int64, padded on the left.
            rows: slice or (N,) indices of the rows that start anew; all by default. Others need `step` (B,).
            ignore: (N,) int64 in place of the processors' `prompt_ignore_length`, for rows of another batch.
        """
        state.finished[rows] = False
        if state.step.dim():
            state.step[rows] = 0
        else:
            state.step.zero_()
        if not self.penalises:
            return
        ignore = self.prompt_ignore_length if ignore is None else ignore
        ignore = torch.as_tensor(0 if ignore is None else ignore, device=self.device).expand(input_ids.shape[0])
        state.seen_from[rows] = ignore.long()
        positions = torch.arange(input_ids.shape[1], device=self.device)
        ids = input_ids.to(self.device).clamp(max=self.vocab_size)  # beyond the vocabulary: a column that is dropped
        ids = ids.masked_fill(positions < ignore.unsqueeze(1), self.vocab_size)
        seen = torch.zeros(len(ids), self.vocab_size + 1, dtype=torch.bool, device=self.device).scatter_(1, ids, True)
        state.seen[rows] = seen[:, :-1]

    def process(self, logits, state):
        """(B, V) logits of any float dtype -> (B, V) float32 scores, as the library's processors leave them."""
        if not self._fuses_filters():
            return self._apply(logits.float(), state, len(self.steps))
        return filter_scores(self._apply(logits, state, self.fused_from), **self._filter_numbers())

    def choose(self, logits, state):
        """(B, V) logits of any float dtype -> (B,) int64 tokens: the largest score, or a draw from softmax(scores).

        Draws consume torch's default generator of the device: without kernels exactly as the library's
        `torch.multinomial` does, with them a seed a step. A row without a finite score gets some token of the
        vocabulary on a GPU (an error would need the host), and torch's error on the CPU.
        """
        if not self.do_sample:
            scores = self.process(logits, state) if self.steps else logits
            return draw_tokens(scores, None) if self.use_kernels else scores.argmax(-1)
        if self.device.type == "cpu" and not self.use_kernels:
            return torch.multinomial(self.process(logits, state).softmax(-1), 1).squeeze(1)
        if self.use_kernels:
            seed, scores = draw_seed(logits.device), self._apply(logits, state, self.fused_from)
            return draw_tokens(scores, seed, **self._filter_numbers())
        noise = torch.empty(logits.shape, dtype=torch.float32, device=logits.device).exponential_(1)
        return race_reference(self.process(logits, state), noise)  # torch.multinomial may look from the host

    def _fuses_filters(self):
        return self.use_kernels and any(kind != "temperature" for kind in self.steps[self.fused_from:])

    def _apply(self, scores, state, end):
        """The first `end` steps, one by one. Without any the logits are returned in their own dtype."""
        if end:
            scores = scores.float()
        for position, kind in enumerate(self.steps[:end]):
            prefix = f"{position}."
            numbers = [value for name, value in self.parameters.items() if name.startswith(prefix)]
            scores = APPLY[kind](scores, state, *numbers)
        return scores

    def _filter_numbers(self):
        """Arguments of the fused kernel, by name."""
        names = {"temperature": "inverse", "top_k": "top_k", "top_p": "one_minus_p", "min_p": "min_p"}
        arguments = {"temperature": "inverse_temperature"}
        return {
            arguments.get(kind, names[kind]): self.parameters[f"{position}.{names[kind]}"]
            for position, kind in enumerate(self.steps) if position >= self.fused_from
        }

    def finish(self, tokens, state):
        """In place: finished rows get the pad id, a row that chose an end of sequence is finished, one more step.

        As the library, rows are padded only where an end-of-sequence criterion exists, but then also those that another
        criterion finished (the loop sets `state.finished`). Shapes: tokens (B,) int64.
        """
        if self.has_eos:
            finish = finish_rows if self.use_kernels else finish_rows_reference
            finish(tokens, state.finished, self.parameters["eos_ids"], self.parameters["pad_id"])
        if self.penalises:
            counts = self.parameters["input_length"] + state.step >= state.seen_from
            chosen = tokens.clamp(max=self.vocab_size - 1).unsqueeze(1)
            within = (counts & (tokens < self.vocab_size)).unsqueeze(1)
            state.seen.scatter_(1, chosen, state.seen.gather(1, chosen) | within)
        state.step.add_(1)

    def log_prob_of(self, logits, tokens, out, temperature=1.0):
        """Writes the tokens' log-probabilities under logits / temperature, without any processor, into `out`.

        Shapes: logits (B, V) any float dtype, tokens (B,) int64 within the vocabulary, out (B,) float32 -> out.
        """
        (token_log_probs if self.use_kernels else token_log_probs_reference)(logits, tokens, out, temperature)
        return out


def split_criteria(stopping_criteria):
    """-> (max_length or None, eos ids (list) or None, other criteria): the first two are served on the device.

    Exact types only. The ids are an empty list, not None, where only an unknown criterion carries `eos_token_id`: the
    library pads finished rows then too. The other criteria are to be called by the loop, as the library does.
    """
    lengths, eos_ids, others, has_eos = [], [], [], False
    for criterion in stopping_criteria:
        has_eos = has_eos or hasattr(criterion, "eos_token_id")
        if type(criterion) is MaxLengthCriteria:
            lengths.append(criterion.max_length)
        elif type(criterion) is EosTokenCriteria:
            eos_ids += criterion.eos_token_id.reshape(-1).tolist()
        else:
            others.append(criterion)
    return min(lengths, default=None), sorted(set(eos_ids)) if has_eos else None, others
