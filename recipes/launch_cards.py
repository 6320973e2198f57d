"""The table of docs/launch.md: which layout fits which of the shipped models on which card.

    python recipes/plan_launch.py --cards
"""

from pathlib import Path

from recipes.launch_layouts import LAYOUTS
from recipes.launch_memory import Work, footprint, model_shape
from recipes.model_loading import build_config
from recipes.pretrain_config import PretrainConfig, parse_config
from recipes.sizing import GIB

CONFIGS = Path(__file__).parent / "configs"
# GiB that torch reports: RTX 4090, A100, H100, H200.
CARDS = {"24 GB": 23.6, "40 GB": 39.4, "80 GB": 79.2, "141 GB": 139.8}
MODELS = ("small", "base", "r1")
SHOWN = ("one_gpu", "ddp", "fsdp2_kept", "fsdp2", "fsdp2_ep", "zero2", "zero3", "fsdp2_checkpointing")
MOST_DEVICES = 2048


def _device_counts(layout, config):
    if layout.devices == "one":
        return [1]
    counts = [2**power for power in range(1, MOST_DEVICES.bit_length())]
    if layout.name == "fsdp2_ep":
        counts = [count for count in counts if config.n_routed_experts % count == 0]
    if not layout.sharded:
        counts = counts[:1]  # more devices do not make it smaller
    return counts


def smallest(shape, layout, length, device_bytes):
    """"16: 4 rows" (of the fewest devices, the largest micro-batch), with "ckpt" where one row needs it, or "no"."""
    for count in _device_counts(layout, shape.config):
        for checkpointing in (True,) if layout.always_checkpoints else (False, True):
            rows = _most_rows(shape, layout, count, length, device_bytes, checkpointing)
            if rows:
                return _cell(shape, layout, length, count, rows, checkpointing)
    return "no"


def _cell(shape, layout, length, count, rows, checkpointing):
    text = f"{count}: {rows} row{'s' if rows > 1 else ''}"
    text += " ckpt" if checkpointing and not layout.always_checkpoints else ""
    host = footprint(shape, layout, count, Work(rows, length)).host
    return text + (f", host {host / GIB:,.0f} GiB each" if host else "")


def _most_rows(shape, layout, count, length, device_bytes, checkpointing):
    """The largest power of two of rows, up to 64, that fits."""
    most = 0
    for power in range(7):
        work = Work(2**power, length, checkpointing=checkpointing)
        if not footprint(shape, layout, count, work).fits(device_bytes):
            break
        most = 2**power
    return most


def cards_table():
    """Markdown lines."""
    lines = [f"| model | layout | {' | '.join(CARDS)} |", f"|---|---|{'---|' * len(CARDS)}"]
    for model in MODELS:
        args = parse_config(PretrainConfig, ["--config", str(CONFIGS / f"pretrain_{model}.yaml"), "--use_cpu"])
        shape = model_shape(build_config(args))
        for name in SHOWN:
            cells = [smallest(shape, LAYOUTS[name], args.sequence_length, gib * GIB) for gib in CARDS.values()]
            title = f"{model}, {shape.total / 1e9:.3g} B, rows of {args.sequence_length:,}"
            lines.append(f"| {title} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
