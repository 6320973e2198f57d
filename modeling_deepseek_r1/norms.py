"""Small layers used by every block: normalisation, regularisation, buffers that keep their precision."""

import torch
from torch import nn

from .fused import runs_fused
from .linear_weights import is_intercepted
from .training_blocks import fused_add_rms_norm, fused_rms_norm
from .training_cpu import RMSNormFunction, serves


class ExactBuffers(nn.Module):
    """A module whose fp32 buffers stay fp32 whatever the module is cast to.

    In bf16 a routing bias of 0.5 plus 0.001 is 0.5, and a rotary angle at position 4,000 is off by more than a radian.
    """

    def _apply(self, fn, recurse=True):
        exact = {name: value for name, value in self._buffers.items() if value.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            if self._buffers[name].dtype != torch.float32:
                self._buffers[name] = value.to(self._buffers[name].device)
        return self


class DeepSeekR1RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean taken in fp32. Source: arXiv:1910.07467, Eq. 4. Shapes: (..., D) -> (..., D).

    Under autocast the fused kernel returns the dtype in which the next matrix product computes.
    """

    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        if runs_fused(hidden_states, self.weight):
            return fused_rms_norm(hidden_states, self.weight, self.variance_epsilon, self.output_dtype(hidden_states))
        if serves(hidden_states, self.weight):
            return RMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon)
        # fp32 weights with bf16 activations (autocast): the fused kernels want one dtype, the wider is exact.
        hidden_states = hidden_states.to(torch.promote_types(hidden_states.dtype, self.weight.dtype))
        return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)

    def output_dtype(self, hidden_states):
        """Of the fused kernel's result."""
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return torch.promote_types(hidden_states.dtype, self.weight.dtype)

    def extra_repr(self):
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def add_and_norm(norm, residual, branch=None):
    """-> residual + branch, or residual, and `norm` of it, in one pass where the fused kernel serves, and in one pass
    backward if the residual stream goes on from here. Shapes: (..., D) all."""
    added = () if branch is None else (branch,)
    # Without gradients a norm alone has nothing to gain.
    fuses = (added or torch.is_grad_enabled()) and type(norm) is DeepSeekR1RMSNorm and not is_intercepted(norm)
    if fuses and runs_fused(residual, *added, norm.weight):
        return fused_add_rms_norm(residual, branch, norm.weight, norm.variance_epsilon, norm.output_dtype(residual))
    residual = residual if branch is None else residual + branch
    return residual, norm(residual)


class DropPath(nn.Module):
    """Skips a residual branch for whole sequences, with probability `rate`, in training only.

    The branch is divided by the probability of being kept, so that its expectation does not change.
    Source: Deep Networks with Stochastic Depth (arXiv:1603.09382), Sec. 3. Shapes: (B, S, D) -> (B, S, D).
    """

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, branch):
        if not self.training or self.rate == 0.0:
            return branch
        keep = 1.0 - self.rate
        kept = torch.rand(branch.shape[0], *(1,) * (branch.dim() - 1), device=branch.device) < keep
        return branch * (kept / keep).to(branch.dtype)

    def extra_repr(self):
        return f"rate={self.rate}"
