"""Memory and speed of casting a checkpoint folder from bf16 to FP8.

    python benchmarks/bench_cast.py [--gigabytes 20] [--shard_gigabytes 1] [--folder DIR]

Makes a bf16 folder of that size in an R1-shaped layout (hidden 7168, experts of 2048; as many expert layers as fit)
with random weights in many shards, casts it to FP8 with `python -m modeling_deepseek_r1.checkpoint cast` in a process
of its own, and prints peak resident memory and speed; the same for a quarter of the size, to show that memory does not
grow.
Needs 1.6 times the size free on disk; the folders are removed. `--gigabytes 4` takes about a minute.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from modeling_deepseek_r1.checkpoint_writer import CheckpointWriter, Group, Target, write_config

HIDDEN, EXPERT, VOCAB, LIMIT_GB = 7168, 2048, 129280, 2.0


def simulated_shapes(total_bytes):
    """Yields (name, shape) of R1's matrices (embedding, head, expert layers) until they fill `total_bytes` in bf16."""
    used, layer = 0, 3
    fixed = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    for name, shape in fixed.items() if total_bytes >= 12 * VOCAB * HIDDEN else ():
        used += 2 * shape[0] * shape[1]
        yield name, shape
    while True:
        base = f"model.layers.{layer}."
        attention = {"q_a_proj": (1536, HIDDEN), "q_b_proj": (24576, 1536), "kv_a_proj_with_mqa": (576, HIDDEN),
                     "kv_b_proj": (32768, 512), "o_proj": (HIDDEN, 16384)}  # fmt: skip
        shapes = {f"{base}self_attn.{name}.weight": shape for name, shape in attention.items()}
        shapes[f"{base}mlp.gate.weight"] = (256, HIDDEN)
        for expert in range(256):
            for name in ("gate", "up", "down"):
                shape = (HIDDEN, EXPERT) if name == "down" else (EXPERT, HIDDEN)
                shapes[f"{base}mlp.experts.{expert}.{name}_proj.weight"] = shape
        for name, shape in shapes.items():
            if used >= total_bytes:
                return
            used += 2 * shape[0] * shape[1]
            yield name, shape
        layer += 1


def simulate(folder, total_bytes, shard_bytes):
    """Writes the folder. The values repeat every 2^23 elements, so that drawing them takes no time."""
    noise = (torch.randn(1 << 23) * 0.02).bfloat16()

    def group(name, shape):
        def pieces():
            left = shape[0] * shape[1]
            while left:
                yield name, noise[:left]
                left -= min(left, len(noise))

        return Group((Target(name, torch.bfloat16, shape),), pieces)

    groups = [group(name, shape) for name, shape in simulated_shapes(total_bytes)]
    fields = {"model_type": "deepseek_v3", "dtype": "bfloat16"}  # of no architecture: there are not all of its layers
    writer = CheckpointWriter(folder, groups, {}, [], str(shard_bytes))
    writer.run(lambda path: write_config(path, fields))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")), len(writer.shards)


CHILD = """
import json, resource, sys
from modeling_deepseek_r1.checkpoint import main
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = main(sys.argv[1:])
print(json.dumps({"code": code, "imports": base, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""


def measure(folder, gigabytes, shard_gigabytes):
    """-> {"bytes", "shards", "seconds", "imports_gb", "peak_gb"} of one cast."""
    source, target = folder / "bf16", folder / "fp8"
    size, shards = simulate(source, int(gigabytes * 1e9), int(shard_gigabytes * 1e9))
    start = time.perf_counter()
    command = [sys.executable, "-c", CHILD, "cast", str(source), str(target), "--to", "fp8"]
    command += ["--max_shard_size", str(int(shard_gigabytes * 1e9))]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, result = time.perf_counter() - start, json.loads(output.splitlines()[-1])
    if result["code"] != 0:
        raise SystemExit(f"the cast failed: {output}")
    for path in (source, target):
        shutil.rmtree(path)
    unit = 1e9 if sys.platform == "darwin" else 1e9 / 1024  # ru_maxrss: bytes there, KiB on Linux
    return {"bytes": size, "shards": shards, "seconds": seconds, "imports_gb": result["imports"] / unit,
            "peak_gb": result["peak"] / unit}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=20)
    parser.add_argument("--shard_gigabytes", type=float, default=1)
    parser.add_argument("--folder", default=None, help="where to work (default: a new folder in the temporary one)")
    args = parser.parse_args()
    needed, free = int(1.6e9 * args.gigabytes), shutil.disk_usage(args.folder or tempfile.gettempdir()).free
    if free < needed:
        raise SystemExit(f"gigabytes={args.gigabytes:g} needs {needed:,} bytes, {free:,} are free; take less")
    peaks = []
    for gigabytes in (args.gigabytes / 4, args.gigabytes):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            row = measure(Path(folder), gigabytes, args.shard_gigabytes)
        peaks.append(row["peak_gb"])
        speed = row["bytes"] / row["seconds"] / 1e9
        print(
            f"{row['bytes'] / 1e9:5.1f} GB in {row['shards']:3} shards: peak {row['peak_gb']:.2f} GB (imports alone "
            f"{row['imports_gb']:.2f} GB), {row['seconds']:.0f} s, {speed:.2f} GB/s of bf16", flush=True,
        )  # fmt: skip
    within = max(peaks) < LIMIT_GB
    print(f"below {LIMIT_GB:g} GB: {within}; four times the size changes the peak by {peaks[1] - peaks[0]:+.3f} GB")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
