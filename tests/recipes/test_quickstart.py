"""The main job, with a few steps a stage."""

import json

import pytest

from recipes import quickstart
from recipes.ppo_config import PPORecipeConfig
from recipes.pretrain_config import parse_config


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


def test_stages_get_what_earlier_ones_have_made(tmp_path):
    given = quickstart.stage_arguments("ppo", tmp_path, ["--ppo.max_steps", "2", "--sft.max_steps", "3"])
    config = parse_config(PPORecipeConfig, given)
    assert config.model_name_or_path == str(tmp_path / "sft") and config.max_steps == 2
    assert config.track_rewards == [str(tmp_path / "reward")] and config.all_weights[-1] == 0
    asked = {task for stage in ("sft", "ppo") for task in parse_config(
        quickstart.PARTS[stage][0], quickstart.stage_arguments(stage, tmp_path, [])).eval_tasks}  # fmt: skip
    assert asked == set(quickstart.TASKS)


@pytest.mark.slow
def test_all_stages_make_one_report(tmp_path):
    few = [
        "--output_dir", str(tmp_path), "--pretrain.max_steps", "3", "--pretrain.eval_steps", "3",
        "--sft.max_steps", "3", "--sft.eval_steps", "3", "--sft.eval_problems", "2", "--sft.eval_max_new_tokens", "4",
        "--reward.max_steps", "3", "--ppo.max_steps", "4", "--ppo.eval_steps", "4", "--ppo.eval_problems", "2",
        "--ppo.eval_max_new_tokens", "4", "--ppo.max_completion_length", "6",
    ]  # fmt: skip
    found = quickstart.main(few)
    assert set(found["results"]) == set(quickstart.STAGES) and found["report"] == tmp_path / "report.html"
    page = (tmp_path / "report.html").read_text()
    accuracy = found["results"]["ppo"]["tasks"]["after"]["tasks"]["leg_counting"]["pass@1"]["value"]
    assert f"{100 * accuracy:.1f}" in page and "ppo/report.html" in page and "bits per byte" in page
    assert "reward, first and last fifth of the run" in page and "Mean reward of the completions" in page
    assert "<th>fine-tuned</th>" in page and "<th>after PPO</th>" in page
    for stage in quickstart.STAGES:
        written = json.loads((tmp_path / stage / "eval.json").read_text())
        assert written == json.loads(json.dumps(found["results"][stage]))
        assert (tmp_path / stage / "report.html").is_file()
    again = quickstart.main(few)["results"]
    for stage, name in (("sft", "before"), ("sft", "after"), ("ppo", "after")):  # nothing is done twice
        first, second = (results[stage]["tasks"][name] for results in (found["results"], again))
        assert second["tasks"] == first["tasks"]
        assert second["timing"]["resumed"] == 4 and second["timing"]["tokens"] == 0
