"""The child: runs a notebook's statements, then calls a student's function for case after case.

It runs below the fork server (`forkserver`), limited already. It gets statements and one case's
arguments at a time, never what is expected.
"""

from __future__ import annotations
import __future__ as future

import ast
import contextlib
import inspect
import io
import json
import os
import random
import sys
import types
from collections.abc import Callable
from typing import Any

from ..build.selfcheck import plain, unfinished
from .plan import read
from .source import TRANSPARENT, Unreadable, defines

CHANNEL = 3  # the descriptor that leads to the grader
LONGEST_ERROR = 300  # characters
FUTURES = sum(getattr(future, name).compiler_flag for name in future.all_feature_names)


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
    kernel = Kernel()
    if "rehearse" in job:
        for number, cell, text in job["rehearse"]:
            _send({"did": number, "note": kernel.run(cell, text)})
        return 0
    while job:
        for cell, text in job["source"]:
            kernel.run(cell, text)
        job = _asked(kernel.names, job["function"], lines)
    return 0


def _asked(names: dict[str, Any], function: str, lines: _Lines) -> dict | None:
    """Answer case after case; returns what is to run before another function, if that follows."""
    while line := lines.line():
        case = json.loads(line)
        if "source" in case:
            return case
        _send({"nonce": case["nonce"], **_answer(names, function, case, lines)})
    return None


class Kernel:
    """Runs statements as Jupyter's kernel does, one by one, and goes on after one that fails."""

    def __init__(self) -> None:
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main  # where dataclasses and the like look
        self.names = vars(main)
        self.names |= {"get_ipython": lambda: Shell(self.names), "display": print}
        self._flags = 0  # `from __future__ import ...` holds for the cells below
        self._shown: Any = None  # the value of the last expression, which is called `_`

    def run(self, cell: int, text: str) -> str | None:
        """Run a statement of the notebook; the sentence that says how it failed."""
        try:
            # What the cells around a function print is nobody's business, and may be much.
            with contextlib.redirect_stdout(Nowhere()), contextlib.redirect_stderr(Nowhere()):
                self._run(f"code cell {cell}", text)
        except BaseException as error:
            first = (text.strip().splitlines() or [""])[0][:80]
            return f"code cell {cell}, {first!r}: {_say(error)}"
        return None

    def _run(self, name: str, text: str) -> None:
        flags = self._flags | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        try:
            code = compile(text, name, "exec", flags, dont_inherit=True)
            self._flags |= code.co_flags & FUTURES
            if (value := _expression(text, name, flags)) is not None:
                self._show(eval(value, self.names))
                return
            waiting = eval(code, self.names)
        except Exception:
            # An annotation may name what the grader has not; the function does not need it.
            tree = ast.parse(text)
            if not (tree.body and defines(tree.body[0])):
                raise
            flags |= future.annotations.compiler_flag
            waiting = eval(compile(text, name, "exec", flags, dont_inherit=True), self.names)
        if waiting is not None:  # a top-level `await`
            with contextlib.suppress(StopIteration):
                while True:
                    waiting.send(None)

    def _show(self, value: Any) -> None:
        """Keep a value under `_`, unless the notebook has a `_` of its own."""
        if value is not None and self.names.get("_") is self._shown:
            self.names["_"] = self._shown = value


def _expression(text: str, name: str, flags: int) -> types.CodeType | None:
    """A statement's code if it only computes a value, without waiting for it."""
    try:
        code = compile(text.strip(), name, "eval", flags, dont_inherit=True)
    except SyntaxError:
        return None
    return None if code.co_flags & inspect.CO_COROUTINE else code


class Nowhere(io.TextIOBase):
    """A file that forgets what is written."""

    def write(self, text: str) -> int:
        return len(text)


class Shell:
    """What a notebook's magics call: those that run Python do, all others do nothing."""

    def __init__(self, names: dict[str, Any]):
        self.user_ns = names

    def run_line_magic(self, name: str, line: str, *_: Any) -> None:
        """`%time x = 1` runs its Python."""
        if name == "time":
            exec(line, self.user_ns)

    def run_cell_magic(self, name: str, line: str, cell: str) -> None:
        """`%%time` and its like run what stands below them."""
        if name in TRANSPARENT:
            exec(cell, self.user_ns)

    def getoutput(self, *_: Any) -> list[str]:
        """`files = !ls` finds nothing."""
        return []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **named: None


def _say(error: BaseException) -> str:
    name = type(error).__name__
    try:
        text = str(error)[:LONGEST_ERROR]
    except BaseException:  # a class of the student's
        text = ""
    return f"{name}: {text}" if text else name


def _answer(names: dict[str, Any], name: str, case: dict, lines: _Lines) -> dict:
    def ask(*question: Any) -> Any:
        _send({"nonce": case["nonce"], "ask": plain(list(question))})
        reply = json.loads(lines.line())
        if "too_many" in reply:
            raise TooManyQuestions("no more questions are allowed")
        if "refused" in reply:
            raise ValueError(reply["refused"])
        return reply["says"]

    function = names.get(name)
    if not callable(function):
        return {"no_function": "missing" if name not in names else "something else"}
    try:
        value = function(*case["arguments"], *([ask] if case["asks"] else []))
        if unfinished(value):
            return {"unfinished": True}
        value = plain(value)
        json.dumps(value)  # TypeError names what is no answer
        return {"value": value}
    except BaseException as error:
        if isinstance(error, TypeError) and "llipsis" in _say(error):
            return {"unfinished": True}
        standard = type(error).__module__ == "builtins"
        return {
            "error": _say(error),
            "type": type(error).__name__ if standard else "an exception of its own",
        }
