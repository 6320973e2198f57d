"""Local files in any state become documents or are counted: no silent loss, no unbounded memory."""

import csv
import errno
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("zstandard", reason="needs the extra `corpus`")
pytest.importorskip("resiliparse", reason="needs the extra `corpus`")

import zstandard

from data_scripts import fetch_files
from data_scripts.document_folder import DocumentWriter, read_documents, read_folder_manifest
from data_scripts.fetch_files import FileSource
from data_scripts.reading import local_files
from data_scripts.reading.local_files import ChangedWhileRead, FileReader, bounded_lines, json_values, walk
from data_scripts.reading.text_decoding import decoded_chunks, inspect_stream, pieces
from recipes.text_files import BadInput

CHINESE = "我们的生活充满阳光，经济建设取得了新的成就。北京今天下午天气晴朗。\n"
TAIWAN = "我們的生活充滿陽光，經濟建設取得了新的成就。臺北今天下午天氣晴朗。\n"
FRENCH = "L'été dernier, nous étions à la plage près d'une forêt où le garçon français mangeait déjà.\n"
RUSSIAN = "Сегодня в городе хорошая погода, и мы пошли гулять по парку.\n"
JAPANESE = "今日は天気がいいので、公園へ散歩に行きました。とても楽しかったです。\n"


def make(tmp_path, *locations, **options):
    FileSource("mine", [str(place) for place in locations], **options).make(tmp_path / "raw", say=lambda message: None)
    folder = tmp_path / "raw" / "mine"
    return list(read_documents(folder)), read_folder_manifest(folder)


@pytest.mark.parametrize("text, encoding", [
    (CHINESE, "utf-8"), (CHINESE, "gbk"), (CHINESE, "gb18030"), (TAIWAN, "big5"), (FRENCH, "latin-1"),
    (FRENCH, "cp1252"), (RUSSIAN, "cp1251"), (RUSSIAN, "koi8-r"), (JAPANESE, "shift_jis"), (JAPANESE, "euc_jp"),
    (FRENCH, "utf-16"), (CHINESE, "utf-16"),
    (FRENCH, "utf-16-le"), (FRENCH, "utf-16-be"), (FRENCH, "utf-8-sig"), (RUSSIAN, "utf-32")])
@pytest.mark.parametrize("prefix", ["", "Plain ASCII before it, more than a detector's sample.\n" * 10_000])
def test_every_encoding_gives_the_same_text(tmp_path, text, encoding, prefix):
    (tmp_path / "a.txt").write_bytes((prefix + text * 20).encode(encoding))
    documents, manifest = make(tmp_path, tmp_path / "a.txt", errors="strict")
    assert "".join(document["text"] for document in documents) == prefix + text * 20
    assert sum(manifest["decoded_files"].values()) == 1


def test_broken_bytes_and_null_bytes_are_mended_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes((FRENCH * 10).encode() + b"\xff\xfe broken \xc3 here\n" + (FRENCH * 10).encode())
    (tmp_path / "b.txt").write_bytes(b"a text\0 with\0 stray nulls " + b"and many words besides " * 100)
    documents, manifest = make(tmp_path, tmp_path / "a.txt", tmp_path / "b.txt")
    assert documents[0]["text"] == FRENCH * 10 + "\ufffd\ufffd broken \ufffd here\n" + FRENCH * 10
    assert documents[1]["text"] == "a text with stray nulls " + "and many words besides " * 100
    assert manifest["mended"] == {"null bytes removed": 2, "invalid bytes replaced (U+FFFD)": 3}
    assert manifest["decoded_files"] == {"utf-8 with errors": 1, "utf-8": 1}


def bad_folder(folder):
    folder.mkdir()
    (folder / "good.md").write_text("good words\n")
    (folder / "binary.txt").write_bytes(random.Random(0).randbytes(5_000))
    (folder / "image.txt").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(4_000))
    (folder / "empty.txt").write_bytes(b"")
    (folder / "blank.txt").write_text(" \n\n")
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1_000)[:-20])
    (folder / "cut.jsonl.zst").write_bytes(zstandard.compress(random.Random(0).randbytes(900).hex().encode())[:-300])
    (folder / "data.xyz").write_text("unknown")
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "rows.jsonl").write_text('{"text": "first"}\nnot json\n[1]\n{"text": 3}\n{"text": "last"}\n')
    return folder


