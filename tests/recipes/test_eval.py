"""recipes/eval.py on a tiny model folder: eval.json, report.html, comparison, several processes."""

import html
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_scripts.train_tokenizer import train_tokenizer
from recipes import eval as evaluation_script
from recipes.eval_config import EvalConfig
from recipes.eval_report import pick_examples, write_report
from recipes.eval_scores import OUTCOMES
from recipes.eval_tables import comparison_table, model_rows, paired_differences, read_results, results_table
from recipes.evaluation import read_completions
from tests.modeling.helpers import tiny_model

ROOT = Path(__file__).parents[2]
TEXT = "State the final answer: 12 + 30 = 42. Is the answer yes or no?"
TASKS = ["--tasks", "chain_sum:1-2", "syllogism:1", "--problems", "4", "--max_new_tokens", "12"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = train_tokenizer([TEXT] * 20, 330)
    model = tiny_model(vocab_size=330, max_position_embeddings=256, num_hidden_layers=2)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "held_out.txt").write_text(f"{TEXT}\n\n{TEXT} And <more> & more.", encoding="utf-8")
    return path


def command(folder, output_dir, *more):
    return ["--model_name_or_path", str(folder), "--output_dir", str(output_dir), "--use_cpu", "--disable_tqdm", "true",
            *TASKS, *more]  # fmt: skip


def decided(result):
    """Without what may differ between equal runs."""
    return {name: result[name] for name in ("tasks", "overall", "per_problem", "settings", "prompt_example")}


@pytest.fixture(scope="module")
def evaluated(folder, tmp_path_factory):
    """The output folder of a real run."""
    path = tmp_path_factory.mktemp("evaluated")
    text = ["--text_dataset", str(folder / "held_out.txt")]
    evaluation_script.main(command(folder, path, "--samples", "3", "--temperature", "1.0", *text))
    return path


def test_a_run(folder, evaluated):
    result = json.loads((evaluated / "eval.json").read_text())
    printed, rows = results_table(result), read_completions(evaluated / "completions.jsonl")
    assert len(rows) == 24 and result["model"]["dtype"] == "float32" and result["settings"]["sampling"]["samples"] == 3
    assert all(task["pass@k"].keys() == {"1", "2", "3"} for task in (*result["tasks"].values(), result["overall"]))
    assert {"python", "torch", "transformers", "code"} <= result["versions"].keys()
    assert result["text"]["bytes"] == len((folder / "held_out.txt").read_bytes())

    page = (evaluated / "report.html").read_text()
    low, high = (f"{100 * result['tasks']['syllogism']['pass@1'][end]:.1f}" for end in ("low", "high"))
    for words in (f"[{low}, {high}]", f"{result['text']['bits_per_byte']:.4f}", "pass@3 %", "Calibration", "difficulty",
                  html.escape(rows[0]["prompt"])[:60], html.escape(result["prompt_example"])):
        assert words in page, words
    assert f"[{low}, {high}]" in printed and "http://" not in page.replace("http://www.w3.org", "").replace(
        "http://purl.org", "").replace("http://creativecommons.org", "")  # nothing is loaded from elsewhere
    for outcome, chosen in pick_examples(rows).items():
        assert f"{sum(row['outcome'] == outcome for row in rows)} of 24" in page
        assert all(row["outcome"] == outcome for row in chosen)


def test_a_comparison(folder, evaluated, tmp_path, capsys):
    other = json.loads((evaluated / "eval.json").read_text())
    other["settings"]["seed"], other["settings"]["sampling"]["seed"], other["text"]["window"] = 7, 1, 9
    (tmp_path / "eval.json").write_text(json.dumps(other))
    paths = [str(evaluated / "eval.json"), str(tmp_path)]
    evaluation_script.main(["--compare", *paths, "--output_dir", str(tmp_path / "c")])
    printed, page = capsys.readouterr().out, (tmp_path / "c/report.html").read_text()
    name = folder.name
    assert f"less {name}" in printed and f"{name} (2)" in printed
    assert f"Differences to {name}" in page and page.count("<svg") == 2
    for difference in ("problem_seed: 0, 7", " seed: 0, 1", "bits per byte do not compare"):
        assert difference in printed and difference.strip() in page

    results = read_results([evaluated, tmp_path])
    del results[1]["tasks"]["syllogism"]  # means over different tasks do not compare
    assert not [row for row in model_rows(results)[1] if row[0].startswith("mean")]
    results[0]["tasks"]["gcd"] = results[1]["tasks"]["gcd"] = results[0]["tasks"]["chain_sum"]
    both = results[0]["tasks"]["chain_sum"]["pass@1"]["value"]
    assert f"mean of 2 common tasks  {100 * both:.1f} [" in comparison_table(results)


