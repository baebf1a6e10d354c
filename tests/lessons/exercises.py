"""A lesson's words and exercises as learners meet them; what is wrong with a check that judges."""

import ast
import functools
import io
import linecache
import math
import re
import tokenize
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jupytext
import torch

from tools.notebooks import lesson_scripts

EARLIER = {"math": math, "torch": torch, "states": {"trained": []}}  # what cells before it define


def prose(number: str) -> str:
    """A lesson's script in one line, without the marks of comments: sentences break anywhere."""
    (script,) = lesson_scripts([number])
    text = re.sub(r"^# ?", "", script.read_text("utf-8"), flags=re.MULTILINE)
    return " ".join(text.split())


class Cell(NamedTuple):
    """An exercise's cell: its source, and the expression that is handed to the check."""

    source: str
    answer: str

    def run(self, source: str | None = None) -> Any:
        """The answer that this source makes, the lesson's own by default.

        The source is known to `inspect`, as that of a notebook's cell is.
        """
        source = source or self.source
        name = f"<cell {hash(source)}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        defined = dict(EARLIER)
        exec(compile(source, name, "exec"), defined)
        return eval(self.answer, defined)

    @property
    def blanks(self) -> list[tuple[int, int]]:
        """Line and column of each `...` to fill in, from 0."""
        tokens = tokenize.generate_tokens(io.StringIO(self.source).readline)
        return [(t.start[0] - 1, t.start[1]) for t in tokens if t.string == "..."]

    def filled(self, blank: int) -> str:
        """The source with one of its blanks filled in, if not rightly."""
        lines = self.source.splitlines()
        line, column = self.blanks[blank]
        lines[line] = f"{lines[line][:column]}1{lines[line][column + 3 :]}"
        return "\n".join(lines)


@functools.cache
def exercise_cells() -> dict[str, Cell]:
    """The cell of each exercise of all lessons, by the name of its check."""
    found = {}
    for script in lesson_scripts():
        tagged = [
            (tag, cell.source)
            for cell in jupytext.read(script).cells
            for tag in cell.metadata.get("tags", ())
            if tag in ("exercise", "check")
        ]
        for (_, source), (_, judged) in zip(tagged[::2], tagged[1::2], strict=True):
            (call,) = (
                node
                for node in ast.walk(ast.parse(judged))
                if isinstance(node, ast.Call)
                and ast.unparse(node.func).startswith("exercises.check_")
            )
            name = ast.unparse(call.func).removeprefix("exercises.")
            found[name] = Cell(source, ast.unparse(call.args[0]))
    return found


def complaints(
    check: Callable, name: str, right: Iterable[Any], wrong: Mapping[str, tuple[Any, str]]
) -> list[str]:
    """What is wrong with a check, going by answers whose verdict is known.

    Args:
        check: Takes an answer.
        name: Of the check, by which the lesson's own cell is found.
        right: Answers that must pass.
        wrong: What is wrong with an answer, to that answer and words that its verdict must have.
    """
    verdicts = [check(answer) for answer in right]
    found = [f"refuses a right answer: {verdict}" for verdict in verdicts if not verdict.passed]
    for mistake, (answer, words) in wrong.items():
        verdict = check(answer)
        if verdict.passed is not False:
            found.append(f"accepts {mistake}: {verdict}")
        elif words not in repr(verdict):
            found.append(f"does not name {mistake}: {verdict}")
    for answer in (exercise_cells()[name].run(), ...):
        verdict = check(answer)
        if verdict.passed is not None or "Not attempted yet" not in repr(verdict):
            found.append(f"says of an untouched exercise: {verdict}")
    return found
