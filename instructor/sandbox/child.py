"""The child: asked for one answer after the other, it calls a student's function and reports.

It runs below the fork server (`forkserver`), limited already. It gets a function's source and one
case's arguments at a time, never what is expected.
"""

from __future__ import annotations

import json
import os
import random
from typing import Any

from .source import Unreadable, read

CHANNEL = 3  # the descriptor that leads to the grader
LONGEST_ERROR = 300  # characters


class TooManyQuestions(Exception):
    """The function asked more often than the exercise allows."""


class _Lines:
    """What comes over the channel, by line or by length."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def line(self) -> bytes:
        """The next line; empty when the grader has hung up."""
        while (end := self._buffer.find(b"\n")) < 0:
            if not self._more():
                return b""
        return self._take(end + 1)

    def exactly(self, count: int) -> bytes:
        """The next `count` bytes."""
        while len(self._buffer) < count and self._more():
            pass
        return self._take(count)

    def _more(self) -> bool:
        part = os.read(CHANNEL, 1 << 16)
        self._buffer += part
        return bool(part)

    def _take(self, count: int) -> bytes:
        part = bytes(self._buffer[:count])
        del self._buffer[:count]
        return part


def _send(message: dict) -> None:
    data = memoryview(json.dumps(message).encode() + b"\n")
    while data:
        data = data[os.write(CHANNEL, data) :]


def converse() -> int:
    """Do what the grader asks; returns the exit code."""
    random.seed(0)  # the same answer in every run
    lines = _Lines()
    job = json.loads(lines.line())
    if "functions" in job:
        try:
            _send(read(lines.exactly(job["bytes"]), job["functions"]))
        except Unreadable as error:
            _send({"unreadable": str(error)})
        return 0
    space: dict[str, Any] = {"__name__": "__main__"}
    notes = [note for cell, text in job["source"] if (note := _run(cell, text, space))]
    while line := lines.line():
        case = json.loads(line)
        _send({"nonce": case["nonce"], **_answer(space.get(job["function"]), case, lines, notes)})
    return 0


def _run(cell: int, text: str, space: dict[str, Any]) -> str | None:
    """Run a statement of the notebook, annotations unread; the sentence that says how it failed."""
    try:
        exec(compile(text, f"code cell {cell}", "exec", annotations.compiler_flag), space)
    except BaseException as error:
        return f"code cell {cell}, {text.strip().splitlines()[0][:80]!r}: {_say(error)}"
    return None


def _say(error: BaseException) -> str:
    name = type(error).__name__
    try:
        text = str(error)[:LONGEST_ERROR]
    except BaseException:  # a class of the student's
        text = ""
    return f"{name}: {text}" if text else name


def _answer(function: Any, case: dict, lines: _Lines, notes: list[str]) -> dict:
    def ask(*question: Any) -> Any:
        _send({"nonce": case["nonce"], "ask": _plain(list(question))})
        reply = json.loads(lines.line())
        if "too_many" in reply:
            raise TooManyQuestions("no more questions are allowed")
        if "refused" in reply:
            raise ValueError(reply["refused"])
        return reply["says"]

    if not callable(function):
        return {"error": notes[-1] if notes else "it is not a function", "type": "NoFunction"}
    try:
        value = function(*case["arguments"], *([ask] if case["asks"] else []))
        if _unfinished(value):
            return {"unfinished": True}
        return {"value": _plain(value)}
    except BaseException as error:
        if isinstance(error, TypeError) and "llipsis" in _say(error):
            return {"unfinished": True}
        standard = type(error).__module__ == "builtins"
        return {
            "error": _say(error),
            "notes": notes,
            "type": type(error).__name__ if standard else "an exception of its own",
        }


def _unfinished(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value
    return value is ... or isinstance(value, list | tuple | dict) and any(map(_unfinished, parts))


def _plain(value: Any) -> Any:
    """The value as JSON has it; an array of numbers as the list of them."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    json.dumps(value)  # TypeError names what is no answer
    return value
