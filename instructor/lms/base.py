"""What the grader asks of a learning platform; `PLAIN` is none."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from .cells import safe_row


@dataclass(frozen=True)
class Grade:
    """What a student gets, as a platform is told.

    Args:
        points: None if there is nothing to enter: missing, or refused.
        comment: A line for the student.
        file: The path of what was graded; empty if nothing was.
    """

    points: float | None
    comment: str = ""
    file: str = ""


class Platform:
    """A learning platform. This one is a plain CSV with `student_id,name`, which nobody imports."""

    name = ""
    columns: tuple[str, ...] = ("student_id", "name")
    times = "files"  # how late somebody is: by the files' times, or only what `late` says of a path

    def fits(self, header: Sequence[str]) -> bool:
        """Whether a table with this header is one that the platform exports."""
        return set(self.columns) <= set(header)

    def student(self, row: Mapping[str, str]) -> dict[str, str] | None:
        """A row with `student_id` and `name`; None if it is no student's."""
        return dict(row)

    def key(self, row: Mapping[str, str]) -> str:
        """What the platform calls the student in a file's path; empty if it does not."""
        return ""

    def owner(self, path: str, keys: Collection[str]) -> str | None:
        """The `key` of the student to whom the platform's part of a path leads; None if to nobody.

        It need not be one of `keys`: a student who has left the class still has a number.
        """
        return None

    def own_part(self, path: str) -> str:
        """The part of a path that is the student's own choice."""
        return path

    def ignores(self, path: str) -> bool:
        """Whether a file is no part of what is handed in."""
        return False

    def late(self, path: str) -> bool:
        """Whether the path says that the platform took it late."""
        return False

    def feedback(self, path: str, row: Mapping[str, str]) -> str:
        """Where a page of feedback belongs in the zip that the platform takes back."""
        return f"{PurePosixPath(path).stem or row['student_id']}.html"

    def gradebook(
        self, table: Table, grades: Mapping[str, Grade], title: str, out_of: float
    ) -> str:
        """The table with the grades in it, as the platform imports it; empty if it has none.

        Args:
            table: As it was exported.
            grades: By student id.
            title: The assignment's.
            out_of: Its points.
        """
        return ""


@dataclass
class Table:
    """A CSV as it was exported, and who its rows are.

    Args:
        platform: Whose.
        header: Its columns.
        rows: Its lines, each as long as the header.
        students: The roster.
        line_of: By student id, which of the rows.
    """

    platform: Platform
    header: list[str]
    rows: list[list[str]]
    students: list[dict[str, str]] = field(default_factory=list)
    line_of: dict[str, int] = field(default_factory=dict)

    def find(self, name: str) -> int | None:
        """The place of a column, in upper or lower case; None if there is none."""
        wanted = name.casefold()
        return next((n for n, c in enumerate(self.header) if c.casefold() == wanted), None)

    def column(self, name: str) -> int:
        """The place of a column, added at the end if there is none."""
        found = self.find(name)
        if found is not None:
            return found
        self.header.append(name)
        for row in self.rows:
            row.append("")
        return len(self.header) - 1

    def copy(self) -> Table:
        """One that may be changed."""
        rows = [list(row) for row in self.rows]
        return Table(self.platform, list(self.header), rows, self.students, self.line_of)

    def text(self) -> str:
        """The CSV."""
        out = io.StringIO()
        rows = [self.header, *map(safe_row, self.rows)]
        csv.writer(out, lineterminator="\r\n").writerows(rows)
        return out.getvalue()


def show_points(points: float) -> str:
    """Points as every platform reads them: `2.5`, `2`, at most two decimals."""
    return f"{round(points, 2):g}"


PLAIN = Platform()
