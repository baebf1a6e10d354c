"""What grading found out about a class; `table`, `feedback` and `class_report` write it down."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .copies import Alike
from .marking import Mark


@dataclass
class Result:
    """One student of the roster.

    Args:
        row: The roster's.
        status: `graded`, `missing`, or `refused` with the reason in `problem`.
        file: What was graded, or refused.
        problem: Why nothing could be graded.
        late: How late it was; empty if it was not.
        marks: One an exercise, in the assignment's order; none if nothing was graded.
        flags: For the instructor.
        code: By function, what the reader of the notebook said of it.
    """

    row: Mapping[str, str]
    status: str = "missing"
    file: str = ""
    problem: str = ""
    late: str = ""
    marks: list[Mark] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    code: Mapping[str, Mapping] = field(default_factory=dict)

    @property
    def student_id(self) -> str:
        """The roster's."""
        return self.row["student_id"]

    @property
    def score(self) -> float:
        """Points of all exercises."""
        return math.fsum(mark.earned for mark in self.marks)


@dataclass
class ClassResult:
    """The whole class.

    Args:
        results: In the roster's order.
        ungraded: Files that belong to nobody or were refused, each with the reason.
        alike: What looks copied.
        sandbox: What was in force.
    """

    results: list[Result]
    ungraded: list[tuple[str, str]]
    alike: list[Alike]
    sandbox: str


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all; readable by its owner alone, as grades should be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with open(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
