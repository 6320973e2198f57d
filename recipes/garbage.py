"""Python's garbage collection at chosen steps of a run, the same on all processes.

Left to itself it begins wherever enough objects have been made, elsewhere on each process, and all wait for the one
that collects: under DDP on two GPUs 4.5 % of a step on the slowest host, nothing that showed with split experts
(benchmarks/LOG.md). What forks meanwhile, such as a data loader's worker, collects as usual.
"""

import contextlib
import gc
import os

FULL = 20  # of so many collections one also goes through what has lived long
_held = False


def _collect_as_usual():
    if _held:
        gc.enable()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_collect_as_usual)


@contextlib.contextmanager
def collecting_at_steps(enabled=True):
    """Inside, garbage is collected by `collect_at_step` only; as it was afterwards. Nothing where it was off before."""
    global _held
    if not enabled or not gc.isenabled():
        yield
        return
    gc.disable()
    _held = True
    try:
        yield
    finally:
        _held = False
        gc.enable()


def collect_at_step(step, every):
    """Collects young objects at every `every`-th step, all at every `every` * FULL-th, inside `collecting_at_steps`."""
    if _held and every and step % every == 0:
        gc.collect(2 if step % (every * FULL) == 0 else 1)
