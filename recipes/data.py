"""Training data for the stages: packed folders, the user's texts, Hub data sets.

    train, validation, info = load_pretraining_data("data/tiny", tokenizer, 512)
    Trainer(..., train_dataset=train, eval_dataset=validation, data_collator=PackingCollator())

What a row is stands in `recipes/packed_rows.py`; how files are read in `recipes/text_files.py`; the
packed format in `data_scripts/packing/packed_writer.py`, which writes it.
"""

import bisect
import hashlib
import json
import math
from pathlib import Path

import numpy

from recipes.packed_rows import PackedArray, PackedRows, PackedStream, PackingCollator
from recipes.parallel_settings import data_parallel_size
from recipes.text_files import has_split, is_local, is_saved_dataset, list_files, open_hub_dataset, read_files

__all__ = ["PackedTokens", "PackingCollator", "bits_per_byte", "check_vocabulary", "is_packed_folder",
           "load_pretraining_data", "load_text_dataset", "pack_texts", "split_documents"]

FORMAT, VERSION = "packed-tokens", 1
STREAM_VALIDATION_TOKENS = 1 << 20
HELD_OUT_FROM = 10_000  # documents at the head of a stream that its held-out split is taken from


def is_packed_folder(folder):
    """Whether a location is a packed data set; one without its manifest (written last) is an error."""
    folder = Path(folder).expanduser()
    if (folder / "manifest.json").is_file():
        return json.loads((folder / "manifest.json").read_text(encoding="utf-8")).get("format") == FORMAT
    if folder.is_dir() and any(folder.glob("train-*.bin")):
        raise ValueError(f"{folder} holds packed token files but no manifest.json, which is written last: the copy "
                         "is incomplete; copy it again or rerun data_scripts.prepare_pretraining")
    return False


