"""Make folders of documents from local files, folders and Hub data sets, whatever state they are in.

    python -m data_scripts.fetch_files --output_dir data/raw \\
        --source notes=./notes --kind notes=text --licence notes="CC-BY-4.0" \\
        --source web=HUB/NAME:CONFIGURATION --kind web=multilingual --licence web="ODC-By" --column web=content

Reads what `local_files.py` lists. Encodings are found over the whole file and recorded, broken bytes and stray null
bytes mended and counted, binary, empty, unreadable and undecodable files left out and counted (or an error with
--errors strict), texts cut into documents of at most --longest characters while they are read, so that a single line
of a gigabyte takes no memory. The manifest records size, time and SHA-256 of every input: a finished source is made
again only when an input or a setting changed, and the script says which. Hub data sets are streamed.
"""

import argparse
import hashlib
import os
import shlex
import sys
from collections import Counter
from pathlib import Path

from data_scripts.document_folder import KINDS, building, is_document_folder, read_folder_manifest
from data_scripts.packing import packed_writer
from data_scripts.reading.local_files import CODE, FileReader, ending, walk
from data_scripts.reading.text_decoding import pieces
from recipes.text_files import ReadReport, is_local, is_saved_dataset, read_hub

LISTED_INPUTS = 20_000  # of more files the manifest keeps one fingerprint, not each one's
UNKNOWN = "und"         # ISO 639's code of a language not determined


def split_assignments(entries, option):
    """["a=1", "b=2"] -> [("a", "1"), ("b", "2")]."""
    pairs = [entry.partition("=") for entry in entries]
    for name, sign, value in pairs:
        if not (name and sign and value):
            raise ValueError(f"{option} {name + sign + value!r} must be NAME=VALUE, for instance {option} mine=...")
    return [(name, value) for name, _, value in pairs]


def _stamps(files):
    """[(root, path)] -> entries with size and time, as the manifest lists inputs."""
    known = [(path, path.stat()) for _, path in files]
    return [{"path": str(path), "bytes": of.st_size, "mtime_ns": of.st_mtime_ns} for path, of in known]


