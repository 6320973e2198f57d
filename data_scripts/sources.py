"""Where documents come from: what any fresh machine has, and the user's own files or Hub data sets.

A source is an iterator of `Document`s in a fixed order. Four sources need no network:

| kind           | documents                                                         |
|----------------|-------------------------------------------------------------------|
| `text`         | public-domain English literature shipped in `corpus/`             |
| `multilingual` | classical Chinese prose and poems shipped in `corpus/`            |
| `code`         | the running Python's standard library, cut between functions |
| `mathematics`  | reasoning-gym problems with their working (`worked_mathematics.py`) |
"""

import ast
import hashlib
import io
import lzma
import os
import platform
import random
import sysconfig
import tokenize
from pathlib import Path
from typing import NamedTuple

from data_scripts.reasoning.worked_mathematics import TASKS, worked_problems
from recipes.text_files import is_local, is_saved_dataset, list_files, read_files, read_hub

CORPUS = Path(__file__).parent / "corpus"
SEPARATOR = "\n\x1e\n"
CODE_PIECE = 8_000      # characters aimed at when a module is cut
CODE_FILE = 200_000     # characters: longer modules are tables, not programs
CODE_TOTAL = 8_000_000  # characters: about three times what the default mixture takes
# Test suites repeat themselves, the others are generated tables or translations of such.
CODE_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__",
                 "encodings", "pydoc_data", "lib2to3", "lib-dynload"}
PROBLEMS = 12_000       # documents: about 1.4 MB, more than 5 % of the default mixture


class Document(NamedTuple):
    """One text, the kind of source it came from, and a name to find it again by."""

    text: str
    source: str
    name: str


class CorruptedCorpus(ValueError):
    """A shipped file whose SHA-256 is not the recorded one."""


def read_corpus(name, folder=CORPUS):
    """The documents of a shipped file, after its SHA-256 has been compared with `SHA256SUMS`."""
    path, sums = Path(folder) / name, Path(folder) / "SHA256SUMS"
    if not path.is_file() or not sums.is_file():
        raise FileNotFoundError(f"shipped corpus file {path if sums.is_file() else sums} is missing: "
                                "reinstall the package or restore the file from git")
    expected = dict(line.split()[::-1] for line in sums.read_text().splitlines())
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != expected.get(name):
        raise CorruptedCorpus(f"{path} is corrupted: its sha256 is {found}, {sums.name} records "
                              f"{expected.get(name)}; restore it from git or run data_scripts/build_corpus.py")
    return lzma.decompress(data).decode("utf-8").split(SEPARATOR)


def _shipped(kind, name):
    for number, text in enumerate(read_corpus(name)):
        yield Document(text, kind, f"{name}#{number}")


def text(seed=0):
    """Shipped English literature. The order is that of the file, whatever the seed."""
    return _shipped("text", "english.txt.xz")


def multilingual(seed=0):
    """Shipped Chinese prose and poems. The order is that of the file, whatever the seed."""
    return _shipped("multilingual", "chinese.txt.xz")


def code(seed=0, root=None):
    """Modules of the standard library in an order fixed by `seed`, up to CODE_TOTAL characters."""
    root = Path(root or sysconfig.get_paths()["stdlib"])
    files = []
    for folder, below, names in os.walk(root):
        below[:] = set(below) - CODE_LEFT_OUT  # not entered at all: installed packages are many files
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files.sort()
    random.Random(seed).shuffle(files)
    total = 0
    for path in files:
        module = _read_module(path)
        for number, piece in enumerate(cut_module(module) if module else ()):
            if total + len(piece) > CODE_TOTAL:
                return
            total += len(piece)
            yield Document(piece, "code", f"{path.relative_to(root).as_posix()}#{number}")


def _read_module(path):
    """The module's text, or None where it does not decode or parse or is too long (some library files
    are such on purpose: they are what the library's own error handling is tried on)."""
    raw = path.read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        module = raw.decode(encoding)
        ast.parse(module)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return None
    return module if module.strip() and len(module) <= CODE_FILE else None


def cut_module(module, aim=CODE_PIECE):
    """Cut a module after top-level statements or methods; `"".join(pieces) == module`."""
    if len(module) <= aim:
        return [module]
    ends = set()
    for node in ast.parse(module).body:
        ends.add(node.end_lineno)
        if isinstance(node, ast.ClassDef):
            ends.update(child.end_lineno for child in node.body)
    pieces, piece, size = [], [], 0
    # Not splitlines(): it also splits at form feeds, which the parser does not count as lines.
    for number, line in enumerate(io.StringIO(module, newline=""), 1):
        piece.append(line)
        size += len(line)
        if size >= aim and number in ends:
            pieces.append("".join(piece))
            piece, size = [], 0
    return pieces + ["".join(piece)] if piece else pieces


def mathematics(seed=0, limit=PROBLEMS):
    """Worked problems whose answers their verifier scores 1.0."""
    for name, problem in worked_problems(seed, limit):
        yield Document(problem, "mathematics", name)


BUILT_IN = {"text": text, "code": code, "multilingual": multilingual, "mathematics": mathematics}
LICENCES = {  # of the built-in kinds, for manifests and model cards
    "text": "public domain",
    "code": "PSF-2.0 (Python's standard library)",
    "multilingual": "public domain (collection: MIT, (c) 2016 JackeyGao)",
    "mathematics": "problems by reasoning-gym (Apache-2.0), working by this project",
}


def open_source(kind, location="built-in", *, seed=0, text_column="text", errors="strict", report=None):
    """Documents of one source: a built-in kind, or the user's file, folder or Hub data set.

    Args:
        kind: the name that the mixture and the manifest use.
        location: "built-in", a path, or a Hub name (`name` or `name:configuration`).
        errors, report: see `recipes.text_files.read_files`.
    """
    if location == "built-in":
        if kind not in BUILT_IN:
            raise ValueError(f"source {kind!r} is not built in; built in are {', '.join(BUILT_IN)}. "
                             f"Give its files or Hub name with --source {kind}=LOCATION")
        return BUILT_IN[kind](seed)
    if is_local(location) and not is_saved_dataset(location):
        rows = read_files(list_files(location), text_column, errors, report)
    else:
        rows = read_hub(location, "train", text_column, errors, report)
    return (Document(content, kind, place) for place, content in rows)


def identity(kind, location="built-in"):
    """What decides a source's content, as JSON: finished outputs are remade when it changes."""
    if location == "built-in":
        if kind in ("text", "multilingual"):
            return {"corpus": hashlib.sha256((CORPUS / "SHA256SUMS").read_bytes()).hexdigest()}
        if kind == "code":
            return {"python": platform.python_version()}
        if kind == "mathematics":
            from importlib.metadata import version

            return {"reasoning-gym": version("reasoning-gym"), "tasks": sorted(TASKS), "split": "train"}
        return {}
    if is_local(location):
        path = Path(location).expanduser()
        files = [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.is_file()]
        stamps = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        return {"files": hashlib.sha256(repr(stamps).encode()).hexdigest()}
    return {"hub": location}  # a revision cannot be known offline: use --overwrite after it moved
