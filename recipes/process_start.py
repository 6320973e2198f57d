"""What a run on several processes has around its training: the same start on all ranks, and a watch for hangs."""

import contextlib

from recipes.process_checks import check_processes, process_facts
from recipes.process_watch import ProcessWatch, WatchCallback


@contextlib.contextmanager
def watched(trainer, data=None):
    """Around `trainer.train()`. On one process nothing happens.

    data: a dict of plain values that all ranks must have in common, such as a checksum of the training data.
    Raises:
        ProcessMismatchError: on every rank, if ranks start with different settings, code, data or models.
        ConnectionError: naming the ranks, if a collective fails because one is gone.
    """
    args = trainer.args
    if args.world_size == 1:
        yield
        return
    if args.check_processes:
        model = trainer.accelerator.unwrap_model(trainer.model)
        check_processes(process_facts(args, model, data), args.collective_timeout_s)
    with ProcessWatch(args.collective_timeout_s, args.dead_rank_s) as watch:
        trainer.add_callback(WatchCallback(watch))
        yield
