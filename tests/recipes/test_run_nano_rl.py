"""The driver of the RL runs on nano: what is run with which arguments, equal samples, tables over seeds, the figure."""

import json
import statistics
import sys

import pytest

from benchmarks import run_nano_rl
from benchmarks.rl_tables import band, difference, ends_cell, gain_table, stage_table
from recipes.eval_scores import summarise_tasks
from recipes.evaluation import per_problem
from recipes.intervals import wilson_interval

CONFIG = {
    "rewards": ["accuracy", "format"], "reward_weights": [1.0, 0.1], "reward_kwargs": {"length": {"buffer": 8}},
    "num_generations": 4, "per_device_train_batch_size": 64, "gradient_accumulation_steps": 2, "max_steps": 24,
    "max_completion_length": 32, "temperature": 1.0, "eval_tasks": ["gcd:1"],
}  # fmt: skip
PPO = {"per_device_train_batch_size": 32, "num_mini_batches": 4, "num_ppo_epochs": 1, "max_steps": 9}


def result(rights):
    """An evaluation in which {task: [0 or 1 of each problem]} were right, as recipes/evaluation.py gives it."""
    same = {"difficulty": 1, "sample": 0, "format": True, "finished": True, "shortened": False, "parsed": True,
            "tokens": 9, "answer": "1", "log_prob": -0.1}  # fmt: skip
    rows = [{**same, "task": task, "index": place, "key": f"{task} {place}", "correct": bool(right),
             "lenient": bool(right), "outcome": "correct" if right else "wrong"}
            for task, values in rights.items() for place, right in enumerate(values)]  # fmt: skip
    return {**summarise_tasks(rows), "per_problem": per_problem(rows)}


def write_run(folder, before, after, lengths=(10, 20, 30, 40)):
    folder.mkdir(parents=True)
    tasks = {"before": result(before), "after": result(after)}
    (folder / "eval.json").write_text(json.dumps({"stage": "grpo", "tasks": tasks}))
    records = [{"kind": "train", "step": 2 * place, "length": length, "rewards": {"accuracy": length / 100}}
               for place, length in enumerate(lengths)]  # fmt: skip
    lines = [*records, {"kind": "eval", "step": 8, "length": 999}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "seconds.json").write_text("12.5")


@pytest.fixture
def configs(monkeypatch):
    monkeypatch.setattr(run_nano_rl, "read_config", lambda size, stage: PPO if stage == "ppo" else CONFIG)


NOTHING = {stage: [] for stage in run_nano_rl.OF_STAGE}


def test_stage_table_is_over_problems_and_says_what_seeds_do():
    seeds = [result({"gcd": [1, 1, 0, 0], "lcm": [1, 0]}), result({"gcd": [1, 0, 0, 0], "lcm": [1, 1]})]
    header, rows = stage_table([("cold", seeds[:1]), ("grpo", seeds)])
    assert header == ["pass@1 %", "cold", "grpo (2)"] and [row[0] for row in rows] == ["gcd", "lcm", "mean of tasks"]
    low, high = wilson_interval(2, 4)
    assert rows[0][1] == f"50.0 [{100 * low:.1f}, {100 * high:.1f}]"  # one seed: Wilson's interval
    assert rows[0][2].startswith("37.5 [") and rows[0][2].endswith("(25.0 to 50.0)")
    assert rows[2][2].startswith("56.2 [") and rows[2][2].endswith("(50.0 to 62.5)")


