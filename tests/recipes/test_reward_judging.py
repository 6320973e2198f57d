"""Pairs kept by the mean of several judgements."""

import json

import pytest

from data_scripts.judge_preferences import first_place, mean_margin, prepare, select


def judged(*margins, first=None):
    firsts = first or [None] * len(margins)
    return [{"chosen": 5 + margin, "rejected": 5, "first": place} for margin, place in zip(margins, firsts)]


def row(*margins, first=None, name="p"):
    return {"prompt": "q", "chosen": "a", "rejected": "b", "problem": name, "judgements": judged(*margins, first=first)}


def test_a_pair_is_kept_above_the_margin():
    rows = [row(2, 2, 0, 1), row(1, 1, 1, 1), row(0, 0, 0, 4.4), row(-3, -3, 1, 0)]
    kept, counts = select(rows, 1.0, 4)
    assert [r["margin"] for r in kept] == [1.25, pytest.approx(1.1)]
    assert counts == {"kept": 2, "margin of at most 1, left out": 1, "judged the other way, left out": 1}
    kept, counts = select(rows, 1.0, 4, relabel=True)
    assert counts["kept"] == 3 and kept[-1]["chosen"] == "b" and kept[-1]["margin"] == 1.25
    assert mean_margin(kept[-1]["judgements"], 1) == 1.25


def test_a_taste_for_the_first_place_cancels():
    """True margin 0.5, four points for standing first, seen three times in one order and once in the other."""
    biased = row(4.5, 4.5, 4.5, -3.5, first=["chosen", "chosen", "chosen", "rejected"])
    assert mean_margin(biased["judgements"], 4) == pytest.approx(0.5)
    even = row(4.5, -3.5, first=["chosen", "rejected"])
    assert first_place([even]) == pytest.approx(4.0) and first_place([row(1)]) is None


@pytest.mark.parametrize(
    "judgements, match",
    [(judged(1, 1), "2 judgements are fewer than judgements=4"), ([], "0 judgements"), (None, "0 judgements"),
     (judged(1, 1, 1) + [{"chosen": float("nan"), "rejected": 1}], "chosen=nan"),
     (judged(1, 1, 1, 1, first=["left"] * 4), "first='left'")],
)  # fmt: skip
def test_bad_judgements_are_named(judgements, match):
    with pytest.raises(ValueError, match=match):
        mean_margin(judgements, 4)


def test_a_folder_is_judged(tmp_path):
    rows = [row(margin, margin, name=str(number)) for number, margin in enumerate((3, 0.5, 2))]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    manifest = prepare(tmp_path, tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert [r["problem"] for r in rows] == ["0", "2"] and [r["margin"] for r in rows] == [3, 2]
    assert manifest["splits"]["train"]["pairs"] == 3 and manifest["splits"]["train"]["kept"] == 2
    with pytest.raises(ValueError, match="no pair has a mean margin above 9"):
        prepare(tmp_path, tmp_path / "none", margin=9)
