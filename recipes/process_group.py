"""Before the process group is made: which network gloo uses between nodes, and how long it waits for them.

gloo listens on the address that the machine's own name has. Where that is a loopback address (as installers write it
into /etc/hosts), other nodes cannot reach it: "connect ... 127.0.0.1: Connection refused". Then the interface towards
the first node is named to it. On GPUs gloo carries the checkpoints' bookkeeping, on CPUs everything.
"""

import fcntl
import os
import socket
import struct
from datetime import timedelta

import torch.distributed as dist

SIOCGIFADDR = 0x8915  # of Linux: the IPv4 address of an interface


def _number(name, default):
    return int(os.environ.get(name) or default)


def interface_of(address):
    """The name of this machine's interface with an IPv4 `address`; None where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # no address
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None


def address_towards(host, port):
    """This machine's IPv4 address on the way to `host`; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return probe.getsockname()[0]


def _own_name_is_loopback():
    try:
        return socket.gethostbyname(socket.gethostname()).startswith("127.")
    except OSError:  # the name is unknown: gloo falls back to the loopback address
        return True


def choose_interface():
    """Sets GLOO_SOCKET_IFNAME where several nodes run, nobody has set it, and the machine's name does not serve."""
    several = _number("WORLD_SIZE", 1) > _number("LOCAL_WORLD_SIZE", 1)
    if not several or "GLOO_SOCKET_IFNAME" in os.environ or not _own_name_is_loopback():
        return
    try:
        name = interface_of(address_towards(os.environ["MASTER_ADDR"], _number("MASTER_PORT", 29500)))
    except (KeyError, OSError):  # torch says what is wrong with the first node's address
        return
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def open_group_of_cpus(timeout_s):
    """Makes the process group of a run on CPUs; the library would, with a time-out of 30 minutes."""
    launched = "RANK" in os.environ and "MASTER_ADDR" in os.environ and _number("WORLD_SIZE", 1) > 1
    if launched and dist.is_available() and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
