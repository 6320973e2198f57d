"""What an optimizer does for the bf16 copies of the fp32 weights that it updates (modeling_deepseek_r1.compute_copies).

In a step `take` hands out the copies that are true of the weights before it, to be written with the weights after it;
`finish` says that they were. A copy that is not true, or not there, is left to the next forward pass.

What autograd does not count (`weight.data.mul_()`) leaves a copy behind unnoticed, so the kernel compares: one block in
`kernels_adamw.CHECKED`, other ones in each step. Its flag is read without waiting for the device, a step or two later.
"""

import torch

from modeling_deepseek_r1.compute_copies import keep_copies


class WeightCopies:
    """The copies of `weights`; resident=False: none between steps, but gradients in bf16 all the same.

    Raises:
        ValueError: with several processes, whose gradients are averaged in buckets of the weights' dtype.
    """

    def __init__(self, weights, resident=True):
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if torch.distributed.get_world_size() > 1:
                raise ValueError(
                    f"compute_copies is for one process, this group has {torch.distributed.get_world_size()}, which "
                    "average gradients in buckets of the weights' dtype; set compute_copies=false"
                )
        self.kept = {each.weight: each for each in keep_copies(weights, resident)}
        self.taken = []
        self.flags = {}  # {device: (flag there, its twin on the host)}

    def begin(self):
        """Raises RuntimeError once a flag has come home."""
        self.taken = []
        if any(int(host) for _, host in self.flags.values()):
            raise RuntimeError(
                "compute_copies: weights were changed in a way that autograd does not count, such as "
                "weight.data.mul_(), so a training step ran on bf16 copies of what they were; change them under "
                "torch.no_grad() without .data, or set compute_copies=false"
            )

    def take(self, weight):
        """The copy to write beside the weight's update, or None."""
        kept = self.kept.get(weight)
        copy = None if kept is None else kept.current()
        if copy is not None:
            self.taken.append(kept)
        return copy

    def flag(self, device):
        """(1,) int32 for the kernel to set where a copy was not its weight's."""
        if device not in self.flags:
            host = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
            self.flags[device] = torch.zeros(1, dtype=torch.int32, device=device), host
        return self.flags[device][0]

    def finish(self):
        """The step is over, all copies taken are written."""
        for kept in self.taken:
            kept.is_made()
        for flag, host in self.flags.values():
            host.copy_(flag, non_blocking=True)
