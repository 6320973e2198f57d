"""The ways to launch a stage: one entry for each file of recipes/launch/, with what it shards and where it serves.

Names: a *layout* is how weights and batches are spread over devices; dp, the data-parallel degree, the number of
different micro-batches that are computed at a time.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path

import yaml

LAUNCH_FILES = Path(__file__).parent / "launch"
CPU, ONE, SEVERAL = "cpu", "one", "several"


@dataclass(frozen=True)
class Layout:
    """`sharded`: what lies spread over the devices (weights, gradients, optimizer). `gathers`: layers of weights when
    they are used; `keeps`: them until the backward. `group`: devices that share one
    micro-batch (0: all). `needs`: module and name in it without which the recipes cannot run the layout."""

    name: str
    summary: str
    devices: str = SEVERAL
    sharded: tuple = ()
    gathers: bool = False
    keeps: bool = False
    offloads: bool = False
    group: int = 1
    nodes: tuple = (1, 1)
    needs: tuple = ()
    deepspeed: bool = False
    always_checkpoints: bool = False

    @property
    def file(self):
        return LAUNCH_FILES / f"{self.name}.yaml"

    def data_parallel(self, devices):
        return devices // (self.group or devices)

    def missing(self):
        """"" or what the recipes lack to run it."""
        if not self.needs:
            return ""
        module, attribute, name = self.needs
        found = getattr(importlib.import_module(module), attribute)
        found = getattr(found, "__dataclass_fields__", found)
        return "" if name in found else f"the recipes cannot run it yet: {name} is not in {module}.{attribute}"

    def check(self, config, devices, nodes=1):
        """Raises ValueError where the layout does not suit that many devices or this model."""
        if devices < (1 if self.devices != SEVERAL else 2):
            raise ValueError(f"gpus={devices}: {self.name} spreads work over at least 2; use one_gpu")
        if self.devices == ONE and devices != 1:
            raise ValueError(f"gpus={devices}: {self.name} uses 1; use ddp or fsdp2, or --gpus 1")
        if not self.nodes[0] <= nodes <= (self.nodes[1] or nodes):
            other = "fsdp2" if nodes == 1 else "several_nodes"
            raise ValueError(f"nodes={nodes}: {self.name} is for {_span(self.nodes)}; use {other}")
        if self.name == "fsdp2_ep":
            check_divides("n_routed_experts", config.n_routed_experts, "gpus", devices)
        if self.name == "tensor_parallel":
            check_divides("num_attention_heads", config.num_attention_heads, "gpus", devices)
        if self.name == "context_parallel" and config.num_nextn_predict_layers and config.mtp_loss_coef:
            raise ValueError(f"mtp_loss_coef={config.mtp_loss_coef}: {self.name} cuts rows, and multi-token prediction "
                             "looks past the cuts; add --model_config.mtp_loss_coef 0")  # fmt: skip
        if self.group > 1 and devices % self.group:
            raise ValueError(f"gpus={devices} must be a multiple of {self.group} for {self.name}, whose devices share "
                             f"rows in groups of {self.group}; use {_near(devices, self.group)}")  # fmt: skip


def _span(nodes):
    return "one node" if nodes[1] == 1 else f"{nodes[0]} nodes or more"


def _near(number, step):
    below, above = number // step * step, -(-number // step) * step
    return " or ".join(str(each) for each in sorted({below, above}) if each)


def _divisors(number):
    return [each for each in range(1, number + 1) if number % each == 0]


def check_divides(name, total, by_name, parts):
    """ValueError unless `parts` divides `total`, with the nearest numbers that do."""
    if not total:
        raise ValueError(f"{name}={total}: this model has nothing to spread over {by_name}={parts}")
    if total % parts:
        fitting = _divisors(total)
        below = max((each for each in fitting if each < parts), default=None)
        above = min((each for each in fitting if each > parts), default=None)
        near = " or ".join(str(each) for each in (below, above) if each)
        raise ValueError(f"{by_name}={parts} does not divide {name}={total}; use {by_name}={near}")


def check_global_batch(rows, dp):
    """ValueError unless `dp` ranks can share `rows` rows a step equally."""
    if rows % dp:
        above = -(-rows // dp) * dp
        near = [each for each in (rows // dp * dp, above) if each]
        fitting = _divisors(rows)
        below = max(each for each in fitting if each < dp)
        after = min((each for each in fitting if each > dp), default=None)
        ranks = " or ".join(str(each) for each in (below, after) if each)
        raise ValueError(
            f"global_batch={rows} rows a step cannot be shared equally by {dp} data-parallel ranks; use "
            f"--global_batch {' or '.join(map(str, near))}, or {ranks} ranks"
        )


WHOLE = ("weights", "gradients", "optimizer")
# From the quickest to the most sparing; a plan takes the first that fits.
LAYOUTS = {layout.name: layout for layout in (
    Layout("cpu", "two processes on the CPU (gloo)", CPU),
    Layout("one_gpu", "one process, nothing shared", ONE),
    Layout("ddp", "every GPU holds all, gradients are averaged", nodes=(1, 0)),
    Layout("fsdp2_kept", "as fsdp2, but layers stay gathered until their backward", sharded=WHOLE, gathers=True, keeps=True),
    Layout("fsdp2", "weights, gradients and states sharded, layers gathered when used", sharded=WHOLE, gathers=True),
    Layout("several_nodes", "fsdp2 over all GPUs of several nodes", sharded=WHOLE, gathers=True, nodes=(2, 0)),
    Layout("fsdp2_ep", "as fsdp2, but experts stay where they are and tokens travel", sharded=WHOLE, gathers=True,
           needs=("recipes.pretrain_config", "PretrainConfig", "expert_parallel_size")),
    Layout("tensor_parallel", "every matrix cut, all GPUs compute the same rows", sharded=WHOLE, group=0,
           needs=("recipes.pretrain_config", "PretrainConfig", "tensor_parallel_size")),
    Layout("context_parallel", "as fsdp2, and each row cut over 2 GPUs", sharded=WHOLE, gathers=True, group=2,
           needs=("recipes.pretrain_trainer", "MODEL_INPUTS", "shift_labels")),
    Layout("zero2", "DeepSpeed: gradients and states sharded", sharded=("gradients", "optimizer"), deepspeed=True),
    Layout("zero3", "DeepSpeed: weights, gradients and states sharded", sharded=WHOLE, gathers=True, deepspeed=True),
    Layout("fsdp2_checkpointing", "fsdp2 with all states in host memory", sharded=WHOLE,
           gathers=True, offloads=True, always_checkpoints=True),
)}  # fmt: skip


def find_layout(name):
    """The layout of a launch file's name or path."""
    stem = Path(name).stem
    if stem not in LAYOUTS:
        raise ValueError(f"launch_file={name!r} must be one of {', '.join(LAYOUTS)}, the files of recipes/launch/")
    return LAYOUTS[stem]


def read_launch_file(path):
    """The settings of a launch file, checked by accelerate's own loader.

    Raises:
        ValueError: for a file that is missing or that `accelerate launch` would not take.
    """
    from accelerate.commands.config.config_args import load_config_from_file

    if not Path(path).is_file():
        raise ValueError(f"launch_file={str(path)!r}: no such file; those shipped are in recipes/launch/")
    try:
        return load_config_from_file(str(path))
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise ValueError(f"launch_file={str(path)!r} is not a file that accelerate launch takes: {error}") from error


def check_processes(path, gpus, nodes=1):
    """ValueError if the launch file starts more GPU processes than there are GPUs."""
    config = read_launch_file(path)
    if config.use_cpu:
        return config
    there = gpus * nodes
    if config.num_processes > there:
        way_out = f"add --num_processes {there}" if there else "use recipes/launch/cpu.yaml"
        raise ValueError(f"num_processes={config.num_processes} of {path}, but there are {there} GPUs; {way_out}")
    if config.num_machines > nodes:
        raise ValueError(f"num_machines={config.num_machines} of {path}, but nodes={nodes}; add --nodes "
                         f"{config.num_machines}, or take a launch file for one node")  # fmt: skip
    return config
