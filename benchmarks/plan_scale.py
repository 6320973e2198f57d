"""Training of `base` and `r1` on 8 to 2,048 GPUs, on paper: throughput, memory and layout. A calculation.

    python benchmarks/plan_scale.py                               tables, and runs/plan_scale.svg
    python benchmarks/plan_scale.py --models r1 --weights bfloat16 --port_gbytes 25
    python benchmarks/plan_scale.py --measured FILE ...           fitted to what bench_multi.py --output FILE wrote

Computation: from one profiled step of one H100 (scale_compute.py). Collectives: bandwidths and hops as stated
(scale_network.py). Together, with what is assumed: scale_step.py. Memory: recipes/launch_memory.py, as for
recipes/plan_launch.py. Only layouts that the recipes launch are in it: no pipeline parallelism, no replicas of sharded
groups, no FP8; ZeRO and states in host memory are left out.

A step takes the global batch that the config names (base: 512 rows, r1: 16,384), or one row a rank where there are more
ranks than rows. For each layout the quickest micro-batch, size of group, and checkpointing or none, of what fits.
"""

import argparse
import functools
import sys
from dataclasses import fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.scale_compute import Model, calibrate  # noqa: E402
from benchmarks.scale_fit import comparison, fit, read_measured  # noqa: E402
from benchmarks.scale_network import Network  # noqa: E402
from benchmarks.scale_step import NAMES, Constants, Setting, best, groups  # noqa: E402
from benchmarks.train_cases import REFERENCE, our_config  # noqa: E402
from recipes.eval_tables import aligned  # noqa: E402
from recipes.launch_cards import CARDS, CONFIGS  # noqa: E402
from recipes.model_loading import build_config  # noqa: E402
from recipes.pretrain_config import PretrainConfig, parse_config  # noqa: E402
from recipes.sizing import DEVICE_PEAKS, GIB  # noqa: E402

GLOBAL_ROWS = {"base": 512, "r1": 16_384}  # the comments in their YAML
GPUS = tuple(2**power for power in range(3, 12))
# What the constants are fitted to where no files are given.
MEASURED = (str(Path(__file__).resolve().parent / "results/2026-11-23_multi/multi.jsonl"),)
NEARLY = 0.97  # of the quickest layout's throughput: the simpler one is recommended
# PEERS.md: model FLOPs as a share of the GPU's dense bf16 peak. (what, our model, GPUs, MFU %)
PUBLISHED = (
    ("DeepSeek-V3, its authors: FP8, pipeline x experts, exchanges hidden", "r1", 2048, 39),
    ("DeepSeek-V3, Megatron, H100: FP8", "r1", 1024, 34),
    ("Qwen3-30B-A3B, NeMo AutoModel", "base", 8, 28),
    ("Nemotron-3-Nano-30B, NeMo AutoModel (balanced fake routing)", "base", 8, 33),
)


@functools.cache
def load_model(name):
    path = CONFIGS / f"pretrain_{name}.yaml"
    if not path.is_file():
        raise ValueError(f"models={name!r}: no recipes/configs/pretrain_{name}.yaml; use base or r1")
    args = parse_config(PretrainConfig, ["--config", str(path), "--use_cpu"])
    return Model(name, build_config(args), args.sequence_length)


def survey(model, given):
    """{GPUs: {layout: `Step`, or the reason why there is none}}."""
    rows = given.global_batch or GLOBAL_ROWS.get(model.name)
    if not rows:
        raise ValueError(f"global_batch is missing for {model.name}: its config names none; add --global_batch")
    found = {}
    for devices in given.gpus:
        found[devices] = {}
        for layout in given.layouts:
            try:
                found[devices][layout] = best(model, layout, devices, rows, given.rates, given.network, given.constants,
                                              given.device_bytes, given.masters)  # fmt: skip
            except ValueError as error:
                found[devices][layout] = str(error)
    return found


def recommended(steps):
    """Of {layout: `Step` or reason} the simplest that is nearly as quick as the quickest, or None."""
    there = [step for step in steps.values() if not isinstance(step, str)]
    most = max((step.tokens_per_gpu for step in there), default=0)
    return next((step for step in there if step.tokens_per_gpu >= NEARLY * most), None)


def settings_text(step):
    setting = step.setting
    name = setting.layout + (f", {setting.group} a group" if setting.group > 1 else "")
    return name + (", ckpt" if setting.checkpointing else "")