def test_gains_are_paired_and_counted():
    before, after = result({"gcd": [0] * 50 + [1] * 50, "lcm": [1] * 20}), result({"gcd": [0] * 38 + [1] * 62,
                                                                                   "lcm": [1] * 20})  # fmt: skip
    header, rows = gain_table([("grpo", [after], [before])])
    assert header == ["points", "grpo"] and rows[0][1].startswith("+12.0 [+") and rows[1][1].startswith("+0.0 [-")
    assert rows[2][1].startswith("+6.0 [+") and rows[3] == ["tasks with 10 points or more", "1 of 2"]
    reverse = difference([before], [after], "gcd")
    assert reverse["value"] == pytest.approx(-0.12) and reverse["high"] < 0
    with pytest.raises(ValueError, match="gcd: the two sides were evaluated on different problems"):
        difference([after], [result({"gcd": [0, 1]})], "gcd")


def test_curves_band_and_ends():
    runs = [{"records": [{"step": step, "length": step * factor} for step in range(steps)]}
            for factor, steps in ((1, 10), (3, 8))]  # fmt: skip
    steps, mean, low, high = band(runs, "length", smooth=1)
    assert steps == list(range(8)) and (mean[5], low[5], high[5]) == (10, 5, 15)
    assert band(runs, "length", smooth=2)[1][5] == statistics.fmean([4.5, 13.5])
    assert ends_cell(runs, "length", "{:.1f}") == "0.2 -> 14.8 (8.5 to 21.0)" and ends_cell(runs, "kl") == "none"


def test_ppo_samples_as_much_and_shares_the_rest(configs):
    script, config, arguments = run_nano_rl.setting_arguments("ppo", "nano", NOTHING)
    given = run_nano_rl.with_overrides({}, arguments)
    assert (script, config) == ("recipes/ppo.py", "ppo_nano") and given["max_steps"] == 24 * 64 * 2 // 32
    assert given["rewards"] == ["accuracy", "format"] and given["reward_weights"] == [1.0, 0.1]
    assert given["num_generations"] == 4 and json.loads(arguments[arguments.index("--reward_kwargs") + 1])
    shorter = run_nano_rl.setting_arguments("ppo", "nano", NOTHING | {"grpo": ["--max_steps", "8"]})[2]
    assert shorter[shorter.index("--max_steps") + 1] == "32"
    with pytest.raises(ValueError, match="GRPO samples 128 completions, PPO 384 a rollout"):
        run_nano_rl.setting_arguments("ppo", "nano", NOTHING | {"grpo": ["--max_steps", "1"],
                                                                "ppo": ["--num_mini_batches", "12"]})  # fmt: skip
    for spelling in (["--grpo.max_steps=8"], ["--grpo.max_steps", "8"]):  # the recipes read both: so must the counting
        again = run_nano_rl.setting_arguments("ppo", "nano", run_nano_rl.split_overrides(spelling, "nano"))[2]
        assert again == shorter
    longer = run_nano_rl.setting_arguments("ppo", "nano", NOTHING | {"grpo": ["--reward_kwargs.length.buffer", "9"]})[2]
    assert json.loads(longer[longer.index("--reward_kwargs") + 1]) == {"length": {"buffer": 9}}
    assert CONFIG["reward_kwargs"] == {"length": {"buffer": 8}}
    one = NOTHING | {"grpo": ["--rewards", "accuracy", "--reward_weights", "1.0"]}
    dapo = run_nano_rl.with_overrides({}, run_nano_rl.setting_arguments("dapo", "nano", one)[2])
    assert dapo["rewards"] == ["accuracy", "length"] and dapo["reward_weights"] == [1.0, 1.0]  # overridden, and DAPO's
    several = CONFIG | {"num_iterations": 2}
    assert run_nano_rl.equal_steps(several, PPO | {"num_ppo_epochs": 2}) == 96


