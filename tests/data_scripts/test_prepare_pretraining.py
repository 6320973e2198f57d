import errno
import json
import os
import random
import re

import numpy
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_scripts import prepare_pretraining
from data_scripts.overlap import NgramIndex, digest
from data_scripts.packing import packed_writer
from data_scripts.packing.packed_writer import file_sha256
from data_scripts.prepare_pretraining import main, parse_mixture, prepare

WORDS = [f"word{i}" for i in range(5_000)]


def sentences(rng, count=40):
    return " ".join(rng.choice(WORDS) for _ in range(count))


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def read_back(folder, manifest, split):
    """[(ids, bytes, source name)] of every document, by a plain reading of the format."""
    documents = []
    for file in manifest["splits"][split]["files"]:
        tokens = numpy.fromfile(folder / file["name"], "<u2")
        assert len(tokens) == file["tokens"]
        for record in numpy.load(folder / file["documents_name"]):
            ids = tokens[record["start"]:record["start"] + record["tokens"]].tolist()
            documents.append((ids, int(record["bytes"]), manifest["sources"][record["source"]]))
    return documents


def grams(text):
    """The n-grams of the overlap rule, written a second time as plain sets."""
    text = text.lower()
    words = re.findall(r"[^\W_\u3040-\u30ff\u3400-\u9fff]+", text)
    characters = re.findall(r"[\u3040-\u30ff\u3400-\u9fff]", text)
    return ({tuple(words[i:i + 13]) for i in range(len(words) - 12)}
            | {"".join(characters[i:i + 30]) for i in range(len(characters) - 29)})


@pytest.mark.parametrize("split, tolerance", [("train", 0.02), ("validation", 0.06)])
def test_mixture_shares(built_in, split, tolerance):
    # Held-out tokens are few, so one long document weighs more there.
    _, manifest = built_in
    entry = manifest["splits"][split]
    for kind, share in {"text": 0.6, "code": 0.2, "multilingual": 0.15, "mathematics": 0.05}.items():
        assert abs(entry["sources"][kind]["tokens"] / entry["tokens"] - share) < tolerance


def test_sources_are_interleaved_homogeneously(built_in):
    folder, manifest = built_in
    documents = read_back(folder, manifest, "train")
    half = sum(len(ids) for ids, *_ in documents) / 2
    seen, first_half = 0, dict.fromkeys(manifest["sources"], 0)
    for ids, _, source in documents:
        seen += len(ids)
        if seen <= half:
            first_half[source] += len(ids)
    for kind, share in manifest["arguments"]["mixture"].items():
        assert abs(first_half[kind] / half - share / 100) < 0.05


def test_no_training_document_overlaps_a_held_out_one(built_in):
    folder, manifest = built_in
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    train = [tokenizer.decode(ids[1:-1]) for ids, *_ in read_back(folder, manifest, "train")]
    held_out = [tokenizer.decode(ids[1:-1]) for ids, *_ in read_back(folder, manifest, "validation")]
    assert not set(train) & set(held_out)
    forbidden = set().union(*map(grams, held_out))
    assert len(forbidden) > 5_000
    assert not [text for text in train if grams(text) & forbidden]


def test_planted_duplicates_and_near_duplicates(tmp_path):
    rng = random.Random(1)
    texts = [sentences(rng) for _ in range(120)]
    exact = [text.upper() for text in texts[:30]]                               # equal once normalised
    # 20 words quoted from each
    near = [f"{sentences(rng, 10)} {' '.join(t.split()[5:25])}!" for t in texts]
    chinese = ["".join(chr(0x4E00 + rng.randrange(2_000)) for _ in range(80)) for _ in range(60)]
    near_chinese = [f"{c[10:30]}，{c[30:50]}" for c in chinese]                  # 40 characters, new punctuation
    location = write_lines(tmp_path / "mine.jsonl", texts + exact + near + chinese + near_chinese)
    manifest = prepare(tmp_path / "out", sources={"mine": location}, vocab_size=400, validation_fraction=0.15,
                       progress=False)
    assert manifest["removed"]["duplicates"] == {"mine": 30}
    held_out = manifest["splits"]["validation"]["documents"]
    assert held_out > 20 and manifest["removed"]["overlaps"]["mine"] >= held_out / 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    decoded = {split: [tokenizer.decode(ids[1:-1]) for ids, *_ in read_back(tmp_path / "out", manifest, split)]
               for split in ("train", "validation")}
    forbidden = set().union(*map(grams, decoded["validation"]))
    assert forbidden and not [text for text in decoded["train"] if grams(text) & forbidden]


