"""When a module's weight may be read without calling the module, and what to read when it may not."""

import torch
from torch import nn

from .compute_copies import has_copy, in_dtype

# Forward hooks that change nothing in generation: the library's recording of hidden states, which stays installed
# after its first use, and the one by which gradients reach adapters through a frozen embedding.
HARMLESS_HOOKS = ("output_capturing_hook", "make_inputs_require_grad")


def is_intercepted(module, trained=True):
    """Whether something stands between a caller and the module's class: hooks, or a `forward` of the instance's own
    (how accelerate offloads, and how kernels are swapped in); `trained`: hooks on the backward pass count too."""
    hooks = [hook for hook in module._forward_hooks.values()
             if not getattr(hook, "__name__", "").startswith(HARMLESS_HOOKS)]
    backward = trained and (module._backward_hooks or module._backward_pre_hooks)
    return bool(hooks or module._forward_pre_hooks or backward or "forward" in vars(module))


def is_bare(module):
    """Whether calling a module does just what its class says, with its own parameters."""
    return not (is_intercepted(module) or "parametrizations" in module._modules)


def is_plain(module):
    """Whether a module is exactly a bias-free linear layer that nothing wraps, hooks into or shards."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and type(module.weight.data) is torch.Tensor
        and module.bias is None
        and is_bare(module)
    )


def project(linear, rows):
    """linear(rows); in a training step under autocast with the copy of its weight that an optimizer keeps, if it does,
    where autocast would cast the weight."""
    device = rows.device.type
    if (
        has_copy(getattr(linear, "weight", None))
        and torch.is_autocast_enabled(device)
        and torch.is_grad_enabled()
        and is_plain(linear)
    ):
        return nn.functional.linear(rows, in_dtype(linear.weight, torch.get_autocast_dtype(device)))
    return linear(rows)


def effective_weight(linear, in_features, dtype, device):
    """(out, in_features) matrix of a bias-free linear map, with whatever an adapter or a quantised layer makes of it.

    `dtype`: of the inputs that the layer is asked with, where its weights do not say."""
    if is_plain(linear):
        return linear.weight
    weight = getattr(linear, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.element_size() > 1:
        dtype = weight.dtype
    return linear(torch.eye(in_features, dtype=dtype, device=device)).t()
