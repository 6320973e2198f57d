"""The cleaning driver on small sources: what is removed and why, the same bytes however it is run, resuming."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

from data_scripts import clean_corpus, document_folder
from data_scripts.cleaning import clean_blocks, clean_stages, removal_report
from data_scripts.cleaning.clean_settings import CleanSettings, read_settings
from data_scripts.cleaning.removal_report import is_finished, table

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "Which of the two rivers that meet near the old mill carries more water in the month of April?"
WORDS = ("river mill water stone bridge field horse garden winter morning letter window market harbour candle "
         "teacher village mountain forest window kitchen song table island soldier doctor road lantern").split()


def prose(seed, sentences=12):
    generator = random.Random(seed)
    return " ".join("The {} of the {} was near the {} and we saw a {} with her {} in the {}.".format(
        *generator.choices(WORDS, k=6)) for _ in range(sentences))


def raw_source(folder, name, texts, kind="text", languages=("en",), shard_characters=7_000):
    folder.mkdir(exist_ok=True)
    writer = document_folder.DocumentWriter(folder / name, shard_characters)
    for number, text in enumerate(texts):
        writer.write(text, f"{name}/{number}", path=f"{number}.txt", language=languages[0])
    document_folder.write_folder_manifest(folder / name, writer.close(), source=name, kind=kind, licence="none",
                                          languages=list(languages), origin="test", packages=[], left_out={},
                                          command="")


@pytest.fixture
def raw(tmp_path):
    near = prose(1).split()
    near[40] = "elephant"
    folder = tmp_path / "raw"
    raw_source(folder, "alpha", [prose(i) for i in range(12)] + ["tiny", prose(3).upper().replace(" ", "  ")])
    raw_source(folder, "beta", [" ".join(near), prose(2), *(prose(i) for i in range(20, 30)),
                                prose(40) + " " + QUESTION.upper().replace(" ", "\n") + " " + prose(41)])
    return folder


def settings(raw):
    bench = raw.parent / "bench.jsonl"
    bench.write_text(json.dumps({"question": QUESTION}) + "\n")
    return read_settings(None, **{"skip": ["language", "boilerplate", "repetition", "entropy"],
                                  "decontamination.tasks": [], "decontamination.benchmarks": [str(bench)]})


def content(folder):
    """Bytes of all that a clean folder is judged by; times and memory of report.json left out."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
             if path.is_file() and path.relative_to(folder).parts[0] not in ("work", "logs", "report.json")}
    report = json.loads((folder / "report.json").read_text())
    for entry in (report, *report["steps"]):
        entry.pop("seconds")
    del report["stages"]
    return found | {"report": report}


def clean(raw, output, **options):
    return clean_corpus.clean(raw, output, options.pop("settings", None) or settings(raw), progress=False, **options)


def test_what_is_removed_and_why(raw, tmp_path):
    report = clean(raw, tmp_path / "clean")
    removed = {}
    for path in (tmp_path / "clean" / "removed").rglob("*.zst"):
        for line in document_folder.read_lines(path):
            row = json.loads(line)
            removed[row["id"]] = path.parent.parent.name, row["metadata"]
    assert removed.keys() == {"alpha/12", "alpha/13", "beta/0", "beta/1", "beta/12"}
    assert removed["alpha/12"][0] == "short"
    assert removed["alpha/13"][0] == removed["beta/1"][0] == "exact_duplicates"
    assert removed["alpha/13"][1]["filter_reason"] == "equal to one within its source"
    assert removed["beta/1"][1]["duplicate_of"] == {"source": "alpha", "id": "alpha/2"}
    assert removed["beta/0"][0] == "near_duplicates" and removed["beta/0"][1]["similarity"] > .6
    assert removed["beta/0"][1]["duplicate_of"]["id"] == "alpha/1"
    assert removed["beta/12"][0] == "decontamination" and "RIVERS" in removed["beta/12"][1]["matched"]["span"]

    kept = [row for name in ("alpha", "beta") for row in document_folder.read_documents(tmp_path / "clean" / name)]
    assert len(kept) == 27 - len(removed) and {row["text"] for row in kept} >= {prose(0), prose(25)}
    assert set(kept[0]["metadata"]) >= {"path", "language"} and not {"kind", "_index"} & set(kept[0]["metadata"])
    manifest = document_folder.read_folder_manifest(tmp_path / "clean" / "beta", verify=True)
    assert manifest["documents"] == 10 and manifest["licence"] == "none" and manifest["cleaned"]["documents_in"] == 13

    for name in ("alpha", "beta"):  # nothing is lost between two steps, and every loss has a reason
        counts = [step["sources"][name] for step in report["steps"]]
        assert counts[0]["documents_in"] == len([None for row in document_folder.read_documents(raw / name)])
        for before, after in zip(counts, counts[1:]):
            assert before["documents_out"] == after["documents_in"]
            assert before["characters_out"] == after["characters_in"]
        for entry in counts:
            assert entry["documents_in"] - entry["documents_out"] == sum(entry["reasons"].values())
    assert report["duplicates"]["near"]["pairs_across_sources"] == {"alpha|beta": 1}
    assert report["duplicates"]["near"]["examples"][0]["kept"]["id"] == "alpha/1"
    bench = report["decontamination"]["sets"][str(tmp_path / "bench.jsonl")]
    assert (bench["items"], bench["found"], bench["documents_removed"]) == (1, 1, 1)
    assert report["languages"] == {"alpha": {"en": 12}, "beta": {"en": 10}}
    assert "equal to one in alpha 1" in table(report)


