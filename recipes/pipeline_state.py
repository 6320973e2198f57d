"""What a pipeline leaves on disk beside its stages' folders: pipeline.json, the lock, folders that are set aside.

`pipeline.json`: {"config", "stages": {name: {"state": running, failed or done, "settings", "inputs": {stage: version},
"version", "run", "seconds", "command", "outputs": {file: bytes}, "scores", "error"}}}. Older folders of a stage are
kept as `<name>.stale-<n>`; nothing is deleted.
"""

import contextlib
import json
import os
import socket
import time
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from recipes.checkpoint_files import list_checkpoints, write_atomically

STATE_FILE, LOCK_FILE = "pipeline.json", "pipeline.lock"
CHANGING = (".html", "metrics.jsonl", ".tmp")  # what may be written again after a stage is done


class PipelineFolder:
    """The `output_dir` of a pipeline. Raises ValueError for a pipeline.json that cannot be read."""

    def __init__(self, folder):
        self.path = Path(folder)
        self.content = {"stages": {}}
        if (self.path / STATE_FILE).is_file():
            try:
                self.content = json.loads((self.path / STATE_FILE).read_text(encoding="utf-8"))
                self.records.items()
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{self.path / STATE_FILE} cannot be read ({error}); put a copy back, or move it "
                                 "away: stages with complete folders are then made again") from error

    @property
    def records(self):
        return self.content["stages"]

    def record(self, name, **values):
        """Lays `values` over a stage's entry, on disk too."""
        self.records.setdefault(name, {}).update(values)
        write_atomically(self.path / STATE_FILE, json.dumps(self.content, indent=1, ensure_ascii=False))

    def outputs(self, name):
        """{file: bytes} of a stage's folder, without checkpoints and what is drawn again later."""
        folder = self.path / name
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(CHANGING)]
        names = {path.relative_to(folder).as_posix(): path for path in files}
        return {name: path.stat().st_size for name, path in names.items() if not name.startswith("checkpoint-")}

    def missing(self, name, record):
        """Files that were there when the stage was done and are not now, or have another size."""
        found = self.outputs(name)
        return [f"{name}/{file}" for file, size in record.get("outputs", {}).items() if found.get(file) != size]

    def has_checkpoints(self, name):
        return bool(list_checkpoints(self.path / name))

    def set_aside(self, name):
        """Renames a stage's folder to `<name>.stale-<n>`; returns the new path, or None where there is no folder."""
        folder = self.path / name
        if not folder.exists():
            return None
        number = 1
        while (old := self.path / f"{name}.stale-{number}").exists():
            number += 1
        folder.rename(old)
        return old

    def check_orphans(self):
        """ValueError where a command that an earlier pipeline started is still at work in here."""
        for name, record in self.records.items():
            pid, born = record.get("process") or (None, None)
            if record["state"] == "running" and pid and born and _born(pid) == born:
                raise ValueError(f"stage {name} is still running as process {pid}, left by a pipeline that ended; wait "
                                 f"for it or end it (kill {pid})")

    @contextlib.contextmanager
    def locked(self):
        """Keeps other pipelines out. The system frees the lock of a process that died.

        Raises:
            ValueError: another pipeline works in this folder; names its process and host.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock, about = FileLock(self.path / f".{LOCK_FILE}"), self.path / LOCK_FILE
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            owner = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
            raise ValueError(f"{self.path} is in use by process {owner.get('pid', '?')} on {owner.get('host', '?')}, "
                             f"since {owner.get('since', '?')}; wait for it, or take another --output_dir") from error
        try:
            if about.is_file():
                dead = json.loads(about.read_text(encoding="utf-8"))
                print(f"the pipeline of process {dead['pid']} on {dead['host']} ended without finishing; going on")
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            write_atomically(about, json.dumps(owner))
            yield self
        finally:
            about.unlink(missing_ok=True)
            lock.release()


def _born(pid):
    """When a process was started, seconds since the epoch, or None where there is none that lives."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else round(process.create_time(), 1)
    except psutil.NoSuchProcess:
        return None


def process_of(pid):
    """What tells a process apart from a later one with the same number: [pid, time of its start]."""
    return [pid, _born(pid)]
