"""What all processes of a run must agree on, compared at its start; and batches that end on all of them together.

Ranks that start with another config, other code, other data or another model would hang, or train on in silence with
gradients of different things. `check_processes` compares facts through the process group's store, not by collectives:
it works before any model is on a device, and a rank that does not come is named when the time is over.
"""

import hashlib
import importlib.util
import itertools
import json
import platform
import time
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from recipes.zero_setup import whole_shape

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "trl", "triton")
OF_ONE_RANK = {"local_rank", "hub_token", "logging_dir", "deepspeed_plugin"}  # settings that may differ
SHOWN = 8  # differences that a message lists
LAST_WORDS_S = 10.0  # rank 0 may keep the store: it waits so long for the others to read the outcome
_calls = itertools.count()


class ProcessMismatchError(ValueError):
    """Ranks that differ, or that did not come; the message names ranks, fields and values."""


# ---------------------------------------------------------------- facts


def code_hashes():
    """{"code recipes/grpo.py": sha256} of the model's and the recipes' files."""
    model = importlib.util.find_spec("modeling_deepseek_r1").origin
    folders = (Path(model).resolve().parent, Path(__file__).resolve().parent)
    found = {}
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".jinja")):
            name = f"code {path.relative_to(folder.parent).as_posix()}"
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found