def test_one_and_two_workers_give_the_same_bytes(raw, tmp_path):
    clean(raw, tmp_path / "one", workers=1)
    clean(raw, tmp_path / "two", workers=2)
    assert len(content(tmp_path / "one")) > 6 and content(tmp_path / "one") == content(tmp_path / "two")


def test_a_run_that_failed_goes_on(raw, tmp_path, monkeypatch):
    """An exception at several places; the next run finishes, and does not repeat finished tasks."""
    write, calls = clean_blocks.write_json, []

    def failing(path, value):
        calls.append(str(path))
        if len(calls) in (8, 25, 40, 55):
            raise OSError(errno.ENOSPC, "no space left on device")
        write(path, value)

    clean(raw, tmp_path / "whole")
    monkeypatch.setattr(clean_blocks, "write_json", failing)
    for attempt in range(6):
        try:
            clean(raw, tmp_path / "broken")
            break
        except OSError as error:
            assert "the disk is full in stage" in str(error) and "goes on from here" in str(error)
            assert not is_finished(tmp_path / "broken")
    assert attempt >= 2 and is_finished(tmp_path / "broken")
    assert content(tmp_path / "broken") == content(tmp_path / "whole")
    facts = [path for path in calls if "/work/filter/" in path and path.endswith("facts.json")]
    assert len(facts) - len(set(facts)) <= 2  # the failed task is done again, the others are not


@pytest.mark.slow
def test_a_killed_run_goes_on(raw, tmp_path):
    clean(raw, tmp_path / "whole")
    config = tmp_path / "clean.yaml"
    config.write_text(json.dumps({"skip": settings(raw).skip, "decontamination": {
        "tasks": [], "benchmarks": [str(tmp_path / "bench.jsonl")]}}))
    command = [sys.executable, "-m", "data_scripts.clean_corpus", "--input_dir", str(raw), "--output_dir",
               str(tmp_path / "killed"), "--workers", "2", "--config", str(config)]
    for seconds in (4, 6, 8):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_what_changed_is_made_again_and_nothing_else(raw, tmp_path, caplog):
    caplog.set_level("INFO")
    output = tmp_path / "clean"
    clean(raw, output)
    stamp = (output / "report.json").stat().st_mtime_ns
    clean(raw, output)
    assert (output / "report.json").stat().st_mtime_ns == stamp and "nothing to do" in caplog.text
    chosen = settings(raw)
    chosen.near_duplicates.minimum_similarity["text"] = 1.0
    caplog.clear()
    report = clean(raw, output, settings=chosen)
    assert "stage filter is finished" in caplog.text and "stage near: settings or input changed" in caplog.text
    assert report["duplicates"]["near"]["removed"] == 0
    raw_source(raw, "aardvark", [prose(i) for i in range(60, 63)] + [prose(2)])
    caplog.clear()
    clean(raw, output, settings=chosen)
    assert "files are as before" in caplog.text
    clean(raw, tmp_path / "fresh", settings=chosen)
    assert content(output) == content(tmp_path / "fresh")


