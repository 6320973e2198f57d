"""Writing a sharded checkpoint: all processes together, in the training thread or beside it; the marker last.

A save has two halves. `stage` copies what is to be written to the CPU; the rest (`ShardJob.run`) touches no tensor of
the training, so that a thread can do it while training goes on. Its processes talk over a group of their own, of gloo.
"""

import threading
from datetime import timedelta

import torch.distributed as dist

from recipes.checkpoint_files import describe_files, write_marker
from recipes.sharded_checkpoints import SHARDS, files_of_rank, write_pieces


class ShardJob:
    """What one process does of one save, after the small files are written.

    Args:
        folder: of the checkpoint, on a file system that all processes share.
        pieces: {name: Piece}, on the CPU where it runs beside training.
        weights: of `tensor_pieces.weight_sums`, for the marker.
        group: of gloo, or None for one process.
        afterwards: function without arguments, on rank 0, when the checkpoint is complete.
    """

    def __init__(self, folder, pieces, weights, group, afterwards):
        self.folder, self.pieces, self.weights = folder, pieces, weights
        self.group, self.afterwards = group, afterwards

    def run(self):
        """Writes the shards, then hashes on every rank what it wrote, then the marker on rank 0."""
        write_pieces(self.folder, self.pieces, self.group)
        self.pieces = None  # a copy of the model
        rank, world = (0, 1) if self.group is None else (dist.get_rank(), dist.get_world_size())
        described = describe_files(self.folder, files_of_rank(self.folder, rank))
        everyone = [described]
        if world > 1:
            everyone = [None] * world if rank == 0 else None
            dist.gather_object(described, everyone, group=self.group)
        if rank == 0:
            files = {name: facts for each in everyone for name, facts in each.items()}
            missing = [name for name in files if not (self.folder / name).is_file()]
            if missing:
                raise OSError(f"rank 0 does not see {missing[0]} of {self.folder / SHARDS}, which another rank wrote: "
                              "output_dir must lie on a file system that all nodes share")  # fmt: skip
            write_marker(self.folder, self.weights, described=files)
            self.afterwards()


class CheckpointWriter:
    """Runs one `ShardJob` at a time, here or in a thread; keeps its error until somebody asks."""

    def __init__(self, timeout_s=600):
        self.timeout_s, self._group = timeout_s, None
        self._thread, self._error, self.folder = None, None, None

    @property
    def group(self):
        """The processes' group of gloo; every process asks for it first at the same point. None for one process."""
        if self._group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout_s))
        return self._group

    def start(self, job, beside):
        """Runs `job`, in a thread if `beside`; the one before has been waited for. Errors: see `outcome`."""
        assert self._thread is None and self._error is None
        self.folder = job.folder
        if beside:
            self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint writer", daemon=True)
            self._thread.start()
        else:
            self._run(job)

    def _run(self, job):
        try:
            job.run()
        except BaseException as error:  # noqa: BLE001  raised where training waits for the checkpoint
            self._error = error

    def join(self):
        """Waits until nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def outcome(self):
        """(error of this process or None, all processes' errors as texts) of the last job, once; waits for it.

        Every process calls it: all of them learn of an error of one.
        """
        self.join()
        error, self._error = self._error, None
        own = None if error is None else f"{type(error).__name__}: {error}"
        texts = [own]
        if self.folder is not None and self.group is not None:
            texts = [None] * dist.get_world_size()
            dist.all_gather_object(texts, own, group=self.group)
        self.folder = None
        return error, list(dict.fromkeys(text for text in texts if text is not None))
