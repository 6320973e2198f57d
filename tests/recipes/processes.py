"""Ranks of a gloo group as forks of this process, which has imported everything: a start of them takes no time."""

import functools
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch

FSDP = {  # what `accelerate launch` sets for recipes/launch/fsdp2.yaml
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_OFFLOAD_PARAMS": "false", "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_SYNC_MODULE_STATES": "true",
}  # fmt: skip
ZERO = {  # for recipes/launch/zero2.yaml and zero3.yaml, on CPUs; ACCELERATE_DEEPSPEED_ZERO_STAGE is 2 or 3
    "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "DS_ACCELERATOR": "cpu",
}  # fmt: skip


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def fork(work, log, append=False):
    """The id of a child that does `work()` with its output in the file `log`. It ends with what that returns, 0 for
    nothing, or with 1 and a traceback."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with open(log, "a" if append else "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)  # threads do not survive a fork
        status = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _become(rank, world, port, environment, work):
    """What a child does."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in ranks.items()} | environment
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.cuda.is_available, torch.cuda.device_count = lambda: False, lambda: 0  # what CUDA has begun does not survive
    torch.manual_seed(100 + rank)  # what a rank drew before must not matter
    work(rank)


def start_ranks(world, work, folder, environment=None):
    """[process ids] of `world` forks that do `work(rank)`, each with `folder`/rank_<r>.log. One is no group."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    port, children = free_port(), []
    for rank in range(world):
        life = functools.partial(_become, rank, world, port, environment or {}, work)
        children.append(fork(life, Path(folder) / f"rank_{rank}.log"))
    return children


def wait_for(children, timeout_s=120):
    """The exit codes; what is left after `timeout_s` is killed."""
    codes, until = {}, time.monotonic() + timeout_s
    while len(codes) < len(children):
        for child in set(children) - set(codes):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            for child in set(children) - set(codes):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[child] for child in children]


def run_ranks(world, work, folder, environment=None, timeout_s=120):
    """`start_ranks`, waited for. Raises AssertionError with the logs unless all end with 0."""
    codes = wait_for(start_ranks(world, work, folder, environment), timeout_s)
    logs = "\n".join((Path(folder) / f"rank_{rank}.log").read_text()[-3000:] for rank in range(world))
    assert codes == [0] * world, f"exit codes {codes}\n{logs}"
