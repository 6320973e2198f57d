"""Speculative decoding with the model's own multi-token-prediction layers: `generate(..., use_mtp=True)`.

A step reads each row's last token and n drafts in one pass of the main model, keeps the drafts up to the first that is
wrong, adds one token of its own, and drafts anew: 1 to n + 1 tokens a row and step, for one reading of the weights.
Greedy search keeps a draft that is the argmax; sampling keeps it so that every token has the distribution of plain
sampling (speculative sampling, arXiv:2302.01318, Alg. 2), with the same processors on both sides.

The layer of depth j (0 for the first) takes, at position i, the state of depth j - 1 (the main model's for j = 0) and
token i + 1 + j, and predicts token i + 2 + j. So when L tokens are in the main model's cache and token L is known, its
entries are final up to position L - 1 - j, and a step runs it over positions L - j to L + n, the first of which needs a
state of the last step (`held`). Further drafts than layers come from the last layer, fed with its own state.
"""

import contextlib
import weakref

import torch
import torch.nn.functional as F
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .decoding_cache import PrefillView
from .decoding_loop import GROWTH, POLL_STEPS, FinishedRows
from .decoding_prefill import compact_prompts, distinct_rows, prefill
from .decoding_sampling import SelectionState, TokenSelector
from .decoding_step import StepInputs


def pick(states, places):
    """states (B, S, D), places (B,) int64 -> (B, 1, D), one position of each row."""
    return states.gather(1, places.view(-1, 1, 1).expand(-1, 1, states.shape[-1]))


def layers_used(model):
    """MTP layers that draft: all, or as many as there are drafts."""
    return min(model.decoding.drafts, model.config.num_nextn_predict_layers)


def draw(weights):
    """(..., V) non-negative weights -> (...,) int64 tokens drawn in proportion: the exponential race."""
    return (weights / torch.empty_like(weights).exponential_(1)).argmax(-1)


def accept_greedy(scores, drafts):
    """Drafts that are the argmax, up to the first that is not, and the argmax behind them.

    Shapes: scores (B, n + 1, V), drafts (B, n) int64 -> accepted (B,) int64 in 0 .. n, next tokens (B,) int64.
    """
    best = scores.argmax(-1)
    accepted = (best[:, :-1] == drafts).long().cumprod(-1).sum(-1)
    return accepted, best.gather(1, accepted.unsqueeze(1)).squeeze(1)


def accept_sampled(probabilities, drafts, draft_probabilities):
    """Speculative sampling: drafts drawn from q become tokens that are distributed as if drawn from p.

    A draft d is kept with probability min(1, p(d) / q(d)); behind the last one kept the next token is drawn from the
    normalised max(p - q, 0), or from p where all were kept. Source: arXiv:2302.01318, Alg. 2.

    Shapes: probabilities p and draft_probabilities q (B, n + 1, V) float32 (q is 0 at the last position), drafts (B, n)
    int64 -> accepted (B,) int64 in 0 .. n, next tokens (B,) int64.
    """
    wanted, drawn = (
        table[:, :-1].gather(-1, drafts.unsqueeze(-1)).squeeze(-1) for table in (probabilities, draft_probabilities)
    )
    accepted = (torch.rand_like(wanted) * drawn < wanted).long().cumprod(-1).sum(-1)
    at_end = pick(probabilities, accepted).squeeze(1)
    left = (at_end - pick(draft_probabilities, accepted).squeeze(1)).clamp_min(0)
    # Where p and q are equal but for rounding nothing may be left over.
    return accepted, draw(torch.where(left.sum(-1, keepdim=True) > 0, left, at_end))


