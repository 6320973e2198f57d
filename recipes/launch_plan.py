"""Which layout, micro-batch and checkpointing suit a model on given devices: candidates side by side, and the choice.

The global batch never changes: rows a step = data-parallel ranks x per_device_train_batch_size x
gradient_accumulation_steps. Of what fits, the quickest layout wins (the order of `PREFERENCE`: what is whole on a
device before what is gathered, before what is computed twice, before what lies in host memory), and in it the largest
micro-batch up to `ENOUGH_TOKENS`, where the matmuls gain no more.
"""

from dataclasses import dataclass

from recipes.eval_tables import aligned
from recipes.launch_layouts import LAYOUTS, check_global_batch
from recipes.launch_memory import Footprint, Work, footprint
from recipes.sizing import GIB, USABLE_SHARE

ENOUGH_TOKENS = 32_768
# (layout, activation checkpointing), quickest first.
PREFERENCE = (
    ("one_gpu", False), ("ddp", False), ("fsdp2_kept", False), ("fsdp2", False), ("several_nodes", False),
    ("fsdp2_ep", False), ("one_gpu", True), ("ddp", True), ("fsdp2_kept", True), ("fsdp2", True),
    ("several_nodes", True), ("fsdp2_ep", True), ("zero2", False), ("zero3", False), ("zero2", True), ("zero3", True), ("tensor_parallel", True),
    ("context_parallel", True), ("fsdp2_checkpointing", True),
)  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """`gpus` on each of `nodes`, each with `device_bytes`; `source`: where the figures are from."""

    gpus: int
    nodes: int
    device_bytes: int
    host_bytes: int | None = None
    source: str = "as given"

    @property
    def devices(self):
        return self.gpus * self.nodes


@dataclass(frozen=True)
class Batch:
    """What a step computes: `rows` of `length` tokens over all devices, weights as in `launch_memory.Work`."""

    rows: int
    length: int
    masters: bool
    averages: bool = False


@dataclass(frozen=True)
class Candidate:
    """A layout with its micro-batch; `problem`: "" where it can be launched and fits."""

    layout: object
    checkpointing: bool
    rows: int
    accumulation: int
    memory: Footprint | None
    problem: str
    too_large: bool = False

    @property
    def name(self):
        mark = self.checkpointing and not self.layout.always_checkpoints
        return self.layout.name + (" + checkpointing" if mark else "")


def micro_batches(rows, length):
    """Rows of a micro-batch that divide a rank's `rows`, largest first, 1 always among them."""
    return [n for n in range(rows, 0, -1) if rows % n == 0 and (n == 1 or n * length <= ENOUGH_TOKENS)]


