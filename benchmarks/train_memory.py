"""The largest batch x length that trains on one device, with activation checkpointing and fp32 master weights."""

import gc
import json

import torch

from benchmarks.train_cases import BareStep, build_model, memory_figures, synchronize

PRECISION = 16  # the search ends when the bounds differ by less than a sixteenth


def largest_fitting(fits, start, limit):
    """(largest number found for which `fits(n)` holds or 0, whether `limit` ended the search): doubling, bisection.

    fits: int -> bool, falling. limit: never ask beyond it.
    """
    good, bad, number = 0, None, start
    while bad is None:
        if not fits(number):
            bad = number
        elif number >= limit:
            return number, True
        else:
            good, number = number, min(2 * number, limit)
    while bad - good > max(1, good // PRECISION):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good, False


def out_of_memory(error):
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "alloc_failed" in text


def clean_up(device):
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure_memory(job, say=print):
    """The line of one variant. Each try is a line of its own, so that a process that dies leaves what it had found."""
    model = build_model(job | {"checkpointing": True})
    step, tries = BareStep(job, model), []

    def line(rows=0, capped=False):
        return {"rows": rows, "length": job["length"], "tokens": rows * job["length"], "capped": capped,
                "tries": tries}  # fmt: skip

    def fits(rows):
        clean_up(job["device"])
        found = {"rows": rows, "tokens": rows * job["length"]}
        try:
            for _ in range(1 if any(entry["fits"] for entry in tries) else 2):  # the first makes the optimizer's states
                step(torch.randint(2, job["fields"]["vocab_size"], (rows, job["length"]), device=job["device"]))
            synchronize(job["device"])
            found["fits"] = True
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            found["fits"] = False
        if not found["fits"]:
            step.optimizer.zero_grad(set_to_none=True)  # outside of `except`: the error holds the frames' tensors
        tries.append(found | memory_figures(job))
        best = max((entry["rows"] for entry in tries if entry["fits"]), default=0)
        say(json.dumps({"variant": job["variant"], **line(best)}), flush=True)
        return found["fits"]

    return line(*largest_fitting(fits, job["batch"], job["limit_rows"]))


def memory_table(lines):
    rows = [f"{'variant':14} {'rows':>6} {'tokens':>9}"]
    found = {line["variant"]: line for line in lines if line.get("rows")}
    for name, line in found.items():
        capped = " (end of the search, not of the memory)" if line["capped"] else ""
        rows.append(f"{name:14} {line['rows']:6} {line['tokens']:9,}{capped}")
    for weights in ("fp32", "bf16"):
        pair = [found.get(f"{who}-{weights}") for who in ("bare", "library")]
        if all(pair):
            rows.append(f"ours / library, {weights}: {pair[0]['tokens'] / pair[1]['tokens']:.2f}")
    return "\n".join(rows)
