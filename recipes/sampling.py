"""Completions of any causal language model that do not depend on how they are computed together.

    settings = SamplingSettings(max_new_tokens=256, temperature=0.6, samples=4)
    completions = sample_completions(model, tokenizer, prompts, settings, keys)   # prompts: lists of token ids
    completions[0][3].text                                                        # fourth sample of the first prompt

Each choice of a token uses one number in [0, 1) that is a function of (seed, key of the prompt, sample,
step), a counter-based Philox stream, and picks the token whose share of the cumulative distribution that
number falls into. So neither batch size, nor order, nor the number of processes, nor the global random
state changes a completion, and a sample asked for alone is the sample that was drawn among others. What is
left is rounding: sums in another order differ by 1e-6 in float32, which matters only where two tokens are
that near to each other. In bfloat16 they differ by 1e-2, and completions may part.

Distribution: temperature, then top-k, then top-p, as transformers' own warpers; a repetition penalty or other
processors in the model's generation config are left out: the settings say everything.
"""

import hashlib
import logging
import math
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import numpy
import torch
from torch.distributed.tensor import DTensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from modeling_deepseek_r1.expert_parallel import is_expert_parallel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are drawn. temperature 0 is greedy; top_p 1 and top_k 0 switch these off."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    samples: int = 1
    seed: int = 0
    batch_size: int = 32
    stop: tuple = ()  # texts that end a completion; they are not part of it

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for name in ("max_new_tokens", "samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]; 1 keeps the whole distribution")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (off) or positive")
        if self.samples > 1 and not self.temperature:
            raise ValueError(f"samples={self.samples} with temperature=0 would be the same text {self.samples} times; "
                             "set temperature (0.6 is R1's) or samples=1")
        if not all(self.stop):
            raise ValueError(f"stop={self.stop!r} holds an empty text, which every completion contains; leave it out")


@dataclass(frozen=True)
class Completion:
    """`log_prob` is the mean log-probability of its tokens (the end token too) at temperature 1.

    `finished`: it ended by itself, with an end token or a stop text. `shortened`: it was not given
    max_new_tokens, because the model's context was full before.
    """

    text: str
    token_ids: list
    finished: bool
    log_prob: float
    shortened: bool = False


@dataclass(frozen=True)
class Request:
    """One completion to be drawn. `key` names the prompt in the random stream: any text."""

    prompt_ids: tuple
    key: str
    sample: int = 0


# ---------------------------------------------------------------- choosing tokens


