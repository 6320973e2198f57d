"""Run a program that a model wrote: in a process of its own, with limits, away from files and network.

    result = run_python(answer, checks="assert add(2, 3) == 5")
    result.passed            # only if the program loaded and every check ran to its end

What holds it (`sandbox_isolation()` says which column applies on this machine):

| what           | with namespaces (Linux, root or a user who may create them)  | without: "audit hook"                |
|----------------|--------------------------------------------------------------|--------------------------------------|
| time           | wall clock and CPU seconds, then the whole group is killed   | the same                             |
| memory         | address space, for each process                              | the same                             |
| output         | read up to a cap, then the program is killed                 | the same                             |
| network        | an empty network namespace: no interface, not even loopback  | Python refuses to make sockets       |
| writing files  | every mount read-only but a small file system in memory      | Python refuses outside of its folder |
| processes      | at most `processes`, in a namespace: all end with it         | Python refuses to start any          |
| user           | no capabilities; under root a user of its own                | the same where it can read Python    |

Not enforced: reading files that the user may read (under root: that everyone may read); in the right
column a program that brings machine code gets round Python's refusals; memory is limited for each
process, so `processes` times as much can be used; sockets that lie in the file system can be opened by
whoever may write to them; a program made to deceive can look for the checks in its own process while
they run. Windows and macOS are not supported.
"""

import json
import logging
import os
import secrets
import select
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

CHILD = Path(__file__).with_name("sandbox_child.py")
ISOLATIONS = ("namespace", "audit hook")
LOG = logging.getLogger(__name__)
START_SECONDS = 30  # until the program begins: a loaded machine is no fault of the program
KILL_SECONDS = 5


class SandboxUnavailable(RuntimeError):
    """The sandbox itself could not be set up; says nothing about the program."""


@dataclass(frozen=True)
class Limits:
    """What one program may use. `seconds` counts from its first instruction."""

    seconds: float = 5.0
    memory_bytes: int = 512 << 20
    output_bytes: int = 64 << 10
    file_bytes: int = 8 << 20
    disk_bytes: int = 32 << 20
    processes: int = 8


@dataclass(frozen=True)
class SandboxResult:
    """`status`: passed, failed (an exception or a failed check), invalid (the text is no Python), crashed
    (killed or left early), timeout, or output (more than the cap). Output is cut at the cap."""

    status: str
    stdout: str = ""
    stderr: str = ""
    error: str | None = None
    seconds: float = 0.0
    isolation: dict = field(default_factory=dict)

    @property
    def passed(self):
        return self.status == "passed"


def _message(content):
    data = json.dumps(content).encode("utf-8", "surrogatepass")
    return struct.pack(">Q", len(data)) + data


def _start(folder, report):
    # -I -S: no site packages, no user site, no environment variables, nothing from the current folder.
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(CHILD), folder, str(report)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, pass_fds=(report,), start_new_session=True, cwd="/",
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"})


