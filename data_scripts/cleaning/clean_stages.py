"""Running stages of tasks by datatrove's executors: resumed by task, made again where settings or input changed.

A stage is a pipeline and a number of tasks. Its folder holds what it made, `stage.json` (written last) with the
fingerprint of settings and input, and in `logs/<stage>/` datatrove's logs and one completion marker a task.
"""

import contextlib
import ctypes
import errno
import logging
import resource
import shutil
import signal
import threading
import time
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import multiprocess
from datatrove.executor.local import LocalPipelineExecutor
from tqdm import tqdm

from data_scripts.cleaning.clean_blocks import read_json, write_json
from data_scripts.packing.packed_writer import _disk_is_full

logger = logging.getLogger(__name__)

# Loaded once by the process that the workers of all stages are forked from.
PRELOADED = ["data_scripts.cleaning.clean_blocks", "data_scripts.cleaning.filter_steps",
             "data_scripts.cleaning.near_duplicates", "data_scripts.cleaning.removal_report"]


@dataclass
class Stage:
    """One pass over the tasks.

    Attributes:
        folder: what the stage makes lies below it; removed when the fingerprint changes (unless `keeps` says which
            tasks still hold: a function from the stage to the ranks that need not run again).
        fingerprint: of everything that decides the stage's bytes.
    """

    name: str
    pipeline: list
    tasks: int
    folder: Path
    fingerprint: str
    keeps: object = None
    seconds: float = field(default=0.0, init=False)


class QuietExecutor(LocalPipelineExecutor):
    """datatrove's local executor, whose console messages go to the stage's log folder."""

    def run(self):
        """One after another in this process where one worker is asked for; datatrove starts a manager process first."""
        if self.workers > 1:
            return super().run()
        pipeline = self.pipeline
        for rank in self.get_incomplete_ranks():
            self.pipeline = deepcopy(pipeline)
            self._launch_run_for_rank(rank, None)

    def _launch_run_for_rank(self, rank, ranks_q, completed=None, completed_lock=None):
        from loguru import logger as noisy

        _die_with_parent()
        logs = Path(self.logging_dir.path)
        for name in ("console", "memory"):
            (logs / name).mkdir(parents=True, exist_ok=True)
        with open(logs / "console" / f"{rank:05d}.txt", "w") as sink, contextlib.redirect_stderr(sink):
            try:
                return self._run_for_rank(rank, 1)
            finally:
                noisy.remove()
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                (logs / "memory" / f"{rank:05d}").write_text(str(peak))


def _die_with_parent():
    """In a worker: end when the run is killed, so that no worker still writes when it is started again."""
    if multiprocess.parent_process() is not None:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def peak_bytes(logs, stage):
    """The largest resident size of a process that ran tasks of the stage, as far as it is known."""
    folder = Path(logs) / stage / "memory"
    return max((int(path.read_text() or 0) for path in folder.iterdir()), default=0) if folder.is_dir() else 0


@contextlib.contextmanager
def _progress(stage, logs, shown):
    """A bar that counts the completion markers of the stage's tasks."""
    done = threading.Event()
    bar = tqdm(total=stage.tasks, desc=stage.name, unit=" files", disable=not shown, mininterval=0)

    def count():
        markers = logs / "completions"
        found = len(list(markers.iterdir())) if markers.is_dir() else 0
        if found != bar.n:
            bar.update(found - bar.n)

    def watch():
        while not done.wait(0.5):
            count()

    thread = threading.Thread(target=watch, daemon=True)
    if shown:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if shown:
            thread.join()
            count()
        bar.close()


def prepare(stage, logs):
    """Remove what another fingerprint left; say so. True if the stage is finished as it is."""
    marker = stage.folder / "stage.json"
    known = read_json(marker) if marker.exists() else {}
    if known.get("fingerprint") == stage.fingerprint:
        if known.get("finished"):
            stage.seconds = known["seconds"]
            return True
        return False
    if known:
        logger.info("stage %s: settings or input changed, so it is made again", stage.name)
    shutil.rmtree(logs, ignore_errors=True)
    keep = stage.keeps(stage) if stage.keeps and known else ()
    if not stage.keeps:
        shutil.rmtree(stage.folder, ignore_errors=True)
    write_json(marker, {"fingerprint": stage.fingerprint, "finished": False})
    (logs / "completions").mkdir(parents=True, exist_ok=True)
    for rank in keep:
        (logs / "completions" / f"{rank:05d}").touch()
    if keep:
        logger.info("stage %s: %d of %d files are as before and are not made again", stage.name, len(keep), stage.tasks)
    return False


def run_stage(stage, logs, workers=1, progress=True):
    """Run one stage here; finished tasks are not run again.

    Raises:
        OSError: a full disk, with what to free; a later run goes on from there.
    """
    logs = Path(logs) / stage.name
    if prepare(stage, logs):
        logger.info("stage %s is finished: nothing to do", stage.name)
        return
    from loguru import logger as noisy

    noisy.remove()
    multiprocess.get_context("forkserver").set_forkserver_preload(PRELOADED)
    start = time.perf_counter()
    executor = QuietExecutor(stage.pipeline, tasks=stage.tasks, workers=min(workers, stage.tasks),
                             logging_dir=str(logs))
    try:
        with _progress(stage, logs, progress):
            executor.run()
    except Exception as error:
        if not _disk_is_full(error):
            raise
        free = shutil.disk_usage(stage.folder).free
        raise OSError(errno.ENOSPC, f"the disk is full in stage {stage.name}: {free:,} bytes are free below "
                      f"{stage.folder.parent}. Free space there (a corpus takes about as much as its raw folders, "
                      "twice while it is made), and run the same command again: it goes on from here") from error
    stage.seconds = round(time.perf_counter() - start, 2)
    write_json(stage.folder / "stage.json", {"fingerprint": stage.fingerprint, "finished": True,
                                             "seconds": stage.seconds})


def slurm_executors(stages, logs, workers, partition, hours, memory_gb=2, environment=None):
    """datatrove's Slurm executors of the same pipelines, each depending on the one before. *Not run* by us.

    The folders must lie on a file system that all machines share.
    """
    from datatrove.executor.slurm import SlurmPipelineExecutor

    made, before = [], None
    for stage in stages:
        before = SlurmPipelineExecutor(
            stage.pipeline, tasks=stage.tasks, workers=min(workers, stage.tasks), time=f"{hours}:00:00",
            partition=partition, mem_per_cpu_gb=memory_gb, job_name=f"clean_{stage.name}", depends=before,
            env_command=environment, logging_dir=str(Path(logs) / stage.name),
            slurm_logs_folder=str(Path(logs) / stage.name / "slurm"), mail_type="NONE")
        made.append(before)
    return made


def ray_executors(stages, logs, workers):
    """datatrove's Ray executors of the same pipelines, to be run one after another. *Not run* by us."""
    try:
        from datatrove.executor.ray import RayPipelineExecutor
    except ImportError as error:
        raise ValueError(f"executor='ray' needs Ray ({error}): pip install ray, or choose local or slurm") from error
    return [RayPipelineExecutor(stage.pipeline, tasks=stage.tasks, workers=min(workers, stage.tasks),
                                logging_dir=str(Path(logs) / stage.name)) for stage in stages]

