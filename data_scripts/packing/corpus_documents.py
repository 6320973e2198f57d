"""The documents of a cleaned corpus on their way to tokens: keys, held-out split, overlaps, token files, difficulty.

The passes of `corpus_packing.py`. The texts stay where they are (`document_folder.py`) and are read from front
to back, file by file, so that several processes can share the work and give the same bytes; in memory are the
document being read and about 40 bytes for each document of the corpus. Encoded documents lie in a hidden work folder
until they are written in their order; a killed run finds them there and goes on.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import logging
import math
import multiprocessing
import os
import pickle
import re
from array import array
from pathlib import Path

import numpy
from tqdm.auto import tqdm

from data_scripts import document_folder, overlap
from data_scripts.packing import packed_writer

logger = logging.getLogger(__name__)

BYTES_PER_TOKEN = 3.3          # before there is a tokenizer: the size of the held-out part
LEAST_HELD_OUT = 20_000        # bytes of each source, so that its bits per byte mean something
MOST_HELD_OUT = 0.1            # of a source
CHUNK, CHUNK_BYTES = 512, 1 << 20  # documents, bytes encoded at a time
OPEN_FILES = 128
COMMON = 10                    # training documents that may share an n-gram before it counts as a common one
MOSTLY = 0.5                   # of a document's n-grams held out: no longer a phrase, but a copy
TRAIN, HELD_OUT, DUPLICATE, OVERLAP = range(4)
_WORKER = {}                   # what a worker process was started with


@dataclasses.dataclass
class Source:
    """A source of the corpus: its folder and manifest; by document keys, sizes and what becomes of it."""

    name: str
    kind: str
    folder: Path
    manifest: dict
    keys: numpy.ndarray = None        # uint64, salted hashes of the texts: they decide order and split
    bytes: numpy.ndarray = None       # int64, UTF-8 bytes
    given: numpy.ndarray = None       # float32, metadata["difficulty"], NaN where there is none
    role: numpy.ndarray = None        # int8: TRAIN, HELD_OUT, ...
    tokens: numpy.ndarray = None      # int64, with bos and eos
    difficulty: numpy.ndarray = None  # as the curriculum has it

    @property
    def files(self):
        return [self.folder / file["name"] for file in self.manifest["files"]]

    def work_files(self, work, suffix):
        """A path below `work` for each of the files."""
        return [work / f"{self.name}-{number:05d}{suffix}" for number in range(len(self.files))]

    def parts(self, values):
        """`values` (one a document) cut as the documents lie in the files."""
        return numpy.split(values, numpy.cumsum([file["documents"] for file in self.manifest["files"]])[:-1])

    def where(self, role):
        return numpy.flatnonzero(self.role == role)


def find_sources(corpus):
    """The sources of a corpus folder by name: its sub-folders of documents, or itself.

    Raises:
        ValueError: none there, one that is unfinished or changed, two of one name, a manifest without source or kind.
    """
    corpus, sources = Path(corpus), {}
    if not corpus.is_dir():
        raise ValueError(f"corpus={str(corpus)!r} is no folder; make it with python -m data_scripts.clean_corpus")
    for folder in document_folder.source_folders(corpus):
        manifest = document_folder.read_folder_manifest(folder)
        name, kind = manifest.get("source"), manifest.get("kind")
        if not name or kind not in document_folder.KINDS:
            raise ValueError(f"{folder}/manifest.json has source={name!r}, kind={kind!r}; a name and one of "
                             f"{', '.join(document_folder.KINDS)} are needed: make the folder again")
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"{folder}/manifest.json has source={name!r}; a name must consist of letters, digits, "
                             "'_', '.' and '-': make the folder again with another one")
        if name in sources:
            raise ValueError(f"{folder} and {sources[name].folder} are both source {name!r}; take one away")
        if manifest["documents"]:
            sources[name] = Source(name, kind, folder, manifest)
    if not sources:
        raise ValueError(f"corpus={str(corpus)!r} holds no folder of documents; make them with python -m "
                         "data_scripts.clean_corpus")
    return sources


# ---------------------------------------------------------------- what workers do, a file at a time

class Workers:
    """Runs functions over files in `count` processes (1: in this one), results in the tasks' order.

    What a function needs beside its task it finds in `_WORKER`; workers read it from a file of `folder`, once.
    """

    def __init__(self, count, folder, progress):
        self._count, self._folder, self._progress, self._pool, self._passes = count, folder, progress, None, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, function, tasks, state, description):
        """[function(task) for task in tasks], with a bar."""
        if self._count == 1:
            _WORKER.clear()
            _WORKER.update(state)
            results = map(function, tasks)
        else:
            self._passes += 1
            path = self._folder / f"state-{self._passes}.pickle"
            path.write_bytes(pickle.dumps(state))
            results = self._started().map(functools.partial(_run_in_worker, function, path), tasks)
        return list(tqdm(results, total=len(tasks), desc=description, unit=" files", disable=not self._progress))

    def _started(self):
        if self._pool is None:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one process a core already
            # Not fork: the threads that libraries have started do not survive it.
            self._pool = concurrent.futures.ProcessPoolExecutor(self._count, multiprocessing.get_context("forkserver"))
        return self._pool


def _run_in_worker(function, path, task):
    if _WORKER.get("path") != path:
        _WORKER.clear()
        _WORKER.update(pickle.loads(path.read_bytes()), path=path)
    return function(task)


def _documents(path, wanted=None):
    """(place, document) of a file; `wanted`: only those where this array holds."""
    for place, line in enumerate(document_folder.read_lines(path)):
        if wanted is None or wanted[place]:
            yield place, json.loads(line)


def scan_file(task):
    """(keys, UTF-8 bytes, difficulties) of the documents of a file that is as its manifest says."""
    path, sha256 = task
    if packed_writer.file_sha256(path) != sha256:
        raise ValueError(f"{path} has another sha256 than manifest.json records: it changed since it was written; "
                         "make the folder again")
    keys, sizes, given = array("Q"), array("q"), array("f")
    for _, document in _documents(path):
        keys.append(int.from_bytes(overlap.digest(document["text"], _WORKER["seed"])[:8], "big"))
        sizes.append(len(document["text"].encode("utf-8", "surrogatepass")))
        given.append(_difficulty(document, path))
    return numpy.array(keys, numpy.uint64), numpy.array(sizes, numpy.int64), numpy.array(given, numpy.float32)


def _difficulty(document, path):
    value = document["metadata"].get("difficulty", math.nan)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{path}: document {document['id']!r} has difficulty={value!r} in its metadata, which must be "
                         "a number; leave the key out where there is none")
    return value


def compare_file(task):
    """Write the (document, n-gram) pairs of a file's training documents and the held-out n-grams they have.

    A document that is mostly held-out n-grams has one more, `len(index)`, which stands for no n-gram.
    """
    path, wanted, output = task
    index, pairs = _WORKER["index"], [numpy.empty((0, 2), numpy.uint32)]
    for place, document in _documents(path, wanted):
        found, all_ngrams = index.compare(document["text"])
        if len(found):
            found = numpy.append(found, len(index)) if len(found) >= MOSTLY * all_ngrams else found
            pairs.append(numpy.stack([numpy.full(len(found), place), found], axis=1).astype(numpy.uint32))
    packed_writer.save_array(output, numpy.concatenate(pairs))


def encode_file(task):
    """Write the ids of a file's wanted documents one after another; tokens of each (0: not wanted).

    The counts are written last: where they are, the ids are complete.
    """
    from recipes.encoding import encode_documents

    path, wanted, output = task
    counts_path = output.with_suffix(".npy")
    if counts_path.is_file():
        return numpy.load(counts_path)
    tokenizer = _WORKER["tokenizer"]
    dtype, counts = packed_writer.token_dtype(len(tokenizer)), numpy.zeros(len(wanted), numpy.int64)
    with open(output, "wb") as file:
        for places, texts in _chunks(_documents(path, wanted)):
            for place, ids in zip(places, encode_documents(tokenizer, texts)):
                counts[place] = len(ids)
                file.write(numpy.asarray(ids, dtype).tobytes())
    packed_writer.save_array(counts_path, counts)
    return counts


def _chunks(documents):
    """(places, texts) of at most CHUNK documents and about CHUNK_BYTES."""
    places, texts, size = [], [], 0
    for place, document in documents:
        places.append(place)
        texts.append(document["text"])
        size += len(document["text"])
        if len(texts) == CHUNK or size >= CHUNK_BYTES:
            yield places, texts
            places, texts, size = [], [], 0
    if texts:
        yield places, texts


def count_ids(task):
    """How often each id stands in a token file (int64, vocabulary)."""
    path, dtype, vocab_size = task
    return sum((numpy.bincount(piece, minlength=vocab_size) for piece in _pieces(path, dtype)),
               start=numpy.zeros(vocab_size, numpy.int64))


def _pieces(path, dtype, size=1 << 20):
    with open(path, "rb") as file:
        while len(raw := file.read(size * dtype.itemsize)):
            yield numpy.frombuffer(raw, dtype)


# ---------------------------------------------------------------- what becomes of each document

def scan(sources, settings, workers):
    """Fill in keys, bytes, given and role; of equal texts the first stays, in the order of the sources' names."""
    tasks = [(path, file["sha256"]) for source in sources.values()
             for path, file in zip(source.files, source.manifest["files"])]
    results = iter(workers.run(scan_file, tasks, {"seed": settings.seed}, "read"))
    for source in sources.values():
        parts = list(itertools.islice(results, len(source.files)))
        source.keys, source.bytes, source.given = map(numpy.concatenate, zip(*parts))
        if len(source.keys) != source.manifest["documents"]:
            raise ValueError(f"{source.folder} holds {len(source.keys):,} documents, its manifest says "
                             f"{source.manifest['documents']:,}; make the folder again")
        source.role = numpy.zeros(len(source.keys), numpy.int8)
    _, first = numpy.unique(numpy.concatenate([source.keys for source in sources.values()]), return_index=True)
    is_first, end = numpy.zeros(sum(len(source.keys) for source in sources.values()), bool), 0
    is_first[first] = True
    for source in sources.values():
        source.role[~is_first[end:end + len(source.role)]] = DUPLICATE
        end += len(source.role)


