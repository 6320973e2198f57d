"""Rows of packed documents: what one training example is, from files, from memory or from a stream.

A row is S consecutive tokens of documents laid end to end (each bos + tokens + eos), as a dict of
int64 tensors:

    input_ids     (S,)
    labels        (S,)  input_ids, but -100 at the first token of the row and of every document. The
                        model shifts: position i predicts labels[i + 1], so nothing is predicted
                        across a document's edge.
    position_ids  (S,)  0 at the first token of the row and of every document, counting up. Attention
                        finds the documents by these; there is no attention_mask.
"""

from collections.abc import Sequence

import numpy
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from recipes.encoding import encode_documents

IGNORED = -100  # the label that cross-entropy leaves out
CHUNK = 64      # documents encoded at a time while streaming


def make_row(tokens, starts, length, pad_token_id=0):
    """Build a row.

    Args:
        tokens: (N,) ids with N <= length; the rest is filled with `pad_token_id` as a document of its
            own (no attention mask needed) whose labels are all -100.
        starts: places where a document begins; those in [N, length) cut the filling.
    """
    count = len(tokens)
    input_ids = numpy.full(length, pad_token_id, numpy.int64)
    input_ids[:count] = tokens
    first = numpy.zeros(length, bool)
    first[0] = True
    first[starts] = True
    if count < length:
        first[count] = True
    labels = numpy.where(first, IGNORED, input_ids)
    labels[count:] = IGNORED
    place = numpy.arange(length)
    position_ids = place - numpy.maximum.accumulate(numpy.where(first, place, 0))
    row = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
    return {name: torch.from_numpy(values) for name, values in row.items()}


