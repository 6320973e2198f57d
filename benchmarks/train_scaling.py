"""Tokens/s and MFU beside the library at twelve points around the reference: length, experts, top-k, width."""

import gc
import json

import torch

from benchmarks.train_cases import REFERENCE, TOY, measure_bare
from benchmarks.train_memory import clean_up

BASE = REFERENCE | {"num_hidden_layers": 6}


def _width(width, layers, inner):
    heads = width // 64
    return dict(hidden_size=width, num_attention_heads=heads, num_hidden_layers=layers, intermediate_size=4 * width,
                moe_intermediate_size=inner)  # fmt: skip


# {point: (fields that differ from BASE, rows, row length)}; so many tokens that the library fits on 80 GB in bf16.
POINTS = {
    "base: length 4k, 64 experts, top-6, width 1024": ({}, 4, 4096),
    "length 1k": ({}, 16, 1024),
    "length 8k": ({}, 2, 8192),
    "length 32k": ({}, 1, 32768),
    "experts 8": ({"n_routed_experts": 8}, 4, 4096),
    "experts 128": ({"n_routed_experts": 128}, 4, 4096),
    "experts 256": ({"n_routed_experts": 256}, 4, 4096),
    "top-1": ({"num_experts_per_tok": 1}, 4, 4096),
    "top-4": ({"num_experts_per_tok": 4}, 4, 4096),
    "top-8": ({"num_experts_per_tok": 8}, 4, 4096),
    "width 512": (_width(512, 6, 352), 4, 4096),
    "width 2048": (_width(2048, 4, 1408), 2, 4096),
    "width 4096": (_width(4096, 3, 1408), 2, 4096),
}

# The far ends first: where a deadline cuts, they say most.
ORDER = (
    "base: length 4k, 64 experts, top-6, width 1024", "length 32k", "experts 256", "top-1", "width 4096", "length 1k",
    "experts 8", "top-8", "width 512", "length 8k", "experts 128", "width 2048", "top-4",
)  # fmt: skip


def toy_point(changes, rows, length):
    """The same change on sizes that a CPU takes in its stride, to try the command out."""
    fields = dict(TOY)
    for name in ("n_routed_experts", "num_experts_per_tok"):
        if name in changes:
            fields[name] = changes[name]
    fields["n_routed_experts"] = max(fields["n_routed_experts"], fields["num_experts_per_tok"])
    if "hidden_size" in changes:
        fields["hidden_size"] = changes["hidden_size"] // 32
    return fields, rows, max(length // 256, 8)


def scaling_job(point, device):
    changes, rows, length = POINTS[point]
    fields, rows, length = (BASE | changes, rows, length) if device == "cuda" else toy_point(changes, rows, length)
    return {"point": point, "fields": fields, "batch": rows, "length": length}


def measure_scaling(job, say=print):
    """Both sides in turn in one process (ours first); what one side raises is its result."""
    weights, found = job["weights"], {}
    for who in ("bare", "library"):
        try:
            found[who] = measure_bare(job | {"variant": f"{who}-{weights}"})
        except Exception as error:  # a size that does not fit, or does not run, is a result too
            found[who] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        gc.collect()
        clean_up(job["device"])
        if job["device"] == "cuda" and "error" in found[who]:
            torch.cuda.synchronize()  # a context that is lost says so here, not at the other side
        say(json.dumps({"variant": job["variant"], "point": job["point"], **found}), flush=True)
    speeds = [found[who].get("tokens_per_second") for who in ("bare", "library")]
    return {"point": job["point"], **found, "ratio": round(speeds[0] / speeds[1], 3) if all(speeds) else None}


def scaling_table(lines):
    sides = f"{'ours tok/s':>11} {'MFU %':>6} {'library':>9} {'MFU %':>6} {'ratio':>6}"
    rows = [f"{'point':48} {'tokens':>7} {sides}"]
    for line in sorted((line for line in lines if "bare" in line), key=lambda line: list(POINTS).index(line["point"])):
        cells = []
        for who, width in (("bare", 11), ("library", 9)):
            side = line.get(who, {})
            speed = f"{side['tokens_per_second']:,}" if "tokens_per_second" in side else "error"
            cells.append(f"{speed:>{width}} {side.get('mfu_percent') or '':>6}")
        tokens = max(line.get(who, {}).get("tokens_per_step", 0) for who in ("bare", "library"))
        rows.append(f"{line['point']:48} {tokens:7,} {' '.join(cells)} {line.get('ratio') or '':>6}")
    return "\n".join(rows)
