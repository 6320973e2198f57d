"""Packed data sets for transport: compressed to about two thirds of the tokens' size, in parts, each verifiable.

    python -m data_scripts.packed_archive pack data/small small.tar [--part_mib 60] [--workers 2]
    python -m data_scripts.packed_archive unpack small.tar data/small
    python -m data_scripts.packed_archive verify small.tar

An archive is one tar file, or several (`small-00001-of-00003.tar`, each at most `--part_mib`), that hold blocks: a
piece of at most BLOCK bytes of one file of the data set, compressed by itself, so that cores share the work. Every part
begins with `archive.json`, the list of all files, blocks, parts and checksums: any part can tell which others are
missing. Unpacking gives the same bytes; their SHA-256 is compared before the folder appears.

Ids are compressed by xz with a two-byte (four-byte) alignment in its literal and position models: the literals of low
and high bytes are then told apart, which is what transposing the bytes would be for (measured: `README.md`).
"""

import argparse
import concurrent.futures
import functools
import hashlib
import io
import itertools
import json
import lzma
import re
import tarfile
import tempfile
from pathlib import Path

from tqdm.auto import tqdm

from data_scripts.packing import packed_writer

FORMAT, VERSION = "packed-archive", 1
BLOCK = 1 << 24         # bytes of a file compressed at a time: 8 M ids
INDEX = "archive.json"
COLUMNS = ("tokens", "bytes", "source")


