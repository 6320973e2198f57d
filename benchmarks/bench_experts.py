"""The experts' grouped products: ours (modeling_deepseek_r1/kernels_expert_products.py) beside torch's, and both whole.

    python benchmarks/bench_experts.py                         the reference config's sizes, bf16 (one Hopper GPU)
    python benchmarks/bench_experts.py --record FILE           the table of an earlier run, such as
                                                               benchmarks/results/2026-11-23_expert_products/grouped.json
    TRITON_INTERPRET=1 python benchmarks/bench_experts.py      toy sizes on a CPU, to try it out

A product of ours is timed with what it does besides, torch's with the kernels around it that this replaces; gathering
of rows is outside of both. Medians, us. Every result of ours is compared with torch's: the norm of the difference over
that of torch's. `whole`: forward, and forward with backward, of `fused_experts`. The record named above was taken by an
earlier form of this command, which tried 36 cuts; in this form it has run in Triton's interpreter only.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.train_cases import REFERENCE  # noqa: E402
from modeling_deepseek_r1 import fused, training_experts  # noqa: E402
from modeling_deepseek_r1 import kernels_expert_products as own  # noqa: E402
from modeling_deepseek_r1.kernels_expert_rows import gate_rows, gate_rows_backward, gather_rows  # noqa: E402

# tokens, hidden, inner, experts, choices
SIZES = {
    "reference": (16_384, REFERENCE["hidden_size"], REFERENCE["moe_intermediate_size"], REFERENCE["n_routed_experts"],
                  REFERENCE["num_experts_per_tok"]),
    "toy": (40, 32, 16, 4, 2),
}  # fmt: skip
PRODUCTS = ("gate_up", "down", "inner_gradient", "rows_gradient", "gate_up_gradient", "down_gradient")


class Layer:
    """Random tensors of one layer's routed experts; loads differ by expert as those of random scores do."""

    def __init__(self, size, device):
        tokens, hidden, inner, experts, choices = size
        torch.manual_seed(0)
        make = lambda *shape, scale=1.0: (torch.randn(*shape, device=device) * scale).bfloat16()
        scores = torch.randn(tokens, experts, device=device) + torch.randn(experts, device=device) * 0.7
        self.order, self.back, self.offsets = self.places = training_experts.sort_pairs(
            scores.topk(choices).indices, experts
        )
        self.hidden, self.grad = make(tokens, hidden), make(tokens, hidden, scale=0.01)
        self.weights = torch.rand(tokens, choices, device=device)
        self.gate_up = make(experts, 2 * inner, hidden, scale=0.02)
        self.down = make(experts, hidden, inner, scale=0.02)
        gather = lambda source: gather_rows(source, self.back, self.offsets, self.order.numel(), torch.bfloat16)
        self.rows, self.grad_rows = gather(self.hidden), gather(self.grad)
        self.gated = self._product(self.rows, self.gate_up.mT)
        self.inner = gate_rows(self.gated, self.weights, self.order, self.offsets)
        self.grad_inner = self._product(self.grad_rows, self.down)
        self.grad_gated = self._gate_backward()[0]

    def _product(self, rows, weight):
        return training_experts._grouped_product(rows, weight, self.offsets)

    def _gate_backward(self):
        inputs = self.gated, self.weights, self.order, self.offsets, self.grad_inner
        grad_gated, _, grad_weights = gate_rows_backward(*inputs, with_output=False)
        return grad_gated, grad_weights

    def torchs(self):
        """{product: functions, the last of which gives what ours gives}"""
        over_rows = lambda left, right: training_experts._grouped_weight_gradient(left, right, self.offsets)
        return {
            "gate_up": (lambda: self._product(self.rows, self.gate_up.mT),
                        lambda: gate_rows(self.gated, self.weights, self.order, self.offsets)),
            "down": (lambda: self._product(self.inner, self.down.mT),),
            "inner_gradient": (lambda: self._product(self.grad_rows, self.down), self._gate_backward),
            "rows_gradient": (lambda: self._product(self.grad_gated, self.gate_up),),
            "gate_up_gradient": (lambda: over_rows(self.grad_gated, self.rows),),
            "down_gradient": (lambda: over_rows(self.grad_rows, self.inner),),
        }  # fmt: skip

    def ours(self):
        plan, choices = own.schedule(self.offsets, self.order.numel()), self.weights.shape[1]
        gradient = lambda left, right, name: own.weight_gradient(
            self.offsets, self.order, plan, choices, left, right, name
        )
        return {
            "gate_up": lambda: own.gate_up_product(self.hidden, self.weights, *self.places, plan, self.gate_up)[1],
            "down": lambda: own.rows_product(self.inner, self.down, plan, True, "down"),
            "inner_gradient": lambda: own.inner_gradient(
                self.grad, self.weights, *self.places, plan, self.down, self.gated)[:2],
            "rows_gradient": lambda: own.rows_product(self.grad_gated, self.gate_up, plan, False, "rows_gradient"),
            "gate_up_gradient": lambda: gradient(self.grad_gated, self.rows, "gate_up_gradient"),
            "down_gradient": lambda: gradient(self.grad_rows, self.inner, "down_gradient"),
        }  # fmt: skip

    def whole(self, ours):
        """A function of the forward, one of forward and backward, which gives all results."""
        inputs = [x.detach().requires_grad_() for x in (self.hidden, self.weights, self.gate_up, self.down)]

        def forward():
            before = fused.set_expert_products(ours)
            try:
                return training_experts.fused_experts(*inputs[:2], *self.places, *inputs[2:])
            finally:
                fused.set_expert_products(before)

        def both():
            output = forward()
            return output, *torch.autograd.grad(output, inputs, self.grad)

        return forward, both


