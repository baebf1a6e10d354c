"""`grades.csv`: a line a student, safe to open in a spreadsheet."""

from __future__ import annotations

import csv
import io

from ..assignment import Assignment
from ..grade.results import ClassResult
from ..grade.rubric import show_points
from ..lms.cells import safe


def table(assignment: Assignment, found: ClassResult) -> str:
    """The file's text; what a student or the roster wrote is made safe.

    Columns: those of the roster, `score`, `out_of`, `percent`, `status`, `file`, `late`, `penalty`
    in percent, `comment`, `flags`, then for each exercise its points and the reason. Who has
    nothing to be graded has no score, which is not 0.
    """
    results = found.results
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
            "penalty",
            "comment",
            "flags",
            *(column for name in names for column in (name, f"{name}: why")),
        ]
    )
    for result in results:
        cells = [safe(result.row.get(name, "")) for name in ("student_id", "name", *extra)]
        marks = [(show_points(mark.earned), safe(mark.reason)) for mark in result.marks]
        percent = 100 * result.score / found.out_of if found.out_of else 0.0
        writer.writerow(
            [
                *cells,
                show_points(round(result.score, 4)) if result.scored else "",
                show_points(found.out_of),
                f"{percent:.1f}" if result.scored else "",
                result.status,
                safe(result.file),
                safe(result.late),
                f"{100 * result.penalty:g}" if result.penalty else "",
                safe(result.comment),
                safe("; ".join(result.flags)),
                *(cell for pair in marks or [("", "")] * len(names) for cell in pair),
            ]
        )
    return out.getvalue()
