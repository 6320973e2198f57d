"""Training over the GPUs of one host, ours beside the library's: one process group for each case, in turn.

    python benchmarks/bench_multi.py                                   every case at the reference config (two H100)
    python benchmarks/bench_multi.py --cases ours-fsdp2_ep-fp32 library-fsdp2_ep-fp32
    python benchmarks/bench_multi.py --cases ours-ddp-bf16 --profile   where a case's step goes, on its first process
    python benchmarks/bench_multi.py --device cpu --size toy           two gloo processes, to try it out

Cases are named <who>-<layout>-<weights>. ours: the parts that the recipes put together (recipes/sharding.py, expert
parallelism, AdamW that clips inside its update, the bias update); library: transformers' DeepseekV3 with grouped_mm
experts, sdpa and torch's fused AdamW, without clipping, spread by its own DistributedConfig or torch's DDP. alone: one
process a GPU, which knows nothing of the others; ddp; fsdp2; fsdp2_kept: its weights stay gathered until the backward;
fsdp2_ep: FSDP2 with experts over all GPUs. bf16: bf16 weights and states; fp32: fp32 masters, bf16 compute. Rows are
random tokens, others on each GPU; routing is real.

Prints a JSON line a case as soon as it is there, and a table: tokens/s of all GPUs together by the slowest process'
median step, the share of as many GPUs alone, the largest peak of memory; host: what launching a step takes. An error
is a result and stops no other case.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.train_cases import (  # noqa: E402
    SIZES,
    BareStep,
    library_model,
    memory_figures,
    our_model,
    synchronize,
    table_rows,
    time_steps,
    token_batches,
)
from benchmarks.train_profile import profile_steps, profile_table  # noqa: E402

CASES = (
    "ours-alone-bf16", "ours-alone-fp32", "library-alone-bf16", "library-alone-fp32", "ours-ddp-bf16",
    "library-ddp-bf16", "ours-fsdp2-fp32", "library-fsdp2-fp32", "ours-fsdp2_ep-fp32", "library-fsdp2_ep-fp32",
)  # fmt: skip
FURTHER = ("ours-fsdp2_kept-fp32", "ours-ddp-fp32", "ours-ddp_ep-bf16", "ours-fsdp2_ep-bf16", "library-ddp-fp32")
COLUMNS = (
    ("tokens_per_second", "tokens/s", 9, ","), ("share_percent", "of alone %", 10, ".1f"),
    ("step_ms", "step ms", 8, ".1f"), ("step_ms_90", "90 %", 8, ".1f"), ("host_ms", "host ms", 8, ".1f"),
    ("peak_gib", "peak GiB", 8, ".1f"), ("first_step_s", "1st step s", 10, ".1f"), ("seconds", "in all s", 8, ".0f"),
    ("loss", "loss", 7, ".3f"),
)  # fmt: skip


# ---------------------------------------------------------------- one case, in each process of its group


def device_of(job):
    return torch.device("cuda", torch.cuda.current_device()) if job["device"] == "cuda" else torch.device("cpu")


def whole_model(job):
    """The job's model, whole and the same on each process, on its device."""
    torch.manual_seed(0)
    with device_of(job):
        if job["who"] == "library":
            model = library_model(job["fields"])
            model.set_attn_implementation("sdpa")
            model.set_experts_implementation("grouped_mm")
        else:
            model = our_model(job["fields"])
    return (model.bfloat16() if job["weights"] == "bf16" else model).train()


def library_step(job):
    """The library's step, spread as the job says. fp32 weights: bf16 by FSDP2's mixed precision, else by autocast."""
    model, layout = whole_model(job), job["layout"]
    mixed = job["weights"] == "fp32" and job["device"] == "cuda"
    if layout.startswith("fsdp2"):
        from transformers.distributed import DistributedConfig

        world = dist.get_world_size()
        ep = {"ep_size": world} if layout == "fsdp2_ep" else {}
        given = DistributedConfig(fsdp_size=world, fsdp_mixed_precision=mixed, **ep)
        given, _, mesh = model.prepare_distribute_model(given)
        forward = model = model.maybe_distribute_model(model, given, mesh)
        # Whole and sharded weights, and such of several meshes, are not updated together.
        by_mesh = {}
        for parameter in model.parameters():
            by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
        groups = [{"params": parameters} for parameters in by_mesh.values()]
    else:
        groups, forward = list(model.parameters()), in_ddp(job, model)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    autocast = torch.autocast(job["device"], torch.bfloat16, enabled=mixed and layout in ("alone", "ddp"))

    def step(ids):
        with autocast:
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def in_ddp(job, model):
    """DDP around the model, where the layout has it."""
    if not job["layout"].startswith("ddp"):
        return model
    devices = [torch.cuda.current_device()] if job["device"] == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def our_step(job):
    """Our step, spread as the job says, put together of what the recipes' trainers use."""
    from modeling_deepseek_r1.expert_parallel import expert_groups, parallelise_experts
    from modeling_deepseek_r1.expert_parallel_state import global_gradient_norm, reduce_expert_gradients
    from recipes.optimizers import FusedAdamW
    from recipes.sharding import reduce_replicated_gradients, shard

    model, layout = whole_model(job), job["layout"]
    if layout == "alone":
        return BareStep(job | {"variant": f"bare-{job['weights']}-fused"}, model)
    if layout.endswith("_ep"):
        parallelise_experts(model, *expert_groups(), equal_rows=True)  # as recipes/pretrain.py
    mixed = job["weights"] == "fp32" and job["device"] == "cuda"
    sharded = layout.startswith("fsdp2")
    if sharded:
        shard(model, device_of(job), torch.bfloat16 if mixed else None, reshard_after_forward=layout != "fsdp2_kept")
    forward, optimizer = in_ddp(job, model), FusedAdamW(model.parameters(), lr=1e-4)
    autocast = torch.autocast(job["device"], torch.bfloat16, enabled=mixed and not sharded)

    def step(ids):
        with autocast:
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        reduce_expert_gradients(model)
        if sharded:
            reduce_replicated_gradients(model)
        optimizer.clip_gradients(model.parameters(), 1.0, global_gradient_norm(model))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.update_expert_bias()
        return loss.detach()

    return step


