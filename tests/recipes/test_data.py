import json
import math
import pickle
import random
import shutil
from collections import Counter
from types import SimpleNamespace

import datasets
import numpy
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from data_scripts.prepare_pretraining import prepare
from data_scripts.train_tokenizer import train_tokenizer
from recipes.data import (
    PackedTokens,
    PackingCollator,
    bits_per_byte,
    check_vocabulary,
    is_packed_folder,
    load_pretraining_data,
    load_text_dataset,
    pack_texts,
    split_documents,
)
from recipes.encoding import encode_documents

S = 32


def some_texts(count, seed=0):
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(900)}" for _ in range(rng.randint(1, 30))) for _ in range(count)]


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A packed folder of two sources in several files."""
    root = tmp_path_factory.mktemp("packed")
    sources = {"a": str(write_lines(root / "a.jsonl", some_texts(300))),
               "b": str(write_lines(root / "b.jsonl", [f"b {text}" for text in some_texts(300, seed=1)]))}
    prepare(root / "out", sources=sources, mixture={"a": 70, "b": 30}, vocab_size=320, validation_fraction=0.1,
            tokens_per_file=3_000, progress=False)
    return root / "out"


@pytest.fixture(scope="module")
def tokenizer(packed):
    return AutoTokenizer.from_pretrained(packed / "tokenizer")


def plain(folder, split):
    """(tokens, starts, bytes, sources) of a split by a plain loop over the files."""
    manifest = json.loads((folder / "manifest.json").read_text())
    tokens, starts, sizes, sources = [], [], [], []
    for file in manifest["splits"][split]["files"]:
        for record in numpy.load(folder / file["documents_name"]):
            starts.append(len(tokens) + int(record["start"]))
            sizes.append(int(record["bytes"]))
            sources.append(int(record["source"]))
        tokens += numpy.fromfile(folder / file["name"], "<u2").tolist()
    return tokens, starts, sizes, sources


def plain_row(tokens, starts, begin, length):
    ids, labels, positions = [], [], []
    for place in range(begin, begin + length):
        fresh = place == begin or place in starts
        ids.append(tokens[place])
        labels.append(-100 if fresh else tokens[place])
        positions.append(0 if fresh else positions[-1] + 1)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def as_lists(row):
    assert all(values.dtype == torch.int64 for values in row.values())
    return {name: values.tolist() for name, values in row.items()}


def test_rows_equal_a_plain_loop_across_files(packed):
    tokens, starts, *_ = plain(packed, "train")
    data = PackedTokens(packed, "train", S)
    assert len(data.manifest["splits"]["train"]["files"]) > 2
    assert len(data) == len(tokens) // S
    places = set(starts)
    for index in range(len(data)):
        assert as_lists(data[index]) == plain_row(tokens, places, index * S, S)
    assert as_lists(data[-1]) == as_lists(data[len(data) - 1])
    with pytest.raises(IndexError):
        data[len(data)]


def test_nothing_is_predicted_across_a_document_edge(packed, tokenizer):
    data = PackedTokens(packed, "train", S)
    edges = 0
    for row in data:
        begins = row["input_ids"] == tokenizer.bos_token_id
        begins[0] = True
        assert (row["labels"][begins] == -100).all() and (row["position_ids"][begins] == 0).all()
        assert (row["labels"][~begins] == row["input_ids"][~begins]).all()
        assert (row["position_ids"][~begins] > 0).all()
        edges += int(begins.sum()) - 1
    assert edges > len(data) / 2


@pytest.mark.parametrize("length", [2, 7, S, 100_000])
def test_evaluation_predicts_every_token_once(packed, length):
    tokens, starts, sizes, sources = plain(packed, "validation")
    data = PackedTokens(packed, "validation", length, stride=length - 1)
    owner = numpy.searchsorted(starts, numpy.arange(len(tokens)), side="right") - 1
    predicted = numpy.zeros(len(tokens), int)
    for index in range(len(data)):
        row, row_sources = data[index], data.sources_of(index)
        assert row["input_ids"].shape == (length,) == row_sources.shape
        for place, label in enumerate(row["labels"].tolist()):
            target = index * (length - 1) + place
            if label == -100:
                assert row_sources[place] == -1
            else:
                assert label == tokens[target] and row_sources[place] == sources[owner[target]]
                predicted[target] += 1
    expected = numpy.ones(len(tokens), int)
    expected[starts] = 0  # the first token of a document is given
    assert (predicted == expected).all()
    by_source = [sum(size for size, source in zip(sizes, sources) if source == i) for i in (0, 1)]
    assert data.bytes_by_source() == dict(zip(("a", "b"), by_source))


def test_padding_of_the_last_row_is_a_document_without_labels(packed):
    data = PackedTokens(packed, "validation", S, stride=S - 1)
    count = (data.total_tokens - 1) - (len(data) - 1) * (S - 1) + 1
    assert count < S, "the fixture must end in a partial row"
    row = data[len(data) - 1]
    assert (row["labels"][count:] == -100).all()
    assert row["position_ids"][count:].tolist() == list(range(S - count))


def test_a_quick_evaluation_takes_whole_documents(packed):
    tokens, starts, sizes, _ = plain(packed, "validation")
    data = PackedTokens(packed, "validation", S, stride=S - 1, max_tokens=starts[5] + 1)
    assert data.total_tokens == starts[5] and sum(data.bytes_by_source().values()) == sum(sizes[:5])
    seen = [i for index in range(len(data)) for i in data[index]["input_ids"].tolist()[int(index > 0):]]
    assert seen[:starts[5]] == tokens[:starts[5]]


def test_bits_per_byte():
    assert bits_per_byte(math.log(256) * 10, 10) == pytest.approx(8)  # a uniform guess costs eight bits a byte
    with pytest.raises(ValueError, match="text_bytes=0"):
        bits_per_byte(1.0, 0)


def test_workers_reopen_the_files(packed):
    data = PackedTokens(packed, "train", S)
    dumped = pickle.dumps(data)
    assert len(dumped) < 2 * data.total_tokens + 40 * len(data._starts)
    assert as_lists(pickle.loads(dumped)[3]) == as_lists(data[3])
    loader = DataLoader(data, batch_size=4, num_workers=1, collate_fn=PackingCollator())
    assert next(iter(loader))["input_ids"].tolist() == [data[i]["input_ids"].tolist() for i in range(4)]


def test_collator_leaves_out_what_the_model_need_not_see(tokenizer):
    def rows(texts):
        data = pack_texts(datasets.Dataset.from_dict({"text": texts}), tokenizer, 8, shuffle=False)
        return [data[i] for i in range(len(data))]
    single, packed_rows = rows(["x" * 100])[:2], rows(["ab"] * 20)[:2]
    assert set(PackingCollator()(single)) == {"input_ids", "labels"}
    batch = PackingCollator()([*single, *packed_rows])
    assert set(batch) == {"input_ids", "labels", "position_ids"} and batch["position_ids"].shape == (4, 8)
    padded = [{**row, "attention_mask": torch.tensor([1] * 7 + [int(i)])} for i, row in enumerate(single)]
    assert "attention_mask" in PackingCollator()(padded)
    assert "attention_mask" not in PackingCollator()(padded[1:])


def test_texts_in_memory_and_streamed_give_the_same_rows(tokenizer):
    texts = [*some_texts(200), " ", "long " * 300]
    tokens = [i for ids in encode_documents(tokenizer, [t for t in texts if t.strip()]) for i in ids]
    dataset = datasets.Dataset.from_dict({"text": texts})
    memory = pack_texts(dataset, tokenizer, S, shuffle=False)
    stream = pack_texts(dataset.to_iterable_dataset(), tokenizer, S, shuffle=False)
    rows = [as_lists(row) for row in stream]
    assert rows == [as_lists(memory[i]) for i in range(len(memory))]
    assert [i for row in rows for i in row["input_ids"]] == tokens[:len(tokens) // S * S]
    assert sum(memory.bytes_by_source().values()) == sum(len(t.encode()) for t in texts if t.strip())


def test_stream_is_deterministic_by_seed_and_epoch_and_repeats_nothing_with_workers(tokenizer):
    dataset = datasets.Dataset.from_dict({"text": some_texts(300)})

    def rows(seed, epoch=0, workers=0, shards=4):
        stream = pack_texts(dataset.to_iterable_dataset(num_shards=shards), tokenizer, S, seed=seed, shuffle_buffer=50)
        stream.set_epoch(epoch)
        loader = DataLoader(stream, batch_size=1, num_workers=workers, collate_fn=PackingCollator())
        return [tuple(batch["input_ids"].flatten().tolist()) for batch in loader]
    first = rows(1)
    assert first == rows(1) and first != rows(2) and first != rows(1, epoch=1)
    everything = Counter(i for ids in encode_documents(tokenizer, some_texts(300)) for i in ids)
    for shards in (4, 1):  # more workers than shards: the others idle
        read = Counter(i for row in rows(1, workers=2, shards=shards) for i in row)
        assert read <= everything and (everything - read).total() < min(2, shards) * S


def test_split_by_documents(tokenizer):
    texts = some_texts(400)
    texts += texts[:100]  # repeated ones must fall on one side
    dataset = datasets.Dataset.from_dict({"text": texts})
    train, held_out = split_documents(dataset, 0.1)
    assert 0.05 * 500 < len(held_out) < 0.2 * 500 and len(train) + len(held_out) == 500
    assert not set(train["text"]) & set(held_out["text"])
    stream, held_out_of_stream = split_documents(dataset.to_iterable_dataset(), 0.1)
    assert held_out_of_stream["text"][:] == held_out["text"][:]
    assert [row["text"] for row in stream] == train["text"][:]
    with pytest.raises(ValueError, match="1 distinct documents, so none can be held out"):
        split_documents(datasets.Dataset.from_dict({"text": ["x", "x "]}), 0.1)


@pytest.mark.parametrize("streaming", [False, True])
def test_load_from_files(tokenizer, tmp_path, streaming):
    location = write_lines(tmp_path / "texts.jsonl", some_texts(200))
    train, validation, info = load_pretraining_data(location, tokenizer, S, streaming=streaming,
                                                    validation_fraction=0.1)
    assert info["kind"] == ("stream" if streaming else "texts")
    assert validation.stride == S - 1 and info["validation_tokens"] == validation.total_tokens > 0
    total = sum(map(len, encode_documents(tokenizer, some_texts(200))))
    rows = list(train) if streaming else [train[i] for i in range(len(train))]
    assert total - validation.total_tokens - S < len(rows) * S <= total - validation.total_tokens
    assert load_pretraining_data(location, tokenizer, S, streaming=streaming, validation_fraction=0)[1] is None


def test_load_packed_and_validation_files(packed, tokenizer, tmp_path):
    train, validation, info = load_pretraining_data(str(packed), tokenizer, S)
    assert (info["kind"], info["sources"]) == ("packed", ["a", "b"])
    assert info["train_tokens"] == train.total_tokens and validation.stride == S - 1
    write_lines(tmp_path / "train.jsonl", some_texts(50))
    write_lines(tmp_path / "validation.jsonl", ["held out " * 30])
    train, validation, _ = load_pretraining_data(tmp_path, tokenizer, S)
    assert validation.total_tokens == len(encode_documents(tokenizer, ["held out " * 30])[0])
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": some_texts(50)})})
    saved.save_to_disk(tmp_path / "disk")
    again, validation, _ = load_pretraining_data(tmp_path / "disk", tokenizer, S, validation_fraction=0)
    assert again.total_tokens == train.total_tokens and validation is None


def test_hub_name_goes_to_load_dataset(tokenizer, monkeypatch):
    def load_dataset(path, configuration, split, streaming):  # stands in for the network
        assert (path, configuration, split) == ("someone/corpus", "en", "train")
        data = datasets.Dataset.from_dict({"content": some_texts(60)})
        return data.to_iterable_dataset() if streaming else data
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train"])
    for streaming in (False, True):
        train, validation, _ = load_pretraining_data("someone/corpus:en", tokenizer, S, text_column="content",
                                                     streaming=streaming, validation_fraction=0.1)
        assert next(iter(train))["input_ids"].shape == (S,) and len(validation) > 0
    with pytest.raises(ValueError, match="no column 'text'; columns present: content.*--text_column"):
        load_pretraining_data("someone/corpus:en", tokenizer, S)


def test_vocabulary_checks(packed, tokenizer):
    check_vocabulary(tokenizer, SimpleNamespace(vocab_size=320))
    with pytest.raises(ValueError, match=r"ids up to 319 \(320 rows.*vocab_size=319; set vocab_size to at least 320"):
        check_vocabulary(tokenizer, SimpleNamespace(vocab_size=319))
    PackedTokens(packed, "train", S, vocab_size=320)
    with pytest.raises(ValueError, match="token ids up to 319, the model's vocab_size=300"):
        PackedTokens(packed, "train", S, vocab_size=300)
    with pytest.raises(ValueError, match="tokenised with another vocabulary"):
        load_pretraining_data(packed, train_tokenizer(["other text"], 330), S)


def test_damaged_folders(packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "copy")
    path = folder / "train-00001.bin"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"train-00001\.bin is [\d,]+ bytes, the manifest says [\d,]+.*incomplete"):
        PackedTokens(folder, "train", S)
    path.unlink()
    with pytest.raises(ValueError, match=r"train-00001\.bin is missing"):
        PackedTokens(folder, "train", S)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no manifest.json, which is written last"):
        is_packed_folder(folder)


@pytest.mark.parametrize("options, message", [
    (dict(split="test"), "has no split 'test'; it has train, validation"),
    (dict(sequence_length=1), "sequence_length=1 must be at least 2"),
    (dict(stride=5), "stride=5 must be sequence_length=32"),
    (dict(sequence_length=10_000_000), "fewer than one row of sequence_length=10000000; lower"),
])
def test_impossible_requests(packed, options, message):
    with pytest.raises(ValueError, match=message):
        PackedTokens(packed, **{"split": "train", "sequence_length": S, **options})


def test_texts_that_cannot_be_packed(tokenizer, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"bad\.txt is not UTF-8: byte 0xff at offset 3"):
        load_pretraining_data(tmp_path, tokenizer, S)
    with pytest.raises(ValueError, match=r"bad\.txt is not UTF-8"):
        list(load_text_dataset(tmp_path, streaming=True))
    blank = datasets.Dataset.from_dict({"text": [" "]})
    for dataset in (blank, blank.to_iterable_dataset()):
        with pytest.raises(ValueError, match="no documents at all"):
            list(pack_texts(dataset, tokenizer, S))
    few = datasets.Dataset.from_dict({"text": ["few"]})
    for dataset in (few, few.to_iterable_dataset()):
        with pytest.raises(ValueError, match="tokens, fewer than one row of sequence_length=32"):
            list(pack_texts(dataset, tokenizer, S))
    with pytest.raises(ValueError, match=r"has no eos_token_id.*set tokenizer.eos_token"):
        encode_documents(SimpleNamespace(bos_token_id=0, eos_token_id=None, name_or_path="x"), ["a"])


def test_a_truncated_gzip_file_is_named(tmp_path):
    import gzip

    path = tmp_path / "documents.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"text": "words " * 500}).encode())[:-20])
    with pytest.raises(ValueError, match=r"documents\.jsonl\.gz is damaged"):
        list(load_text_dataset(str(path))["text"])
