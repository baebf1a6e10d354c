"""The fork server: forks a limited child for each job, before it hears of any student.

`sandbox` starts this as a small Python of its own: no environment, no site-packages, one thread. It
enters the cage, then forks for each job a warden, which waits and kills, and below it the child,
which limits itself for good and only then listens (`child`). Nothing here knows what is expected,
nor any secret, nor a student's work.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import sys
import tempfile
import time
import types
from collections.abc import Callable

from . import cage
from .child import CHANNEL, converse
from .source import TRANSFORM

ORDER = struct.Struct("=ddq")  # CPU seconds, wall seconds, memory bytes
ENDED = struct.Struct("=iid")  # wait status, who ended it, CPU seconds
ITSELF, TOLD, TIME, IDLE, HUNG_UP = range(5)  # who: or the reason why its warden did
TICK_SECONDS, IDLE_TICKS, IDLE_SECONDS = 0.5, 5, 0.001  # so many ticks with no more CPU time
LEAVING_TICKS, LEAVING_SECONDS = 16, 1.0  # of one that has hung up: ticks of waiting, CPU time
ALIVE = CHANNEL + 1  # with the channel the child's only descriptors above standard error
# Loaded once for all: a child then starts with them, and needs no file for them.
PRELOADED = (
    "abc",
    "array",
    "ast",
    "bisect",
    "cmath",
    "collections",
    "collections.abc",
    "copy",
    "dataclasses",
    "datetime",
    "decimal",
    "encodings.ascii",
    "encodings.idna",
    "encodings.latin_1",
    "encodings.raw_unicode_escape",
    "encodings.unicode_escape",
    "encodings.utf_8_sig",
    "encodings.utf_16",
    "enum",
    "fractions",
    "functools",
    "heapq",
    "inspect",
    "io",
    "itertools",
    "json",
    "math",
    "mmap",
    "numbers",
    "operator",
    "pprint",
    "random",
    "re",
    "statistics",
    "string",
    "struct",
    "textwrap",
    "time",
    "traceback",
    "types",
    "typing",
    "warnings",
)


def serve(level: str, readable: list[str], packages: list[str], ipython: str, grader: str) -> None:
    """Fork a child for each order that comes, until the grader hangs up.

    Args:
        level: One of `cage.LEVELS`.
        readable: Folders that a child may read.
        packages: Folders of installed packages, if torch is needed.
        ipython: Folder of IPython, whose transformer of magics is taken; empty if there is none.
        grader: Whose fork server this is, for people who look at the list of processes.
    """
    orders = socket.socket(fileno=CHANNEL)
    base_bytes = _load(packages, ipython)
    try:
        if level == "namespaces":
            cage.enter_namespaces(readable)
    except OSError as error:
        orders.sendall(f"{error}\n".encode())
        return
    orders.sendall(b"ready\n")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the grader's to answer
    if level != "hook":
        _filter(level)
    gc.collect()
    gc.freeze()
    while True:
        order, descriptors, _, _ = socket.recv_fds(orders, ORDER.size, 2)
        if len(order) < ORDER.size:
            return
        if os.fork() == 0:
            orders.close()
            _warden(level, readable, base_bytes, ORDER.unpack(order), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        with contextlib.suppress(ChildProcessError):  # none is left
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _load(packages: list[str], ipython: str) -> int:
    """Load what children start with; returns the bytes of address space that it takes."""
    sys.path += packages
    for name in (*PRELOADED, *(["torch"] if packages else [])):
        importlib.import_module(name)
    if ipython:
        TRANSFORM.append(_transformer(ipython))
    return cage.address_space()


def _transformer(ipython: str) -> Callable[[str], str]:
    """IPython's way from a cell to Python, without the rest of IPython, which is large.

    A student who imports IPython still finds none.
    """
    package = types.ModuleType("IPython")
    package.__path__ = [ipython]
    sys.modules["IPython"] = package
    module = importlib.import_module("IPython.core.inputtransformer2")
    for name in [name for name in sys.modules if name.partition(".")[0] == "IPython"]:
        del sys.modules[name]
    return module.TransformerManager().transform_cell


def _warden(
    level: str,
    readable: list[str],
    base_bytes: int,
    limits: tuple[float, float, int],
    channel: int,
    status: int,
) -> None:
    """Start the child, end it in time or when the grader says so, and say how it ended."""
    cage.die_with_parent()
    cpu_seconds, wall_seconds, memory_bytes = limits
    if level == "namespaces":
        cage.new_process_tree()
    here, there = os.pipe()  # closes when the child ends
    child = os.fork()
    if child == 0:
        own = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 16) for descriptor in (channel, there)]
        for descriptor, number in zip(own, (CHANNEL, ALIVE), strict=True):
            os.dup2(descriptor, number)
        os.closerange(ALIVE + 1, min(os.sysconf("SC_OPEN_MAX"), 1 << 16))
        code = 70
        try:
            _close_cage(level, readable, int(-(-cpu_seconds // 1)), base_bytes + memory_bytes)
            code = converse()
        finally:
            os._exit(code)
    os.close(there)
    os.close(channel)
    deadline = time.monotonic() + wall_seconds
    who = _watch(child, here, status, deadline)
    done = _gone(child, deadline) if who == ITSELF else (0, 0, None)
    if not done[0]:
        who = who or HUNG_UP
        os.kill(child, signal.SIGKILL)
        done = os.wait4(child, 0)
    used = done[2].ru_utime + done[2].ru_stime
    with contextlib.suppress(OSError):  # the grader may be gone
        os.write(status, ENDED.pack(done[1], who, used))
    os._exit(0)


def _watch(child: int, here: int, status: int, deadline: float) -> int:
    """Wait until the child has ended or has to; returns who or why."""
    used, ticks = -1.0, 0
    while (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([here, status], [], [], min(left, TICK_SECONDS))
        if ready:
            return TOLD if status in ready else ITSELF
        before, used = used, cage.cpu_seconds(child)
        # A busy machine slows a child down; only one that waits uses nothing at all.
        ticks = ticks + 1 if used is not None and used - before < IDLE_SECONDS else 0
        if ticks >= IDLE_TICKS:
            return IDLE
    return TIME


def _gone(child: int, deadline: float) -> tuple:
    """How a child ended that has closed its descriptors; (0, 0, None) if it only pretends to end.

    Linux closes them before it takes down a child's temp folder, which a busy machine may take
    seconds for. So who works on for a second of CPU time pretends, or who waits for very long.
    """
    first = used = cage.cpu_seconds(child) or 0.0
    ticks = 0
    while ticks < LEAVING_TICKS and used - first < LEAVING_SECONDS and time.monotonic() < deadline:
        tick = time.monotonic() + TICK_SECONDS
        while time.monotonic() < tick:
            if (done := os.wait4(child, os.WNOHANG))[0]:
                return done
            time.sleep(0.0005)
        before, used = used, cage.cpu_seconds(child) or 0.0
        ticks = ticks + 1 if used - before < IDLE_SECONDS else 0
    return 0, 0, None


@functools.cache
def _filter(level: str) -> cage.syscalls.Program:
    files = {"namespaces": "all", "landlock": "read"}
    return cage.syscalls.prepared(files.get(level, "none"))


def _close_cage(level: str, readable: list[str], cpu_seconds: int, memory_bytes: int) -> None:
    os.setsid()
    if level == "namespaces":
        tempfile.tempdir = cage.private_temp()
    # What a function prints goes into a file without a name, of limited size.
    with tempfile.TemporaryFile() as printed, open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    os.chdir("/tmp" if level == "namespaces" else "/")
    if level == "landlock":
        cage.landlock(readable)
    cage.become_nobody()
    cage.die_with_parent()  # after the change of user, which makes the kernel forget it
    cage.limit(cpu_seconds, memory_bytes)
    if level == "hook":
        cage.hook(readable)
    else:
        cage.syscalls.restrict(cage.libc, _filter(level))


def main() -> None:
    """Started by `sandbox` with one argument, JSON."""
    order = json.loads(sys.argv[1])
    # Where the grader's folders are.
    del sys.argv[1:]
    sys.orig_argv[:] = ["python"]
    serve(**order)
