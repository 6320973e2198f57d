"""What a checkpoint folder holds, and how it differs from another."""

import math
from collections import Counter
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

from .checkpoint_reader import SCALE, logical_tensors, open_checkpoint, read_config


@dataclass(frozen=True)
class TensorRow:
    """A stored tensor, or with `compare` the difference of a logical one."""

    name: str
    dtype: str
    shape: tuple
    bytes: int
    file: str


@dataclass(frozen=True)
class Difference:
    """`largest`: of |a - b|, infinite where one is NaN and the other not; `relative`: of |a - b| / |b| over b != 0."""

    name: str
    largest: float
    relative: float


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def describe(folder):
    """-> {"tensors": [row of each stored tensor], "dtypes": {name: {tensors, elements, bytes}}, "parameters",
    "bytes"}. Scales of FP8 blocks do not count as parameters."""
    reader = open_checkpoint(folder)
    rows, dtypes, parameters = [], {}, 0
    for name, entry in sorted(reader.entries.items()):
        elements = math.prod(entry.shape)
        size = elements * entry.dtype.itemsize
        rows.append(asdict(TensorRow(name, dtype_name(entry.dtype), entry.shape, size, entry.file)))
        total = dtypes.setdefault(dtype_name(entry.dtype), Counter())
        total.update(tensors=1, elements=elements, bytes=size)
        parameters += 0 if name.endswith(SCALE) else elements
    return {
        "folder": str(folder), "tensors": rows, "dtypes": {name: dict(total) for name, total in sorted(dtypes.items())},
        "parameters": parameters, "bytes": sum(row["bytes"] for row in rows),
    }  # fmt: skip


def differences(tensor, other):
    """-> Difference of two logical tensors of one shape, in float64."""
    largest = relative = 0.0
    for (_, a), (_, b) in zip(tensor.pieces(), other.pieces(), strict=True):
        a, b = a.double(), b.double()
        gap = (a - b).abs()
        gap[(a == b) | (a.isnan() & b.isnan())] = 0
        gap[gap.isnan()] = math.inf
        if gap.numel():
            largest = max(largest, float(gap.max()))
            valid = (b != 0) & b.isfinite()
            relative = max(
                relative, float(torch.where(valid, gap / b.abs(), 0).nan_to_num(nan=0, posinf=math.inf).max())
            )
    return Difference(tensor.name, largest, relative)


def compare(folder, against, progress=False):
    """Differences of `folder` from `against`, tensor by tensor, FP8 dequantised and fused experts split.

    -> {"differences": [...], "missing": [names only in `against`], "extra": [only in `folder`], "shapes": {name: (ours,
    theirs)}}.
    """
    ours, theirs = (
        {t.name: t for t in logical_tensors(open_checkpoint(path), read_config(path))} for path in (folder, against)
    )
    common = sorted(ours.keys() & theirs.keys())
    shapes = {name: (ours[name].shape, theirs[name].shape) for name in common if ours[name].shape != theirs[name].shape}
    rows = [name for name in common if name not in shapes]
    disable = None if progress else True
    return {
        "against": str(against),
        "differences": [
            asdict(differences(ours[name], theirs[name])) for name in tqdm(rows, unit="tensor", disable=disable)
        ],
        "missing": sorted(theirs.keys() - ours.keys()),
        "extra": sorted(ours.keys() - theirs.keys()),
        "shapes": shapes,
    }


def is_equal(comparison, tolerance=0.0):
    """Whether nothing is missing or extra and no element differs by more than `tolerance`."""
    if comparison["missing"] or comparison["extra"] or comparison["shapes"]:
        return False
    return all(row["largest"] <= tolerance for row in comparison["differences"])


def description_lines(report):
    """`describe`'s result as text."""
    width = max((len(row["name"]) for row in report["tensors"]), default=4)
    yield f"{'tensor':{width}}  {'dtype':13}  {'shape':>16}  {'bytes':>14}  file"
    for row in report["tensors"]:
        shape = " x ".join(map(str, row["shape"])) or "scalar"
        yield f"{row['name']:{width}}  {row['dtype']:13}  {shape:>16}  {row['bytes']:>14,}  {row['file']}"
    for name, total in report["dtypes"].items():
        yield f"{name}: {total['tensors']:,} tensors, {total['elements']:,} elements, {total['bytes']:,} bytes"
    counts = f"{report['parameters']:,} parameters, {report['bytes']:,} bytes"
    yield f"{report['folder']}: {len(report['tensors']):,} tensors, {counts}"


def comparison_lines(comparison):
    """`compare`'s result as text."""
    rows = comparison["differences"]
    width = max((len(row["name"]) for row in rows), default=4)
    yield f"{'tensor':{width}}  largest difference  relative"
    for row in rows:
        yield f"{row['name']:{width}}  {row['largest']:18.6g}  {row['relative']:8.3g}"
    for kind in ("missing", "extra"):
        for name in comparison[kind]:
            yield f"{kind}: {name}"
    for name, (ours, theirs) in comparison["shapes"].items():
        yield f"shape: {name} is {tuple(ours)}, in {comparison['against']} {tuple(theirs)}"
    largest = max((row["largest"] for row in rows), default=0.0)
    equal = sum(row["largest"] == 0 for row in rows)
    yield (
        f"against {comparison['against']}: {equal:,} of {len(rows):,} tensors equal, largest difference {largest:.6g}, "
        f"{len(comparison['missing'])} missing, {len(comparison['extra'])} extra, "
        f"{len(comparison['shapes'])} of another shape"
    )
