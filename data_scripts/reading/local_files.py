"""Documents of files on this machine, one at a time and in bounded memory, whatever state the files are in.

| ending                                  | documents                                                         |
|-----------------------------------------|-------------------------------------------------------------------|
| .txt .md .rst .tex, source code         | the file; one longer than `longest` characters is cut             |
| .html .htm .xhtml                       | the file's main text (`markup_text.py`)                           |
| .jsonl .json, also with .gz .zst        | one an object with the text column: one a line, a list, or a file |
| .csv .tsv                               | one a row, the first row naming the columns                       |
| .parquet                                | one a row                                                         |

Parquet files are read by `recipes.text_files`, as packing reads them. datatrove's readers are not used here: they log
an unreadable file and go on, while this project counts what it leaves out and names the place.
"""

import csv
import gzip
import io
import json
import os
import stat
import zlib
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from data_scripts.reading.text_decoding import Undecodable, decoded_chunks, inspect_stream, pieces
from data_scripts.reading.zstd_stream import ZstdStream
from recipes.text_files import BadInput, read_file

LONGEST_ROW = 64_000_000  # characters of one JSON object or CSV row: a longer one is left out
LONGEST_PAGE = 64_000_000  # bytes of an HTML file, which is parsed as a whole
CODE = {
    ".py": "python", ".c": "c", ".h": "c", ".cc": "cpp", ".cpp": "cpp", ".cxx": "cpp", ".hpp": "cpp", ".hh": "cpp",
    ".go": "go", ".rs": "rust", ".js": "javascript", ".mjs": "javascript", ".cjs": "javascript", ".jsx": "javascript",
    ".ts": "typescript", ".tsx": "typescript", ".java": "java", ".rb": "ruby", ".sh": "shell", ".sql": "sql",
    ".r": "r", ".jl": "julia", ".lua": "lua", ".php": "php", ".pl": "perl", ".scala": "scala", ".kt": "kotlin",
    ".swift": "swift", ".cs": "csharp", ".hs": "haskell", ".adb": "ada", ".ads": "ada", ".d": "d", ".f90": "fortran",
}
PLAIN = (".txt", ".md", ".rst", ".tex", *CODE)
PAGES = (".html", ".htm", ".xhtml")
ROWS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst", ".csv", ".tsv", ".parquet")
ENDINGS = (*ROWS, *PLAIN, *PAGES)


class ChangedWhileRead(ValueError):
    """A file that another program wrote to while it was read: what was taken from it may be torn."""


def ending(path):
    """The ending of a path that says how to read it, or None."""
    name = str(path).lower()
    return next((known for known in ENDINGS if name.endswith(known)), None)


def _below(folder, visited, left_out, follow):
    """Regular files below a folder, sorted by name; every folder and link is met once, so loops end."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except PermissionError:
        left_out["unreadable (permission)"] += 1
        return
    for entry in entries:
        if entry.name.startswith("."):
            left_out["hidden"] += 1
            continue
        try:
            if entry.is_symlink() and not follow:
                left_out["symbolic links" if entry.is_dir() or entry.is_file() else "broken links"] += 1
                continue
            known = entry.stat()  # of what a link leads to
        except OSError:  # leads nowhere, or in a circle
            left_out["broken links"] += 1
            continue
        if stat.S_ISDIR(known.st_mode):
            if (known.st_dev, known.st_ino) in visited:
                left_out["folders met before"] += 1
            else:
                visited.add((known.st_dev, known.st_ino))
                yield from _below(entry.path, visited, left_out, follow)
        elif stat.S_ISREG(known.st_mode):
            yield Path(entry.path)
        else:
            left_out["devices and pipes"] += 1


def walk(locations, left_out, follow_links=False):
    """(root, path) of the files in the given files and folders, in order, each once; counts the others in `left_out`.

    Symbolic links below a folder are passed over: what one leads to inside the folder is met under its own name, and
    what lies outside was not asked for. `follow_links` takes them too, each file and folder once, so that loops end.
    """
    visited, files = set(), []
    for location in map(Path, locations):
        if not location.exists():
            raise FileNotFoundError(f"{str(location)!r} does not exist (resolved to {location.absolute()})")
        if location.is_file():
            if ending(location) is None:
                raise ValueError(f"cannot read {location}: known endings are {', '.join(sorted(ENDINGS))}")
            root, found = location.parent, [location]
        else:
            known = location.stat()
            if (known.st_dev, known.st_ino) in visited:
                left_out["folders met before"] += 1
                continue
            visited.add((known.st_dev, known.st_ino))
            root, found = location, _below(location, visited, left_out, follow_links)
        for path in found:
            known = path.stat()
            if ending(path) is None:
                left_out["unknown ending"] += 1
            elif (known.st_dev, known.st_ino) in visited:
                left_out["the same file again"] += 1
            else:
                visited.add((known.st_dev, known.st_ino))
                files.append((root, path))
    return files


@contextmanager
def _opened(path):
    """The file's content as a binary stream, decompressed."""
    name = path.name.lower()
    with open(path, "rb") as raw:
        if name.endswith(".gz"):
            yield gzip.GzipFile(fileobj=raw)
        elif name.endswith(".zst"):
            yield io.BufferedReader(ZstdStream(raw), 1 << 18)
        else:
            yield raw