def test_documents_that_share_wordings_by_construction_are_kept(tmp_path):
    """`keep_overlaps`: neither dropped nor a reason to drop; the other source is compared as before."""
    rng, stem = random.Random(3), " ".join(WORDS[:14])
    worked = write_lines(tmp_path / "worked.jsonl", [f"{stem} {sentences(rng, 6)}" for _ in range(200)])
    mine = [sentences(rng) for _ in range(150)]
    mine = write_lines(tmp_path / "mine.jsonl", mine + [text + " tail" for text in mine])
    settings = {"sources": {"worked": worked, "mine": mine}, "mixture": {"worked": 30, "mine": 70}, "vocab_size": 400,
                "validation_fraction": 0.1, "progress": False}  # fmt: skip
    with pytest.raises(ValueError, match="source 'worked': all .* share an n-gram with a held-out one"):
        prepare(tmp_path / "all", **settings)
    manifest = prepare(tmp_path / "kept", keep_overlaps=["worked"], **settings)
    assert manifest["removed"]["overlaps"]["worked"] == 0 < manifest["removed"]["overlaps"]["mine"]
    assert manifest["splits"]["validation"]["sources"]["worked"]["documents"] > 0
    with pytest.raises(ValueError, match="keep_overlaps names 'wroked', which has no share in mixture worked=30"):
        prepare(tmp_path / "no", keep_overlaps=["wroked"], **settings)


def test_overlap_needs_thirteen_words():
    index = NgramIndex()
    index.add(" ".join(WORDS[:40]))
    assert index.overlaps("x " + ", ".join(WORDS[7:20]).upper() + " y")
    assert not index.overlaps(" ".join(WORDS[7:19]))
    assert not index.overlaps(" ".join([*WORDS[7:19], "other", *WORDS[20:32]]))
    assert not NgramIndex().overlaps(" ".join(WORDS[:40]))
    assert digest("A  b\n") == digest("a b") != digest("a c")
    assert digest("a b", 1) != digest("a b", 2)


def test_every_byte_of_kept_documents_reads_back(tmp_path):
    rng = random.Random(2)
    texts = [f"{sentences(rng, 30)}\r\n\t{chr(rng.randrange(0x100, 0xD000))} €  <｜end▁of▁sentence｜>\x00"
             for _ in range(50)]
    location = write_lines(tmp_path / "mine.jsonl", texts)
    manifest = prepare(tmp_path / "out", sources={"mine": location}, vocab_size=300, validation_fraction=0.1,
                       tokens_per_file=2_000, progress=False)
    assert len(manifest["splits"]["train"]["files"]) > 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    documents = read_back(tmp_path / "out", manifest, "train") + read_back(tmp_path / "out", manifest, "validation")
    assert all((ids[0], ids[-1]) == (0, 1) and not {0, 1, 2} & set(ids[1:-1]) for ids, *_ in documents)
    decoded = [tokenizer.decode(ids[1:-1]) for ids, *_ in documents]
    assert sorted(decoded) == sorted(texts)
    assert [size for _, size, _ in documents] == [len(text.encode()) for text in decoded]


def test_manifest_describes_the_files(built_in):
    folder, manifest = built_in
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    assert list(manifest["licences"]) == list(manifest["locations"]) == manifest["sources"]
    assert manifest["format"] == "packed-tokens" and manifest["version"] == 1 and manifest["dtype"] == "uint16"
    for entry in manifest["splits"].values():
        for file in entry["files"]:
            assert file_sha256(folder / file["name"]) == file["sha256"]
            records = numpy.load(folder / file["documents_name"])
            assert records.dtype == packed_writer.DOCUMENT
            assert (records["start"] == numpy.cumsum(records["tokens"]) - records["tokens"]).all()
        assert entry["tokens"] == sum(file["tokens"] for file in entry["files"])
    assert {p.name for p in folder.parent.iterdir()} == {"built_in"}  # nothing hidden is left beside it


