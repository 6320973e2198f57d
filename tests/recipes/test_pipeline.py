"""The pipeline with stages that cost nothing: a command that writes a file, dies, waits or fails when told to."""

import json
import multiprocessing
import os
import re
import signal
import sys
import time

import pytest
import yaml

from recipes import pipeline
from recipes.pipeline_graph import parse_overrides, plan, read_graph, settings_of
from recipes.pipeline_report import evaluations, outcome, read_scores
from recipes.pipeline_stages import KINDS
from recipes.pipeline_state import PipelineFolder, process_of

STAGE = """
import argparse, os, pathlib, signal, sys, time
parser = argparse.ArgumentParser()
for name in ("output_dir", "value", "first"):
    parser.add_argument("--" + name, default="")
parser.add_argument("--reads", nargs="*", default=[])
args = parser.parse_args()
folder = pathlib.Path(args.output_dir)
folder.mkdir(parents=True, exist_ok=True)
is_first = not (folder / "starts").exists()
with open(folder / "starts", "a") as file:
    file.write("x")
if is_first and args.first == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if is_first and args.first == "fail":
    sys.exit(3)
if is_first and args.first == "wait":
    time.sleep(60)
(folder / "out").write_text(args.value + "".join((pathlib.Path(read) / "out").read_text() for read in args.reads))
"""


class Bench:
    """A graph a -> b -> d, a -> c, with a call for the command line."""

    def __init__(self, folder):
        self.folder, self.home = folder, folder / "run"
        (folder / "stage.py").write_text(STAGE)
        command = {"kind": "command", "command": [sys.executable, "-S", str(folder / "stage.py")]}
        self.stages = {
            "d": command | {"inputs": {"reads": ["b"]}, "arguments": {"value": "d"}},
            "a": command | {"arguments": {"value": "a"}},
            "b": command | {"inputs": {"reads": ["a"]}, "arguments": {"value": "b"}, "branches": ["full"]},
            "c": command | {"inputs": {"reads": ["a"]}, "arguments": {"value": "c"}, "branches": ["zero"]},
        }
        self.stages["d"]["branches"] = ["full"]

    def write(self, **top):
        path = self.folder / "graph.yaml"
        path.write_text(yaml.safe_dump(top | {"stages": self.stages}, sort_keys=False))
        return path

    def __call__(self, *arguments):
        return pipeline.main(["--config", str(self.write()), "--output_dir", str(self.home), *arguments])

    def read(self, *overrides):
        return read_graph(self.write(), overrides, KINDS)

    def out(self, name):
        return (self.home / name / "out").read_text()

    def starts(self):
        return {name: (self.home / name / "starts").read_text() for name in self.stages
                if (self.home / name / "starts").exists()}  # fmt: skip


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


# ---------------------------------------------------------------- the graph


def test_stages_are_ordered_by_their_inputs(bench):
    graph = bench.read()
    assert list(graph.stages) == ["a", "b", "d", "c"]
    assert graph.sources == {"d": ["b"], "a": [], "b": ["a"], "c": ["a"]}
    assert graph.chosen(until="b") == ["a", "b"] and graph.chosen(branch="zero") == ["a", "c"]
    assert graph.chosen(only=["d", "a"]) == ["a", "d"]


def test_inputs_become_paths(bench):
    bench.stages["d"]["inputs"] = {"reads": ["own=b/train.jsonl", "text=built-in"], "model_name_or_path": "hub:x/y"}
    bench.stages["d"]["inputs"] |= {"rewards": ["accuracy", "c"]}
    bench.stages["c"].pop("branches")
    graph = bench.read()
    assert graph.sources["d"] == ["b", "c"]
    assert graph.stages["d"].values(graph.names, "/run") == {
        "value": "d", "reads": ["own=/run/b/train.jsonl", "text=built-in"], "model_name_or_path": "x/y",
        "rewards": ["accuracy", "/run/c"],
    }  # fmt: skip


def change(stage, key, value):
    return lambda stages: stages[stage].update({key: value})


