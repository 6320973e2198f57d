"""Greedy drafting by one MTP layer in kernels: what `decoding_mtp.Drafting` does in torch, in few launches.

    layers | head + argmax | accept, end rows, note tokens, input of the MTP layer
    eh_proj | MTP layer | head + argmax of the last kept position | note the draft (and input of the next pass)

The last line repeats for every further draft, over one position a row. States are normed where they are read.
"""

from .decoding_fused import KernelStep
from .decoding_rows import Feed
from .decoding_step import StepInputs
from .kernels_drafting import advance, note_draft


class FusedDrafting:
    """The body of a step with drafts; `rows`: the RowState of the batch."""

    def __init__(self, engine, selector, rows, drafts):
        self.engine, self.rows, self.drafts = engine, rows, drafts
        self.eos_ids = selector.parameters["eos_ids"] if selector.has_eos else None

    @staticmethod
    def serves(engine, selector, layers):
        """Greedy search without processors, drafted by a single layer, on a model that the kernels compute."""
        return type(engine.step) is KernelStep and layers == 1 and not (selector.do_sample or selector.steps)

    def __call__(self, batch):
        step, rows, cache = self.engine.step, self.rows, self.engine.cache
        index, model = step.config.num_hidden_layers, step.model.model
        layer, eps, count = model.mtp_layers[0], step.config.rms_norm_eps, len(batch.rows)
        final_norm, projection = step.weight(layer.shared_head["norm"]), step.weight(layer.eh_proj)
        norms = (step.embedding, step.weight(layer.enorm), step.weight(layer.hnorm), eps)

        inputs = batch.inputs()
        hidden = step.last_hidden(batch.tokens, inputs, further=self.drafts - 1)
        both = hidden.new_empty(len(hidden), 2 * hidden.shape[1])
        best = step.best(hidden, step.norm_weight, rows.winners)
        advance(batch.tokens, batch.lengths, batch.finished, best, rows, self.eos_ids,
                feed=Feed(hidden, step.norm_weight, *norms, both), packed=True)  # fmt: skip
        counts, picks = inputs.shared["counts"], rows.picks
        for draft in range(self.drafts):
            # All verified positions at first, which the layer's cache needs; then the draft alone.
            lengths = rows.following[draft - 1] if draft else rows.before
            inputs = StepInputs(cache, lengths, batch.rows, 1 if draft else batch.steps)
            step.scratch(len(both), inputs)
            if inputs.shared["counts"] is not None:  # zeroed already: the layer's own, or a set behind all layers'
                inputs.shared["counts"] = counts[len(model.layers) - 1 + draft - index :] if draft else counts
            hidden = step.layer(index, step.product(both, projection), inputs)
            best = step.best(hidden, final_norm, rows.winners, picks)
            both = hidden.new_empty(count, 2 * hidden.shape[1])
            feed = Feed(hidden, final_norm, *norms, both) if draft + 1 < self.drafts else None
            note_draft(batch.tokens, draft + 1, best, feed, picks)
            picks = None