def test_second_call_does_no_work_and_the_same_seed_gives_the_same_bytes(tmp_path, monkeypatch):
    location = write_lines(tmp_path / "mine.jsonl", [sentences(random.Random(i)) for i in range(60)])
    settings = dict(sources={"mine": location}, vocab_size=300, validation_fraction=0.1, progress=False)
    manifest = prepare(tmp_path / "one", **settings)
    again, other = prepare(tmp_path / "two", **settings), prepare(tmp_path / "three", seed=1, **settings)
    assert again == manifest
    assert other["splits"]["train"]["files"][0]["sha256"] != manifest["splits"]["train"]["files"][0]["sha256"]

    calls = []
    monkeypatch.setattr(prepare_pretraining, "_build", lambda *a: calls.append(a) or build(*a))
    assert prepare(tmp_path / "one", **settings) == manifest and not calls
    # A damaged file, other settings or a changed input are made again.
    path = tmp_path / "one" / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\x07\x00")
    assert prepare(tmp_path / "one", **settings) == manifest and len(calls) == 1
    prepare(tmp_path / "one", **settings | {"vocab_size": 310})
    os.utime(location, ns=(1, 1))
    prepare(tmp_path / "one", **settings)
    assert len(calls) == 3


build = prepare_pretraining._build


@pytest.mark.parametrize("earlier", [False, True])
def test_full_disk_is_reported_and_the_earlier_data_set_stays(tmp_path, monkeypatch, earlier):
    location = write_lines(tmp_path / "mine.jsonl", [sentences(random.Random(i)) for i in range(60)])
    settings = dict(sources={"mine": location}, vocab_size=300, validation_fraction=0.1, progress=False)
    out = tmp_path / "data" / "out"
    manifest = prepare(out, **settings) if earlier else None

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(packed_writer.os, "fsync", full)
        with pytest.raises(OSError, match=r"the disk is full: [\d,]+ bytes of .*Free space there") as caught:
            prepare(out, seed=5, **settings)
    assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in out.parent.iterdir()] == (["out"] if earlier else [])
    if earlier:
        monkeypatch.setattr(prepare_pretraining, "_build", None)  # would fail if anything had to be made again
        assert prepare(out, **settings) == manifest


def test_a_kill_between_the_two_renames_is_mended(tmp_path):
    old, partial = tmp_path / ".out.old", tmp_path / ".out.partial-999999999"
    old.mkdir()
    partial.mkdir()
    (old / "manifest.json").write_text("{}")
    with pytest.raises(RuntimeError), packed_writer.build_beside(tmp_path / "out"):
        raise RuntimeError
    assert (tmp_path / "out" / "manifest.json").is_file() and not partial.exists() and not old.exists()


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"holds thesis\.txt, which is no part of a packed data set"):
        prepare(tmp_path, max_tokens=1_000, progress=False)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_short_source_caps_the_total_or_is_repeated(tmp_path, caplog):
    sources = {}
    for kind, count in (("long", 200), ("short", 10)):
        texts = [f"{kind}{sentences(random.Random(kind + str(i)))}" for i in range(count)]
        sources[kind] = write_lines(tmp_path / f"{kind}.jsonl", texts)
    settings = dict(sources=sources, mixture={"long": 50, "short": 50}, vocab_size=400, max_tokens=12_000,
                    validation_fraction=0, progress=False)
    capped = prepare(tmp_path / "capped", **settings)
    short = capped["short_sources"]["short"]
    assert short["wanted"] == 6_000 and list(capped["short_sources"]) == ["short"]
    assert capped["splits"]["train"]["sources"]["short"]["tokens"] == short["available"] < 4_000
    assert capped["splits"]["train"]["tokens"] < 2.2 * short["available"]
    missing = 6_000 - short["available"]
    assert f"'short' has {short['available']:,} of 6,000 tokens wanted, {missing:,} too few" in caplog.text
    repeated = prepare(tmp_path / "repeated", allow_repeats=True, **settings)
    assert 12_000 <= repeated["splits"]["train"]["tokens"] < 12_600
    assert repeated["splits"]["train"]["sources"]["short"]["epochs"] > 1.5