def _fingerprint(stamps):
    digest = hashlib.sha256()
    for entry in stamps:
        digest.update(repr((entry["path"], entry["bytes"], entry["mtime_ns"])).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def input_changes(manifest, stamps):
    """What changed in a source's files since its manifest was written, as short messages; [] if nothing.

    A file that only has another time is compared by its SHA-256.
    """
    if manifest.get("inputs_fingerprint") == _fingerprint(stamps):
        return []
    if "inputs" not in manifest:
        return [f"{manifest.get('input_files', 0):,} input files, some of them changed, or {len(stamps):,} now"]
    old, new = ({entry["path"]: entry for entry in entries} for entries in (manifest["inputs"], stamps))
    messages = [f"{path} is gone" for path in old if path not in new]
    messages += [f"{path} is new" for path in new if path not in old]
    for path in (path for path in new if path in old):
        before, now = old[path], new[path]
        if before["bytes"] != now["bytes"]:
            messages.append(f"{path} had {before['bytes']:,} bytes, has {now['bytes']:,}")
        elif before["mtime_ns"] != now["mtime_ns"] and packed_writer.file_sha256(path) != before.get("sha256"):
            messages.append(f"{path} has other content")
    return messages


class FileSource:
    """One source of files and Hub data sets, and how to read it.

    Args:
        locations: files, folders, folders of `save_to_disk`, or Hub names (`name` or `name:configuration`).
        column: of rows, that holds the text (default "text").
        errors: "skip" leaves out and counts what cannot be read, "strict" stops at it.
        longest: characters of a document; a longer text is cut.
    """

    def __init__(self, name, locations, *, kind="text", licence="not stated", languages=(), column=None, errors="skip",
                 longest=20_000, max_characters=None, follow_links=False):
        if kind not in KINDS:
            raise ValueError(f"--kind {name}={kind!r} must be one of {', '.join(KINDS)}")
        if longest < 100:
            raise ValueError(f"--longest {longest} must be at least 100 characters")
        self.name, self.languages, self.follow_links = name, list(languages), follow_links
        self.settings = {"locations": list(locations), "column": column, "errors": errors, "longest": longest,
                         "max_characters": max_characters, "follow_links": follow_links, "languages": self.languages}
        self.facts = {"source": name, "kind": kind, "licence": licence, "origin": ", ".join(locations)}
        local = [place for place in locations if is_local(place)]
        self.files = [place for place in local if not is_saved_dataset(place)]
        self.sets = [place for place in locations if place not in self.files]

    def _language(self, path):
        if path is not None and ending(path) in CODE:
            return CODE[ending(path)]
        return self.languages[0] if len(self.languages) == 1 else UNKNOWN

    def _set_documents(self, location, reader, packages):
        """(identifier, path, text) of a Hub or saved data set, streamed."""
        version = None
        if not is_saved_dataset(location):
            import huggingface_hub

            try:
                version = huggingface_hub.dataset_info(location.partition(":")[0]).sha
            except (OSError, ValueError) as error:
                raise ValueError(f"source {self.name!r}: {location!r} is no file here, and no Hub data set of that "
                                 f"name can be reached ({type(error).__name__}): check the name, the network and "
                                 "HF_HUB_OFFLINE") from error
        packages.append({"registry": "local" if version is None else "hub", "name": location, "version": version,
                         "bytes": None, "sha256": None})
        report = ReadReport()
        rows = read_hub(location, "train", reader.column or "text", reader.errors, report)
        for number, (_, text) in enumerate(rows):
            for piece_number, piece in enumerate(pieces([reader.encodable(text)], reader.longest)):
                yield f"{location}/{number}#{piece_number}", location, piece
        if report.skipped:
            reader.left_out["unusable rows"] += report.skipped
            reader.examples += report.examples[:10 - len(reader.examples)]

    def _documents(self, files, reader, packages, progress):
        roots = list(dict.fromkeys(root for root, _ in files))
        for root, path in files:
            inside = os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "replace")
            label = f"{roots.index(root) + 1}/{inside}" if len(roots) > 1 else inside
            for number, text in reader.read(path):
                yield f"{label}#{number}", inside, text
            progress.update(1)
        for location in self.sets:
            yield from self._set_documents(location, reader, packages)

    def is_finished(self, folder, stamps, say=print):
        """Whether the folder holds this source made with these settings from these files; says what changed."""
        if not is_document_folder(folder):
            return False
        manifest = read_folder_manifest(folder)
        given = {**self.facts, "settings": self.settings}
        changes = [f"{key} was {manifest.get(key)!r}, is {value!r}" for key, value in given.items()
                   if manifest.get(key) != value]
        changes += input_changes(manifest, stamps) if stamps or self.files else []
        if changes:
            more = f" and {len(changes) - 5:,} more" if len(changes) > 5 else ""
            say(f"{self.name}: made again, since {'; '.join(changes[:5])}{more}")
        return not changes

    def make(self, output_dir, overwrite=False, command=None, say=print):
        """Write the source's folder below `output_dir` unless it is finished; returns (manifest, made now)."""
        from tqdm import tqdm

        folder, left_out = Path(output_dir) / self.name, Counter()
        files = walk(self.files, left_out, self.follow_links)
        sets = [Path(place) for place in self.sets if is_saved_dataset(place)]
        of_sets = [(place, path) for place in sets for path in sorted(place.rglob("*")) if path.is_file()]
        stamps = _stamps(files + of_sets)
        if not overwrite and self.is_finished(folder, stamps, say):
            return read_folder_manifest(folder), False
        reader = FileReader(self.settings["column"], self.settings["errors"], self.settings["longest"])
        reader.left_out.update(left_out)
        packages, languages, most = [], Counter(), self.settings["max_characters"]
        with building(folder, **self.facts, settings=self.settings, command=command) as writer, \
                tqdm(total=len(files), desc=self.name, unit="file", leave=False) as progress:
            writer.facts["left_out"] = reader.left_out
            for identifier, path, text in self._documents(files, reader, packages, progress):
                language = self._language(path)
                languages[language] += 1
                writer.write(text, f"{self.name}/{identifier}", path=path, language=language)
                if most is not None and writer.characters >= most:
                    writer.facts["stopped_at_max_characters"] = True
                    break
            writer.facts.update(self._content_facts(reader, stamps, packages, languages))
        return read_folder_manifest(folder), True

    def _content_facts(self, reader, stamps, packages, languages):
        if self.files:
            packages.insert(0, {"registry": "local", "name": ", ".join(self.files), "version": None,
                                "bytes": sum(entry["bytes"] for entry in stamps), "sha256": _fingerprint(stamps)})
        known = {entry["path"]: entry for entry in reader.inputs}
        facts = {"packages": packages, "languages": self.languages or [name for name, _ in languages.most_common()],
                 "left_out": dict(reader.left_out), "left_out_examples": reader.examples,
                 "decoded_files": dict(reader.decoded), "mended": {k: v for k, v in reader.mended.items() if v},
                 "input_files": len(stamps), "inputs_fingerprint": _fingerprint(stamps)}
        if len(stamps) <= LISTED_INPUTS:  # those behind --max_characters have no checksum: they were not read
            facts["inputs"] = [known.get(entry["path"], entry) for entry in stamps]
        return facts


