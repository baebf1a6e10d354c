"""Canvas: the gradebook's CSV, and the zip of *Download Submissions*.

Paths are `doejane_LATE_4012_99_homework-1.ipynb`: the name, who is late, the user's number, the
file's number, the student's own name of the file. *Upload Submissions* takes a zip of files whose
names start so, and gives each to its student as a comment (`infer_comment_context_from_filename`
in Canvas's `assignment.rb`). A grade table needs the columns Student, ID and Section, and one for
each assignment, named `Title (number)`; rows without an ID are no students.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath

from .base import Grade, Platform, Table, show_points

PATH = re.compile(r"^(?P<start>[^_]*_(?P<late>LATE_)?(?P<user>\d+)_\d+)_(?P<file>.*)$", re.S)
TEST_STUDENT = "Student, Test"  # of Canvas's student view; has a number, but no SIS user
POSSIBLE = "points possible"  # a row of the table, with spaces in front


class Canvas(Platform):
    """The gradebook's export is the roster; `ID`, the user's number, is the student's id."""

    name = "Canvas"
    columns = ("Student", "ID", "Section")
    times = "marks"  # a file in the zip has the time of the download

    def student(self, row: Mapping[str, str]) -> dict[str, str] | None:
        number = row["ID"].strip()
        if not number.isdigit():  # Points Possible, Manual Posting
            return None
        if row["Student"].strip() == TEST_STUDENT and not row.get("SIS User ID", "").strip():
            return None
        last, comma, first = row["Student"].partition(",")
        name = f"{first.strip()} {last.strip()}" if comma else last.strip()
        kept = {c: row[c] for c in ("SIS User ID", "SIS Login ID", "Section") if c in row}
        return {"student_id": number, "name": name, **kept}

    def key(self, row: Mapping[str, str]) -> str:
        return row["student_id"]

    def owner(self, path: str, keys: Collection[str]) -> str | None:
        match = PATH.match(PurePosixPath(path).name)
        return match["user"] if match else None

    def own_part(self, path: str) -> str:
        match = PATH.match(PurePosixPath(path).name)
        return match["file"] if match else path

    def late(self, path: str) -> bool:
        match = PATH.match(PurePosixPath(path).name)
        return bool(match and match["late"])

    def feedback(self, path: str, row: Mapping[str, str]) -> str:
        match = PATH.match(PurePosixPath(path).name)
        return f"{match['start']}_feedback.html" if match else super().feedback(path, row)

    def gradebook(
        self, table: Table, grades: Mapping[str, Grade], title: str, out_of: float
    ) -> str:
        """Only what Canvas needs: who, the assignment, its points; other assignments stay out.

        So an import cannot change them. Who has no grade is left out too.
        """
        column = next(
            (c for c in table.header if re.match(rf"{re.escape(title)}( \(\d+\))?$", c)), title
        )
        who = [
            c
            for c in ("Student", "ID", "SIS User ID", "SIS Login ID", "Section")
            if c in table.header
        ]
        found = Table(self, [*who, column], [])
        for row in table.rows:
            if row[table.column("Student")].strip().casefold() == POSSIBLE:
                found.rows.append([*(row[table.column(c)] for c in who), show_points(out_of)])
        if not found.rows:
            found.rows.append(["    Points Possible", *[""] * (len(who) - 1), show_points(out_of)])
        for student, grade in grades.items():
            if grade.points is not None:
                row = table.rows[table.line_of[student]]
                cells = [row[table.column(c)] for c in who]
                found.rows.append([*cells, show_points(grade.points)])
        return found.text()