def largest_micro_batch(shape, layout, machine, batch, checkpointing):
    """The `Candidate` of the largest micro-batch that fits; of one row where none does.

    Raises:
        ValueError: if the devices do not divide what the layout spreads, or cannot share the rows equally.
    """
    layout.check(shape.config, machine.devices, machine.nodes)
    dp = layout.data_parallel(machine.devices)
    check_global_batch(batch.rows, dp)
    for rows in micro_batches(batch.rows // dp, batch.length):
        accumulation = batch.rows // dp // rows
        work = Work(rows, batch.length, batch.masters, checkpointing, accumulation > 1, batch.averages)
        memory = footprint(shape, layout, machine.devices, work)
        problem = _does_not_fit(memory, machine)
        if not problem:
            break
    return Candidate(layout, checkpointing, rows, accumulation, memory, layout.missing() or problem, bool(problem))


def _does_not_fit(memory, machine):
    usable = machine.device_bytes * USABLE_SHARE
    if memory.peak > usable:
        return f"takes {memory.peak / GIB:.1f} GiB with one row, usable are {usable / GIB:.1f}"
    if machine.host_bytes and memory.host * machine.gpus > machine.host_bytes:
        needed, there = memory.host * machine.gpus / GIB, machine.host_bytes / GIB
        return f"takes {needed:.0f} GiB of host memory, the machine has {there:.0f}"
    return ""


def candidates(shape, machine, batch, only=None):
    """[Candidate] in the order of `PREFERENCE`; layouts that do not suit the devices carry the reason.

    Raises:
        ValueError: if `only`, a layout's name, does not suit them.
    """
    found = []
    for name, checkpointing in PREFERENCE:
        layout = LAYOUTS[name]
        if only not in (None, name):
            continue
        try:
            found.append(largest_micro_batch(shape, layout, machine, batch, checkpointing))
        except ValueError as error:
            if only:
                raise
            found.append(Candidate(layout, checkpointing, 0, 0, None, str(error)))
    return found


def choose(found, machine):
    """The first that fits.

    Raises:
        ValueError: if none does.
    """
    best = next((each for each in found if not each.problem), None)
    if best:
        return best
    sizes = [each.memory.peak for each in found if each.memory and not each.layout.missing()]
    least = f"; the least is {min(sizes) / GIB:.1f} GiB a GPU" if sizes else ""
    raise ValueError(
        f"gpus={machine.gpus} x nodes={machine.nodes} of {machine.device_bytes / GIB:.1f} GiB do not suffice{least}; "
        "take more --gpus or --nodes, a shorter sequence_length, weights_dtype=bfloat16 or a smaller model"
    )


def reason(best, found, machine):
    """Why it was this one, in a sentence."""
    usable = machine.device_bytes * USABLE_SHARE / GIB
    before = [each for each in found[: found.index(best)] if each.too_large and not each.layout.missing()]
    why = best.layout.summary + (", every layer computed twice" if best.checkpointing else "")
    if before:
        sizes = ", ".join(f"{each.name} {each.memory.peak / GIB:.1f}" for each in before)
        why += f"; what is quicker does not fit in {usable:.1f} GiB with one row: {sizes}"
    if best.accumulation > 1:
        why += f"; {best.accumulation} micro-batches keep the global batch"
    return why


def memory_table(found):
    """GiB of one device by part and layout; with checkpointing only where it does not fit without."""
    enough = {each.layout.name for each in found if each.memory and not each.checkpointing and not each.too_large}
    shown = [each for each in found if each.memory and not (each.checkpointing and each.layout.name in enough)]
    parts = list(shown[0].memory.parts)
    rows = [(part, *(f"{each.memory.parts[part] / GIB:.2f}" for each in shown)) for part in parts]
    rows.append(("peak", *(f"{each.memory.peak / GIB:.2f}" for each in shown)))
    if any(each.memory.host for each in shown):
        rows.append(("host memory", *(f"{each.memory.host / GIB:.2f}" for each in shown)))
    rows.append(("rows x accumulation", *(f"{each.rows} x {each.accumulation}" for each in shown)))
    rows.append(("fits", *("no" if each.too_large else "yes" for each in shown)))
    short = [each.name.replace(" + checkpointing", " +ckpt") for each in shown]
    return aligned(["GiB of one GPU", *short], rows)


def command(best, config_path, machine, stage="pretrain"):
    """The line that launches `best`."""
    layout, words = best.layout, ["accelerate launch", f"--config_file recipes/launch/{best.layout.name}.yaml"]
    if machine.devices > 1:
        words.append(f"--num_processes {machine.devices}")
    if machine.nodes > 1:
        words.append(f"--num_machines {machine.nodes} --machine_rank RANK --main_process_ip FIRST_NODE "
                     "--main_process_port 29500")  # fmt: skip
    words.append(f"recipes/{stage}.py --config {config_path} --per_device_train_batch_size {best.rows} "
                 f"--gradient_accumulation_steps {best.accumulation} "
                 f"--activation_checkpointing {'full' if best.checkpointing else 'none'}")  # fmt: skip
    if layout.needs and layout.needs[2].endswith("_size"):
        words.append(f"--{layout.needs[2]} {machine.devices}")
    return " ".join(words)