class PromptReader:
    """Fills the MTP layers' cache while prompts are read: the `on_states` of `prefill`.

    Attributes:
        states: (B, layers, D); entry j is the input state of layer j at position P - 1 - j of a prompt of P tokens, the
            first one whose next token is not in the prompt.
    """

    def __init__(self, model, ids, lengths, layers, open_cache):
        self.model, self.layers, self.lengths, self.open_cache = model, layers, lengths, open_cache
        device = model.model.embed_tokens.weight.device
        self.ids = F.pad(ids.to(device), (0, layers))
        self.states, self.last_hidden_state = None, None

    @contextlib.contextmanager
    def listening(self):
        def keep(module, args, outputs):
            self.last_hidden_state = outputs.last_hidden_state

        handle = self.model.model.register_forward_hook(keep)
        try:
            yield self
        finally:
            handle.remove()
            self.last_hidden_state = None

    def __call__(self, rows, start, chunk, lengths):
        return lambda outputs: self.read(rows, start, self.last_hidden_state)

    def read(self, rows, start, states):
        """Runs the layers over one chunk: states (b, S, D) of positions start .. of prompts `rows`."""
        model, end, device = self.model.model, start + states.shape[1], states.device
        index = torch.tensor(rows, device=device)
        positions = torch.arange(start, end, device=device).unsqueeze(0).expand(len(rows), -1)
        view = PrefillView(index, start, self.open_cache)
        for depth, layer in enumerate(model.mtp_layers[: self.layers]):
            self.keep(depth, rows, start, states)
            # Behind a prompt's end these are no tokens of it: entries that the first steps write anew.
            embeds = model.embed_tokens(self.ids[index, start + 1 + depth : end + 1 + depth])
            shared = model.layer_inputs(embeds, None, positions, view)
            states = layer(states, embeds, past_key_values=view, **shared)

    def keep(self, depth, rows, start, states):
        if self.states is None:
            self.states = states.new_zeros(len(self.lengths), self.layers, states.shape[-1])
        places = [(i, self.lengths[row] - 1 - depth - start, row) for i, row in enumerate(rows)]
        places = [place for place in places if 0 <= place[1] < states.shape[1]]
        if places:
            sources, offsets, targets = torch.tensor(places, device=states.device).t()
            self.states[targets, depth] = states[sources, offsets]

    def share(self):
        """Gives the rows of repeated prompts, which were read once, the states of the first."""
        firsts, place = distinct_rows(self.ids, self.lengths)
        self.states = self.states[torch.tensor([firsts[p] for p in place], device=self.states.device)]


