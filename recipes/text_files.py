"""Reading text from a user's files or from the Hub, one document at a time, with errors that name the place.

Both ends of the pipeline read through here: the stages of `recipes` (`recipes.data.load_text_dataset`)
and the packing script (`data_scripts.sources`), so that a file means the same documents in both.

| location                        | documents                                                          |
|---------------------------------|--------------------------------------------------------------------|
| `.txt`, `.md`, `.py`            | the file; a text longer than 20,000 characters is cut at paragraphs |
| `.jsonl`, also `.gz`, `.zst`    | one a line: an object with the text column                         |
| `.parquet`                      | one a row                                                          |
| folder                          | all such files below it, sorted by path; hidden ones are left out  |
| anything else                   | a Hub data set, `name` or `name:configuration`                     |
"""

import contextlib
import gzip
import io
import json
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from data_scripts.reading.zstd_stream import ZstdStream

PLAIN = (".txt", ".md", ".py")
SUFFIXES = (*PLAIN, ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
LONG_FILE = 20_000     # characters: a longer plain file is cut, so that it can be shuffled and held out
PIECE = 8_000          # characters aimed at by the cut
VALIDATION_NAMES = ("validation", "valid", "dev")  # of a file or a top folder, as data sets name it


class BadInput(ValueError):
    """Something in the user's data that can be left out with `errors="skip"`."""


@dataclass
class ReadReport:
    """What was left out under `errors="skip"`: how many, and the first few messages."""

    skipped: int = 0
    examples: list = field(default_factory=list)

    def add(self, message):
        self.skipped += 1
        if len(self.examples) < 10:
            self.examples.append(message)


def _suffix(path):
    return next((s for s in SUFFIXES if path.name.lower().endswith(s)), None)


def is_local(location):
    """Whether a location names a file or folder here; a path that looks local but is missing is an error."""
    path = Path(location).expanduser()
    if path.exists():
        return True
    looks_local = path.is_absolute() or str(location).startswith((".", "~")) or _suffix(path)
    if looks_local:
        raise FileNotFoundError(f"data location {str(location)!r} does not exist (resolved to {path.absolute()})")
    return False


def list_files(location, split="train"):
    """Sorted readable files of a folder (or the file itself) for one split.

    Files called `validation*` (or `valid*`, `dev*`), or below a top folder of that name, form the
    validation split; the others form the training split. A single file is always training data.
    """
    root = Path(location).expanduser()
    if root.is_file():
        if _suffix(root) is None:
            raise ValueError(f"cannot read {root}: known endings are {', '.join(SUFFIXES)}")
        return [root] if split == "train" else []
    def inside(path):
        return path.relative_to(root).parts
    files = [p for p in sorted(root.rglob("*")) if p.is_file() and _suffix(p)
             and not any(part.startswith(".") for part in inside(p))]
    if not files:
        raise ValueError(f"no readable file below {root}: known endings are {', '.join(SUFFIXES)}")
    def held_out(path):
        return any(re.match(rf"{n}(?![a-z])", inside(path)[0].lower()) for n in VALIDATION_NAMES)
    return [p for p in files if held_out(p) == (split != "train")]


def _plain_documents(path):
    raw = path.read_bytes()
    if not raw.strip():
        raise BadInput(f"{path} is empty ({len(raw)} bytes, none of them text): remove it or fill it")
    try:
        text = raw.decode("utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        shift = 3 if raw.startswith(b"\xef\xbb\xbf") else 0
        raise BadInput(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start + shift}; "
                       "convert it (for instance `iconv -f latin1 -t utf-8`) or pass --errors skip") from error
    pieces = cut_at_paragraphs(text)
    for number, piece in enumerate(pieces):
        yield (f"{path}#{number}" if len(pieces) > 1 else str(path)), piece


def cut_at_paragraphs(text, longest=LONG_FILE, aim=PIECE):
    """Cut a long text where a blank line ends, into pieces of about `aim` characters.

    Nothing is lost: `"".join(pieces) == text`. A text of at most `longest` characters stays whole.
    """
    if len(text) <= longest:
        return [text]
    pieces, start = [], 0
    for boundary in re.finditer(r"\n[ \t\r]*\n+", text):
        if boundary.end() - start >= aim:
            pieces.append(text[start:boundary.end()])
            start = boundary.end()
    if start < len(text):
        pieces.append(text[start:])
    return pieces


def _text_of(record, text_column, place):
    if not isinstance(record, dict):
        raise BadInput(f"{place} holds a {type(record).__name__}, expected an object with a {text_column!r} column")
    if text_column not in record:
        raise ValueError(f"{place} has no column {text_column!r}; columns present: "
                         f"{', '.join(map(str, record)) or 'none'}; name the right one with --text_column")
    text = record[text_column]
    if not isinstance(text, str):
        raise BadInput(f"{place}: column {text_column!r} holds a {type(text).__name__}, expected text")
    return text


@contextlib.contextmanager
def _lines(path):
    """The lines of a file as bytes, decompressed by its ending."""
    name = path.name.lower()
    with gzip.open(path) if name.endswith(".gz") else open(path, "rb") as file:
        yield io.BufferedReader(ZstdStream(file), 1 << 18) if name.endswith(".zst") else file


def _json_lines(path, text_column):
    if path.stat().st_size == 0:
        raise BadInput(f"{path} is empty (0 bytes): remove it or fill it")
    offset = 0
    try:
        with _lines(path) as lines:
            for number, line in enumerate(lines, 1):
                place = f"{path} line {number}"
                if line.strip():
                    yield place, _json_text(line, offset, path, place, text_column)
                offset += len(line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadInput(f"{path} is damaged ({error}); copy it again or pass --errors skip") from error


def _json_text(line, offset, path, place, text_column):
    """The line's text, or the exception that says what is wrong with it (the caller raises or skips)."""
    try:
        return _text_of(json.loads(line.decode("utf-8")), text_column, place)
    except UnicodeDecodeError as error:
        return BadInput(f"{path} is not UTF-8: byte 0x{line[error.start]:02x} at offset {offset + error.start} "
                        f"(line {place.rsplit(' ', 1)[1]}); convert it or pass --errors skip")
    except json.JSONDecodeError as error:
        return BadInput(f"{place} is not JSON ({error}); repair it or pass --errors skip")
    except BadInput as error:
        return error


def _parquet_rows(path, text_column):
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise BadInput(f"{path} is not a Parquet file ({error}); replace it or pass --errors skip") from error
    if text_column not in table.schema_arrow.names:
        raise ValueError(f"{path} has no column {text_column!r}; columns present: "
                         f"{', '.join(table.schema_arrow.names)}; name the right one with --text_column")
    number = 0
    for batch in table.iter_batches(columns=[text_column], batch_size=1_000):
        for text in batch.column(0).to_pylist():
            place = f"{path} row {number}"
            yield place, text if isinstance(text, str) else BadInput(
                f"{place}: column {text_column!r} holds a {type(text).__name__}, expected text")
            number += 1


def read_file(path, text_column="text"):
    """Yield (place, text or BadInput) of one file; raise BadInput if the file as a whole is unusable."""
    suffix = _suffix(path)
    if suffix in PLAIN:
        return _plain_documents(path)
    return _parquet_rows(path, text_column) if suffix == ".parquet" else _json_lines(path, text_column)


def read_files(files, text_column="text", errors="strict", report=None):
    """Yield (place, text) of all documents of `files`, in order; blank documents are left out.

    Args:
        errors: "strict" raises the first BadInput; "skip" leaves the line, row or file out and counts
            it in `report` (a `ReadReport`). A missing column is always an error.
    """
    if errors not in ("strict", "skip"):
        raise ValueError(f"errors={errors!r} must be 'strict' or 'skip'")
    report = ReadReport() if report is None else report
    for path in map(Path, files):
        try:
            for place, text in read_file(path, text_column):
                if isinstance(text, BadInput):
                    if errors == "strict":
                        raise text
                    report.add(str(text))
                elif text.strip():
                    yield place, text
        except BadInput as error:
            if errors == "strict":
                raise
            report.add(str(error))


def is_saved_dataset(location):
    """Whether the location is a folder written by `datasets`' `save_to_disk`."""
    return any((Path(location).expanduser() / name).is_file() for name in ("state.json", "dataset_dict.json"))


def has_split(location, split):
    """Whether a location (file, folder, saved data set or Hub name) has a split of that name."""
    import datasets

    if is_saved_dataset(location):
        listed = Path(location).expanduser() / "dataset_dict.json"
        return split in json.loads(listed.read_text())["splits"] if listed.is_file() else split == "train"
    if is_local(location):
        return bool(list_files(location, split))
    path, _, configuration = str(location).partition(":")
    return split in datasets.get_dataset_split_names(path, configuration or None)


def open_hub_dataset(name, split="train", text_column="text", streaming=False):
    """A Hub data set (`name` or `name:configuration`) or a folder written by `save_to_disk`."""
    import datasets

    if is_saved_dataset(name):
        dataset = datasets.load_from_disk(str(Path(name).expanduser()))
        if isinstance(dataset, datasets.DatasetDict):
            if split not in dataset:
                raise ValueError(f"data set {name} has no split {split!r}; splits present: {', '.join(dataset)}")
            dataset = dataset[split]
        dataset = dataset.to_iterable_dataset() if streaming else dataset
    else:
        path, _, configuration = str(name).partition(":")
        dataset = datasets.load_dataset(path, configuration or None, split=split, streaming=streaming)
    columns = dataset.column_names  # None where a stream does not know before it is read
    if columns is not None and text_column not in columns:
        raise ValueError(f"data set {name!r} has no column {text_column!r}; columns present: "
                         f"{', '.join(columns)}; name the right one with --text_column")
    return dataset


def read_hub(name, split="train", text_column="text", errors="strict", report=None):
    """Yield (place, text) of a Hub data set as a stream, one row at a time."""
    report = ReadReport() if report is None else report
    for number, row in enumerate(open_hub_dataset(name, split, text_column, streaming=True)):
        place = f"{name} row {number}"
        try:
            text = _text_of(row, text_column, place)
        except BadInput as error:
            if errors == "strict":
                raise
            report.add(str(error))
            continue
        if text.strip():
            yield place, text
