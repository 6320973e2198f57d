import gzip
import itertools
import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest
import reasoning_gym

from data_scripts import sources
from data_scripts.reasoning.worked_mathematics import TASKS, worked_problems
from data_scripts.sources import CORPUS, CorruptedCorpus, cut_module, open_source, read_corpus
from recipes.task_puzzles import PUZZLE_TASKS
from recipes.text_files import ReadReport, cut_at_paragraphs, list_files


def texts(location, **options):
    return [document.text for document in open_source("mine", str(location), **options)]


@pytest.mark.parametrize("name, documents, longest",
                         [("english.txt.xz", 1_000, 20_000), ("chinese.txt.xz", 1_000, 5_000)])
def test_shipped_corpus_is_clean_text(name, documents, longest):
    corpus = read_corpus(name)
    assert len(corpus) > documents and len(set(corpus)) == len(corpus)
    assert all(text.strip() and "\x1e" not in text and len(text) < longest for text in corpus)
    assert not any("Gutenberg" in text or "\ufffd" in text for text in corpus)


def test_corrupted_corpus_is_detected(tmp_path):
    shutil.copytree(CORPUS, tmp_path / "corpus")
    path = tmp_path / "corpus" / "chinese.txt.xz"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CorruptedCorpus, match=r"chinese\.txt\.xz is corrupted.*sha256.*restore it"):
        read_corpus("chinese.txt.xz", tmp_path / "corpus")
    assert read_corpus("english.txt.xz", tmp_path / "corpus")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"chinese\.txt\.xz is missing"):
        read_corpus("chinese.txt.xz", tmp_path / "corpus")


def test_code_is_deterministic_and_follows_the_seed():
    def head(seed):
        return list(itertools.islice(open_source("code", seed=seed), 20))
    assert head(3) == head(3) != head(4)
    assert all(document.name.split("#")[0].endswith(".py") for document in head(3))


def test_modules_that_do_not_parse_are_left_out(tmp_path):
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "python2.py").write_text("print 'x'\n")
    (tmp_path / "bytes.py").write_bytes(b"x = '\xff'\n")
    assert [document.name for document in sources.code(root=tmp_path)] == ["good.py#0"]


def test_cutting_a_module_loses_nothing_and_keeps_functions_whole():
    function = "\n# note\n@staticmethod\ndef f{}():\n    return '''\f\nline'''\n"
    module = "import os\n" + "".join(map(function.format, range(50)))
    pieces = cut_module(module, aim=300)
    assert len(pieces) > 5 and "".join(pieces) == module
    for piece in pieces:
        compile(piece, "piece", "exec")


def test_worked_answers_satisfy_their_verifier():
    problems = dict(worked_problems(seed=7, limit=len(TASKS) * 4))
    assert {name.split("#")[0] for name in problems} == set(TASKS)
    place = {name: number for number, name in enumerate(TASKS)}
    for name, document in problems.items():
        task, index = name.split("#")
        # The same entry, made here, scores the answer line of the document.
        dataset = reasoning_gym.create_dataset(task, size=100, seed=7 + 1_000_003 * place[task], **TASKS[task][1])
        answer = document.rstrip("\n").rsplit("\nAnswer: ", 1)[1]
        assert dataset.score_answer(answer, dataset[int(index)]) == 1.0
        assert dataset.score_answer("zzz", dataset[int(index)]) < 1.0


def test_no_worked_problem_is_on_the_test_side():
    """What a problem asks decides the side, whatever the wording; about a fifth of the generators' entries go."""
    kept = dict(worked_problems(seed=7, limit=len(TASKS) * 40))
    place = {name: number for number, name in enumerate(TASKS)}
    indices = {name: [int(label.split("#")[1]) for label in kept if label.startswith(f"{name}#")] for name in TASKS}
    for name, numbers in indices.items():
        task = PUZZLE_TASKS[name]
        dataset = reasoning_gym.create_dataset(name, size=1, seed=7 + 1_000_003 * place[name], **TASKS[name][1])
        assert {task.split_of(task.candidate(dataset[i])) for i in numbers} == {"train"} and len(numbers) == 40
        left_out = set(range(max(numbers))) - set(numbers)
        sides = [task.split_of(task.candidate(dataset[i])) for i in left_out]
        assert "test" in sides