class Drafting:
    """The step with drafts over a `StepBatch`, and what it keeps on the device; capturable in a CUDA graph.

    The batch's `tokens` (B, 1 + n) are each row's last token and its drafts.
    Static tensors (B rows, K layers used, V vocabulary): `cursor` (B,) int64, filled columns of a row's sequence;
    `base` (B,) int64, `limit` and `nowhere` () int64: where in the flat sequences a row starts, its longest length, and
    the place for what is no token; `held` (B, K - 1, D) fp32; `probabilities` (B, 1 + n, V) fp32, what the drafts were
    drawn from (sampling); `seen` (B, V) and `seen_from` (B,): the repetition penalty's; `drafted` and `accepted` (n,),
    `counted` (3,) int64: steps, steps summed over the rows, tokens.
    """

    def __init__(self, engine, selector, size, drafts):
        device, config = engine.device, engine.model.config
        self.engine, self.selector, self.drafts = weakref.proxy(engine), selector, drafts  # the engine keeps this
        self.layers = layers_used(engine.model)
        whole = {"dtype": torch.int64, "device": device}
        self.cursor, self.base = torch.zeros(size, **whole), torch.zeros(size, **whole)
        self.limit, self.nowhere = torch.zeros((), **whole), torch.zeros((), **whole)
        self.held = torch.zeros(size, self.layers - 1, config.hidden_size, device=device)
        vocab_size = selector.vocab_size
        self.probabilities = torch.zeros(size, drafts + 1, vocab_size, device=device) if selector.do_sample else None
        state = selector.new_state(size)
        self.seen, self.seen_from = state.seen, state.seen_from
        self.drafted, self.accepted = torch.zeros(drafts, **whole), torch.zeros(drafts, **whole)
        self.counted = torch.zeros(3, **whole)

    def clear(self):
        for tensor in (self.cursor, self.drafted, self.accepted, self.counted, self.held):
            tensor.zero_()

    def __call__(self, batch):
        """-> places (B, 1 + n) int64 in the flat sequences, tokens (B, 1 + n) int64 for them, count (B,) int64."""
        step = self.engine.step
        states = step(batch.tokens, batch.inputs())
        tokens, accepted = self.verify(step.head(states), batch.tokens[:, 1:])
        places, count, active = self.emit(tokens, accepted, batch.finished)
        drafts = self.draft(states, tokens, batch.rows, batch.lengths, accepted)
        batch.tokens.copy_(torch.cat((tokens.gather(1, accepted.unsqueeze(1)), drafts), dim=1))
        # A row that finishes moves on once more, so that later steps write behind it, and then stays.
        batch.lengths.add_(((accepted + 1) * active).int())
        self.count(accepted, count, active)
        return places, tokens, count

    # ------------------------------------------------------------ which drafts are kept

    def selection(self, cursor, seen):
        """The selector's state for rows whose sequences have `cursor` (B,) tokens."""
        return SelectionState(cursor - self.selector.parameters["input_length"], None, seen, self.seen_from)

    def with_token(self, seen, cursor, tokens, counts=True):
        """`seen` (B, V) and tokens (B,) at column `cursor` (B,) of their rows where `counts` -> a new `seen`."""
        if seen is None:
            return None
        tokens = tokens.unsqueeze(1)
        added = (cursor >= self.seen_from[: len(cursor)]) & counts
        return seen.scatter(1, tokens, seen.gather(1, tokens) | added.unsqueeze(1))

    def verify(self, logits, drafts):
        """logits (B, 1 + n, V), drafts (B, n) -> tokens (B, 1 + n), of which those up to accepted (B,) count."""
        rows, steps = logits.shape[:2]
        cursor = self.cursor.unsqueeze(1) + torch.arange(steps, device=logits.device)
        seen = self.seen
        if seen is not None:
            each = [seen]
            for i in range(steps - 1):  # the tokens behind draft i were chosen in its presence
                each.append(self.with_token(each[-1], cursor[:, i], drafts[:, i]))
            seen = torch.stack(each, dim=1).flatten(0, 1)
        scores = self.selector.process(logits.flatten(0, 1), self.selection(cursor.flatten(), seen))
        scores = scores.view(rows, steps, -1)
        if self.selector.do_sample:
            accepted, following = accept_sampled(scores.softmax(-1), drafts, self.probabilities)
        else:
            accepted, following = accept_greedy(scores, drafts)
        kept = torch.arange(steps, device=logits.device) < accepted.unsqueeze(1)
        return torch.where(kept, F.pad(drafts, (0, 1)), following.unsqueeze(1)), accepted

    def emit(self, tokens, accepted, finished):
        """Which tokens become part of their sequences, up to an end of sequence or the longest length; updates
        `finished` (B,) and `cursor` -> places (B, 1 + n), count (B,), active (B,): rows unfinished before."""
        active, steps = ~finished, torch.arange(tokens.shape[1], device=tokens.device)
        ends = torch.zeros_like(tokens, dtype=torch.bool)
        if self.selector.has_eos:
            ends = (tokens.unsqueeze(-1) == self.selector.parameters["eos_ids"]).any(-1)
        columns = self.cursor.unsqueeze(1) + steps
        ended_before = ends.long().cumsum(-1) - ends.long() > 0
        emitted = (steps <= accepted.unsqueeze(1)) & (columns < self.limit) & ~ended_before & active.unsqueeze(1)
        if self.seen is not None:
            for i in range(tokens.shape[1]):
                self.seen.copy_(self.with_token(self.seen, columns[:, i], tokens[:, i], emitted[:, i]))
        count = emitted.sum(-1)
        self.cursor.add_(count)
        finished.logical_or_((ends & emitted).any(-1) | (self.cursor >= self.limit))
        return torch.where(emitted, self.base.unsqueeze(1) + columns, self.nowhere), count, active

    def count(self, accepted, count, active):
        # A draft past the longest length or behind the end of its sequence is none.
        order = torch.arange(self.drafts, device=accepted.device)
        room = self.limit - (self.cursor - count)
        self.drafted.add_((active.unsqueeze(1) & (order < room.unsqueeze(1))).sum(0))
        self.accepted.add_((order < torch.minimum(accepted, count).unsqueeze(1)).sum(0))  # count is 0 unless active
        self.counted.add_(torch.stack((active.any().long(), active.sum(), count.sum())))

    # ------------------------------------------------------------ the next drafts

    def draft(self, states, tokens, rows, lengths, accepted):
        """Runs the MTP layers over the positions just verified and drafts what follows.

        Shapes (b rows, the first ones of the static tensors): states (b, S, D) of the main model at positions
        lengths[b] .., tokens (b, S) that follow them, valid up to accepted (b,) -> drafts (b, n).
        """
        step, cache, steps = self.engine.step, self.engine.cache, tokens.shape[1]
        tokens, drafts, seen = F.pad(tokens, (0, self.layers)), [], None
        if self.seen is not None:
            seen = self.seen[: len(tokens)]
        for depth in range(self.layers):
            if depth:
                held = self.held[: len(tokens), depth - 1 : depth]
                previous, states = states, torch.cat((held.to(states.dtype), states), dim=1)
                held.copy_(pick(previous, accepted))
            # Negative only for padding rows of the batch.
            inputs = StepInputs(cache, (lengths - depth).clamp_min(0), rows, steps + depth)
            states = step.mtp(depth, states, tokens[:, : steps + depth], inputs)
            last = pick(states, accepted + depth)
            drafts.append(self.choose(step.head(last), len(drafts), seen))
            seen = self.with_token(seen, self.cursor[: len(tokens)] + depth, drafts[-1])
            tokens = tokens.scatter(1, (accepted + 1 + depth).unsqueeze(1), drafts[-1].unsqueeze(1))
        for again in range(self.drafts - self.layers):
            inputs = StepInputs(cache, lengths + accepted.int() + 1 + again, rows, 1)
            last = step.mtp(self.layers - 1, last, drafts[-1].unsqueeze(1), inputs)
            drafts.append(self.choose(step.head(last), len(drafts), seen))
            seen = self.with_token(seen, self.cursor[: len(tokens)] + self.layers + again, drafts[-1])
        return torch.stack(drafts, dim=1)

    def choose(self, logits, index, seen):
        """logits (b, 1, V) -> the b drafts number `index`, by the rules that tokens are chosen by."""
        scores = self.selector.process(logits.squeeze(1), self.selection(self.cursor[: len(logits)] + index, seen))
        if not self.selector.do_sample:
            return scores.argmax(-1)
        probabilities = scores.softmax(-1)
        self.probabilities[: len(logits), index] = probabilities
        return draw(probabilities)