def enter_group(job):
    """Joins the job's process group, where it has one; -> rank."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if job["device"] == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if world > 1:
        nccl = {"backend": "nccl", "device_id": device_of(job)} if job["device"] == "cuda" else {"backend": "gloo"}
        dist.init_process_group(**nccl)
    return rank


def host_milliseconds(job, step, batches, steps=5):
    """Median time in which a step is launched while the device has nothing else to do."""
    found = []
    for index in range(steps):
        synchronize(job["device"])
        began = time.perf_counter()
        step(batches[index % len(batches)])
        found.append((time.perf_counter() - began) * 1e3)
    synchronize(job["device"])
    return statistics.median(found)


def measure(job):
    """The case's figures, on every process of the group."""
    rank, world = enter_group(job), int(os.environ.get("WORLD_SIZE", "1"))
    step, batches = {"ours": our_step, "library": library_step}[job["who"]](job), token_batches(job | {"seed": rank})
    synchronize(job["device"])
    milliseconds, first = time_steps(job, step, batches)
    loss, host = float(step(batches[0])), host_milliseconds(job, step, batches)
    own = {"milliseconds": milliseconds, "first": first, "loss": loss, "host": host, **memory_figures(job)}
    profile = profile_steps(job, step, batches) if job["profile"] else {}
    found = [None] * world
    if world > 1:
        dist.all_gather_object(found, own)
    else:
        found = [own]
    slowest = max((each["milliseconds"] for each in found), key=statistics.median)
    median = statistics.median(slowest)
    deciles = statistics.quantiles(slowest, n=10, method="inclusive") if len(slowest) > 1 else [median] * 9
    figures = {
        "processes": world, "tokens_per_second": round(world * job["batch"] * job["length"] / median * 1e3),
        "step_ms": round(median, 2), "step_ms_10": round(deciles[0], 2), "step_ms_90": round(deciles[-1], 2),
        "first_step_s": round(max(each["first"] for each in found), 2),
        "loss": round(statistics.mean(each["loss"] for each in found), 4),
        "host_ms": round(max(each["host"] for each in found), 2), **profile,
    }  # fmt: skip
    for name in ("peak_gib", "reserved_gib"):
        if name in own:
            figures[name] = max(each[name] for each in found)
    return figures


def print_line(figures):
    """In one write, so that those of two processes that fail together do not mix."""
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()


def work(job):
    """What a process of a case's group does. Rank 0 prints the line, or the rank that fails."""
    if job["device"] == "cpu":
        torch.set_num_threads(1)
    about = {"case": job["case"], "torch": torch.__version__, "device": job["device"]}
    try:
        figures = measure(job)
    except Exception as error:  # an out-of-memory, a peer's own trouble: the result of this case
        message = " ".join(str(error).split())[:500]
        print_line(about | {"error": f"rank {os.environ.get('RANK', '0')}: {type(error).__name__}: {message}"})
        os._exit(1)  # the others may wait inside a collective: their launcher ends them
    if int(os.environ.get("RANK", "0")) == 0:
        if job["device"] == "cuda":
            about["device"] = torch.cuda.get_device_name()
        print_line(about | figures)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


# ---------------------------------------------------------------- cases in turn


def start(job, place=0):
    """A process, or the launcher of a group, that measures `job`; alone on GPU number `place`."""
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": "1"} | os.environ
    command = [sys.executable]
    if job["layout"] == "alone":
        visible = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
        environment["CUDA_VISIBLE_DEVICES"] = visible[place] if visible else str(place)
    else:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(job["gpus"])]
    command += [__file__, "--job", json.dumps(job)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
                            start_new_session=True)  # fmt: skip


