"""Folders of documents: what the sources write, what cleaning reads and writes, what packing reads.

    documents-00000.jsonl.zst, ...   one JSON object a line: {"text", "id", "metadata": {...}}, Zstandard
    manifest.json                    written last: source, kind, licence, counts, and each file with its checksum

The lines are those of datatrove's JsonlWriter, so every reader of such files takes them too. A folder is built
beside its place and moved there when complete (`packed_writer.build_beside`).
"""

import contextlib
import hashlib
import io
import json
import re
from pathlib import Path

import zstandard

from data_scripts.packing import packed_writer
from data_scripts.reading.zstd_stream import ZstdStream

FORMAT, VERSION = "documents", 1
KINDS = ("text", "code", "multilingual", "mathematics")
SHARD_CHARACTERS = 16_000_000  # of text in a file: small enough to share the work of cleaning out
LEVEL = 3                      # of Zstandard: faster than what is done to the texts
BESIDE = ("work", "logs", "removed")  # folders of `clean_corpus` that are no sources
OURS = re.compile(r"manifest\.json|documents-\d{5,}\.jsonl\.zst")


class DocumentWriter:
    """Writes documents to `documents-*.jsonl.zst`, a new file before one would pass `shard_characters`."""

    def __init__(self, folder, shard_characters=SHARD_CHARACTERS):
        self._folder, self._limit = Path(folder), shard_characters
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stream, self._raw, self._characters = None, None, 0
        self.files, self.documents, self.characters, self.bytes = [], 0, 0, 0

    def write(self, text, identifier, **metadata):
        """Append a document; `text` must be encodable (no lone surrogates)."""
        line = json.dumps({"text": text, "id": identifier, "metadata": metadata}, ensure_ascii=False)
        line = line.encode("utf-8") + b"\n"
        if self._stream is None or self._characters and self._characters + len(text) > self._limit:
            self._finish()
            self._raw = open(self._folder / f"documents-{len(self.files):05d}.jsonl.zst", "wb")
            self._stream = zstandard.ZstdCompressor(LEVEL).stream_writer(self._raw, closefd=False)
            self._characters, self._count = 0, 0
        self._stream.write(line)
        self._characters += len(text)
        self._count += 1
        self.documents += 1
        self.characters += len(text)
        self.bytes += len(text.encode("utf-8"))

    def _finish(self):
        if self._stream is None:
            return
        self._stream.close()
        self._raw.close()
        path = Path(self._raw.name)
        self.files.append({"name": path.name, "documents": self._count, "characters": self._characters,
                           "bytes": path.stat().st_size, "sha256": packed_writer.file_sha256(path)})
        self._stream = None

    def close(self):
        """Finish the last file; return what the manifest says about the content."""
        self._finish()
        return {"documents": self.documents, "characters": self.characters, "bytes": self.bytes, "files": self.files}


def write_folder_manifest(folder, content, **facts):
    """Write manifest.json, last: `facts` (source, kind, licence, ...) and what `DocumentWriter.close` returned."""
    packed_writer.write_manifest(folder, {"format": FORMAT, "version": VERSION, **facts, **content})


@contextlib.contextmanager
def building(folder, **facts):
    """Yield a DocumentWriter; if the block succeeds, the folder is complete with its manifest, else as it was.

    `writer.facts` (a dict) may be filled inside the block: counts of what was left out, packages, languages.
    """
    with packed_writer.build_beside(folder, OURS, "a folder of documents") as partial:
        writer = DocumentWriter(partial)
        writer.facts = dict(facts)
        yield writer
        content = writer.close()
        if not content["documents"]:
            raise ValueError(f"source {facts.get('source', folder)!r} gave no documents at all; left out: "
                             f"{writer.facts.get('left_out') or 'nothing'}")
        write_folder_manifest(partial, content, **writer.facts)


def source_folders(corpus):
    """The folders of sources below a folder, sorted; or itself, if it is one. What `clean_corpus` keeps beside them,
    hidden and empty folders are none; a source without its manifest is one, so that reading it says what is wrong."""
    corpus = Path(corpus)
    if is_document_folder(corpus):
        return [corpus]
    return [folder for folder in sorted(corpus.iterdir()) if folder.is_dir() and folder.name not in BESIDE
            and not folder.name.startswith(".") and any(folder.iterdir())]


def is_document_folder(folder):
    """Whether a folder is one of documents (its manifest, written last, says so)."""
    path = Path(folder) / "manifest.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def read_folder_manifest(folder, verify=False):
    """The manifest of a complete folder.

    Args:
        verify: compare every file with its recorded SHA-256, not just its size.
    Raises:
        FileNotFoundError: no manifest: the folder is unfinished or no such folder.
        ValueError: a file is missing, has another size, or (verify) another content than when it was written.
    """
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no manifest.json, which is written last: it is unfinished or no folder "
                                "of documents; run the script that makes it again")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise ValueError(f"{path} is of format {manifest.get('format')!r} version {manifest.get('version')}, expected "
                         f"{FORMAT!r} version {VERSION}")
    for file in manifest["files"]:
        part = path.parent / file["name"]
        found = f"{part.stat().st_size:,} bytes" if part.is_file() else "missing"
        if not part.is_file() or part.stat().st_size != file["bytes"]:
            raise ValueError(f"{part} is {found}, the manifest says {file['bytes']:,} bytes: it changed since it was "
                             "written; make the folder again")
        if verify and packed_writer.file_sha256(part) != file["sha256"]:
            raise ValueError(f"{part} has another sha256 than manifest.json records: it changed since it was written; "
                             "make the folder again")
    return manifest


def read_lines(path):
    """Yield the lines of a `.zst` file as bytes, in bounded memory (that of the longest line).

    Raises:
        ValueError: the file was cut off or is damaged.
    """
    try:
        with open(path, "rb") as raw:
            yield from io.BufferedReader(ZstdStream(raw), 1 << 20)
    except EOFError as error:
        raise ValueError(f"{path} is damaged ({error}): make its folder again") from error


def read_documents(folder):
    """Yield each document of a complete folder as {"text", "id", "metadata"}, in order."""
    for file in read_folder_manifest(folder)["files"]:
        for line in read_lines(Path(folder) / file["name"]):
            yield json.loads(line)


def content_fingerprint(folder):
    """SHA-256 over the checksums of a folder's files: changes when its content does."""
    sums = "".join(file["sha256"] for file in read_folder_manifest(folder)["files"])
    return hashlib.sha256(sums.encode()).hexdigest()
