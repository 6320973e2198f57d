"""Tensors of a checkpoint folder, read a few rows at a time: memory does not depend on the model's size.

Files are read with `seek`, not mapped, since mapped pages count as memory of the process. What comes out are *logical*
tensors: fused experts appear as the matrices of the released layout, FP8 matrices with their scales as float32.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from .checkpoint_files import check_weights, read_header

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
FP8, SCALE = torch.float8_e4m3fn, "_scale_inv"
PIECE_ELEMENTS = 1 << 20  # read at once, in whole rows
FUSED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def read_config(folder):
    """config.json of a folder as a dict. Raises FileNotFoundError or ValueError naming it."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json; is it a model folder?")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is unreadable ({error}); copy or download it again") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no mapping of fields; is it a model folder?")
    return fields


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies. `rows`: of the matrix that its leading dimensions flatten to (1 for a vector)."""

    file: str
    offset: int
    dtype: torch.dtype
    shape: tuple

    @property
    def rows(self):
        return math.prod(self.shape[:-1])

    @property
    def columns(self):
        return self.shape[-1] if self.shape else 1


class TensorReader:
    """The tensors of safetensors files of a folder. `where`: {tensor name: file name}.

    Raises ValueError naming tensor and file for a dtype that is not known here, and what `read_header` raises.
    """

    def __init__(self, folder, where):
        self.folder, self.entries, self._open = Path(folder), {}, (None, None)
        for file in sorted(set(where.values())):
            header, path = read_header(self.folder / file), self.folder / file
            with path.open("rb") as opened:
                start = 8 + int.from_bytes(opened.read(8), "little")
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                if where.get(name) != file:
                    continue
                if entry["dtype"] not in DTYPES:
                    raise ValueError(f"{path}: {name} has dtype {entry['dtype']}; known are {', '.join(DTYPES)}")
                offset = start + entry["data_offsets"][0]
                self.entries[name] = Entry(file, offset, DTYPES[entry["dtype"]], tuple(entry["shape"]))

    def files(self):
        return [self.folder / name for name in sorted({entry.file for entry in self.entries.values()})]

    def read(self, name, start=0, stop=None):
        """Rows [start, stop) of a tensor's matrix, or the whole tensor in its own shape."""
        entry = self.entries[name]
        stop_row = entry.rows if stop is None else stop
        count = (stop_row - start) * entry.columns
        if count == 0:
            data = torch.empty(0, dtype=entry.dtype)
        else:
            if self._open[0] != entry.file:  # one file is open at a time
                self.close()
                self._open = (entry.file, open(self.folder / entry.file, "rb", buffering=0))
            file, buffer = self._open[1], bytearray(count * entry.dtype.itemsize)
            file.seek(entry.offset + start * entry.columns * entry.dtype.itemsize)
            view, got = memoryview(buffer), 0
            while got < len(buffer):  # one call reads 2 GiB at most
                if not (read := file.readinto(view[got:])):
                    raise ValueError(f"{self.folder / entry.file} ended within {name}; was it changed meanwhile?")
                got += read
            data = torch.frombuffer(buffer, dtype=entry.dtype)
        return data.view(entry.shape if stop is None else (stop - start, entry.columns))

    def close(self):
        if self._open[1] is not None:
            self._open[1].close()
        self._open = (None, None)


def open_checkpoint(folder):
    """-> TensorReader of a model folder; raises what `check_weights` raises."""
    return TensorReader(folder, check_weights(folder))