class PackedTokens(PackedRows):
    """Rows of one split of a packed folder, read through memory maps (nothing is copied but the rows).

    Args:
        folder: as written by `data_scripts.prepare_pretraining`.
        split: "train" or "validation".
        stride: see `PackedRows`; sequence_length - 1 for evaluation.
        vocab_size: of the model; a data set with larger ids is refused here, not in the embedding.
        max_tokens: take leading whole documents up to this many tokens only (a quicker evaluation;
            documents are interleaved, so the head is a fair sample).
    """

    def __init__(self, folder, split, sequence_length, *, stride=None, vocab_size=None, max_tokens=None):
        self.folder = Path(folder).expanduser()
        if not is_packed_folder(self.folder):
            raise ValueError(f"{self.folder} is no packed data set (no manifest.json of format {FORMAT!r})")
        self.manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        if self.manifest["version"] != VERSION:
            raise ValueError(f"{self.folder} has format version {self.manifest['version']}, this code reads {VERSION}; "
                             "make it again with data_scripts.prepare_pretraining")
        if split not in self.manifest["splits"]:
            raise ValueError(f"{self.folder} has no split {split!r}; it has {', '.join(self.manifest['splits'])}")
        if vocab_size is not None and self.manifest["vocab_size"] > vocab_size:
            raise ValueError(f"{self.folder} has token ids up to {self.manifest['vocab_size'] - 1}, the model's "
                             f"vocab_size={vocab_size} holds ids below it; set vocab_size to at least "
                             f"{self.manifest['vocab_size']} or make the data with a smaller tokenizer")
        self._dtype = numpy.dtype({"uint16": "<u2", "uint32": "<u4"}[self.manifest["dtype"]])
        self._files = self.manifest["splits"][split]["files"]
        self._maps = self._open()
        ends = numpy.cumsum([file["tokens"] for file in self._files])
        self._offsets = numpy.concatenate([[0], ends]).astype(numpy.int64)
        self._file_starts = self._offsets.tolist()  # found in faster than in an array
        documents = [numpy.load(self.folder / file["documents_name"]) for file in self._files]
        starts = numpy.concatenate([d["start"] + offset for d, offset in zip(documents, self._offsets)])
        documents = numpy.concatenate(documents)
        total = int(self._offsets[-1])
        if max_tokens is not None and max_tokens < total:
            kept = int(numpy.searchsorted(starts + documents["tokens"], max_tokens, side="right"))
            kept = max(kept, 1)
            starts, documents = starts[:kept], documents[:kept]
            total = int(starts[-1] + documents["tokens"][-1])
        super().__init__(total, starts, documents["bytes"], documents["source"], self.manifest["sources"],
                         sequence_length, stride, self.manifest["eos_token_id"])

    @property
    def curriculum(self):
        """Whether the order of the documents is meant: easy ones first."""
        return self.manifest.get("curriculum", "none") != "none"

    def _open(self):
        maps = []
        for file in self._files:
            path, expected = self.folder / file["name"], file["tokens"] * self._dtype.itemsize
            if not path.is_file() or path.stat().st_size != expected:
                found = f"{path.stat().st_size:,} bytes" if path.is_file() else "missing"
                raise ValueError(f"{path} is {found}, the manifest says {expected:,} bytes: the copy is incomplete; "
                                 "copy it again or rerun data_scripts.prepare_pretraining")
            maps.append(numpy.asarray(numpy.memmap(path, self._dtype, "r")))
        return maps

    def __getstate__(self):
        # A memory map would be pickled with its content: workers open the files themselves.
        return {**self.__dict__, "_maps": None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._maps = self._open()

    def tokens(self, begin, end):
        file = bisect.bisect_right(self._file_starts, begin) - 1
        pieces = []
        while begin < end:  # a row may run on into the next file
            stop, start = min(end, self._file_starts[file + 1]), self._file_starts[file]
            pieces.append(self._maps[file][begin - start:stop - start])
            begin, file = stop, file + 1
        return pieces[0] if len(pieces) == 1 else numpy.concatenate(pieces)


def bits_per_byte(loss_sum, text_bytes):
    """Summed negative log-likelihood in nats over the UTF-8 bytes of the same documents -> bits per byte."""
    if text_bytes <= 0:
        raise ValueError(f"text_bytes={text_bytes} must be positive: no document was evaluated")
    return loss_sum / math.log(2) / text_bytes


def check_vocabulary(tokenizer, config):
    """Refuse a tokenizer with ids that the model's embedding does not have."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise ValueError(f"the tokenizer has token ids up to {largest} ({largest + 1} rows of embedding), the model's "
                         f"vocab_size={config.vocab_size}; set vocab_size to at least {largest + 1} (call "
                         "resize_token_embeddings on a trained model) or take the tokenizer the model came with")


def _local_rows(files, text_column, errors):
    for _, text in read_files(files, text_column, errors):
        yield {text_column: text}


def load_text_dataset(name, split="train", text_column="text", streaming=False, errors="strict"):
    """Documents as a `datasets.Dataset` (local files: in memory) or, streaming, an `IterableDataset`.

    Args:
        name: folder, file (.txt .md .py .jsonl .jsonl.gz .jsonl.zst .parquet), folder of `save_to_disk`, or Hub name
            (`name` or `name:configuration`).
    Raises:
        ValueError: a missing column, unreadable bytes, no documents; the message says which and where.
    """
    import datasets

    if not is_local(name) or is_saved_dataset(name):
        return open_hub_dataset(name, split, text_column, streaming)
    files = [str(path) for path in list_files(name, split)]
    if not files:
        raise ValueError(f"{name} has no file for split {split!r}")
    if streaming:
        return datasets.IterableDataset.from_generator(
            _local_rows, gen_kwargs={"files": files, "text_column": text_column, "errors": errors})
    texts = [text for _, text in read_files(files, text_column, errors)]
    if not texts:
        raise ValueError(f"{name} has no documents at all: its {len(files)} files hold only blank text")
    return datasets.Dataset.from_dict({text_column: texts})


def _key(text):
    if not isinstance(text, str):
        raise ValueError(f"the text column holds a {type(text).__name__}, expected text; drop such rows first")
    return hashlib.blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def split_documents(dataset, fraction, text_column="text"):
    """(training, held-out) by documents: those with the smallest hashes of their text are held out.

    The choice does not depend on order or seed, and equal texts fall on the same side. Of a stream the
    held-out part is taken from its first 10,000 documents and kept in memory; later documents with
    hashes below the same bound are left out of training too (they may repeat held-out ones).
    """
    import datasets

    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction={fraction} must lie in (0, 1)")
    stream = isinstance(dataset, datasets.IterableDataset)
    rows = dataset.take(HELD_OUT_FROM) if stream else dataset.select_columns(text_column)
    head = [row[text_column] for row in rows]
    keys = sorted({_key(text) for text in head})
    if len(keys) < 2:
        raise ValueError(f"the data set has {len(keys)} distinct documents, so none can be held out; cut it into more "
                         "documents, bring a validation split, or set validation_fraction=0")
    bound = keys[max(1, min(len(keys) - 1, round(fraction * len(keys)))) - 1]
    held_out = datasets.Dataset.from_dict({text_column: [text for text in head if _key(text) <= bound]})
    return dataset.filter(lambda row: _key(row[text_column]) > bound), held_out


def pack_texts(dataset, tokenizer, sequence_length, *, text_column="text", seed=0, shuffle=True,
               shuffle_buffer=1000, stride=None, source="text"):
    """Rows from a text data set: `PackedArray` for a Dataset, `PackedStream` for an IterableDataset.

    Args:
        shuffle: shuffle the documents by `seed`; of a stream, within `shuffle_buffer` documents.
        stride: see `PackedRows`; not for streams.
    """
    import datasets

    if isinstance(dataset, datasets.IterableDataset):
        if stride not in (None, sequence_length):
            raise ValueError(f"stride={stride} needs data in memory: load it with streaming=False")
        return PackedStream(dataset, tokenizer, sequence_length, text_column, seed, shuffle_buffer if shuffle else 0)
    if text_column not in dataset.column_names:
        raise ValueError(f"the data set has no column {text_column!r}; columns present: "
                         f"{', '.join(dataset.column_names)}; name the right one with --text_column")
    dataset = dataset.shuffle(seed=seed) if shuffle else dataset
    texts = (text for text in dataset[text_column] if text and text.strip())
    return PackedArray(texts, tokenizer, sequence_length, stride, source)


def _check_same_tokenizer(folder, tokenizer):
    import tokenizers

    path = Path(folder) / "tokenizer" / "tokenizer.json"
    if tokenizers.Tokenizer.from_file(str(path)).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{folder} was tokenised with another vocabulary than that of {tokenizer.name_or_path!r}; "
                         f"take {path.parent} as tokenizer, or prepare the data again with --from_folder")


def check_enough_rows(train, args):
    """ValueError if the training rows do not fill one batch of every process (Trainer would train on nothing)."""
    processes = data_parallel_size(args)
    needed = args.per_device_train_batch_size * processes
    if hasattr(train, "__len__") and len(train) < needed:
        raise ValueError(f"{len(train)} training rows of sequence_length={args.sequence_length} do not fill a batch of "
                         f"per_device_train_batch_size={args.per_device_train_batch_size} on {processes} "
                         "process(es); lower the batch size or sequence_length, or add text")


def _checksum(dataset):
    """Of a packed split, from its manifest; None for other data."""
    if not isinstance(dataset, PackedTokens):
        return None
    files = dataset.manifest["splits"]["train"]["files"]
    sums = "".join(file["sha256"] + file["documents_sha256"] for file in files)
    return hashlib.sha256((sums + dataset.manifest["tokenizer_sha256"]).encode()).hexdigest()


def _leading(texts, tokenizer, max_tokens):
    """Documents of `texts` until `max_tokens` tokens are passed (None: all)."""
    taken = 0
    for text in texts:
        if not text or not text.strip():
            continue
        if max_tokens is not None:
            if taken >= max_tokens:
                return
            taken += len(tokenizer(text)["input_ids"]) + 1
        yield text


def load_pretraining_data(dataset_name, tokenizer, sequence_length, *, streaming=False, text_column="text",
                          seed=0, validation_fraction=0.01, errors="strict", shuffle_buffer=1000,
                          max_validation_tokens=None):
    """Training rows, held-out rows (stride for evaluation) or None, and facts about them.

    Args:
        dataset_name: a packed folder, or anything `load_text_dataset` takes.
        validation_fraction: of the documents, held out where the data has no validation split; 0: none.
        max_validation_tokens: evaluate on leading whole documents up to about this many. None: all, of a
            stream at most STREAM_VALIDATION_TOKENS.
    Returns:
        (train, validation, info): info has kind ("packed", "texts" or "stream"), dataset_name, sources, kinds
        ({source: kind}, of a packed corpus), train_tokens (None for a stream), validation_tokens (0 without),
        checksum (packed folders).
    """
    evaluation = sequence_length - 1
    if is_packed_folder(dataset_name):
        _check_same_tokenizer(dataset_name, tokenizer)
        train, kind = PackedTokens(dataset_name, "train", sequence_length), "packed"
        validation = None
        if "validation" in train.manifest["splits"]:
            validation = PackedTokens(dataset_name, "validation", sequence_length, stride=evaluation,
                                      max_tokens=max_validation_tokens)
    else:
        documents = load_text_dataset(dataset_name, "train", text_column, streaming, errors)
        if has_split(dataset_name, "validation"):
            held_out = load_text_dataset(dataset_name, "validation", text_column, streaming, errors)
        elif validation_fraction:
            documents, held_out = split_documents(documents, validation_fraction, text_column)
        else:
            held_out = None
        train = pack_texts(documents, tokenizer, sequence_length, text_column=text_column, seed=seed,
                           shuffle_buffer=shuffle_buffer)
        if streaming and max_validation_tokens is None:
            max_validation_tokens = STREAM_VALIDATION_TOKENS
        texts = None if held_out is None else (row[text_column] for row in held_out)
        validation = None if texts is None else PackedArray(
            _leading(texts, tokenizer, max_validation_tokens), tokenizer, sequence_length, evaluation, "text")
        kind = "stream" if streaming else "texts"
    return train, validation, {
        "kind": kind, "dataset_name": str(dataset_name), "sources": getattr(train, "sources", ["text"]),
        "kinds": getattr(train, "manifest", {}).get("kinds", {}),
        "train_tokens": getattr(train, "total_tokens", None), "checksum": _checksum(train),
        "validation_tokens": validation.total_tokens if validation is not None else 0}
