"""Training beside transformers' own DeepseekV3 and torchtitan's modules, one process a variant, in turn.

    python benchmarks/bench_train.py                       all variants at the reference config (one H100)
    python benchmarks/bench_train.py --variants bare-bf16 recipe-bf16 --recipe.max_grad_norm 0
    python benchmarks/bench_train.py --profile             our step by kind of kernel
    python benchmarks/bench_train.py --memory              largest batch x length with activation checkpointing
    python benchmarks/bench_train.py --scaling             twelve points around the reference, beside the library
    python benchmarks/bench_train.py --losses [--dataset FOLDER]       200 steps, both classes, three seeds
    python benchmarks/bench_train.py --quality --dataset FOLDER        minutes to a held-out bits per byte
    python benchmarks/bench_train.py --device cpu          the `tiny` config without MTP, ours and the library's in turn

Variants: library-*, the library's class with its best settings (grouped_mm experts, sdpa), compiled or not; titan-*,
torchtitan's modules (train_peers.py); bare-*, ours in a plain loop; recipe-*, ours through recipes/pretrain.py and the
HF Trainer, whose settings `--recipe.KEY VALUE` changes. fp32: fp32 master weights, bf16 autocast; bf16: bf16 weights;
clipped: with the gradient clipping that the Trainer does too, fused: inside the update. Tokens are random, routing is
real. Steps are timed by CUDA events that nobody waits for; the figures are medians, MFU by the formula of
recipes/sizing.py.

Prints a JSON line a variant and a table; --output writes the lines as well (and, with its suffix .svg, the curves of
--losses and --quality). An error is a result; after --deadline seconds no further variant starts. --cards 0 1: on two
cards at a time, one process each. --lines FILE ...: nothing runs, the mode's table is made of lines written before.
On a CPU every mode takes toy sizes (--size), to try it out.
"""

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.train_cases import (  # noqa: E402
    REFERENCE,
    SIZES,
    library_model,
    measure_bare,
    our_model,
    recipe_fields,
    table_rows,
)
from benchmarks.train_losses import compare_curves, losses_figure, measure_losses  # noqa: E402
from benchmarks.train_memory import measure_memory, memory_table  # noqa: E402
from benchmarks.train_peers import measure_titan  # noqa: E402
from benchmarks.train_profile import measure_profile, profile_table  # noqa: E402
from benchmarks.train_quality import (  # noqa: E402
    RUNS,
    compare_quality,
    measure_quality,
    quality_figure,
    quality_table,
)
from benchmarks.train_recipe import measure_recipe, split_recipe_arguments  # noqa: E402
from benchmarks.train_scaling import ORDER, measure_scaling, scaling_job, scaling_table  # noqa: E402

__all__ = ["REFERENCE", "library_model", "our_model"]  # other benchmarks take them from here
VARIANTS = (
    "bare-bf16", "bare-bf16-clipped", "bare-bf16-fused", "recipe-bf16", "titan-bf16", "library-bf16",
    "library-bf16-compiled", "bare-fp32", "bare-fp32-clipped", "bare-fp32-fused", "recipe-fp32", "titan-fp32",
    "library-fp32", "library-fp32-compiled",
)  # fmt: skip
MODES = ("profile", "memory", "scaling", "losses", "quality")
COLUMNS = (
    ("tokens_per_second", "tokens/s", 9, ","), ("step_ms", "step ms", 8, ".1f"), ("step_ms_10", "10 %", 7, ".1f"),
    ("step_ms_90", "90 %", 7, ".1f"), ("mfu_percent", "MFU %", 6, ".1f"), ("peak_gib", "peak GiB", 8, ".1f"),
    ("first_step_s", "1st step s", 10, ".1f"), ("process_to_first_step_s", "from start", 10, ".1f"),
    ("load_max_over_mean", "load", 6, ".2f"),
)  # fmt: skip


# ---------------------------------------------------------------- one job, in this process