@pytest.mark.parametrize("edit, message", [
    (change("a", "inputs", {"reads": ["d"]}), "cycle: .*a -> b"),
    (change("a", "inputs", {"reads": ["a"]}), "cycle"),
    (change("a", "kind", "comand"), "stages.a.kind='comand' is unknown: did you mean command"),
    (change("a", "input", {}), "unknown key 'input' in stages.a: did you mean inputs"),
    (change("a", "config", "none.yaml"), "stages.a.config=none.yaml: no such file"),
    (change("a", "arguments", {"output_dir": "x"}), "output_dir is set by the pipeline"),
    (change("a", "arguments", {"dry_run": True}), "dry_run is set by the pipeline"),
    (change("b", "arguments", {"reads": "x"}), "reads stands in inputs and in arguments"),
    (change("d", "branches", ["zero"]), "stages.d .branches .'zero'.. reads b"),
    (change("d", "branches", []), "reads b, which only branches"),
    (lambda stages: stages.update({"a.b": stages.pop("c")}), "stages.a.b: a name begins with a letter"),
    (lambda stages: stages["c"].update(inputs={"dataset_name": "data/none"}), "dataset_name='data/none' is not there"),
    (lambda stages: (stages.update(long_name=stages.pop("b")), stages["d"].update(inputs={"reads": ["longname"]})),
     "did you mean the stage long_name"),
])  # fmt: skip
def test_a_wrong_graph_is_refused_before_anything_runs(bench, edit, message):
    edit(bench.stages)
    with pytest.raises(ValueError, match=message):
        bench()
    assert not bench.home.exists()


