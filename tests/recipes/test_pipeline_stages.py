"""The pipeline with recipes and data scripts: settings are checked, two real stages run, the page tells of them."""

import json
import os
import shutil

import pytest
import yaml

from recipes import pipeline
from recipes.eval_tables import with_interval
from recipes.pipeline_graph import CONFIGS, read_graph
from recipes.pipeline_report import accuracy_plot, read_scores, samples_of, stage_results
from recipes.pipeline_stages import KINDS, alone, check_stage, words_of
from recipes.pipeline_state import PipelineFolder
from tests.recipes.tiny_stages import make_base, same_tensors

SHIPPED = ("tiny", "nano", "small", "r1")
FEW = {
    "max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 2, "learning_rate": 1e-2,
    "use_cpu": True, "disable_tqdm": True, "validation_fraction": 0.25, "report_to": "none", "eval_strategy": "no",
    "device_peak_tflops": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def write(path, stages, **top):
    path.write_text(yaml.safe_dump(top | {"stages": stages}, sort_keys=False))
    return str(path)


def two_stages(base):
    return {
        "pretrain": {"kind": "pretrain", "inputs": {"dataset_name": str(base / "pretrain"),
                                                    "model_name_or_path": str(base / "model")},
                     "arguments": {"sequence_length": 64}},
        "eval": {"kind": "eval", "inputs": {"model_name_or_path": "pretrain"},
                 "arguments": {"tasks": ["chain_sum:1"], "problems": 3, "max_new_tokens": 3, "use_cpu": True}},
    }  # fmt: skip


def test_two_stages_and_their_page(base, tmp_path, capsys):
    graph = write(tmp_path / "graph.yaml", two_stages(base), title="Two & two", defaults={"pretrain": FEW})
    call = ["--config", graph, "--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="stages.pretrain: unknown key 'max_stepz'.*max_steps"):
        pipeline.main([*call, "--pretrain.max_stepz", "3"])
    assert not (tmp_path / "run").exists()

    found = pipeline.main(call)
    folder, records = tmp_path / "run", found["stages"]
    result = json.loads((folder / "eval" / "eval.json").read_text())
    assert records["eval"]["scores"] == {"chain_sum": result["tasks"]["chain_sum"]["pass@1"]}
    assert {"model.safetensors", "config.json", "eval.json"} <= set(records["pretrain"]["outputs"])
    page = found["report"].read_text()
    text = with_interval(result["tasks"]["chain_sum"]["pass@1"]).split(" [")[0]
    assert "Two &amp; two" in page and f"<td>{text} <span" in page and "href='eval/report.html'" in page
    assert "Accuracy over stages" in page and "Load of the least even layer" in page and "1,024 tokens" in page
    shown = samples_of(folder / "eval")
    assert len(shown) == 2 and result["prompt_example"] in [prompt for _, prompt, _ in shown]

    written = (folder / "eval" / "eval.json").stat().st_mtime_ns
    capsys.readouterr()
    assert pipeline.main(call)["stages"] == records
    assert (folder / "eval" / "eval.json").stat().st_mtime_ns == written
    assert "== " not in capsys.readouterr().out

    # A stage that was killed goes on from its checkpoint, not from its start; what reads it does not become stale.
    PipelineFolder(folder).record("pretrain", state="running")
    (folder / "pretrain" / "eval.json").unlink()
    weights = (folder / "pretrain" / "model.safetensors").rename(tmp_path / "expected.safetensors")
    first, last = (folder / "pretrain" / f"checkpoint-{step}" for step in (2, 4))
    shutil.rmtree(last)
    begun = first.stat().st_mtime_ns
    pipeline.main(call)
    assert first.stat().st_mtime_ns == begun and last.is_dir() and not (folder / "pretrain.stale-1").exists()
    assert same_tensors(folder / "pretrain" / "model.safetensors", weights)
    assert (folder / "eval" / "eval.json").stat().st_mtime_ns == written


def figures(value):
    """A result on two tasks, as an evaluation writes it, with what the plot and the table read."""
    figure = {"value": value, "low": value - 0.1, "high": value + 0.1}
    return {"tasks": {name: {"pass@1": figure} for name in ("a", "b")}, "overall": {"pass@1": figure}}


def test_a_start_model_has_the_figures_of_the_stage_after_it(tmp_path):
    """So that each branch begins with its base, asked in the branch's own template."""
    command = {"kind": "command", "command": ["true"]}
    stages = {"base": command, "sft": command | {"inputs": {"model_name_or_path": "base"}, "branches": ["full"]},
              "rl": command | {"inputs": {"model_name_or_path": "sft"}, "branches": ["full"]},
              "zero": command | {"inputs": {"model_name_or_path": "base"}, "branches": ["zero"]}}  # fmt: skip
    graph, home = read_graph(write(tmp_path / "g.yaml", stages), (), KINDS), PipelineFolder(tmp_path)
    for name, (before, after) in {"sft": (0.2, 0.5), "rl": (0.55, 0.7), "zero": (0.1, 0.3)}.items():
        (tmp_path / name).mkdir()
        ends = {"before": figures(before), "after": figures(after)}
        (tmp_path / name / "eval.json").write_text(json.dumps({"tasks": ends}))
    for name in stages:
        home.record(name, state="done")
    shown = {branch: [(result["name"], result["overall"]["pass@1"]["value"])
                      for result in stage_results(graph, home, branch)] for branch in ("full", "zero")}  # fmt: skip
    assert shown == {"full": [("base", 0.2), ("sft", 0.5), ("rl", 0.7)], "zero": [("base", 0.1), ("zero", 0.3)]}
    svg = accuracy_plot(stage_results(graph, home, "full"))
    assert "<svg" in svg and read_scores(tmp_path / "rl")["mean of tasks"]["value"] == 0.7


def data_stage(**entry):
    return {"rows": {"kind": "data"} | entry}


@pytest.mark.parametrize("entry, message", [
    ({"module": "prepare_stf"}, "module='prepare_stf' is unknown: did you mean prepare_sft"),
    ({}, "stages.rows.module is needed by the kind data"),
    ({"module": "prepare_sft", "config": "sft_tiny.yaml"}, "config is not for the kind data"),
    ({"module": "prepare_sft", "arguments": {"sise": "tiny"}}, "unknown key 'sise': did you mean size"),
    ({"module": "prepare_sft", "arguments": {"size": "huge"}}, "invalid choice: 'huge'"),
    ({"module": "rejection_sampling", "arguments": {"tasks": ["gcd"]}}, "required: --model_name_or_path"),
    ({"module": "prepare_prompts", "arguments": {"train": "many"}}, "invalid int value: 'many'"),
    ({"module": "prepare_prompts", "arguments": {"system": None}}, "system=None cannot be said on a command line"),
])  # fmt: skip
def test_data_stages_are_checked_by_their_scripts_own_parser(tmp_path, entry, message):
    graph = write(tmp_path / "graph.yaml", data_stage(**entry))
    with pytest.raises(ValueError, match=message):
        pipeline.main(["--config", graph, "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_variables_of_a_stage_do_not_reach_the_others(base, tmp_path, monkeypatch):
    monkeypatch.setenv("ONE_STAGES_KEPT", "before")
    config = {"env": {"ONE_STAGES_OWN": "1", "ONE_STAGES_KEPT": "2"}, "dataset_name": str(base / "pretrain")}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config | {"model_name_or_path": str(base / "model")}))
    graph = read_graph(write(tmp_path / "g.yaml", {"a": {"kind": "pretrain", "config": "own.yaml"}}), (), KINDS)
    check_stage(graph, "a", tmp_path)
    assert "ONE_STAGES_OWN" not in os.environ and os.environ["ONE_STAGES_KEPT"] == "before"


def test_lists_and_switches_follow_the_scripts_parser(tmp_path):
    stages = {
        "prompts": {"kind": "data", "module": "prepare_prompts", "arguments": {"tasks": ["gcd:1", "products"]}},
        "mixed": {"kind": "data", "module": "prepare_sft", "inputs": {"source": ["own=prompts/a", "traces=built-in"]},
                  "arguments": {"only_given": True, "overwrite": False}},
    }  # fmt: skip
    graph = read_graph(write(tmp_path / "graph.yaml", stages), (), KINDS)
    assert words_of(graph, "prompts", "r") == ["--tasks", "gcd:1", "products", "--output_dir", "r/prompts"]
    assert check_stage(graph, "mixed", "r") == [
        "--only_given", "--source", "own=r/prompts/a", "--source", "traces=built-in", "--output_dir", "r/mixed"
    ]  # fmt: skip
    command = alone(graph.stages["prompts"], ["--size", "tiny"])
    assert command == "python -m data_scripts.prepare_prompts --size tiny"


def test_a_data_stage_runs_and_its_error_is_kept(tmp_path):
    stages = {
        "prompts": {"kind": "data", "module": "prepare_prompts",
                    "arguments": {"tasks": ["chain_sum:1"], "train": 8, "test": 4}},
        "broken": {"kind": "data", "module": "prepare_prompts", "arguments": {"tasks": ["chain_sum:99"]}},
    }  # fmt: skip
    call = ["--config", write(tmp_path / "graph.yaml", stages), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="not finished: broken .StageError: .*99"):
        pipeline.main(call)
    rows = (tmp_path / "run" / "prompts" / "train.jsonl").read_text().splitlines()
    page = (tmp_path / "run" / "report.html").read_text()
    assert len(rows) == 8 and "8 rows" in page and "<h2>Failed</h2>" in page
    assert json.loads(rows[0])["prompt"][0]["content"].split("\n")[0] in page.replace("&#x27;", "'")


def test_scores_of_an_evaluation(tmp_path):
    figure = {"value": 0.5, "low": 0.2, "high": 0.8}
    tasks = {name: {"pass@1": figure} for name in ("a", "b")}
    (tmp_path / "eval.json").write_text(json.dumps({"tasks": tasks, "overall": {"pass@1": figure}}))
    assert read_scores(tmp_path) == {"a": figure, "b": figure, "mean of tasks": figure}
    assert read_scores(tmp_path / "none") == {}


@pytest.mark.parametrize("size", SHIPPED)
def test_shipped_graphs_are_whole(size, tmp_path):
    """Every config is there, every setting is known, and each stage reads something that another one makes."""
    graph = read_graph(CONFIGS / f"pipeline_{size}.yaml", (), KINDS)
    for name in graph.stages:
        check_stage(graph, name, tmp_path)
    assert set(graph.branch_names()) == (set() if size == "tiny" else {"zero", "full"})
    if size != "tiny":
        assert graph.chosen(branch="zero")[-1] == "grpo_zero" and "distill" in graph.chosen(branch="full")
        assert graph.sources["sft"] == ["data_sft", "pretrain"]  # from the base, not from the policy (Sec. 2.3.3)
        assert {"sft", "reward"} <= set(graph.sources["grpo_2"])
