"""Launching a kernel before the one in front of it has finished (programmatic dependent launch, Hopper and newer).

At batch 1 a decoding step is a chain of a hundred kernels of a few microseconds each, and much of that time is starting
up. With `ahead(device)` among its launch arguments a kernel starts while the one before it still runs, loads what does
not depend on it (weights), and only then calls `wait_for_inputs`. What holds after that call: everything launched
earlier on the stream has finished and is visible. What holds before it: the kernel before the previous one has
finished, because a kernel lets its successor start only after its own wait.
"""

from functools import lru_cache

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError as missing:
    raise ImportError("the decoding kernels need triton with programmatic dependent launch (3.5 or newer)") from missing


@triton.jit
def wait_for_inputs(AHEAD: tl.constexpr):
    """Call it in every program of a kernel launched with `ahead`, before the first access to what others write."""
    if AHEAD:
        gdc_wait()
        gdc_launch_dependents()


@lru_cache(maxsize=None)
def ahead(device):
    """Launch arguments, {"AHEAD": ...} and what goes with it, for kernels on `device`."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9:
        return {"AHEAD": True, "launch_pdl": True}
    return {"AHEAD": False}
