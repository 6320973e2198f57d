"""When the fused training kernels run instead of plain torch, and the switch that turns them off.

On CUDA the layers call hand-written Triton kernels for what stands between the matrix products; nothing has to be
compiled but these, so that the first step comes within seconds. Under `torch.compile` and export the plain path runs,
which the compiler fuses itself. On a CPU in fp32 the functions of `training_cpu` take their place. For comparison,
`set_fused_kernels(False)`, or DEEPSEEK_R1_FUSED=0 in the environment, turns off both, and plain torch runs everywhere;
`set_fused_kernels(True)` also runs the kernels in Triton's interpreter, on a CPU.
"""

import functools
import os

import torch

try:
    import triton
except ImportError:
    triton = None

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_enabled = None if os.environ.get("DEEPSEEK_R1_FUSED", "1") != "0" else False


def set_fused_kernels(enabled):
    """Turns the fused training kernels and CPU functions of this process on or off. Returns what was set before: None
    by default."""
    global _enabled
    before, _enabled = _enabled, enabled
    return before


def is_switched_on():
    """Whether training may run anything but plain torch."""
    return _enabled is not False


def kernels_run_on(device):
    """Whether Triton kernels run on tensors of `device`: on CUDA, or anywhere under Triton's interpreter."""
    return triton is not None and (device.type == "cuda" or bool(triton.knobs.runtime.interpret))


def on_its_device(launcher):
    """`launcher` with the device of its first argument, a tensor, as the current one: Triton launches kernels there,
    and a model may lie on several GPUs."""

    @functools.wraps(launcher)
    def launch(tensor, *args, **kwargs):
        with torch.cuda.device_of(tensor):
            return launcher(tensor, *args, **kwargs)

    return launch


def runs_fused(*tensors):
    """Whether the fused kernels serve these: float tensors of one process (no DTensor, no subclass) on CUDA."""
    if not is_switched_on() or not (tensors[0].is_cuda or (_enabled and kernels_run_on(tensors[0].device))):
        return False
    return (
        triton is not None
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and all(tensor.dtype in FLOATS and type(tensor) in _PLAIN for tensor in tensors)
    )
