"""Where a training step goes: device time by kind of kernel, the longest kernels, and the gaps between them."""

import functools
import re

import torch

from benchmarks.train_cases import ROOT, BareStep, build_model, synchronize, token_batches

# Our own kernels by the file that they are in; those that do something else there, by name.
OWN_FILES = {
    "modeling_deepseek_r1/kernels_expert_products.py": "grouped matmul",
    "modeling_deepseek_r1/kernels_expert_rows.py": "expert rows",
    "modeling_deepseek_r1/kernels_norms.py": "norms",
    "modeling_deepseek_r1/kernels_rotary.py": "rotary and layout of attention",
    "modeling_deepseek_r1/kernels_cross_entropy.py": "cross-entropy",
    "modeling_deepseek_r1/kernels_training_routing.py": "router and sort",
    "recipes/kernels_adamw.py": "optimizer",
}
OWN_NAMES = {"_rank_pairs": "router and sort", "_place_pairs": "router and sort", "_swiglu_kernel": "SwiGLU, dense",
             "_swiglu_backward_kernel": "SwiGLU, dense", "_row_blocks": "router and sort",
             "_sum_parts": "expert rows"}  # fmt: skip
# First match wins, so the order counts: a fused optimizer kernel is also elementwise, a grouped matmul also a GEMM.
KINDS = (
    ("memset and memcpy", r"^memset|^memcpy|aten::_to_copy_h2d"),
    ("optimizer", r"adam|multi_tensor|lpnorm|muon|newton_schulz|aten::_foreach|clip_grad"),
    ("cross-entropy", r"cross_entropy|crossentropy|softmax|nll_loss|logsumexp|log_soft"),
    ("grouped matmul", r"grouped|groupproblem|ptrarray|group_gemm"),
    ("expert rows", r"expert|index_select|indexselect|gather|scatter|index_put|indexing|index_elementwise|aten::index|"
                    r"index_add|indexfunc"),
    ("router and sort", r"rout|sort|radix|topk|histogram|cumsum|scan|sigmoid|bincount"),
    ("norms", r"norm|rsqrt"),
    ("attention", r"fmha|flash|sdpa|attention|cudnn_generated|mem_eff"),
    ("dense matmul", r"gemm|nvjet|cutlass|splitk|cublas|matmul|aten::mm|aten::addmm|aten::bmm|aten::linear|gemv"),
    ("copies and elementwise", r"elementwise|copy|cat|reduce|fill|aten::|embedding|vectorized|arange|silu"),
)  # fmt: skip
COMMUNICATION = "communication"
# cuDNN's and CUTLASS's attention and matmul names are long: they hold words that mean other kinds elsewhere.
CERTAIN = (("fused by the compiler", r"^triton_"), (COMMUNICATION, r"^nccl|^c10d::"),
           ("attention", r"^cudnn_generated.*sdpa|^void cudnn::fusion|^fmha_|flash_(fwd|bwd)|_scaled_dot_product"),
           ("dense matmul", r"^nvjet|^aten::(mm|addmm|bmm)$"))  # fmt: skip
RANGES = ("Optimizer.", "## Call", "Torch-Compiled", "ProfilerStep", "FSDP::", "nccl:")  # not kernels
TOP = 25


@functools.cache
def own_kernels():
    """{name of a Triton kernel of ours: kind}, read from the sources; a file that is not there has none."""
    kinds = {}
    for path, kind in OWN_FILES.items():
        source = (ROOT / path).read_text() if (ROOT / path).is_file() else ""
        names = re.findall(r"@triton\.jit(?:\(.*\))?\s+def (\w+)", source)
        kinds |= {name: OWN_NAMES.get(name, kind) for name in names}
    return kinds


def kind_of(kernel):
    """The kind of work that a kernel (or, on a CPU, an operator) of this name does; "other" if none is known."""
    if kernel in own_kernels():
        return own_kernels()[kernel]
    name = kernel.lower()
    for kind, pattern in (*CERTAIN, *KINDS):
        if re.search(pattern, name):
            return kind
    return "other"


