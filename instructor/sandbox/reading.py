"""One notebook, in a child: read and parsed, then run once from top to bottom.

Both may be made to crash or to fill memory, so neither happens in the grader's own process.
"""

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
REHEARSALS = 4  # of one notebook, each without the statements that ended the ones before
MOST_NOTES, LONGEST_NOTE = 50, 300


class Reading(Job):
    """Find the exercises' functions in a notebook.

    Args:
        data: The file.
        functions: Names of the exercises.
        label: Kept for the caller.

    Attributes:
        about: When it has ended: what `plan.read` returns, or why it is `unreadable`.
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


class Rehearsal(Job):
    """Run a notebook's statements from top to bottom, to learn which of them stop a kernel.

    What is learnt here, before any hidden number is in a child, is all that a student is told of
    the cells around a function.

    Args:
        statements: `[cell, text]` of each.
        label: Kept for the caller.
        before: A rehearsal that was ended by a statement, which is left out of this one.

    Attributes:
        left_out: Numbers of the statements that ended a rehearsal: by time, memory or a crash.
        notes: Number of a statement to how it failed.
        seconds: CPU time of the last rehearsal, to a second.
        complete: Whether a rehearsal came to the end. If none did, only what a function cannot do
            without should be run.
    """

    cpu_seconds = 2.0

    def __init__(
        self, statements: Sequence[Sequence], label: Any = None, before: Rehearsal | None = None
    ):
        self.statements, self.label = statements, label
        self.left_out: list[int] = [*before.left_out] if before else []
        self.notes: dict[int, str] = {}
        self.seconds, self.complete = 0, False
        self._next = self._skip(0)

    @property
    def over(self) -> bool:
        """Whether no other rehearsal follows."""
        return self.complete or len(self.left_out) >= REHEARSALS

    def _skip(self, number: int) -> int:
        while number in self.left_out:
            number += 1
        return number

    def begin(self) -> bytes:
        self._next = self._skip(0)
        numbered = [
            [number, *statement]
            for number, statement in enumerate(self.statements)
            if number not in self.left_out
        ]
        return line({"rehearse": numbered})

    def receive(self, message: dict) -> bytes | None:
        if message.get("did") != self._next:
            raise ValueError("another statement is running")
        if (note := message.get("note")) is not None and len(self.notes) < MOST_NOTES:
            self.notes[self._next] = str(note)[:LONGEST_NOTE]
        self._next = self._skip(self._next + 1)
        if self._next < len(self.statements):
            return b""
        self.complete = True
        return None

    def ended(self, end: End) -> Iterable[Job]:
        self.seconds = round(end.cpu_seconds)
        if self.complete or not self.statements:
            self.complete = True
            return ()
        self.left_out.append(self._next)
        return [] if self.over else [Rehearsal(self.statements, self.label, self)]

    @property
    def about(self) -> dict:
        """What the journal keeps."""
        return {
            "left_out": self.left_out,
            "notes": self.notes,
            "seconds": self.seconds,
            "complete": self.complete,
        }