def _arguments():
    parser = argparse.ArgumentParser("python -m data_scripts.fetch_files", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="a folder for each source goes below it")
    parser.add_argument("--source", action="append", required=True, metavar="NAME=LOCATION",
                        help="a name of your choice (a-z, 0-9, _ and -) and a file, folder or Hub data set; "
                             "repeatable, also for several locations of one name")
    for option, text in (("kind", f"one of {', '.join(KINDS)} (default: text)"),
                         ("licence", "of the texts, for the model card"),
                         ("language", "ISO 639-1 codes, separated by commas"),
                         ("column", "of rows, with the text (default: text)")):
        parser.add_argument(f"--{option}", action="append", default=[], metavar="NAME=VALUE",
                            help=f"{text}; repeatable")
    parser.add_argument("--errors", choices=("skip", "strict"), default="skip",
                        help="what to do with what cannot be read: leave out and count (default), or stop")
    parser.add_argument("--longest", type=int, default=20_000, help="characters of a document (default: %(default)s)")
    parser.add_argument("--max_characters", type=int, help="stop each source after the document that reaches this many")
    parser.add_argument("--follow_links", action="store_true", help="also read what symbolic links in folders lead to")
    parser.add_argument("--overwrite", action="store_true", help="make finished sources again")
    return parser


def sources_of(options):
    """The `FileSource`s that the options describe."""
    locations = {}
    for name, location in split_assignments(options.source, "--source"):
        if set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789_-"):
            raise ValueError(f"--source {name!r}: a name is of a-z, 0-9, '_' and '-', since it names a folder")
        locations.setdefault(name, []).append(location)
    given = {option: dict(split_assignments(getattr(options, option), f"--{option}"))
             for option in ("kind", "licence", "language", "column")}
    for option, values in given.items():
        for name in values:
            if name not in locations:
                raise ValueError(f"--{option} names {name!r}, which is no --source; sources are {', '.join(locations)}")
    defaults = {"kind": "text", "licence": "not stated", "column": None}
    return [FileSource(name, places, languages=[code for code in given["language"].get(name, "").split(",") if code],
                       **{option: given[option].get(name, value) for option, value in defaults.items()},
                       errors=options.errors, longest=options.longest, max_characters=options.max_characters,
                       follow_links=options.follow_links) for name, places in locations.items()]


def summary(name, manifest, made):
    """One source's outcome as lines of text."""
    lines = [f"{name:20} {'made' if made else 'was there':9} {manifest['documents']:>9,} documents "
             f"{manifest['characters']:>13,} characters"]
    for title, key in (("left out", "left_out"), ("encodings", "decoded_files"), ("mended", "mended")):
        if manifest.get(key):
            lines.append(f"  {title}: " + ", ".join(f"{count:,} {what}" for what, count in manifest[key].items()))
    return "\n".join(lines + [f"  for instance {message}" for message in manifest.get("left_out_examples", [])[:3]])


def main(argv=None):
    parser = _arguments()
    options = parser.parse_args(argv)
    command = shlex.join(["python", "-m", "data_scripts.fetch_files", *(sys.argv[1:] if argv is None else argv)])
    try:
        for source in sources_of(options):
            print(summary(source.name, *source.make(options.output_dir, options.overwrite, command)))
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
