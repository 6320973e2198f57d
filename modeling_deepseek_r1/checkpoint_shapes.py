"""Whether the tensors of weight files are those of a model: shapes, kinds of dtype, scales; from headers alone."""

import re

# The names under which an MTP layer stores its copies, and where the model holds the original.
MTP_COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
EXPERT_KEY = re.compile(r"(\d+)\.(gate|up|down)_proj\.weight")
SCALE = "_scale_inv"
FLOATS = ("F", "BF")  # how the names of floating dtypes begin in a safetensors header
WAY_OUT = "check that the folder is complete and that its config.json belongs to it"


def model_tensors(model):
    """-> {key: (shape, whether floating)} of parameters and saved buffers, whole even where they are sharded."""
    tensors = model.state_dict(keep_vars=True).items()
    return {key: (tuple(getattr(value, "ds_shape", value.shape)), value.is_floating_point()) for key, value in tensors}


def find_key(key, tensors, prefix="model."):
    """The model's key for one on disk; a base model has no prefix and its checkpoint may have none. None if unknown."""
    return next((name for name in (key, key.removeprefix(prefix), prefix + key) if name in tensors), None)


def expected_on_disk(key, tensors):
    """-> (shape, whether floating) that the tensor `key` of a file should have, None where the model has no such one.

    Raises ValueError for an expert that the model does not have.
    """
    layer, _, last = key.rpartition("mlp.experts.")
    if layer and (match := EXPERT_KEY.fullmatch(last)):
        fused = find_key(f"{layer}mlp.experts.{'down_proj' if match[2] == 'down' else 'gate_up_proj'}", tensors)
        if fused is None:
            return None
        (experts, rows, columns), floating = tensors[fused]
        if int(match[1]) >= experts:
            raise ValueError(f"{key} is there, but the config has n_routed_experts={experts}")
        return (rows if match[2] == "down" else rows // 2, columns), floating
    for copy, original in MTP_COPIES.items():
        if re.search(rf"(^|\.)layers\.\d+\.{re.escape(copy)}$", key):
            key = original
    known = find_key(key, tensors)
    return None if known is None else tensors[known]


def missing_experts(keys, tensors):
    """Expert matrices absent from `keys` (those on disk), of layers that have others there."""
    found = {}
    for key in keys:
        layer, _, last = key.rpartition("mlp.experts.")
        if layer and EXPERT_KEY.fullmatch(last):
            found.setdefault(f"{layer}mlp.experts.", set()).add(last)
    lost = []
    for base, names in found.items():
        if fused := find_key(f"{base}down_proj", tensors):
            wanted = {f"{i}.{kind}_proj.weight" for i in range(tensors[fused][0][0]) for kind in ("gate", "up", "down")}
            lost += [base + name for name in sorted(wanted - names)]
    return lost


def check_scale(key, headers, block):
    """Raises ValueError unless the FP8 matrix `key` has a scale of one value per block (height, width)."""
    path, entry = headers[key]
    if block is None:
        raise ValueError(f"{path}: {key} is in FP8, but config.json has no quantization_config with weight_block_size; "
                         f"{WAY_OUT}")  # fmt: skip
    if key + SCALE not in headers:
        raise ValueError(f"{path}: {key} is in FP8, but its scale {key}{SCALE} is in no file; {WAY_OUT}")
    path, scale = headers[key + SCALE]
    blocks = [-(-size // step) for size, step in zip(entry["shape"], block)]
    if scale["shape"] != blocks or not scale["dtype"].startswith(FLOATS):
        raise ValueError(f"{path}: {key}{SCALE} is {scale['dtype']} {scale['shape']}, a matrix {entry['shape']} in "
                         f"blocks of {list(block)} needs floats {blocks}; {WAY_OUT}")  # fmt: skip


def check_tensors(model, headers, block=None, may_differ=()):
    """Raises ValueError naming tensor, file and both shapes where a tensor on disk does not fit the model.

    headers: {tensor name: (file, header entry)}; block: (height, width) of FP8 scales if the config has them;
    may_differ: model keys whose shape may differ. Tensors that the model does not have are passed over. Returns the
    expert matrices that are absent.
    """
    tensors = model_tensors(model)
    for key, (path, entry) in headers.items():
        try:
            expected = expected_on_disk(key, tensors)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; {WAY_OUT}") from error
        if expected is None or key in may_differ:
            continue
        shape, floating = expected
        if tuple(entry["shape"]) != shape:
            raise ValueError(f"{path}: {key} has shape {tuple(entry['shape'])}, the model of config.json has {shape}; "
                             f"{WAY_OUT}")  # fmt: skip
        if entry["dtype"].startswith(FLOATS) != floating:
            raise ValueError(f"{path}: {key} is {entry['dtype']}, the model has {'floats' if floating else 'integers'} "
                             f"there; {WAY_OUT}")  # fmt: skip
        if entry["dtype"].startswith("F8") and not key.endswith(SCALE):
            check_scale(key, headers, block)
    return missing_experts(headers, tensors)