def uniforms(seed, key, sample, count):
    """(count,) numbers in [0, 1) of one completion; the first n are the same for any count."""
    digest = hashlib.blake2b(f"{seed}|{sample}|{key}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return numpy.random.Generator(numpy.random.Philox(key=int.from_bytes(digest, "little"))).random(count)


def draw(scores, numbers):
    """Tokens by the inverse of the cumulative distribution: (B, V) scores, (B,) numbers in [0, 1) -> (B,) ids.

    In float64 and in the vocabulary's order: no sorting, so near-equal scores cannot change places.
    """
    cumulative = scores.double().softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]
    # Below the total even after rounding, or the answer would lie beyond the last possible token.
    targets = torch.minimum(numbers.double().unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
    # The last token only where the scores are no numbers, which `_completion` reports.
    return torch.searchsorted(cumulative, targets, right=True).squeeze(-1).clamp(max=scores.shape[-1] - 1)


class TokenChoice(LogitsProcessor):
    """Chooses each row's token and leaves no other; keeps the tokens' log-probabilities, one (B,) tensor a step."""

    def __init__(self, settings, numbers, prompt_length):
        self.numbers, self.prompt_length, self.log_probs = numbers, prompt_length, []
        self.warpers = LogitsProcessorList()
        if settings.temperature not in (0, 1):
            self.warpers.append(TemperatureLogitsWarper(float(settings.temperature)))
        if settings.top_k:
            self.warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            self.warpers.append(TopPLogitsWarper(settings.top_p))

    def __call__(self, input_ids, scores):
        scores = scores.float()
        if self.numbers is None:
            tokens = scores.argmax(-1)
        else:
            tokens = draw(self.warpers(input_ids, scores), self.numbers[:, input_ids.shape[1] - self.prompt_length])
        tokens = tokens.unsqueeze(-1)
        self.log_probs.append((scores.gather(-1, tokens) - scores.logsumexp(-1, keepdim=True)).squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens, 0.0)


class StopTexts(StoppingCriteria):
    """Ends the rows whose text holds a stop text; `ends` maps a row to its number of tokens by then."""

    def __init__(self, tokenizer, stop, prompt_length):
        self.tokenizer, self.stop, self.prompt_length, self.ends = tokenizer, stop, prompt_length, {}
        self.window = 4 * max(map(len, stop)) + 8  # a character has at most four byte tokens

    def __call__(self, input_ids, scores, **kwargs):
        begin = max(self.prompt_length, input_ids.shape[1] - self.window)
        for row, text in enumerate(self.tokenizer.batch_decode(input_ids[:, begin:].tolist())):
            if row not in self.ends and any(stop in text for stop in self.stop):
                self.ends[row] = input_ids.shape[1] - self.prompt_length
        return torch.tensor([row in self.ends for row in range(len(input_ids))], device=input_ids.device)


# ---------------------------------------------------------------- the model


def is_spread(model):
    """Whether a forward pass takes all processes: parameters sharded by FSDP2 or ZeRO-3, or experts split over them."""
    return any(
        isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") or is_expert_parallel(parameter)
        for parameter in model.parameters()
    )


def whole_model(model):
    """The model without DDP's wrapper.

    Raises:
        ValueError: for a model spread over processes, which cannot generate on each by itself.
    """
    model = model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
    if is_spread(model):
        raise ValueError(f"this {type(model).__name__} is spread over processes (FSDP, ZeRO-3, expert_parallel_size): "
                         "save it and evaluate the folder with recipes/eval.py")  # fmt: skip
    return model


@contextmanager
def evaluation_mode(model):
    """Evaluation mode without gradients; every module's own mode and the random state are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def plain_generation(model, config):
    """`generate` fills what a config leaves open from the model's own one: put `config` there meanwhile."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    holders = [(holder, holder.generation_config) for holder in {id(m): m for m in (model, base)}.values()]
    try:
        for holder, _ in holders:
            holder.generation_config = config
        yield
    finally:
        for holder, before in holders:
            holder.generation_config = before


def end_token_ids(model, tokenizer):
    """The tokens that end a completion: those of the model's generation config and the tokenizer's."""
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    given = [] if given is None else [given] if isinstance(given, int) else list(given)
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return sorted({int(token) for token in given + own})


def context_length(model):
    """Positions that the model has, or None where its config sets no bound."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def token_budget(prompt_ids, settings, context):
    """Tokens that a completion may have: max_new_tokens, or what is left of the context.

    Raises:
        ValueError: for an empty prompt or one that fills the context.
    """
    if not len(prompt_ids):
        raise ValueError("a prompt has no token; give it some text")
    room = settings.max_new_tokens if context is None else context - len(prompt_ids)
    if room < 1:
        raise ValueError(f"a prompt of {len(prompt_ids)} tokens fills the model's max_position_embeddings={context}: "
                         "nothing can follow it; leave such prompts out or take easier problems")
    return min(settings.max_new_tokens, room)


def in_batches(items, batch_size, run):
    """Yield (batch, run(batch)); halves the batch size, for good, when a GPU's memory does not suffice."""
    position, size = 0, batch_size
    while position < len(items):
        batch = items[position:position + size]
        try:
            result = run(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            size = max(1, len(batch) // 2)
        else:
            yield batch, result
            position += len(batch)
            continue
        if torch.cuda.is_available():  # outside of the handler, whose traceback keeps the tensors alive
            torch.cuda.empty_cache()
        logger.warning("out of device memory with a batch of %d: going on with batch_size=%d", len(batch), size)


# ---------------------------------------------------------------- completions


def left_padded(model, tokenizer, prompts, length):
    """(input_ids, attention_mask, id of the padding) for `generate`."""
    pad = tokenizer.pad_token_id
    pad = (end_token_ids(model, tokenizer) or [0])[0] if pad is None else pad
    rows = [[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows, device=model.device), torch.tensor(mask, device=model.device), pad


class OnlyToken(LogitsProcessor):
    """Leaves one token, the same for every row and step."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(-1, torch.tensor([self.token], device=scores.device), 0.0)


def company_changes(model, tokenizer, prompt, other):
    """Whether a longer prompt beside it, and so left padding, changes what the model says after a prompt.

    It does where a model has no use for the attention mask, as some recurrent ones. Rounding does not count: it
    moves logits by about 1e-6 of their spread in float32 and 1e-2 in half precision, pads read as text by far more.
    """
    logits = []
    for prompts in ([prompt], [other, prompt]):
        ids, mask, pad = left_padded(model, tokenizer, prompts, max(map(len, prompts)))
        config = GenerationConfig(max_new_tokens=2, do_sample=False, num_beams=1, use_cache=True, pad_token_id=pad,
                                  output_logits=True, return_dict_in_generate=True)
        with plain_generation(model, config):
            found = model.generate(input_ids=ids, attention_mask=mask, generation_config=config,
                                   logits_processor=LogitsProcessorList([OnlyToken(prompt[-1])]))
        logits.append(torch.stack([step[-1].float() for step in found.logits]))
    moved, spread = (logits[1] - logits[0]).abs().mean(), logits[0].std()
    return bool(moved > (0.01 if model.dtype == torch.float32 else 0.1) * spread)


def safe_batch_size(model, tokenizer, requests, batch_size):
    """`batch_size`, or 1 for a model whose answers depend on what else is in the batch; says so."""
    if batch_size == 1 or len(requests) < 2:
        return batch_size
    prompts = [request.prompt_ids for request in requests]
    shortest, longest = min(prompts, key=len), max(prompts, key=len)
    if not company_changes(model, tokenizer, shortest, longest[:len(shortest) + 16]):
        return batch_size
    logger.warning("the answers of %s depend on what else is in a batch (it reads padding as text, or mixes rows): "
                   "going on with batch_size=1", type(model).__name__)
    return 1


def _generate(model, tokenizer, batch, settings, budget):
    """The Completions of requests with one budget, by one call of `generate`."""
    ends, device = end_token_ids(model, tokenizer), model.device
    length = max(len(request.prompt_ids) for request in batch)
    ids, mask, pad = left_padded(model, tokenizer, [request.prompt_ids for request in batch], length)
    numbers = None
    if settings.temperature:
        numbers = numpy.stack([uniforms(settings.seed, r.key, r.sample, budget) for r in batch])
        numbers = torch.from_numpy(numbers).to(device)
    choice = TokenChoice(settings, numbers, length)
    stopping = [StopTexts(tokenizer, settings.stop, length)] if settings.stop else []
    config = GenerationConfig(max_new_tokens=budget, do_sample=False, num_beams=1, use_cache=True, pad_token_id=pad,
                              eos_token_id=ends or None, bos_token_id=tokenizer.bos_token_id)
    with plain_generation(model, config):
        ids = model.generate(
            input_ids=ids, attention_mask=mask, logits_processor=LogitsProcessorList([choice]),
            stopping_criteria=StoppingCriteriaList(stopping), generation_config=config,
        )  # fmt: skip
    log_probs = torch.stack(choice.log_probs, dim=1).double().tolist()
    stopped = stopping[0].ends if stopping else {}
    return [_completion(tokenizer, tokens, log_probs[row], ends, stopped.get(row), settings, budget)
            for row, tokens in enumerate(ids[:, length:].tolist())]


def _completion(tokenizer, tokens, log_probs, ends, stopped_at, settings, budget):
    """A row cut where it ended by itself.

    Raises:
        ValueError: for logits that are no numbers.
    """
    end = next((place for place, token in enumerate(tokens) if token in ends), None)
    by_text = stopped_at is not None and (end is None or stopped_at <= end)
    count = stopped_at if by_text else len(tokens) if end is None else end + 1
    kept = tokens[:count] if by_text or end is None else tokens[:end]
    text = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if by_text:
        text = text[:min(text.find(stop) for stop in settings.stop if stop in text)]
    finished, log_prob = by_text or end is not None, sum(log_probs[:count]) / count
    if math.isnan(log_prob):
        raise ValueError("the model's logits are not numbers (NaN or infinite): check its weights, or load it with "
                         "dtype=float32")
    return Completion(text, kept, finished, log_prob,
                      shortened=not finished and budget < settings.max_new_tokens)


def complete_requests(model, tokenizer, requests, settings, on_batch=None):
    """The Completions of requests, in their order.

    Prompts are batched by length, longest first, and left-padded; one at a time where the model cannot do with
    padding. A prompt whose completion would pass the model's context gets what is left of it, which
    `Completion.shortened` says.

    Args:
        on_batch: called with [(place in `requests`, Completion)] as they come.
    Raises:
        ValueError: for a prompt that is empty or fills the context; for a model whose logits are no numbers.
    """
    model = whole_model(model)
    context = context_length(model)
    budgets = [token_budget(request.prompt_ids, settings, context) for request in requests]
    order = sorted(range(len(requests)), key=lambda place: -len(requests[place].prompt_ids))
    results = [None] * len(requests)
    with evaluation_mode(model):
        batch_size = safe_batch_size(model, tokenizer, requests, settings.batch_size)
        # One budget a batch: no row is ever run past the model's last position, which some models cannot do.
        for budget, places in groupby(order, key=budgets.__getitem__):
            def run(batch, budget=budget):
                return _generate(model, tokenizer, [requests[place] for place in batch], settings, budget)

            for batch, found in in_batches(list(places), batch_size, run):
                for place, completion in zip(batch, found):
                    results[place] = completion
                if on_batch is not None:
                    on_batch(list(zip(batch, found)))
    return results


def sample_completions(model, tokenizer, prompts, settings, keys=None, on_batch=None):
    """`settings.samples` Completions of each prompt.

    Args:
        prompts: lists of token ids, rendered and encoded by the caller.
        keys: a text for each prompt that names it in the random stream. Default: its token ids, so that
            equal prompts get equal samples.
        on_batch: called with [(prompt, sample, Completion)] as they come.
    Returns:
        list of lists, in the order of the prompts.
    """
    keys = [" ".join(map(str, prompt)) for prompt in prompts] if keys is None else list(keys)
    if len(keys) != len(prompts):
        raise ValueError(f"{len(keys)} keys for {len(prompts)} prompts: one for each is needed")
    count = settings.samples
    requests = [Request(tuple(prompt), str(key), sample) for prompt, key in zip(prompts, keys)
                for sample in range(count)]

    def told(found):
        on_batch([(place // count, place % count, completion) for place, completion in found])

    found = complete_requests(model, tokenizer, requests, settings, told if on_batch else None)
    return [found[start:start + count] for start in range(0, len(found), count)]