def test_plan_names_rates_skips_finished_and_ends_with_overrides(configs, tmp_path):
    write_run(tmp_path / "grpo_0", {"gcd": [0]}, {"gcd": [1]})
    (tmp_path / "zero_plain_1").mkdir()
    (tmp_path / "zero_plain_1" / "refused.txt").write_text("nothing can be learned")
    bases = {"cold": "C", "zero": "B", "plain": "P"}
    plan = run_nano_rl.plan(tmp_path, "nano", ["grpo", "zero", "zero_plain", "dapo"], [0, 1], [], bases,
                            NOTHING | {"grpo": ["--max_steps", "3"]})  # fmt: skip
    assert [run.name for run in plan] == ["grpo_1", "zero_0", "zero_1", "zero_plain_0", "dapo_0", "dapo_1"]
    zero = plan[tmp_path / "zero_1"]
    assert zero[zero.index("--model_name_or_path") + 1] == "B" and zero[-2:] == ["--max_steps", "3"]
    assert zero[zero.index("--seed") + 1] == "1" and "deepseek_r1_zero" in zero
    dapo = plan[tmp_path / "dapo_0"]
    assert dapo[dapo.index("--rewards") + 1 :][:3] == ["accuracy", "format", "length"]
    pilots = run_nano_rl.plan(tmp_path, "nano", ["grpo"], [0], [1e-4, 3e-5], bases, NOTHING)
    rates = {run.name: parts[-1] for run, parts in pilots.items()}
    assert rates == {"grpo-0.0001_0": "0.0001", "grpo-3e-05_0": "3e-05"}
    with pytest.raises(SystemExit, match="--plain_base"):
        run_nano_rl.plan(tmp_path, "nano", ["zero_plain"], [0], [], bases | {"plain": None}, NOTHING)
    with pytest.raises(SystemExit, match="--max_steps: begin it with pretrain"):
        run_nano_rl.split_overrides(["--max_steps", "3"], "nano")


def test_runs_side_by_side_failures_and_refusals(tmp_path):
    script = "import sys, time; time.sleep(0.2); print('x' * 3000); print({0!r}); sys.exit({1})"
    said = {"good": ("fine", 0), "bad": ("too few to say that nothing can be learned, and broken", 1),
            "refused": ("ValueError: nothing can be learned: all are 0", 1)}  # fmt: skip
    jobs = {tmp_path / name: [sys.executable, "-c", script.format(*what)] for name, what in said.items()}
    failed = run_nano_rl.run_all(jobs, 2)
    assert list(failed) == [tmp_path / "bad"] and failed[tmp_path / "bad"].rstrip().endswith("broken")
    assert (tmp_path / "refused" / "refused.txt").read_text().startswith("nothing can be learned: all are 0")
    assert not (tmp_path / "good" / "refused.txt").exists()
    assert 0.1 < json.loads((tmp_path / "good" / "seconds.json").read_text()) < 60


def test_report_of_both_branches(tmp_path, capsys):
    cold, better = {"gcd": [0, 1, 0, 1]}, {"gcd": [1, 1, 0, 1]}
    for seed in (0, 1):
        write_run(tmp_path / f"grpo_{seed}", cold, better)
        write_run(tmp_path / f"zero_{seed}", {"gcd": [0, 0, 0, 0]}, {"gcd": [0, 1, 0, seed]})
    write_run(tmp_path / "ppo_0", cold, cold, lengths=(10, 10, 10, 10))
    run_nano_rl.main(["--output_dir", str(tmp_path), "--stages"])
    text = capsys.readouterr().out
    table = [line.split() for line in text.splitlines() if line.startswith("gcd ")]
    assert [part for part in table[0] if "[" not in part and "]" not in part][:4] == ["gcd", "0.0", "50.0", "75.0"]
    assert "grpo - ppo" in text and "12" in text and "10 -> 40" in text
    drawing = (tmp_path / "accuracy.svg").read_text()
    assert drawing.startswith("<svg") and drawing.count("<g id=\"axes_") == 3
    branches = run_nano_rl.branches_of(run_nano_rl.read_runs(tmp_path))
    assert {name: [stage for stage, _ in stages] for name, stages in branches.items()} == {
        "R1-Zero": ["base", "GRPO from the base"], "cold start, then GRPO": ["base", "cold start", "GRPO"]}
