"""What one `generate` call keeps besides its tokens: the experts each token was sent to, and log-probabilities."""

import contextlib
from dataclasses import dataclass

import torch


@dataclass
class DecodingRecord:
    """`model.decoding_record` after a call with `decoding.record_routes` or `decoding.record_log_probs`.

    Shapes (B rows, C columns of the returned sequences, P of them the prompts', M expert layers, K choices):
        routes: (B, C - 1, M, K) int16, on the device, experts of the token in each column (the last one never enters
            the model); -1 where no token was computed: padding, and after a row's end. 2 * M * K bytes a token.
            A training forward takes them as `routes` (see replay.py), with -1 appended for the last column.
        log_probs: (B, C - P) float32 of the chosen tokens under softmax(logits / decoding.log_prob_temperature), before
            any processor; 0 after a row's end.
    """

    routes: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None


def expert_routers(model):
    """The routers of the decoder layers, in order; MTP layers choose for drafts only."""
    layers = model.model.layers[: model.config.num_hidden_layers]
    return [layer.mlp.gate for layer in layers if hasattr(layer.mlp, "gate")]


class DecodingRecorder:
    """Collects a `DecodingRecord` while the loop runs; steps are kept on the device until the end."""

    def __init__(self, model, rows, lengths, prompt_width, routes, log_probs):
        self.model, self.rows, self.lengths, self.prompt_width = model, rows, lengths, prompt_width
        self.keeps_routes, self.keeps_log_probs = routes, log_probs
        self.prompts, self.found, self.steps, self.log_probs = {}, [], [], []

    @contextlib.contextmanager
    def listening(self):
        """Hooks the routers while prompts are read."""
        def keep(module, given, output):
            self.found.append(output[2].to(torch.int16))

        routers = expert_routers(self.model) if self.keeps_routes else []
        hooks = [router.register_forward_hook(keep) for router in routers]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def on_states(self, cache_rows, start, prompts, lengths):
        """Before and after one pass over prompts (see `decoding_prefill.prefill`)."""
        found, (rows, width) = self.found, prompts.shape
        found.clear()

        def done(outputs):
            routes = torch.stack(found, dim=1).view(rows, width, len(found), -1)
            for place, row in enumerate(cache_rows):
                self.prompts.setdefault(row, []).append(routes[place, : max(lengths[place] - start, 0)])

        return done

    def step(self, column, where, routes, log_probs):
        """After a step on the tokens of `column`: routes (M, n, K) and log_probs (n,) of the rows `where` (None: all),
        both possibly static memory of a graph."""
        kept = None if routes is None else routes.transpose(0, 1).to(torch.int16)
        self.steps.append((column, where, kept, None if log_probs is None else log_probs.clone()))

    def first(self, log_probs):
        """Log-probabilities of the tokens chosen after the prompts."""
        self.log_probs.append(log_probs)

    def record(self, sequences, sources, ends):
        """-> DecodingRecord for `sequences` (B, C). `sources[row]`: the row whose prompt was read for it; `ends` (B,):
        the column after each row's last token."""
        columns, device = sequences.shape[1], sequences.device
        routes = log_probs = None
        alive = torch.arange(columns, device=device) < ends.unsqueeze(1)
        if self.keeps_routes:
            shape = next(iter(self.prompts.values()))[0].shape[1:]
            routes = torch.full((self.rows, columns, *shape), -1, dtype=torch.int16, device=device)
            for row, length in enumerate(self.lengths):
                routes[row, self.prompt_width - length : self.prompt_width] = torch.cat(self.prompts[sources[row]])
            for column, where, kept, _ in self.steps:
                if column < columns:
                    routes[slice(None) if where is None else where, column] = kept
            routes = routes[:, :-1].masked_fill(~alive[:, 1:, None, None], -1)  # a row's last token never enters
        if self.keeps_log_probs:
            log_probs = torch.zeros(self.rows, columns, device=device)
            if self.log_probs:
                log_probs[:, self.prompt_width] = self.log_probs[0]
            for column, where, _, kept in self.steps:
                if column + 1 < columns:
                    log_probs[slice(None) if where is None else where, column + 1] = kept
            log_probs = log_probs.masked_fill(~alive, 0.0)[:, self.prompt_width :]
        return DecodingRecord(routes, log_probs)
