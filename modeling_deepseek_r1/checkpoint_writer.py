"""Writes a checkpoint folder of any size: planned beforehand, streamed, resumable, and there completely or not at all.

The work happens in `.NAME.partial` beside the folder; `.NAME.partial.json` lists the shards that are on disk for good.
The same command after a kill goes on behind them. The folder gets its name by one rename, after every planned tensor
was found written.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from .checkpoint_files import INDEX, MANIFEST, WEIGHTS, flush, hash_file, hash_header, read_header, write_atomically
from .checkpoint_reader import DTYPES

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Target:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Group:
    """Tensors made together, which lie in one shard. `pieces()` yields (name, tensor): the next elements of each, in
    row-major order."""

    targets: tuple[Target, ...]
    pieces: Callable

    @property
    def nbytes(self):
        return sum(target.nbytes for target in self.targets)


def parse_size(text):
    """ "5GB" -> bytes (decimal units). Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B|)", str(text).strip().upper())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise ValueError(f"max_shard_size={text!r} must be a positive size in B, KB, MB, GB or TB, as 5GB")
    return size


def plan_shards(groups, max_shard_size):
    """-> {file name: [Group]}: consecutive groups, at most that many bytes of tensors a file (a larger group alone)."""
    limit, shards, used = parse_size(max_shard_size), [[]], 0
    for group in groups:
        if shards[-1] and used + group.nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(group)
        used += group.nbytes
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def shard_header(groups):
    """-> (bytes before the tensors, {name: (offset in the file, Target)}). Wide dtypes first: all lie aligned."""
    targets = sorted((t for group in groups for t in group.targets), key=lambda t: (-t.dtype.itemsize, t.name))
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for target in targets:
        entries[target.name] = {
            "dtype": DTYPE_NAMES[target.dtype], "shape": list(target.shape), "data_offsets": [end, end + target.nbytes]
        }  # fmt: skip
        end += target.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = {target.name: (start + entries[target.name]["data_offsets"][0], target) for target in targets}
    return len(text).to_bytes(8, "little") + text, places


def write_shard(path, groups, bar=None):
    """Streams one file. Raises ValueError if a planned tensor was not written completely."""
    header, places = shard_header(groups)
    filled = dict.fromkeys(places, 0)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(target.nbytes for _, target in places.values()))
        for group in groups:
            for name, piece in group.pieces():
                offset, target = places[name]
                data = piece.contiguous().reshape(-1).view(torch.uint8).numpy()
                if piece.dtype != target.dtype or filled[name] + data.nbytes > target.nbytes:
                    raise ValueError(f"{name}: more was made, or {piece.dtype}, than the planned {target}")
                file.seek(offset + filled[name])
                file.write(data)
                filled[name] += data.nbytes
                if bar is not None:
                    bar.update(data.nbytes)
    lost = [name for name, (_, target) in places.items() if filled[name] != target.nbytes]
    if lost:
        raise ValueError(f"{path.name}: {len(lost)} tensors were not written completely: {', '.join(lost[:5])}")
    flush(path)


def shard_bytes(groups):
    return len(shard_header(groups)[0]) + sum(group.nbytes for group in groups)


def file_record(path):
    """A file's entry in `checksums.json`."""
    record = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    return {**record, "header": hash_header(path)} if path.suffix == ".safetensors" else record