def test_paired_differences_take_common_problems_only(tmp_path):
    for name, values in (("a", {"1": 1.0, "2": 0.0, "3": 0.0}), ("b", {"2": 1.0, "3": 0.0, "4": 1.0})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"name": name, "tasks": {}, "per_problem": {"t": values}}))
    (found,) = paired_differences(read_results([tmp_path / "a.json", tmp_path / "b.json"]))
    assert (found["name"], found["problems"], found["value"]) == ("b", 2, 0.5) and found["low"] < 0.5 < found["high"]
    (tmp_path / "c.json").write_text("[1]")
    for name, words in (("absent", "no such file"), ("c.json", "no result of"), (__file__, "is no JSON")):
        with pytest.raises(ValueError, match=words):
            read_results([tmp_path / name])


def test_every_outcome_can_be_read_on_the_page(evaluated, tmp_path):
    """The report of a made-up mixture: hostile text is escaped, reference and answer letters are counted."""
    rows = read_completions(evaluated / "completions.jsonl")
    for place, row in enumerate(rows):
        row |= {"outcome": OUTCOMES[place % 6], "completion": f"<script>{place}</think>&answer", "kind": "boolean",
                "reference": "Yes", "answer": ("False", "True", None)[place % 3]}  # fmt: skip
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = json.loads((evaluated / "eval.json").read_text())
    result["overall"]["shortened"] = 0.25
    (tmp_path / "eval.json").write_text(json.dumps(result))
    page = write_report(tmp_path).read_text()
    assert "<script" not in page and "&lt;script&gt;0&lt;/think&gt;" in page and "&amp;answer" in page
    assert all(f"<h3>{outcome}:" in page for outcome in OUTCOMES)
    counts = [page.count(f">{answer}</th>") for answer in ("yes", "no", "none")]
    assert counts == [4, 2, 2]  # a column in the table of each task, and a row for the reference
    assert ">Yes</th>" not in page and page.count("rgba(47,138,87,0.18)'>4</td>") == 2  # "True" is the right "Yes"
    assert "25.0 % of completions were cut off early" in page and "25.0 % of" in results_table(result)
    with pytest.raises(ValueError, match=r"holds no eval\.json"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize("changes, words", [
    ({"output_dir": None}, "output_dir is unset"), ({"model_name_or_path": None}, "model_name_or_path is unset"),
    ({"tasks": []}, "nothing to evaluate"), ({"dtype": "int8"}, "dtype='int8'"), ({"tasks": ["gdc"]}, "gcd"),
    ({"samples": 3}, "samples=3 with temperature=0"), ({"difficulties": [2, 2]}, r"\[2, 2\] names one twice"),
])  # fmt: skip
def test_settings_that_cannot_work(changes, words):
    with pytest.raises(ValueError, match=words):
        EvalConfig(**({"model_name_or_path": "m", "output_dir": "o", "tasks": ["gcd"]} | changes))


def test_a_folder_that_cannot_be_written_is_told_before_the_work(folder):
    with pytest.raises(FileExistsError):
        evaluation_script.main(["--model_name_or_path", "absent", "--text_dataset", "absent", "--use_cpu",
                                "--output_dir", str(folder / "held_out.txt")])  # fmt: skip


@pytest.mark.slow
def test_two_processes_give_the_same(folder, tmp_path):
    """The documented way to launch, on gloo; also resumed by one process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    text = ["--text_dataset", str(folder / "held_out.txt"), "--text_window", "16"]
    sampled = ["--samples", "2", "--temperature", "1.0", *text]
    subprocess.run([*launch, "recipes/eval.py", *command(folder, tmp_path / "two", "--batch_size", "3", *sampled)],
                   cwd=ROOT, env=environment, check=True, timeout=300)  # fmt: skip
    evaluation_script.main(command(folder, tmp_path / "one", *sampled))
    two, one = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("two", "one"))
    assert two["device"]["processes"] == 2 and decided(two) == decided(one)
    assert two["text"]["loss"] == pytest.approx(one["text"]["loss"], rel=1e-6)
    files = {path.name for path in (tmp_path / "two").iterdir()}
    assert files == {"eval.json", "report.html", "completions.jsonl", "completions.state.json"}
    lines = (tmp_path / "two/completions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "two/completions.jsonl").write_text("".join(lines[::2]))
    evaluation_script.main(command(folder, tmp_path / "two", *sampled))
    resumed = json.loads((tmp_path / "two/eval.json").read_text())
    assert resumed["timing"]["resumed"] == 8 and decided(resumed) == decided(one)
