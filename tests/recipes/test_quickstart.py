"""The main job, with a few steps a stage."""

import json

import pytest

from recipes import quickstart
from recipes.pipeline_graph import read_graph
from recipes.pipeline_stages import KINDS, RECIPES, words_of
from recipes.ppo_config import PPORecipeConfig
from recipes.pretrain_config import parse_config

FEW = [
    "--pretrain.max_steps", "3", "--pretrain.eval_steps", "3", "--sft.max_steps", "3", "--sft.eval_steps", "3",
    "--sft.eval_problems", "2", "--sft.eval_max_new_tokens", "4", "--reward.max_steps", "3", "--reward.eval_steps", "3",
    "--ppo.max_steps", "4", "--ppo.eval_steps", "4", "--ppo.eval_problems", "2", "--ppo.eval_max_new_tokens", "4",
    "--ppo.max_completion_length", "6", "--distill.max_steps", "3", "--distill.eval_steps", "3",
    "--distill.eval_problems", "2", "--distill.eval_max_new_tokens", "4", "--eval.problems", "2",
    "--eval.max_new_tokens", "4",
]  # fmt: skip


def test_every_stage_is_of_a_kind_that_the_issue_names():
    stages = read_graph(quickstart.CONFIG, (), KINDS).stages
    assert {stage.kind for stage in stages.values()} == {*RECIPES, "data"}
    order = list(stages)
    chain = ("data", "pretrain", "sft", "reward", "ppo", "grpo", "rejection", "data_distill", "distill", "eval")
    assert [name for name in order if name in chain] == list(chain)


def test_a_key_without_a_stage_or_a_mistyped_one_is_said_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="--max_steps: begin it with a stage"):
        quickstart.main(["--output_dir", str(tmp_path / "run"), "--max_steps", "3"])
    with pytest.raises(ValueError, match="stages.sft: .*max_step"):
        quickstart.main(["--output_dir", str(tmp_path / "run"), "--sft.max_stepz", "3"])
    assert not (tmp_path / "run").exists()


def test_stages_get_what_earlier_ones_have_made(tmp_path):
    graph = read_graph(quickstart.CONFIG, ["--ppo.max_steps", "2", "--sft.max_steps", "3"], KINDS)
    config = parse_config(PPORecipeConfig, words_of(graph, "ppo", tmp_path))
    assert config.model_name_or_path == str(tmp_path / "sft") and config.max_steps == 2
    assert config.track_rewards == [str(tmp_path / "reward")] and config.all_weights[-1] == 0


@pytest.mark.slow
def test_all_stages_make_one_report(tmp_path):
    """Up to PPO: after three steps no answer is right, and rejection sampling would find nothing to keep."""
    few = ["--output_dir", str(tmp_path), "--only", "data", "data_sft", "data_preferences", "data_prompts", "pretrain",
           "sft", "reward", "ppo", *FEW]  # fmt: skip
    found = quickstart.main(few)
    assert set(found["results"]) == {"pretrain", "sft", "reward", "ppo"} and found["report"] == tmp_path / "report.html"
    page = (tmp_path / "report.html").read_text()
    accuracy = found["results"]["ppo"]["tasks"]["after"]["tasks"]["leg_counting"]["pass@1"]["value"]
    assert f"{100 * accuracy:.1f}" in page and "ppo/report.html" in page
    assert "Accuracy over stages" in page and "ppo: mean reward of the completions" in page
    assert "<th>sft</th>" in page and "<th>ppo</th>" in page and "Load of the least even layer" in page
    for stage, result in found["results"].items():
        assert json.loads((tmp_path / stage / "eval.json").read_text()) == json.loads(json.dumps(result))
        assert (tmp_path / stage / "report.html").is_file() and found["seconds"][stage] > 0
    again = quickstart.main(few)  # nothing is done twice
    assert again["seconds"] == found["seconds"] and again["results"] == found["results"]
