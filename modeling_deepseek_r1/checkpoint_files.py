"""A checkpoint folder on disk: which tensor lies in which file, whether the files are whole and are those written."""

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# {"format": 1, "files": {name: {"bytes", "sha256"}}} of the weight files and their index, weight files also with
# "header": the sha256 of their header alone, which is compared on every load. While a save is under way
# {"format": 1, "saving": true}.
MANIFEST = "checksums.json"
ADAPTER_PATTERNS = ("adapter_model.safetensors",)
COPY_AGAIN = "copy or download it again"
MAX_HEADER_BYTES = 100_000_000  # as in the safetensors format
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64,
}  # fmt: skip
# Files that a trainer leaves beside the weights; other pickles may be weights.
TRAINER_PICKLES = re.compile(r"(training_args|optimizer.*|scheduler|scaler|rng_state.*)\.(bin|pt|pth)")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def hash_file(path):
    """sha256 of a file as hexadecimal digits, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_header(path):
    """sha256 of a safetensors file's header, its length included."""
    with open(path, "rb") as file:
        length = file.read(8)
        return hashlib.sha256(length + file.read(min(int.from_bytes(length, "little"), MAX_HEADER_BYTES))).hexdigest()


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


def write_manifest(folder, patterns=("model*.safetensors", "model*.safetensors.index*.json")):
    """Writes `checksums.json` of the folder's weight files and index, all flushed to disk. Returns its content.

    `patterns`: of the files' names; of an adapter's folder `ADAPTER_PATTERNS`.
    """
    folder = Path(folder)
    names = {path.name for pattern in patterns for path in folder.glob(pattern)}
    if (folder / INDEX).is_file():
        names |= set(read_index(folder / INDEX).values())
    files = {}
    with ThreadPoolExecutor(4) as pool:
        digests = pool.map(lambda name: hash_file(folder / name), sorted(names))
        for name in sorted(names):
            flush(folder / name)  # while it is hashed
        for name, digest in zip(sorted(names), digests):
            files[name] = {"bytes": (folder / name).stat().st_size, "sha256": digest}
            if name.endswith(".safetensors"):
                files[name]["header"] = hash_header(folder / name)
    if (folder / "config.json").is_file():
        flush(folder / "config.json")
    flush(folder)  # the names of the new files before the manifest that vouches for them
    manifest = {"format": 1, "files": files}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


def read_manifest(folder):
    """-> the content of `checksums.json`, None if there is none.

    Raises ValueError if it is damaged or says that a save is under way.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = load_json(path.read_bytes())
        if manifest.get("saving"):
            raise ValueError(f"{path}: a save into this folder was interrupted, its files may be of two models; save "
                             "the model again or take another copy")  # fmt: skip
        if manifest.get("format") != 1:
            raise ValueError(f"{path} has format {manifest.get('format')!r}, this version reads 1; update the code")
        for name, entry in manifest["files"].items():
            require_plain_name(name, path)
            hashes = [entry["sha256"], entry.get("header", entry["sha256"])]
            if not is_count(entry["bytes"]) or not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in hashes):
                raise KeyError(name)
    except (KeyError, TypeError, AttributeError, UnreadableError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); {COPY_AGAIN}") from error
    return manifest


class UnreadableError(Exception):
    """JSON that cannot be read, of whatever kind."""


def load_json(content):
    """JSON from bytes; a key that occurs twice is an error. Raises UnreadableError."""

    def unique(pairs):
        result = dict(pairs)
        if len(result) < len(pairs):
            twice = sorted(key for key in result if sum(key == other for other, _ in pairs) > 1)
            raise UnreadableError(f"{twice[:3]} occur twice")
        return result

    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # also numbers of too many digits
        raise UnreadableError(str(error)) from error


def is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def require_plain_name(name, path):
    """Raises ValueError unless `name`, which the file `path` holds, is a file name without folders."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
        raise ValueError(f"{path} names {name!r}; only files of the same folder are allowed, {COPY_AGAIN}")


