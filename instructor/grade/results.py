"""What grading found out about a class; `table`, `feedback` and `class_report` write it down."""

from __future__ import annotations

import io
import math
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from .copies import Alike
from .marking import Mark


@dataclass
class Result:
    """One student of the roster.

    Args:
        row: The roster's.
        status: `graded`, `missing`, `refused` with the reason in `problem`, or `by hand` if nothing
            could be graded and the instructor has given points all the same.
        file: What was graded, or refused.
        problem: Why nothing could be graded.
        late: How late it was; empty if it was not.
        penalty: The share of the points that lateness costs.
        comment: The instructor's.
        marks: One an exercise, in the assignment's order; none if nothing was graded.
        flags: For the instructor.
        code: By function, what the reader of the notebook said of it.
    """

    row: Mapping[str, str]
    status: str = "missing"
    file: str = ""
    problem: str = ""
    late: str = ""
    penalty: float = 0.0
    comment: str = ""
    marks: list[Mark] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    code: Mapping[str, Mapping] = field(default_factory=dict)

    @property
    def student_id(self) -> str:
        """The roster's."""
        return self.row["student_id"]

    @property
    def score(self) -> float:
        """Points of all exercises, as they count, less what lateness costs.

        Without marks there is no score, which is not the same as 0: see `status`.
        """
        return math.fsum(mark.counts for mark in self.marks) * (1 - self.penalty)

    @property
    def scored(self) -> bool:
        """Whether there is a score."""
        return bool(self.marks)


@dataclass
class ClassResult:
    """The whole class.

    Args:
        results: In the roster's order.
        out_of: Points of the assignment as it counts.
        ungraded: Files that belong to nobody or were refused, each with the reason.
        alike: What looks copied.
        sandbox: What was in force.
        warnings: What may be wrong with the grading itself, to be read before any grade.
    """

    results: list[Result]
    out_of: float
    ungraded: list[tuple[str, str]]
    alike: list[Alike]
    sandbox: str
    warnings: list[str] = field(default_factory=list)


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; readable by its owner alone, as grades should be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with open(handle, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_zip(path: Path, files: Mapping[str, str]) -> None:
    """Write a zip of texts, as `write` does; equal texts give equal bytes.

    A name that leads out of the zip, which students' files may have, is written as its last part.
    """
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            parts = PurePosixPath(name).parts
            safe = name if not {"..", "/"} & set(parts) and "\\" not in name else parts[-1]
            entry = zipfile.ZipInfo(safe, (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o100600 << 16
            archive.writestr(entry, files[name].encode())
    write(path, memory.getvalue())