@dataclass(frozen=True)
class LogicalTensor:
    """Rows [first, last) of a stored tensor under a name of the released layout, dequantised where `scale` is given.

    `dtype`: of the pieces; float32 for what is dequantised. `sources`: the stored tensors it is made of.
    """

    reader: TensorReader
    name: str
    source: str
    dtype: torch.dtype
    shape: tuple
    first: int
    last: int
    scale: str | None = None
    block: tuple = (128, 128)

    @property
    def sources(self):
        return (self.source,) if self.scale is None else (self.source, self.scale)

    def pieces(self):
        """Yields (its first row within this tensor, piece (rows, columns)); pieces begin at multiples of 128."""
        columns = self.reader.entries[self.source].columns
        step = max(128, PIECE_ELEMENTS // max(columns, 1) // 128 * 128)
        scale = None if self.scale is None else self.reader.read(self.scale).float()
        for start in range(self.first, self.last, step):
            piece = self.reader.read(self.source, start, min(start + step, self.last))
            yield start - self.first, piece if scale is None else dequantise(piece, scale, self.block, start)


def dequantise(piece, scale, block=(128, 128), first_row=0):
    """Rows of an FP8 matrix times the scales of their blocks, float32.

    Source: DeepSeek-V3 (arXiv:2412.19437), Sec. 3.3.2: one scale for every 128 x 128 weights.
    Shapes: piece (rows, N) from row `first_row` of the matrix (M, N); scale (ceil(M / block[0]), ceil(N / block[1])).
    """
    rows = torch.arange(first_row, first_row + piece.shape[0]) // block[0]
    columns = torch.arange(piece.shape[1]) // block[1]
    return piece.float().mul_(scale[rows][:, columns])


def fp8_block(fields, reader):
    """(rows, columns) of a block of this FP8 folder, or None if it holds no FP8 matrices.

    Raises ValueError if the config does not say how they are quantised, or says a kind other than block-scaled e4m3.
    """
    quantised = [
        name for name, entry in reader.entries.items() if entry.dtype.itemsize == 1 and entry.dtype.is_floating_point
    ]
    settings = fields.get("quantization_config")
    if not settings and not quantised:
        return None
    where = reader.folder / "config.json"
    if not settings:
        raise ValueError(
            f"{where} lacks quantization_config, but {quantised[0]} is in FP8; take the config it came with"
        )
    if not isinstance(settings, dict):
        raise ValueError(f"{where}: quantization_config={settings!r} must be a mapping; take the config it came with")
    if settings.get("quant_method") != "fp8":
        raise ValueError(
            f"{where}: quant_method={settings.get('quant_method')!r} cannot be read here; only fp8 with block scales"
        )
    block = settings.get("weight_block_size")
    whole = isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)
    if not whole:
        raise ValueError(f"{where}: weight_block_size={block!r} must be two sizes, as [128, 128]")
    return tuple(block)


def check_scales(reader, block):
    """Raises ValueError naming tensor and file unless every FP8 matrix has scales of the right shape, and no other."""
    for name, entry in reader.entries.items():
        path = reader.folder / entry.file
        if entry.dtype == FP8:
            if len(entry.shape) != 2:
                raise ValueError(
                    f"{path}: {name} {entry.shape} is in FP8 but no matrix; save it with one matrix per expert"
                )
            scale = reader.entries.get(name + SCALE)
            if scale is None:
                raise ValueError(
                    f"{path}: {name} is in FP8 but {name + SCALE} is not in {reader.folder}; copy it again"
                )
            blocks = tuple(-(-size // side) for size, side in zip(entry.shape, block))
            if scale.shape != blocks or not scale.dtype.is_floating_point:
                raise ValueError(
                    f"{reader.folder / scale.file}: {name + SCALE} has shape {scale.shape}, {scale.dtype}, but {name} "
                    f"{entry.shape} needs floats of {blocks} in blocks of {block}; copy it again"
                )
        elif entry.dtype.is_floating_point and entry.dtype.itemsize == 1:
            raise ValueError(f"{path}: {name} is {entry.dtype}; only float8_e4m3fn can be read")
        elif name.endswith(SCALE):
            weight = reader.entries.get(name.removesuffix(SCALE))
            if weight is None or weight.dtype != FP8:
                raise ValueError(f"{path}: {name} belongs to no FP8 matrix; copy the folder again")


def logical_tensors(reader, fields, dequantised=True):
    """-> list of LogicalTensor, in the order of the files. `dequantised=False`: FP8 matrices and scales as stored."""
    block = fp8_block(fields, reader)
    if block:
        check_scales(reader, block)
    result = []
    for name, entry in reader.entries.items():
        is_fp8 = entry.dtype == FP8 and dequantised
        if name.endswith(FUSED):
            result.extend(_experts(reader, name, entry))
        elif is_fp8:
            result.append(LogicalTensor(
                reader, name, name, torch.float32, entry.shape, 0, entry.rows, scale=name + SCALE, block=block
            ))  # fmt: skip
        elif not (dequantised and block and name.endswith(SCALE)):
            result.append(LogicalTensor(reader, name, name, entry.dtype, entry.shape, 0, entry.rows))
    return result


def _experts(reader, name, entry):
    """The matrices of a fused tensor (E, rows, columns), which `save_original_format=False` writes."""
    if len(entry.shape) != 3:
        raise ValueError(
            f"{reader.folder / entry.file}: {name} {entry.shape} must have three dimensions, (expert, out, in)"
        )
    base, _, kind = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    experts, rows, columns = entry.shape
    height = rows // len(parts)
    for index in range(experts * len(parts)):
        key = f"{base}.{index // len(parts)}.{parts[index % len(parts)]}.weight"
        yield LogicalTensor(reader, key, name, entry.dtype, (height, columns), index * height, (index + 1) * height)
