"""When the fused training kernels run instead of plain torch, and the switch that turns them off.

On CUDA the layers call hand-written Triton kernels for what stands between the matrix products; nothing has to be
compiled but these, so that the first step comes within seconds. Under `torch.compile` and export the plain path runs,
which the compiler fuses itself. On a CPU in fp32 the functions of `training_cpu` take their place. For comparison,
`set_fused_kernels(False)`, or DEEPSEEK_R1_FUSED=0 in the environment, turns off both, and plain torch runs everywhere;
`set_fused_kernels(True)` also runs the kernels in Triton's interpreter, on a CPU. `set_second_stream(True)` lets the
shared experts run beside the routed ones. `set_expert_products(False)`, or DEEPSEEK_R1_EXPERT_PRODUCTS=0, takes torch's
grouped products for the routed experts on Hopper too, where our own are the default.
"""

import contextlib
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
_expert_products = {"0": False, "1": True}.get(os.environ.get("DEEPSEEK_R1_EXPERT_PRODUCTS"))
_second_stream, _streams = False, {}  # {device: its second stream}


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


def set_expert_products(enabled):
    """Chooses our own grouped products for the training step of the routed experts (`kernels_expert_products`), which
    apply SwiGLU themselves, or torch's. Returns what was set before: None by default, which is True but in the
    interpreter. Ours serve bf16 on Hopper, elsewhere torch's run; the same numbers but for the order of sums."""
    global _expert_products
    before, _expert_products = _expert_products, enabled
    return before


def expert_products_chosen(device):
    return device.type == "cuda" if _expert_products is None else _expert_products


def set_second_stream(enabled):
    """Lets the shared experts' kernels run on a second CUDA stream, beside the routed experts'. Returns what was set
    before: False by default. The same numbers either way; elsewhere than on CUDA it does nothing."""
    global _second_stream
    before, _second_stream = _second_stream, enabled
    return before


def _stream_of(device):
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


@contextlib.contextmanager
def beside(tensor):
    """What is launched inside runs on the second stream of the tensor's device, if that is switched on, after all that
    was launched before and beside what will be until `join`.

    Nothing that is used inside, or was made inside, may be let go of between the block and `join`. Then memory is safe
    without `record_stream`: what is made inside comes from the second stream's own pool, and returns to it for a later
    block, which waits for all that was launched before it.
    """
    if not (_second_stream and tensor.is_cuda):
        yield
        return
    stream = _stream_of(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        yield


def join(tensor):
    """The current stream waits for what ran `beside` it on the tensor's device."""
    if _second_stream and tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).wait_stream(_stream_of(tensor.device))