def hold_out(sources, wanted):
    """Give documents the role HELD_OUT: of each source about `wanted[source]` tokens, a few at least, chosen by key.

    Documents longer than a quarter of what is wanted are passed over, so that a book does not take a split by itself,
    unless the shorter ones are too few.
    """
    for source in sources.values():
        order = source.where(TRAIN)
        order = order[numpy.argsort(source.keys[order])]
        if len(order) < 2:
            logger.warning("source %r has a single document, so none is held out", source.name)
            continue
        sizes = source.bytes[order]
        aim = min(max(wanted[source.name] * BYTES_PER_TOKEN, LEAST_HELD_OUT), MOST_HELD_OUT * sizes.sum())
        rising = numpy.sort(sizes)
        enough = rising[numpy.searchsorted(numpy.cumsum(rising), aim)]
        fits = order[sizes <= max(aim / 4, enough)]
        before = numpy.cumsum(source.bytes[fits]) - source.bytes[fits]
        source.role[fits[before < aim]] = HELD_OUT


def drop_overlaps(sources, work, workers):
    """Give training documents that share an n-gram with a held-out one, of any source, the role OVERLAP.

    N-grams of more than COMMON training documents do not count: they are licences, headings and phrases, as in GPT-3
    (arXiv:2005.14165, App. C). A document of which MOSTLY is held out goes all the same: what has many near copies
    would otherwise stay in both splits. Returns how many n-grams were compared and how many of them are so common.
    """
    index = overlap.NgramIndex()
    for source in sources.values():
        for path, held_out in zip(source.files, source.parts(source.role == HELD_OUT)):
            for _, document in _documents(path, held_out) if held_out.any() else ():
                index.add(document["text"])
    counts = numpy.zeros(len(index) + 1, numpy.int64)  # len sorts the n-grams, once for all workers
    tasks = [task for s in sources.values()
             for task in zip(s.files, s.parts(s.role == TRAIN), s.work_files(work, ".pairs.npy"))]
    workers.run(compare_file, tasks, {"index": index}, "compare")
    for _, _, pairs in tasks:
        counts += numpy.bincount(numpy.load(pairs)[:, 1], minlength=len(counts))
    counts[-1] = 0  # of no n-gram: documents that are mostly held out
    outputs = iter(tasks)
    for source in sources.values():
        before = int((source.role == TRAIN).sum())
        for part in source.parts(source.role):  # views: what is set here is set in the source
            pairs = numpy.load(next(outputs)[2])
            part[pairs[counts[pairs[:, 1]] <= COMMON, 0]] = OVERLAP
        _check_left(source, before, int((source.role == TRAIN).sum()))
    return {"held_out": len(counts) - 1, "too_common": int((counts > COMMON).sum())}