def test_whatever_is_left_out_is_counted(tmp_path):
    documents, manifest = make(tmp_path, bad_folder(tmp_path / "in"))
    texts = [document["text"] for document in documents]
    assert texts == ["good words\n", "first", "last"]
    assert manifest["left_out"] == {"hidden": 1, "unknown ending": 1, "binary": 2, "empty": 1, "blank documents": 1,
                                    "damaged": 2, "unusable rows": 3}
    assert len(manifest["left_out_examples"]) == 8 and manifest["input_files"] == 8


@pytest.mark.parametrize("name", ["binary.txt", "empty.txt", "cut.jsonl.gz", "cut.jsonl.zst", "rows.jsonl"])
def test_strict_stops_at_the_first_and_leaves_nothing(tmp_path, name):
    path = bad_folder(tmp_path / "in") / name
    with pytest.raises(BadInput, match=f"{name}.*--errors skip"):
        make(tmp_path, path, errors="strict")
    assert not (tmp_path / "raw" / "mine").exists()


def test_links_loops_and_repetitions_are_met_once(tmp_path):
    root = tmp_path / "in"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "o.txt").write_text("outside")
    (root / "a.txt").write_text("one")
    os.link(root / "a.txt", root / "b.txt")
    (root / "sub" / "loop").symlink_to(root)
    (root / "self.txt").symlink_to("self.txt")
    (root / "gone.txt").symlink_to("nothing")
    (root / "out").symlink_to(tmp_path / "outside")
    os.mkfifo(root / "pipe.txt")
    left_out = Counter()
    assert [path.name for _, path in walk([root, root, root / "a.txt"], left_out)] == ["a.txt"]
    assert left_out == {"the same file again": 2, "folders met before": 1, "symbolic links": 2, "broken links": 2,
                        "devices and pipes": 1}
    left_out = Counter()
    assert [path.name for _, path in walk([root], left_out, follow_links=True)] == ["a.txt", "o.txt"]
    assert left_out["folders met before"] == 1 and left_out["broken links"] == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_without_permission_is_counted(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "b.txt").write_text("words")
    (tmp_path / "b.txt").chmod(0)
    assert make(tmp_path, tmp_path / "a.txt", tmp_path / "b.txt")[1]["left_out"] == {"unreadable (permission)": 1}


def test_a_file_that_may_not_be_opened_is_counted(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "b.txt").write_text("words")

    def refusing(stream):
        if stream.name.endswith("b.txt"):
            raise PermissionError(errno.EACCES, "denied")
        return inspect_stream(stream)

    monkeypatch.setattr(local_files, "inspect_stream", refusing)
    assert make(tmp_path, tmp_path / "a.txt", tmp_path / "b.txt")[1]["left_out"] == {"unreadable (permission)": 1}


@pytest.mark.parametrize("ending, unit", [("\n\n", "A paragraph, "), (" ", "words without line ends"), ("", "字")])
def test_pieces_lose_nothing_and_are_bounded(ending, unit):
    drawn = random.Random(0)
    text = "".join(unit * drawn.randrange(1, 40) + ending for _ in range(500))
    chunks, start = [], 0
    while start < len(text):
        chunks.append(text[start:start + drawn.randrange(1, 5_000)])
        start += len(chunks[-1])
    cut = list(pieces(chunks, 1_000))
    assert "".join(cut) == text and max(map(len, cut)) <= 1_000
    assert list(pieces([text], 1_000)) == cut, "the cut may not depend on how the text arrives"
    assert list(pieces(["short", " text"], 1_000)) == ["short text"]
    assert ending != "\n\n" or all(piece.endswith("\n\n") for piece in cut), "cut at blank lines where there are some"


def write_long_line(path, megabytes):
    with open(path, "wb") as file:
        for number in range(megabytes):
            file.write((f"{number:07d} " + "word " * 199_998 + "e.").encode()[:1_000_000])


