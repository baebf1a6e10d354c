"""A notebook's own public cases, asked as grading will ask them: in the sandbox, under its limits.

    python -m instructor.selfcheck effective_batch effective_batch_s001.ipynb

For whoever has this folder: a student with the course's repository, a tutor, an instructor before
handing an assignment out. It needs no secret and knows no hidden case. Inside a notebook the check
below each function says when its answer comes late.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fitcast.units import Said, refusal

from ..assignment import Assignment, Case, Exercise, load, names
from ..sandbox.box import Sandbox
from ..sandbox.cage import LEVELS
from ..sandbox.reading import Reading, Rehearsal
from ..sandbox.talk import End, Job, Questions, shallow
from .exam import Exam, Paper
from .grading import failed, plans_of
from .marking import Mark, mark
from .matching import Attempt
from .submissions import Submission

GIVES = "def _public_cases(): return PUBLIC"


class Public(Questions):
    """Asks a notebook for its public cases."""

    def __init__(self, statements: Sequence[Sequence]):
        super().__init__([*statements, [0, GIVES]], "_public_cases")
        self.text = ""

    def next(self) -> tuple[Sequence, bool]:
        return [], False

    def receive(self, message: dict) -> bytes | None:
        self.text = str(message.get("value", ""))
        return None

    def ended(self, end: End) -> Sequence[Job]:
        return ()


class Timed(Exam):
    """An exam that keeps the CPU time of its children, together."""

    taken = 0.0

    def ended(self, end: End) -> Iterator[Job]:
        taken = self.taken + end.cpu_seconds
        for job in super().ended(end):
            job.taken = taken
            yield job
        self.taken = taken


def own_check(
    assignment: Assignment, path: Path, level: str | None = None
) -> Iterator[tuple[Exercise, Mark, float]]:
    """Each exercise with what its public cases get, and the CPU seconds that they took.

    Args:
        assignment: Which.
        path: The notebook.
        level: Of the sandbox; the strongest that works here if None.

    Raises:
        ValueError: It is no notebook of the assignment.
    """
    functions = [exercise.function for exercise in assignment.exercises]
    with Sandbox(level) as sandbox:
        reading = Reading(path.read_bytes(), functions)
        [*_] = sandbox.run([reading])
        if "unreadable" in reading.about:
            raise ValueError(f"{path} cannot be graded: {reading.about['unreadable']}")
        attempt = Attempt(Submission(path.name, None, path.read_bytes), reading.about)
        *_, rehearsal = sandbox.run([Rehearsal(reading.about["statements"])])
        attempt.rehearsal = json.loads(json.dumps(rehearsal.about))
        public = Public(reading.about["statements"])
        [*_] = sandbox.run([public])
        for exercise in assignment.exercises:
            about = reading.about["functions"][exercise.function]
            if "problem" in about:
                yield exercise, Mark(exercise, problem=about["problem"]), 0.0
                continue
            cases = _cases(public.text, exercise, path)
            plans, seconds = plans_of(attempt, exercise.function), rehearsal.seconds
            *_, exam = sandbox.run([Timed(Paper(exercise, cases, plans), seconds)])
            why = failed(attempt, exercise.function)
            yield (
                exercise,
                mark(exercise, cases, exam.paper.replies, about["notes"], why),
                exam.taken,
            )


def _cases(text: str, exercise: Exercise, path: Path) -> list[Case]:
    try:
        public = json.loads(text)
        cases = public[exercise.function]["cases"] if shallow(public) else None
        return [
            Case(points=1.0, **case | {"arguments": tuple(case["arguments"])}) for case in cases
        ]
    except (ValueError, TypeError, KeyError):
        raise refusal(
            "the notebook",
            f"hold the public cases of {exercise.function}",
            Said(f"{str(path)!r} without them"),
            "check the assignment's name, and that the cell with PUBLIC is there",
        ) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a case is not right, 2 and a sentence when it cannot check."""
    parser = argparse.ArgumentParser(
        prog="python -m instructor.selfcheck",
        description="Ask a notebook's public cases with the grader's limits.",
    )
    parser.add_argument("assignment", metavar="ASSIGNMENT", help=f"one of {', '.join(names())}")
    parser.add_argument("notebook", metavar="NOTEBOOK", type=Path)
    parser.add_argument("--sandbox", choices=LEVELS, help="instead of the strongest that works")
    options = parser.parse_args(arguments)
    wrong = 0
    try:
        assignment = load(options.assignment)
        for exercise, found, taken in own_check(assignment, options.notebook, options.sandbox):
            wrong += not found.right
            print(
                f"{exercise.function}: {found.reason} ({taken:.1f} of {exercise.cpu_seconds:g} s)"
            )
    except (ValueError, OSError) as error:
        print(f"Nothing checked: {error}", file=sys.stderr)
        return 2
    return 1 if wrong else 0
