"""A checkpoint folder on disk: which tensor lies in which file, whether the files are whole and are those written."""

import hashlib
import json
import os
from pathlib import Path

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MANIFEST = "checksums.json"  # {"format": 1, "files": {name: {"bytes", "sha256"}}}: the weight files and their index


def hash_file(path):
    """sha256 of a file as hexadecimal digits, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path):
    """Has the system write a file or folder to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path, text):
    """Replaces `path` by `text` so that a reader sees the old content or the new, never a part."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    flush(path.parent)


def write_manifest(folder):
    """Writes `checksums.json` of the folder's safetensors files and index, all flushed to disk. Returns its content."""
    folder = Path(folder)
    files = {}
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]):
        flush(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    manifest = {"format": 1, "files": files}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


def read_header(path):
    """-> {tensor name: {"dtype", "shape", "data_offsets"}} of a safetensors file, checked against the file's size.

    Raises ValueError naming the file if it is cut short or its header cannot be read.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is cut short: {size} bytes do not hold its header; copy or download it again")
        try:
            header = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} has an unreadable header ({error}); copy or download it again") from error
    header.pop("__metadata__", None)
    needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != needed:
        raise ValueError(f"{path} has {size} bytes but its header promises {needed}; copy or download it again")
    return header


def weight_files(folder):
    """-> {tensor name: file name} of a folder with safetensors weights, from its index or its single file.

    Every file is checked with `read_header`, and the index against the files. Raises FileNotFoundError if there are no
    weights or a file that the index names is absent, ValueError if a file or the index is damaged.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        return dict.fromkeys(read_header(folder / WEIGHTS), WEIGHTS)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {INDEX}; is it a model folder, completely copied?")
    try:
        where = json.loads((folder / INDEX).read_text())["weight_map"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{folder / INDEX} is damaged ({error!r}); copy or download it again") from error
    absent = sorted({name for name in where.values() if not (folder / name).is_file()})
    if absent:
        raise FileNotFoundError(f"{folder / INDEX} names files that are not there: {', '.join(absent[:5])}")
    for name in sorted(set(where.values())):
        lost = {key for key, file in where.items() if file == name} - set(read_header(folder / name))
        if lost:
            raise ValueError(f"{folder / name} lacks {len(lost)} tensors that {INDEX} places there: {sorted(lost)[:3]}")
    return where


def check_weights(folder):
    """Raises what `weight_files` raises if `folder` is a local folder whose safetensors weights are not whole."""
    folder = Path(folder)
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        weight_files(folder)
