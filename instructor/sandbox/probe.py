"""A child that tries to get out: every sandbox is held against it before a student's code runs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from .talk import End, Job, Questions

# What some levels let through.
SEES = "see that a file is there with its size and times"
ABOUT_GRADER = ("read the grader's clock", "read the grader's processors")
PROBE = '''
def escapes(path, folder, process):
    """How many ways out were tried, and the names of those that led out."""
    import os, platform, socket, sys, time
    CHANNEL = 3

    def read(name):
        with open(name, "rb") as file:
            return bool(file.read(1))

    def write():
        with open(folder + "/escaped", "w") as file:
            return bool(file.write("x"))

    def append():
        with open(path, "a") as file:
            return bool(file.write("x"))

    def fork():
        if os.fork() == 0:
            os._exit(0)
        return True

    def start():
        import _posixsubprocess
        return os.posix_spawn(sys.executable, [sys.executable, "-V"], {}) > 0

    def thread():
        import _thread
        return _thread.start_new_thread(lambda: None, ()) > 0

    def connect():
        try:
            socket.socket().connect((b"127.0.0.1", 9))
        except ConnectionRefusedError:
            pass
        return True

    def hoard():  # reserved, not filled
        import mmap
        return sys.platform == "linux" and bool(mmap.mmap(-1, 8 << 30))

    def owner(command, *more):  # whom the kernel signals when data comes
        import fcntl
        if not hasattr(fcntl, command):
            return False
        fcntl.fcntl(CHANNEL, getattr(fcntl, command), *more)
        return True

    def owner_by_ioctl():
        import fcntl, struct
        fcntl.ioctl(CHANNEL, 0x8901, struct.pack("i", process))  # FIOSETOWN
        return True

    def call(number, *arguments):
        """Whether the kernel answers anything else than that it is not permitted."""
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        done = libc.syscall(number, *arguments)
        return done >= 0 or ctypes.get_errno() not in (1, 38)  # EPERM, ENOSYS

    attempts = {
        "read a file of the grader": lambda: read(path),
        "write outside the temp folder": write,
        "write into a file of the grader": append,
        "make a folder": lambda: os.mkdir(folder + "/escaped") is None,
        "make a link": lambda: os.symlink(path, folder + "/link") is None,
        "list a folder of the grader": lambda: bool(os.listdir(folder)),
        "see that a file is there with its size and times": lambda: bool(os.stat(path)),
        "change a file's mode": lambda: os.chmod(path, 0o600) is None,
        "read the grader's memory": lambda: read(f"/proc/{process}/environ"),
        "fork": fork,
        "start a program": start,
        "start a thread": thread,
        "signal the grader": lambda: os.kill(process, 0) is None,
        "read the grader's clock": lambda: time.clock_gettime((~process << 3) | 2) >= 0,
        "read the grader's processors": lambda: bool(os.sched_getaffinity(process)),
        "have the kernel signal the grader": lambda: owner("F_SETOWN", process),
        "have the kernel signal the grader, by ioctl": owner_by_ioctl,
        "choose the kernel's signal": lambda: owner("F_SETSIG", 9),
        "enlarge a pipe": lambda: owner("F_SETPIPE_SZ", 1 << 20),
        "lock a file": lambda: owner("F_SETLEASE", 0),
        "network": connect,
        "take 8 GiB": hoard,
    }
    # x86-64, arm64; with arguments that do nothing where the kernel lets them through.
    for name, numbers in {
        "prctl": (157, 167), "io_uring": (425, 425), "userfaultfd": (323, 282),
        "memfd": (319, 279), "pidfd": (434, 434), "ptrace": (101, 117), "bpf": (321, 280),
        "perf": (298, 241), "keyctl": (250, 219), "shared memory": (29, 194),
        "a timer": (222, 107), "namespaces": (308, 268), "another's limits": (302, 261),
    }.items():
        machine = {"x86_64": 0, "aarch64": 1}.get(platform.machine())
        if sys.platform == "linux" and machine is not None:
            attempts["call " + name] = lambda n=numbers[machine]: call(n, -1, 0, 0, 0, 0)
    found = []
    for name, attempt in attempts.items():
        try:
            if attempt():
                found.append(name)
        except (OSError, MemoryError, ImportError, RuntimeError, AttributeError, NameError):
            continue
    return [len(attempts), found, os.getuid() == 0]
'''


class Probe(Questions):
    """Asks the function of PROBE what it can do.

    Args:
        path: A file of the grader that everybody may read and write.
        folder: One of its folders, open to everybody.

    Attributes:
        found: Names of what it could do and should not; None if it did not answer.
        tried: How many ways out it tried.
        root: Whether it is still root, though without any privilege.
    """

    def __init__(self, path: str, folder: str):
        super().__init__([[1, PROBE]], "escapes")
        self._arguments = [path, folder, os.getpid()]
        self.found: list[str] | None = None
        self.tried, self.root = 0, False

    def next(self) -> tuple[Sequence, bool]:
        return self._arguments, False

    def receive(self, message: dict) -> bytes | None:
        if isinstance(value := message.get("value"), list) and len(value) == 3:
            self.tried, self.found, self.root = value
        return None

    def ended(self, end: End) -> Iterable[Job]:
        return ()