def version_facts():
    found = {"version python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[f"version {name}"] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[f"version {name}"] = "not installed"
    return found


def model_facts(model):
    """Each parameter with shape, type and whether it is trained; their order, by which DDP reduces them; the config."""
    named = list(model.named_parameters())
    found = {
        f"parameter {name}": f"{whole_shape(p)} {p.dtype} {'trained' if p.requires_grad else 'frozen'}"
        for name, p in named
    }
    order = "\n".join(name for name, _ in named)
    found["parameter order"] = hashlib.sha256(order.encode()).hexdigest()[:16]
    config = getattr(model, "config", None)
    return found | {f"model config {k}": v for k, v in (config.to_dict().items() if config is not None else ())}


def process_facts(args=None, model=None, data=None, batches=None):
    """Everything to compare, a flat dict of plain values: code and versions always, the rest where given.

    args: resolved training arguments; data: a checksum or a dict of them; batches: per epoch on this rank.
    """
    facts = code_hashes() | version_facts()
    if args is not None:
        settings = args.to_dict()
        facts |= {name: value for name, value in settings.items() if name not in OF_ONE_RANK}
    if model is not None:
        facts |= model_facts(model)
    if data is not None:
        facts |= {f"data {k}": v for k, v in (data if isinstance(data, dict) else {"checksum": data}).items()}
    if batches is not None:
        facts["batches per epoch"] = batches
    return json.loads(json.dumps(facts, default=lambda value: str(getattr(value, "value", value))))


# ---------------------------------------------------------------- comparison


def differences(facts, reference):
    """[(field, value here, value on rank 0)] in the order of the fields."""
    missing = "(not there)"
    names = [*reference, *(name for name in facts if name not in reference)]
    pairs = ((name, facts.get(name, missing), reference.get(name, missing)) for name in names)
    return [(name, own, theirs) for name, own, theirs in pairs if own != theirs]


def _verdict(reports):
    """The message for {rank: (number of differences, the first of them)}; None where all agree."""
    if not any(count for count, _ in reports.values()):
        return None
    lines, fields = {}, 0
    for rank, (count, found) in sorted(reports.items()):
        fields = max(fields, count)
        for name, own, theirs in found:
            lines.setdefault((name, _short(own), _short(theirs)), []).append(rank)
    shown = [f"  {name}: {own} on rank {_numbers(ranks)}, {theirs} on rank 0"
             for (name, own, theirs), ranks in lines.items()]  # fmt: skip
    more = f"\n  and further ones, up to {fields} on a rank" if fields > SHOWN or len(shown) > SHOWN else ""
    differing = [rank for rank, (count, _) in reports.items() if count]
    return (
        f"the processes of this run differ, rank {_numbers(differing)} from rank 0:\n"
        + "\n".join(shown[:SHOWN]) + more
        + "\nstart all of them with the same files, settings and data"
    )  # fmt: skip


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _numbers(ranks):
    return ", ".join(str(rank) for rank in sorted(ranks))


def check_processes(facts, timeout_s=600.0, store=None, rank=None, world=None):
    """Compares `facts` (see `process_facts`) of all ranks with rank 0's; every rank gets the same answer.

    Every rank calls it equally often. Rank 0 gathers what differs, so that each rank reads two values.

    Raises:
        ProcessMismatchError: on every rank, for facts that differ, or ranks that did not come within `timeout_s`.
    """
    if store is None:
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        store, rank, world = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    store = dist.PrefixStore(f"process_checks/{next(_calls)}", store)
    if rank == 0:
        store.set("facts", json.dumps(facts))
        message, present = _gather(store, world, timeout_s)
        store.set("verdict", message or "")
        if message:
            _await(store, [f"read {other}" for other in present], LAST_WORDS_S)
    else:
        _require(store, "facts", timeout_s, "rank 0 did not come to the start of the run")
        found = differences(facts, json.loads(store.get("facts")))
        store.set(f"report {rank}", json.dumps((len(found), found[:SHOWN])))
        _require(store, "verdict", timeout_s + LAST_WORDS_S, "rank 0 was lost while it compared the processes")
        message = store.get("verdict").decode()
        store.set(f"read {rank}", "")
    if message:
        raise ProcessMismatchError(message)


def _gather(store, world, timeout_s):
    """(message or None, ranks that came) after waiting for the reports of all."""
    keys = {f"report {rank}": rank for rank in range(1, world)}
    absent = _await(store, list(keys), timeout_s)
    present = [rank for key, rank in keys.items() if key not in absent]
    if absent:
        message = (
            f"rank {_numbers(keys[key] for key in absent)} of {world} did not come to the start of the run within "
            f"{timeout_s:g} s: look at its own output, or raise collective_timeout_s if it is still preparing data"
        )
        return message, present
    return _verdict({rank: tuple(json.loads(store.get(key))) for key, rank in keys.items()}), present


def _await(store, keys, timeout_s):
    """Waits until all `keys` are set; returns those that are not when the time is over."""
    until, left = time.monotonic() + timeout_s, list(keys)
    while left:
        left = [key for key in left if not store.check([key])]
        if time.monotonic() >= until:
            break
        if left:
            time.sleep(0.02)
    return left


def _require(store, key, timeout_s, what):
    try:
        absent = _await(store, [key], timeout_s)
    except RuntimeError as error:  # the store went with its process
        raise ProcessMismatchError(f"{what}: {str(error).splitlines()[0]}") from error
    if absent:
        raise ProcessMismatchError(f"{what} within {timeout_s:g} s: look at its own output")


# ---------------------------------------------------------------- batches


def same_batches(batches, timeout_s=600.0, group=None):
    """Yields the batches while every rank has one; for data whose length is not known before.

    A rank without a further batch while others have one is an error on all of them, before the step in which the
    others would wait for it. One gather of a flag a batch, over gloo on the CPU: no wait for the device.
    Every rank starts it together. `group`: a group of gloo's; made here where there is none.

    Raises:
        ProcessMismatchError: naming the ranks that ended.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        yield from batches
        return
    group = group or dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    flags = [torch.zeros(1, dtype=torch.int32) for _ in range(dist.get_world_size(group))]
    iterator, end = iter(batches), object()
    for number in itertools.count(1):
        batch = next(iterator, end)
        dist.all_gather(flags, torch.tensor([int(batch is not end)], dtype=torch.int32), group=group)
        ended = [rank for rank, flag in enumerate(flags) if not flag]
        if len(ended) == len(flags):
            return
        if ended:
            raise ProcessMismatchError(
                f"batch {number}: rank {_numbers(ended)} has no further batch, the other ranks have. Give each rank "
                "the same number of rows (dataloader_drop_last=true, max_steps), or shards of equal length"
            )
        yield batch
