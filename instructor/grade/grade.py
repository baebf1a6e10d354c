"""Grade what came back, in one command.

    python -m instructor.grade effective_batch submissions.zip --roster roster.csv \\
        --secret-file secret.txt --out graded/grades.csv

Next to the CSV it writes `class_report.html`, a page a student into `feedback/`, and a journal: an
interrupted run goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from ..assignment import Assignment, load, names, read_secret
from ..report.class_report import class_report
from ..report.feedback import feedback
from ..report.table import table
from ..sandbox.box import Sandbox
from ..sandbox.cage import LEVELS
from .grading import Grader
from .journal import Journal
from .results import ClassResult, write
from .roster import file_name, read_roster
from .submissions import collect

BAR = 30  # characters
WEAK = """This machine offers no sandbox that holds against an attack, only one against accidents:
{problems}
A hostile notebook could read your secret, the roster and other students' work. Grade on Linux (a
container or WSL will do), or read the notebooks first and add --accept-weak-sandbox."""


def grade(
    assignment: Assignment,
    submissions: Path,
    roster: Path,
    secret_file: Path,
    out: Path,
    due: datetime | None = None,
    level: str | None = None,
    weak: bool = False,
    python: str | None = None,
) -> ClassResult:
    """Grade a class and write everything next to `out`.

    Args:
        assignment: What was handed out.
        submissions: Folder or zip.
        roster: CSV with student_id,name.
        secret_file: Holds the instructor's secret.
        out: The CSV to write.
        due: Later files are listed as late; local time.
        level: Of the sandbox; the strongest that works here if None.
        weak: Whether a sandbox that only keeps out accidents will do.
        python: That runs the students' code; the grader's own if None.

    Raises:
        ValueError: An input is not what it should be, or the sandbox is too weak.
    """
    rows, secret = read_roster(roster), read_secret(secret_file)
    files = collect(submissions)
    if not importlib.util.find_spec("IPython"):
        raise ValueError(
            "IPython must be installed, which knows a notebook's magics, got none; "
            "pip install ipython"
        )
    if any(e.needs_torch for e in assignment.exercises) and not importlib.util.find_spec("torch"):
        raise ValueError(
            f"torch must be installed to grade {assignment.name}, got none; pip install torch"
        )
    if out.is_dir():
        raise ValueError(
            f"--out must be the CSV to write, got the folder {str(out)!r}; name a "
            f"file in it: {str(out / 'grades.csv')!r}"
        )
    if out.resolve().is_relative_to(submissions.resolve()):
        raise ValueError(
            f"--out must lie outside of the submissions, got {str(out)!r}; the next "
            "run would take it for one"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        Sandbox(level, python=python) as sandbox,
        Journal(out.with_suffix(".journal.jsonl")) as journal,
    ):
        if sandbox.level == "hook" and not weak:
            problems = "\n".join(f"- {name}: {why}" for name, why in sandbox.passed_over.items())
            raise ValueError(WEAK.format(problems=problems or "- it was asked for"))
        print(f"Sandbox in force: {sandbox.says}", file=sys.stderr)
        found = Grader(assignment, rows, secret, sandbox, journal, due, Progress()).grade(files)
    for result in found.results:
        page = out.parent / "feedback" / file_name(assignment.name, result.student_id)
        if result.status == "missing":
            page.with_suffix(".html").unlink(missing_ok=True)  # of an earlier run
        else:
            write(page.with_suffix(".html"), feedback(assignment, result))
    write(out.parent / "class_report.html", class_report(assignment, found))
    write(out, table(assignment, found.results))
    return found


class Progress:
    """A bar on standard error; a line each tenth where that is no terminal."""

    def __init__(self) -> None:
        self._start, self._said = time.monotonic(), -1

    def __call__(self, done: int, total: int) -> None:
        step = (100 if sys.stderr.isatty() else 10) * done // max(1, total)
        if step == self._said:
            return
        self._said = step
        seconds = time.monotonic() - self._start
        full = BAR * done // max(1, total)
        text = f"[{'#' * full}{'.' * (BAR - full)}] {done}/{total}, {seconds:.0f} s"
        end = "\n" if done == total or not sys.stderr.isatty() else ""
        print(("\r" if sys.stderr.isatty() else "") + text, end=end, file=sys.stderr, flush=True)


def local_time(text: str) -> datetime:
    """A time as files have it: local, without its zone.

    Raises:
        ArgumentTypeError: It is no ISO 8601, or a day without a time, which would mean its start.
    """
    try:
        time_ = datetime.fromisoformat(text if re.search("[T ]", text) else "")
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"--due must look like 2026-11-30T23:59, got {text!r}; write the day and the time so"
        ) from None
    return time_.astimezone().replace(tzinfo=None) if time_.tzinfo else time_


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 and a sentence when it cannot do what is asked, 130 when interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m instructor.grade", description="Grade a class's notebooks."
    )
    parser.add_argument("assignment", metavar="ASSIGNMENT", help=f"one of {', '.join(names())}")
    parser.add_argument("submissions", metavar="SUBMISSIONS", type=Path, help="folder or zip")
    parser.add_argument("--roster", type=Path, required=True, help="CSV with student_id,name")
    parser.add_argument(
        "--secret-file",
        type=Path,
        required=True,
        help="the secret that the notebooks were built with",
    )
    parser.add_argument("--out", type=Path, required=True, help="the CSV to write")
    parser.add_argument(
        "--due",
        type=local_time,
        metavar="TIME",
        help="list later files as late, e.g. 2026-11-01T23:59, local time",
    )
    parser.add_argument("--sandbox", choices=LEVELS, help="instead of the strongest that works")
    parser.add_argument(
        "--accept-weak-sandbox",
        action="store_true",
        help="grade although a hostile notebook could read your files",
    )
    parser.add_argument(
        "--python",
        metavar="PYTHON",
        help="that runs the students' code, e.g. python3.13; the grader's own if left out",
    )
    options = parser.parse_args(arguments)
    try:
        assignment = load(options.assignment)
        found = grade(
            assignment,
            options.submissions,
            options.roster,
            options.secret_file,
            options.out,
            options.due,
            options.sandbox,
            options.accept_weak_sandbox,
            options.python,
        )
    except (ValueError, OSError) as error:
        print(f"Nothing graded: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    status = [result.status for result in found.results]
    print(
        f"{status.count('graded')} graded, {status.count('refused')} refused, "
        f"{status.count('missing')} missing, {sum(bool(r.flags) for r in found.results)} to look "
        f"at: {options.out}, {options.out.parent / 'class_report.html'}, feedback/"
    )
    return 0
