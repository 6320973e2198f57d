"""Which experts like which text: the load of every expert by layer and by source of the held-out text.

Balance is kept over whole batches, so an expert may well be given most of its tokens by one source. What is written
to eval.json under `expert_load` are counts of token-expert assignments, {layer: {source: [one count an expert]}};
`affinity` turns them into figures: how many times its even share of a source's tokens an expert is given.
"""

import contextlib

import numpy
import torch

from modeling_deepseek_r1.routing import DeepSeekR1Router
from recipes.report_page import COLORS, MaxNLocator, figure_svg, plt

SHOWN_LAYERS = 3    # heat maps in the report: the first, middle and last layer with experts
SHOWN_EXPERTS = 4   # in the table of favourites


class ExpertLoadCounter:
    """Adds up, for every router, the tokens of each source that each expert is given.

    Attributes:
        counts: {layer index: (sources, E) int64}.
    """

    def __init__(self, model, source_count):
        last = getattr(model.config, "num_hidden_layers", 0)
        routers = {_layer_of(name): module for name, module in model.named_modules()
                   if isinstance(module, DeepSeekR1Router)}
        self.routers = {layer: router for layer, router in routers.items() if layer < last}  # no MTP layers
        self.counts = {
            layer: torch.zeros(source_count, router.num_experts, dtype=torch.int64, device=router.weight.device)
            for layer, router in self.routers.items()
        }
        self._chosen = {}

    @contextlib.contextmanager
    def listening(self):
        """Inside, every forward pass of the model leaves its routes for `add`."""
        def keep(layer):
            return lambda module, inputs, outputs: self._chosen.__setitem__(layer, outputs[2].detach())

        handles = [router.register_forward_hook(keep(layer)) for layer, router in self.routers.items()]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def add(self, sources):
        """Count the last forward pass; `sources` (B, S) int64: index of each token's source, negative: not counted."""
        sources = sources.flatten()
        kept = sources >= 0
        for layer, chosen in self._chosen.items():
            counts = self.counts[layer]
            places = (sources[kept].unsqueeze(-1) * counts.shape[1] + chosen[kept]).flatten()
            counts.view(-1).add_(torch.bincount(places, minlength=counts.numel()))
        self._chosen.clear()

    def table(self, sources, reduce=lambda counts: counts):
        """{layer: {source: [count an expert]}}; `reduce` sums a tensor over the processes."""
        found = {layer: reduce(counts).tolist() for layer, counts in sorted(self.counts.items())}
        return {str(layer): dict(zip(sources, rows)) for layer, rows in found.items()}


def _layer_of(name):
    """The layer index in a module's name, `model.layers.3.mlp.gate` -> 3."""
    return int(name.split("layers.")[-1].split(".")[0])


def group_counts(table, groups):
    """The same table with sources summed by `groups` {source: group}; sources without a group keep their names."""
    result = {}
    for layer, rows in table.items():
        result[layer] = {}
        for source, counts in rows.items():
            name = groups.get(source, source)
            before = result[layer].get(name, [0] * len(counts))
            result[layer][name] = [a + b for a, b in zip(before, counts)]
    return result


def affinity(table):
    """{layer: (sources, (sources, E) array)}: an expert's share of a source's tokens times E; 1.0 is its even share."""
    result = {}
    for layer, rows in table.items():
        kept = {source: counts for source, counts in rows.items() if sum(counts)}
        counts = numpy.array(list(kept.values()), dtype=float).reshape(len(kept), -1)
        result[layer] = (list(kept), counts / counts.sum(1, keepdims=True) * counts.shape[1])
    return result


def max_over_mean(table):
    """{layer: {source: largest over mean load}}, and under "all" that of all sources together as they were held out."""
    result = {}
    for layer, rows in table.items():
        total = [sum(column) for column in zip(*rows.values())]
        rows = {**rows, "all": total}
        result[layer] = {name: max(c) * len(c) / sum(c) for name, c in rows.items() if sum(c)}
    return result


def favourites(table, source, count=SHOWN_EXPERTS):
    """[(affinity, layer, expert)]: the experts that a source is sent to most, in times their even share."""
    found = []
    for layer, (sources, values) in affinity(table).items():
        if source in sources:
            found += [(float(value), layer, expert) for expert, value in enumerate(values[sources.index(source)])]
    return sorted(found, reverse=True)[:count]


def heat_maps(table):
    """[(svg, caption)]: sources by experts, for the first, middle and last layer."""
    layers = sorted(table, key=int)
    chosen = sorted({layers[0], layers[len(layers) // 2], layers[-1]}, key=int) if layers else []
    made = []
    for layer in chosen[:SHOWN_LAYERS]:
        sources, values = affinity({layer: table[layer]})[layer]
        order = numpy.argsort(values.argmax(0), kind="stable")  # experts beside those that like the same source
        figure, axes = plt.subplots(figsize=(6.2, 1.1 + 0.22 * len(sources)), layout="constrained")
        image = axes.imshow(values[:, order], aspect="auto", cmap="viridis", vmin=0, vmax=max(2.0, values.max()))
        axes.set_yticks(range(len(sources)), sources, fontsize=7)
        axes.set_xticks(range(values.shape[1]), [str(e) for e in order], fontsize=6 if values.shape[1] <= 32 else 3)
        axes.set_xlabel(f"expert of layer {layer}")
        figure.colorbar(image, label="times its even share")
        made.append((figure_svg(figure), f"Layer {layer}: how often the held-out tokens of a source are sent to an "
                                         "expert; 1 is even. Experts in the order of the source they like most."))
    return made


def balance_plot(table):
    """SVG: largest over mean load per layer, a line a source."""
    values = max_over_mean(table)
    layers = sorted(values, key=int)
    names = list(dict.fromkeys(name for layer in layers for name in values[layer]))
    figure, axes = plt.subplots(figsize=(6.2, 3.2), layout="constrained")
    for name, color in zip([n for n in names if n != "all"] + ["all"], COLORS * 8):
        points = [(int(layer), values[layer][name]) for layer in layers if name in values[layer]]
        color, width = ("black", 2) if name == "all" else (color, 1.2)
        axes.plot(*zip(*points), label=name, color=color, linewidth=width)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("expert load, max / mean")
    axes.axhline(1.0, color="#8a939c", linewidth=1, linestyle="--")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure_svg(figure)


def favourite_rows(table):
    """[(source, text)] for the report's table: which experts a source is sent to most."""
    names = list(dict.fromkeys(name for rows in table.values() for name, counts in rows.items() if sum(counts)))
    rows = []
    for name in names:
        best = [f"layer {layer} expert {expert} ({value:.1f} x)" for value, layer, expert in favourites(table, name)]
        rows.append((name, ", ".join(best)))
    return rows