def test_epochs_are_of_the_whole_source(tmp_path):
    location = write_lines(tmp_path / "mine.jsonl", [sentences(random.Random(i), 10) for i in range(600)])
    manifest = prepare(tmp_path / "out", sources={"mine": location}, vocab_size=300, validation_fraction=0,
                       max_tokens=8_000, progress=False)
    counts = manifest["splits"]["train"]["sources"]["mine"]
    assert counts["documents"] < 400
    assert counts["epochs"] == pytest.approx(counts["documents"] / 600, abs=1e-4)  # 512 were encoded


@pytest.mark.parametrize("options, message", [
    (dict(mixture={"text": 60, "code": 30}), r"text=60,code=30 sums to 90, must be 100"),
    (dict(mixture={"text": 100, "code": 0}), "every share must be above 0"),
    (dict(mixture={"text": 100}, sources={"mine": "x"}), "'mine' has no share in mixture"),
    (dict(sources={"a": "x", "b": "y"}), "pass --mixture, for instance a=50,b=50"),
    (dict(mixture={"a/b": 100}), "source name 'a/b' must consist of"),
    (dict(mixture={"poems": 100}), "'poems' is not built in"),
    (dict(validation_fraction=0.7), r"validation_fraction=0.7 must lie in \[0, 0.5\)"),
    (dict(size="nano", allow_repeats=True), "allow_repeats needs max_tokens"),
    (dict(vocab_size=10, max_tokens=1_000, mixture={"mathematics": 100}), "vocab_size=10 must be at least 276"),
    (dict(size="huge"), "size='huge' is unknown; known sizes are tiny, nano"),
])
def test_impossible_settings(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out").exists()


def test_unusable_input(tmp_path):
    blank = write_lines(tmp_path / "blank.jsonl", [" ", "\n"])
    with pytest.raises(ValueError, match=r"source 'mine' .* gave no documents at all"):
        prepare(tmp_path / "out", sources={"mine": blank}, progress=False)
    single = write_lines(tmp_path / "single.jsonl", ["only one"])
    with pytest.raises(ValueError, match=r"single document, so none can be held out.*--validation_fraction 0"):
        prepare(tmp_path / "out", sources={"mine": single}, progress=False)
    same = write_lines(tmp_path / "same.jsonl", [" ".join(WORDS[:20]) + f" {i}" for i in range(20)])
    with pytest.raises(ValueError, match=r"all \d+ training documents share an n-gram"):
        prepare(tmp_path / "out", sources={"mine": same}, progress=False)


def test_command_line(tmp_path, capsys):
    with pytest.raises(ValueError, match="'code' is not NAME=PERCENT"):
        parse_mixture("text=60,code")
    with pytest.raises(ValueError, match="names 'text' twice"):
        parse_mixture("text=50,code=50,text=50")
    with pytest.raises(SystemExit):
        main(["--output_dir", str(tmp_path / "out"), "--source", "mine=a.txt", "--source", "mine=b.txt"])
    assert "two --source have one name" in capsys.readouterr().err
    (tmp_path / "bad.txt").write_bytes(b"\xff\xff")
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(sentences(random.Random(number)))
    command = ["--output_dir", str(tmp_path / "out"), "--source", f"mine={tmp_path}", "--vocab_size", "300"]
    with pytest.raises(SystemExit):
        main(command)
    assert "bad.txt is not UTF-8: byte 0xff at offset 0" in capsys.readouterr().err
    main([*command, "--errors", "skip"])
    assert "removed as skipped: mine 1" in capsys.readouterr().out


def test_given_tokenizer_is_kept_and_wide_vocabularies_use_uint32(tmp_path):
    names = ["<s>", "</s>", *WORDS, *(f"fill{i}" for i in range(65_000)), "last"]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wide = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    wide.save_pretrained(tmp_path / "wide")
    location = write_lines(tmp_path / "mine.jsonl", [f"{sentences(random.Random(i))} last" for i in range(20)])
    manifest = prepare(tmp_path / "out", sources={"mine": location}, tokenizer_folder=tmp_path / "wide",
                       progress=False)
    assert manifest["dtype"] == "uint32" and manifest["vocab_size"] == len(names)
    tokens = numpy.fromfile(tmp_path / "out" / "train-00000.bin", "<u4")
    assert tokens[0] == 0 and tokens[-2] == len(names) - 1 and tokens[-1] == 1
    given, kept = ((tmp_path / folder / "tokenizer.json").read_bytes() for folder in ("wide", "out/tokenizer"))
    assert given == kept
