"""The class list, a CSV: `student_id,name`, or what Canvas, Moodle or GitHub Classroom exports."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import unicodedata
from pathlib import Path

from fitcast.units import Said, refusal

from ..lms.base import Table
from ..lms.known import of_table


def read_roster(path: str | Path) -> list[dict[str, str]]:
    """One dictionary per student, in the file's order: `student_id`, `name`, other columns.

    Raises:
        ValueError: It is no such file, a column is missing, an id is empty or there twice.
    """
    return read_class(path).students


def read_class(path: str | Path) -> Table:
    """The class list with the table that it came in.

    Raises:
        ValueError: As `read_roster`.
    """
    text = _text(path)
    header, *lines = [*csv.reader(io.StringIO(text, newline=""))] or [[]]
    header = [name.strip() for name in header]
    platform = of_table(header)
    if platform is None or not any(map(any, lines)):
        raise refusal(
            "roster",
            "have the columns student_id,name and a student",
            text.splitlines()[:1],
            "write them in its first line, or export the list from your platform in English",
        )
    table = Table(platform, header, [(row + [""] * len(header))[: len(header)] for row in lines])
    for number, line in enumerate(table.rows):
        cells = [cell.strip() for cell in line]
        student = any(cells) and platform.student(dict(zip(header, cells, strict=True)))
        if not student:
            continue
        own = student["student_id"]
        if not own or own in table.line_of:
            raise refusal(
                "student_id",
                "be there once for each student",
                Said(f"{own!r} for {student['name']!r}"),
                "mend the roster",
            )
        table.line_of[own] = number
        table.students.append(student)
    return table


def _text(path: str | Path) -> str:
    if not Path(path).is_file():
        raise refusal("--roster", "be a file", str(path), "see step 2 of instructor/README.md")
    try:
        text = Path(path).read_text("utf-8-sig")  # spreadsheets put a mark in front
    except UnicodeDecodeError:
        got = Said(f"{str(path)!r}, which is not")
        raise refusal("roster", "be UTF-8 text", got, "save it as CSV UTF-8") from None
    first = text.partition("\n")[0].strip()
    if "," not in first and (";" in first or "\t" in first):
        raise refusal(
            "roster", "have the columns student_id,name", first, "separate columns by commas"
        )
    return text


def fold(text: str) -> str:
    """An id or a name without what cannot be seen: case, white space around, Unicode's form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).strip()


def file_name(assignment: str, student_id: str) -> str:
    """The name of a student's notebook, safe in any folder, different for different ids."""
    safe = re.sub(r"[^A-Za-z0-9-]", "-", student_id)
    if safe != student_id:
        safe += "-" + hashlib.sha256(student_id.encode()).hexdigest()[:6]
    return f"{assignment}_{safe}.ipynb"
