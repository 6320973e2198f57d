"""The quality model: separates sources it has not seen, survives saving, refuses what it cannot use."""

import json
import pickle
import random

import numpy as np
import pytest

pytest.importorskip("datatrove")

from datatrove.data import Document

from data_scripts import quality_model, sources
from data_scripts.document_folder import building
from data_scripts.quality_model import QualityFilter, QualityModel, spoil


def write_source(folder, name, texts, kind="text", language="en"):
    with building(folder / name, source=name, kind=kind, languages=[language], licence="none", origin="test",
                  packages=[], left_out={}, command="test") as writer:
        for number, text in enumerate(texts):
            writer.write(text, f"{name}/{number}", path=str(number), language=language)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Five sources of the shipped English, each of other books, one of Chinese, and one of code, not looked at."""
    folder = tmp_path_factory.mktemp("raw")
    english = [found.text[:1_500] for _, found in zip(range(1_400), sources.open_source("text", "built-in"))]
    for number in range(5):
        write_source(folder, f"english-{number}", english[number * 280:number * 280 + 60])
    chinese = [found.text for _, found in zip(range(40), sources.open_source("multilingual", "built-in"))]
    write_source(folder, "chinese", chinese, "multilingual", "zh")
    write_source(folder, "code", ["x = 1\n" * 50], "code", "python")
    return folder


@pytest.fixture(scope="module")
def trained(raw, tmp_path_factory):
    output = tmp_path_factory.mktemp("model") / "quality"
    quality_model.main(["train", "--from_raw", str(raw), "--output", str(output), "--per_source", "50"])
    return output


def test_separates_documents_of_sources_it_has_not_seen(trained):
    report = json.loads((trained / "manifest.json").read_text())["report"]
    assert report["held_out_sources"] and report["held_out"]["auc"] > 0.97
    assert report["held_out"]["recall"] > 0.95 and report["held_out"]["bad_removed"] > 0.7


def test_labels_that_say_nothing_teach_nothing(raw):
    rows = quality_model.weakly_labelled(raw, 25, 0, progress=False)
    random.Random(0).shuffle(labels := [label for *_, label in rows])
    shuffled = [(name, text, label) for (name, text, _), label in zip(rows, labels)]
    training, held_out, names = quality_model.split_sources(shuffled, 0.3, 0)
    assert not set(names) & {name for name, *_ in training}
    model = QualityModel.fit([text for _, text, _ in training], [label for *_, label in training])
    assert quality_model.evaluate(model, held_out, 0.5)["auc"] < 0.65


def test_filter_uses_the_saved_weights(trained, raw):
    texts = [found.text[:1_500] for _, found in zip(range(30), sources.open_source("text", "built-in"))]
    spoilt = [spoil(text, random.Random(number)) for number, text in enumerate(texts)]
    loaded = QualityModel.load(trained)
    again = QualityModel(loaded.weights.copy(), loaded.bias, loaded.settings)
    np.testing.assert_array_equal(loaded.probabilities(texts), again.probabilities(texts))
    block = pickle.loads(pickle.dumps(QualityFilter(str(trained), {"text": 0.3})))
    documents = [Document(text=text, id=str(n), metadata={"kind": "text"}) for n, text in enumerate(texts + spoilt)]
    together, alone = block.filter_batch(documents), [block.filter(document) for document in documents]
    assert together == alone, "a document's verdict depends on no other"
    assert sum(verdict is True for verdict in together[:30]) >= 29
    assert sum(verdict == (False, "low_quality") for verdict in together[30:]) >= 20
    assert 0 <= documents[0].metadata["quality"] <= 1
    assert block.filter(Document(text=spoilt[0], id="c", metadata={"kind": "code"})) is True


def test_same_seed_same_model(raw, tmp_path):
    sums = []
    for name in ("one", "two"):
        rows = quality_model.weakly_labelled(raw, 8, 3, progress=False)
        quality_model.train(rows, tmp_path / name, seed=3)
        sums.append((tmp_path / name / "quality.safetensors").read_bytes())
    assert sums[0] == sums[1]


def test_bad_input_is_named(raw, tmp_path, capsys):
    with pytest.raises(ValueError, match="is no model"):
        QualityFilter(str(tmp_path))
    for arguments, message in ((["--output", "x"], "either --from_raw"),
                               (["--good", "a", "--output", "x"], "either --from_raw"),
                               (["--from_raw", str(tmp_path), "--output", "x"], "0 sources of kind"),
                               (["--from_raw", str(tmp_path / "none"), "--output", "x"], "No such file")):
        with pytest.raises(SystemExit) as stopped:
            quality_model.main(["train", *arguments])
        assert stopped.value.code == 2 and message in capsys.readouterr().err
