"""The loop of one `generate` call: prompts into the cache, then a token a step for every unfinished row."""

import contextlib

import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .decoding_engine import batch_size_for
from .decoding_prefill import compact_prompts, distinct_rows, prefill
from .decoding_record import DecodingRecorder
from .decoding_rows import RowState
from .decoding_sampling import TokenSelector
from .kernels_sampling import token_log_probs_reference

try:
    import triton
except ImportError:
    triton = None
else:
    from .decoding_fused import KernelStep
    from .kernels_drafting import advance

POLL_STEPS = 8  # steps between looks at which rows have finished; each look is a copy that nobody waits for
GROWTH = 1024   # tokens a row that the cache is made longer by than the prompts, at first


class FinishedRows:
    """Which rows have finished, as the host knows it: copies of the device's flags that arrive some steps later."""

    def __init__(self, device):
        self.device, self.waiting, self.known = device, [], None

    def ask(self, finished):
        """Starts a copy of `finished` (B,) bool; on a CPU the answer is there at once."""
        if self.device.type != "cuda":
            self.known = finished.clone()
            return
        flags = torch.empty(finished.shape, dtype=torch.bool, pin_memory=True)
        flags.copy_(finished, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.waiting.append((event, flags))

    def answer(self, wait=False):
        """The newest flags that have arrived, or None."""
        while self.waiting and (wait or len(self.waiting) > 2 or self.waiting[0][0].query()):
            event, flags = self.waiting.pop(0)
            event.synchronize()
            self.known = flags
        return self.known

    def forget(self):
        """After the rows were put together anew: flags on their way are of other rows."""
        self.waiting, self.known = [], None


class DecodingLoop:
    """Greedy search or sampling for left-padded prompts; the arguments are those of the library's `_sample`.

    Shapes (B rows, P prompt columns, L max_length): input_ids (B, P), attention_mask (B, P) or None -> (B, <= L).
    `end_tokens`: list of ids or None. `criteria`: stopping criteria other than length and end tokens.
    """

    def __init__(self, model, input_ids, attention_mask, processors, criteria, config, max_length, end_tokens,
                 streamer):
        self.model, self.engine, self.options = model, model.decoding_engine, model.decoding
        self.config, self.processors, self.criteria, self.streamer = config, processors, criteria, streamer
        self.input_ids, self.max_length, self.end_tokens = input_ids, max_length, end_tokens
        self.ids, self.lengths = compact_prompts(input_ids, attention_mask)
        self.rows, self.prompt_width = input_ids.shape
        self.device = input_ids.device
        self.scores, self.raw_logits = [], []
        self.keeps = [name for name in ("output_scores", "output_logits")
                      if config.return_dict_in_generate and getattr(config, name)]
        self.selector = None
        if not (self.keeps or criteria):
            self.selector, _ = TokenSelector.from_processors(
                processors, config, self.prompt_width, model.config.vocab_size, self.device, end_tokens
            )
        self.end_ids = None if end_tokens is None else torch.tensor(end_tokens, device=self.device)
        # Padding replaces what a finished row would say only where something ends rows, as in the library.
        self.pad = config._pad_token_tensor.to(self.device) if config._pad_token_tensor is not None else None
        self.sequences = torch.full((self.rows, max_length), 0 if self.pad is None else int(self.pad),
                                    dtype=torch.int64, device=self.device)
        self.sequences[:, : self.prompt_width] = input_ids
        self.cursor = self.prompt_width  # columns of `sequences` that are filled
        self.recorder = None
        routes = self.options.record_routes and model.config.n_routed_experts is not None
        if routes or self.options.record_log_probs:
            self.recorder = DecodingRecorder(model, self.rows, self.lengths, self.prompt_width, routes,
                                             self.options.record_log_probs)  # fmt: skip

    # ------------------------------------------------------------ parts

    def open_cache(self, dtype=None):
        if self.engine.cache is None:
            room = min(self.max_length, max(self.lengths) + GROWTH)
            self.engine.open(dtype, self.rows, room)
        return self.engine.cache

    def make_room(self, taken):
        """Lengthens the cache before a step that would pass its end."""
        cache = self.engine.cache
        if taken > cache.capacity:
            cache.reserve(min(self.max_length, 2 * cache.capacity))

    def ends(self, tokens):
        """(B,) bool: which tokens end their row."""
        if self.end_ids is None:
            return torch.zeros_like(tokens, dtype=torch.bool)
        return torch.isin(tokens, self.end_ids)

    def run(self):
        with torch.no_grad():
            watches = self.recorder.on_states if self.recorder and self.recorder.keeps_routes else None
            with self.recorder.listening() if watches else contextlib.nullcontext():
                logits = prefill(self.model, self.ids, self.lengths, self.open_cache, self.options.prefill_tokens,
                                 on_states=watches)  # fmt: skip
            if self.selector is not None:
                self.run_on_device(logits)
            else:
                self.run_on_host(logits)
        if self.streamer is not None:
            self.streamer.end()
        return self.result()

    def result(self):
        sequences = self.sequences[:, : self.cursor]
        self.model.__dict__["_decoding_record"] = None
        if self.recorder is not None:
            firsts, place = distinct_rows(self.ids, self.lengths)
            self.model.__dict__["_decoding_record"] = self.recorder.record(
                sequences, [firsts[p] for p in place], self.row_ends()
            )
        if not self.config.return_dict_in_generate:
            return sequences
        lengths = [length + self.cursor - self.prompt_width - 1 for length in self.lengths]
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=tuple(self.scores) if "output_scores" in self.keeps else None,
            logits=tuple(self.raw_logits) if "output_logits" in self.keeps else None,
            past_key_values=self.engine.cache.as_library_cache(
                self.model.config, range(self.rows), lengths, self.cursor - 1
            ),
        )

    # ------------------------------------------------------------ tokens chosen by the library's own processors

    def run_on_host(self, logits):
        finished = torch.zeros(self.rows, dtype=torch.bool, device=self.device)
        batch, has_end = None, self.end_tokens is not None
        while True:
            logits = logits.to(torch.float32, copy=True)
            # Contiguous, as the library's: a processor may take a view of it.
            scores = self.processors(self.sequences[:, : self.cursor].contiguous(), logits)
            if "output_scores" in self.keeps:
                self.scores.append(scores)
            if "output_logits" in self.keeps:
                self.raw_logits.append(logits)
            if self.config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
            else:
                tokens = scores.argmax(-1)
            if has_end:
                tokens = torch.where(finished, self.pad, tokens)
            self.sequences[:, self.cursor] = tokens
            self.cursor += 1
            if self.streamer is not None:
                self.streamer.put(tokens.cpu())
            self.note(batch, self.log_prob_of(logits, tokens))
            finished = finished | self.ends(tokens)
            seen = self.sequences[:, : self.cursor].contiguous() if self.criteria else None
            for criterion in self.criteria:
                finished = finished | criterion(seen, tuple(self.scores) or None)
            if self.cursor >= self.max_length or bool(finished.all()):
                return
            if batch is None:
                batch = self.engine.batch(self.rows, 1, "logits", lambda _: self.engine_body)
                batch.load(tokens, self.lengths, list(range(self.rows)))
            batch.tokens[: self.rows, 0] = tokens
            self.make_room(max(self.lengths) + self.cursor - self.prompt_width)
            logits = batch.run()[: self.rows]

    @staticmethod
    def engine_body(batch):
        """The step alone -> logits (B, V)."""
        logits = DecodingLoop.step_logits(batch)
        batch.lengths.add_(1)
        return logits

    @staticmethod
    def step_logits(batch):
        """One step -> logits (B, V); `batch.extra["routes"]` (M, B, K) where the options ask for them."""
        step, engine = batch.engine.step, batch.engine
        inputs = batch.inputs([] if engine.options.record_routes else None)
        logits = step.head(step(batch.tokens, inputs)[:, -1])
        if inputs.routes:
            batch.extra["routes"] = torch.stack(inputs.routes)
        return logits

    # ------------------------------------------------------------ what is kept besides

    def log_prob_of(self, logits, tokens):
        """(B,) float32 where log-probabilities are recorded, else None."""
        if not self.options.record_log_probs:
            return None
        found = torch.empty(len(tokens), dtype=torch.float32, device=logits.device)
        token_log_probs_reference(logits, tokens, found, self.options.log_prob_temperature)
        return found

    def note(self, batch, log_probs, where=None, count=None):
        """Records a step, after its token was appended; before the first step of a batch: the prompts' token."""
        if self.recorder is None:
            return
        if batch is None:
            self.recorder.first(log_probs)
            return
        count = self.rows if count is None else count
        routes = batch.extra["routes"][:, :count] if self.recorder.keeps_routes else None
        self.recorder.step(self.cursor - 2, where, routes, None if log_probs is None else log_probs[:count])

    def row_ends(self):
        """(B,) the column after each row's last token."""
        if self.end_ids is None:
            return torch.full((self.rows,), self.cursor, device=self.device)
        ended = torch.isin(self.sequences[:, self.prompt_width : self.cursor], self.end_ids)
        steps = torch.where(ended.any(1), ended.int().argmax(1) + 1, self.cursor - self.prompt_width)
        return self.prompt_width + steps

    # ------------------------------------------------------------ tokens chosen on the device

    def run_on_device(self, logits):
        """All of a step on the device; the host only launches, and looks now and then at which rows have finished.

        Finished rows are dropped: once the rest fit a smaller recorded batch, they move there.
        """
        selector, polls = self.selector, FinishedRows(self.device)
        state = selector.new_state(self.rows)
        selector.reset_state(state, self.input_ids)
        tokens = selector.choose(logits, state)
        log_probs = self.log_prob_of(logits, tokens)
        selector.finish(tokens, state)
        self.append(tokens)
        self.note(None, log_probs)
        row_of, where, batch = list(range(self.rows)), None, None
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=self.device)
        polls.ask(state.finished)
        # Of a small model a step takes 200 us: the host looks at what can have changed since the last one, no more.
        watched, longest = self.device.type != "cuda" or self.streamer is not None, max(self.lengths)
        news, alive = None, []
        while self.cursor < self.max_length:
            # Streaming waits for every token anyway.
            before, news = news, polls.answer(wait=self.streamer is not None)
            if batch is None or news is not before:
                known = [False] * len(row_of) if news is None else news.tolist()
                alive = [i for i, done in enumerate(known) if not done]
                if not alive:
                    break
            if batch is None or (len(alive) < len(row_of) and batch_size_for(len(alive)) < batch.size):
                keep = torch.tensor(alive, device=self.device)
                before = (tokens, lengths, state) if batch is None else self.state_of(batch)
                row_of = [row_of[i] for i in alive]
                batch = self.load_batch(selector, before, keep, row_of)
                where = None if len(row_of) == self.rows else torch.tensor(row_of, device=self.device)
                polls.forget()
                news, alive = None, list(range(len(row_of)))
            self.make_room(longest + self.cursor - self.prompt_width)
            batch.run()
            if batch.extra["rows"] is None:
                self.append(batch.tokens[: len(row_of), 0], where)
            else:
                self.show()
            if self.recorder is not None:
                self.note(batch, batch.extra["log_probs"], where, len(row_of))
            if selector.has_eos and (watched or self.cursor % POLL_STEPS == 0):
                polls.ask(batch.finished[: len(row_of)])
        self.trim()

    def append(self, tokens, where=None):
        """Writes the next column of `sequences`: tokens of all rows, or of the rows `where`."""
        if where is None:
            self.sequences[:, self.cursor] = tokens
        else:
            self.sequences[where, self.cursor] = tokens
        self.show()

    def show(self):
        """Counts a column that has been written."""
        self.cursor += 1
        if self.streamer is not None:
            self.streamer.put(self.sequences[:, self.cursor - 1].cpu())

    def load_batch(self, selector, before, keep, row_of):
        """The recorded batch for the rows `keep` of the batch before, with their state in it."""
        tokens, lengths, state = before
        kind = ("choose", selector.signature)
        batch = self.engine.batch(len(row_of), 1, kind, lambda batch: self.prepare_choice(batch, selector))
        batch.extra["selector"].load_parameters(selector)
        tokens, lengths, finished = tokens[keep].clone(), lengths[keep].clone(), state.finished[keep].clone()
        seen = None if state.seen is None else (state.seen[keep].clone(), state.seen_from[keep].clone())
        step = state.step.clone()
        batch.load(tokens, lengths, row_of, finished)
        if batch.extra["rows"] is not None:
            batch.extra["rows"].open(self.sequences, row_of, self.cursor)
        mine = batch.extra["state"]
        mine.step.copy_(step)
        if seen is not None:
            mine.seen[: len(row_of)], mine.seen_from[: len(row_of)] = seen
        return batch

    @staticmethod
    def state_of(batch):
        return batch.tokens[:, 0], batch.lengths, batch.extra["state"]

    def prepare_choice(self, batch, selector):
        """Gives a new batch its selector and state -> the body of its step."""
        batch.extra["selector"] = selector
        batch.extra["state"] = selector.new_state(batch.size)
        batch.extra["state"].finished = batch.finished
        batch.extra["log_probs"] = batch.extra["rows"] = None
        if self.options.record_log_probs:
            batch.extra["log_probs"] = torch.zeros(batch.size, device=self.device)
        if not self.engine.step.kernels:
            return self.body_with_choice
        batch.extra["rows"] = RowState(batch.size, 1, self.device)
        if type(self.engine.step) is KernelStep and not (
            selector.do_sample or selector.steps or self.options.record_log_probs or self.options.record_routes
        ):
            return self.body_of_largest
        return self.body_with_advance

    @staticmethod
    def chosen_tokens(batch):
        """One step and its choice -> tokens (B,) int64; keeps their log-probabilities where these are recorded."""
        selector, logits = batch.extra["selector"], DecodingLoop.step_logits(batch)
        tokens = selector.choose(logits, batch.extra["state"])
        if batch.extra["log_probs"] is not None:
            temperature = batch.engine.options.log_prob_temperature
            selector.log_prob_of(logits, tokens, batch.extra["log_probs"], temperature)
        return tokens

    @staticmethod
    def body_of_largest(batch):
        """Greedy search without processors: the largest score is found where the scores are computed."""
        step, rows = batch.engine.step, batch.extra["rows"]
        hidden = step.last_hidden(batch.tokens, batch.inputs())
        DecodingLoop.advance(batch, step.best(hidden, step.norm_weight, rows.winners), packed=True)

    @staticmethod
    def body_with_advance(batch):
        """As `body_with_choice`, but what follows the choice is one kernel, which writes the sequences too."""
        selector, state = batch.extra["selector"], batch.extra["state"]
        DecodingLoop.advance(batch, DecodingLoop.chosen_tokens(batch))
        if selector.steps:
            state.step.add_(1)

    @staticmethod
    def advance(batch, best, packed=False):
        selector, state = batch.extra["selector"], batch.extra["state"]
        eos_ids = selector.parameters["eos_ids"] if selector.has_eos else None
        seen = None if state.seen is None else (state.seen, state.seen_from)
        advance(batch.tokens, batch.lengths, batch.finished, best, batch.extra["rows"], eos_ids, seen=seen,
                packed=packed)  # fmt: skip

    @staticmethod
    def body_with_choice(batch):
        """The step, and the choice of the next token, which becomes the next step's input."""
        selector, state = batch.extra["selector"], batch.extra["state"]
        tokens = DecodingLoop.chosen_tokens(batch)
        batch.lengths.add_(~state.finished)  # a finished row stays where it is
        selector.finish(tokens, state)
        batch.tokens[:, 0] = tokens

    def trim(self):
        """Cuts what ran on while the host did not know yet that all rows had finished."""
        if self.end_ids is None or self.cursor == self.prompt_width:
            return
        self.cursor = int(self.row_ends().max())
