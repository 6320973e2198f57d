"""Writing the "packed-tokens" format, version 1, which `recipes/data.py` reads.

    tokenizer/                        the tokenizer, as `save_pretrained` writes it
    train-00000.bin, train-00001.bin  little-endian uint16 (vocabulary up to 65,536) or uint32 ids:
                                      documents one after another, each bos + tokens + eos
    train-00000.documents.npy         one record a document of that file: start (int64, token offset
                                      in the file), tokens (int64), bytes (int64, UTF-8 bytes of the
                                      text), source (int16, index into manifest["sources"])
    validation-00000.*                the same for the held-out documents
    manifest.json                     what all of it is, with checksums

A data set is built in a hidden folder beside its place and moved there when complete, so a reader
(or a full disk, or a kill) never meets half of one.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import struct
from array import array
from pathlib import Path

import numpy

FORMAT, VERSION = "packed-tokens", 1
DOCUMENT = numpy.dtype([("start", "<i8"), ("tokens", "<i8"), ("bytes", "<i8"), ("source", "<i2")])
_RECORD = struct.Struct("<qqqh")  # the same, packed
_OURS = re.compile(r"manifest\.json|tokenizer|(train|validation)-\d{5}\.(bin|documents\.npy)")


def token_dtype(vocab_size):
    """uint16 where all ids fit, else uint32, little-endian."""
    return numpy.dtype("<u2" if vocab_size <= 65_536 else "<u4")


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_array(path, values):
    """Write an .npy file that is there only when it is complete."""
    buffer = io.BytesIO()  # numpy.save into a file hides the errno of a full disk
    numpy.save(buffer, values)
    path.with_suffix(".tmp").write_bytes(buffer.getvalue())
    os.replace(path.with_suffix(".tmp"), path)


class TextSpool:
    """Texts on disk in order of arrival; in memory only their offsets (8 bytes a document)."""

    def __init__(self, path):
        self._file, self._ends = open(path, "w+b"), array("q", [0])

    def append(self, text):
        self._file.write(text.encode("utf-8", "surrogatepass"))
        self._ends.append(self._file.tell())

    def __len__(self):
        return len(self._ends) - 1

    def size(self, index):
        """UTF-8 bytes of a text."""
        return self._ends[index + 1] - self._ends[index]

    def total(self):
        return self._ends[-1]

    def __getitem__(self, index):
        self._file.flush()
        raw = os.pread(self._file.fileno(), self.size(index), self._ends[index])
        return raw.decode("utf-8", "surrogatepass")

    def close(self):
        self._file.close()


class KeySet:
    """A growing set of keys of 64 bits in 8 bytes each: sorted arrays, and a Python set of the latest."""

    def __init__(self, latest=1 << 16):
        self._limit, self._latest, self._sorted = latest, set(), []

    def add(self, key):
        """Take the key in; whether it was new."""
        if key in self._latest or any(self._holds(part, key) for part in self._sorted):
            return False
        self._latest.add(key)
        if len(self._latest) == self._limit:
            self._sorted.append(numpy.sort(numpy.fromiter(self._latest, numpy.uint64, self._limit)))
            self._latest = set()
            # Parts of one size are joined, so that there are few of them.
            while len(self._sorted) > 1 and len(self._sorted[-1]) >= len(self._sorted[-2]):
                self._sorted[-2:] = [numpy.sort(numpy.concatenate(self._sorted[-2:]))]
        return True

    @staticmethod
    def _holds(part, key):
        place = numpy.searchsorted(part, numpy.uint64(key))
        return place < len(part) and int(part[place]) == key


class TokenSpool:
    """Encoded documents of one source and split on disk (16 bytes a document in memory).

    They are read, not mapped: mapped pages would count as memory of the process.
    """

    def __init__(self, path, dtype):
        self.dtype = dtype
        self._file, self._ends, self.bytes = open(path, "w+b"), array("q", [0]), array("q")

    def append(self, ids, text_bytes):
        # Not tofile(): its error on a full disk carries no errno.
        self._file.write(numpy.asarray(ids, self.dtype).tobytes())
        self._ends.append(self._ends[-1] + len(ids))
        self.bytes.append(text_bytes)

    def __len__(self):
        return len(self.bytes)

    def tokens(self):
        return self._ends[-1]

    def __getitem__(self, index):
        self._file.flush()
        start, size = self._ends[index], self._ends[index + 1] - self._ends[index]
        raw = os.pread(self._file.fileno(), size * self.dtype.itemsize, start * self.dtype.itemsize)
        return numpy.frombuffer(raw, self.dtype)

    def close(self):
        self._file.close()


class SplitWriter:
    """Writes one split's files, starting a new file before a document would pass `tokens_per_file`."""

    def __init__(self, folder, split, dtype, sources, tokens_per_file):
        self._folder, self._split, self._dtype = Path(folder), split, dtype
        self._limit, self._file, self.files = tokens_per_file, None, []
        self.totals = {name: {"tokens": 0, "documents": 0, "bytes": 0} for name in sources}
        self._places = {name: place for place, name in enumerate(sources)}

    def append(self, ids, text_bytes, source):
        if self._file is None or (self._written and self._written + len(ids) > self._limit):
            self._finish_file()
            self._name = f"{self._split}-{len(self.files):05d}"
            self._file, self._sum = open(self._folder / f"{self._name}.bin", "wb"), hashlib.sha256()
            self._records, self._written = bytearray(), 0
        raw = numpy.ascontiguousarray(ids, self._dtype).tobytes()
        self._file.write(raw)
        self._sum.update(raw)
        self._records += _RECORD.pack(self._written, len(ids), text_bytes, self._places[source])
        self._written += len(ids)
        total = self.totals[source]
        total["tokens"] += len(ids)
        total["documents"] += 1
        total["bytes"] += text_bytes

    def _finish_file(self):
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index, records = self._folder / f"{self._name}.documents.npy", numpy.frombuffer(self._records, DOCUMENT)
        save_array(index, records)
        self.files.append({"name": f"{self._name}.bin", "tokens": self._written, "documents": len(records),
                           "sha256": self._sum.hexdigest(), "documents_name": index.name,
                           "documents_sha256": file_sha256(index)})
        self._file = None

    def close(self):
        """Finish the last file; return the split's entry of the manifest."""
        self._finish_file()
        summed = {key: sum(total[key] for total in self.totals.values()) for key in ("tokens", "documents", "bytes")}
        return {**summed, "sources": self.totals, "files": self.files}