def _kill(process):
    """Asks the launcher to end everything and waits for it, then kills what its group may still hold."""
    ended = os.pidfd_open(process.pid)  # the number stays ours until wait()
    try:
        os.kill(process.pid, signal.SIGTERM)
        select.select([ended], [], [], KILL_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(ended)
        process.wait()


class _Conversation:
    """Feeds the child and collects what it writes until it ends, takes too long or writes too much."""

    def __init__(self, process, report, outgoing, limits):
        self.process, self.report, self.outgoing, self.limits = process, report, outgoing, limits
        self.read = {process.stdout: bytearray(), process.stderr: bytearray(), report: bytearray()}
        self.began = None

    def run(self):
        """The reason for stopping: None (it ended), "timeout" or "output"."""
        with selectors.DefaultSelector() as selector:
            for stream in self.read:
                selector.register(stream, selectors.EVENT_READ)
            os.set_blocking(self.process.stdin.fileno(), False)
            selector.register(self.process.stdin, selectors.EVENT_WRITE)
            deadline = time.monotonic() + START_SECONDS
            while selector.get_map():
                left = deadline - time.monotonic()
                if left <= 0:
                    return "timeout"
                for key, _ in selector.select(left):
                    if key.fileobj is self.process.stdin:
                        self._write(selector)
                    elif self._take(selector, key.fileobj):
                        return "output"
                if self.began is None and b"\n" in self.read[self.report]:
                    self.began = time.monotonic()
                    deadline = self.began + self.limits.seconds
        return None

    def _write(self, selector):
        stream = self.process.stdin
        try:
            self.outgoing = self.outgoing[os.write(stream.fileno(), self.outgoing[:1 << 16]):]
        except BrokenPipeError:
            self.outgoing = b""
        if not self.outgoing:
            selector.unregister(stream)
            stream.close()

    def _take(self, selector, stream):
        piece = os.read(stream if isinstance(stream, int) else stream.fileno(), 1 << 16)
        if not piece:
            selector.unregister(stream)
        self.read[stream] += piece
        return len(self.read[stream]) > self.limits.output_bytes


def _reported(data):
    """The report lines that are objects; the program can reach that pipe, so nothing in it is trusted."""
    content = {}
    for line in bytes(data).splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            content = {**entry, **content} if content else entry
    return content


def run_python(source, checks="", limits=None, isolation="namespace"):
    """Run `source`, then `checks` in the same namespace, inside the sandbox. Never raises for the program's sake.

    Args:
        source: the program, untrusted text.
        checks: statements run after it, usually assertions; they reach the process only then.
        limits: a `Limits`.
        isolation: "namespace" (where not permitted: the audit hook, said once) or "audit hook".
    Raises:
        SandboxUnavailable: if no program can be run here at all.
    """
    if isolation not in ISOLATIONS:
        raise ValueError(f"isolation={isolation!r} must be one of {', '.join(map(repr, ISOLATIONS))}")
    limits = limits or Limits()
    if isolation == "namespace":
        try:
            result = _run(source, checks, limits, isolation)
            if result.isolation.get("files") != "namespace":
                _say_fallback("not permitted")
            return result
        except SandboxUnavailable as error:
            _say_fallback(str(error))
    return _run(source, checks, limits, "audit hook")


@cache
def _say_fallback(reason):
    LOG.warning("sandbox without namespaces, by Python's audit hook (weaker, see recipes/sandbox.py): %s", reason)


def _run(source, checks, limits, isolation):
    word = secrets.token_hex(16)
    first = {"source": source, "isolation": isolation, "limits": vars(limits)}
    outgoing = _message(first) + _message({"source": checks, "word": word})
    folder = tempfile.mkdtemp(prefix="sandbox-")
    os.chmod(folder, 0o755)
    report, child_end = os.pipe()
    try:
        try:
            process = _start(folder, child_end)
        finally:
            os.close(child_end)
        talk = _Conversation(process, report, outgoing, limits)
        try:
            stopped = talk.run()
        finally:
            _kill(process)
            for stream in (process.stdin, process.stdout, process.stderr):
                stream.close()
        return _result(talk, stopped, word, process.returncode)
    finally:
        os.close(report)
        shutil.rmtree(folder, ignore_errors=True)


def _result(talk, stopped, word, code):
    stdout, stderr, report = (bytes(part) for part in talk.read.values())
    cap = talk.limits.output_bytes
    texts = [part[:cap].decode("utf-8", "replace") for part in (stdout, stderr)]
    said = _reported(report)
    if talk.began is None:
        raise SandboxUnavailable(f"the sandbox did not start (exit code {code}): {texts[1].strip()[-500:]}")
    words = [line for line in report.splitlines() if word.encode() in line]
    raised = "failed" if said.get("compiled", True) else "invalid"
    status = stopped or ("passed" if words else raised if "error" in said else "crashed")
    return SandboxResult(status, *texts, error=said.get("error") if status == raised else None,
                         seconds=time.monotonic() - talk.began, isolation=said.get("isolation", {}))


def sandbox_isolation():
    """What holds programs on this machine: {"network": ..., "processes": ..., "files": ..., "user": ...}."""
    return run_python("").isolation
