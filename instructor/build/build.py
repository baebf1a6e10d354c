"""Build an assignment: students' notebooks, the answer key and the rubric.

    python -m instructor.build effective_batch --out class/effective_batch
    python -m instructor.build effective_batch --out class/effective_batch \\
        --roster class/roster.csv --secret-file class/secret.txt

Without a roster there is one notebook for all, with the same public numbers; with one, each student
gets a notebook with their own id and numbers. The hidden numbers are each student's own in both
ways, and are in neither notebook.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat

from fitcast.units import Said, refusal

from ..assignment import load, names, numbers, read_secret
from ..grade.roster import file_name, read_roster
from ..grade.rubric import rubric
from .nbgrader import nbgrader_source
from .notebooks import answer_key, student_notebook


def build(
    name: str,
    out: Path,
    roster: Path | None = None,
    secret_file: Path | None = None,
    nbgrader: bool = False,
) -> list[Path]:
    """Write everything an instructor needs to hand an assignment out.

    Args:
        name: Of the assignment.
        out: Folder for the key and the rubric; students' notebooks go into its `students`.
        roster: For a notebook of their own for each student.
        secret_file: Holds the instructor's secret; goes with a roster and with nbgrader.
        nbgrader: Also write the source notebook of an nbgrader class.

    Returns:
        The files written.

    Raises:
        ValueError: No such assignment, a roster without a secret, or a faulty roster.
    """
    assignment, secret = load(name), read_secret(secret_file) if secret_file else None
    if secret is None and (roster or nbgrader):
        raise refusal(
            "--secret-file",
            "be given with --roster and --nbgrader",
            Said("none"),
            "students' numbers come from it, and grading needs the same one",
        )
    files = {f"{name}_answer_key.ipynb": answer_key(assignment)}
    if nbgrader:
        files[f"nbgrader/source/{name}/{name}.ipynb"] = nbgrader_source(assignment, secret)
    if roster is None:
        files[f"students/{name}.ipynb"] = student_notebook(assignment)
    else:
        for row in read_roster(roster):
            own = numbers(name, row["student_id"], secret)
            files[f"students/{file_name(name, own.student_id)}"] = student_notebook(assignment, own)
    for path, notebook in files.items():
        nbformat.validate(notebook)
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text(nbformat.writes(notebook) + "\n", "utf-8")
    (out / f"{name}_rubric.md").write_text(rubric(assignment), "utf-8")
    return [out / path for path in (*files, f"{name}_rubric.md")]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 and a sentence when it cannot do what is asked."""
    parser = argparse.ArgumentParser(
        prog="python -m instructor.build", description="Build an assignment for your class."
    )
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(names())}")
    parser.add_argument("--roster", type=Path, help="CSV with student_id,name: one notebook each")
    parser.add_argument("--secret-file", type=Path, help="your secret; needed with --roster")
    parser.add_argument("--nbgrader", action="store_true", help="also write an nbgrader source")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    options = parser.parse_args(arguments)
    try:
        written = build(
            options.name, options.out, options.roster, options.secret_file, options.nbgrader
        )
    except (ValueError, OSError) as error:
        print(f"Nothing built: {error}", file=sys.stderr)
        return 2
    students = [path for path in written if path.parent.name == "students"]
    print(f"{len(students)} student notebook{'s'[: len(students) > 1]} in {options.out}/students")
    print(f"answer key and rubric, for you alone, in {options.out}")
    return 0