def measure(job):
    """The job's line of results; whatever it raises is one too."""
    kinds = {"profile": measure_profile, "memory": measure_memory, "scaling": measure_scaling,
             "losses": measure_losses, "quality": measure_quality}  # fmt: skip
    starts = {"recipe": measure_recipe, "titan": measure_titan}
    function = kinds.get(job["mode"]) or starts.get(job["variant"].split("-")[0], measure_bare)
    device = torch.cuda.get_device_name() if job["device"] == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    about = {"variant": job["variant"], "device": device, "torch": torch.__version__}
    try:
        return about | function(job)
    except Exception as error:  # an OOM, a peer that is missing: the result of this variant
        message = " ".join(str(error).split())[:600]
        return about | {"error": f"{type(error).__name__}: {message}"}


# ---------------------------------------------------------------- jobs in turn


def start_process(job, timeout, card=None):
    """The last line that a fresh process prints for `job`; an error line where it printed none or died.

    card: the CUDA device that it sees, an entry of CUDA_VISIBLE_DEVICES; None: as this process.
    """
    job = job | {"spawned": time.time()}
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | os.environ  # as torchtitan is run
    environment |= {} if card is None else {"CUDA_VISIBLE_DEVICES": card}
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
        output, trouble = result.stdout, f"exit code {result.returncode}: {result.stderr.strip()[-600:]}"
        failed = result.returncode != 0
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        trouble, failed = f"stopped after {timeout:.0f} s (--timeout)", True
    found = [line for line in output.splitlines() if line.startswith('{"variant"')]
    line = json.loads(found[-1]) if found else {"variant": job["variant"]}
    return line | {"error": trouble} if failed or not found else line


def show(line):
    """A line without what is long, for the console."""
    return {key: value for key, value in line.items() if key not in ("curves", "points", "top")}


class Report:
    """Prints each line when it comes and keeps all of them in --output."""

    def __init__(self, output):
        self.output, self.lines, self.lock = output, [], threading.Lock()

    def add(self, line):
        with self.lock:
            self.lines.append(line)
            print(json.dumps(show(line)), flush=True)
            if self.output:
                Path(self.output).write_text("".join(json.dumps(line) + "\n" for line in self.lines))


def run_jobs(jobs, args, report):
    """Each job in a process of its own, in turn on each card, until the deadline has passed."""
    begin, cards, free = time.time(), args.cards or [None], queue.SimpleQueue()
    for card in cards:
        free.put(card)

    def run(job):
        card = free.get()
        try:
            if time.time() - begin > args.deadline:
                line = {"variant": job["variant"], "error": f"not started: {args.deadline:.0f} s had passed"}
            else:
                line = start_process(job, args.timeout, card)
        finally:
            free.put(card)
        report.add(line)

    with ThreadPoolExecutor(len(cards)) as pool:
        list(pool.map(run, jobs))  # as a list: what one raises is raised here


def read_lines(paths, mode):
    """The lines of jobs in files that --output wrote, without the summaries of `mode`."""
    lines = [json.loads(text) for path in paths for text in Path(path).read_text().splitlines()]
    return [line for line in lines if line["variant"] != mode]


def make_jobs(args):
    """The jobs of the chosen mode."""
    fields, batch, length = SIZES[args.size]()
    base = {
        "mode": args.mode, "device": args.device, "fields": fields, "batch": args.batch or batch,
        "length": args.length or length, "steps": args.steps, "warmup": args.warmup, "seed": 0,
        "recipe": args.recipe, "dataset": args.dataset, "weights": args.weights,
    }  # fmt: skip
    if args.mode in ("speed", "profile"):
        return [base | {"variant": variant} for variant in args.variants]
    if args.mode == "memory":
        limit = 4096 if args.device == "cuda" else 4 * base["batch"]
        return [base | {"variant": f"{who}-{args.weights}", "limit_rows": limit} for who in ("bare", "library")]
    if args.mode == "scaling":
        points = [scaling_job(point, args.device) for point in ORDER]
        return [base | job | {"variant": f"scaling-{args.weights}-{job['point']}"} for job in points]
    if args.mode == "losses":
        return [base | {"variant": f"losses-{args.weights}-seed{seed}", "seed": seed, "learning_rate": 3e-4}
                for seed in range(args.seeds)]  # fmt: skip
    small = {} if args.size == "reference" else fields  # without --size the config's own
    return [base | {"variant": f"quality-{run}", "run": run, "config": args.config, "minutes": args.minutes,
                    "target": args.target, "eval_steps": args.eval_steps, "validation_tokens": args.validation_tokens,
                    "fields": small} for run in args.runs]  # fmt: skip


