"""What `bench_multi.py` measured on the GPUs of one host, against the step model, and its constants fitted to that.

One constant after the other, each to its own cases and within its bounds: `speed` to a GPU alone, then the overlap of
DDP and of FSDP2, then the wait for counts of rows. Two numbers cannot tell bandwidth from overlap: bandwidths stay as
stated. A constant that ends at a bound says that its cases are not explained by it; the table shows by how much.
"""

import json
from dataclasses import replace
from pathlib import Path

from benchmarks.scale_step import Setting, step
from recipes.eval_tables import aligned

ROWS, LENGTH = 4, 4096  # of bench_multi.py at the reference config
# (constant, its layout in the names of cases, least, most)
FITTED = (("speed", "alone", 0.5, 2.0), ("ddp_overlap", "ddp", 0.0, 1.0), ("fsdp_overlap", "fsdp2", 0.0, 1.0),
          ("layer_wait", "fsdp2_ep", 0.0, 5e-3))  # fmt: skip
LAYOUT_OF = {"alone": "one_gpu"} | {name: name for name in ("ddp", "fsdp2", "fsdp2_ep")}


def read_measured(paths):
    """{case: line} of the ours-* cases that ran, of one or more files; later files win.

    Raises:
        ValueError: for a file that has none, or figures of a CPU or of another size than the reference config's.
    """
    found = {}
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"measured={str(path)!r}: no such file; write one with "
                             "python benchmarks/bench_multi.py --output FILE")  # fmt: skip
        own = {line["case"]: line for line in _lines(path) if line["case"].startswith("ours-") and "step_ms" in line}
        if not own:
            raise ValueError(f"measured={str(path)!r} has no ours-* case that ran; write one with "
                             "python benchmarks/bench_multi.py --output FILE")  # fmt: skip
        for case, line in own.items():
            _check(path, case, line)
        found |= own
    return found


def _lines(path):
    try:
        lines = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"measured={str(path)!r} is not JSON lines ({error}); give what --output wrote") from error
    return [line for line in lines if isinstance(line, dict) and "case" in line]


def _check(path, case, line):
    tokens = line["tokens_per_second"] * line["step_ms"] / 1e3 / line["processes"]
    if line["device"] == "cpu" or abs(tokens / (ROWS * LENGTH) - 1) > 0.02:
        raise ValueError(f"measured={str(path)!r}: {case} was run on {line['device']!r} with {tokens:,.0f} tokens a "
                         f"GPU and step; the fit is for GPUs and the reference config's {ROWS * LENGTH:,}, which "
                         "bench_multi.py takes by default")  # fmt: skip


def setting_of(case, processes):
    """The `Setting` of a case, or None for one that the model does not know."""
    _, layout, weights = case.split("-")
    if layout not in LAYOUT_OF:
        return None
    return Setting(LAYOUT_OF[layout], processes, ROWS, 1, weights == "fp32", False,
                   processes if layout == "fsdp2_ep" else 1)  # fmt: skip


def fit(model, rates, network, constants, measured):
    """`constants` with those that `measured` ({case: line}) has cases for fitted to them, and the names of those."""
    names = []
    for name, layout, least, most in FITTED:
        lines = [line for case, line in measured.items() if case.split("-")[1] == layout]
        if lines:
            names.append(name)
            constants = _search(name, least, most, lines, model, rates, network, constants)
    return constants, names


def _search(name, least, most, lines, model, rates, network, constants, points=21, rounds=4):
    """The value in [least, most] with the least sum of squared relative errors; a grid, and finer ones around."""

    def error(value):
        given = replace(constants, **{name: value})
        ms = [(predicted_ms(line, model, rates, network, given), line["step_ms"]) for line in lines]
        return sum((ours / seen - 1) ** 2 for ours, seen in ms)

    low, high = least, most
    for _ in range(rounds):
        width = (high - low) / (points - 1)
        value = min((low + width * i for i in range(points)), key=error)
        low, high = max(least, value - width), min(most, value + width)
    return replace(constants, **{name: value})


def predicted_ms(line, model, rates, network, constants):
    setting = setting_of(line["case"], line["processes"])
    return step(model, setting, rates, network, constants).seconds * 1e3


def comparison(model, rates, network, stated, fitted, names, measured):
    """Lines: each case measured, predicted with the constants as stated and fitted, and what the fit found. "host ms":
    what launching the step took; where that is nearly all of it, the step is bound by what the model does not have."""
    rows = []
    for case, line in measured.items():
        host = f"{line['host_ms']:.1f}" if "host_ms" in line else ""
        if setting_of(case, line["processes"]) is None:
            rows.append((case, f"{line['step_ms']:.1f}", host, "not in the model", "", "", ""))
            continue
        cells = [case, f"{line['step_ms']:.1f}", host]
        for constants in (stated, fitted):
            ms = predicted_ms(line, model, rates, network, constants)
            cells += [f"{ms:.1f}", f"{100 * (ms / line['step_ms'] - 1):+.1f}"]
        rows.append(cells)
    table = aligned(["case", "measured ms", "host ms", "stated", "error %", "fitted", "error %"], rows)
    found = [_found(name, getattr(stated, name), getattr(fitted, name)) for name in names]
    return "\n".join([table, *found])


def _found(name, stated, value):
    least, most = next(each[2:] for each in FITTED if each[0] == name)
    at_bound = min(value - least, most - value) < 1e-3 * (most - least)
    return f"{name}: {stated:g} stated, {value:.4g} fitted" + (", at its bound" if at_bound else "")
