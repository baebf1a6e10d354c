"""One notebook, read and parsed in a child: it may be made to crash a parser or fill memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .talk import End, Job, line

LONGEST = 1 << 22  # bytes of what the child finds
NOT_READ = {
    "time": "reading it took too long: its code is too large or nested too deep",
    "idle": "it could not be read",
    "memory": "it is too large to be read",
}
TOO_DEEP = "its code is too large or nested too deep to be read"


class Reading(Job):
    """Find the exercises' functions in a notebook.

    Args:
        data: The file.
        functions: Names of the exercises.
        label: Kept for the caller.

    Attributes:
        about: When it has ended: what `source.read` returns, or why it is `unreadable`.
    """

    cpu_seconds = 5.0
    longest = LONGEST

    def __init__(self, data: bytes, functions: Sequence[str], label: Any = None):
        self.label, self.about = label, None
        self._data, self._functions = data, functions

    def begin(self) -> bytes:
        head = line({"functions": self._functions, "bytes": len(self._data)})
        return head + self._data

    def receive(self, message: dict) -> bytes | None:
        self.about = message
        return None

    def ended(self, end: End) -> Iterable[Job]:
        self._data = b""
        if self.about is None:
            self.about = {"unreadable": NOT_READ.get(end.how, TOO_DEEP)}
        return ()
