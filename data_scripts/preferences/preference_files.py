"""The files of preference and prompt sets: train.jsonl, test.jsonl and manifest.json, found finished or made whole."""

import json
import re
from collections import Counter
from pathlib import Path

from data_scripts.packing.packed_writer import file_sha256

SPLITS = ("train", "test")
OURS = re.compile(r"manifest\.json|(train|test)\.jsonl")


def read_finished(folder, form, fingerprint):
    """The manifest of a finished set of this (format, version) and settings whose files are intact, else None."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        return None
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if (manifest.get("format"), manifest.get("version"), manifest.get("fingerprint")) != (*form, fingerprint):
        return None
    intact = all((path.parent / f"{split}.jsonl").is_file()
                 and file_sha256(path.parent / f"{split}.jsonl") == manifest["splits"][split]["sha256"]
                 for split in SPLITS)
    return manifest if intact else None


def prompt_text(row):
    """What a row asks, in one form for spaces and case."""
    return " ".join(" ".join(turn["content"] for turn in row["prompt"] if turn["role"] != "system").casefold().split())


def asks(row):
    """What must not be on both sides: the problem, and the prompt without the system message."""
    return {("problem", row["problem"]), ("prompt", prompt_text(row))}


def without_held_out(rows):
    """Take training rows out whose problem or prompt is held out too; returns how many."""
    held_out = set().union(*map(asks, rows["test"]))
    kept = [row for row in rows["train"] if not asks(row) & held_out]
    dropped, rows["train"] = len(rows["train"]) - len(kept), kept
    return dropped


def assert_disjoint(rows):
    """No problem and no prompt in both files."""
    common = set().union(*map(asks, rows["train"])) & set().union(*map(asks, rows["test"]))
    assert not common, f"{len(common)} problems or prompts are in both splits, for instance {min(common)!s:.200}"


def write_split(rows, path, columns):
    """Write one file, of each row those of `columns` that it has; returns its manifest entry."""
    counts = {name: Counter() for name in ("source", "kind")}
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps({name: row[name] for name in columns if name in row}, ensure_ascii=False) + "\n")
            for name, found in counts.items():
                found[row.get(name, "")] += 1
    return {"rows": len(rows), "problems": len({row["problem"] for row in rows}), "bytes": path.stat().st_size,
            "sha256": file_sha256(path), **{f"{name}s": dict(sorted(found.items())) for name, found in counts.items()}}