# ---------------------------------------------------------------- tables


def speed_table(lines):
    rows = table_rows(lines, "variant", COLUMNS)
    return "\n".join([*rows, *trainer_overheads(lines)])


def trainer_overheads(lines):
    """What the Trainer adds to a bare step, by the mean (the Trainer's logs are in it).

    Beside the step with clipping where there is one: the Trainer measures the norm even at max_grad_norm=0. A recipe
    with `--recipe.optimizer fused` stands beside the bare step of that optimizer.
    """
    found, rows = {line["variant"]: line for line in lines if "mean_ms" in line}, []
    for weights in ("bf16", "fp32"):
        recipe = found.get(f"recipe-{weights}")
        fused = recipe and "fused" in recipe["settings"]
        names = [f"bare-{weights}-fused"] * bool(fused) + [f"bare-{weights}-clipped", f"bare-{weights}"]
        bare = next((found[name] for name in names if name in found), None)
        if recipe and bare:
            share = 100 * (recipe["mean_ms"] / bare["mean_ms"] - 1)
            rows.append(f"Trainer over {bare['variant']}: {share:+.1f} % (mean step {recipe['mean_ms']:.1f} and "
                        f"{bare['mean_ms']:.1f} ms)")  # fmt: skip
    return rows


def write_figure(args, svg):
    if args.output:
        path = Path(args.output).with_suffix(".svg")
        path.write_text(svg + "\n")
        print(f"curves: {path}")


def conclude(args, report):
    """The table of the mode, and what can only be said of all lines together."""
    lines = list(report.lines)
    if args.mode == "losses":
        report.add(compare_curves(lines))
        if any("curves" in line for line in lines):
            write_figure(args, losses_figure(lines))
        return
    if args.mode == "quality":
        result = compare_quality(lines, args.target)
        report.add(result)
        if "error" not in result:
            print("\n" + quality_table(lines, result))
            write_figure(args, quality_figure(lines))
        return
    if args.mode == "profile":
        text = "\n\n".join(profile_table(line) for line in lines if "kinds_ms" in line)
    else:
        text = {"speed": speed_table, "memory": memory_table, "scaling": scaling_table}[args.mode](lines)
    print("\n" + text)
    if args.mode != "speed":  # its table has them
        print("\n".join(f"{line['variant']}: error: {line['error']}" for line in lines if "error" in line))


# ---------------------------------------------------------------- CPU, both in one process


def compare_on_cpu(steps, threads):
    """Step times of both models in turn, in one process, on the `tiny` sizes; the median of the pairwise ratios."""
    torch.set_num_threads(threads)
    fields, *shape = recipe_fields("pretrain_tiny")
    torch.manual_seed(0)
    models = {"library": library_model(fields).train(), "ours": our_model(fields).train()}
    models["ours"].load_state_dict(models["library"].state_dict())
    ids = torch.randint(3, fields["vocab_size"], shape)
    times = {name: [] for name in models}
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True) for name, model in models.items()}
    for _ in range(steps + 2):
        for name, model in models.items():
            start = time.perf_counter()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if name == "ours":
                model.update_expert_bias()
            times[name].append(time.perf_counter() - start)
    library, ours = (times[name][2:] for name in ("library", "ours"))
    line = {
        "variant": "cpu", "device": f"cpu, {threads} threads", "torch": torch.__version__, "steps": steps,
        "library_ms": round(statistics.median(library) * 1e3, 1), "ours_ms": round(statistics.median(ours) * 1e3, 1),
        "ratio": round(statistics.median(b / a for a, b in zip(library, ours)), 3),
    }  # fmt: skip
    print(json.dumps(line), flush=True)
    return [line]


