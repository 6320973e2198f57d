"""The inside of `recipes.sandbox`: started as a script in a process of its own, standard library only.

    launcher --(namespaces)--> init, process 1 of its namespace --(limits, user)--> worker, runs the program

Two messages arrive on standard input, each a length (8 bytes, big endian) and JSON. The first holds
the program and the limits. The second, the checks and a secret word, is read only after the program
has been loaded; the word on the report pipe says that every check ran to its end. Leaving early,
by whatever way, therefore counts as a failure.
"""

import ctypes
import json
import os
import resource
import signal
import stat
import struct
import sys
import sysconfig
import traceback

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 0x1000, 0x4000, 0x40000
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000  # the number is the same on every architecture
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
FIRST_UID = 1_000_000  # under root each run gets a user of its own, so that process counts do not mix
NOBODY = 65_534
LIBC = ctypes.CDLL(None, use_errno=True)


def checked(result, what):
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def read_message(descriptor):
    def exactly(count):
        data = b""
        while len(data) < count:
            piece = os.read(descriptor, min(count - len(data), 1 << 16))
            if not piece:
                raise EOFError("the message ended early")
            data += piece
        return data
    return json.loads(exactly(struct.unpack(">Q", exactly(8))[0]))


def enter_namespaces():
    """Network, process, mount and IPC namespaces; an ordinary user gets them through a user namespace."""
    flags = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    uid, gid = os.getuid(), os.getgid()
    checked(LIBC.unshare(flags | (CLONE_NEWUSER if uid else 0)), "unshare")
    if uid:
        for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)


def mount(source, target, kind=None, flags=0, options=None):
    arguments = [value.encode() if value is not None else None for value in (source, target, kind)]
    checked(LIBC.mount(*arguments, ctypes.c_ulong(flags), options.encode() if options else None), f"mount {target}")


def protect_files(folder, disk_bytes):
    """Everything read-only but a small file system in memory at `folder`; no view of other processes.

    Returns where the standard library can be read from: under root the worker is another user, who
    may not be allowed into the folder that holds it, so it is bound to a place inside.
    """
    mount(None, "/", flags=MS_REC | MS_PRIVATE)
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    checked(LIBC.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, size), "mount_setattr")
    mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, f"size={disk_bytes},mode=755,nr_inodes=4096")
    library = f"{folder}/library"
    os.mkdir(library)
    mount(sysconfig.get_paths()["stdlib"], library, flags=MS_BIND | MS_REC)
    mount("tmpfs", "/proc", "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=4k")
    return library


def refuse_by_hook(folder):
    """Where namespaces are not permitted: Python's own calls are refused. Machine code could get round this."""
    refused = ("socket.", "subprocess.", "os.fork", "os.posix_spawn", "os.exec", "os.system", "os.spawn", "pty.",
               "os.kill", "ctypes.", "signal.pthread_kill", "os.chroot")
    changes = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink",
               "os.truncate", "os.utime", "os.setxattr", "os.removexattr", "shutil.")
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    inside, real = os.path.realpath(folder) + os.sep, os.path.realpath

    def outside(path):
        return isinstance(path, (str, bytes)) and not (real(os.fsdecode(path)) + os.sep).startswith(inside)

    def hook(event, arguments):
        if event.startswith(refused):
            raise PermissionError(f"{event} is not allowed here")
        paths = arguments[:1] if event == "open" and arguments[2] & writing else \
            arguments if event.startswith(changes) else ()
        if any(outside(path) for path in paths):
            raise PermissionError(f"{event} outside of the working folder is not allowed here")
    sys.addaudithook(hook)


def limit_resources(limits):
    """Hard limits of the worker and of everything it starts; they cannot be raised again."""
    seconds = int(limits["seconds"]) + 1
    for name, value in (("CPU", seconds), ("AS", limits["memory_bytes"]), ("FSIZE", limits["file_bytes"]),
                        ("NPROC", limits["processes"]), ("NOFILE", 64), ("CORE", 0), ("MEMLOCK", 0), ("MSGQUEUE", 0)):
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def readable_by_all(path):
    while True:
        if not os.stat(path).st_mode & stat.S_IXOTH:
            return False
        if path == "/":
            return True
        path = os.path.dirname(path)


