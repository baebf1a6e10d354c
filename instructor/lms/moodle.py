"""Moodle: the grading worksheet, and the zip of *Download all submissions*.

Paths are `Jane Doe_4012_assignsubmission_file_/homework.ipynb`, since Moodle 4.1 without the last
underscore, or all in the file's name where folders are not asked for; the number is that of
`Participant 4012`, another one in each assignment. *Upload multiple feedback files in a zip* takes
the same paths (`is_valid_filename_for_import` in Moodle's `importziplib.php`), *Upload grading
worksheet* the same table.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from .base import Grade, Platform, Table, show_points

PATH = re.compile(
    r"^(?:.*/)?(?P<folder>[^/]*?_(?P<number>\d+)_assignsubmission_(?:file|onlinetext)_?)"
)
PARTICIPANT = re.compile(r"\d+")


class Moodle(Platform):
    """The worksheet is the roster; the id is `ID number`, else the address, else the number.

    Hidden numbers come from the id, so the worksheet that the notebooks were built with must give
    the same ids as the one that is graded with.
    """

    name = "Moodle"
    columns = ("Identifier", "Full name", "Grade")

    def student(self, row: Mapping[str, str]) -> dict[str, str] | None:
        number = PARTICIPANT.search(row["Identifier"])
        if not number:
            return None
        kept = {c: row[c] for c in ("Identifier", "Email address") if c in row}
        ids = (row.get("ID number", ""), row.get("Email address", ""), number[0])
        own = next(text.strip() for text in ids if text.strip())
        return {"student_id": own, "name": row["Full name"].strip(), **kept}

    def key(self, row: Mapping[str, str]) -> str:
        return PARTICIPANT.search(row["Identifier"])[0]

    def owner(self, path: str, keys: Collection[str]) -> str | None:
        match = PATH.match(path)
        return match["number"] if match else None

    def own_part(self, path: str) -> str:
        match = PATH.match(path)
        return path[match.end() :].lstrip("/") if match else path

    def feedback(self, path: str, row: Mapping[str, str]) -> str:
        match = PATH.match(path)
        return f"{match['folder']}/feedback.html" if match else super().feedback(path, row)

    def gradebook(
        self, table: Table, grades: Mapping[str, Grade], title: str, out_of: float
    ) -> str:
        """The worksheet with grade and comment filled in; who has none keeps what stood there.

        Moodle refuses a grade above `Maximum Grade` (its `lang/en/assign.php` has the word in both
        cases); points are scaled to it where it differs.
        """
        found = table.copy()
        most, comments = found.find("Maximum Grade"), found.column("Feedback comments")
        for student, grade in grades.items():
            row = found.rows[found.line_of[student]]
            if grade.points is not None:
                highest = _number(row[most]) if most is not None else 0.0
                scale = highest / out_of if highest and out_of else 1.0
                row[found.column("Grade")] = show_points(grade.points * scale)
                row[comments] = grade.comment or row[comments]
        return found.text()


def _number(text: str) -> float:
    """`56.00` or `56,00`; 0 if it is none."""
    try:
        return float(text.strip().replace(",", "."))
    except ValueError:
        return 0.0
