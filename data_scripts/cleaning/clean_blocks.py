"""The blocks around the filters: reading a shard, counting what each step does, keeping what it removes, writing.

A task is one file of documents, and what it writes depends on that file alone, so any number of workers gives the
same bytes. datatrove's own reader and writer leave out files without documents and would move the tasks' numbers.
"""

import hashlib
import heapq
import json
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy
import zstandard

from data_scripts import overlap
from data_scripts.cleaning.corpus_blocks import PipelineStep
from data_scripts.document_folder import LEVEL, read_lines
from data_scripts.packing import packed_writer

EXAMPLES, EXAMPLE_CHARACTERS = 5, 300
DEFAULT_LABELS = ("total", "forwarded", "dropped", "doc_len")
OF_FOLDER = ("kind", "languages", "source")  # in the metadata while a document is worked on


@dataclass(frozen=True)
class Shard:
    """One file of a raw folder; `rank` is the number of its task, `digest` its recorded SHA-256."""

    rank: int
    source: str
    name: str
    path: str
    kind: str
    languages: tuple
    digest: str


def part_path(path):
    """Where a file is written before it is complete; a killed run's leftovers cannot be mixed into it."""
    return Path(path).with_name(f"{Path(path).name}.part-{os.getpid()}")


def write_json(path, value):
    """A JSON file that is there whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_path(path)
    part.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    part.replace(path)


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def save_array(path, array):
    """A `.npy` file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = numpy.ascontiguousarray(array)
    with open(part_path(path), "wb") as file:  # not numpy.save: its error on a full disk carries no errno
        numpy.lib.format.write_array_header_1_0(file, numpy.lib.format.header_data_from_array_1_0(array))
        file.write(array.tobytes())
    part_path(path).replace(path)


class LineFile:
    """A `.jsonl.zst` written beside its place and moved there when closed; without lines there is no file."""

    def __init__(self, path):
        self.path, self._raw = Path(path), None

    def write(self, document, **metadata):
        kept = {name: value for name, value in {**document.metadata, **metadata}.items()
                if not name.startswith("_") and name not in OF_FOLDER}
        line = json.dumps({"text": document.text, "id": document.id, "metadata": kept}, ensure_ascii=False)
        line = line.encode("utf-8") + b"\n"
        if self._raw is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._raw = open(part_path(self.path), "wb")
            self._stream = zstandard.ZstdCompressor(LEVEL).stream_writer(self._raw, closefd=False)
        self._stream.write(line)

    def close(self):
        if self._raw is None:
            self.path.unlink(missing_ok=True)
            return
        self._stream.close()
        self._raw.close()
        Path(self._raw.name).replace(self.path)


class ShardReader(PipelineStep):
    """Yields the documents of the task's shard with their place (`_index`) and what their folder says."""

    type, name = "READER", "documents"

    def __init__(self, shards, folder=None):
        super().__init__()
        self.shards, self.folder = shards, folder

    def run(self, data=None, rank=0, world_size=1):
        from datatrove.data import Document

        shard = self.shards[rank]
        path = Path(self.folder, shard.source, shard.name) if self.folder else Path(shard.path)
        if self.folder and not path.exists():  # all of the shard was removed
            return
        for index, line in enumerate(read_lines(path)):
            try:
                row = json.loads(line)
                text, identifier, metadata = row["text"], row["id"], dict(row["metadata"])
                if not isinstance(text, str) or not isinstance(identifier, str):
                    raise ValueError("text and id must be strings")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: line {index + 1} is no document ({type(error).__name__}: {error}); expected "
                                 'an object with "text", "id" and "metadata"') from error
            yield Document(text, identifier, metadata={
                **metadata, "kind": shard.kind, "languages": list(shard.languages), "source": shard.source,
                "_index": index})


