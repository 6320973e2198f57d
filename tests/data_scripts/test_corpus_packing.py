import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import numpy
import pytest
from transformers import AutoTokenizer

from data_scripts import document_folder, overlap
from data_scripts.packing import corpus_documents, corpus_packing
from data_scripts.packing.corpus_packing import prepare_corpus
from data_scripts.packing.packed_writer import KeySet
from data_scripts.prepare_pretraining import main
from recipes.data import PackedTokens

WORDS = [f"word{i}" for i in range(3_000)]
SOURCES = {"prose": ("text", 120), "manual": ("text", 60), "c": ("code", 80), "verse": ("multilingual", 40),
           "sums": ("mathematics", 30)}


def sentences(rng, count):
    return " ".join(rng.choice(WORDS) for _ in range(count))


def any_text(rng):
    """Random Unicode: controls, unassigned, private, combining and right-to-left characters, marks of tokenizers."""
    ranges = [(0, 0x20), (0x20, 0x7F), (0x7F, 0xA0), (0xA0, 0x590), (0x590, 0xD800), (0xE000, 0x10000),
              (0x10000, 0x110000)]
    letters = (chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randint(1, 120)))
    return "".join(letters) + rng.choice(["", "\x00", "<｜end▁of▁sentence｜>", "\r\n\t", "\u2028", " "])


def write_corpus(folder, sources=SOURCES, shard_characters=3_000, difficulty=False):
    texts = {}
    for name, (kind, count) in sources.items():
        rng = random.Random(name)
        texts[name] = [f"{name} {sentences(rng, rng.randint(5, 60))}" for _ in range(count)]
        with document_folder.building(folder / name, source=name, kind=kind, languages=["en"], licence=f"{name}-1.0",
                                      origin="test", packages=[]) as writer:
            writer._limit = shard_characters
            for number, text in enumerate(texts[name]):
                extra = {"difficulty": float(number)} if difficulty else {}
                writer.write(text, f"{name}/{number}", path=f"{number}", language="en", **extra)
    return texts


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "clean"
    return folder, write_corpus(folder)


@pytest.fixture(scope="module")
def packed(corpus):
    folder = corpus[0].parent / "packed"
    manifest = prepare_corpus(folder, corpus[0], vocab_size=600, tokens_per_file=20_000, progress=False)
    return folder, manifest


OPTIONS = dict(vocab_size=400, validation_fraction=0, progress=False)


