"""A child that tries to get out: every sandbox is held against it before a student's code runs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from .talk import End, Job, Questions

PROBE = '''
def escapes(path, folder, process):
    """What this child can do and should not: names of attempts that succeed."""
    import mmap, os, socket, sys
    def read(name):
        with open(name, "rb") as file:
            return bool(file.read(1))
    def write():
        with open(folder + "/escaped", "w") as file:
            return bool(file.write("x"))
    def fork():
        if os.fork() == 0:
            os._exit(0)
        return True
    def connect():
        socket.socket().connect((b"127.0.0.1", 9))
        return True
    def refused():
        try:
            return connect()
        except ConnectionRefusedError:
            return True
    def hoard():  # reserved, not filled
        return sys.platform == "linux" and bool(mmap.mmap(-1, 8 << 30))
    found = []
    for name, attempt in {
        "read a file of the grader": lambda: read(path), "write outside the temp folder": write,
        "read the grader's memory": lambda: read(f"/proc/{process}/environ"), "fork": fork,
        "signal the grader": lambda: os.kill(process, 0) is None, "network": refused,
        "take 8 GiB": hoard,
    }.items():
        try:
            if attempt():
                found.append(name)
        except (OSError, MemoryError, ImportError):
            continue
    return found
'''


class Probe(Questions):
    """Asks the function of PROBE what it can do.

    Args:
        source: PROBE, as `source.read` found it.
        path: A file of the grader that everybody may read.
        folder: One of its folders.

    Attributes:
        found: Names of what it could do and should not; None if it did not answer.
    """

    def __init__(self, source: Sequence[Sequence], path: str, folder: str):
        super().__init__(source, "escapes")
        self._arguments = [path, folder, os.getpid()]
        self.found: list[str] | None = None

    def next(self) -> tuple[Sequence, bool]:
        return self._arguments, False

    def receive(self, message: dict) -> bytes | None:
        self.found = message.get("value")
        return None

    def ended(self, end: End) -> Iterable[Job]:
        return ()
