"""Generation beside transformers' own DeepseekV3, same weights, one command, plain `model.generate`.

    python benchmarks/bench_generate.py                                 reference config, bf16, all but `mtp` and `cpu`
    python benchmarks/bench_generate.py --cases b1-1k b32-1k --peer no --profile
    python benchmarks/bench_generate.py --cases mtp --model FOLDER      drafting with a trained model's MTP layers
    python benchmarks/bench_generate.py --cases cpu                     a small config in fp32 on a CPU, in turn

Cases (generation_cases.py): b1-1k b1-16k b1-48k b32-1k b32-8k, decoding at batch 1 and 32 and that context; rollouts,
256 prompts of 128 tokens and 256 sampled ones, before and after an update of the weights; prefill, 16k tokens and its
MFU beside the training forward's; cache, bytes a token and layer; requests, `generate_batch` with random lengths;
exact, tokens against the library's and logits absorbed against expanded; experts, decoding kernels against the
grouped matmul by number of tokens. The library runs at its best settings a case.
A line is printed as soon as it is known, all of ours before the library's, and an error is a result too. Ends with a
table; --out also writes the lines as JSON, anew after each.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.generation_cases import CASES, Bench  # noqa: E402
from benchmarks.generation_profile import memory_limit  # noqa: E402

DEFAULT = [name for name in CASES if name not in ("mtp", "cpu")]
COLUMNS = (("ms_per_token", "ms/token", 9, 3), ("tokens_per_second", "tokens/s", 9, 0), ("peak_gib", "peak GiB", 8, 1))
IN_COLUMNS = {"case", "who", "how", "error", *(name for name, *_ in COLUMNS)}


def rounded(value):
    """Floats to four significant digits."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def describe(line):
    """One row of the table: columns that most cases have, then the rest by name."""
    cells = []
    for name, _, width, digits in COLUMNS:
        value = line.get(name)
        cells.append(" " * width if value is None else f"{value:{width},.{digits}f}")
    rest = ", ".join(f"{k} {rounded(v)}" for k, v in line.items() if k not in IN_COLUMNS and v is not None)
    text = f"ERROR {line['error']}" if "error" in line else rest
    return f"{line['case']:9} {line['who']:8} {line.get('how', '')[:58]:58} {' '.join(cells)} {text}".rstrip()


def header():
    return f"{'case':9} {'who':8} {'how':58} " + " ".join(f"{label:>{width}}" for _, label, width, _ in COLUMNS)


class Report:
    """Prints every line when it comes, and keeps all of them in a file."""

    def __init__(self, path, facts):
        self.path, self.facts, self.lines, self.start = path, facts, [], time.perf_counter()

    def add(self, line):
        self.lines.append({key: rounded(value) for key, value in line.items()})
        print(f"[{time.perf_counter() - self.start:6.1f} s] {describe(line)}", flush=True)
        if self.path:
            Path(self.path).write_text(json.dumps({**self.facts, "lines": self.lines}, indent=1) + "\n")

    def table(self):
        print("\n" + header())
        for line in self.lines:
            print(describe(line))
        speed = {}
        for line in self.lines:
            if line.get("how", "").startswith(("generate", "forward loop", "again")) and "tokens_per_second" in line:
                speed.setdefault(line["case"], {})[line["who"]] = line["tokens_per_second"]
        for case, pair in speed.items():
            if len(pair) == 2 and case != "prefill":
                print(f"{case}: {pair['ours'] / pair['library']:.1f} times the library's tokens/s")


def run_case(bench, case, who, report):
    """All lines of one case; an error ends the case, not the run."""
    try:
        for line in CASES[case](bench, who, case):
            report.add({"case": case, "who": who, **line})
    except Exception as error:  # whatever a peer or a device answers is the result
        message = " ".join(str(error).split())[:400]
        report.add({"case": case, "who": who, "error": f"{type(error).__name__}: {message}"})
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()


def facts_of(bench):
    device = torch.cuda.get_device_name() if bench.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {
        "device": device, "memory_limit_tb_per_second": memory_limit(bench.device), "torch": torch.__version__,
        "transformers": transformers.__version__, "size": bench.size, "dtype": str(bench.dtype).removeprefix("torch."),
        "repeats": bench.repeats, "cache_dtype": bench.cache_dtype,
    }  # fmt: skip


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=DEFAULT, choices=list(CASES))
    parser.add_argument("--peer", choices=("yes", "no", "only"), default="yes", help="measure the library too")
    parser.add_argument("--out", help="JSON file")
    parser.add_argument("--model", help="folder of a trained model with MTP layers, for the mtp case")
    parser.add_argument("--profile", action="store_true", help="kernels of a decoding step (CUDA)")
    parser.add_argument("--cache_dtype", choices=("auto", "fp8"), default="auto", help="of our cache")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls, of which the median counts")
    parser.add_argument("--size", choices=("reference", "cpu", "toy"), help="default: by the cases")
    parser.add_argument("--shrink", type=int, default=1, help="divides contexts and counts, to try the script out")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    args = parser.parse_args(arguments)
    on_cpu = args.cases == ["cpu"]
    if "cpu" in args.cases and not on_cpu:
        parser.error("cases=cpu has a config and a device of its own: run it alone")
    device = args.device or ("cuda" if torch.cuda.is_available() and not on_cpu else "cpu")
    bench = Bench(
        size=args.size or ("cpu" if on_cpu else "reference"), device=device,
        dtype=torch.bfloat16 if device == "cuda" else torch.float32, repeats=args.repeats, shrink=args.shrink,
        model=args.model, cache_dtype=args.cache_dtype, profile=args.profile,
    )  # fmt: skip
    facts = facts_of(bench)
    print(json.dumps(facts), flush=True)
    report = Report(args.out, facts)
    for who in {"yes": ("ours", "library"), "no": ("ours",), "only": ("library",)}[args.peer]:
        for case in args.cases:
            run_case(bench, case, who, report)
    report.table()
    return report.lines


if __name__ == "__main__":
    main()