class Step(PipelineStep):
    """A named block with counts, examples and CPU seconds of what it removes and changes, written as the task ends."""

    type = "STEP"

    def __init__(self, name, block, shards, stage_folder):
        super().__init__()
        self.name, self.block, self.shards, self.folder = name, block, shards, Path(stage_folder)

    def _take(self, data):
        """What goes into the block, noted; the time spent upstream is not the block's."""
        data = iter(data)
        while True:
            start = time.process_time()
            document = next(data, None)
            self._upstream += time.process_time() - start
            if document is None:
                return
            self.counts["documents_in"] += 1
            self.counts["characters_in"] += len(document.text)
            self._before[id(document)] = document.text
            yield document

    def __enter__(self):  # the block's exclusion writer is the step itself
        return self

    def __exit__(self, *_):
        return None

    def write(self, document, rank=0):
        """Called by the block for each document that it removes."""
        self._before.pop(id(document), None)
        reason = str(document.metadata.get("filter_reason") or "removed")
        self.reasons[reason] += 1
        self.removed_characters[reason] += len(document.text)
        self._removed.write(document, filter_reason=reason)
        extra = {name: document.metadata[name] for name in ("duplicate_of", "similarity", "matched")
                 if name in document.metadata}
        self._example(reason, document, {"text": document.text[:EXAMPLE_CHARACTERS], **extra})

    def _example(self, reason, document, shown):
        """Keep the documents with the smallest hashes: a sample that no number of workers changes."""
        key = hashlib.blake2b(f"{document.metadata['source']}\0{document.id}".encode("utf-8", "replace")).hexdigest()
        kept = self.examples.setdefault(reason, [])
        if len(kept) < EXAMPLES or key < kept[-1][0]:
            entry = {"source": document.metadata["source"], "id": document.id, "reason": reason, **shown}
            kept.append((key, document.metadata["_index"], entry))
            kept.sort(key=lambda item: item[:2])
            del kept[EXAMPLES:]

    def _given(self, document):
        before = self._before.pop(id(document), document.text)
        if before is not document.text and before != document.text:
            self.counts["changed"] += 1
            place = next((i for i, (a, b) in enumerate(zip(before, document.text)) if a != b),
                         min(len(before), len(document.text)))
            start = max(0, place - 60)
            self._example("changed", document, {"text": document.text[start:start + EXAMPLE_CHARACTERS],
                                                "before": before[start:start + EXAMPLE_CHARACTERS]})
        self.counts["documents_out"] += 1
        self.counts["characters_out"] += len(document.text)

    def run(self, data, rank=0, world_size=1):
        shard = self.shards[rank]
        self.counts, self.reasons, self.removed_characters, self.examples = Counter(), Counter(), Counter(), {}
        self._before, self._upstream, seconds = {}, 0.0, 0.0
        self._removed = LineFile(self.folder / "removed" / self.name / shard.source / shard.name)
        self.block.exclusion_writer = self
        found = iter(self.block.run(self._take(data), rank, world_size))
        while True:
            start, upstream = time.process_time(), self._upstream
            document = next(found, None)
            seconds += time.process_time() - start - (self._upstream - upstream)
            if document is None:
                break
            self._given(document)
            yield document
        self._removed.close()
        details = {str(label): stat.total for label, stat in sorted(self.block.stats.stats.items())
                   if label not in DEFAULT_LABELS and not str(label).startswith("dropped_")}
        write_json(counts_path(self.folder, self.name, shard), {
            "source": shard.source, "seconds": seconds, "counts": self.counts, "reasons": self.reasons,
            "characters_removed": self.removed_characters, "details": details, "examples": self.examples})


class ShardWriter(PipelineStep):
    """Writes what arrives to `folder/<source>/<shard>` and, last, a file of facts beside it.

    Args:
        digests: also write what exact duplicates are found by: 16 bytes a document, and the ids.
        done: {rank: what the facts carry as "made_by"}, from which a later run knows that the shard is made.
    """

    type, name = "WRITER", "documents"

    def __init__(self, shards, folder, digests=False, done=None):
        super().__init__()
        self.shards, self.folder, self.digests, self.done = shards, Path(folder), digests, done or {}

    def run(self, data, rank=0, world_size=1):
        shard = self.shards[rank]
        path = self.folder / shard.source / shard.name
        facts_path(path, "facts.json").unlink(missing_ok=True)  # else they would vouch for what a killed task leaves
        file, counts, languages, digests, ids = LineFile(path), Counter(), Counter(), [], []
        for document in data:
            file.write(document)
            counts.update(documents=1, characters=len(document.text), bytes=len(document.text.encode("utf-8")))
            languages[str(document.metadata.get("language") or "unknown")] += 1
            if self.digests:
                digests.append(overlap.digest(document.text))
                ids.append(document.id)
            yield document
        file.close()
        if self.digests:
            save_array(facts_path(path, "digests.npy"), numpy.frombuffer(b"".join(digests), "<u8").reshape(-1, 2))
            write_json(facts_path(path, "ids.json"), ids)
        facts = {"name": shard.name, "documents": 0, "characters": 0, "bytes": 0, **counts}
        if path.exists():
            facts |= {"file_bytes": path.stat().st_size, "sha256": packed_writer.file_sha256(path)}
        write_json(facts_path(path, "facts.json"), {**facts, "languages": languages, "made_by": self.done.get(rank)})


def facts_path(path, ending):
    """Where what is known of a shard lies: beside it, with another ending."""
    return Path(path).with_name(f"{Path(path).name.partition('.')[0]}.{ending}")


def counts_path(stage_folder, step, shard):
    """By name, not by rank: ranks move when a source is added."""
    return facts_path(Path(stage_folder, "counts", step, shard.source, shard.name), "json")


def merge_counts(stage_folder, step, shards):
    """The report's entry of a step: counts by source, and the examples with the smallest hashes."""
    sources, examples, seconds = {}, {}, 0.0
    for shard in shards:
        found = read_json(counts_path(stage_folder, step, shard))
        seconds += found["seconds"]
        entry = sources.setdefault(shard.source, {
            "counts": Counter(dict.fromkeys(("documents_in", "documents_out", "characters_in", "characters_out",
                                             "changed"), 0)), "reasons": Counter(), "characters_removed": Counter(),
            "details": Counter()})
        for name in entry:
            entry[name].update(found[name])
        for reason, kept in found["examples"].items():
            examples[reason] = heapq.nsmallest(EXAMPLES, [*examples.get(reason, []), *map(tuple, kept)],
                                               key=lambda item: (item[0], item[2]["source"], item[1]))
    return {"name": step, "seconds": round(seconds, 2),
            "sources": {source: {**entry.pop("counts"), **{key: dict(sorted(value.items())) for key, value in
                                                           entry.items()}} for source, entry in sources.items()},
            "examples": [item[2] for reason in sorted(examples) for item in examples[reason]]}
