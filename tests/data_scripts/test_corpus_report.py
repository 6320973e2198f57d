"""The page of a corpus: what it says is what the folder holds, and texts of the corpus are only ever shown."""

import json
import re

import pytest

pytest.importorskip("datatrove")

from data_scripts import corpus_report, document_folder
from data_scripts.clean_corpus import clean
from data_scripts.cleaning.clean_settings import read_settings

STORY = "A heron stood in the shallow water, waited for the evening & thought of the other side of the river."


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A clean folder: a source with a duplicate, a letter to repair and a text that is too short, and one of code."""
    folder = tmp_path_factory.mktemp("report")
    for name, kind, texts in (("heron", "text", [STORY * 3, STORY * 2, STORY * 2, "<b>tiny", "e\u0301" + STORY]),
                              ("tools", "code", ["x = 1\ny = x + 2\nprint(x, y)\n"])):
        with document_folder.building(folder / "raw" / name, source=name, kind=kind, languages=["en"], licence="<CC0>",
                                      origin="test", packages=[], left_out={}, command="") as writer:
            for number, text in enumerate(texts):
                writer.write(text, f"{name}/{number}", path=str(number), language="python" if kind == "code" else "en")
    clean(folder / "raw", folder / "clean", read_settings(None, skip=["decontamination", "near_duplicates"]),
          progress=False)
    return folder


@pytest.fixture(scope="module")
def page(made):
    corpus_report.main([str(made / "clean"), "--output", str(made / "new" / "page.html")])
    return (made / "new" / "page.html").read_text()


def rows(page, heading):
    """{first cell: the others} of the first table below a heading."""
    table = page.partition(f"<h2>{heading}</h2>")[2].partition("</table>")[0]
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in table.split("<tr>")[1:]]
    return {first: others for first, *others in cells}


def test_counts_are_those_of_the_folder(made, page):
    manifests = {name: document_folder.read_folder_manifest(made / "clean" / name) for name in ("heron", "tools")}
    for name, manifest in manifests.items():
        assert rows(page, "Sources")[name][-2:] == [f"{manifest[key]:,}" for key in ("documents", "characters")]
    assert rows(page, "Size")["documents"] == ["4"] == [str(sum(m["documents"] for m in manifests.values()))]
    steps = rows(page, "Steps")
    assert steps["short"][1:3] == ["6", "1"] and steps["short"][5] == "too_few_characters 1"
    assert steps["exact_duplicates"][1:3] == ["5", "1"] and steps["repair"][4] == "1"
    assert rows(page, "Languages found")["heron"] == ["1", "en 100.0%"]
    assert rows(page, "Duplicates")["exact: clusters, documents in them, removed"] == ["1, 2, 1"]


def test_what_was_removed_or_changed_can_be_read(page):
    removed = page.partition("Removed, and why")[2].partition("Random samples")[0]
    assert "equal to one within its source (heron, heron/2); kept is heron, heron/1" in removed
    assert "<pre>&lt;b&gt;tiny</pre>" in removed
    assert re.search("before</p><pre>e\u0301.*after</p><pre>\u00e9", removed, re.S)


def test_texts_are_shown_and_not_run(page):
    assert "<b>" not in page and "&lt;b&gt;" in page and "<CC0>" not in page and "&lt;CC0&gt;" in page


def test_same_corpus_same_page(made, page):
    assert corpus_report.build_page(made / "clean") == page


@pytest.mark.parametrize("arguments, content, message", [
    (["--packed", "nothing"], None, "no packed data set"), (["--tokenizers", "t.json"], "{", "t.json is no JSON"),
    (["--tokenizers", "t.json"], "{}", "t.json has no 'tokenizers'"), (["--tokenizers", "t.json"], "[]", "has no")])
def test_bad_input_is_named(arguments, content, message, made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content:
        (tmp_path / "t.json").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        corpus_report.main([str(made / "clean"), "--output", "page.html", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "page.html").exists()


def test_a_clean_folder_with_a_broken_report_is_named(made, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"languages": {}}))
    with pytest.raises(ValueError, match="has no 'steps'"):
        corpus_report.read_clean(tmp_path)