class RowBatch(Sequence):
    """Rows made together: `batch` holds them as (B, S) tensors; as a sequence, they are the rows one by one."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch["input_ids"])

    def __getitem__(self, index):
        return {name: values[index] for name, values in self.batch.items()}


class PackedRows(Dataset):
    """Rows over a token sequence that a subclass reads with `tokens(begin, end)`.

    Args:
        starts: (documents,) int64, where each document begins in the sequence, rising from 0.
        document_bytes: (documents,) UTF-8 bytes of each text; document_sources: (documents,) indices
            into `sources`.
        stride: sequence_length (default) for training: rows do not overlap and an incomplete last row
            is left out. sequence_length - 1 for evaluation: the last token of a row is the first of
            the next, so that every token but the very first is predicted exactly once (the first
            tokens of documents never are), and an incomplete last row is padded.
    """

    def __init__(self, total, starts, document_bytes, document_sources, sources, sequence_length,
                 stride=None, pad_token_id=0):
        if sequence_length < 2:
            raise ValueError(f"sequence_length={sequence_length} must be at least 2")
        stride = sequence_length if stride is None else stride
        if stride not in (sequence_length, sequence_length - 1):
            raise ValueError(f"stride={stride} must be sequence_length={sequence_length} (training) "
                             f"or {sequence_length - 1} (evaluation)")
        self.total_tokens, self.sequence_length, self.stride = int(total), sequence_length, stride
        self.sources, self.pad_token_id = list(sources), pad_token_id
        self._starts, self._bytes, self._sources = starts, document_bytes, document_sources
        evaluation = stride == sequence_length - 1
        self._rows = -(-(self.total_tokens - 1) // stride) if evaluation else self.total_tokens // sequence_length
        if self._rows < 1:
            raise ValueError(f"the data has {self.total_tokens:,} tokens, fewer than one row of sequence_length="
                             f"{sequence_length}; lower sequence_length or add text")

    def tokens(self, begin, end):
        """Token ids in [begin, end) as an integer array."""
        raise NotImplementedError

    def __len__(self):
        return self._rows

    def _span(self, index):
        if not -self._rows <= index < self._rows:
            raise IndexError(f"row {index} of {self._rows}")
        begin = index % self._rows * self.stride
        return begin, min(begin + self.sequence_length, self.total_tokens)

    def __getitem__(self, index):
        begin, end = self._span(index)
        first, last = numpy.searchsorted(self._starts, [begin, end])
        starts = numpy.asarray(self._starts[first:last]) - begin
        return make_row(self.tokens(begin, end), starts, self.sequence_length, self.pad_token_id)

    def __getitems__(self, indices):
        """The same rows as one by one, made together, which takes a fraction of the time (the DataLoader calls it)."""
        spans = [self._span(index) for index in indices]
        if any(end - begin < self.sequence_length for begin, end in spans):
            return [self[index] for index in indices]  # the padded end of an evaluation
        length, bounds = self.sequence_length, numpy.searchsorted(self._starts, numpy.asarray(spans)).tolist()
        # One flat array for all rows: a row's first token is a first token, so nothing runs from row to row.
        edges = [numpy.arange(0, len(spans) * length, length)]
        edges += [self._starts[low:high] + (row * length - begin)
                  for row, ((begin, _), (low, high)) in enumerate(zip(spans, bounds))]
        edges, place = numpy.concatenate(edges), numpy.arange(len(spans) * length, dtype=numpy.int32)
        starts = numpy.zeros_like(place)
        starts[edges] = edges
        starts = numpy.maximum.accumulate(starts)
        input_ids = numpy.concatenate([self.tokens(*span) for span in spans]).astype(numpy.int64)
        labels = input_ids.copy()
        labels[edges] = IGNORED
        positions = numpy.subtract(place, starts, dtype=numpy.int64)
        batch = {"input_ids": input_ids, "labels": labels, "position_ids": positions}
        batch = {name: values.reshape(len(spans), length) for name, values in batch.items()}
        return RowBatch({name: torch.from_numpy(values) for name, values in batch.items()})

    def sources_of(self, index):
        """(S,) int16: index into `sources` of each token of a row, -1 where the label is -100.

        Entry i belongs to labels[i], that is to the loss of position i - 1.
        """
        begin, end = self._span(index)
        documents = numpy.searchsorted(self._starts, numpy.arange(begin, end), side="right") - 1
        result = numpy.full(self.sequence_length, -1, numpy.int16)
        result[:end - begin] = self._sources[documents]
        result[self[index]["labels"].numpy() == IGNORED] = -1
        return result

    def bytes_by_source(self):
        """{source: UTF-8 bytes of its documents}: what summed losses are divided by (`bits_per_byte`)."""
        totals = numpy.bincount(self._sources, weights=self._bytes, minlength=len(self.sources))
        return {name: int(total) for name, total in zip(self.sources, totals)}

    def documents(self):
        """Yield (tokens (N,), UTF-8 bytes of the text, source's name) of every document, in order."""
        ends = [*self._starts[1:].tolist(), self.total_tokens]
        for begin, end, size, source in zip(self._starts.tolist(), ends, self._bytes, self._sources):
            yield self.tokens(begin, end), int(size), self.sources[source]


class PackedArray(PackedRows):
    """Rows over documents encoded in memory (4 bytes a token)."""

    def __init__(self, texts, tokenizer, sequence_length, stride=None, source="text"):
        pieces, sizes, text_bytes = [], [], []
        texts = list(texts)
        for start in range(0, len(texts), 512):
            batch = texts[start:start + 512]
            for text, ids in zip(batch, encode_documents(tokenizer, batch)):
                pieces.append(numpy.asarray(ids, numpy.uint32))
                sizes.append(len(ids))
                text_bytes.append(len(text.encode("utf-8", "surrogatepass")))
        if not pieces:
            raise ValueError("the data set has no documents at all; check its location, split and text column")
        self._tokens = numpy.concatenate(pieces)
        starts = numpy.concatenate([[0], numpy.cumsum(sizes)[:-1]]).astype(numpy.int64)
        super().__init__(len(self._tokens), starts, numpy.asarray(text_bytes), numpy.zeros(len(sizes), numpy.int16),
                         [source], sequence_length, stride, tokenizer.pad_token_id or 0)

    def tokens(self, begin, end):
        return self._tokens[begin:end]


class PackedStream(IterableDataset):
    """Rows from a `datasets.IterableDataset`, in bounded memory: its shuffle buffer and one row.

    The same seed, epoch and number of data-loader workers give the same rows. Ranks: accelerate reads
    in one process and hands the batches out, so none is repeated. Workers: `datasets` gives each its
    own shards (files), which it packs by itself; with fewer shards than workers the others idle.
    The incomplete row at the end of an epoch (of each worker) is left out.
    """

    def __init__(self, dataset, tokenizer, sequence_length, text_column="text", seed=0, shuffle_buffer=1000):
        if sequence_length < 2:
            raise ValueError(f"sequence_length={sequence_length} must be at least 2")
        self._dataset = dataset.shuffle(seed=seed, buffer_size=shuffle_buffer) if shuffle_buffer else dataset
        self._tokenizer, self.sequence_length, self._column = tokenizer, sequence_length, text_column

    def set_epoch(self, epoch):
        """Another order for each epoch; the trainer calls it."""
        self._dataset.set_epoch(epoch)

    def _documents(self):
        batch, found = [], False
        for row in self._dataset:
            if self._column not in row:
                raise ValueError(f"the stream has no column {self._column!r}; columns present: {', '.join(row)}; "
                                 "name the right one with --text_column")
            if not isinstance(row[self._column], str):
                raise ValueError(f"column {self._column!r} holds a {type(row[self._column]).__name__}, expected text")
            if row[self._column].strip():
                batch, found = [*batch, row[self._column]], True
            if len(batch) == CHUNK:
                yield from encode_documents(self._tokenizer, batch)
                batch = []
        yield from encode_documents(self._tokenizer, batch) if batch else ()
        if not found and get_worker_info() is None:  # a worker may have no shard
            raise ValueError("the data set has no documents at all; check its location, split and text column")

    def __iter__(self):
        tokens, starts, rows = [], [], 0
        for ids in self._documents():
            starts.append(len(tokens))
            tokens += ids
            place = 0
            while len(tokens) - place >= self.sequence_length:
                end = place + self.sequence_length
                inside = [s - place for s in starts if place <= s < end]
                yield make_row(tokens[place:end], numpy.asarray(inside, int), self.sequence_length)
                place, rows = end, rows + 1
            if place:
                tokens, starts = tokens[place:], [s - place for s in starts if s >= place]
        if not rows and get_worker_info() is None:
            raise ValueError(f"the stream has {len(tokens):,} tokens, fewer than one row of sequence_length="
                             f"{self.sequence_length}; lower sequence_length or add text")


class PackingCollator:
    """Stacks rows into a batch of (B, S) int64 tensors.

    `position_ids` are left out when every row is a single document, so that the model takes its fast
    causal path; an `attention_mask` is kept only where it masks something.

    Args:
        same_keys: keep `position_ids` always: where one process reads the stream for all, batches are
            joined before they are sent, and what one of them lacks would be lost to the others.
    """

    def __init__(self, same_keys=False):
        self.same_keys = same_keys

    def __call__(self, rows):
        if isinstance(rows, RowBatch):
            batch = dict(rows.batch)
        else:
            batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]).long() for name in rows[0]}
        positions, mask = batch.get("position_ids"), batch.get("attention_mask")
        if not self.same_keys and positions is not None and (positions == torch.arange(positions.shape[1])).all():
            del batch["position_ids"]
        if mask is not None and mask.all():
            del batch["attention_mask"]
        return batch


