"""Which training rows make up each optimizer step: the same on any number of processes, also after a resume."""

import torch
from torch.utils.data import Sampler

PART = 1 << 16  # rows made Python ints at a time


def set_sampler_epoch(dataloader, epoch):
    """Tells every sampler below a dataloader the epoch; before batches of a resumed epoch are skipped.

    accelerate 1.15 does not reach the one below a process' share of the batches (`BatchSamplerShard`) when some are
    skipped: a run on several processes, resumed within its second epoch, would take the rest of the first one's order.
    """
    left, seen = [dataloader], set()
    while left:
        each = left.pop()
        for name in ("batch_sampler", "sampler"):
            inner = getattr(each, name, None)
            if inner is not None and id(inner) not in seen:
                seen.add(id(inner))
                left.append(inner)
                if hasattr(inner, "set_epoch"):
                    inner.set_epoch(epoch)


class RowOrder(Sampler):
    """Row indices of an epoch, cut to whole optimizer steps.

    Step t of an epoch is rows [t * B, (t + 1) * B) of this order, where B is the number of rows in an optimizer step
    over all processes and micro-batches. accelerate deals batch after batch out to the processes in turn, so that, with
    nothing left over at the end, each step has the same rows however B is split. Of an epoch's last, incomplete step
    the processes would make different things (fewer micro-batches, or rows of the epoch's beginning once more):
    it is left out, and the next epoch's shuffle brings its rows elsewhere.

    Memory: 8 bytes a row, 8 GB for a billion rows, in the process that reads; nothing where the order is the file's.

    Args:
        rows: number of rows; rows_per_step: B.
        seed: of the shuffle, with the epoch; None keeps the order of the file, as a curriculum needs.
    Raises:
        ValueError: fewer rows than one step takes.
    """

    def __init__(self, rows, rows_per_step, seed=None):
        if rows < rows_per_step:
            raise ValueError(f"{rows} training rows do not fill an optimizer step of {rows_per_step} rows "
                             "(per_device_train_batch_size * gradient_accumulation_steps * processes); lower one of "
                             "these or sequence_length, or add text")
        self.rows, self.seed, self.epoch = rows, seed, 0
        self._length = rows // rows_per_step * rows_per_step

    def set_epoch(self, epoch):
        """Called by the trainer before each epoch, also of a resumed run."""
        self.epoch = epoch

    def __len__(self):
        return self._length

    def __iter__(self):
        if self.seed is None:
            return iter(range(self._length))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.rows, generator=generator)[:self._length]
        return (row for part in order.split(PART) for row in part.tolist())  # a Python int takes another 40 bytes