def entry_bytes(entry):
    """-> (first byte, last byte + 1) of a header entry. Raises ValueError saying in words what is wrong with it."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise ValueError("has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(is_count(size) for size in shape):
        raise ValueError(f"has the shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_count(offset) for offset in offsets):
        raise ValueError(f"has the data_offsets {offsets!r}")
    if 8 * (offsets[1] - offsets[0]) != prod(shape) * DTYPE_BITS[dtype]:
        raise ValueError(f"has {offsets[1] - offsets[0]} bytes, not those of {dtype} {shape}")
    return offsets


def read_header(path):
    """-> {tensor name: {"dtype", "shape", "data_offsets"}} of a safetensors file, checked against the file's size.

    Every entry has a known dtype and as many bytes as its shape needs, and the entries fill the file without gap or
    overlap. Raises ValueError naming the file, what is wrong and the way out.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is cut short: {size} bytes do not hold its header; {COPY_AGAIN}")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path} has a header of {length} bytes, at most {MAX_HEADER_BYTES}; {COPY_AGAIN}")
        try:
            header = load_json(file.read(length))
        except UnreadableError as error:
            raise ValueError(f"{path} has an unreadable header ({error}); {COPY_AGAIN}") from error
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path} has a header that is no mapping of tensors and metadata; {COPY_AGAIN}")
    spans = []
    for name, entry in header.items():
        try:
            spans.append((*entry_bytes(entry), name))
        except ValueError as error:
            raise ValueError(f"{path}: its tensor {name!r} {error}; {COPY_AGAIN}") from error
    end = 0
    for first, last, name in sorted(spans):
        if first != end:
            raise ValueError(f"{path}: its tensor {name!r} starts at byte {first}, not at {end}; {COPY_AGAIN}")
        end = last
    if size != 8 + length + end:
        raise ValueError(f"{path} has {size} bytes but its header promises {8 + length + end}; {COPY_AGAIN}")
    return header


def read_index(path):
    """-> {tensor name: file name} of an index file. Raises ValueError naming it if it is damaged."""
    try:
        where = load_json(Path(path).read_bytes())["weight_map"]
        if not isinstance(where, dict) or not where:
            raise KeyError("weight_map")
    except (KeyError, TypeError, UnreadableError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); {COPY_AGAIN}") from error
    for name in where.values():
        require_plain_name(name, path)
        if not name.endswith(".safetensors"):
            raise ValueError(f"{path} names {name}; only .safetensors files are read")
    return where


def weight_names(variant=None):
    """-> names of the single file and of the index, and the pattern of shard names, of a variant (`model.fp16-...`)."""
    dot = f".{variant}" if variant else ""
    shards = re.compile(rf"model{re.escape(dot)}-\d+-of-\d+\.safetensors")
    return f"model{dot}.safetensors", f"{INDEX.removesuffix('.json')}{dot}.json", shards


def require_weights(folder, variant=None):
    """Raises unless `folder` holds a single safetensors file or an index, not both, and no pickle in their stead."""
    single, index, _ = weight_names(variant)
    if not (folder / single).is_file() and not (folder / index).is_file():
        pickles = [path.name for path in sorted(folder.glob("*")) if path.suffix in PICKLE_SUFFIXES
                   and not TRAINER_PICKLES.fullmatch(path.name)]  # fmt: skip
        if pickles:
            raise ValueError(
                f"{folder / pickles[0]} is a pickle, which can run code when it is read; only safetensors files are "
                "loaded: convert it on a machine you can lose, with safetensors.torch.save_file"
            )
        raise FileNotFoundError(f"{folder} has neither {single} nor {index}; is it a model folder, completely copied?")
    if (folder / single).is_file() and (folder / index).is_file():
        raise ValueError(f"{folder} has both {single} and {index}, of two saves; {stale_of_two(folder, single, index)}")


def stale_of_two(folder, single, index):
    """Which of a single file and an index is left over from an earlier save, in words, with the way out."""
    try:
        names = (read_manifest(folder) or {"files": {}})["files"]
        shards = set(read_index(folder / index).values())
    except ValueError as error:
        return f"and {error}"
    absent = sorted(name for name in shards if not (folder / name).is_file())
    if (single in names) != (index in names):
        stale, reason = (index if single in names else single), f"{MANIFEST} does not name it"
    elif absent:
        stale, reason = index, f"{absent[0]}, which it names, is not there"
    else:
        older = (folder / single).stat().st_mtime <= (folder / index).stat().st_mtime
        stale, reason = (single if older else index), "it is the older one"
    return f"{stale} is stale ({reason}): remove it{' and its shards' if stale == index else ''}, or {COPY_AGAIN}"


def weight_files(folder, variant=None):
    """-> {tensor name: file name} of a folder with safetensors weights, from its index or its single file.

    Every file is checked with `read_header`, and the index against the files, both ways. Raises FileNotFoundError if
    there are no weights or a file that the index names is absent, ValueError if a file or the index is damaged, if
    shards of another save lie in the folder, or if there are only pickles.
    """
    folder = Path(folder)
    require_weights(folder, variant)
    single, index, shards = weight_names(variant)
    if (folder / single).is_file():
        where = dict.fromkeys(read_header(folder / single), single)
    else:
        where = read_index(folder / index)
    used = set(where.values()) or {single}
    absent = sorted(name for name in used if not (folder / name).is_file())
    if absent:
        shown = ", ".join(absent[:5])
        raise FileNotFoundError(f"{folder / index} names files that are not there: {shown}; {COPY_AGAIN}")
    extra = sorted(path.name for path in folder.iterdir() if shards.fullmatch(path.name) and path.name not in used)
    if extra:
        raise ValueError(f"{folder / extra[0]} belongs to another save: the folder's weights are in "
                         f"{single if (folder / single).is_file() else index}, which does not name it; remove it or "
                         f"{COPY_AGAIN}")  # fmt: skip
    for name in sorted(used) if used != {single} else ():
        placed, held = {key for key, file in where.items() if file == name}, set(read_header(folder / name))
        if placed - held:
            raise ValueError(f"{folder / name} lacks {len(placed - held)} tensors that {index} places there: "
                             f"{sorted(placed - held)[:3]}; {COPY_AGAIN}")  # fmt: skip
        if held - placed:
            raise ValueError(f"{folder / name} holds {len(held - placed)} tensors that {index} does not place there: "
                             f"{sorted(held - placed)[:3]}; {COPY_AGAIN}")  # fmt: skip
    return where


