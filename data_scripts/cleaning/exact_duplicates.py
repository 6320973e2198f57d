"""Which documents are equal (after NFKC, lower case, single spaces), within and across sources.

Sorted 128-bit digests, in parts that fit into memory. datatrove's exact de-duplication would need two more passes over
the texts, keeps its signatures in Python lists, and does not say of which document something is a duplicate.
"""

from collections import Counter
from pathlib import Path

import numpy

from data_scripts.cleaning.clean_blocks import facts_path, read_json, save_array, write_json
from data_scripts.cleaning.corpus_blocks import BaseFilter, PipelineStep

PART = 2_000_000  # documents compared at a time: about 130 MB
PAIR = numpy.dtype([("rank", "<u4"), ("index", "<u4"), ("kept_rank", "<u4"), ("kept_index", "<u4"),
                    ("similarity", "<f4")])


def equal_pairs(digests, part=PART):
    """Records of PAIR: each document that repeats an earlier one, with the first of its kind.

    Args:
        digests: one (documents, 2) uint64 array a task, in the order in which documents are kept.
    """
    total = sum(map(len, digests))
    parts = total // part + 1
    found = []
    for number in range(parts):
        rows = []
        for rank, values in enumerate(digests):
            places = numpy.flatnonzero(values[:, 0] % numpy.uint64(parts) == number)
            chosen = numpy.empty(len(places), [("high", "<u8"), ("low", "<u8"), ("rank", "<u4"), ("index", "<u4")])
            chosen["high"], chosen["low"] = values[places, 0], values[places, 1]
            chosen["rank"], chosen["index"] = rank, places
            rows.append(chosen)
        rows = numpy.concatenate(rows) if rows else numpy.empty(0)
        if len(rows) < 2:
            continue
        rows = rows[numpy.lexsort((rows["index"], rows["rank"], rows["low"], rows["high"]))]
        new = numpy.ones(len(rows), bool)
        new[1:] = (rows["high"][1:] != rows["high"][:-1]) | (rows["low"][1:] != rows["low"][:-1])
        first = numpy.flatnonzero(new)[numpy.cumsum(new) - 1]
        pairs = numpy.empty(int((~new).sum()), PAIR)
        pairs["rank"], pairs["index"] = rows["rank"][~new], rows["index"][~new]
        pairs["kept_rank"], pairs["kept_index"] = rows["rank"][first][~new], rows["index"][first][~new]
        pairs["similarity"] = 1
        found.append(pairs)
    pairs = numpy.concatenate(found) if found else numpy.empty(0, PAIR)
    return pairs[numpy.lexsort((pairs["index"], pairs["rank"]))]


def save_decisions(pairs, shards, documents_folder, folder):
    """Write `<rank>.npy` (records of PAIR) and `<rank>.json` (ids of what is kept) of every task, and the totals."""
    folder, across = Path(folder), Counter()
    kept_ids = {}
    for rank in numpy.unique(pairs["kept_rank"]).tolist():  # one task's ids in memory at a time
        shard, mine = shards[rank], pairs[pairs["kept_rank"] == rank]
        ids = read_json(facts_path(Path(documents_folder, shard.source, shard.name), "ids.json"))
        kept_ids |= {(rank, index): ids[index] for index in numpy.unique(mine["kept_index"]).tolist()}
    bounds = numpy.searchsorted(pairs["rank"], numpy.arange(len(shards) + 1))
    for shard in shards:
        mine = pairs[bounds[shard.rank]:bounds[shard.rank + 1]]
        save_array(folder / f"{shard.rank:06d}.npy", mine)
        write_json(folder / f"{shard.rank:06d}.json", [
            {"source": shards[rank].source, "id": kept_ids[rank, index]}
            for rank, index in zip(mine["kept_rank"].tolist(), mine["kept_index"].tolist())])
    sources = numpy.array([shard.source for shard in shards])
    if len(pairs):
        for name, kept in zip(sources[pairs["rank"]].tolist(), sources[pairs["kept_rank"]].tolist()):
            across[tuple(sorted((name, kept)))] += 1
    kept = numpy.stack([pairs["kept_rank"], pairs["kept_index"]], 1)
    groups, sizes = numpy.unique(kept, axis=0, return_counts=True)
    largest = numpy.argsort(-sizes, kind="stable")[:10]
    write_json(folder / "totals.json", {
        "clusters": len(groups), "documents": len(groups) + len(pairs), "removed": len(pairs),
        "largest": [{"documents": int(sizes[i]) + 1, "source": shards[groups[i][0]].source,
                     "id": kept_ids[tuple(groups[i].tolist())]} for i in largest],
        "pairs_across_sources": {f"{a}|{b}": count for (a, b), count in sorted(across.items()) if a != b},
        "pairs_within_sources": {a: count for (a, b), count in sorted(across.items()) if a == b}})


def removed_indices(folder, rank):
    """The places, within its file, of the documents that were found to be duplicates."""
    path = Path(folder) / f"{rank:06d}.npy"
    return numpy.load(path)["index"] if path.exists() else numpy.empty(0, "<u4")


class ExactDuplicates(PipelineStep):
    """One task: compare the digests of all shards and write the decisions."""

    type, name = "DEDUP", "exact duplicates"

    def __init__(self, shards, documents_folder, folder):
        super().__init__()
        self.shards, self.documents, self.folder = shards, Path(documents_folder), folder

    def run(self, data=None, rank=0, world_size=1):
        digests = [numpy.load(facts_path(self.documents / shard.source / shard.name, "digests.npy"), mmap_mode="r")
                   for shard in self.shards]
        save_decisions(equal_pairs(digests), self.shards, self.documents, self.folder)


class DuplicateFilter(BaseFilter):
    """Removes the documents that a folder of decisions names, with the document that is kept in their place."""

    name = "duplicates"

    def __init__(self, folder, what):
        super().__init__()
        self.folder, self.what = folder, what

    def run(self, data, rank=0, world_size=1):
        pairs = numpy.load(Path(self.folder) / f"{rank:06d}.npy")
        kept = read_json(Path(self.folder) / f"{rank:06d}.json")
        self.kept = {int(pair["index"]): (entry, float(pair["similarity"])) for pair, entry in zip(pairs, kept)}
        yield from super().run(data, rank, world_size)

    def filter(self, document):
        if document.metadata["_index"] not in self.kept:
            return True
        entry, similarity = self.kept[document.metadata["_index"]]
        document.metadata |= {"duplicate_of": entry, "similarity": round(similarity, 3)}
        where = "within its source" if entry["source"] == document.metadata["source"] else f"in {entry['source']}"
        return False, f"{self.what} {where}"
