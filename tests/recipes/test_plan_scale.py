"""Training at scale, on paper: the model against the measured steps, by hand, its properties, the fit, the document."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import recipes
from benchmarks import plan_scale
from benchmarks.scale_compute import PROFILE, Model, calibrate, read_profile
from benchmarks.scale_fit import ROWS, comparison, fit, predicted_ms, read_measured
from benchmarks.scale_network import Network, shares_a_token
from benchmarks.scale_step import Constants, Setting, best, step
from benchmarks.train_cases import REFERENCE, our_config
from recipes.launch_layouts import LAYOUTS
from recipes.launch_memory import Work, footprint
from recipes.sizing import GIB, flops_per_token

ROOT = Path(recipes.__file__).parents[1]
TWO = {"one_gpu": 1, "ddp": 1, "fsdp2": 1, "fsdp2_ep": 2, "tensor_parallel": 2, "context_parallel": 2}


@pytest.fixture(scope="module")
def reference():
    return Model("reference", our_config(REFERENCE), 4096)


@pytest.fixture(scope="module")
def rates(reference):
    return calibrate(reference)


def two_gpus(layout, masters=True, devices=2):
    return Setting(layout, 1 if layout == "one_gpu" else devices, ROWS, 1, masters, False, TWO[layout])


def test_the_measured_steps(reference, rates):
    """bf16: what the rates are from, kind by kind. fp32 masters: not used for anything, within 2 %."""
    seen = read_profile()
    bf16 = step(reference, two_gpus("one_gpu", masters=False), rates, Network(), Constants())
    assert bf16.seconds * 1e3 == pytest.approx(seen["span"], rel=1e-3)
    for kind, name in (("dense", "dense matmul"), ("attention", "attention"), ("elementwise", "elementwise")):
        assert bf16.parts[name] * 1e3 == pytest.approx(seen[kind])
    lines = map(json.loads, (PROFILE.parent / "table.jsonl").read_text().splitlines())
    fp32 = next(line for line in lines if line["variant"] == "recipe-fp32")
    predicted = step(reference, two_gpus("one_gpu"), rates, Network(), Constants())
    assert predicted.seconds * 1e3 == pytest.approx(fp32["step_ms"], rel=0.02)
    assert predicted.mfu(989e12) * 100 == pytest.approx(fp32["mfu_percent"], rel=0.02)
    assert rates.elementwise < 3.35e12 and rates.optimizer < 3.35e12  # the card's memory: bytes are not over-counted


def test_flops_are_those_of_the_recipes(reference):
    flops = reference.flops
    assert flops["dense"] + flops["grouped"] + flops["attention"] == flops_per_token(reference.config, 4096)
    assert flops["grouped"] == 6 * 11 * 6 * 3 * 704 * 1024 and flops["head"] == 6 * 65536 * 1024


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("groups, kept, choices", [(1, 1, 2), (4, 2, 3), (2, 1, 3)])
def test_rows_of_a_token_by_counting_all_choices(ranks, groups, kept, choices):
    config = SimpleNamespace(n_routed_experts=8, num_experts_per_tok=choices, n_group=groups, topk_group=kept)
    size, here, met = 8 // groups, 8 // ranks, []
    for opened in itertools.combinations(range(groups), kept):
        experts = [expert for group in opened for expert in range(group * size, (group + 1) * size)]
        for chosen in itertools.combinations(experts, choices):
            met.append(len({expert // here for expert in chosen}))
    assert shares_a_token(config, ranks) * ranks == pytest.approx(sum(met) / len(met))


def test_collectives_by_hand():
    network = Network(node=8, nvlink=400e9, port=40e9, share=1.0)
    size = 64e9  # hops do not count
    assert network.ring(size, 8) == pytest.approx(size * 7 / 8 / 400e9, rel=1e-2)
    assert network.ring(size, 16) == pytest.approx(size * 15 / 16 / 400e9, rel=1e-2)  # 8 ports carry less than half
    slow = replace(network, port=10e9)
    assert slow.ring(size, 16) == pytest.approx(size / 2 / (8 * 10e9), rel=1e-2)
    assert slow.ring(size, 4, stride=8) == pytest.approx(size * 3 / 4 / 10e9, rel=1e-2)  # one GPU of each node
    assert network.all_reduce(size, 8, bucket=size) == pytest.approx(2 * network.ring(size, 8), rel=1e-2)
    assert network.all_to_all(1e9, 16) == pytest.approx(8 * 1e9 / 40e9, rel=1e-2)
    assert network.ring(1e9, 2048) > network.ring(1e9, 256) > network.ring(1e9, 8)
    assert network.ring(size, 1) == network.all_reduce(size, 1) == network.all_to_all(size, 1) == 0


@pytest.mark.parametrize("layout", list(TWO))
def test_more_bandwidth_is_never_slower(layout, reference, rates):
    setting = two_gpus(layout, devices=16)
    plain = step(reference, setting, rates, Network(), Constants())
    for better in (Network(nvlink=900e9), Network(port=100e9), Network(share=1.0)):
        assert step(reference, setting, rates, better, Constants()).seconds <= plain.seconds
    worse = step(reference, setting, rates, Network(), Constants(ddp_overlap=0, fsdp_overlap=0, layer_wait=1e-3))
    endless = step(reference, setting, rates, Network(nvlink=1e18, port=1e18), Constants())
    assert worse.seconds >= plain.seconds >= endless.seconds
    assert (plain.waits == 0) == (layout == "one_gpu")
    assert plain.tokens == setting.ranks * ROWS * 4096


def test_expert_gradients_are_summed_only_over_replicas(reference, rates):
    whole = replace(two_gpus("fsdp2_ep", devices=16), group=16)
    names = [step(reference, each, rates, Network(), Constants()).parts for each in (whole, replace(whole, group=8))]
    assert ["wait: experts' gradients" in parts for parts in names] == [False, True]


def test_memory_is_the_planner_s(reference):
    shape, work = reference.shape, Work(ROWS, 4096, True, False, False)
    for layout in TWO:
        setting = two_gpus(layout)
        assert setting.memory(reference) == footprint(shape, LAYOUTS[layout], setting.devices, work)
    split = replace(two_gpus("fsdp2_ep", devices=16), group=4).memory(reference)
    assert split.parts["parameters"] == int(4 * ((shape.total - shape.experts) / 16 + shape.experts / 4))
    assert split.parts["optimizer states"] == pytest.approx(2 * split.parts["parameters"], abs=1)
    with pytest.raises(ValueError, match="expert_ranks=3 must divide the 16 devices of fsdp2_ep"):
        footprint(shape, LAYOUTS["fsdp2_ep"], 16, work, 3)


def test_the_best_fits_and_keeps_the_batch(reference, rates):
    found = best(reference, "fsdp2_ep", 16, 256, rates, Network(), Constants(), 40 * GIB)
    assert found.setting.global_rows == 256 and found.setting.memory(reference).fits(40 * GIB)
    assert 64 % found.setting.group == 0
    assert best(reference, "fsdp2", 16, 4, rates, Network(), Constants(), 80 * GIB).setting.global_rows == 16
    with pytest.raises(ValueError, match="ddp does not fit, one row takes .* GiB a GPU"):
        best(reference, "ddp", 16, 256, rates, Network(), Constants(), 8 * GIB)


def measured_file(path, model, rates, truth):
    """What bench_multi.py would write if `truth` were the constants, beside cases that the fit must leave alone."""
    lines = [{"case": "library-ddp-bf16", "device": "H100", "step_ms": 250.0, "tokens_per_second": 1, "processes": 2},
             {"case": "ours-fsdp2_ep-bf16", "device": "H100", "error": "rank 1: OutOfMemoryError"}]  # fmt: skip
    cases = ("alone-bf16", "alone-fp32", "ddp-bf16", "fsdp2-fp32", "fsdp2_ep-fp32")
    for case, count in zip(cases, (1, 1, 2, 2, 2)):
        line = {"case": f"ours-{case}", "device": "NVIDIA H100 80GB HBM3", "processes": count}
        ms = predicted_ms(line, model, rates, Network(), truth)
        speed = round(count * ROWS * 4096 / ms * 1e3)
        lines.append(line | {"step_ms": round(ms, 2), "host_ms": 61.5, "tokens_per_second": speed})
    lines.append(lines[-1] | {"case": "ours-ddp_ep-bf16"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_fit_finds_what_made_the_figures(reference, rates, tmp_path):
    truth = Constants(ddp_overlap=0.35, fsdp_overlap=0.55, layer_wait=4e-4, speed=1.03)
    measured = read_measured([measured_file(tmp_path / "two.jsonl", reference, rates, truth)])
    assert "library-ddp-bf16" not in measured and "ours-fsdp2_ep-bf16" not in measured
    fitted, names = fit(reference, rates, Network(), Constants(), measured)
    assert names == ["speed", "ddp_overlap", "fsdp_overlap", "layer_wait"]
    for name in names:
        assert getattr(fitted, name) == pytest.approx(getattr(truth, name), rel=0.02), name
    text = comparison(reference, rates, Network(), Constants(), fitted, names, measured)
    row = next(line.split() for line in text.splitlines() if line.startswith("ours-fsdp2-fp32"))
    assert row[2] == "61.5" and abs(float(row[4])) > 1 > abs(float(row[6])) and "at its bound" not in text
    assert "not in the model" in next(line for line in text.splitlines() if line.startswith("ours-ddp_ep"))
    slow = {case: line | {"step_ms": 2 * line["step_ms"]} for case, line in measured.items() if "-ddp-" in case}
    bound = fit(reference, rates, Network(), Constants(), slow)
    assert bound[0].ddp_overlap == 0
    assert "ddp_overlap: 0.8 stated, 0 fitted, at its bound" in comparison(
        reference, rates, Network(), Constants(), *bound, slow)  # fmt: skip


def test_the_command(tmp_path, capsys, reference, rates):
    file = measured_file(tmp_path / "two.jsonl", reference, rates, Constants(layer_wait=4e-4, speed=1.2))
    plan_scale.main(["--models", "base", "--gpus", "8", "--measured", str(file), "--plot", str(tmp_path / "a.svg")])
    text = capsys.readouterr().out
    assert "| base: GPUs |" in text and "calculated, not measured" in text
    used = next(line for line in text.splitlines() if line.startswith("constants")).replace(",", "").split()
    assert float(used[used.index("layer_wait") + 1]) == pytest.approx(4e-4, rel=0.02)
    assert used[used.index("speed") + 1] == "1"  # how quick that machine was on that day is no constant
    figure = (tmp_path / "a.svg").read_text()
    assert "<svg" in figure and "base, 16.4 B parameters" in figure and "fsdp2_ep" in figure


@pytest.mark.parametrize("argv, message", [
    (["--share", "1.5"], "share=1.5 of the links' bandwidth"),
    (["--port_gbytes", "0"], "port=0.0 must be positive"),
    (["--gpu_memory_gib", "-1"], "gpu_memory_gib=-1.0 must be positive"),
    (["--fsdp_overlap", "2"], r"fsdp_overlap=2.0 must lie in \[0, 1\]"),
    (["--gpus", "1"], "gpus=1: layouts over several start at 2"),
    (["--measured", "nowhere.jsonl"], "measured='nowhere.jsonl': no such file; write one with"),
    (["--models", "huge"], "models='huge': no recipes/configs/pretrain_huge.yaml"),
    (["--models", "nano"], "global_batch is missing for nano"),
])  # fmt: skip
def test_errors(argv, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plan_scale.main([*argv, "--plot", str(tmp_path / "a.svg")])


@pytest.mark.parametrize("text, message", [
    ("{oops", "is not JSON lines"),
    ('{"case": "library-ddp-bf16", "step_ms": 1}', "has no ours-\\* case that ran"),
    ('{"case": "ours-ddp-bf16", "step_ms": 100, "tokens_per_second": 5120, "processes": 2, "device": "cpu"}',
     "ours-ddp-bf16 was run on 'cpu' with 256 tokens a GPU"),
])  # fmt: skip
def test_files_that_cannot_be_fitted(text, message, tmp_path):
    (tmp_path / "lines.jsonl").write_text(text + "\n")
    with pytest.raises(ValueError, match=message):
        read_measured([tmp_path / "lines.jsonl"])


def test_the_committed_tables_are_the_command_s():
    text, given = (ROOT / "docs" / "launch.md").read_text(), plan_scale.parse([])
    models = [plan_scale.load_model(name) for name in given.models]
    surveys = {model.name: (model, plan_scale.survey(model, given)) for model in models}
    tables = [plan_scale.table(*each, given) for each in surveys.values()]
    for table in (*tables, plan_scale.fewest_table(models, given), plan_scale.published_table(surveys, given)):
        assert table in text, f"run python benchmarks/plan_scale.py and put its tables into docs/launch.md:\n{table}"
