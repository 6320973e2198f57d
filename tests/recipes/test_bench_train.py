"""The benchmark of training: its arguments, its searches and comparisons, and its measurements at toy sizes."""

import json
import re
import threading
import warnings

import pytest
import torch
import torch.distributed.fsdp

from benchmarks import bench_train, train_cases, train_memory, train_peers, train_profile, train_quality, train_recipe
from benchmarks.train_losses import CURVES, compare_curves, markov_rows, measure_losses, smooth
from recipes.sizing import count_parameters
from tests.recipes.tiny_ppo import one_thread  # noqa: F401

CPU = ["--device", "cpu"]


def job(variant, mode="speed", **changes):
    return bench_train.make_jobs(bench_train.parse([*CPU, "--steps", "3", "--warmup", "2"]))[0] | {
        "variant": variant, "mode": mode, "spawned": 0.0, **changes}  # fmt: skip


def test_settings_of_the_recipe():
    argv = ["--steps", "3", "--recipe.max_grad_norm", "0", "--profile", "--recipe.model_config.a=1=2"]
    assert train_recipe.split_recipe_arguments(argv) == (
        ["--steps", "3", "--profile"], ["--max_grad_norm", "0", "--model_config.a", "1=2"])  # fmt: skip
    with pytest.raises(ValueError, match="--recipe.seed needs a value"):
        train_recipe.split_recipe_arguments(["--recipe.seed"])
    with pytest.raises(SystemExit):
        bench_train.parse([*CPU, "--memory", "--recipe.seed", "1"])


@pytest.mark.parametrize("mode, count", [("profile", 2), ("memory", 2), ("scaling", 13), ("losses", 3), ("quality", 3)])
def test_jobs_of_a_mode(mode, count):
    for device in ("cpu", "cuda"):
        jobs = bench_train.make_jobs(bench_train.parse(["--device", device, f"--{mode}"]))
        assert len(jobs) == len({job["variant"] for job in jobs}) == count
        json.dumps(jobs)  # they travel on a command line
        for fields in (job["fields"] for job in jobs if job["fields"]):
            train_cases.our_config(fields)  # checks them


@pytest.mark.parametrize(
    "kernel, kind",
    [
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<GroupProblemShape<", "grouped matmul"),
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "dense matmul"),
        ("cudnn_generated_fort_native_sdpa_sm90_knob_7_64x128x128_4x1x1_kernel0_0", "attention"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>", "copies and elementwise"),
        ("void at::native::indexSelectLargeIndex<c10::BFloat16, long, unsigned int, 2, 2, -2, true>", "expert rows"),
        ("void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<at_cuda_detail::cub::Policy900>", "router and sort"),
        ("Memcpy DtoD (Device -> Device)", "memset and memcpy"),
        ("triton_red_fused__to_copy_mul_rsqrt_3", "fused by the compiler"),
        ("_experts_gradient", "grouped matmul"),
        ("_gate_up_product", "grouped matmul"),
        ("_row_blocks", "router and sort"),
        ("something new", "other"),
    ],
)  # fmt: skip
def test_kinds_of_kernels(kernel, kind):
    assert train_profile.kind_of(kernel) == kind


def test_own_kernels_are_found_in_their_files(monkeypatch, tmp_path):
    (tmp_path / "kernels_x.py").write_text(
        '@triton.jit\ndef _softmax_rows(a):\n    pass\n\n\ndef plain():\n    pass\n\n\n'
        '@triton.jit(do_not_specialize=["a"])\ndef _gathered(a):\n    pass\n'
    )
    monkeypatch.setattr(train_profile, "ROOT", tmp_path)
    monkeypatch.setattr(train_profile, "OWN_FILES", {"kernels_x.py": "norms", "absent.py": "optimizer"})
    train_profile.own_kernels.cache_clear()
    assert train_profile.kind_of("_softmax_rows") == train_profile.kind_of("_gathered") == "norms"  # not by words in it
    train_profile.own_kernels.cache_clear()


def test_own_kernels_of_two_files_have_two_names():
    """A profile tells them by their names alone."""
    texts = [(train_profile.ROOT / path).read_text() for path in train_profile.OWN_FILES]
    launched = [name for text in texts for name in set(re.findall(r"^    (_\w+)\[", text, re.M))]
    assert {"_experts_gradient", "_weight_gradient"} <= set(launched) and len(launched) == len(set(launched))


def test_summary_of_a_profile():
    kernels = [("nvjet_a", 0.0, 4000.0), ("nvjet_a", 5000.0, 6000.0), ("Memset (Device)", 5500.0, 7000.0)]
    found = train_profile.summarise(kernels, steps=2)
    assert (found["span_ms"], found["busy_ms"], found["idle_ms"]) == (3.5, 3.0, 0.5)
    assert found["kinds_ms"] == {"dense matmul": 2.5, "memset and memcpy": 0.75}
    assert found["top"][0]["count"] == 1.0


