"""Prompts through the multi-token-prediction layers, whose cache drafting starts from."""

import contextlib

import torch
import torch.nn.functional as F

from .decoding_cache import PrefillView
from .decoding_prefill import distinct_rows


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