def test_overrides_name_their_stage():
    given = ["--a.steps", "3", "--b.tasks", "x:1", "y", "--a.packing=false", "--a.sizes.wide", "1e-2",
             "--b.list", "[1]"]  # fmt: skip
    assert parse_overrides(given, ["a", "b"]) == {
        "a": {"steps": 3, "packing": False, "sizes.wide": 0.01}, "b": {"tasks": ["x:1", "y"], "list": [1]}
    }  # fmt: skip
    for bad, message in ((["--steps", "3"], "begin it with a stage, e.g. --a.steps"), (["--c.x", "1"], "stages are a"),
                         (["lost"], "a value without a key"), (["--a.list", "[x]"], "--a.list .x. is not valid"),
                         ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            parse_overrides(bad, ["a"])


def test_an_override_of_an_input_moves_the_edge(bench):
    graph = bench.read("--d.reads", "a", "--d.value", "7")
    assert graph.sources["d"] == ["a"] and graph.stages["d"].arguments["value"] == 7


@pytest.mark.parametrize("options, message", [
    (["--only", "e"], "--only e: no such stage"), (["--until", "e"], "--until e: no such stage"),
    (["--branch", "ful"], "branches are full, zero"), (["--only", "b"], "reads a, which is not done"),
    (["--only", "a", "--force", "b"], "--force b: not among"),
    (["--until", "d", "--branch", "zero"], "--until d is of branch full"),
])  # fmt: skip
def test_a_wrong_choice_is_refused(bench, options, message):
    with pytest.raises(ValueError, match=message):
        bench(*options)
    assert not bench.starts()


def test_a_key_inside_of_json_text_is_a_setting_of_its_own(bench):
    bench.stages["a"]["arguments"]["sizes"] = '{"wide": 1}'
    settings = settings_of(bench.read("--a.sizes.wide", "2", "--b.sizes.wide", "3"), "a")
    assert settings["sizes"] == '{"wide": 1}' and settings["sizes.wide"] == 2


def test_paths_with_an_equals_sign_or_a_tilde(bench, monkeypatch):
    monkeypatch.setenv("HOME", str(bench.folder))
    (folder := bench.folder / "x=1" / "y").mkdir(parents=True)
    bench.stages["c"]["inputs"] = {"dataset_name": str(folder), "corpus": "own=~/x=1"}
    graph = bench.read()
    assert not graph.absent
    assert graph.stages["c"].values(graph.names, "r")["dataset_name"] == str(folder)
    assert graph.stages["c"].values(graph.names, "r")["corpus"] == f"own={bench.folder / 'x=1'}"


# ---------------------------------------------------------------- what is run again


def test_what_is_done_is_not_run_again(bench):
    found = bench()
    assert {name: bench.out(name) for name in "abcd"} == {"a": "a", "b": "ba", "c": "ca", "d": "dba"}
    assert all(record["state"] == "done" and record["seconds"] > 0 for record in found["stages"].values())
    assert bench()["stages"] == found["stages"]
    assert bench.starts() == dict.fromkeys("abcd", "x")


def test_a_changed_setting_makes_what_reads_it_stale(bench, capsys):
    bench()
    bench.stages["b"]["arguments"]["value"] = "B"
    with pytest.raises(ValueError, match="stale: b, d .*--rerun_stale"):
        bench()
    said = capsys.readouterr().out
    assert 'stale  b: value: "b" -> "B"' in said and "stale  d: its input b is another one" in said
    assert bench.out("b") == "ba" and bench.starts() == dict.fromkeys("abcd", "x")
    with pytest.raises(ValueError, match="reads b, which is stale: value"):
        bench("--only", "d", "--rerun_stale")
    bench("--rerun_stale")
    assert (bench.out("b"), bench.out("d"), bench.out("c")) == ("Ba", "dBa", "ca")
    assert (bench.home / "b.stale-1" / "out").read_text() == "ba" and (bench.home / "d.stale-1").is_dir()
    assert not (bench.home / "a.stale-1").exists() and not (bench.home / "c.stale-1").exists()
    assert bench.starts() == dict.fromkeys("abcd", "x")  # in new folders


def test_force_makes_a_stage_again_and_what_reads_it_stale(bench):
    bench()
    bench("--only", "b", "--force", "b")
    assert (bench.home / "b.stale-1").is_dir() and not (bench.home / "d.stale-1").exists()
    page = (bench.home / "report.html").read_text()
    assert re.search(r"<tr><td>d <span[^>]*>\[full\]</span></td><td>stale</td>", page)
    assert "<td>a</td><td>done</td>" in page and "3 of 4 stages are done, 1 stale" in page
    with pytest.raises(ValueError, match="stale: d "):
        bench()
    bench("--force", "b", "--rerun_stale")
    assert (bench.home / "b.stale-2").is_dir() and (bench.home / "d.stale-1").is_dir()
    bench()


def test_lost_outputs_and_changed_files_make_a_stage_stale(bench):
    text = bench.folder / "text.txt"
    text.write_text("one")
    bench.stages["c"]["inputs"]["first"] = str(text)
    bench()
    (bench.home / "d" / "out").unlink()
    text.write_text("two")
    home = PipelineFolder(bench.home)
    planned = plan(bench.read(), home.records, home)
    assert planned["d"].reasons == ["d/out is gone"] and planned["d"].status == "stale"
    (reason,) = planned["c"].reasons
    assert reason.startswith("content of first ") and planned["a"].status == planned["b"].status == "done"
    (bench.home / "d" / "report.html").write_text("drawn again")  # no output
    (bench.home / "d" / "out").write_text("dba")
    assert plan(bench.read(), home.records, home)["d"].status == "done"


def test_what_only_changes_the_log_makes_nothing_stale(bench):
    graph, again = bench.read(), bench.read("--a.disable_tqdm", "true", "--a.report_to", "none")
    files = PipelineFolder(bench.home)
    versions = [{name: each.record["version"] for name, each in plan(g, {}, files).items()} for g in (graph, again)]
    assert versions[0] == versions[1]
    assert plan(bench.read("--a.value", "x"), {}, files)["d"].record["version"] != versions[0]["d"]


# ---------------------------------------------------------------- failures


def test_a_failure_is_shown_and_the_stage_goes_on_at_the_next_call(bench, capsys):
    bench.stages["b"]["arguments"]["first"] = "fail"
    with pytest.raises(ValueError, match="not finished: b "):
        bench()
    assert bench.starts() == {"a": "x", "b": "x"}
    said = capsys.readouterr().err
    assert "stage b failed: StageError: the command ended with code 3" in said and "stage.py --reads" not in said
    assert f"stage.py --value b --first fail --reads {bench.home / 'a'} --output_dir {bench.home / 'b'}" in said
    record = json.loads((bench.home / "pipeline.json").read_text())["stages"]["b"]
    assert record["state"] == "failed" and "code 3" in (bench.home / "report.html").read_text()
    bench()
    assert bench.starts()["b"] == "xx" and bench.out("d") == "dba" and not (bench.home / "b.stale-1").exists()


def test_keep_going_runs_what_does_not_depend_on_it(bench):
    bench.stages["b"]["arguments"]["first"] = "fail"
    with pytest.raises(ValueError, match=r"b \(StageError: .*d \(waits for b\)"):
        bench("--keep_going")
    assert set(bench.starts()) == {"a", "b", "c"}


def test_a_stage_that_made_less_than_is_read_is_named(bench):
    bench.stages["d"]["inputs"] = {"first": "b/nothing"}
    with pytest.raises(ValueError, match="reads .*run/b/nothing, which b has not made"):
        bench()


@pytest.mark.parametrize("content", ['{"overall": 0.7}', '{"tasks": {"sums": 0.5}}', "[]", '{"tasks": [1]}'])
def test_an_eval_json_of_another_form_is_no_score(tmp_path, content):
    (tmp_path / "eval.json").write_text(content)
    assert evaluations(tmp_path) == read_scores(tmp_path) == {} and outcome(tmp_path) == ""


def test_a_page_that_cannot_be_drawn_ends_no_pipeline(bench, capsys):
    bench.stages["a"]["command"] = ["sh", "-c", f"mkdir -p {bench.home}/a; echo a > {bench.home}/a/out;"
                                    f"echo nonsense > {bench.home}/a/metrics.jsonl; echo nonsense"
                                    f" > {bench.home}/a/train.jsonl"]  # fmt: skip
    assert all(record["state"] == "done" for record in bench()["stages"].values())
    assert "no report (" in capsys.readouterr().out


def test_a_killed_command_goes_on_in_its_folder(bench):
    bench.stages["b"]["arguments"]["first"] = "die"
    with pytest.raises(ValueError, match="ended with code -9"):
        bench()
    bench()
    assert bench.starts()["b"] == "xx" and bench.out("d") == "dba"


def wait_for(path):
    limit = time.time() + 60
    while not path.exists():
        assert time.time() < limit, f"{path} did not come"
        time.sleep(0.02)


def test_a_killed_pipeline_is_continued(bench, capsys):
    bench.stages["b"]["arguments"]["first"] = "wait"
    child = multiprocessing.get_context("fork").Process(target=bench)
    child.start()
    try:
        wait_for(bench.home / "b" / "starts")
        with pytest.raises(ValueError, match=f"in use by process {child.pid} on "):
            bench()
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    assert PipelineFolder(bench.home).records["b"]["state"] == "running"
    orphan = PipelineFolder(bench.home).records["b"]["process"][0]
    try:
        with pytest.raises(ValueError, match=f"stage b is still running as process {orphan}"):
            bench()
    finally:
        os.kill(orphan, signal.SIGKILL)
    while process_of(orphan)[1]:
        time.sleep(0.02)
    bench()
    assert bench.starts() == {"a": "x", "b": "xx", "c": "x", "d": "x"} and bench.out("d") == "dba"
    assert not (bench.home / "pipeline.lock").exists()


def test_a_pipeline_json_that_cannot_be_read_is_said(bench):
    bench.home.mkdir()
    (bench.home / "pipeline.json").write_text("{")
    with pytest.raises(ValueError, match="pipeline.json cannot be read"):
        bench()


def test_a_dry_run_makes_nothing(bench, capsys):
    bench.stages["c"]["inputs"] = {"dataset_name": "data/none"}
    assert bench("--dry_run")["report"] is None and not bench.home.exists()
    assert "missing  stages.c.inputs.dataset_name='data/none'" in capsys.readouterr().out
    bench("--branch", "full")  # what the other branch lacks does not matter
    assert set(bench.starts()) == {"a", "b", "d"}