@pytest.mark.parametrize("room", [0, 3, 4, 5, 63, 100, 1000])
def test_search_for_the_largest_batch(room):
    asked = []
    found, capped = train_memory.largest_fitting(lambda n: asked.append(n) or n <= room, 4, 500)
    assert max(asked) <= 500 and len(asked) == len(set(asked)) <= 16
    assert capped == (room > 500)
    assert found <= room and (found == 500 if capped else room - found <= max(1, room // 16))


def test_out_of_memory_is_a_result(monkeypatch):
    class Step(train_cases.BareStep):
        def __call__(self, ids):
            if ids.shape[0] > 5:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__(ids)

    monkeypatch.setattr(train_memory, "BareStep", Step)
    lines = []
    line = train_memory.measure_memory(
        job("bare-fp32", limit_rows=64), say=lambda text, flush: lines.append(json.loads(text)))  # fmt: skip
    assert (line["rows"], line["capped"], len(lines)) == (5, False, len(line["tries"]))
    assert lines[1]["rows"] == 4  # what a process that dies has found


def test_places_that_wait_for_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    found = train_recipe.SyncPlaces()
    with found.watching():
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation")
        warnings.warn("something else")
    (place, count), = found.places.items()
    assert "tests/recipes/test_bench_train.py:" in place and count == 2


def test_stream_can_be_learned():
    rows = markov_rows(50, 20, 200, seed=0)
    followers = [set() for _ in range(50)]
    for before, after in zip(rows[:, :-1].flatten().tolist(), rows[:, 1:].flatten().tolist()):
        followers[before].add(after)
    assert rows.min() >= 2 and rows.max() < 50 and max(map(len, followers)) <= 4
    assert torch.equal(rows, markov_rows(50, 20, 200, seed=0)) and not torch.equal(rows, markov_rows(50, 20, 200, 1))


def test_losses_of_both_classes():
    line = measure_losses(job("losses-fp32-seed0", weights="fp32", steps=12, learning_rate=3e-3))
    library, off, on = (torch.tensor(line["curves"][name]) for name in CURVES)
    torch.testing.assert_close(off, library, rtol=1e-4, atol=0)  # rounding, 12 steps of it
    assert library[-1] < library[0] - 0.2 and not torch.equal(off, on)
    result = compare_curves([line, line])
    assert result["library"]["spread_over_seeds"] == 0.0
    moved = {**line, "curves": {**line["curves"], CURVES[1]: [value + 0.5 for value in line["curves"][CURVES[1]]]}}
    assert compare_curves([moved])[CURVES[1]]["largest_difference"] == pytest.approx(0.5, abs=1e-3)
    assert smooth([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]


def test_dense_twin_is_as_large_as_what_a_token_passes():
    fields = train_cases.REFERENCE
    mixture, dense = (count_parameters(train_cases.our_config(f)) for f in (fields, train_quality.dense_twin(fields)))
    assert abs(dense.active / mixture.active - 1) < 0.005


def test_changed_fields_change_the_mixture_and_its_twin():
    changes = ["--model_config.n_routed_experts", "8", "--learning_rate=0.5"]
    found = {run: train_quality.quality_settings(job(
        "quality-" + run, run=run, config="recipes/configs/pretrain_tiny.yaml", recipe=changes, eval_steps=1,
        validation_tokens=None, fields={}), "data", "run") for run in train_quality.RUNS}  # fmt: skip
    ours, dense = (found[run][0]["model_config"] for run in ("ours", "dense"))
    assert ours["n_routed_experts"] == 8 and dense["n_routed_experts"] is None
    mixture, twin = (count_parameters(train_cases.our_config(fields)) for fields in (ours, dense))
    assert abs(twin.active / mixture.active - 1) < 0.01
    assert found["dense"][1] == ["--learning_rate=0.5"]
    assert found["library"][1] == ["--learning_rate=0.5", "--optimizer", "torch"]  # ours is no default of Trainer
    with pytest.raises(ValueError, match="--recipe.model_config: change single fields"):
        train_quality.given_settings(job("quality-ours", config="recipes/configs/pretrain_tiny.yaml",
                                         recipe=["--model_config", "{}"]))  # fmt: skip


def test_jobs_on_two_cards(monkeypatch, tmp_path):
    together, seen = threading.Barrier(2, timeout=20), []

    def start(job, timeout, card):
        seen.append(card)
        together.wait()  # never met by one job at a time
        return {"variant": job["variant"], "run": job["run"], "points": [(60.0, 1, 1, 2.0)], "best_bits_per_byte": 2.0}

    monkeypatch.setattr(bench_train, "start_process", start)
    args = bench_train.parse(["--device", "cuda", "--quality", "--runs", "ours", "dense", "--cards", "0", "3"])
    report = bench_train.Report(tmp_path / "lines.jsonl")
    bench_train.run_jobs(bench_train.make_jobs(args), args, report)
    assert sorted(seen) == ["0", "3"] and {line["run"] for line in report.lines} == {"ours", "dense"}
    report.add(train_quality.compare_quality(report.lines))
    assert bench_train.read_lines([report.output], "quality") == json.loads(json.dumps(report.lines[:2]))
    with pytest.raises(SystemExit):
        bench_train.parse([*CPU, "--quality", "--cards", "0"])


def test_minutes_to_a_target():
    points = [(60.0, 10, 1, 3.0), (120.0, 20, 2, 2.0), (180.0, 30, 3, 2.5)]
    assert [train_quality.minutes_to(points, target) for target in (3.5, 2.5, 2.0, 1.9)] == [1.0, 1.5, 2.0, None]
    lines = [{"run": "a", "points": points, "best_bits_per_byte": 2.0},
             {"run": "b", "points": points[:1], "best_bits_per_byte": 3.0}]  # fmt: skip
    assert train_quality.compare_quality(lines)["minutes_to_target"] == {"a": 1.0, "b": 1.0}


def test_one_run_of_quality(tmp_path):
    said = []
    found = train_quality.measure_quality(say=lambda text, **_: said.append(json.loads(text)), job=job(
        "quality-library", run="library", config="recipes/configs/pretrain_tiny.yaml", minutes=0.02, target=None,
        eval_steps=1000, validation_tokens=512,
        recipe=["--per_device_train_batch_size", "2", "--sequence_length", "32"],
    ))  # fmt: skip
    (seconds, steps, tokens, value), = found["points"]
    assert said == [json.loads(json.dumps({"variant": "quality-library", **found}))]  # what a process that dies leaves
    assert 1.2 <= seconds < 4 and tokens == steps * 64 and 0 < value < 8


def test_lines_tables_and_deadline(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_train, "start_process", lambda job, *_: bench_train.measure(job | {"spawned": 0.0}))
    path = tmp_path / "lines.jsonl"
    names = ["bare-fp32-clipped", "recipe-fp32", "library-fp32", "titan-fp32"]
    command = [*CPU, "--steps", "3", "--warmup", "2", "--recipe.max_grad_norm", "0.5", "--output", str(path)]
    lines = {line["variant"]: line for line in bench_train.main([*command, "--variants", *names])}
    assert list(lines) == names and [json.loads(x) for x in path.read_text().splitlines()] == list(lines.values())
    for name in names[:3]:
        line = lines[name]
        assert line["step_ms_10"] <= line["step_ms"] <= line["step_ms_90"] and line["load_max_over_mean"] >= 1
        assert line["tokens_per_second"] == pytest.approx(64e3 / line["step_ms"], rel=0.01)
    assert lines["recipe-fp32"]["max_grad_norm"] == 0.5
    printed = capsys.readouterr().out
    assert "Trainer over bare-fp32-clipped" in printed
    if "error" in lines["titan-fp32"]:
        assert "torchtitan is not installed" in lines["titan-fp32"]["error"]
    skipped = bench_train.main([*CPU, "--memory", "--deadline", "-1"])
    assert [line["error"] for line in skipped] == ["not started: -1 s had passed"] * 2


def test_a_process_that_dies_leaves_what_it_had_found(monkeypatch, tmp_path):
    python = tmp_path / "python"
    said = """'{"variant": "bare-fp32", "rows": 4}'"""
    python.write_text(f"#!/bin/sh\necho {said}\necho on $CUDA_VISIBLE_DEVICES >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(bench_train.sys, "executable", str(python))
    line = bench_train.start_process({"variant": "bare-fp32"}, timeout=60, card="7")
    assert line == {"variant": "bare-fp32", "rows": 4, "error": "exit code 3: on 7"}


def test_a_variant_without_a_bare_step_is_refused():
    line = bench_train.measure(job("titan-bf16", mode="profile"))
    assert "variant=titan-bf16 has no bare step" in line["error"]


def test_names_that_an_older_torch_lacks(monkeypatch):
    for module, name in (torch.distributed.fsdp, "DataParallelMeshDims"), (torch.compiler, "_is_non_strict_tracing"):
        monkeypatch.setattr(module, name, None, raising=False)  # so that it is as before after the test
        monkeypatch.delattr(module, name)
    changed = train_peers.adapt_torch()
    assert changed[:2] == ["torch.distributed.fsdp.DataParallelMeshDims", "torch.compiler._is_non_strict_tracing"]
    assert torch.distributed.fsdp.DataParallelMeshDims | None and torch.compiler._is_non_strict_tracing() is False
    assert not set(changed[:2]) & set(train_peers.adapt_torch())


def test_titan_is_as_large_as_ours():
    train_peers.adapt_torch()
    pytest.importorskip("torchtitan.models.deepseek_v3")
    for fields in (train_cases.REFERENCE, train_cases.TOY | {"q_lora_rank": 12, "n_shared_experts": 2}):
        with torch.device("meta"):
            models = train_peers.titan_config(fields, 64).build(), train_cases.our_model(fields)
        titan, ours = (sum(parameter.numel() for parameter in model.parameters()) for model in models)
        assert titan == ours