def _filters(width):
    """Of xz: `width` bytes a value. lc + lp may be 4 at most."""
    bits = {1: 0, 2: 1, 4: 2}[width]
    return [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": BLOCK, "lc": 4 - bits, "lp": bits, "pb": bits}]


def _width(name, manifest):
    return {"uint16": 2, "uint32": 4}[manifest["dtype"]] if name.endswith(".bin") else 1


def _delta_records(raw):
    """The records of a .documents.npy with `start` left out (it follows from `tokens`), column by column."""
    import numpy

    records = numpy.load(io.BytesIO(raw))
    starts = numpy.cumsum(records["tokens"]) - records["tokens"]
    if records.dtype != packed_writer.DOCUMENT or (starts != records["start"]).any():
        raise ValueError("a .documents.npy is not of this format: its starts are not the sums of its tokens")
    columns = [records[name].astype("<i8").view("u1").reshape(-1, 8).T.tobytes() for name in COLUMNS]
    return b"".join(columns)


def _records(raw):
    import numpy

    columns = numpy.frombuffer(raw, "u1").reshape(3, 8, -1).transpose(0, 2, 1).copy().view("<i8")[:, :, 0]
    records = numpy.zeros(columns.shape[1], packed_writer.DOCUMENT)
    for name, column in zip(COLUMNS, columns):
        records[name] = column
    records["start"] = numpy.cumsum(records["tokens"]) - records["tokens"]
    buffer = io.BytesIO()
    numpy.save(buffer, records)
    return buffer.getvalue()


def _compress(task):
    """One block -> its compressed bytes in `output`; (size, sha256)."""
    path, offset, size, width, output = task
    with open(path, "rb") as file:
        file.seek(offset)
        raw = file.read(size)
    if path.name.endswith(".documents.npy"):
        raw = _delta_records(raw)
    data = lzma.compress(raw, format=lzma.FORMAT_RAW, filters=_filters(width))
    output.write_bytes(data)
    return len(data), hashlib.sha256(data).hexdigest()


def _decompress(data, block):
    raw = lzma.decompress(data, format=lzma.FORMAT_RAW, filters=_filters(block["width"]))
    return _records(raw) if block["file"].endswith(".documents.npy") else raw


def _blocks(folder, manifest):
    """Each file of the data set in blocks: {"file", "offset", "bytes", "width"}. Indices of documents stay whole."""
    names = sorted(str(p.relative_to(folder)) for p in (folder / "tokenizer").rglob("*") if p.is_file())
    names.insert(0, "manifest.json")
    for split in manifest["splits"].values():
        names += [file[key] for file in split["files"] for key in ("name", "documents_name")]
    for name in names:
        size = (folder / name).stat().st_size
        step = size if name.endswith(".documents.npy") else BLOCK
        for offset in range(0, max(size, 1), step or 1):
            yield {"file": name, "offset": offset, "bytes": min(step, size - offset), "width": _width(name, manifest)}


def _read_data_set(folder):
    """The manifest of a data set all of whose files match it."""
    manifest = packed_writer.read_manifest(folder)
    for name, expected in packed_writer.recorded_sums(manifest).items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: the data set is incomplete; make or copy it again")
        if packed_writer.file_sha256(path) != expected:
            raise ValueError(f"{path} has another sha256 than manifest.json records: the data set is damaged; make or "
                             "copy it again")
    return manifest


def _member(tar, name, data):
    entry = tarfile.TarInfo(name)  # no time, no owner: the same data set gives the same archive
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def _assign_parts(blocks, limit):
    """Set each block's part, by size; the number of parts."""
    part, used = 1, 0
    for block in blocks:
        size = block["size"] + 1024  # with its header and filling
        if limit is not None and size > limit:
            raise ValueError(f"part_mib leaves {limit / 2**20:.2f} MiB beside the list of {len(blocks):,} blocks that "
                             f"each part begins with, a block needs {size / 2**20:.2f}: raise it")
        if used and limit is not None and used + size > limit:
            part, used = part + 1, 0
        block["part"], used = part, used + size
    return part


def part_names(archive, parts):
    archive = Path(archive)
    if parts == 1:
        return [archive]
    return [archive.with_name(f"{archive.stem}-{n:05d}-of-{parts:05d}{archive.suffix}") for n in range(1, parts + 1)]


def _parts_there(archive):
    """The file of that name and all parts of it, of any archive."""
    numbered = re.compile(rf"{re.escape(archive.stem)}-\d{{5}}-of-\d{{5}}{re.escape(archive.suffix)}")
    return [path for path in sorted(archive.parent.iterdir())
            if path.is_file() and (path.name == archive.name or numbered.fullmatch(path.name))]


def pack(folder, archive, part_mib=None, workers=1, progress=True):
    """Write the archive's parts; return their paths. Earlier parts of the same name are replaced."""
    folder, archive = Path(folder), Path(archive)
    if archive.suffix != ".tar":
        raise ValueError(f"archive={str(archive)!r} must end in .tar")
    if part_mib is not None and part_mib <= BLOCK / 2**20:
        raise ValueError(f"part_mib={part_mib} must be above {BLOCK >> 20}, the size of a block")
    manifest = _read_data_set(folder)
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{archive.stem}.", dir=archive.parent) as work:
        blocks = list(_blocks(folder, manifest))
        outputs = [Path(work) / f"{number:06d}.xz" for number in range(len(blocks))]
        tasks = [(folder / b["file"], b["offset"], b["bytes"], b["width"], o) for b, o in zip(blocks, outputs)]
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:  # xz works outside Python's lock
            results = pool.map(_compress, tasks)
            bar = tqdm(results, total=len(tasks), desc="compress", unit=" blocks", disable=not progress)
            for block, (size, checksum) in zip(blocks, bar):
                block |= {"size": size, "sha256": checksum}
        index_size = 300 * len(blocks) + 4096
        parts = _assign_parts(blocks, part_mib and part_mib * 2**20 - index_size - tarfile.RECORDSIZE)
        paths = part_names(archive, parts)
        index = {"format": FORMAT, "version": VERSION, "parts": [p.name for p in paths], "blocks": blocks,
                 "files": {name: packed_writer.file_sha256(folder / name) for name in {b["file"]: 0 for b in blocks}}}
        for number, path in enumerate(paths, 1):
            partial = Path(work) / path.name
            with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
                _member(tar, INDEX, json.dumps(index | {"part": number}).encode())
                for place, (block, output) in enumerate(zip(blocks, outputs)):
                    if block["part"] == number:
                        _member(tar, f"{place:06d}.xz", output.read_bytes())
                        output.unlink()
        for path in set(_parts_there(archive)) - set(paths):
            path.unlink()  # else unpacking might find the parts of an earlier archive
        for path in paths:
            (Path(work) / path.name).replace(path)
    return paths


def _read_index(archive):
    """(index, folder of the parts): from the named file, or any part of that name."""
    archive = Path(archive)
    found = [archive] if archive.is_file() else _parts_there(archive) if archive.parent.is_dir() else []
    if not found:
        raise FileNotFoundError(f"{archive} is no file, and no parts of it ({archive.stem}-00001-of-...) are beside it")
    problems = []
    for path in found:  # if one is damaged at its beginning, another knows the same
        try:
            with tarfile.open(path) as tar:
                index = json.loads(tar.extractfile(INDEX).read())
            if (index["format"], index["version"]) != (FORMAT, VERSION):
                raise ValueError(f"format {index['format']!r} version {index['version']}")
            for name in [*index["parts"], *index["files"], *(block["file"] for block in index["blocks"])]:
                if Path(name).is_absolute() or ".." in Path(name).parts:
                    raise ValueError(f"it names {name!r}, which is outside of the folder")
            return index, path.parent
        except (tarfile.TarError, ValueError, KeyError, EOFError) as error:
            problems.append(f"{path.name} ({error})")
    raise ValueError(f"no readable {INDEX} of format {FORMAT!r} version {VERSION} in {', '.join(problems)}: damaged or "
                     "no archive of packed_archive; copy it again")


def read_blocks(archive, progress=True):
    """Yield (block, compressed bytes), in the order of the data set.

    Raises:
        ValueError: missing parts, all of them named; a damaged or shortened part, named with the file of the data set.
    """
    index, folder = _read_index(archive)
    missing = [name for name in index["parts"] if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{len(missing)} of {len(index['parts'])} parts are missing in {folder}: "
                         f"{', '.join(missing)}; copy them there")
    blocks = enumerate(tqdm(index["blocks"], desc="read", unit=" blocks", disable=not progress))
    for part, group in itertools.groupby(blocks, key=lambda item: item[1]["part"]):
        name = index["parts"][part - 1]
        try:
            with tarfile.open(folder / name) as tar:
                for place, block in group:
                    data = tar.extractfile(f"{place:06d}.xz").read()
                    if hashlib.sha256(data).hexdigest() != block["sha256"]:
                        raise ValueError(f"a block of {block['file']} has another sha256 than recorded")
                    yield block, data
        except (tarfile.TarError, KeyError, EOFError, ValueError, OSError) as error:
            raise ValueError(f"part {folder / name} is damaged: {error}; copy it again") from error


def verify(archive, progress=True):
    """Check that all parts are there and every block matches its checksum; return the index."""
    for _ in read_blocks(archive, progress):
        pass
    return _read_index(archive)[0]


def unpack(archive, folder, workers=1, progress=True):
    """Write the data set again, bit for bit; the folder appears when every checksum has been compared."""
    index, _ = _read_index(archive)
    with packed_writer.build_beside(folder) as partial, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        blocks = read_blocks(archive, progress)
        while group := list(itertools.islice(blocks, 2 * workers)):
            raws = pool.map(lambda item: _decompress(item[1], item[0]), group)
            for (block, _), raw in zip(group, raws):
                path = partial / block["file"]
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "ab") as file:
                    file.write(raw)
        for name, expected in index["files"].items():
            if packed_writer.file_sha256(partial / name) != expected:
                raise ValueError(f"{name} came out of the archive with another sha256 than it went in; pack it again")
    return packed_writer.read_manifest(folder)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text in (("pack", "data set -> archive"), ("unpack", "archive -> data set"), ("verify", "check it")):
        command = commands.add_parser(name, help=help_text)
        if name == "pack":
            command.add_argument("folder", help="a packed data set (prepare_pretraining)")
        command.add_argument("archive", help="NAME.tar; of several parts the name without their numbers, or any part")
        if name == "unpack":
            command.add_argument("folder", help="folder for the data set; replaced as a whole")
        if name == "pack":
            command.add_argument("--part_mib", type=float, help="largest part (default: one file)")
        if name != "verify":
            command.add_argument("--workers", type=int, default=2, help="threads (default: %(default)s)")
    arguments = vars(parser.parse_args(argv))
    function = {"pack": pack, "unpack": unpack, "verify": verify}[arguments.pop("command")]
    try:
        result = functools.partial(function, arguments.pop("folder"))(**arguments) if function is pack else \
            function(**arguments)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    if function is pack:
        print("\n".join(f"{path} {path.stat().st_size / 2**20:.1f} MiB" for path in result))
    else:
        print("all checksums match")


if __name__ == "__main__":
    main()
