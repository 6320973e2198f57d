"""Rows of data sets from files, folders, `save_to_disk` folders and the Hub, each with the place it came from."""

import gzip
import json
import logging
import re
import zlib
from pathlib import Path

from recipes.text_files import BadInput, is_local, is_saved_dataset

logger = logging.getLogger(__name__)

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")  # in a folder; .json is taken as a file only: folders have other such
HELD_OUT = re.compile(r"(test|validation|valid|dev|eval)(?![a-z])")  # how data sets call what is not to be trained on


def _json_lines(path):
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path} line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
                yield place, row if isinstance(row, dict) else BadInput(f"{place} holds no object")
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                yield place, BadInput(f"{place} is not JSON in UTF-8 ({error})")


def _json_array(path):
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        raise ValueError(f"it holds a {type(rows).__name__}, expected a list of objects")
    for number, row in enumerate(rows):
        place = f"{path} entry {number}"
        yield place, row if isinstance(row, dict) else BadInput(f"{place} is no object")


def _parquet_rows(path):
    from pyarrow import parquet

    number = 0
    for batch in parquet.ParquetFile(path).iter_batches(batch_size=1_000):
        for row in batch.to_pylist():
            yield f"{path} row {number}", row
            number += 1


READERS = {".jsonl": _json_lines, ".jsonl.gz": _json_lines, ".parquet": _parquet_rows, ".json": _json_array}


def _reader(path):
    return next((read for ending, read in READERS.items() if path.name.lower().endswith(ending)), None)


def conversation_files(location):
    """The files of a location that hold training rows, sorted.

    In a folder whatever else lies there (README.md, manifest.json) is passed over, and so are the held-out
    parts of a data set: files, or folders, called test, validation, valid, dev or eval.
    """
    root = Path(location).expanduser()
    if root.is_file():
        if _reader(root) is None:
            raise ValueError(f"{root} is no set of conversations; known endings are {', '.join(READERS)}")
        return [root]
    parts = {path: path.relative_to(root).parts for path in sorted(root.rglob("*"))
             if path.is_file() and path.name.lower().endswith(ENDINGS)}
    found = [path for path, names in parts.items() if not any(name.startswith(".") for name in names)]
    kept = [path for path in found if not any(HELD_OUT.match(name.lower()) for name in parts[path])]
    if len(kept) < len(found):
        logger.info("%s: %d files left out: held-out parts by their names", root, len(found) - len(kept))
    if not kept:
        raise ValueError(f"{root} holds no training file with the ending {', '.join(ENDINGS)}"
                         + " (held-out parts are passed over; name such a file to read it)" * bool(found))
    return kept


def _read_file(path):
    try:
        yield from _reader(path)(path)
    except (OSError, EOFError, zlib.error, ValueError) as error:  # what pyarrow raises is a ValueError or OSError
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_rows(location):
    """Yield (place, row or BadInput) of a file, a folder, a saved data set or a Hub name (streamed, split train)."""
    if is_local(location) and not is_saved_dataset(location):
        for path in conversation_files(location):
            yield from _read_file(path)
        return
    import datasets

    if is_saved_dataset(location):
        loaded = datasets.load_from_disk(str(Path(location).expanduser()))
        if isinstance(loaded, datasets.DatasetDict) and "train" not in loaded:
            raise ValueError(f"{location} has no split called train, only {', '.join(loaded)}; name one of its folders")
        rows = loaded["train"] if isinstance(loaded, datasets.DatasetDict) else loaded
    else:
        name, _, configuration = str(location).partition(":")
        rows = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
    for number, row in enumerate(rows):
        yield f"{location} row {number}", row
