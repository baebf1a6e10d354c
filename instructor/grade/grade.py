"""Grade what came back, in one command.

    python -m instructor.grade effective_batch submissions.zip --roster roster.csv \\
        --secret-file secret.txt --out graded/grades.csv

Next to the CSV it writes `class_report.html`, a page a student into `feedback/`, all of them in
`feedback.zip`, for an LMS's roster its `gradebook.csv`, and a journal: an interrupted run goes on
where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fitcast.units import Said, refusal

from ..assignment import Assignment, load, names, read_secret
from ..lms.base import PLAIN, Grade, Table
from ..lms.known import of_path
from ..report.class_report import class_report
from ..report.feedback import feedback
from ..report.table import table
from ..sandbox.box import Sandbox
from ..sandbox.cage import LEVELS
from .changes import local_time, read_changes
from .grading import Grader
from .journal import Journal
from .late import Policy
from .results import ClassResult, Result, write, write_zip
from .roster import file_name, read_class
from .submissions import collect

BAR = 30  # characters
LOOK_FIRST = 4  # exit code
WEAK = """This machine offers no sandbox that holds against an attack, only one against accidents:
{problems}
A hostile notebook could read your secret, the roster and other students' work. Grade on Linux (a
container or WSL will do), or read the notebooks first and add --accept-weak-sandbox."""


@dataclass(frozen=True)
class How:
    """How a class is graded; what is left out is as for most classes.

    Args:
        level: Of the sandbox; the strongest that works here if None.
        weak: Whether a sandbox that only keeps out accidents will do.
        python: That runs the students' code; the grader's own if None.
        due: When it was due, local time; nobody is late if None.
        late_percent: Of the points, for each day that has begun after that.
        late_most: Percent at most.
        grace_minutes: That cost nothing.
        changes: CSV of what is changed by hand.
        again: Students whose functions are asked again.
    """

    level: str | None = None
    weak: bool = False
    python: str | None = None
    due: datetime | None = None
    late_percent: float = 0.0
    late_most: float = 100.0
    grace_minutes: float = 0.0
    changes: Path | None = None
    again: tuple[str, ...] = ()


def grade(
    assignment: Assignment,
    submissions: Path | Sequence[Path],
    roster: Path,
    secret_file: Path,
    out: Path,
    **how: Any,
) -> ClassResult:
    """Grade a class and write everything next to `out`.

    Args:
        assignment: What was handed out.
        submissions: Folder or zip, or several: what came by mail, beside a platform's zip.
        roster: CSV with student_id,name, or an export of Canvas, Moodle or GitHub Classroom.
        secret_file: Holds the instructor's secret.
        out: The CSV to write.
        how: Fields of `How`.

    Raises:
        ValueError: An input is not what it should be, or the sandbox is too weak.
    """
    wanted = How(**how)
    class_list, secret = read_class(roster), read_secret(secret_file)
    students = {row["student_id"] for row in class_list.students}
    changes = read_changes(wanted.changes, assignment, students)
    if unknown := set(wanted.again) - students:
        raise refusal("--again", "name students of the roster", sorted(unknown)[0], "check the id")
    policy = Policy(
        wanted.due, changes.due, wanted.late_percent, wanted.late_most, wanted.grace_minutes
    )
    places = [submissions] if isinstance(submissions, Path) else submissions
    files = [file for place in places for file in collect(place)]
    _check_installed(assignment)
    for place in places:
        _check_out(out, place)
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        Journal(out.with_suffix(".journal.jsonl")) as journal,
        Sandbox(wanted.level, python=wanted.python) as sandbox,
    ):
        if sandbox.level == "hook" and not wanted.weak:
            problems = "\n".join(f"- {name}: {why}" for name, why in sandbox.passed_over.items())
            raise ValueError(WEAK.format(problems=problems or "- it was asked for"))
        print(f"Sandbox in force: {sandbox.says}", file=sys.stderr)
        grader = Grader(
            assignment,
            class_list.students,
            secret,
            sandbox,
            journal,
            class_list.platform,
            policy,
            changes,
            wanted.again,
            Progress(),
        )
        found = grader.grade(files)
    _write(assignment, found, class_list, out)
    return found


def _check_installed(assignment: Assignment) -> None:
    """Raises ValueError if a package is missing that grading needs."""
    if not importlib.util.find_spec("IPython"):
        raise refusal(
            "IPython",
            "be installed, which knows a notebook's magics",
            Said("none"),
            "pip install ipython",
        )
    if any(e.needs_torch for e in assignment.exercises) and not importlib.util.find_spec("torch"):
        raise refusal(
            "torch", f"be installed to grade {assignment.name}", Said("none"), "pip install torch"
        )


def _check_out(out: Path, submissions: Path) -> None:
    """Raises ValueError if what is written would be in the way."""
    if out.is_dir():
        raise refusal(
            "--out",
            "be the CSV to write",
            Said(f"the folder {str(out)!r}"),
            f"name a file in it: {str(out / 'grades.csv')!r}",
        )
    if out.resolve().is_relative_to(submissions.resolve()):
        raise refusal(
            "--out",
            "lie outside of the submissions",
            str(out),
            "the next run would take it for one",
        )


def _write(assignment: Assignment, found: ClassResult, roster: Table, out: Path) -> None:
    """Write the pages, the lists, and what goes back to a platform."""
    pages: dict[str, str] = {}
    for result in found.results:
        name = Path(file_name(assignment.name, result.student_id)).with_suffix(".html").name
        page = out.parent / "feedback" / name
        if result.status == "missing":
            page.unlink(missing_ok=True)  # of an earlier run
            continue
        text = feedback(assignment, result, found.out_of)
        write(page, text)
        sent = _sent(result, roster, name)
        # Two files' names may lead to one, and no page may take the place of another's.
        pages[sent if sent not in pages else name] = text
    write_zip(out.parent / "feedback.zip", pages)
    write(out.parent / "class_report.html", class_report(assignment, found))
    write(out, table(assignment, found))
    grades = {r.student_id: Grade(*_told(r)) for r in found.results}
    book = roster.platform.gradebook(roster, grades, assignment.title, found.out_of)
    if book:
        write(out.parent / "gradebook.csv", book)


def _sent(result: Result, roster: Table, name: str) -> str:
    """Where a page belongs in the zip: `name`, where the file's path leads to nobody or another.

    A group has one file, which leads to who handed it in; that one is not sent the others' pages.
    """
    platform = of_path(result.file, roster.platform)
    keys = [roster.platform.key(row) for row in roster.students]
    owner, own = platform.owner(result.file, keys), roster.platform.key(result.row)
    if platform is PLAIN or (own and owner not in (None, own)):
        return name
    return platform.feedback(result.file, result.row)


def _told(result: Result) -> tuple[float | None, str, str]:
    """What a platform is told of a student: points or none, a comment, the file."""
    late = f"{result.late} late" if result.late else ""
    late += f", which costs {100 * result.penalty:g} %" if result.penalty else ""
    said = "; ".join(filter(None, [result.comment, late]))
    return (result.score if result.scored else None), said, result.file


class Progress:
    """A bar on standard error for each stage; a line each tenth where that is no terminal."""

    def __init__(self) -> None:
        self._start, self._said = time.monotonic(), ("", -1)

    def __call__(self, stage: str, done: int, total: int) -> None:
        step = stage, (100 if sys.stderr.isatty() else 10) * done // max(1, total)
        if step == self._said:
            return
        self._said = step
        seconds = time.monotonic() - self._start
        full = BAR * done // max(1, total)
        text = f"[{'#' * full}{'.' * (BAR - full)}] {done}/{total} {stage}, {seconds:.0f} s"
        end = "\n" if done == total or not sys.stderr.isatty() else ""
        print(("\r" if sys.stderr.isatty() else "") + text, end=end, file=sys.stderr, flush=True)


def due_time(text: str) -> datetime:
    """A time on the command line.

    Raises:
        ArgumentTypeError: It is none.
    """
    try:
        return local_time(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"--due must look like 2026-11-30T23:59, got {text!r}; write the day and the time so"
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m instructor.grade", description="Grade a class's notebooks."
    )
    add = parser.add_argument
    add("assignment", metavar="ASSIGNMENT", help=f"one of {', '.join(names())}")
    add("submissions", metavar="SUBMISSIONS", type=Path, nargs="+", help="folders or zips")
    add("--roster", type=Path, required=True, help="CSV with student_id,name, or an LMS's export")
    add(
        "--secret-file",
        type=Path,
        required=True,
        help="the secret that the notebooks were built with",
    )
    add("--out", type=Path, required=True, help="the CSV to write")
    add("--changes", type=Path, help="CSV of points, weights, due times that you set by hand")
    add("--again", metavar="STUDENT", nargs="+", default=(), help="run these students' code anew")
    late = parser.add_argument_group("lateness")
    late.add_argument(
        "--due",
        type=due_time,
        metavar="TIME",
        help="list later files as late, e.g. 2026-11-01T23:59, local time",
    )
    late.add_argument("--late-percent", type=float, default=0.0, help="of the points, a day begun")
    late.add_argument("--late-most", type=float, default=100.0, help="percent, at most")
    late.add_argument("--grace-minutes", type=float, default=0.0, help="that cost nothing")
    code = parser.add_argument_group("where the students' code runs")
    code.add_argument("--sandbox", choices=LEVELS, help="instead of the strongest that works")
    code.add_argument(
        "--accept-weak-sandbox",
        action="store_true",
        help="grade although a hostile notebook could read your files",
    )
    code.add_argument(
        "--python", help="that runs it, e.g. python3.13; the grader's own if left out"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line.

    Returns:
        0; 4 if all is written and something should be looked at before any grade is handed out; 2
        and a sentence when it cannot do what is asked; 130 when interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        found = grade(
            load(options.assignment),
            options.submissions,
            options.roster,
            options.secret_file,
            options.out,
            level=options.sandbox,
            weak=options.accept_weak_sandbox,
            python=options.python,
            due=options.due,
            late_percent=options.late_percent,
            late_most=options.late_most,
            grace_minutes=options.grace_minutes,
            changes=options.changes,
            again=tuple(options.again),
        )
    except (ValueError, OSError) as error:
        print(f"Nothing graded: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    for warning in found.warnings:
        print(f"Look at this first: {warning}", file=sys.stderr)
    status = Counter(result.status for result in found.results)
    by_hand = f"{status['by hand']} by hand, " if status["by hand"] else ""
    sent = [n for n in ("gradebook.csv", "feedback.zip") if (options.out.parent / n).exists()]
    print(
        f"{status['graded']} graded, {status['refused']} refused, {status['missing']} missing, "
        f"{by_hand}{sum(bool(r.flags) for r in found.results)} to look at: {options.out}, "
        f"{options.out.parent / 'class_report.html'}, {' and '.join(sent)}"
    )
    return LOOK_FIRST if found.warnings else 0