def microseconds(function, device, repeats):
    """Median of `repeats` calls after three."""
    times, cuda = [], device == "cuda"
    for index in range(repeats + 3):
        if cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            times.append((begin, end))
        else:
            begin = time.perf_counter()
            function()
            times.append((time.perf_counter() - begin) * 1e6)
    if cuda:
        torch.cuda.synchronize()
        times = [1e3 * begin.elapsed_time(end) for begin, end in times]
    return statistics.median(times[3:])


def difference(ours, torchs):
    """The largest, of one result or several: norm of the difference over torch's norm."""
    pairs = zip(ours, torchs, strict=True) if isinstance(ours, tuple) else [(ours, torchs)]
    with torch.no_grad():
        return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)


def measure(size, device, repeats):
    layer = Layer(size, device)
    # What gathers beside our products is timed in `whole`.
    own._rows_for = lambda tiles, source, *_: None if tiles.gather else (
        layer.rows if source is layer.hidden else layer.grad_rows
    )
    of_torch, lines = layer.torchs(), []
    for name, ours in layer.ours().items():
        parts = [microseconds(part, device, repeats) for part in of_torch[name]]
        lines.append({"product": name, "torch_us": sum(parts), "ours_us": microseconds(ours, device, repeats),
                      "difference": difference(ours(), of_torch[name][-1]())})  # fmt: skip
    return layer, lines


def measure_whole(layer, device, repeats):
    (forward, both), (own_forward, own_both) = layer.whole(False), layer.whole(True)
    pairs = (forward, own_forward), (both, own_both)
    times = [[microseconds(run, device, repeats) for run in pair] for pair in pairs]
    found = difference(own_both(), both())
    return [{"product": name, "torch_us": pair[0], "ours_us": pair[1], "difference": found}
            for name, pair in zip(("whole, forward", "whole, with backward"), times)]  # fmt: skip


def read_record(path):
    """Lines of a run that timed several cuts of each product: those of its quickest whole."""
    record = json.loads(Path(path).read_text())
    best = min(record["whole_ours"], key=lambda each: each["us"][1])
    lines = [{"product": name.split()[0], "cut": name.split()[1], "torch_us": sum(record["torch_us"][name.split()[0]]),
              "ours_us": record["ours_us"][name]} for name in best["names"]]  # fmt: skip
    lines.sort(key=lambda line: PRODUCTS.index(line["product"]))
    for place, name in enumerate(("whole, forward", "whole, with backward")):
        lines.append({"product": name, "torch_us": record["whole_torch"][place], "ours_us": best["us"][place],
                      "difference": max(best["errors"])})  # fmt: skip
    return lines


def table(lines):
    rows = [f"{'':22} {'torch, us':>10} {'ours, us':>10} {'of torch':>9} {'difference':>11}"]
    for line in lines:
        apart = f"{line['difference']:11.1e}" if "difference" in line else ""
        rows.append(f"{line['product']:22} {line['torch_us']:10.0f} {line['ours_us']:10.0f} "
                    f"{line['ours_us'] / line['torch_us']:9.2f} {apart}")  # fmt: skip
    return "\n".join(rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), help="default: reference on a GPU, else toy")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--record", help="print the table of an earlier run")
    parser.add_argument("--output", help="file for the lines as JSON")
    args = parser.parse_args(argv)
    if args.record:
        if not Path(args.record).is_file():
            parser.error(f"--record {args.record}: no such file; leave it out to measure")
        lines = read_record(args.record)
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" and not own.INTERPRETED:
            parser.error("no GPU: set TRITON_INTERPRET=1 to try it out on a CPU, or give --record FILE")
        rows_for = own._rows_for
        before = fused.set_fused_kernels(True)
        try:
            size = args.size or ("reference" if device == "cuda" else "toy")
            layer, lines = measure(SIZES[size], device, args.repeats)
            own._rows_for = rows_for
            lines += measure_whole(layer, device, args.repeats)
        finally:
            own._rows_for = rows_for
            fused.set_fused_kernels(before)
    print(table(lines))
    if args.output:
        Path(args.output).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


if __name__ == "__main__":
    main()
