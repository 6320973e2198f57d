"""Which launch file and batch sizes: reads the machine and a stage's config, proposes a command, and says why.

    python recipes/plan_launch.py --config recipes/configs/pretrain_small.yaml
    python recipes/plan_launch.py --config recipes/configs/pretrain_base.yaml --gpus 8 --gpu_memory_gib 80 \\
        --global_batch 512
    python recipes/plan_launch.py --cards                  # the table of docs/launch.md

The global batch is per_device_train_batch_size x gradient_accumulation_steps of the config, as on one device, unless
--global_batch says otherwise. Further arguments are settings of the stage, as in `recipes/pretrain.py --key value`.
"""

import argparse
import os
import sys
from pathlib import Path

if __package__ in (None, ""):  # launched as a script: recipes/ is first on the path and shadows packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from recipes.launch_layouts import check_global_batch, check_processes, find_layout
from recipes.launch_memory import model_shape
from recipes.launch_plan import Batch, Machine, candidates, choose, command, memory_table, reason
from recipes.model_loading import build_config
from recipes.pretrain_config import PretrainConfig, parse_config
from recipes.sizing import GIB, USABLE_SHARE, device_memory


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)  # fmt: skip
    parser.add_argument("--config", help="a YAML with model_config, such as recipes/configs/pretrain_small.yaml")
    parser.add_argument("--gpus", type=int, help="GPUs of a node (default: what this machine has)")
    parser.add_argument("--gpu_memory_gib", type=float, help="memory of each (default: what torch reports)")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--global_batch", type=int, help="rows an optimizer step, over all devices")
    parser.add_argument("--launch_file", help="consider only this file of recipes/launch/, and check it")
    parser.add_argument("--cards", action="store_true", help="print which layout fits which model on which card")
    return parser.parse_known_args(argv)


def read_machine(gpus=None, gpu_memory_gib=None, nodes=1):
    """The `Machine` of this host, or the one described.

    Raises:
        ValueError: for numbers below 1, or GPUs described by halves.
    """
    here = torch.cuda.device_count()
    for name, value in (("gpus", gpus), ("gpu_memory_gib", gpu_memory_gib), ("nodes", nodes)):
        if value is not None and not (value > 0 or (name, value) == ("gpus", 0)):
            raise ValueError(f"{name}={value} must be positive")
    count = here if gpus is None else gpus
    if count and gpu_memory_gib is None and not here:
        raise ValueError(f"gpus={gpus}: this machine has none to ask for their memory; add --gpu_memory_gib, e.g. 80")
    described = gpus is not None or gpu_memory_gib is not None or nodes > 1
    if not count:
        return Machine(0, nodes, 0, device_memory("cpu"), f"{os.cpu_count()} CPU cores, no GPU")
    size = gpu_memory_gib * GIB if gpu_memory_gib else min(device_memory(f"cuda:{i}") for i in range(here))
    name = torch.cuda.get_device_name(0) if here and not described else "as given"
    return Machine(count, nodes, int(size), None if described else device_memory("cpu"), name)


def plan_on_cpu(args, config_path, machine):
    """The lines for a machine without a GPU: two processes where the cores and the rows allow."""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    cores = os.cpu_count() or 1
    lines = [f"machine   {machine.source}, {machine.host_bytes / GIB:.1f} GiB"]
    micro = args.per_device_train_batch_size
    if cores < 4 or rows % 2:
        why = f"{cores} cores are best used by one process" if cores < 4 else f"{rows} rows cannot be halved"
        lines += [f"reason    {why}", "", f"python recipes/pretrain.py --config {config_path}"]
        return "\n".join(lines)
    half = micro // 2 if micro % 2 == 0 else micro
    accumulation = rows // 2 // half
    return "\n".join([
        *lines, "reason    two processes with half the rows each; each CPU process holds the whole model", "",
        f"accelerate launch --config_file recipes/launch/cpu.yaml recipes/pretrain.py --config {config_path} "
        f"--per_device_train_batch_size {half} --gradient_accumulation_steps {accumulation}",
    ])  # fmt: skip


def plan(given, rest):
    """The text of a plan."""
    if not given.config:
        raise ValueError("--config is missing: a stage's YAML, such as recipes/configs/pretrain_small.yaml")
    args = parse_config(PretrainConfig, ["--config", given.config, "--use_cpu", *rest])
    machine = read_machine(given.gpus, given.gpu_memory_gib, given.nodes)
    only = None
    if given.launch_file:
        if given.launch_file.endswith(".yaml"):  # as it is; by its name alone, the command sets --num_processes
            check_processes(given.launch_file, machine.gpus, machine.nodes)
        only = find_layout(given.launch_file).name
    if not machine.gpus:
        if only not in (None, "cpu"):
            raise ValueError(f"launch_file={given.launch_file!r} needs GPUs and gpus=0; use recipes/launch/cpu.yaml")
        return plan_on_cpu(args, given.config, machine)
    if only == "cpu":
        raise ValueError(f"launch_file={given.launch_file!r} is for a machine without GPUs; leave it out")
    shape = model_shape(build_config(args))
    rows = given.global_batch or args.per_device_train_batch_size * args.gradient_accumulation_steps
    batch = Batch(rows, args.sequence_length, args.weights_dtype == "float32", bool(args.ema_decay))
    if only is None:
        check_global_batch(rows, machine.devices)
    found = candidates(shape, machine, batch, only)
    return report(found, machine, batch, shape, given.config)


def report(found, machine, batch, shape, config_path):
    lines = [
        f"machine   {machine.nodes} x {machine.gpus} GPU of {machine.device_bytes / GIB:.1f} GiB, "
        f"{USABLE_SHARE:.0%} of it usable ({machine.source})",
        f"model     {shape.total / 1e9:.3f} B parameters, {'fp32 masters, bf16 compute' if batch.masters else 'bf16'}",
        f"batch     {batch.rows} rows of {batch.length:,} tokens a step", "",
    ]  # fmt: skip
    if any(each.memory for each in found):
        lines += [memory_table(found), ""]
    lines += [f"{name}: {problem}" for name, problem in dict.fromkeys(
        (each.layout.name, each.problem) for each in found if each.layout.missing() or not each.memory)]  # fmt: skip
    best = choose(found, machine)
    return "\n".join([*lines, "", f"proposed  {best.name}", f"reason    {reason(best, found, machine)}", "",
                      command(best, config_path, machine)])  # fmt: skip


def main(argv=None):
    given, rest = arguments(argv)
    if given.cards:
        from recipes.launch_cards import cards_table

        print(cards_table())
        return
    print(plan(given, rest))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # what a user can mend needs no traceback
        sys.exit(f"{type(error).__name__}: {error}")
