"""The benchmark over several GPUs: its cases at toy sizes on two processes of a CPU, failures, its arguments."""

import json

import pytest

from benchmarks import bench_multi

CPU = ["--device", "cpu", "--size", "toy", "--steps", "2", "--warmup", "1"]


def test_cases_and_what_runs_at_the_same_time():
    jobs = bench_multi.make_jobs(bench_multi.parse(CPU))
    json.dumps(jobs)  # they travel on a command line
    assert [job["case"] for job in jobs] == list(bench_multi.CASES)
    names = [[job["case"] for job in each] for each in bench_multi.rounds(jobs, 2)]
    assert names[:2] == [list(bench_multi.CASES[:2]), list(bench_multi.CASES[2:4])]
    assert names[2:] == [[case] for case in bench_multi.CASES[4:]]
    with pytest.raises(SystemExit):
        bench_multi.parse(["--device", "cuda", "--gpus", "999"])


def test_shares_and_the_table():
    alone = {"case": "ours-alone-fp32", "tokens_per_second": 100, "processes": 1, "step_ms": 1.0}
    both = {"case": "ours-fsdp2-fp32", "tokens_per_second": 190, "processes": 2, "step_ms": 1.1}
    assert bench_multi.share_of_alone(both, [alone]) == {"share_percent": 95.0}
    assert bench_multi.share_of_alone(both, []) == {}
    lines = [alone, both, {"case": "library-ddp-bf16", "error": "rank 1: OutOfMemoryError"}]
    assert "rank 1: OutOfMemoryError" in bench_multi.table(lines).splitlines()[3]


@pytest.mark.slow
def test_every_case_runs_and_a_failing_one_stops_no_other(capsys, tmp_path):
    """Two alone in one round. Every case has been run by hand."""
    wanted = ["ours-alone-fp32", "library-alone-bf16", "ours-ddp-bf16", "ours-fsdp2_ep-fp32", "library-fsdp2_ep-fp32"]
    args = bench_multi.parse([*CPU, "--cases", *wanted, "--output", str(tmp_path / "lines.jsonl"), "--timeout", "120",
                              "--deadline", "400"])  # fmt: skip
    jobs = bench_multi.make_jobs(args)
    odd = jobs[-1] | {"case": "ours-fsdp2_ep-bf16", "who": "ours", "layout": "fsdp2_ep",
                      "fields": jobs[0]["fields"] | {"n_routed_experts": 5}}  # fmt: skip
    stuck = jobs[-1] | {"steps": 10**9}
    lines = bench_multi.run_cases([*jobs[:-1], odd], args)
    args.timeout = 15
    lines += bench_multi.run_cases([stuck], args)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == lines and len(lines) == len(wanted) + 1
    assert "n_routed_experts=5 of model.layers.1.mlp must be a multiple of the 2" in lines[-2]["error"]
    assert lines[-1]["error"] == "stopped after 15 s (--timeout)"
    for line in lines[:-2]:
        assert "error" not in line, line
        assert line["tokens_per_second"] > 0 and 4.8 < line["loss"] < 4.9  # of 128 tokens: log(128) = 4.85
        assert ("alone" in line["case"]) == (line["processes"] == 1)
