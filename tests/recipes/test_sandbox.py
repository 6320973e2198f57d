"""Programs that loop, fork, write files, print gigabytes or reach for the network are contained and count as failed."""

import os
import socket
import time
from pathlib import Path

import pytest

from recipes.sandbox import Limits, run_python, sandbox_isolation

SHORT = Limits(seconds=1.0)
ISOLATIONS = ("namespace", "audit hook")


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_right_and_wrong_programs(isolation):
    source = "import math, random, json, re, collections\ndef double(x):\n    return 2 * x\nprint('loaded')"
    right = run_python(source, "assert double(4) == 8", isolation=isolation)
    assert right.passed and right.stdout == "loaded\n" and right.error is None
    wrong = run_python(source, "assert double(4) == 9", isolation=isolation)
    assert wrong.status == "failed" and wrong.error == "AssertionError" and "double(4)" not in wrong.stdout


@pytest.mark.parametrize("source, status", [
    ("def f(:", "invalid"), ("\0", "invalid"), ("\ud800", "invalid"), ("raise MemoryError", "failed"),
    ("-" * 20_000 + "1", None), ("1" + "+1" * 9_000, None), ("lambda:" * 2_000 + "1", None), ("x[" * 150, "invalid"),
    ("import sys; sys.exit(0)", "failed"),                       # leaving before the checks is no success
    ("import os; os._exit(0)", "crashed"),
    ("import os; os.kill(os.getpid(), 9)", "crashed"),
    ("import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()", None),
    ("import os\nfor d in range(3, 60):\n    try: os.write(d, b'{\"word\": \"guess\"}\\n')\n    except OSError: pass\n"
     "os._exit(0)", "crashed"),                                  # the report pipe alone proves nothing
])
def test_programs_that_break_or_leave_early(source, status):
    result = run_python(source, "assert True", SHORT)
    assert status in (None, result.status) and (status is None or not result.passed)


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize("source", ["while True: pass", "import time; time.sleep(60)",
                                    "import signal, time\nfor s in (1, 2, 15, 24): signal.signal(s, lambda *_: 0)\n"
                                    "while True: time.sleep(9)"])
def test_endless_programs_end(source, isolation):
    start = time.monotonic()
    result = run_python(source, limits=Limits(seconds=0.3), isolation=isolation)
    assert result.status == "timeout" and time.monotonic() - start < 5


def test_gigabytes_of_output_are_cut():
    result = run_python("while True: print('y' * 100_000)", limits=SHORT)
    assert result.status == "output" and len(result.stdout) == SHORT.output_bytes
    result = run_python("import sys\nsys.stderr.write('y' * 10**8)", limits=SHORT)
    assert result.status == "output" and len(result.stderr) == SHORT.output_bytes


def test_memory_is_limited():
    assert run_python("x = bytearray(2 << 30)", limits=SHORT).error == "MemoryError"
    assert not run_python("x = []\nwhile True: x.append('y' * 10**6 + str(len(x)))", limits=Limits(seconds=3)).passed


def _processes_of(marker):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if marker in (entry / "comm").read_text():
                    found.append(int(entry.name))
            except OSError:
                pass
    return found


def test_fork_bomb_is_contained():
    name = f"bomb{os.getpid()}"
    source = (f"import ctypes, os\nctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)\n"  # PR_SET_NAME
              "while True:\n    try:\n        os.fork(); os.setsid()\n    except OSError: pass")
    result = run_python(source, limits=SHORT)
    assert not result.passed and not _processes_of(name)
    counting = ("import os, time\nmade = 0\ntry:\n    while True:\n        if os.fork() == 0: time.sleep(9)\n"
                "        made += 1\nexcept OSError: print(made)")
    if sandbox_isolation()["processes"] == "namespace":
        assert 0 < int(run_python(counting, limits=SHORT).stdout) <= SHORT.processes
    assert not run_python("import os; os.fork()", limits=SHORT, isolation="audit hook").passed


def test_a_daemon_does_not_outlive_its_program():
    if sandbox_isolation()["processes"] != "namespace":
        pytest.skip("no process namespaces here: starting a process is refused instead")
    name = f"daemon{os.getpid()}"
    source = (f"import ctypes, os, time\nif os.fork() == 0:\n    os.setsid()\n    "
              f"ctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)\n    os.close(1); os.close(2)\n    time.sleep(60)\n"
              "time.sleep(0.2)")
    run_python(source, limits=SHORT)
    assert not _processes_of(name)


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_files_outside_stay_as_they_are(tmp_path, isolation):
    victim, new = tmp_path / "victim.txt", tmp_path / "new.txt"
    victim.write_text("before")
    tmp_path.chmod(0o777), victim.chmod(0o666)
    home = Path(__file__).parent / "written_by_sandbox.txt"
    attacks = [f"open({str(victim)!r}, 'w').write('after')", f"open({str(new)!r}, 'x')", f"open({str(home)!r}, 'w')",
               f"import os; os.remove({str(victim)!r})", f"import os; os.rename({str(victim)!r}, {str(new)!r})",
               f"import os; os.chmod({str(victim)!r}, 0)", f"import shutil; shutil.rmtree({str(tmp_path)!r})",
               f"import os; os.symlink({str(victim)!r}, 'link'); open('link', 'w').write('after')"]
    swallowed = "\n".join(f"try:\n    {a.replace('; ', chr(10) + '    ')}\nexcept Exception: print('refused')"
                          for a in attacks)
    result = run_python(swallowed, isolation=isolation)
    assert result.stdout.split() == ["refused"] * len(attacks)
    assert victim.read_text() == "before" and not new.exists() and not home.exists()
    inside = "open('mine.txt', 'w').write('x' * 1000)\nassert len(open('mine.txt').read()) == 1000"
    assert run_python(inside, isolation=isolation).passed


def test_disk_is_limited():
    source = "open('big', 'wb').write(b'x' * (16 << 20))"
    assert not run_python(source, limits=SHORT).passed
    many = "for i in range(20): open(str(i), 'wb').write(b'x' * (4 << 20))"
    if sandbox_isolation()["files"] == "namespace":
        assert not run_python(many, limits=SHORT).passed


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_no_network(isolation):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        source = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=2)"
        result = run_python(source, limits=Limits(seconds=3), isolation=isolation)
    assert result.status == "failed" and result.error in ("OSError", "PermissionError")


def test_environment_is_not_handed_over(monkeypatch):
    monkeypatch.setenv("MY_SECRET_TOKEN", "xyzzy")
    result = run_python("import os; print(dict(os.environ))")
    assert result.passed and "xyzzy" not in result.stdout


def test_rights_are_given_up():
    source = "import ctypes, os\nlibc = ctypes.CDLL(None)\nprint(os.getuid(), libc.setuid(0))"
    result = run_python(source)
    if sandbox_isolation()["files"] != "namespace":
        pytest.skip("no namespaces here")
    remount = ("import ctypes\nlibc = ctypes.CDLL(None)\n"
               "assert libc.mount(None, b'/', None, ctypes.c_ulong(32 | 4096), None) != 0")
    assert result.passed and run_python(remount).passed
    assert os.getuid() != 0 or result.stdout.split()[0] != "0"


def test_reports_what_holds_it():
    held = sandbox_isolation()
    assert set(held) == {"network", "processes", "files", "user"}
    assert run_python("", isolation="audit hook").isolation["network"] == "audit hook"
    with pytest.raises(ValueError, match="audit hook"):
        run_python("", isolation="none")