@pytest.fixture
def small(tmp_path):
    """(folder, settings) of two sources and the stages that take no time."""
    for name in ("alpha", "beta"):
        raw_source(tmp_path / "small", name, [prose(name), prose(f"{name} 2", 3), "tiny"])
    return tmp_path / "small", read_settings(None, skip=[
        "language", "boilerplate", "repetition", "entropy", "near_duplicates", "decontamination"])


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_a_run_killed_while_it_replaces_the_clean_folder_goes_on(small, tmp_path, monkeypatch):
    (raw, chosen), output, remove = small, tmp_path / "clean", shutil.rmtree
    clean(raw, output, settings=chosen)
    whole, report = content(output), output / "report.json"
    report.write_text(report.read_text().replace(json.loads(report.read_text())["fingerprint"], "another run's"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # as old sources are removed
        patch.setattr(removal_report.shutil, "rmtree", lambda *path, **options: (
            remove if report.exists() else interrupt)(*path, **options))
        clean(raw, output, settings=chosen)
    assert not is_finished(output)
    clean(raw, output, settings=chosen)
    assert content(output) == whole


def test_what_was_deleted_is_published_again_and_the_page_may_stay(small, tmp_path):
    (raw, chosen), output = small, tmp_path / "clean"
    clean(raw, output, settings=chosen)
    whole = content(output)
    (output / "report.html").write_text("made by corpus_report")
    for gone in ("alpha", "report.json"):
        shutil.rmtree(output / gone) if gone == "alpha" else (output / gone).unlink()
        assert not is_finished(output)
        clean(raw, output, settings=chosen)
        assert {name: found for name, found in content(output).items() if name != "report.html"} == whole


def test_a_task_killed_with_other_settings_is_done_again(small, tmp_path, monkeypatch):
    (raw, chosen), output = small, tmp_path / "clean"
    clean(raw, output, settings=chosen)
    whole, report = content(output), output / "report.json"
    chosen.filters["min_characters"] = 500
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # its counts are written, its facts are not
        patch.setattr(clean_blocks, "save_array", interrupt)
        clean(raw, output, settings=chosen)
    del chosen.filters["min_characters"]
    report.unlink()
    clean(raw, output, settings=chosen)
    assert content(output) == whole


def test_the_first_by_the_order_of_sources_is_kept(raw, tmp_path):
    chosen = settings(raw)
    chosen.source_order = ["beta"]
    clean(raw, tmp_path / "clean", settings=chosen)
    ids = {row["id"] for row in document_folder.read_documents(tmp_path / "clean" / "beta")}
    assert {"beta/0", "beta/1"} <= ids


@pytest.mark.parametrize("break_it, message", [
    (lambda raw: (raw / "beta" / "documents-00000.jsonl.zst").write_bytes(b"x"), "beta/documents-00000.*changed since"),
    (lambda raw: (raw / "beta" / "manifest.json").unlink(), "beta has no manifest.json"),
    (lambda raw: [path.unlink() for path in raw.rglob("*.zst")], "missing")])
def test_changed_sources_are_named(raw, tmp_path, break_it, message):
    break_it(raw)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        clean(raw, tmp_path / "clean")
    assert not (tmp_path / "clean").exists()


def test_one_changed_byte_is_found(raw, tmp_path):
    path = raw / "alpha" / "documents-00000.jsonl.zst"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match="alpha/documents-00000.*another sha256"):
        clean(raw, tmp_path / "clean")


def test_errors_of_the_command_are_one_line(raw, tmp_path, capsys):
    config, packaged = tmp_path / "none.yaml", tmp_path / "packaged.yaml"
    config.write_text("decontamination: {tasks: []}")
    packaged.write_text(f"decontamination: {{tasks: [mmlu], tasks_dir: {tmp_path}}}")
    for extra, message in ((["--skip", "nonsense"], "skip names nonsense; steps are"),
                           (["--benchmarks", "none.jsonl", "--config", str(config)], "there is no file none.jsonl"),
                           (["--config", str(packaged)], "--without_packaged"),
                           (["--output_dir", str(raw / "clean")], "lies in input_dir"),
                           (["--workers", "0"], "workers=0 must be")):
        with pytest.raises(SystemExit) as stop:
            clean_corpus.main(["--input_dir", str(raw), "--output_dir", str(tmp_path / "clean"), *extra])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and error.splitlines()[-1].startswith("error: ")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds thesis.txt"):
        clean(raw, tmp_path / "mine")


@pytest.mark.parametrize("facts, message", [
    ({"source": "../beta"}, "source='../beta' must be a name"), ({"source": 3}, "source=3 must be a name"),
    ({"languages": "en"}, "languages='en' must be a list"), ({"languages": None}, "languages=None must be a list")])
def test_manifests_with_impossible_facts_are_named(facts, message, small, tmp_path):
    path = small[0] / "alpha" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    with pytest.raises(ValueError, match=f"alpha/manifest.json: {message}"):
        clean_corpus.find_sources(small[0])


@pytest.mark.parametrize("line", ['{"text": "a"}', "not json", '{"text": 3, "id": "x", "metadata": {}}', "[]", ""])
def test_lines_that_are_no_documents_are_named(line, tmp_path):
    path = tmp_path / "documents.jsonl.zst"
    good = json.dumps({"text": "a", "id": "x", "metadata": {}})
    path.write_bytes(clean_blocks.zstandard.ZstdCompressor().compress(f"{good}\n{line}\n".encode()))
    shard = clean_blocks.Shard(0, "alpha", path.name, str(path), "text", ("en",), "")
    with pytest.raises(ValueError, match="documents.jsonl.zst: line 2 is no document"):
        list(clean_blocks.ShardReader([shard]).run())


def test_a_run_without_steps_is_refused(small, tmp_path):
    from data_scripts.cleaning.filter_steps import STEPS

    with pytest.raises(ValueError, match="nothing is left to do"):
        clean(small[0], tmp_path / "clean", settings=CleanSettings(
            skip=[*STEPS, "exact_duplicates", "near_duplicates", "decontamination"]))


def test_settings_files(tmp_path):
    path = tmp_path / "clean.yaml"
    path.write_text("near_duplicates:\n  unitz: 3\n")
    with pytest.raises(ValueError, match="clean.yaml.*unknown setting 'unitz'.*did you mean 'units'"):
        read_settings(path)
    path.write_text("near_duplicates:\n  minimum_similarity: {code: 0.9}\n")
    found = read_settings(path, **{"decontamination.action": "cut"})
    assert found.near_duplicates.minimum_similarity["code"] == .9 and found.decontamination.action == "cut"
    default = CleanSettings().near_duplicates.minimum_similarity
    assert found.near_duplicates.minimum_similarity == {**default, "code": .9}


@pytest.mark.parametrize("text, message", [
    ("decontamination:", "decontamination is a NoneType"), ("- a", "is a list"), ("filters: 3", "filters=3 must be of"),
    ("filters: {min_characters: ten}", "min_characters='ten' must be of type int"), ("skip: entropy", "skip='entropy'"),
    ("near_duplicates: {minimum_similarity: {text: high}}", "minimum_similarity of text is 'high'"),
    ("near_duplicates: {buckets: true}", "buckets=True must be of type int"),
    ("decontamination: {tasks: mmlu}", "tasks='mmlu' must be of type list"),
    ("decontamination: {common_share: x}", "common_share='x'"), ("filters: {max_parse_errors: {go: x}}", "go='x' must"),
    ("decontamination: {benchmarks: [~/none.jsonl]}", "there is no file")])
def test_settings_of_a_wrong_type_are_named(text, message, raw, tmp_path):
    path = tmp_path / "clean.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        clean_corpus.make_plan(raw, tmp_path / "clean", read_settings(path, **{"decontamination.action": "cut"}))


def test_settings_of_filters_as_yaml_writes_them(tmp_path):
    path = tmp_path / "clean.yaml"
    path.write_text("filters: {skip: [entropy], language_threshold: 1, max_parse_errors: {go: 0.5}}\nskip: [code]\n")
    steps, decisive = clean_corpus.make_filters(read_settings(path))
    assert not {"entropy", "code"} & set(dict(steps)) and decisive["language_threshold"] == 1


def test_pipelines_that_another_executor_ran_are_published(small, tmp_path):
    """As Slurm and Ray do it: all stages prepared, then each one's tasks, by nobody who notes the time."""
    (raw, chosen), output = small, tmp_path / "clean"
    _, stages = clean_corpus.make_plan(raw, output, chosen)
    for stage in stages:
        clean_stages.prepare(stage, output / "logs" / stage.name)
    for stage in stages:
        clean_stages.QuietExecutor(stage.pipeline, tasks=stage.tasks, workers=1,
                                   logging_dir=str(output / "logs" / stage.name)).run()
    clean(raw, tmp_path / "here", settings=chosen)
    assert is_finished(output) and content(output) == content(tmp_path / "here")


def test_slurm_executors_are_of_the_same_pipelines(raw, tmp_path):
    _, stages = clean_corpus.make_plan(raw, tmp_path / "clean", settings(raw))
    executors = clean_stages.slurm_executors(stages, tmp_path / "logs", 100, "cpu", 4)
    assert [executor.pipeline for executor in executors] == [stage.pipeline for stage in stages]
    assert all(after.depends is before for before, after in zip(executors, executors[1:]))
    assert [executor.tasks for executor in executors] == [stage.tasks for stage in stages]
