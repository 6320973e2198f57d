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

import weakref

import torch
import torch.nn.functional as F
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .decoding_loop import GROWTH, POLL_STEPS, FinishedRows
from .decoding_mtp_prompts import PromptReader
from .decoding_prefill import compact_prompts, prefill
from .decoding_rows import RowState, advance_reference
from .decoding_sampling import SelectionState, TokenSelector
from .decoding_step import StepInputs

try:
    import triton
except ImportError:
    triton = None
else:
    from .decoding_mtp_fused import FusedDrafting
    from .kernels_drafting import advance


def pick(states, places):
    """states (B, S, D), places (B,) int64 -> (B, 1, D), one position of each row."""
    return states.gather(1, places.view(-1, 1, 1).expand(-1, 1, states.shape[-1]))


def layers_used(model):
    """MTP layers that draft: all, or as many as there are drafts."""
    return min(model.decoding.drafts, model.config.num_nextn_predict_layers)


def draw(weights):
    """(..., V) non-negative weights -> (...,) int64 tokens drawn in proportion: the exponential race."""
    return (weights / torch.empty_like(weights).exponential_(1)).argmax(-1)


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


class Drafting:
    """The step with drafts over a `StepBatch`, and what it keeps on the device; capturable in a CUDA graph.

    The batch's `tokens` (B, 1 + n) are each row's last token and its drafts. Greedy search with one MTP layer runs in
    kernels where they serve the model (`fused`), everything else in torch but for the end of the step.
    Static tensors (B rows, K layers used, V vocabulary): those of `rows`, a RowState; `held` (B, K - 1, D) fp32;
    `probabilities` (B, 1 + n, V) fp32, what the drafts were drawn from (sampling); `seen` (B, V) and `seen_from` (B,):
    the repetition penalty's.
    """

    def __init__(self, engine, selector, size, drafts):
        device, config = engine.device, engine.model.config
        self.engine, self.selector, self.drafts = weakref.proxy(engine), selector, drafts  # the engine keeps this
        self.layers = layers_used(engine.model)
        self.rows = RowState(size, 1 + drafts, device)
        self.held = torch.zeros(size, self.layers - 1, config.hidden_size, device=device)
        vocab_size = selector.vocab_size
        self.probabilities = torch.zeros(size, drafts + 1, vocab_size, device=device) if selector.do_sample else None
        state = selector.new_state(size)
        self.seen, self.seen_from = state.seen, state.seen_from
        self.advance, self.fused = advance if engine.step.kernels else advance_reference, None
        if triton is not None and FusedDrafting.serves(engine, selector, self.layers):
            self.fused = FusedDrafting(self.engine, selector, self.rows, drafts)

    def __call__(self, batch):
        if self.fused is not None:
            return self.fused(batch)
        step, selector = self.engine.step, self.selector
        states = step(batch.tokens, batch.inputs())
        best, accepted = self.verify(step.head(states), batch.tokens[:, 1:])
        eos_ids = selector.parameters["eos_ids"] if selector.has_eos else None
        seen = None if self.seen is None else (self.seen, self.seen_from)
        tokens = self.advance(batch.tokens, batch.lengths, batch.finished, best, self.rows, eos_ids, accepted, seen)
        drafts = self.draft(states, tokens, batch.rows, self.rows.before, self.rows.accepted.long())
        batch.tokens[:, 1:] = drafts

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
        """logits (B, 1 + n, V), drafts (B, n) -> the tokens (B, 1 + n) chosen behind each, valid up to accepted (B,);
        in greedy search None, which leaves it to `advance`."""
        rows, steps = logits.shape[:2]
        if not (self.selector.steps or self.selector.do_sample):
            return logits.argmax(-1), None
        cursor = self.rows.cursor.unsqueeze(1) + torch.arange(steps, device=logits.device)
        seen = self.seen
        if seen is not None:
            each = [seen]
            for i in range(steps - 1):  # the tokens behind draft i were chosen in its presence
                each.append(self.with_token(each[-1], cursor[:, i], drafts[:, i]))
            seen = torch.stack(each, dim=1).flatten(0, 1)
        scores = self.selector.process(logits.flatten(0, 1), self.selection(cursor.flatten(), seen))
        scores = scores.view(rows, steps, -1)
        if not self.selector.do_sample:
            return scores.argmax(-1), None
        accepted, following = accept_sampled(scores.softmax(-1), drafts, self.probabilities)
        kept = torch.arange(steps, device=logits.device) < accepted.unsqueeze(1)
        return torch.where(kept, F.pad(drafts, (0, 1)), following.unsqueeze(1)), accepted

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
            seen = self.with_token(seen, self.rows.cursor[: len(tokens)] + depth, drafts[-1])
            tokens = tokens.scatter(1, (accepted + 1 + depth).unsqueeze(1), drafts[-1].unsqueeze(1))
        for again in range(self.drafts - self.layers):
            inputs = StepInputs(cache, lengths + accepted.int() + 1 + again, rows, 1)
            last = step.mtp(self.layers - 1, last, drafts[-1].unsqueeze(1), inputs)
            drafts.append(self.choose(step.head(last), len(drafts), seen))
            seen = self.with_token(seen, self.rows.cursor[: len(tokens)] + self.layers + again, drafts[-1])
        return torch.stack(drafts, dim=1)

    def choose(self, logits, index, seen):
        """logits (b, 1, V) -> the b drafts number `index`, by the rules that tokens are chosen by."""
        logits = logits.squeeze(1)
        if not (self.selector.steps or self.selector.do_sample):
            return logits.argmax(-1)
        scores = self.selector.process(logits, self.selection(self.rows.cursor[: len(logits)] + index, seen))
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
        self.sequences = torch.full((self.rows, max_length), self.pad, dtype=torch.int64, device=self.device)
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
        state = self.selector.new_state(self.rows)
        self.selector.reset_state(state, self.input_ids)
        tokens = self.selector.choose(logits, state)
        self.selector.finish(tokens, state)
        self.sequences[:, self.width] = tokens
        drafting.rows.open(self.sequences, list(range(self.rows)), self.width + 1)
        if drafting.seen is not None:
            drafting.seen[: self.rows], drafting.seen_from[: self.rows] = state.seen, state.seen_from
        batch.load(F.pad(tokens.unsqueeze(1), (0, self.drafts)), self.lengths, list(range(self.rows)), state.finished)
        drafting.held.zero_()
        drafting.held[: self.rows] = states[:, 1:].float()
        # As after a step without drafts, over the last token of every prompt.
        none = torch.zeros(self.rows, dtype=torch.int64, device=self.device)
        batch.tokens[: self.rows, 1:] = drafting.draft(
            states[:, :1].to(self.engine.step.dtype), tokens.unsqueeze(1), batch.rows[: self.rows],
            batch.lengths[: self.rows] - 1, none,
        )
        return batch

    def make_body(self, batch):
        batch.extra["drafting"] = Drafting(self.engine, self.selector, batch.size, self.drafts)
        return batch.extra["drafting"]

    def decode(self, batch):
        watched = self.streamer is not None or bool(self.criteria)
        if watched and self.stopped(self.width, self.width + 1):
            return
        finished, on_gpu = FinishedRows(self.device), self.device.type == "cuda"
        taken, end, known = max(self.lengths), self.width + 1, None
        for step in range(self.max_length - self.width - 1):  # a step gives at least one token
            if step % POLL_STEPS == 0 or watched or not on_gpu:
                finished.ask(batch.finished[: self.rows])
                before, known = known, finished.answer(wait=watched)
                if known is not before and bool(known.all()):
                    return
            taken = self.make_room(batch, taken)
            batch.run()
            taken = min(taken + 1 + self.drafts, self.longest)
            if watched:
                start, end = end, int(self.drafting.rows.cursor[0])
                if self.stopped(start, end):
                    return

    def stopped(self, start, end):
        """Shows columns start .. end - 1 of the only row to streamer and criteria; cuts it where one says stop."""
        for column in range(start, end):
            if self.streamer is not None:
                self.streamer.put(self.sequences[:, column].to("cpu", copy=True))
            shown = self.sequences[:, : column + 1].to(self.came_from)
            if any([bool(criterion(shown, None).all()) for criterion in self.criteria]):
                self.sequences[:, column + 1 :] = self.pad
                self.drafting.rows.cursor[0] = column + 1
                return True
        return False

    def result(self):
        filled = int(self.drafting.rows.cursor[: self.rows].max())
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
        counted = self.drafting.rows.statistics
        (*drafted, row_steps), (*accepted, tokens) = counted.sum(0).tolist()
        return {
            "steps": int(counted[:, 0, -1].max()),  # all rows begin together
            "drafted": sum(drafted),
            "accepted": sum(accepted),
            "tokens": tokens,
            "acceptance": sum(accepted) / max(sum(drafted), 1),
            "acceptance_by_depth": [kept / max(all_drafts, 1) for kept, all_drafts in zip(accepted, drafted)],
            "tokens_per_step": tokens / max(row_steps, 1),
        }
