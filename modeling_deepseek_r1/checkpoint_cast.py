"""Casts the weights of a checkpoint folder: bf16, fp16, fp32, and FP8 as the released checkpoints have it.

FP8: each matrix of a decoder layer as float8_e4m3fn `weight` with float32 `weight_scale_inv`, one scale for every
block of 128 x 128 (smaller at the edges). Embedding, head, norms, routers, biases and `eh_proj` stay in bf16, the
routing bias in float32.
Source: DeepSeek-V3 (arXiv:2412.19437), Sec. 3.3.2 and the layout of the released files.
"""

import math
from pathlib import Path

import torch
from torch.nn.functional import pad

from . import modeling_deepseek_r1
from .checkpoint_files import weight_files
from .checkpoint_reader import FP8, SCALE, logical_tensors, open_checkpoint, read_config
from .checkpoint_shapes import check_tensors
from .checkpoint_writer import CheckpointWriter, Group, Target, copy_others, refuse_existing, write_config
from .configuration_deepseek_r1 import DeepSeekR1Config
from .fp8 import NOT_IN_FP8
from .layout import mtp_prefixes, read_headers, wrong_checkpoint

KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": FP8}
BLOCK = 128
FP8_MAX = torch.finfo(FP8).max  # 448
FP8_SETTINGS = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
KEPT_IN_FP32 = "e_score_correction_bias"
PROJECTIONS = ("_proj.weight", "kv_a_proj_with_mqa.weight")


def goes_to_fp8(name, shape):
    """Whether the released files hold this tensor in FP8: the linear layers of the decoder, but not `eh_proj`."""
    parts = name.split(".")
    return len(shape) == 2 and "layers" in parts and name.endswith(PROJECTIONS) and parts[-2] not in NOT_IN_FP8