def give_up_rights(uid, work):
    """Become `uid` (root only), then drop every capability for good. Says which user runs the program."""
    user = "unchanged, without capabilities"
    for other in (uid, NOBODY) if uid is not None else ():
        try:  # a container may know few users
            os.chown(work, other, other)
            os.setgroups([])
            os.setresgid(other, other, other)
            os.setresuid(other, other, other)
            user = "a user of its own" if other == uid else "nobody"
            break
        except OSError:
            continue
    LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header, empty = struct.pack("Ii", 0x20080522, 0), b"\0" * 24
    checked(LIBC.capset(header, empty), "capset")
    return user


def run_program(source, report, messages):
    """Load the program, then fetch and run the checks; the secret word is reported only at the end."""
    write, dumps, leave = os.write, json.dumps, os._exit
    namespace, compiled = {"__name__": "__main__", "__file__": "answer.py"}, False
    try:
        program = compile(source, "answer.py", "exec")
        compiled = True
        exec(program, namespace)
        checks = read_message(messages)
        exec(compile(checks["source"], "checks.py", "exec"), namespace)
        sys.stdout.flush()
        write(report, dumps({"word": checks["word"]}).encode() + b"\n")
        leave(0)
    except BaseException as error:  # SystemExit too: leaving early is no success
        try:
            traceback.print_exc(limit=-3)
            sys.stdout.flush(), sys.stderr.flush()
            write(report, dumps({"error": type(error).__name__, "compiled": compiled}).encode() + b"\n")
        finally:
            leave(1)


def worker(request, folder, namespaces, report):
    """Limits and rights first, then the program. Never returns."""
    isolation, library = dict.fromkeys(("network", "processes", "files"), "namespace"), None
    if namespaces:
        work = f"{folder}/work"
        library = request["library"]
        os.mkdir(work, 0o700)
    else:
        work = folder
        isolation = dict.fromkeys(isolation, "audit hook")
    uid = None
    if os.getuid() == 0 and (namespaces or readable_by_all(sysconfig.get_paths()["stdlib"])):
        uid = FIRST_UID + os.getpid() + request["number"]
    messages = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(work)
    limit_resources(request["limits"])
    isolation["user"] = give_up_rights(uid, work)
    if library:
        sys.path[:] = [library, f"{library}/lib-dynload"]
        for module in list(sys.modules.values()):  # packages loaded so far look for their parts there too
            if getattr(module, "__path__", None):
                module.__path__ = [f"{library}/{module.__name__.replace('.', '/')}"]
    os.environ.update(HOME=work, TMPDIR=work)
    if not namespaces:
        refuse_by_hook(work)
    os.write(report, json.dumps({"isolation": isolation}).encode() + b"\n")
    run_program(request["source"], report, messages)


def supervise(request, folder, namespaces, report):
    """Fork the worker, reap whatever ends, return the worker's exit code. As process 1: end all with it."""
    child = os.fork()
    if child == 0:
        try:
            worker(request, folder, namespaces, report)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(125)
    os.close(report)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    while True:
        ended, status = os.wait()
        if ended == child:
            return os.waitstatus_to_exitcode(status) & 0xff


def main():
    folder, report = sys.argv[1], int(sys.argv[2])
    request = read_message(0)
    request["number"] = os.getpid()  # before the fork: process numbers start again inside
    namespaces = request["isolation"] == "namespace"
    if namespaces:
        try:
            enter_namespaces()
        except OSError as error:
            namespaces = False
            sys.stderr.write(f"no namespaces here ({error}); Python's audit hook is used\n")
    if not namespaces:
        os._exit(supervise(request, folder, False, report))
    init = os.fork()
    if init == 0:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        try:
            request["library"] = protect_files(folder, request["limits"]["disk_bytes"])
            os._exit(supervise(request, folder, True, report))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(126)
    os.close(report)
    # The wait for a namespace's process 1 returns when all its processes are gone.
    signal.signal(signal.SIGTERM, lambda *_: os.kill(init, signal.SIGKILL))
    os._exit(os.waitstatus_to_exitcode(os.waitpid(init, 0)[1]) & 0xff)


if __name__ == "__main__":
    main()