def table(model, found, given):
    """Markdown: tokens/s of one GPU by layout, and the recommended one's figures."""
    shown = [name for name in given.layouts if any(not isinstance(steps[name], str) for steps in found.values())]
    lines = [f"| {model.name}: GPUs | {' | '.join(shown)} | recommended | rows x micro-batches | GiB | step, s | waits "
             "| MFU | tokens/s in all |", f"|---|{'---|' * (len(shown) + 7)}"]  # fmt: skip
    for devices, steps in found.items():
        cells = ["no" if isinstance(steps[name], str) else f"{steps[name].tokens_per_gpu:,.0f}" for name in shown]
        step, rest = recommended(steps), ["none fits"] + 6 * [""]
        if step:
            setting = step.setting
            rest = [
                settings_text(step), f"{setting.rows} x {setting.accumulation}",
                f"{setting.memory(model).peak / GIB:.0f}", f"{step.seconds:.2f}",
                f"{100 * step.waits / step.seconds:.0f} %", f"{100 * step.mfu(given.peak):.0f} %",
                f"{step.tokens_per_gpu * devices:,.0f}",
            ]  # fmt: skip
        lines.append(f"| {devices:,} | {' | '.join(cells + rest)} |")
    return "\n".join(lines)


def reasons(model, found, given):
    """Why a layout is in no row of the table."""
    lines = []
    for name in given.layouts:
        if all(isinstance(steps[name], str) for steps in found.values()):
            lines.append(f"{model.name}, {name}: {found[given.gpus[-1]][name]}")
    return "\n".join(lines)


def fewest(model, given, masters):
    """(GPUs, GPUs a group) from which on fsdp2_ep with checkpointing and one row fits, or None."""
    for devices in (2**power for power in range(1, 12)):
        for size in reversed(groups(model, "fsdp2_ep", devices, given.network.node)):
            setting = Setting("fsdp2_ep", devices, 1, 2, masters, True, size)
            if setting.memory(model).fits(given.device_bytes):
                return devices, size
    return None


def fewest_table(models, given):
    lines = ["| fsdp2_ep, checkpointing, rows of 4,096 | fp32 masters | bf16 weights |", "|---|---|---|"]
    for model in models:
        cells = []
        for masters in (True, False):
            found = fewest(model, given, masters)
            cells.append(f"from {found[0]:,} GPUs, experts over {found[1]}" if found else "more than 2,048 GPUs")
        lines.append(f"| {model.name}, {model.shape.total / 1e9:.3g} B | {' | '.join(cells)} |")
    return "\n".join(lines)


def published_table(surveys, given):
    """Markdown: what others report beside what the model says of ours; {model's name: (model, found)}."""
    lines = ["| published | GPUs | MFU | ours, calculated | MFU |", "|---|---|---|---|---|"]
    for what, name, devices, mfu in PUBLISHED:
        model, found = surveys.get(name, (None, {}))
        step = recommended(found[devices]) if devices in found else None
        ours = f"{name}, {settings_text(step)}, bf16 compute | {100 * step.mfu(given.peak):.0f} %" if step else " | "
        lines.append(f"| {what} | {devices:,} | {mfu} % | {ours} |")
    return "\n".join(lines)


def parts_table(model, found):
    """Where the recommended steps go, in percent."""
    steps = {devices: recommended(each) for devices, each in found.items()}
    steps = {devices: step for devices, step in steps.items() if step}
    names = list(dict.fromkeys(name for step in steps.values() for name in step.parts))
    rows = [(name, *(f"{100 * step.parts.get(name, 0) / step.seconds:.1f}" for step in steps.values()))
            for name in names]  # fmt: skip
    return aligned([f"{model.name}: % of the step on", *(f"{devices:,}" for devices in steps)], rows)


