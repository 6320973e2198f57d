"""Requests of `generate_batch`: what may be asked for, how long each may become, and the cache that they fit in."""

import copy
import time
from dataclasses import dataclass, field

import torch
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from transformers.generation.logits_process import ForcedEOSTokenLogitsProcessor, MinLengthLogitsProcessor

from .decoding_cache import ROUND, fp8_width
from .decoding_sampling import TokenSelector

CPU_TOKENS = 65536  # tokens that the cache holds by default, without CUDA
CUDA_SHARE = 0.6    # part of the free memory that the cache takes by default
MAX_SLOTS = 256     # rows by default: what the recorded batch sizes reach to


@dataclass
class Request:
    """One sequence to generate. `launched` counts tokens that the device has been told to choose, `tokens` those that
    the host has seen; `limit`: new tokens at most."""

    request_id: str
    prompt: list
    limit: int
    created: float
    tokens: list = field(default_factory=list)
    log_probs: list = field(default_factory=list)
    stamps: list = field(default_factory=list)
    launched: int = 0
    done: bool = False
    started: float = -1.0
    ended: float = -1.0

    @property
    def live(self):
        """Whether its row has steps left, as far as the host knows."""
        return not self.done and self.launched < self.limit

    def take(self, tokens, log_probs, end_tokens, now):
        """Adds what a block gave, up to the end of the sequence; True when that ends it."""
        for place, token in enumerate(tokens):
            self.tokens.append(token)
            self.stamps.append(now)
            if log_probs is not None:
                self.log_probs.append(log_probs[place])
            if token in end_tokens or len(self.tokens) == self.limit:
                self.done, self.ended = True, now
                return True
        return False

    def output(self, with_stamps):
        return GenerationOutput(
            request_id=self.request_id, prompt_ids=self.prompt, generated_tokens=self.tokens, logprobs=self.log_probs,
            status=RequestStatus.FINISHED, created_time=self.created, lifespan=(self.started, self.ended),
            timestamps=self.stamps if with_stamps else None,
        )  # fmt: skip


def read_requests(model, inputs, config):
    """-> list of Request in the order of their ids: `req_0`, and with num_return_sequences=n before each the
    n - 1 others, `req_0__child#0`, ..., as the library orders them. Checks every length before anything runs."""
    vocab, positions = model.config.vocab_size, model.config.max_position_embeddings
    copies, requests, created = config.num_return_sequences or 1, [], time.perf_counter()
    for index, prompt in enumerate(inputs):
        name = f"req_{index}"
        prompt = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
        if not prompt:
            raise ValueError(f"{name} is empty; every prompt needs at least one token")
        wrong = [token for token in prompt if not isinstance(token, int) or not 0 <= token < vocab]
        if wrong:
            raise ValueError(f"{name} holds {wrong[0]!r}, which is no token id in [0, vocab_size={vocab})")
        limit = new_token_limit(name, len(prompt), config, positions)
        names = [f"{name}__child#{child}" for child in range(copies - 1)] + [name]
        requests += [Request(each, prompt, limit, created) for each in names]
    return requests


def new_token_limit(name, length, config, positions):
    """New tokens at most for a prompt of `length` tokens: max_new_tokens, else what max_length leaves, else what the
    positions leave (the library's method knows no limit then)."""
    if config.max_new_tokens is not None:
        limit, setting = config.max_new_tokens, f"max_new_tokens={config.max_new_tokens}"
    elif config.max_length is not None:
        limit, setting = config.max_length - length, f"max_length={config.max_length}"
    else:
        limit, setting = positions - length, f"max_position_embeddings={positions}"
    if limit < 1:
        raise ValueError(f"{name}: its prompt of {length} tokens and {setting} leave no token to generate; "
                         "raise it or shorten the prompt")
    if length + limit > positions:
        raise ValueError(f"{name}: its prompt of {length} tokens and {setting} make {length + limit} tokens, more "
                         f"than max_position_embeddings={positions}; lower it or shorten the prompt")
    return limit