def stop(process):
    """Ends a case that takes too long; -> what it has printed. A launcher that is asked to ends its processes, which
    are in sessions of their own."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.communicate(timeout=20)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]


def outcome(job, process, began, timeout):
    """The line of a started case; an error line where it printed none, was too slow, or died."""
    try:
        output, trouble = process.communicate(timeout=max(1.0, began + timeout - time.time()))
        failed = process.returncode and f"exit code {process.returncode}: {trouble.strip()[-400:]}"
    except subprocess.TimeoutExpired:
        output = stop(process)
        failed = f"stopped after {timeout:.0f} s (--timeout)"
    lines = [json.loads(line) for line in output.splitlines() if line.startswith('{"case"')]
    line = next((line for line in lines if "error" in line), lines[-1] if lines else {"case": job["case"]})
    if failed and "error" not in line:
        line["error"] = failed
    return line | {"seconds": round(time.time() - began, 1)}


def rounds(jobs, gpus):
    """Lists of jobs that run at the same time: as many alone as there are GPUs, each on its own; the others in turn."""
    alone = [job for job in jobs if job["layout"] == "alone"]
    together = [job for job in jobs if job["layout"] != "alone"]
    return [alone[first : first + gpus] for first in range(0, len(alone), gpus)] + [[job] for job in together]


def share_of_alone(line, lines):
    """{"share_percent"}: of as many times the tokens/s of the same model alone, where that was measured."""
    who, _, weights = line["case"].split("-")
    one = next((each for each in lines if each["case"] == f"{who}-alone-{weights}"), {}).get("tokens_per_second")
    speed = line.get("tokens_per_second")
    return {"share_percent": round(100 * speed / (one * line["processes"]), 1)} if one and speed else {}


def run_cases(jobs, args):
    """Prints each line when it is there; -> all."""
    begin, lines = time.time(), []
    for each in rounds(jobs, args.gpus):
        began = time.time()
        if began - begin > args.deadline:
            found = [{"case": job["case"], "error": f"not started: {args.deadline:.0f} s had passed"} for job in each]
        else:
            started = [(job, start(job, place)) for place, job in enumerate(each)]
            found = [outcome(job, process, began, args.timeout) for job, process in started]
        for line in found:
            lines.append(line)
            line |= share_of_alone(line, lines)
            print(json.dumps(line), flush=True)
            if args.output:
                Path(args.output).write_text("".join(json.dumps(each) + "\n" for each in lines))
    return lines


def table(lines):
    return "\n".join(table_rows(lines, "case", COLUMNS))


# ---------------------------------------------------------------- command line


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=tuple(SIZES), help="default: reference on CUDA, toy on a CPU")
    parser.add_argument("--cases", nargs="+", choices=(*CASES, *FURTHER), default=list(CASES))
    parser.add_argument("--gpus", type=int, help="processes of a group; default: all GPUs, on a CPU 2")
    parser.add_argument("--batch", type=int, help="rows a step and GPU; default: that of the size")
    parser.add_argument("--length", type=int, help="tokens a row; default: that of the size")
    parser.add_argument("--steps", type=int, default=12, help="timed steps")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them")
    parser.add_argument("--timeout", type=float, default=90, help="seconds for one case")
    parser.add_argument("--deadline", type=float, default=240, help="seconds after which no case is started")
    parser.add_argument("--collects", action="store_true", help="Python collects garbage when it likes, as by default")
    parser.add_argument("--profile", action="store_true", help="also the device's time by kind of kernel")
    parser.add_argument("--output", help="file for the JSON lines")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    there = torch.cuda.device_count()
    args.gpus = args.gpus or (2 if args.device == "cpu" else there)
    args.size = args.size or ("toy" if args.device == "cpu" else "reference")
    if not args.job and args.device == "cuda" and not 2 <= args.gpus <= there:
        parser.error(f"--gpus {args.gpus}: this machine has {there} GPUs, a case needs at least 2; try --device cpu")
    return args


def make_jobs(args):
    fields, batch, length = SIZES[args.size]()
    jobs = []
    for case in args.cases:
        who, layout, weights = case.split("-")
        jobs.append({
            "case": case, "who": who, "layout": layout, "weights": weights, "device": args.device, "fields": fields,
            "batch": args.batch or batch, "length": args.length or length, "steps": args.steps,
            "warmup": args.warmup, "gpus": args.gpus, "profile": args.profile,
            "collects": args.collects,
        })  # fmt: skip
    return jobs


def main(argv=None):
    args = parse(argv)
    if args.job:
        return work(args.job)
    lines = run_cases(make_jobs(args), args)
    print("\n" + table(lines))
    for line in lines:
        if "kinds_ms" in line:
            print("\n" + profile_table(line))
    return lines


if __name__ == "__main__":
    main()