def _check_left(source, before, left):
    if not left:
        raise ValueError(f"source {source.name!r}: all {before} training documents share an n-gram with a held-out "
                         "one, so nothing is left to train on; its documents repeat one another: near-duplicate "
                         "removal (clean_corpus) makes them distinct, or pass --validation_fraction 0")
    if left < before * 3 / 4:
        logger.warning("source %r: %d of %d training documents share an n-gram with a held-out one and were dropped; "
                       "its documents repeat one another", source.name, before - left, before)


def sample_texts(sources, wanted_bytes):
    """Yield about `wanted_bytes[source]` of the training texts of each source, chosen by key."""
    for source in sources.values():
        order = source.where(TRAIN)
        order = order[numpy.argsort(source.keys[order])]
        sizes = source.bytes[order]
        chosen = numpy.zeros(len(source.keys), bool)
        chosen[order[numpy.cumsum(sizes) - sizes < wanted_bytes.get(source.name, 0)]] = True
        for path, wanted in zip(source.files, source.parts(chosen)):
            for _, document in _documents(path, wanted) if wanted.any() else ():
                yield document["text"]


def encode(sources, tokenizer, work, workers):
    """Write the token files of all kept documents below `work`; fill in `tokens`. Returns {source: TokenReader}."""
    tasks = [task for s in sources.values()
             for task in zip(s.files, s.parts(s.role <= HELD_OUT), s.work_files(work, ".tokens"))]
    results = iter(workers.run(encode_file, tasks, {"tokenizer": tokenizer}, "encode"))
    readers, opened = {}, collections.OrderedDict()
    for source in sources.values():
        counts = list(itertools.islice(results, len(source.files)))
        source.tokens = numpy.concatenate(counts)
        readers[source.name] = TokenReader(source.work_files(work, ".tokens"), counts,
                                           packed_writer.token_dtype(len(tokenizer)), opened)
    return readers


