"""The class list: `student_id,name` in a CSV, other columns kept; and the names of its files."""

from __future__ import annotations

import csv
import hashlib
import re
from pathlib import Path


def read_roster(path: str | Path) -> list[dict[str, str]]:
    """One dictionary per student, in the file's order.

    Raises:
        ValueError: It is no such file, a column is missing, an id is empty or there twice.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"--roster must be a file, got {str(path)!r}; see step 2 of instructor/README.md"
        )
    try:
        text = Path(path).read_text("utf-8-sig")  # spreadsheets put a mark in front
    except UnicodeDecodeError:
        raise ValueError(
            f"roster must be UTF-8 text, got {str(path)!r}, which is not; save it as CSV UTF-8"
        ) from None
    first = text.partition("\n")[0].strip()
    if "," not in first and (";" in first or "\t" in first):
        raise ValueError(
            f"roster must have the columns student_id,name, got {first!r}; separate "
            "columns by commas"
        )
    rows = [
        {
            (key or "").strip(): (value or "").strip()
            for key, value in row.items()
            if not isinstance(value, list)
        }
        for row in csv.DictReader(text.splitlines())
    ]
    for column in ("student_id", "name"):
        if not rows or column not in rows[0]:
            raise ValueError(
                f"roster must have the columns student_id,name and a student, got "
                f"{text.splitlines()[:1]}; write them in its first line"
            )
    seen: set[str] = set()
    for row in rows:
        if not row["student_id"] or row["student_id"] in seen:
            raise ValueError(
                f"student_id must be there once for each student, got "
                f"{row['student_id']!r} for {row['name']!r}; mend the roster"
            )
        seen.add(row["student_id"])
    return rows


def file_name(assignment: str, student_id: str) -> str:
    """The name of a student's notebook, safe in any folder, different for different ids."""
    safe = re.sub(r"[^A-Za-z0-9-]", "-", student_id)
    if safe != student_id:
        safe += "-" + hashlib.sha256(student_id.encode()).hexdigest()[:6]
    return f"{assignment}_{safe}.ipynb"