def json_values(chunks, longest=LONGEST_ROW):
    """Yield the values of JSON text that comes in chunks: of a list, of lines, or of one object.

    Raises:
        BadInput: no JSON, a list without its end, or a value longer than `longest` characters.
    """
    decoder, buffer, start, in_list = json.JSONDecoder(), "", 0, None
    attempt, done, ended, chunks = 0, False, False, iter(chunks)
    while True:
        while start < len(buffer) and (buffer[start] in " \t\r\n\ufeff" or in_list and buffer[start] in ",]"):
            ended = ended or in_list and buffer[start] == "]"
            start += 1
        if in_list is None and start < len(buffer):
            in_list = buffer[start] == "["
            start += in_list
            continue
        if start < len(buffer) and (done or len(buffer) - start >= attempt):
            try:
                value, end = decoder.raw_decode(buffer, start)
                if done or end < len(buffer):  # a number at the buffer's end might go on
                    yield value
                    start, attempt = end, 0
                    continue
            except (ValueError, RecursionError) as error:  # ValueError: also a number of very many digits
                if done or len(buffer) - start > longest or isinstance(error, RecursionError):
                    why = str(error) if done or isinstance(error, RecursionError) else \
                        f"longer than {longest:,} characters"
                    raise BadInput(f"no JSON ({why})") from error
            attempt = 2 * (len(buffer) - start)  # doubled, so that a long value is parsed few times
        if done:
            if in_list and not ended:
                raise BadInput("the list has no end: the file was cut off")
            return
        buffer, start = buffer[start:], 0
        chunk = next(chunks, None)
        done = chunk is None
        buffer += chunk or ""


def bounded_lines(chunks, longest=LONGEST_ROW):
    """Yield the lines of a text that comes in chunks, None for each that is longer than `longest` characters."""
    line, skipping = [], False
    size = 0
    for chunk in chunks:
        for part in io.StringIO(chunk, newline="\n"):
            size += len(part)
            skipping = skipping or size > longest
            line = [] if skipping else [*line, part]
            if part.endswith("\n"):
                yield None if skipping else "".join(line)
                line, size, skipping = [], 0, False
    if size:
        yield None if skipping else "".join(line)


def _json_lines(chunks):
    for number, line in enumerate(bounded_lines(chunks), 1):
        if line is None:
            yield f"line {number}", BadInput(f"longer than {LONGEST_ROW:,} characters")
        elif line.strip():
            try:
                yield f"line {number}", json.loads(line.removeprefix("\ufeff"))
            except (ValueError, RecursionError) as error:  # ValueError: also a number of very many digits
                yield f"line {number}", BadInput(f"not JSON ({error})")


def _table_rows(chunks, delimiter):
    def lines():
        for line in bounded_lines(chunks):
            if line is None:
                raise BadInput(f"a line longer than {LONGEST_ROW:,} characters, after which rows cannot be told apart")
            yield line

    csv.field_size_limit(LONGEST_ROW)
    try:
        for number, row in enumerate(csv.DictReader(lines(), delimiter=delimiter), 1):
            yield f"row {number}", row
    except csv.Error as error:
        raise BadInput(f"not readable as a table from here on ({error})") from error


def _text_of(value, column, place):
    if isinstance(value, BadInput):
        return value
    if isinstance(value, str) and column is None:
        return value
    if not isinstance(value, dict):
        return BadInput(f"a {type(value).__name__} where an object with a {column or 'text'!r} column is expected")
    if (column or "text") not in value:
        raise ValueError(f"{place} has no column {column or 'text'!r}; columns present: "
                         f"{', '.join(map(str, value)) or 'none'}; name the right one with --column NAME=COLUMN")
    text = value[column or "text"]
    return text if isinstance(text, str) else BadInput(f"column {column or 'text'!r} holds a {type(text).__name__}")


def _rows(path, chunks, column):
    kind = ending(path)
    if kind in (".csv", ".tsv"):
        values = _table_rows(chunks, "\t" if kind == ".tsv" else ",")
    elif kind.startswith(".jsonl"):
        values = _json_lines(chunks)
    else:
        values = ((f"value {number}", value) for number, value in enumerate(json_values(chunks), 1))
    for place, value in values:
        yield place, _text_of(value, column, f"{path} {place}")


