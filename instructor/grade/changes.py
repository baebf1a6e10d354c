"""What the instructor changes by hand: a CSV that the grader reads at every run and never writes.

    student_id,exercise,points,weight,due,handed_in,comment
    s001,split_for,3,,,,explained it at the board
    s002,,,,2026-12-07T23:59,,was ill
    s003,,,,,2026-11-30T22:10,by mail
    *,learning_rate,,0,,,not taught yet: does not count

A row sets an exercise's points for a student, or says by when somebody may or did hand in, or, for
the student `*`, how much an exercise counts: 0 drops it, 2 doubles it. Columns may be left out. One
more, `group_of`, names who has handed in for this student as well.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from fitcast.units import Said, refusal

from ..assignment import Assignment, Exercise
from .marking import Mark
from .results import Result

COLUMNS = ("student_id", "exercise", "points", "weight", "due", "handed_in", "group_of", "comment")
EVERYBODY = "*"
MOST_WEIGHT = 100.0
NOTHING = "nothing was handed in"


@dataclass
class Changes:
    """By hand.

    Args:
        points: By student and exercise: what it gets, and why.
        weights: By exercise, how much it counts.
        due: By student, until when.
        handed_in: By student, when.
        groups: By student, who has handed in for them.
        comments: By student, for their page.
    """

    points: dict[tuple[str, str], tuple[float, str]] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    due: dict[str, datetime] = field(default_factory=dict)
    handed_in: dict[str, datetime] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    comments: dict[str, list[str]] = field(default_factory=dict)

    def out_of(self, assignment: Assignment) -> float:
        """Points of the assignment as it counts."""
        weights = self.weights
        return sum(e.points * weights.get(e.function, 1.0) for e in assignment.exercises)

    def apply(self, result: Result, exercises: Collection[Exercise]) -> None:
        """Put a student's changes into the result, beside what the grader found."""
        own = result.student_id
        by_hand = {name: change for (who, name), change in self.points.items() if who == own}
        if by_hand and not result.marks:
            problem = result.problem or NOTHING
            result.marks = [Mark(exercise, problem=problem) for exercise in exercises]
            result.status = "by hand"
        for number, mark in enumerate(result.marks):
            name = mark.exercise.function
            points, comment = by_hand.get(name, (None, ""))
            result.marks[number] = replace(
                mark, weight=self.weights.get(name, 1.0), by_hand=points, comment=comment
            )
        result.comment = " ".join(self.comments.get(own, []))


def read_changes(path: Path | None, assignment: Assignment, students: Collection[str]) -> Changes:
    """The changes of the file; none if there is no path.

    Raises:
        ValueError: A row names nobody or no exercise, or a cell is not what it should be.
    """
    found = Changes()
    if path is None:
        return found
    if not path.is_file():
        raise refusal("--changes", "be a file", str(path), "check the path")
    exercises = {exercise.function: exercise for exercise in assignment.exercises}
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        if unknown := set(rows.fieldnames or ["nothing"]) - set(COLUMNS):
            raise refusal(
                "--changes",
                f"have columns of {', '.join(COLUMNS)}",
                Said(", ".join(sorted(unknown))),
                "rename or delete them",
            )
        for number, row in enumerate(rows, start=2):
            cells = {name: (row.get(name) or "").strip() for name in COLUMNS}
            if any(cells.values()):
                _add(found, cells, exercises, students, f"line {number} of {path.name}")
    return found


def _add(
    found: Changes,
    cells: Mapping[str, str],
    exercises: Mapping[str, Exercise],
    students: Collection[str],
    where: str,
) -> None:
    """Take in one row."""
    own, name = cells["student_id"], cells["exercise"]
    if own != EVERYBODY and own not in students:
        raise _wrong("student_id", "be in the roster, or *", own, where)
    if name and name not in exercises:
        raise _wrong("exercise", f"be one of {', '.join(exercises)}", name, where)
    if own == EVERYBODY:
        if not name:
            raise _wrong("exercise", "say what counts otherwise for all", name, where)
        found.weights[name] = _number(cells["weight"], "weight", MOST_WEIGHT, where)
        return
    if cells["points"]:
        if not name:
            raise _wrong("exercise", "say what the points are for", name, where)
        points = _number(cells["points"], "points", exercises[name].points, where)
        found.points[own, name] = points, cells["comment"]
    elif cells["comment"]:
        found.comments.setdefault(own, []).append(cells["comment"])
    _add_handing_in(found, cells, students, where)


def _add_handing_in(
    found: Changes, cells: Mapping[str, str], students: Collection[str], where: str
) -> None:
    """Take in what a row says of when and by whom something was handed in."""
    own, other = cells["student_id"], cells["group_of"]
    for column, times in (("due", found.due), ("handed_in", found.handed_in)):
        if cells[column]:
            times[own] = _time(cells[column], column, where)
    if other and other not in students:
        raise _wrong("group_of", "be in the roster", other, where)
    if other:
        found.groups[own] = other


def _number(text: str, column: str, most: float, where: str) -> float:
    try:
        number = float(text.replace(",", "."))
    except ValueError:
        number = -1.0
    if not 0 <= number <= most:
        raise _wrong(column, f"be a number from 0 to {most:g}", text, where)
    return number


def _time(text: str, column: str, where: str) -> datetime:
    try:
        return local_time(text)
    except ValueError:
        raise _wrong(column, "look like 2026-11-30T23:59", text, where) from None


def local_time(text: str) -> datetime:
    """A time as files have it: local, without its zone.

    Raises:
        ValueError: It is no ISO 8601, or a day without a time, which would mean its start.
    """
    if not ({" ", "T"} & set(text)):
        raise ValueError("a day without a time")
    time = datetime.fromisoformat(text)
    return time.astimezone().replace(tzinfo=None) if time.tzinfo else time


def _wrong(column: str, rule: str, got: str, where: str) -> ValueError:
    return refusal(column, rule, Said(f"{got!r} in {where}"), "mend the row")
