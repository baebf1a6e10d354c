"""GitHub Classroom: the roster's CSV, and the folder that `gh classroom clone` makes.

Paths are `effective-batch-submissions/effective-batch-octocat/...`: a repository for each student,
named after the assignment and the GitHub user. There is no import of grades; what is written is
what `gh classroom assignment-grades` writes, for whatever reads that, and a page of feedback for
each repository.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import PurePosixPath

from .base import Grade, Platform, Table, show_points


class GitHub(Platform):
    """The roster is that of the classroom; `identifier` is the student's id."""

    name = "GitHub Classroom"
    columns = ("identifier", "github_username", "name")
    times = "marks"  # files have the time of the clone

    def student(self, row: Mapping[str, str]) -> dict[str, str] | None:
        own = row["identifier"].strip()
        if not own:
            return None
        name, user = row["name"].strip(), row["github_username"].strip()
        return {"student_id": own, "name": name or own, "github_username": user}

    def key(self, row: Mapping[str, str]) -> str:
        return row["github_username"].casefold()

    def owner(self, path: str, keys: Collection[str]) -> str | None:
        """The repository's name ends in a user's; the longest one, as users may have hyphens."""
        name = _repository(path).casefold()
        users = [key for key in keys if name == key or name.endswith(f"-{key}")]
        return max(users, key=len, default=None)

    def own_part(self, path: str) -> str:
        return PurePosixPath(path).name

    def ignores(self, path: str) -> bool:
        """A repository has other files than the notebook."""
        return PurePosixPath(path).suffix.lower() != ".ipynb"

    def feedback(self, path: str, row: Mapping[str, str]) -> str:
        return f"{_repository(path)}/feedback.html" if path else super().feedback(path, row)

    def gradebook(
        self, table: Table, grades: Mapping[str, Grade], title: str, out_of: float
    ) -> str:
        found = Table(
            self,
            [
                "assignment_name",
                "github_username",
                "roster_identifier",
                "student_repository_name",
                "points_awarded",
                "points_available",
            ],
            [],
        )
        users = {row["student_id"]: row["github_username"] for row in table.students}
        for student, grade in grades.items():
            if grade.points is not None:
                points = show_points(grade.points), show_points(out_of)
                row = [title, users[student], student, _repository(grade.file), *points]
                found.rows.append(row)
        return found.text()


def _repository(path: str) -> str:
    """The folder of a repository, below the one that `gh` makes for all of them."""
    folders = PurePosixPath(path).parts[:-1]
    return "" if not folders else folders[0] if len(folders) == 1 else folders[1]