def _page(chunks, size):
    from data_scripts.reading.markup_text import html_to_text

    if size > LONGEST_PAGE:
        raise BadInput(f"an HTML page of {size:,} bytes, more than {LONGEST_PAGE:,}, which are parsed at once")
    return html_to_text("".join(chunks))


class FileReader:
    """Reads files into (place, text), counting by reason what is left out or mended.

    `inputs` lists each file read with size, time and SHA-256; `decoded` counts files by encoding, `mended` the null
    bytes and invalid characters replaced, `left_out` files and rows by reason, `examples` holds the first few of these.

    Args:
        errors: "skip" counts what cannot be read, "strict" raises the first one.
        longest: characters of a document; a longer text is cut (`text_decoding.pieces`).
    """

    def __init__(self, column=None, errors="skip", longest=20_000):
        self.column, self.errors, self.longest = column, errors, longest
        self.inputs, self.decoded, self.mended = [], Counter(), Counter()
        self.left_out, self.examples = Counter(), []

    def refuse(self, reason, message):
        """Count one thing left out, or stop at it."""
        if self.errors == "strict":
            raise BadInput(f"{message}; repair or remove it, or pass --errors skip to leave such things out and count "
                           "them")
        self.left_out[reason] += 1
        if len(self.examples) < 10:
            self.examples.append(message)

    def read(self, path):
        """Yield (place, text) of a file."""
        try:
            before = os.stat(path)
            yield from self._documents(path)
            after = os.stat(path)
        except PermissionError:
            self.refuse("unreadable (permission)", f"{path} may not be read (permission)")
            return
        except FileNotFoundError as error:
            raise ChangedWhileRead(f"{path} vanished while the source was read; run again") from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            self.refuse("damaged", f"{path} is damaged ({error})")
            return
        if (before.st_size, before.st_mtime_ns, before.st_ino) != (after.st_size, after.st_mtime_ns, after.st_ino):
            raise ChangedWhileRead(f"{path} changed while it was read ({before.st_size:,} bytes before, "
                                   f"{after.st_size:,} after): wait until its writer is done, or give a copy of it")

    def _inspect(self, path):
        known = os.stat(path)
        with open(path, "rb") as raw:  # as it lies there: what compressed files hold is looked at afterwards
            seen = inspect_stream(raw)
        self.inputs.append({"path": str(path), "bytes": seen.bytes, "mtime_ns": known.st_mtime_ns,
                            "sha256": seen.sha256})
        if seen.bytes and path.name.lower().endswith((".gz", ".zst")):
            with _opened(path) as stream:
                seen = inspect_stream(stream)
        return seen

    def _documents(self, path):
        kind, seen = ending(path), self._inspect(path)
        if not seen.bytes:
            self.refuse("empty", f"{path} is empty")
            return
        if kind == ".parquet":
            yield from self._checked(path, self._parquet(path))
            return
        if seen.encoding is None:
            self.refuse(seen.reason, f"{path}: {seen.reason}")
            return
        self.decoded[seen.encoding + (" with errors" if seen.errors == "replace" else "")] += 1
        with _opened(path) as stream:
            chunks = self._mended(decoded_chunks(stream, seen), seen)
            if kind in PLAIN:
                texts = (("", piece) for piece in pieces(chunks, self.longest))
            elif kind in PAGES:
                texts = (("", text) for text in [_page(chunks, seen.bytes)])
            else:
                texts = _rows(path, chunks, self.column)
            yield from self._checked(path, texts)

    def _mended(self, chunks, seen):
        self.mended["null bytes removed"] += seen.null_bytes
        for chunk in chunks:
            if seen.errors == "replace":
                self.mended["invalid bytes replaced (U+FFFD)"] += chunk.count("\ufffd")
            yield chunk

    def _parquet(self, path):
        for place, text in read_file(path, self.column or "text"):
            yield place.removeprefix(f"{path} "), text

    def _checked(self, path, texts):
        """Cut long texts, count bad rows and what is wrong with the file as a whole."""
        number = 0
        try:
            for place, text in texts:
                if isinstance(text, BadInput):
                    self.refuse("unusable rows", f"{path} {place}: {text}")
                    continue
                if not text.strip():
                    self.left_out["blank documents"] += 1
                    continue
                for piece in pieces([self.encodable(text)], self.longest):
                    yield number, piece
                    number += 1
        except (BadInput, Undecodable) as error:
            self.refuse("undecodable" if isinstance(error, Undecodable) else "unusable files", f"{path}: {error}")

    def encodable(self, text):
        """The text without the halves of surrogate pairs and the null characters that JSON escapes can bring."""
        if "\0" in text:
            self.mended["null bytes removed"] += text.count("\0")
            text = text.replace("\0", "")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            self.mended["invalid bytes replaced (U+FFFD)"] += whole.count("\ufffd")
            return whole
        return text
