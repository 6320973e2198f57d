"""The main job, with a few steps a stage."""

import json

import pytest

from recipes import quickstart


def test_overrides_go_to_their_stage():
    given = ["--pretrain.max_steps", "3", "--sft.eval_tasks", "a", "b", "--sft.packing=false"]
    assert quickstart.overrides_of("pretrain", given) == ["--max_steps", "3"]
    assert quickstart.overrides_of("sft", given) == ["--eval_tasks", "a", "b", "--packing=false"]
    with pytest.raises(ValueError, match="--max_steps: begin it with a stage"):
        quickstart.overrides_of("sft", ["--max_steps", "3"])


def test_a_mistyped_key_is_said_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="max_step"):
        quickstart.main(["--output_dir", str(tmp_path / "run"), "--sft.max_stepz", "3"])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_all_stages_make_one_report(tmp_path):
    few = ["--output_dir", str(tmp_path), "--pretrain.max_steps", "3", "--pretrain.eval_steps", "3", "--sft.max_steps", "3",
           "--sft.eval_steps", "3", "--sft.eval_problems", "2", "--sft.eval_max_new_tokens", "4"]  # fmt: skip
    found = quickstart.main(few)
    assert set(found["results"]) == {"pretrain", "sft"} and found["report"] == tmp_path / "report.html"
    page = (tmp_path / "report.html").read_text()
    accuracy = found["results"]["sft"]["tasks"]["after"]["tasks"]["leg_counting"]["pass@1"]["value"]
    assert f"{100 * accuracy:.1f}" in page and "sft/report.html" in page and "bits per byte" in page
    for stage in ("pretrain", "sft"):
        assert json.loads((tmp_path / stage / "eval.json").read_text()) == found["results"][stage]
        assert (tmp_path / stage / "report.html").is_file()
    first, again = found["results"]["sft"]["tasks"], quickstart.main(few)["results"]["sft"]["tasks"]
    for stage in ("before", "after"):  # nothing is done twice
        assert again[stage]["tasks"] == first[stage]["tasks"]
        assert again[stage]["timing"]["resumed"] == 4 and again[stage]["timing"]["tokens"] == 0