def write_manifest(folder, manifest):
    path = Path(folder) / "manifest.json"
    # Names of files may hold bytes that are no UTF-8: as \udcXX, which JSON reads as the same name again.
    with open(path.with_suffix(".tmp"), "w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(manifest, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".tmp"), path)


def read_manifest(folder):
    """The manifest of a complete packed data set."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no manifest.json, which is written last: it is unfinished or no packed "
                                "data set; make it with data_scripts.prepare_pretraining")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{path} is of format {manifest.get('format')!r} version {manifest.get('version')}, expected "
                         f"{FORMAT!r} version {VERSION}")
    return manifest


def recorded_sums(manifest):
    """{file: SHA-256} of everything whose checksum the manifest holds."""
    sums = {"tokenizer/tokenizer.json": manifest["tokenizer_sha256"]}
    for split in manifest["splits"].values():
        for file in split["files"]:
            sums[file["name"]] = file["sha256"]
            sums[file["documents_name"]] = file["documents_sha256"]
    return sums


def manifest_made_with(folder, form, version, fingerprint):
    """The manifest of a folder if it is of this format and version and made with these settings, else None."""
    path = Path(folder) / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = (manifest.get("format"), manifest.get("version"), manifest.get("fingerprint"))
    return manifest if found == (form, version, fingerprint) else None


def read_finished(folder, fingerprint):
    """The manifest of a complete data set made with these settings whose files all match, else None."""
    path, manifest = Path(folder) / "manifest.json", manifest_made_with(folder, FORMAT, VERSION, fingerprint)
    if manifest is None:
        return None
    intact = all((path.parent / name).is_file() and file_sha256(path.parent / name) == value
                 for name, value in recorded_sums(manifest).items())
    return manifest if intact else None


def _neighbours(folder):
    folder = Path(folder).absolute()
    return folder, folder.with_name(f".{folder.name}.old")


def check_replaceable(folder, ours=_OURS, kind="a packed data set"):
    """Refuse a folder that holds files whose names are not `ours`: it will be replaced as a whole."""
    if Path(folder).is_file():
        raise ValueError(f"output_dir={str(folder)!r} is a file; name a folder")
    strangers = sorted(p.name for p in Path(folder).iterdir() if not ours.fullmatch(p.name)) \
        if Path(folder).is_dir() else []
    if strangers:
        raise ValueError(f"output_dir={str(folder)!r} holds {', '.join(strangers[:5])}, which is no part of {kind}, "
                         "and would be replaced as a whole; choose a new or empty folder")


def _disk_is_full(error):
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "(os error 28)" in str(error)  # how the tokenizers library passes ENOSPC on


@contextlib.contextmanager
def build_beside(folder, ours=_OURS, kind="a packed data set"):
    """Yield a hidden folder to build a data set in; move it to `folder` if the block succeeds.

    Whatever goes wrong, the earlier data set stays as it was and the hidden folder is removed.
    Raises:
        OSError: ENOSPC with the place, what was written and what to free.
    """
    check_replaceable(folder, ours, kind)
    folder, old = _neighbours(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clean_up(folder, old)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        if folder.exists():
            os.replace(folder, old)  # a kill between these two lines is mended by the next run
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        if not _disk_is_full(error):
            raise
        written = sum(p.stat().st_size for p in partial.rglob("*") if p.is_file())
        kept = "the earlier data set is intact" if folder.exists() else "nothing was left behind"
        raise OSError(errno.ENOSPC, f"the disk is full: {written:,} bytes of the new data set were written below "
                      f"{folder.parent}, {shutil.disk_usage(folder.parent).free:,} bytes are free. Free space there, "
                      f"choose an output_dir on another disk, or lower --max_tokens; {kept}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _clean_up(folder, old):
    """Mend what a killed run left: restore the earlier data set, remove folders of dead processes."""
    if old.exists():
        if folder.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, folder)
    for partial in folder.parent.glob(f".{folder.name}.partial-*"):
        try:
            os.kill(int(partial.name.rsplit("-", 1)[1]), 0)
        except (ProcessLookupError, ValueError):
            shutil.rmtree(partial, ignore_errors=True)
        except PermissionError:
            continue  # alive, another user's