def busy_and_span(intervals):
    """(length of the union, last end - first start) of [(start, end)]."""
    busy, reach, ordered = 0.0, None, sorted(intervals)
    for start, end in ordered:
        reach = start if reach is None else reach
        busy += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return busy, (reach - ordered[0][0]) if ordered else 0.0


def summarise(kernels, steps):
    """[(name, start us, end us)] of `steps` steps -> figures per step: kinds, idle, longest kernels; exposed: time in
    which nothing but communication ran."""
    kinds, names = {}, {}
    for name, start, end in kernels:
        for table, key in ((kinds, kind_of(name)), (names, name)):
            count, total = table.get(key, (0, 0.0))
            table[key] = (count + 1, total + end - start)
    busy, span = busy_and_span([(start, end) for _, start, end in kernels])
    computing, _ = busy_and_span([(start, end) for name, start, end in kernels if kind_of(name) != COMMUNICATION])
    ordered = lambda table: sorted(table.items(), key=lambda item: -item[1][1])
    return {
        "span_ms": round(span / steps / 1e3, 3), "busy_ms": round(busy / steps / 1e3, 3),
        "idle_ms": round((span - busy) / steps / 1e3, 3), "launches": round(len(kernels) / steps),
        "exposed_ms": round((busy - computing) / steps / 1e3, 3),
        "kinds_ms": {kind: round(total / steps / 1e3, 3) for kind, (_, total) in ordered(kinds)},
        "kinds_launches": {kind: round(count / steps) for kind, (count, _) in ordered(kinds)},
        "top": [{"kernel": name[:160], "kind": kind_of(name), "count": round(count / steps, 1),
                 "ms": round(total / steps / 1e3, 3)} for name, (count, total) in ordered(names)[:TOP]],
    }  # fmt: skip


def recorded_kernels(profiler, device):
    """[(name, start, end)] in us. On a CPU operators by their own time, laid end to end (they nest)."""
    if device == "cuda":
        return [
            (event.name, event.time_range.start, event.time_range.end) for event in profiler.events()
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(RANGES)
            and not getattr(event, "is_user_annotation", False)
        ]  # fmt: skip
    kernels, place = [], 0.0
    for event in profiler.events():
        kernels.append((event.name, place, place + event.self_cpu_time_total))
        place += event.self_cpu_time_total
    return kernels


def profile_steps(job, step, batches, steps=3):
    """Figures of `steps` calls of step(ids) under torch.profiler, on this process."""
    synchronize(job["device"])
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if job["device"] == "cuda" else activity.CPU]) as profiler:
        for index in range(steps):
            step(batches[index % len(batches)])
        synchronize(job["device"])
    return summarise(recorded_kernels(profiler, job["device"]), steps)


def measure_profile(job):
    """One line: a bare step of the job's variant under torch.profiler, after warm-up."""
    model = build_model(job)
    step, batches = BareStep(job, model), token_batches(job)
    for index in range(job["warmup"]):
        step(batches[index % len(batches)])
    return profile_steps(job, step, batches)


def profile_table(line):
    """The breakdown of one line as text."""
    rows = [f"{line.get('variant') or line['case']}: {line['span_ms']} ms a step on the device, {line['launches']} "
            f"launches, {line['idle_ms']} ms of it between kernels, {line['exposed_ms']} in which communication ran "
            "alone"]  # fmt: skip
    for kind, milliseconds in line["kinds_ms"].items():
        rows.append(f"{milliseconds:9.2f} ms {line['kinds_launches'][kind]:6}x  {kind}")
    rows += ["", f"longest {TOP} kernels"]
    rows += [f"{top['ms']:9.2f} ms {top['count']:6g}x  {top['kind']:18.18} {top['kernel'][:110]}"
             for top in line["top"]]  # fmt: skip
    return "\n".join(rows)
