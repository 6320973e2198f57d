"""From a folder of files to a packed set and its page, by the commands that the README gives."""

import json
import random

import pytest

from data_scripts import (
    clean_corpus,
    compare_tokenizers,
    corpus_report,
    fetch_files,
    packed_archive,
    prepare_pretraining,
    train_tokenizer,
)
from recipes.data import PackedTokens

pytest.importorskip("datatrove")
WORDS = ("the old garden wall stood behind our house and every spring small yellow flowers grew between its stones "
         "while birds came to drink from a shallow bowl that somebody had left there many years ago").split()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root, draw = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for source, count in (("letters", 60), ("notes", 40)):
        (root / source).mkdir()
        for number in range(count):
            text = " ".join(draw.choice(WORDS) for _ in range(120)) + f" {source} {number}.\n"
            (root / source / f"{number:03}.txt").write_text(text)
    (root / "notes" / "again.txt").write_text((root / "letters" / "000.txt").read_text())
    (root / "notes" / "tiny.txt").write_text("short")
    (root / "functions").mkdir()
    for number in range(40):
        lines = [f"    {draw.choice(WORDS)} = {draw.randrange(1000)} * value_{draw.randrange(9)}" for _ in range(12)]
        (root / "functions" / f"f{number}.py").write_text(f"def f{number}(value_0):\n" + "\n".join(lines) + "\n")
    raw, clean, packed = root / "raw", root / "clean", root / "packed"
    command = ["--output_dir", str(raw)]
    for name, kind in (("letters", "text"), ("notes", "text"), ("functions", "code")):
        command += ["--source", f"{name}={root / name}", "--kind", f"{name}={kind}", "--licence", f"{name}=CC0"]
    assert not fetch_files.main(command)
    clean_corpus.main(["--input_dir", str(raw), "--output_dir", str(clean), "--workers", "1", "--without_packaged",
                       "--skip", "decontamination"])
    train_tokenizer.main(["--corpus", str(clean), "--mixture", "text=80,code=20", "--vocab_size", "400",
                          "--output_dir", str(root / "tokenizer")])
    prepare_pretraining.main(["--corpus", str(clean), "--mixture", "text=80,code=20", "--from_folder",
                              str(root / "tokenizer"), "--output_dir", str(packed), "--validation_fraction", "0.1"])
    return root


def test_every_command_hands_over_to_the_next(made):
    report = json.loads((made / "clean" / "report.json").read_text())
    removed = {step["name"]: sum(part["documents_in"] - part["documents_out"] for part in step["sources"].values())
               for step in report["steps"]}
    assert removed["short"] == 1 and removed["exact_duplicates"] == 1
    train = PackedTokens(made / "packed", "train", 64)
    assert sorted(train.manifest["sources"]) == ["functions", "letters", "notes"]
    assert train.manifest["kinds"] == {"functions": "code", "letters": "text", "notes": "text"}
    assert train.manifest["licences"] == dict.fromkeys(train.sources, "CC0")


def test_the_page_shows_it(made):
    compare_tokenizers.main(["--corpus", str(made / "clean"), "--tokenizer", f"ours={made / 'tokenizer'}",
                             "--mixture", "text=80,code=20", "--output", str(made / "tokenizers.json")])
    corpus_report.main([str(made / "clean"), "--packed", str(made / "packed"), "--tokenizers",
                        str(made / "tokenizers.json"), "--output", str(made / "report.html")])
    page = (made / "report.html").read_text()
    for part in ("letters", "CC0", "Removed, and why", "too_few_characters", "Random samples", "ours (400)",
                 "Training tokens by source", "exact: clusters"):
        assert part in page, part


def test_the_archive_brings_it_elsewhere(made):
    packed_archive.main(["pack", str(made / "packed"), str(made / "set.tar")])
    packed_archive.main(["unpack", str(made / "set.tar"), str(made / "elsewhere")])
    for path in (made / "packed").rglob("*"):
        if path.is_file():
            assert (made / "elsewhere" / path.relative_to(made / "packed")).read_bytes() == path.read_bytes()


def test_a_page_needs_a_cleaned_corpus(made, capsys):
    with pytest.raises(SystemExit) as stopped:
        corpus_report.main([str(made / "raw")])
    assert stopped.value.code == 2 and "no report.json" in capsys.readouterr().err
