"""Folders named checkpoint-N on disk: the completeness marker, what is wrong with one, which to resume."""

import json
import logging
import re
from pathlib import Path

from modeling_deepseek_r1.checkpoint_files import flush, hash_file, write_atomically

logger = logging.getLogger(__name__)

MARKER = "COMPLETE.json"
RUN_CONFIG = "run_config.json"
CHECKPOINT_NAME = re.compile(r"^checkpoint-(\d+)$")


class IncompleteCheckpointError(ValueError):
    """A checkpoint that cannot be trusted; the message names the file and the way out."""


def _files_of(folder):
    skipped = {MARKER, MARKER + ".tmp"}
    return sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.name not in skipped)


def describe_files(folder, paths):
    """{path within `folder`: {"bytes", "sha256"}} of `paths`, flushed to disk before."""
    found = {}
    for path in paths:
        flush(path)
        found[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    return found


def write_marker(folder, weights=None, described=None):
    """Flush every file of `folder` to disk, then write the marker. Returns its content.

    described: of `describe_files` on other processes, for files that they wrote; not read again here.
    """
    folder, described = Path(folder), described or {}
    others = [path for path in _files_of(folder) if path.relative_to(folder).as_posix() not in described]
    files = dict(sorted((described | describe_files(folder, others)).items()))
    for directory in [p for p in folder.rglob("*") if p.is_dir()] + [folder, folder.parent]:
        flush(directory)
    marker = {"format": 1, "files": files, "weights": weights or {}}
    write_atomically(folder / MARKER, json.dumps(marker, indent=1))
    return marker


def read_marker(folder):
    """The marker's content, or None where there is none that can be read."""
    try:
        marker = json.loads((Path(folder) / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return marker if isinstance(marker, dict) and isinstance(marker.get("files"), dict) else None


def find_problem(folder, hashes=True):
    """Why the checkpoint in `folder` cannot be trusted, in words, or None if it is complete."""
    folder, marker = Path(folder), read_marker(folder)
    if marker is None:
        state = "an unreadable" if (folder / MARKER).exists() else "no"
        return f"{state} {MARKER}: the save was interrupted, or another program wrote it"
    for name, expected in marker["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != expected["bytes"]:
            return f"{name} has {size:,} bytes, {expected['bytes']:,} were written"
    for name, expected in marker["files"].items() if hashes else ():
        if hash_file(folder / name) != expected["sha256"]:
            return f"{name} differs from what was written (sha256)"
    return None


def is_ours(folder):
    """Whether this code wrote (or began to write) the folder; another program's are never deleted."""
    return (folder / MARKER).exists() or (folder / RUN_CONFIG).exists() or not any(folder.iterdir())


def is_unfinished(folder):
    """A save of ours that was interrupted."""
    return is_ours(folder) and read_marker(folder) is None


def list_checkpoints(output_dir):
    """[(step, path)] of the folders named checkpoint-N, oldest step first."""
    folder = Path(output_dir)
    entries = [(CHECKPOINT_NAME.match(p.name), p) for p in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(match[1]), path) for match, path in entries if match and path.is_dir())


def newest_complete_checkpoint(output_dir):
    """(path or None, [(path, reason)] of the newer ones that were passed over)."""
    skipped = []
    for _, path in reversed(list_checkpoints(output_dir)):
        reason = find_problem(path)
        if reason is None:
            return path, skipped
        skipped.append((path, reason))
    return None, skipped


def resolve_resume(choice, output_dir):
    """What `resume_from_checkpoint` means: a verified checkpoint's path, or None for a fresh start."""
    word = str(choice).strip().lower()
    if choice is None or word in ("false", "no", "none", ""):
        return None
    if word not in ("true", "auto"):
        if not Path(choice).is_dir():
            raise IncompleteCheckpointError(
                f"resume_from_checkpoint={choice}: no such folder; use true, auto or a checkpoint folder"
            )
        if reason := find_problem(choice):
            raise IncompleteCheckpointError(
                f"resume_from_checkpoint={choice} is not a complete checkpoint: {reason}; use "
                "resume_from_checkpoint=true to take the newest complete one of output_dir"
            )
        return str(choice)
    found, skipped = newest_complete_checkpoint(output_dir)
    for path, reason in skipped:
        logger.warning("resume: skipping %s: %s", path, reason)
    if found is None and word == "true":
        seen = ", ".join(f"{path.name} ({reason})" for path, reason in skipped) or "none at all"
        raise IncompleteCheckpointError(
            f"resume_from_checkpoint=true, but output_dir={output_dir} holds no complete checkpoint "
            f"(seen: {seen}); use resume_from_checkpoint=auto to start afresh where there is none"
        )
    logger.warning("resume: %s", f"from {found}" if found else "nothing to resume, starting afresh")
    return None if found is None else str(found)