def check_weights(folder, variant=None):
    """`weight_files` of a model folder, compared with the manifest, if there is one: sizes, headers and the index.

    Reads headers only. Raises what `weight_files` raises; ValueError if a save was interrupted or the folder mixes two.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    where = weight_files(folder, variant)
    if manifest is None:
        return where
    single, index, _ = weight_names(variant)
    for name in sorted(set(where.values()) | {index if (folder / index).is_file() else single}):
        size, entry = (folder / name).stat().st_size, manifest["files"].get(name)
        found = None
        if entry is None:
            found = "is not named there"
        elif size != entry["bytes"]:
            found = f"has {size} bytes, {entry['bytes']} were written"
        elif name == index:
            found = None if hash_file(folder / name) == entry["sha256"] else "differs from what was written (sha256)"
        elif "header" in entry and hash_header(folder / name) != entry["header"]:
            found = "has another header than was written (sha256)"
        if found:
            raise ValueError(
                f"{folder / name} does not fit {MANIFEST}: it {found}. A save was interrupted or the folder mixes two: "
                f"{COPY_AGAIN}, or, if it was changed on purpose, remove {MANIFEST}"
            )
    return where


def verify_folder(folder):
    """Compares every weight file with the sha256 that was written when it was saved; returns the manifest.

    Raises what `check_weights` raises; FileNotFoundError if there is no manifest or a file that it names is absent;
    ValueError naming the files that differ.
    """
    check_weights(folder)
    return verify_files(folder)


def verify_files(folder):
    """The comparison of `verify_folder` alone: also of a folder with an adapter."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST}, so its weights cannot be verified; write one, of files that you trust, with "
            "`python -m modeling_deepseek_r1.checkpoint verify FOLDER --write`, or save the model with save_pretrained "
            "of this package"
        )
    names = sorted(manifest["files"])
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        shown = ", ".join(absent[:5])
        raise FileNotFoundError(f"{folder / MANIFEST} names files that are not there: {shown}; {COPY_AGAIN}")
    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(names, pool.map(lambda name: hash_file(folder / name), names)))
    differing = [name for name in names if found[name] != manifest["files"][name]["sha256"]]
    if differing:
        raise ValueError(f"{folder / differing[0]} differs from what was written (sha256 in {MANIFEST})"
                         f"{f', and {len(differing) - 1} more' if differing[1:] else ''}; {COPY_AGAIN}")  # fmt: skip
    return manifest


class FolderSave:
    """A save into `folder`, from its first byte to its manifest.

    Until `finish` the folder's `checksums.json` says that a save is under way, so that a folder in which a kill left
    old and new files side by side, perhaps of equal sizes, is refused by `check_weights`.
    """

    def __init__(self, folder, variant=None):
        self.folder, self.variant = Path(folder), variant
        manifest = self.folder / MANIFEST
        self.before, self.manifest = self._stamps(), manifest.read_bytes() if manifest.is_file() else None
        if self.manifest is not None or any(name.startswith("model") for name in self.before):  # else nothing to mix
            write_atomically(manifest, json.dumps({"format": 1, "saving": True}) + "\n")

    def _stamps(self):
        stats = {path.name: path.stat() for path in self.folder.iterdir() if not path.name.startswith(MANIFEST)}
        return {name: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats.items()}

    def begin_weights(self):
        """Before the first weight file: without the old index, `finish` can tell whether a new one was written."""
        (self.folder / weight_names(self.variant)[1]).unlink(missing_ok=True)

    def abandon(self):
        """After an error: puts the old manifest back if no file of the folder was touched."""
        if self._stamps() != self.before:
            return
        if self.manifest is None:
            (self.folder / MANIFEST).unlink(missing_ok=True)
        else:
            write_atomically(self.folder / MANIFEST, self.manifest.decode())

    def finish(self):
        """Removes weight files of an earlier save that the new one did not replace, then writes the manifest."""
        single, index, shards = weight_names(self.variant)
        used = set(read_index(self.folder / index).values()) if (self.folder / index).is_file() else {single}
        for path in list(self.folder.iterdir()):
            if path.name not in used and (path.name == single or shards.fullmatch(path.name)):
                path.unlink()
        return write_manifest(self.folder)