def quantise(matrix):
    """float32 (M, N) -> (float8_e4m3fn (M, N), float32 scales (ceil(M/128), ceil(N/128))).

    The scale of a block is its largest magnitude / 448, so that this one becomes the format's largest value. A block of
    zeros gets the smallest normal number. With 3 bits of mantissa and subnormals in steps of 2^-9,
        |dequantised - x| <= max(|x| / 17, scale * 2^-10):
    the worst normal value lies amid two neighbours just above a power of two, 1/16 from either.
    """
    rows, columns = matrix.shape
    padded = pad(matrix, (0, -columns % BLOCK, 0, -rows % BLOCK))
    tiles = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scale = (tiles.abs().amax((1, 3)) / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = (tiles / scale[:, None, :, None]).clamp_(-FP8_MAX, FP8_MAX)
    return scaled.flatten(2).flatten(0, 1)[:rows, :columns].to(FP8), scale


def check_finite(piece, tensor, dtype, start):
    """Raises ValueError naming the tensor for NaN or infinity, and for values that `dtype` cannot hold."""
    if not piece.is_floating_point() or not piece.numel():
        return
    largest = float(piece.abs().max())  # NaN if there is one
    if not math.isfinite(largest):
        row = start + int((~torch.isfinite(piece)).any(1).nonzero()[0])
        raise ValueError(
            f"{tensor.name} holds NaN or infinity (row {row}, from {_file(tensor)}); the checkpoint is broken"
        )
    if largest > torch.finfo(dtype).max:
        raise ValueError(f"{tensor.name} reaches {largest:g}, beyond {dtype} ({torch.finfo(dtype).max:g}); take fp32")


def _file(tensor):
    return tensor.reader.folder / tensor.reader.entries[tensor.source].file


def plan_tensor(tensor, kind=None, pieces=None):
    """-> Group that writes one logical tensor. `kind`: a name of `KINDS`, None: as it is.

    `pieces`: other values of the same shape, as `tensor.pieces()` yields them, in any float dtype.
    """
    checked = pieces is not None or kind is not None
    pieces, dtype = pieces or tensor.pieces, tensor.dtype
    if kind == "fp8" and goes_to_fp8(tensor.name, tensor.shape):
        return _plan_fp8(tensor, pieces)
    if kind is not None and dtype.is_floating_point:
        wanted = torch.bfloat16 if kind == "fp8" else KINDS[kind]
        dtype = torch.float32 if tensor.name.endswith(KEPT_IN_FP32) else wanted

    def cast_pieces():
        for start, piece in pieces():
            if checked:
                check_finite(piece, tensor, dtype, start)
            yield tensor.name, piece.to(dtype)

    return Group((Target(tensor.name, dtype, tensor.shape),), cast_pieces)


def _plan_fp8(tensor, pieces):
    rows, columns = tensor.shape
    blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
    targets = (Target(tensor.name, FP8, tensor.shape), Target(tensor.name + SCALE, torch.float32, blocks))

    def cast_pieces():
        for start, piece in pieces():
            weight, scale = quantise(piece.float())
            if not bool(scale.isfinite().all()):  # cheaper than looking at every weight
                check_finite(piece.float(), tensor, torch.float32, start)
            yield tensor.name, weight
            yield tensor.name + SCALE, scale

    return Group(targets, cast_pieces)


def cast_config(fields, kind):
    """config.json's fields after a cast to `kind` (a name of `KINDS`)."""
    result = {key: value for key, value in fields.items() if key not in ("quantization_config", "torch_dtype")}
    result["dtype"] = str(KINDS["bf16" if kind == "fp8" else kind]).removeprefix("torch.")
    if kind == "fp8":
        result["quantization_config"] = dict(FP8_SETTINGS)
    return result


def check_fits_config(source, fields):
    """Raises ValueError naming tensor and file where the weights are not those of the model that config.json describes.

    Models of other families, and configs that name no architecture, are passed over.
    """
    name = (fields.get("architectures") or [""])[0].replace("DeepseekV3", "DeepSeekR1")
    model_class = getattr(modeling_deepseek_r1, name.replace("DeepseekV2", "DeepSeekR1"), None)
    if model_class is None:
        return
    quantised = fields.get("quantization_config") or {}
    plain = {key: value for key, value in fields.items() if key != "quantization_config"}
    with torch.device("meta"):
        model = model_class(DeepSeekR1Config(**plain))
    headers = read_headers(Path(source) / file for file in sorted(set(weight_files(source).values())))
    lost = check_tensors(model, headers, quantised.get("weight_block_size"))
    with_experts = {key.partition("mlp.experts.")[0] for key in headers if "mlp.experts." in key}
    for key, _ in model.named_parameters():  # a tied one once
        layer, _, fused = key.partition("mlp.experts.")  # each expert's matrices: `check_tensors`
        if key not in headers and not (fused and layer in with_experts):
            lost.append(key)
    if lost:
        raise wrong_checkpoint(lost, mtp_prefixes(model.config), source)


def plan_groups(source, fields, kind):
    """-> (reader, [Group]) for all tensors of a folder, cast to `kind` (None: as they are).

    Raises ValueError if there is nothing to cast, for a damaged folder, and what reading raises.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"to={kind!r} is unknown; known are {', '.join(KINDS)}")
    if kind == "fp8" and fields.get("quantization_config"):
        raise ValueError(f"{Path(source) / 'config.json'} has a quantization_config already; cast it to bf16 first")
    reader = open_checkpoint(source)
    tensors = logical_tensors(reader, fields, dequantised=kind is not None)
    check_fits_config(source, fields)
    if kind == "fp8" and not any(goes_to_fp8(tensor.name, tensor.shape) for tensor in tensors):
        raise ValueError(f"{source} holds no linear layer of a decoder; nothing would be in FP8")
    check_all_used(reader, tensors)
    return reader, [plan_tensor(tensor, kind) for tensor in tensors]


def check_all_used(reader, tensors):
    """Raises ValueError if a stored tensor would not be read."""
    lost = reader.entries.keys() - {source for tensor in tensors for source in tensor.sources}
    if lost:
        raise ValueError(f"{reader.folder}: {len(lost)} tensors would not be written: {', '.join(sorted(lost)[:5])}")


def cast(source, target, to, max_shard_size="5GB", progress=False):
    """Writes the folder `source` as `target` with its weights in `to` ("bf16", "fp16", "fp32", "fp8").

    Returns the names written. Resumable; memory is independent of the model's size.

    Raises:
        FileExistsError: if `target` is there. ValueError: naming the tensor, for NaN, infinity, missing or misshapen
        scales; for a damaged folder. OSError: for a full disk, naming the bytes.
    """
    refuse_existing(target)
    fields = read_config(source)
    reader, groups = plan_groups(source, fields, to)
    result = cast_config(fields, to)

    def finish(folder):
        copy_others(source, folder)
        write_config(folder, result)

    settings = {"command": "cast", "to": to, "config": result}
    sources = [*reader.files(), Path(source) / "config.json"]
    return CheckpointWriter(target, groups, settings, sources, max_shard_size).run(finish, progress)