def batch_config(model, generation_config, settings):
    """A copy of the generation config as given: as in the library's method nothing is filled in from the model's but
    the end token. `settings`: fields given as keywords. Raises ValueError for what only `generate` serves."""
    config = copy.deepcopy(model.generation_config if generation_config is None else generation_config)
    unknown = sorted(config.update(**settings))
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no argument of generate_batch and no field of GenerationConfig; "
                         "`generate` takes arguments of the model's forward pass")
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"generate_batch serves greedy search and sampling, not {mode.value}; `generate` serves it")
    for name in ("stop_strings", "max_time", "output_scores", "output_logits"):
        if getattr(config, name, None):
            raise ValueError(f"{name}={getattr(config, name)!r} is not served by generate_batch; `generate` serves it")
    if model.decoding.record_routes:
        raise ValueError("record_routes=True is not served by generate_batch; `generate` serves it")
    end = config.eos_token_id
    for other in (model.generation_config, model.config):
        end = other.eos_token_id if end is None else end
    end = [end] if isinstance(end, int) else torch.as_tensor([] if end is None else end).flatten().tolist()
    config.eos_token_id = [token for token in end if token >= 0] or None  # -1: none, as in the library
    return config


def check_library_config(library_config):
    """ValueError for settings of the library's ContinuousBatchingConfig that change what a call gives and are not
    served. Served: num_blocks, max_memory_percent, max_requests_per_batch, return_logprobs, seed. The rest is about how
    the library lays out and schedules its own cache, and has nothing to act on here."""
    for name in ("per_request_processors", "cpu_offload_space"):
        if getattr(library_config, name, None):
            raise ValueError(f"continuous_batching_config.{name}={getattr(library_config, name)!r} is not served here; "
                             "leave it at its default, or set model.decoding.enabled = False for the library's method")


def batch_selector(model, config, requests, device):
    """The TokenSelector of a call; ValueError naming the processor that it does not serve."""
    lengths = {len(request.prompt) for request in requests}
    width = max(lengths)
    config.max_length = width + config.max_new_tokens if config.max_new_tokens is not None else config.max_length
    if config.min_new_tokens is not None:
        config.min_length = None  # as in `generate`, the number of new tokens takes precedence
    model._prepare_special_tokens(config, device=device)
    processors = model._get_logits_processor(
        config, input_ids_seq_length=width, encoder_input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device),
        device=device,
    )  # fmt: skip
    for processor in processors if len(lengths) > 1 else ():
        by_total = isinstance(processor, ForcedEOSTokenLogitsProcessor) and config.max_new_tokens is None
        if by_total or isinstance(processor, MinLengthLogitsProcessor):
            raise ValueError(f"{type(processor).__name__} counts from the start of prompts that differ in length: set "
                             "min_new_tokens or max_new_tokens, or use `generate`")
    selector, reason = TokenSelector.from_processors(
        processors, config, width, model.config.vocab_size, device, config.eos_token_id
    )
    if selector is None:
        raise ValueError(f"generate_batch chooses tokens on the device: {reason}; `generate` serves it")
    return selector


def token_bytes(engine):
    """Bytes of one token in the cache, all layers."""
    config, weight = engine.model.config, engine.model.model.embed_tokens.weight
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    width = (config.kv_lora_rank + config.qk_rope_head_dim) * dtype.itemsize
    if engine.options.cache_dtype == "fp8":
        width = fp8_width(config.kv_lora_rank, config.qk_rope_head_dim)
    return width * len(engine.model.model.layers)


def cache_shape(engine, requests, library_config):
    """-> (rows, tokens a row) of the cache: rows as long as the longest request, as many as the budget holds.

    The budget is `batch_tokens`, else the blocks of the library's config, else on CUDA a share of the free memory,
    which then also pays for the cache's scratch row.
    Raises ValueError for a request that the budget does not hold.
    """
    options, device = engine.options, engine.device
    longest = max(requests, key=lambda request: len(request.prompt) + request.limit)
    needed = len(longest.prompt) + longest.limit
    capacity = -(-needed // ROUND) * ROUND
    budget, scratch = options.batch_tokens, 0
    if budget is None and getattr(library_config, "num_blocks", None):
        budget = library_config.num_blocks * library_config.page_size
    if budget is None and device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        share = getattr(library_config, "max_memory_percent", None) or CUDA_SHARE
        budget, scratch = int(free * share) // token_bytes(engine), capacity
    elif budget is None:
        budget = CPU_TOKENS
    if needed + scratch > budget:
        raise ValueError(
            f"{longest.request_id}: its prompt of {len(longest.prompt)} tokens and limit of {longest.limit} new ones "
            f"make {needed} tokens, and the cache holds {budget - scratch} (batch_tokens={options.batch_tokens}); "
            "raise model.decoding.batch_tokens, or set a smaller max_new_tokens"
        )
    most = getattr(library_config, "max_requests_per_batch", None) or options.batch_slots or MAX_SLOTS
    return min(len(requests), most, max((budget - scratch) // capacity, 1)), capacity