LIMITED = """
import resource, sys
from data_scripts.reading.local_files import FileReader
from pathlib import Path
import hashlib, data_scripts.document_folder
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
digest, longest = hashlib.sha256(), 0
for _, text in FileReader().read(Path(sys.argv[1])):
    digest.update(text.encode())
    longest = max(longest, len(text))
print(digest.hexdigest(), longest, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("megabytes", [40, pytest.param(1_000, marks=pytest.mark.slow)])
def test_a_huge_single_line_takes_no_memory(tmp_path, megabytes):
    write_long_line(tmp_path / "a.txt", megabytes)
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path / "a.txt"], capture_output=True, text=True,
                          check=True)
    digest, longest, grown = done.stdout.split()
    with open(tmp_path / "a.txt", "rb") as file:
        assert digest == hashlib.file_digest(file, "sha256").hexdigest()
    assert int(longest) <= 20_000 and int(grown) < 24  # MiB


def test_a_huge_json_line_is_left_out_and_the_next_ones_read(tmp_path, monkeypatch):
    monkeypatch.setattr(local_files, "LONGEST_ROW", 1_000)
    monkeypatch.setattr(local_files, "bounded_lines", lambda chunks: bounded_lines(chunks, 1_000))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "' + "b" * 5_000 + '"}\n{"text": "c"}\n')
    documents, manifest = make(tmp_path, tmp_path / "a.jsonl")
    assert [document["text"] for document in documents] == ["a", "c"] and manifest["left_out"] == {"unusable rows": 1}


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_json_values_are_those_of_the_whole_parse(size):
    values = [{"text": "é\n" * 50, "n": [1, {"a": None}]}, 12, "x", [], {"text": ""}]
    for text in (json.dumps(values), json.dumps(values, indent=2), "\n".join(map(json.dumps, values[:1] + values[4:]))):
        chunks = [text[i:i + size] for i in range(0, len(text), size)]
        assert list(json_values(chunks)) == (values if text.startswith("[") else values[:1] + values[4:])
    with pytest.raises(BadInput, match="no JSON"):
        list(json_values(['{"text": "cut o']))
    with pytest.raises(BadInput, match="longer than 50"):
        list(json_values(['{"text": "' + "a" * 40] * 5, longest=50))


def test_tables_and_columns_and_compression(tmp_path):
    rows = [{"id": str(number), "body": f'line "{number}"\nof, text'} for number in range(3)]
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "body"])
        writer.writeheader()
        writer.writerows(rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(lines[:60]) + zstandard.compress(lines[60:]))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "d.json").write_text(json.dumps(rows, indent=1))
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "e.parquet")
    names = ("a.csv", "b.jsonl.zst", "c.jsonl.gz", "d.json", "e.parquet")
    documents, _ = make(tmp_path, *(tmp_path / name for name in names), column="body", errors="strict")
    assert [document["text"] for document in documents] == [row["body"] for row in rows] * 5
    with pytest.raises(ValueError, match="no column 'text'; columns present: id, body"):
        make(tmp_path, tmp_path / "b.jsonl.zst")


def test_halves_of_surrogates_and_escaped_nulls_can_be_written(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude00 \\u0000c"}\n')
    documents, manifest = make(tmp_path, tmp_path / "a.jsonl")
    assert documents[0]["text"] == "a\ufffdb 😀 c" and sum(manifest["mended"].values()) == 2


def test_changes_since_the_last_run_are_named_and_the_source_is_made_again(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "abc":
        (tmp_path / f"{name}.txt").rename(folder / f"{name}.txt")
    source, said = FileSource("mine", [str(folder)]), []
    assert source.make(tmp_path / "raw", say=said.append)[1] is True
    assert source.make(tmp_path / "raw", say=said.append)[1] is False
    os.utime(folder / "a.txt", ns=(0, 0))  # another time, the same bytes
    assert source.make(tmp_path / "raw", say=said.append)[1] is False and not said
    (folder / "a.txt").write_text("text A")
    (folder / "b.txt").unlink()
    (folder / "d.txt").write_text("new")
    manifest, made = source.make(tmp_path / "raw", say=said.append)
    assert made and "b.txt is gone" in said[0] and "d.txt is new" in said[0] and "a.txt has other content" in said[0]
    assert sorted(d["text"] for d in read_documents(tmp_path / "raw" / "mine")) == ["new", "text A", "text c"]
    sums = {Path(entry["path"]).name: entry["sha256"] for entry in manifest["inputs"]}
    assert sums["d.txt"] == hashlib.sha256(b"new").hexdigest()
    other = FileSource("mine", [str(folder)], longest=500)
    assert other.make(tmp_path / "raw", say=said.append)[1] is True and "settings was" in said[1]


def test_a_file_that_changes_while_it_is_read_stops_the_source(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("words and words\n" * 10_000)
    reader = FileReader(longest=1_000).read(path)
    next(reader)
    with open(path, "a") as file:
        file.write("more")
    with pytest.raises(ChangedWhileRead, match="160,000 bytes before, 160,004"):
        list(reader)


def test_a_full_disk_leaves_the_earlier_source_intact(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("first")
    first = make(tmp_path, tmp_path / "a.txt")[1]

    def full(self, *arguments, **metadata):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DocumentWriter, "write", full)
    (tmp_path / "a.txt").write_text("second")
    with pytest.raises(OSError, match="disk is full.*earlier data set is intact"):
        make(tmp_path, tmp_path / "a.txt")
    assert read_folder_manifest(tmp_path / "raw" / "mine", verify=True) == first
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["mine"]


def test_an_interrupted_run_goes_on_with_the_source_that_is_missing(tmp_path, monkeypatch, capsys):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    arguments = ["--output_dir", str(tmp_path / "raw"), "--source", f"a={tmp_path / 'a.txt'}",
                 "--source", f"b={tmp_path / 'b.txt'}", "--licence", "a=CC0-1.0"]
    make_one = FileSource.make

    def killed(self, *rest):
        if self.name == "b":
            raise KeyboardInterrupt
        return make_one(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(FileSource, "make", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch_files.main(arguments)
    fetch_files.main(arguments)
    output = capsys.readouterr().out
    assert "a                    was there" in output and "b                    made" in output
    manifest = read_folder_manifest(tmp_path / "raw" / "a")
    assert (manifest["kind"], manifest["licence"], manifest["source"]) == ("text", "CC0-1.0", "a")


@pytest.mark.parametrize("arguments, message", [
    (["--source", "a"], "--source 'a' must be NAME=VALUE"), (["--source", "A b=x.txt"], "a name is of a-z"),
    (["--source", "a=./nowhere.txt"], "does not exist"),
    (["--source", "a=README.md", "--kind", "a=poems"], "must be one of"),
    (["--source", "a=README.md", "--kind", "b=text"], "no --source"),
    (["--source", "a=README.md", "--longest", "3"], "at least 100")])
def test_wrong_options_exit_with_one_line(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        fetch_files.main(["--output_dir", str(tmp_path), *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_hub_name_that_cannot_be_reached_is_an_error(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(name):
        raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub, "dataset_info", offline)
    with pytest.raises(ValueError, match="'some/name' is no file here, and no Hub data set"):
        make(tmp_path, "some/name")


def test_a_saved_data_set_is_streamed(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["one", "two", ""]}).save_to_disk(str(tmp_path / "set"))
    documents, manifest = make(tmp_path, tmp_path / "set", kind="multilingual", languages=["de"])
    assert [document["text"] for document in documents] == ["one", "two"]
    assert documents[0]["metadata"]["language"] == "de" and manifest["packages"][0]["registry"] == "local"


def test_code_is_named_by_its_language(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.go", "b.py", "c.rs"):
        (tmp_path / "in" / name).write_text("code")
    documents, manifest = make(tmp_path, tmp_path / "in", kind="code")
    assert [document["metadata"]["language"] for document in documents] == ["go", "python", "rust"]
    assert manifest["languages"] == ["go", "python", "rust"]


def test_inspection_hashes_what_was_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(data := FRENCH.encode("cp1252") * 3)
    with open(tmp_path / "a.txt", "rb") as file:
        seen = inspect_stream(file)
    assert (seen.sha256, seen.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    with open(tmp_path / "a.txt", "rb") as file:
        assert "".join(decoded_chunks(file, seen)) == FRENCH * 3


@pytest.mark.parametrize("name, data, kept", [
    ("a.jsonl", b"[" * 200_000 + b'\n{"text": "fine"}\n', ["fine"]), ("a.json", b"[" * 200_000, []),
    ("a.jsonl", b'{"n": ' + b"1" * 5_000 + b'}\n{"text": "fine"}\n', ["fine"]),
    ("a.json", b'[{"text": "one"}, {"text": "two"},', ["one", "two"])])
def test_odd_json_is_counted(tmp_path, name, data, kept):
    (tmp_path / name).write_bytes(data)
    reader = FileReader()
    assert [text for _, text in reader.read(tmp_path / name)] == kept and sum(reader.left_out.values()) == 1


def test_names_languages_and_saved_sets(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(folder * 20)
    (tmp_path / "x" / os.fsdecode(b"b\xff.txt")).write_text("a name that is not UTF-8")
    places = [f"{tmp_path}/x/", tmp_path / "y" / "a.txt"]
    documents, _ = make(tmp_path, *places, languages=["en"])
    assert [document["id"] for document in documents] == ["mine/1/a.txt#0", "mine/1/b\ufffd.txt#0", "mine/2/a.txt#0"]
    documents, manifest = make(tmp_path, *places, languages=["de"])
    assert manifest["languages"] == ["de"] and documents[0]["metadata"]["language"] == "de"
    datasets = pytest.importorskip("datasets")
    for text in ("before", "afterwards"):
        datasets.Dataset.from_dict({"text": [text]}).save_to_disk(tmp_path / "set")
        assert [document["text"] for document in make(tmp_path, tmp_path / "set")[0]] == [text]
