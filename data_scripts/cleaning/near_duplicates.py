"""Near duplicates within and across sources, by datatrove's MinHash with our own shingles, and a check of each pair.

    signatures   per shard: 14 buckets of 8 hashes, over runs of 5 words (or 5 CJK characters; `unit_hashes.shingles`)
    buckets      per bucket: neighbours with equal hashes (datatrove)
    clusters     pairs whose whole signatures agree too little for their kinds are dropped; clusters (datatrove);
                 of each cluster the first document, by the order of sources, is kept

A pair of Jaccard similarity s meets in a bucket with probability 1 - (1 - s^8)^14: 5 % at 0.5, 56 % at 0.7, 92 % at
0.8 (Broder 1997; the numbers are FineWeb's, arXiv:2406.17557, App. E.1).
"""

import shutil
import struct
from pathlib import Path

import numpy
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)
from datatrove.utils.word_tokenizers import WordTokenizer

from data_scripts import overlap
from data_scripts.cleaning import unit_hashes
from data_scripts.cleaning.clean_blocks import save_array, write_json
from data_scripts.cleaning.corpus_blocks import PipelineStep
from data_scripts.cleaning.exact_duplicates import PAIR, removed_indices, save_decisions

SHINGLES_AT_ONCE = 2_048  # 112 hashes of each: under 2 MB at a time, which stays in the cache
PAIRS_AT_ONCE = 200_000   # 450 bytes of signature on both sides of each
DUPLICATE = numpy.dtype([("rank_a", "<u4"), ("index_a", "<u4"), ("rank_b", "<u4"), ("index_b", "<u4")])


def minhash_config(settings):
    return MinhashConfig(n_grams=settings.units, num_buckets=settings.buckets, hashes_per_bucket=settings.hashes,
                         seed=settings.seed)


def chance_of_meeting(similarity, settings):
    """Probability that two documents of this Jaccard similarity share all hashes of at least one bucket."""
    return 1 - (1 - similarity ** settings.hashes) ** settings.buckets


class _Units(WordTokenizer):
    """Words and CJK characters; what datatrove loads for a language instead needs spaCy and its models."""

    def word_tokenize(self, text):
        return sum(overlap.units(text), [])

    def sent_tokenize(self, text):
        return [text]

    def span_tokenize(self, text):
        return [(0, len(text))]


class Signatures(MinhashDedupSignature):
    """datatrove's signatures over our shingles; also saves, by document, 32 bits of each hash to check pairs with.

    Args:
        exact: folder of decisions on exact duplicates, which need no signature.
        kinds: documents of other kinds get none, and so are never near duplicates.
    """

    def __init__(self, folder, settings, exact=None):
        super().__init__(str(folder), minhash_config(settings), language=_Units())
        self.folder, self.exact, self.kinds = Path(folder), exact, set(settings.kinds)

    def _noting(self, data):
        for document in data:
            self._document = document
            yield document

    def run(self, data, rank=0, world_size=1):
        self._passed_over = set(removed_indices(self.exact, rank).tolist()) if self.exact else set()
        self._places, self._rows = [], []
        # A document's place is counted by datatrove from the start of the file; ours holds all of the file.
        super().run(self._noting(data), rank, world_size)
        width = self.config.num_buckets * self.config.hashes_per_bucket
        rows = numpy.array(self._rows, "<u4").reshape(-1, width)
        save_array(self.folder / "rows" / f"{rank:06d}.places.npy", numpy.array(self._places, "<u4"))
        save_array(self.folder / "rows" / f"{rank:06d}.npy", rows)

    def get_shingles(self, text):
        document = self._document
        if document.metadata["_index"] in self._passed_over or document.metadata["kind"] not in self.kinds:
            return numpy.empty((0, 1), numpy.uint64)
        return unit_hashes.shingles(text, self.config.n_grams).reshape(-1, 1)

    def get_signature(self, shingles):
        """datatrove's function, a part of the shingles at a time: at once, a long book would take gigabytes."""
        lowest = numpy.full((self.config.num_buckets, self.config.hashes_per_bucket), 2**64 - 1, numpy.uint64)
        for start in range(0, len(shingles), SHINGLES_AT_ONCE):
            part = super().get_signature(shingles[start:start + SHINGLES_AT_ONCE])
            lowest = numpy.minimum(lowest, numpy.array(part, numpy.uint64))
        self._places.append(self._document.metadata["_index"])
        self._rows.append((lowest & numpy.uint64(2**32 - 1)).astype("<u4").ravel())
        return lowest.tolist()