def read_back(folder, manifest, split="train"):
    """[(text, bytes, source)] by a plain reading of the format."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    documents = []
    for file in manifest["splits"][split]["files"]:
        tokens = numpy.fromfile(folder / file["name"], "<u2")
        for record in numpy.load(folder / file["documents_name"]):
            ids = tokens[record["start"]:record["start"] + record["tokens"]].tolist()
            assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
            documents.append((tokenizer.decode(ids[1:-1]), int(record["bytes"]), manifest["sources"][record["source"]]))
    return documents


def test_shares_by_kind_and_facts_of_the_sources(packed, corpus):
    folder, manifest = packed
    entry = manifest["splits"]["train"]
    by_kind = collections.Counter()
    for name, counts in entry["sources"].items():
        by_kind[manifest["kinds"][name]] += counts["tokens"]
    for kind, share in corpus_packing.DEFAULT_MIXTURE.items():
        assert by_kind[kind] / entry["tokens"] == pytest.approx(share / 100, abs=0.02)
    assert entry["sources"]["prose"]["epochs"] == pytest.approx(entry["sources"]["manual"]["epochs"], abs=0.02)
    assert all(0 < counts["epochs"] <= 4.01 for counts in entry["sources"].values())
    assert manifest["sources"] == sorted(SOURCES) and manifest["licences"]["verse"] == "verse-1.0"
    assert PackedTokens(folder, "train", 64).sources == manifest["sources"]
    for name, counts in manifest["splits"]["validation"]["sources"].items():
        assert counts["documents"] >= 1, name


def test_held_out_documents_are_not_trained_on(packed, corpus):
    train, held_out = (read_back(*packed, split) for split in ("train", "validation"))
    assert not {text for text, *_ in train} & {text for text, *_ in held_out}
    assert all(text in corpus[1][source] and size == len(text.encode()) for text, size, source in train + held_out)


def test_common_phrases_do_not_count_as_overlap(tmp_path):
    rng, licence, quoted = random.Random(3), sentences(random.Random(1), 20), sentences(random.Random(2), 20)
    texts = [f"{licence} {sentences(rng, 60)} {quoted if number < 8 else ''}" for number in range(200)]
    with document_folder.building(tmp_path / "clean" / "c", source="c", kind="code") as writer:
        for number, text in enumerate(texts):
            writer.write(text, str(number))
    first = {s: sorted(texts, key=lambda text: overlap.digest(text, s))[:12] for s in range(99)}
    seed = next(s for s, held_out in first.items() if any(quoted in text for text in held_out))
    manifest = prepare_corpus(tmp_path / "out", tmp_path / "clean", seed=seed, vocab_size=400, progress=False,
                              validation_fraction=0.2)
    held_out = [text for text, *_ in read_back(tmp_path / "out", manifest, "validation")]
    quoting = [text for text in texts if quoted in text]
    assert 0 < sum(text in held_out for text in quoting) < 8
    assert manifest["removed"]["overlaps"]["c"] == sum(text not in held_out for text in quoting)
    assert manifest["ngrams"]["too_common"] == 8              # 20 words are 8 windows of 13


def test_documents_repeat_only_after_all_of_their_source_was_read(packed):
    by_source = collections.defaultdict(list)
    for text, _, source in read_back(*packed):
        by_source[source].append(text)
    repeated = 0
    for name, texts in by_source.items():
        size = len(set(texts))
        for start in range(0, len(texts), size):
            part = texts[start:start + size]
            assert len(set(part)) == len(part), name
        if len(texts) >= 2 * size:
            repeated += 1
            assert texts[:size] != texts[size:2 * size], name  # another order
    assert repeated


@pytest.mark.parametrize("curriculum", ["none", pytest.param("difficulty", marks=pytest.mark.slow)])
def test_any_number_of_workers_gives_the_same_bytes(corpus, tmp_path, curriculum):
    options = dict(vocab_size=600, curriculum=curriculum, progress=False)
    one, two = (prepare_corpus(tmp_path / str(n), corpus[0], workers=n, **options) for n in (1, 2))
    assert one == two and one["splits"]["train"]["documents"] > 200
    other = prepare_corpus(tmp_path / "other", corpus[0], seed=1, **options)
    sums = [m["splits"]["train"]["files"][0]["sha256"] for m in (one, other)]
    assert sums[0] != sums[1]


def test_every_byte_reads_back(tmp_path):
    rng = random.Random(5)
    texts = [any_text(rng) for _ in range(300)]
    with document_folder.building(tmp_path / "clean" / "odd", source="odd", kind="text", languages=[], licence="",
                                  origin="", packages=[]) as writer:
        for number, text in enumerate(texts):
            writer.write(text, str(number), path="", language="")
    manifest = prepare_corpus(tmp_path / "out", tmp_path / "clean", **OPTIONS)
    documents = read_back(tmp_path / "out", manifest)
    removed = manifest["removed"]["duplicates"]["odd"]
    assert removed == 0 and sorted(text for text, *_ in documents) == sorted(texts)
    assert all(size == len(text.encode()) for text, size, _ in documents)


def test_curriculum_by_length_and_by_difficulty(tmp_path):
    write_corpus(tmp_path / "clean", {"prose": ("text", 150), "c": ("code", 150)}, difficulty=True)
    shares = {"text": 50, "code": 50}
    for curriculum in ("length", "difficulty"):
        manifest = prepare_corpus(tmp_path / curriculum, tmp_path / "clean", mixture_shares=shares,
                                  curriculum=curriculum, curriculum_window=0.0, max_epochs={None: 1.0}, **OPTIONS)
        assert manifest["curriculum"] == curriculum
        documents = read_back(tmp_path / curriculum, manifest)
        order = {name: [text for text, _, source in documents if source == name] for name in ("prose", "c")}
        if curriculum == "difficulty":
            place = {d["text"]: int(d["id"].split("/")[1]) for name in order
                     for d in document_folder.read_documents(tmp_path / "clean" / name)}
            assert all([place[t] for t in texts] == sorted(place[t] for t in texts) for texts in order.values())
        else:
            rows = PackedTokens(tmp_path / curriculum, "train", 16)
            lengths = collections.defaultdict(list)
            for ids, _, source in rows.documents():
                lengths[source].append(len(ids))
            assert all(values == sorted(values) for values in lengths.values())


def test_rare_words_are_difficult(tmp_path):
    rng = random.Random(0)
    common = [" ".join(rng.choice(WORDS[:20]) for _ in range(30)) for _ in range(100)]
    rare = [" ".join(rng.choice(WORDS[20:]) for _ in range(30)) for _ in range(20)]
    with document_folder.building(tmp_path / "clean" / "a", source="a", kind="text") as writer:
        for number, text in enumerate(rare + common):
            writer.write(text, str(number))
    manifest = prepare_corpus(tmp_path / "out", tmp_path / "clean", curriculum="difficulty", curriculum_window=0.0,
                              **OPTIONS)
    texts = [text for text, *_ in read_back(tmp_path / "out", manifest)]
    assert set(texts[-20:]) == set(rare) and set(texts[:100]) == set(common)


def test_mixture_that_cannot_be_met(corpus, tmp_path, caplog):
    options = OPTIONS | dict(max_epochs={None: 1.0}, max_tokens=50_000)
    with pytest.raises(ValueError, match="cannot be met: .*too few: the largest total that meets the mixture is"):
        prepare_corpus(tmp_path / "out", corpus[0], when_short="error", **options)
    assert [p.name for p in tmp_path.iterdir()] == []
    manifest = prepare_corpus(tmp_path / "out", corpus[0], **options)
    short = manifest["short_sources"]["multilingual"]
    assert short["wanted"] - short["available"] == short["missing"] > 0 and "the total is capped" in caplog.text
    assert manifest["splits"]["train"]["sources"]["verse"]["tokens"] <= short["available"]


@pytest.mark.slow
def test_a_killed_run_goes_on(corpus, tmp_path, monkeypatch):
    whole = prepare_corpus(tmp_path / "whole", corpus[0], vocab_size=600, progress=False)
    files = sum(len(document_folder.read_folder_manifest(corpus[0] / name)["files"]) for name in SOURCES)
    code = ("import os, signal; from data_scripts.packing import corpus_documents, corpus_packing\n"
            "save, calls = corpus_documents.packed_writer.save_array, []\n"
            "def killing(path, values):\n"
            "    save(path, values); calls.append(1)\n"
            f"    if len(calls) == {files} + 7: os.kill(os.getpid(), signal.SIGKILL)\n"
            "corpus_documents.packed_writer.save_array = killing\n"
            f"corpus_packing.prepare_corpus({str(tmp_path / 'out')!r}, {str(corpus[0])!r}, vocab_size=600, "
            "progress=False)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    (work,) = tmp_path.glob(".out.work-*")
    assert len(list(work.glob("*[0-9].npy"))) == 7 and (work / "tokenizer").is_dir()

    encoded, real = [], corpus_documents._chunks
    monkeypatch.setattr(corpus_documents, "_chunks", lambda documents: encoded.append(1) or real(documents))
    monkeypatch.setattr(corpus_packing, "train_tokenizer", None)
    assert prepare_corpus(tmp_path / "out", corpus[0], vocab_size=600, progress=False) == whole
    assert len(encoded) == files - 7 and not list(tmp_path.glob(".out*"))


def test_command_line(corpus, tmp_path, capsys):
    command = ["--output_dir", str(tmp_path / "out"), "--corpus", str(corpus[0]), "--vocab_size", "500"]
    main([*command, "--mixture", "text=40,text.manual=10,code=50", "--max_epochs", "3,manual=1", "--temperature", "2"])
    assert "manual" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    entry = manifest["splits"]["train"]
    assert entry["sources"]["manual"]["tokens"] / entry["tokens"] == pytest.approx(0.1, abs=0.02)
    for options, message in ((["--allow_repeats"], "--allow_repeats has no effect with --corpus; sources are repeated"),
                             (["--max_epochs", "nobody=1"], "max_epochs names 'nobody'"),
                             (["--temperature", "0"], "temperature=0.0 must be above 0"),
                             (["--mixture", "text=100,poems=0"], "must be above 0")):
        with pytest.raises(SystemExit) as caught:
            main([*command, *options])
        assert caught.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--output_dir", str(tmp_path / "out"), "--temperature", "2"])
    assert "--temperature needs --corpus" in capsys.readouterr().err


def test_unusable_corpora(corpus, tmp_path):
    with pytest.raises(ValueError, match="is no folder; make it with"):
        prepare_corpus(tmp_path / "out", tmp_path / "nowhere")
    (tmp_path / "clean" / "half").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no folder of documents"):
        prepare_corpus(tmp_path / "out", tmp_path / "clean")
    (tmp_path / "clean" / "half" / "documents-00000.jsonl.zst").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="half has no manifest.json, which is written last"):
        prepare_corpus(tmp_path / "out", tmp_path / "clean")
    shutil.rmtree(tmp_path / "clean")
    write_corpus(tmp_path / "clean", {"a,b=c": ("text", 2)})
    with pytest.raises(ValueError, match="source='a,b=c'; a name must consist of letters"):
        prepare_corpus(tmp_path / "out", tmp_path / "clean")


def test_a_source_with_nothing_held_out_or_nothing_taken(tmp_path, capsys, caplog):
    write_corpus(tmp_path / "clean", {"prose": ("text", 60), "single": ("text", 1), "rest": ("text", 60)})
    command = ["--corpus", str(tmp_path / "clean"), "--vocab_size", "400", "--output_dir"]
    main([*command, str(tmp_path / "out"), "--max_tokens", "100"])  # the first document of one source is enough
    shown, manifest = capsys.readouterr().out, json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["splits"]["validation"]["sources"]["single"]["tokens"] == 0
    assert 0 in [counts["tokens"] for counts in manifest["splits"]["train"]["sources"].values()]
    assert "single " in shown and "'single' has a single document, so none is held out" in caplog.text
    for name in ("prose", "rest"):
        shutil.rmtree(tmp_path / "clean" / name)
    main([*command, str(tmp_path / "one")])
    assert list(json.loads((tmp_path / "one" / "manifest.json").read_text())["splits"]) == ["train"]


def test_a_file_that_changed_is_refused(tmp_path):
    write_corpus(tmp_path / "clean", {"prose": ("text", 20)})
    path = tmp_path / "clean" / "prose" / "documents-00000.jsonl.zst"
    path.write_bytes(bytes(path.stat().st_size))  # of the size that the manifest says
    with pytest.raises(ValueError, match="documents-00000.jsonl.zst has another sha256 than manifest.json records"):
        prepare_corpus(tmp_path / "out", tmp_path / "clean", **OPTIONS)


@pytest.mark.parametrize("value", ["hard", None, True])
def test_a_difficulty_that_is_no_number_is_named(tmp_path, value):
    with document_folder.building(tmp_path / "clean" / "a", source="a", kind="text") as writer:
        writer.write("some text", "a/7", difficulty=value)
    with pytest.raises(ValueError, match=rf"document 'a/7' has difficulty={value!r} in its metadata"):
        prepare_corpus(tmp_path / "out", tmp_path / "clean", **OPTIONS)


def test_few_files_are_open_whatever_the_number_of_sources(tmp_path, monkeypatch):
    write_corpus(tmp_path / "clean", {name: ("text", 12) for name in "abcdef"}, shard_characters=1_000)
    before, most, real = len(os.listdir("/proc/self/fd")), [], os.pread
    monkeypatch.setattr(corpus_documents, "OPEN_FILES", 4)
    monkeypatch.setattr(os, "pread", lambda *a: most.append(len(os.listdir("/proc/self/fd"))) or real(*a))
    prepare_corpus(tmp_path / "out", tmp_path / "clean", **OPTIONS)
    assert len(most) == 72 and max(most) <= before + 8


def test_copies_of_a_held_out_document_go_however_many_there_are(tmp_path):
    rng, quoted = random.Random(4), sentences(random.Random(2), 60)
    texts = [f"{sentences(rng, 60)}" for _ in range(100)] + [f"{quoted} {sentences(rng, 10)}" for _ in range(30)]
    with document_folder.building(tmp_path / "clean" / "c", source="c", kind="text") as writer:
        for number, text in enumerate(texts):
            writer.write(text, str(number))
    manifest = prepare_corpus(tmp_path / "out", tmp_path / "clean", vocab_size=400, progress=False,
                              validation_fraction=0.2)
    train, held_out = ([text for text, *_ in read_back(tmp_path / "out", manifest, split)]
                       for split in ("train", "validation"))
    assert any(quoted in text for text in held_out) and not any(quoted in text for text in train)
    assert manifest["ngrams"]["too_common"] == 48 and len(set(train)) > 80


def test_enough_is_held_out_of_long_documents(tmp_path):
    rng = random.Random(6)
    with document_folder.building(tmp_path / "clean" / "c", source="c", kind="text") as writer:
        for number in range(60):
            writer.write(sentences(rng, 1_000 if number else 100), str(number))
    manifest = prepare_corpus(tmp_path / "out", tmp_path / "clean", vocab_size=400, progress=False)
    assert 20_000 <= manifest["splits"]["validation"]["bytes"] < 30_000


def test_key_set_is_a_set():
    rng, keys, reference = random.Random(0), KeySet(latest=64), set()
    for _ in range(5_000):
        key = rng.randrange(3_000) * (2**64 // 3_001)
        assert keys.add(key) == (key not in reference)
        reference.add(key)
    assert len(keys._sorted) < 8
