"""`grades.csv`: a line a student, safe to open in a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from ..assignment import Assignment
from ..grade.results import Result
from ..grade.rubric import show_points

# What makes a spreadsheet take a text for a formula; the wide forms count in some.
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20", "|", "%")


def safe(text: str) -> str:
    """A cell that no spreadsheet computes: one line, with a quote in front of a formula.

    Example:
        >>> safe("=1+1"), safe("Ann"), safe("-2")
        ("'=1+1", 'Ann', "'-2")
    """
    line = " ".join(text.encode("utf-8", "replace").decode().splitlines())
    risky = text.startswith(FORMULA) or line.lstrip().startswith(FORMULA)
    return "'" + line if risky else line


def table(assignment: Assignment, results: Sequence[Result]) -> str:
    """The file's text; what a student or the roster wrote is made safe.

    Columns: those of the roster, `score`, `out_of`, `percent`, `status`, `file`, `late`, `flags`,
    then for each exercise its points and the reason.
    """
    extra = [name for name in results[0].row if name not in ("student_id", "name")]
    names = [exercise.function for exercise in assignment.exercises]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(
        [
            "student_id",
            "name",
            *map(safe, extra),
            "score",
            "out_of",
            "percent",
            "status",
            "file",
            "late",
            "flags",
            *(column for name in names for column in (name, f"{name}: why")),
        ]
    )
    for result in results:
        cells = [safe(result.row.get(name, "")) for name in ("student_id", "name", *extra)]
        marks = [(show_points(mark.earned), safe(mark.reason)) for mark in result.marks]
        writer.writerow(
            [
                *cells,
                show_points(result.score),
                show_points(assignment.points),
                f"{100 * result.score / assignment.points:.1f}",
                result.status,
                safe(result.file),
                safe(result.late),
                safe("; ".join(result.flags)),
                *(cell for pair in marks or [("0", "")] * len(names) for cell in pair),
            ]
        )
    return out.getvalue()