def test_every_local_format_gives_the_same_documents(tmp_path):
    content = ["first text", "zweiter Text mit Ümläuten", "第三"]
    lines = "".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(content))
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    pyarrow.parquet.write_table(pyarrow.table({"text": content}), tmp_path / "c.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, (text, ending) in enumerate(zip(content, (".txt", ".md", ".py"))):
        (folder / f"{number}{ending}").write_text(text, encoding="utf-8")
    (folder / "ignored.bin").write_bytes(b"\xff")
    (folder / ".hidden.txt").write_text("no")
    for location in (tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.parquet", folder):
        assert texts(location) == content


def test_folders_of_documents_are_sources(tmp_path):
    """What `fetch_*.py` write: .jsonl.zst and a manifest; a file that was cut off is named, not half read."""
    zstandard = pytest.importorskip("zstandard", reason="needs the extra `corpus`")
    from data_scripts import document_folder

    content = [f"Text {number}: {'Ümläute 第三 ' * number}" for number in range(200)]
    with document_folder.building(tmp_path / "made", source="made", kind="text") as writer:
        for number, text in enumerate(content):
            writer.write(text, str(number))
    assert texts(tmp_path) == content
    [path] = (tmp_path / "made").glob("*.jsonl.zst")
    path.write_bytes(path.read_bytes() + zstandard.compress(b'{"text": "a second frame"}\n'))
    assert texts(tmp_path) == [*content, "a second frame"]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"documents-00000\.jsonl\.zst is damaged .*--errors skip"):
        texts(tmp_path)


def test_empty_file(tmp_path):
    (tmp_path / "full.txt").write_text("text")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"empty\.txt is empty \(0 bytes"):
        texts(tmp_path)
    report = ReadReport()
    assert texts(tmp_path, errors="skip", report=report) == ["text"]
    assert report.skipped == 1 and "empty.txt" in report.examples[0]


def test_undecodable_bytes_name_file_and_offset(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"caf\xc3\xa9 and caf\xe9 again")
    with pytest.raises(ValueError, match=r"bad\.txt is not UTF-8: byte 0xe9 at offset 13.*--errors skip"):
        texts(tmp_path)
    (tmp_path / "bad.txt").unlink()
    first = b'{"text": "fine"}\n'
    (tmp_path / "bad.jsonl").write_bytes(first + b'{"text": "\xe9"}\n{"text": "too"}\nno json\n')
    with pytest.raises(ValueError, match=rf"bad\.jsonl is not UTF-8: byte 0xe9 at offset {len(first) + 10} \(line 2\)"):
        texts(tmp_path)
    report = ReadReport()
    assert texts(tmp_path, errors="skip", report=report) == ["fine", "too"]
    assert report.skipped == 2


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_missing_column_lists_those_present(tmp_path, ending):
    path = tmp_path / f"data{ending}"
    if ending == ".jsonl":
        path.write_text('{"title": "x", "body": "y"}\n')
    else:
        pyarrow.parquet.write_table(pyarrow.table({"title": ["x"], "body": ["y"]}), path)
    with pytest.raises(ValueError, match=r"no column 'text'; columns present: title, body.*--text_column"):
        texts(path, errors="skip")  # no excuse: it is missing everywhere
    assert texts(path, text_column="body") == ["y"]


@pytest.mark.parametrize("location, message", [("./absent.txt", "does not exist"), ("absent.jsonl", "does not exist")])
def test_missing_location(location, message):
    with pytest.raises(FileNotFoundError, match=message):
        texts(location)


def test_folder_without_readable_files_and_unknown_ending(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no readable file below .*known endings are \.txt"):
        texts(tmp_path)
    with pytest.raises(ValueError, match="known endings"):
        texts(tmp_path / "picture.png")
    with pytest.raises(ValueError, match="'poems' is not built in; built in are text, code"):
        open_source("poems")


def test_long_file_is_cut_at_paragraphs_without_loss(tmp_path):
    text = "".join(f"Paragraph {i}. " + "word " * 60 + "\n\n" for i in range(100))
    pieces = cut_at_paragraphs(text)
    assert len(pieces) > 2 and "".join(pieces) == text and all(p.endswith("\n\n") for p in pieces)
    (tmp_path / "long.txt").write_text(text)
    assert "".join(texts(tmp_path)) == text


def test_validation_files_are_recognised_by_name(tmp_path):
    for name in ("train.jsonl", "validation.jsonl", "dev-1.jsonl", "develop.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    assert [p.name for p in list_files(tmp_path, "validation")] == ["dev-1.jsonl", "validation.jsonl"]
    assert [p.name for p in list_files(tmp_path, "train")] == ["develop.jsonl", "train.jsonl"]