class ExamplesCollator:
    """Packed rows of whole examples (TRL's `input_ids`, `labels`, `seq_lengths`) -> (B, S) int64 tensors.

    As `make_row` lays them out. TRL joins all rows to one instead, whose dense attention mask grows with the square
    of the whole batch. `token_mask` (B, S) bool marks what is no filling, where there is any; the filling is documents
    no longer than the longest row, so that its positions stay within the model's context.

    Args:
        multiple: S is the longest row rounded up to a multiple of this.
    """

    def __init__(self, pad_token_id, multiple=64):
        self.pad_token_id, self.multiple = pad_token_id, multiple

    def __call__(self, examples):
        longest = max(len(example["input_ids"]) for example in examples)
        length = -(-longest // self.multiple) * self.multiple
        rows = []
        for example in examples:
            ends = numpy.cumsum(example.get("seq_lengths") or [len(example["input_ids"])])
            starts = [*ends[:-1], *range(ends[-1], length, longest)]
            row = make_row(numpy.asarray(example["input_ids"]), starts, length, self.pad_token_id)
            labels = torch.full((length,), IGNORED)
            labels[: len(example["labels"])] = torch.as_tensor(example["labels"])
            rows.append(row | {"labels": labels.masked_fill(row["position_ids"] == 0, IGNORED)})
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        sizes = torch.tensor([len(example["input_ids"]) for example in examples])
        if (sizes < length).any():
            batch["token_mask"] = torch.arange(length) < sizes.unsqueeze(-1)
        return batch