class MTPDecodingLoop:
    """One `generate` call with drafts; the arguments are those of the library's `_assisted_decoding`.

    Shapes (B rows, P prompt columns, L max_length): input_ids (B, P) left-padded by attention_mask (B, P) or None
    -> (B, <= L). `criteria`: stopping criteria other than length and end tokens; they and a streamer are called after
    every token, for one row only.
    """

    def __init__(self, model, input_ids, attention_mask, selector, criteria, config, max_length, streamer):
        self.model, self.engine, self.options = model, model.decoding_engine, model.decoding
        self.selector, self.criteria, self.config, self.streamer = selector, criteria, config, streamer
        self.device, self.came_from = self.engine.device, input_ids.device
        self.input_ids, self.max_length = input_ids.to(self.device), max_length
        self.ids, self.lengths = compact_prompts(input_ids, attention_mask)
        self.rows, self.width = input_ids.shape
        self.drafts, self.layers = self.options.drafts, layers_used(model)
        # Tokens that the cache holds of a row at most, and what a step writes behind them.
        self.longest, self.reach = max_length + self.drafts, 2 * (1 + self.drafts)
        pad = config._pad_token_tensor
        self.pad = 0 if pad is None else int(pad)
        # One element more than the sequences need: where a row's step has fewer tokens than places.
        self.flat = torch.full((self.rows * max_length + 1,), self.pad, dtype=torch.int64, device=self.device)
        self.sequences = self.flat[:-1].view(self.rows, max_length)
        self.sequences[:, : self.width] = self.input_ids

    @classmethod
    def prepare(cls, model, input_ids, attention_mask, processors, criteria, config, max_length, end_tokens, streamer):
        """-> (loop, None), or (None, why drafts cannot serve the call)."""
        rows, width = input_ids.shape
        shortest = width if attention_mask is None else int(attention_mask.sum(-1).min())
        if rows > 1 and (criteria or streamer is not None):
            return None, "a streamer and stopping criteria other than length and end tokens take one row"
        if config.return_dict_in_generate and (config.output_scores or config.output_logits):
            return None, "it returns neither scores nor logits"
        if model.decoding.record_routes or model.decoding.record_log_probs:
            return None, "it records neither routes nor log-probabilities"
        if shortest < layers_used(model):
            return None, f"a prompt of {shortest} tokens is shorter than the {layers_used(model)} layers that draft"
        device = model.decoding_engine.device
        selector, reason = TokenSelector.from_processors(
            processors, config, width, model.config.vocab_size, device, end_tokens
        )
        if selector is None:
            return None, reason
        return cls(model, input_ids, attention_mask, selector, criteria, config, max_length, streamer), None

    def open_cache(self, dtype=None):
        if self.engine.cache is None:
            self.engine.open(dtype, self.rows, min(self.longest + self.reach, max(self.lengths) + GROWTH))
        return self.engine.cache

    def make_room(self, batch, taken):
        """Lengthens the cache before a step that could pass its end: one over rows of up to `taken` tokens, an upper
        bound. -> the same or a closer one: the rows are looked at where it matters, which waits for the device."""
        cache = self.engine.cache
        if taken + self.reach > cache.capacity:
            taken = int(batch.lengths.max())
            if taken + self.reach > cache.capacity:
                cache.reserve(min(self.longest + self.reach, 2 * cache.capacity))
        return taken

    def run(self):
        with torch.no_grad():
            reader = PromptReader(self.model, self.ids, self.lengths, self.layers, self.open_cache)
            with reader.listening():
                logits = prefill(self.model, self.ids, self.lengths, self.open_cache, self.options.prefill_tokens,
                                 on_states=reader)
            reader.share()
            batch = self.begin(logits, reader.states)
            self.decode(batch)
        if self.streamer is not None:
            self.streamer.end()
        return self.result()

    def begin(self, logits, states):
        """The first token of every row and the drafts behind it -> the batch, ready to run."""
        kind = ("mtp", self.drafts, self.selector.signature)
        batch = self.engine.batch(self.rows, 1 + self.drafts, kind, self.make_body)
        self.drafting = drafting = batch.extra["drafting"]
        if drafting.selector is not self.selector:
            drafting.selector.load_parameters(self.selector)
        drafting.clear()
        drafting.cursor[: self.rows] = self.width
        drafting.base[: self.rows] = torch.arange(self.rows, device=self.device) * self.max_length
        drafting.limit.fill_(self.max_length)
        drafting.nowhere.fill_(self.rows * self.max_length)
        state = self.selector.new_state(self.rows)
        self.selector.reset_state(state, self.input_ids)
        if drafting.seen is not None:
            drafting.seen[: self.rows], drafting.seen_from[: self.rows] = state.seen, state.seen_from
        tokens = self.selector.choose(logits, state)
        # The first tokens as a step without drafts, over the last token of every prompt. Its cursor and flags are those
        # of the batch, whose other rows are finished.
        batch.load(F.pad(tokens.unsqueeze(1), (0, self.drafts)), self.lengths, list(range(self.rows)))
        ids = F.pad(tokens.unsqueeze(1), (0, 0, 0, batch.size - self.rows))
        none = torch.zeros(batch.size, dtype=torch.int64, device=self.device)
        places, _, _ = drafting.emit(ids, none, batch.finished)
        self.flat.scatter_(0, places.flatten(), ids.flatten())
        drafting.held[: self.rows] = states[:, 1:].float()
        batch.tokens[: self.rows, 1:] = drafting.draft(
            states[:, :1].to(self.engine.step.dtype), tokens.unsqueeze(1), batch.rows[: self.rows],
            batch.lengths[: self.rows] - 1, none[: self.rows],
        )
        return batch

    def make_body(self, batch):
        batch.extra["drafting"] = Drafting(self.engine, self.selector, batch.size, self.drafts)
        return batch.extra["drafting"]

    def decode(self, batch):
        watched = self.streamer is not None or bool(self.criteria)
        if watched and self.stopped(self.width, self.width + 1):
            return
        finished = FinishedRows(self.device)
        taken = max(self.lengths)
        for step in range(self.max_length - self.width - 1):  # a step gives at least one token
            if step % POLL_STEPS == 0 or watched or self.device.type != "cuda":
                finished.ask(batch.finished[: self.rows])
                known = finished.answer(wait=watched)
                if known is not None and bool(known.all()):
                    return
            taken = self.make_room(batch, taken)
            places, tokens, count = batch.run()
            self.flat.scatter_(0, places.flatten(), tokens.flatten())
            taken = min(taken + 1 + self.drafts, self.longest)
            if watched:
                end = int(self.drafting.cursor[0])
                if self.stopped(end - int(count[0]), end):
                    return

    def stopped(self, start, end):
        """Shows columns start .. end - 1 of the only row to streamer and criteria; cuts it where one says stop."""
        for column in range(start, end):
            if self.streamer is not None:
                self.streamer.put(self.sequences[:, column].to("cpu", copy=True))
            shown = self.sequences[:, : column + 1].to(self.came_from)
            if any([bool(criterion(shown, None).all()) for criterion in self.criteria]):
                self.sequences[:, column + 1 :] = self.pad
                self.drafting.cursor[0] = column + 1
                return True
        return False

    def result(self):
        filled = int(self.drafting.cursor[: self.rows].max())
        sequences = self.sequences[:, :filled].to(self.came_from)
        if not self.config.return_dict_in_generate:
            return sequences
        cache = self.engine.cache
        lengths = [length + filled - self.width - 1 for length in self.lengths]
        cache.reserve(max(lengths))  # of rows that finished early, what lies behind their end means nothing
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            past_key_values=cache.as_library_cache(self.model.config, range(self.rows), lengths, filled - 1),
        )

    def statistics(self):
        """What `model.decoding_statistics` holds: see there."""
        drafted, accepted, (steps, row_steps, tokens) = (
            getattr(self.drafting, name).tolist() for name in ("drafted", "accepted", "counted")
        )
        return {
            "steps": steps,
            "drafted": sum(drafted),
            "accepted": sum(accepted),
            "tokens": tokens,
            "acceptance": sum(accepted) / max(sum(drafted), 1),
            "acceptance_by_depth": [kept / max(all_drafts, 1) for kept, all_drafts in zip(accepted, drafted)],
            "tokens_per_step": tokens / max(row_steps, 1),
        }