def draw(surveys, path):
    """Throughput of a GPU against GPUs, a panel a model, a line a layout."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "plan_scale"
    figure, panels = plt.subplots(1, len(surveys), figsize=(5.5 * len(surveys), 4), squeeze=False)
    for axes, (model, found) in zip(panels[0], surveys.values()):
        for layout in NAMES:
            points = [(devices, steps[layout].tokens_per_gpu) for devices, steps in found.items()
                      if not isinstance(steps.get(layout, ""), str)]  # fmt: skip
            if points:
                axes.plot(*zip(*points), marker="o", label=layout, color=f"C{NAMES.index(layout)}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(found), [f"{devices:,}" for devices in found])
        axes.set_xlim(min(found) / 1.2, max(found) * 1.2)
        axes.set_xlabel("GPUs")
        axes.set_ylabel("tokens/s of one GPU (calculated)")
        axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
        axes.set_title(f"{model.name}, {model.shape.total / 1e9:.3g} B parameters")
        if axes.lines:
            axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)  # fmt: skip
    parser.add_argument("--models", nargs="+", default=list(GLOBAL_ROWS), help="recipes/configs/pretrain_<name>.yaml")
    parser.add_argument("--gpus", nargs="+", type=int, default=list(GPUS))
    parser.add_argument("--layouts", nargs="+", choices=NAMES, default=list(NAMES[1:]))
    parser.add_argument("--weights", choices=("float32", "bfloat16"), default="float32", help="of masters and states")
    parser.add_argument("--global_batch", type=int, help="rows a step; default: what the config names")
    parser.add_argument("--gpu_memory_gib", type=float, default=CARDS["80 GB"])
    parser.add_argument("--peak_tflops", type=float, default=DEVICE_PEAKS["H100"], help="of which MFU is a share")
    parser.add_argument("--node", type=int, default=Network.node, help="GPUs of a node")
    parser.add_argument("--nvlink_gbytes", type=float, default=Network.nvlink / 1e9,
                        help="a GPU sends in its node, GB/s (H100's data sheet: 900 both ways)")  # fmt: skip
    parser.add_argument("--port_gbytes", type=float, default=Network.port / 1e9,
                        help="a GPU sends over the network, GB/s (InfiniBand NDR: 400 Gb/s)")  # fmt: skip
    parser.add_argument("--share", type=float, default=Network.share, help="of these that collectives reach (assumed)")
    for field in fields(Constants):
        parser.add_argument(f"--{field.name}", type=float, default=field.default, help="see scale_step.Constants")
    parser.add_argument("--measured", nargs="+", default=list(MEASURED), help="files of bench_multi.py --output")
    parser.add_argument("--plot", default="runs/plan_scale.svg", help="the figure's file")
    given = parser.parse_args(argv)
    for name in ("gpu_memory_gib", "peak_tflops", *(["global_batch"] if given.global_batch is not None else [])):
        if getattr(given, name) <= 0:
            raise ValueError(f"{name}={getattr(given, name)} must be positive")
    if min(given.gpus) < 2:
        raise ValueError(f"gpus={min(given.gpus)}: layouts over several start at 2; for one see recipes/plan_launch.py")
    return prepare(given)


def prepare(given):
    """The command line with what follows from it."""
    given.gpus = sorted(set(given.gpus))
    given.masters, given.device_bytes = given.weights == "float32", given.gpu_memory_gib * GIB
    given.peak = given.peak_tflops * 1e12
    given.network = Network(given.node, given.nvlink_gbytes * 1e9, given.port_gbytes * 1e9, given.share)
    given.constants = Constants(**{field.name: getattr(given, field.name) for field in fields(Constants)})
    given.reference = Model("reference", our_config(REFERENCE), 4096)
    given.rates = calibrate(given.reference)
    given.fit = ""
    if given.measured:
        measured, stated = read_measured(given.measured), given.constants
        inputs = (given.reference, given.rates, given.network)
        given.constants, names = fit(*inputs, stated, measured)
        given.fit = comparison(*inputs, stated, given.constants, names, measured)
        # How fast that machine was on that day says nothing about others.
        given.constants = replace(given.constants, speed=stated.speed)
    return given


def assumptions(given):
    rates, network = given.rates, given.network
    of_plan = ", ".join(f"{field.name} {getattr(given.constants, field.name):.4g}" for field in fields(Constants))
    return "\n".join([
        "calculated, not measured: computation from one profiled step of one H100, collectives as stated",
        f"rates      dense {rates.dense / 1e12:.0f}, grouped {rates.grouped / 1e12:.0f}, attention "
        f"{rates.attention / 1e12:.0f} TFLOP/s; elementwise {rates.elementwise / 1e12:.2f}, optimizer "
        f"{rates.optimizer / 1e12:.2f} TB/s; {rates.gap * 1e6:.1f} us between launches",
        f"links      {network.node} GPUs a node, NVLink {network.nvlink / 1e9:.0f} GB/s, network "
        f"{network.port / 1e9:.0f} GB/s a GPU, {network.share:.0%} of it reached",
        f"constants  {of_plan} ({'fitted to ' + ', '.join(given.measured) if given.measured else 'stated'})",
        f"weights    {'fp32 masters, bf16 compute' if given.masters else 'bf16'}; GPUs of {given.gpu_memory_gib} GiB",
    ])  # fmt: skip


def main(argv=None):
    given = parse(argv)
    models = [load_model(name) for name in given.models]
    print(assumptions(given) + "\n")
    if given.fit:
        print(given.fit + "\n")
    surveys = {model.name: (model, survey(model, given)) for model in models}
    for model, found in surveys.values():
        print(table(model, found, given) + "\n")
        print(reasons(model, found, given) + "\n")
        print(parts_table(model, found) + "\n")
    print(fewest_table(models, given) + "\n")
    print(published_table(surveys, given))
    path = Path(given.plot)
    draw(surveys, path)
    print(f"\nfigure: {path}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # what a user can mend needs no traceback
        sys.exit(f"{type(error).__name__}: {error}")