# ---------------------------------------------------------------- command line


def parse(argv):
    argv, recipe = split_recipe_arguments(list(sys.argv[1:] if argv is None else argv))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    for mode in MODES:
        parser.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, default="speed")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all; --profile: bare-bf16, bare-fp32")
    parser.add_argument("--size", choices=tuple(SIZES), help="default: by mode on CUDA, toy on a CPU")
    parser.add_argument("--steps", type=int, help="timed steps (20), of --losses all (200), of --scaling 6")
    parser.add_argument("--warmup", type=int, help="steps before them (5; --scaling 3), of --quality the warm-up (100)")
    parser.add_argument("--batch", type=int, help="rows a step; --memory: to begin with")
    parser.add_argument("--length", type=int, help="tokens a row")
    parser.add_argument("--weights", choices=("fp32", "bf16"), help="of --memory, --losses (fp32) and --scaling (bf16)")
    parser.add_argument("--seeds", type=int, default=3, help="of --losses")
    parser.add_argument("--dataset", help="packed folder for --losses and --quality; default: a Markov stream")
    parser.add_argument("--config", help="of --quality (recipes/configs/pretrain_nano.yaml)")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS, help="of --quality")
    parser.add_argument("--minutes", type=float, default=10, help="longest run of --quality")
    parser.add_argument("--target", type=float, help="bits per byte that ends a run of --quality (default: none)")
    parser.add_argument("--eval_steps", type=int, default=100, help="evaluate every so many steps of --quality")
    parser.add_argument("--validation_tokens", type=int, help="held-out tokens of an evaluation; default: all")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which none is started")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one process")
    parser.add_argument("--cards", nargs="+", help="CUDA devices, a process each at a time; default: one after another")
    parser.add_argument("--lines", nargs="+", help="files of an earlier --output: their table instead of a run")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of the plain --device cpu")
    parser.add_argument("--output", help="file for the JSON lines")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.recipe = recipe
    return with_defaults(args, parser)


def with_defaults(args, parser):
    """What depends on mode and device."""
    cpu = args.device == "cpu"
    if args.recipe and args.mode not in ("speed", "quality"):
        parser.error(f"--recipe.* changes settings of recipes/pretrain.py, which --{args.mode} does not run")
    if args.mode == "quality" and args.minutes <= 0:
        parser.error(f"--minutes {args.minutes} must be positive")
    if args.cards and cpu:
        parser.error(f"--cards {' '.join(args.cards)} names CUDA devices, --device is cpu; leave it out")
    args.plain_cpu = cpu and args.mode == "speed" and not (args.variants or args.job or args.lines)
    args.variants = args.variants or (VARIANTS if args.mode == "speed" else ("bare-bf16", "bare-fp32"))
    args.size = args.size or ("toy" if cpu else "shallow" if args.mode == "losses" else "reference")
    args.steps = args.steps or {"losses": 200, "scaling": 6}.get(args.mode, 20)
    args.warmup = args.warmup or {"scaling": 3, "quality": 100}.get(args.mode, 5)
    args.weights = args.weights or ("bf16" if args.mode == "scaling" else "fp32")
    args.config = args.config or "recipes/configs/pretrain_nano.yaml"
    return args


def main(argv=None):
    args = parse(argv)
    if args.job:
        print(json.dumps(measure(args.job)), flush=True)
        return None
    if args.plain_cpu:
        return compare_on_cpu(args.steps, args.threads)
    report = Report(args.output)
    if args.lines:
        for line in read_lines(args.lines, args.mode):
            report.add(line)
    else:
        run_jobs(make_jobs(args), args, report)
    conclude(args, report)
    return report.lines


if __name__ == "__main__":
    main()