class CheckpointWriter:
    """One run of a command.

    Args:
        target: the folder to make.
        groups: what to write.
        settings: JSON values; with another value a partial folder is started anew.
        sources: files read; their sizes and times of change are part of the settings.
        max_shard_size: as "5GB".
    """

    def __init__(self, target, groups, settings, sources, max_shard_size="5GB"):
        self.target = Path(target)
        self.partial = self.target.with_name(f".{self.target.name}.partial")
        self.journal = self.target.with_name(f".{self.target.name}.partial.json")
        names = [target.name for group in groups for target in group.targets]
        if len(set(names)) != len(names):
            twice = sorted(name for name in set(names) if names.count(name) > 1)
            raise ValueError(f"the source yields {len(twice)} tensors twice: {', '.join(twice[:5])}")
        self.shards = plan_shards(groups, max_shard_size)
        plan = {file: [[t.name, str(t.dtype), list(t.shape)] for g in shard for t in g.targets]
                for file, shard in self.shards.items()}  # fmt: skip
        self.sources = sorted(map(Path, sources))
        self.stats = self._source_stats()
        content = json.dumps([settings, self.stats, plan], sort_keys=True)
        self.identity = hashlib.sha256(content.encode()).hexdigest()

    def _source_stats(self):
        return [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in self.sources]

    def run(self, finish, progress=False):
        """Writes what is not there yet; `finish(folder)` adds config and other files. Returns the tensors' names.

        Raises FileExistsError, ValueError for a tensor that was not written, OSError naming the bytes for a full disk.
        """
        refuse_existing(self.target)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.partial.mkdir(exist_ok=True)
        with locked(self.partial):
            done = self._resume()
            left = [name for name in self.shards if name not in done]
            needed = sum(shard_bytes(self.shards[name]) for name in left)
            self._check_space(needed)
            total = sum(group.nbytes for shard in self.shards.values() for group in shard)
            start = sum(group.nbytes for name in done for group in self.shards[name])
            disable = None if progress else True  # None: off where there is no terminal
            try:
                with tqdm(
                    total=total, initial=start, unit="B", unit_scale=True, desc=self.target.name, disable=disable
                ) as bar:
                    for name in left:
                        write_shard(self.partial / name, self.shards[name], bar)
                        done[name] = file_record(self.partial / name)
                        self._record(done)
                self._complete(finish, done)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                self._check_space(sum(shard_bytes(self.shards[name]) for name in left if name not in done), error)
        os.unlink(self.journal)
        return sorted(target.name for shard in self.shards.values() for group in shard for target in group.targets)

    def _record(self, done):
        write_atomically(self.journal, json.dumps({"identity": self.identity, "files": done}) + "\n")

    def _resume(self):
        """-> {file: record} of the shards that are there and whole; everything else in the partial folder goes."""
        try:
            journal = json.loads(self.journal.read_text())
            recorded = journal["files"] if journal["identity"] == self.identity else {}
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            recorded = {}
        done = {}
        for name, record in recorded.items():
            path = self.partial / name
            if path.is_file() and path.stat().st_size == record["bytes"] and hash_file(path) == record["sha256"]:
                done[name] = record
        for path in self.partial.iterdir():
            if path.name not in done:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._record(done)
        return done

    def _check_space(self, needed, error=None):
        free = shutil.disk_usage(self.target.parent).free
        if error is not None or needed > free:
            raise OSError(
                errno.ENOSPC,
                f"{self.target.parent} is full: {needed:,} bytes needed for the rest of {self.target.name}, {free:,} "
                f"free; make room and repeat the command, which goes on behind the shards in {self.partial.name}",
            ) from error

    def _complete(self, finish, done):
        if self._source_stats() != self.stats:
            raise ValueError(f"{self.sources[0].parent} was changed while it was read; repeat the command")
        where = {t.name: file for file, shard in self.shards.items() for group in shard for t in group.targets}
        if list(self.shards) != [WEIGHTS]:
            total = sum(group.nbytes for shard in self.shards.values() for group in shard)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            path = self.partial / INDEX
            path.write_text(json.dumps(index, indent=2) + "\n")
            done = {**done, INDEX: file_record(path)}
        finish(self.partial)
        self._check_written()
        (self.partial / MANIFEST).write_text(json.dumps({"format": 1, "files": done}, indent=1) + "\n")
        for path in self.partial.iterdir():
            if path.name not in self.shards:
                flush(path)
        flush(self.partial)
        os.rename(self.partial, self.target)
        flush(self.target.parent)

    def _check_written(self):
        """Raises ValueError unless the files hold the planned tensors, and only those."""
        files = {path.name for path in self.partial.glob("*.safetensors")} - {VALUE_HEAD}
        if files != set(self.shards):
            raise ValueError(
                f"{self.partial} holds other weight files than planned: {sorted(files ^ set(self.shards))[:5]}"
            )
        for file, shard in self.shards.items():
            header = {
                name: (entry["dtype"], tuple(entry["shape"]))
                for name, entry in read_header(self.partial / file).items()
            }
            planned = {t.name: (DTYPE_NAMES[t.dtype], t.shape) for group in shard for t in group.targets}
            wrong = sorted(name for name in header.keys() | planned.keys() if header.get(name) != planned.get(name))
            if wrong:
                raise ValueError(
                    f"{self.partial / file} lacks tensors or holds others than planned: {', '.join(wrong[:5])}"
                )


def refuse_existing(target):
    """Raises FileExistsError if the folder to be made is there; drops the journal of a run killed after its rename."""
    target = Path(target)
    if not target.name:
        raise ValueError(f"{str(target)!r} cannot be made anew; name a folder")
    if os.path.lexists(target):
        if not target.with_name(f".{target.name}.partial").exists():
            target.with_name(f".{target.name}.partial.json").unlink(missing_ok=True)
        raise FileExistsError(f"{target} exists; remove it or name another folder")


@contextmanager
def locked(folder):
    """Holds the folder against a second process that would write there. Raises ValueError if one does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is writing {folder}; wait for it, or name another folder") from error
        yield
    finally:
        os.close(descriptor)


NOT_COPIED = (
    ".py", ".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".msgpack", ".h5", ".gguf", ".onnx", ".tmp",
)  # fmt: skip
RUN_FILES = (
    "config.json", "adapter_config.json", INDEX, MANIFEST, "trainer_state.json", "COMPLETE.json", "training_args.bin",
)  # fmt: skip
VALUE_HEAD = "value_head.safetensors"  # of PPO, beside the policy and in float32 whatever that is cast to


def copy_others(source, target, code=True):
    """Copies tokenizer, templates, licence and so on: every file but weights, config.json and a trainer's state.
    `code`: the custom code and PPO's value function too."""
    for path in sorted(Path(source).iterdir()):
        wanted = path.suffix not in NOT_COPIED or (code and (path.suffix == ".py" or path.name == VALUE_HEAD))
        if path.is_file() and wanted and path.name not in RUN_FILES and not path.name.endswith(".partial.json"):
            shutil.copyfile(path, Path(target) / path.name)


def write_config(folder, fields):
    (Path(folder) / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