def buckets_block(folder, output, settings):
    """datatrove's second stage; tasks = number of buckets."""
    return MinhashDedupBuckets(str(folder), str(output), config=minhash_config(settings), lines_to_buffer=1_000)


class _Rows:
    """Signatures of all tasks, memory-mapped."""

    def __init__(self, folder):
        self.folder, self._open = Path(folder), {}

    def __call__(self, ranks, indices):
        """The (n, hashes) signatures of documents given by task and place."""
        found = None
        for rank in numpy.unique(ranks).tolist():
            if rank not in self._open:
                self._open[rank] = (numpy.load(self.folder / f"{rank:06d}.places.npy"),
                                    numpy.load(self.folder / f"{rank:06d}.npy", mmap_mode="r"))
            places, rows = self._open[rank]
            mine = numpy.flatnonzero(ranks == rank)
            if found is None:
                found = numpy.empty((len(ranks), rows.shape[1]), "<u4")
            found[mine] = rows[numpy.searchsorted(places, indices[mine])]
        return found

    def similarity(self, rank_a, index_a, rank_b, index_b):
        """Share of equal hashes of each pair: an estimate of the Jaccard similarity, +-0.04 (112 hashes)."""
        parts = [(self(rank_a[i:i + PAIRS_AT_ONCE], index_a[i:i + PAIRS_AT_ONCE]) ==
                  self(rank_b[i:i + PAIRS_AT_ONCE], index_b[i:i + PAIRS_AT_ONCE])).mean(1)
                 for i in range(0, len(rank_a), PAIRS_AT_ONCE)]
        return numpy.concatenate(parts) if parts else numpy.empty(0)


class Clusters(PipelineStep):
    """One task: check the pairs, cluster what is left, decide what is kept.

    Memory: datatrove's union-find takes about 0.5 kB for each document that has a near duplicate.
    """

    type, name = "DEDUP", "near duplicates"

    def __init__(self, shards, documents, signatures, pairs, folder, settings):
        super().__init__()
        self.shards, self.documents, self.settings = shards, documents, settings
        self.signatures, self.pairs, self.folder = Path(signatures), Path(pairs), Path(folder)

    def _check_pairs(self, rows, checked):
        """Copy the pairs that are similar enough for their kinds; (pairs that met, pairs dropped)."""
        least = numpy.array([self.settings.minimum_similarity[shard.kind] for shard in self.shards])
        met, dropped = 0, 0
        for path in sorted(self.pairs.glob("*.dups")):
            with open(checked / path.name, "wb") as file, open(path, "rb") as source:
                while data := source.read(PAIRS_AT_ONCE * DUPLICATE.itemsize):
                    pairs = numpy.frombuffer(data, DUPLICATE)
                    similarity = rows.similarity(*(pairs[name] for name in DUPLICATE.names))
                    good = similarity >= numpy.maximum(least[pairs["rank_a"]], least[pairs["rank_b"]])
                    met, dropped = met + len(pairs), dropped + int((~good).sum())
                    file.write(pairs[good].tobytes())
        return met, dropped

    def run(self, data=None, rank=0, world_size=1):
        rows, work = _Rows(self.signatures / "rows"), self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        (work / "checked").mkdir(parents=True)
        met, dropped = self._check_pairs(rows, work / "checked")
        cluster = MinhashDedupCluster(str(work / "checked"), str(work / "clusters"),
                                      config=minhash_config(self.settings), save_cluster_id=True,
                                      lines_to_buffer=10_000)
        cluster.run()
        pairs = self._first_of_each(work / "clusters")
        pairs["similarity"] = rows.similarity(*(pairs[name] for name in ("rank", "index", "kept_rank", "kept_index")))
        save_decisions(pairs, self.shards, self.documents, self.folder)
        write_json(self.folder / "pairs.json", {"met_in_buckets": met, "too_different": dropped})
        shutil.rmtree(work)

    def _first_of_each(self, folder):
        """Records of PAIR: every document of a cluster but the first, which is kept."""
        first, found = {}, []
        for path in sorted(folder.glob("*.clusters")):
            rank = int(path.name.partition(".")[0])
            for index, cluster in sorted(struct.iter_unpack("<2I", path.read_bytes())):
                kept = first.setdefault(cluster, (rank, index))
                if kept != (rank, index):
                    found.append((rank, index, *kept, 0))
        return numpy.array(found, PAIR)