class TokenReader:
    """Encoded documents of a source by index. Read, not mapped: mapped pages would count as the process's memory.

    Args:
        opened: {path: file}, shared by the readers of all sources, so that OPEN_FILES are open at most in all.
    """

    def __init__(self, files, counts, dtype, opened):
        self.files, self.dtype, self._open = files, dtype, opened
        self._counts = numpy.concatenate(counts)
        self._starts = numpy.concatenate([numpy.cumsum(part) - part for part in counts])
        self._ends = numpy.cumsum([len(part) for part in counts])

    def __getitem__(self, index):
        path = self.files[int(numpy.searchsorted(self._ends, index, side="right"))]
        file = self._open.pop(path, None) or open(path, "rb")
        self._open[path] = file  # the latest last
        if len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        size, start = int(self._counts[index]) * self.dtype.itemsize, int(self._starts[index]) * self.dtype.itemsize
        return numpy.frombuffer(os.pread(file.fileno(), size, start), self.dtype)

    def close(self):
        while self._open:
            self._open.popitem()[1].close()


def set_difficulty(sources, readers, curriculum, vocab_size, workers):
    """Fill in what the curriculum sorts by: tokens, or metadata["difficulty"], else how rare a document's ids are.

    Rarity is the mean of -log p(id) with the frequencies of the ids in all of the corpus, as in competence-based
    curricula (arXiv:1903.09848, Sec. 2.1), by token, so that length does not count.
    """
    if curriculum == "length":
        for source in sources.values():
            source.difficulty = source.tokens
    if curriculum != "difficulty":
        return
    rare = []
    for source in sources.values():
        has = numpy.isfinite(source.given)
        if has.any() and not has.all():
            raise ValueError(f"source {source.name!r}: {int(has.sum()):,} of {len(has):,} documents have a difficulty "
                             "in their metadata; give it to all of them or to none")
        source.difficulty = source.given
        rare += [] if has.all() else [source.name]
    files = {name: readers[name].files for name in rare}
    dtype = readers[rare[0]].dtype if rare else None
    tasks = [(path, dtype, vocab_size) for paths in files.values() for path in paths]
    counts = sum(workers.run(count_ids, tasks, {}, "count ids"),
                 start=numpy.zeros(vocab_size, numpy.int64))
    surprisal = -numpy.log((counts + 1) / (counts.sum() + vocab_size))
    tasks = [(path, dtype, part, surprisal) for name in rare
             for path, part in zip(files[name], sources[name].parts(sources[name].tokens))]
    results = iter(workers.run(mean_surprisal, tasks, {}, "difficulty"))
    for name in rare:
        sources[name].difficulty = numpy.concatenate(list(itertools.islice(results, len(files[name]))))


def mean_surprisal(task):
    """(documents,) float32: the mean of `surprisal` over the ids of each document of a token file; 0 without ids."""
    path, dtype, counts, surprisal = task
    means = numpy.zeros(len(counts), numpy.float32)
    with open(path, "rb") as file:
        for place in numpy.flatnonzero(counts):
            ids = numpy.frombuffer(file.read(int(counts[place]) * dtype.itemsize), dtype)
            means[place] = surprisal[ids].mean()
    return means
