"""What an assignment is: exercises, each a function that a student writes and cases that judge it.

A student's numbers come from the student's id and the instructor's secret by HMAC-SHA256, so they
are the same on every machine and nobody without the secret can foresee the hidden ones. Needs the
standard library only. Not here: running a student's code (`sandbox`), building notebooks (`build`).
"""

from __future__ import annotations

import functools
import hmac
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fitcast.units import refusal

ASSIGNMENTS = Path(__file__).parent / "assignments"
SHORTEST_SECRET = 16  # characters
TOO_MANY = "too many questions"  # the mistake of a function that asks an oracle too often


@dataclass(frozen=True)
class Case:
    """One test of one exercise for one student; all values are JSON's.

    Args:
        name: Its idea; shown to the student ("8 steps with a rest").
        arguments: What the student's function is called with.
        expected: The right answer. It never enters the process that runs a student's code.
        points: For an answer equal to `expected`.
        hidden: Feedback then names the idea, not the numbers; and it is in no student's notebook.
        rel_tolerance: Relative error of a number that still passes.
        mistakes: Name of a known mistake to the answer that it leads to (never `expected`).
        oracle: Name of a question that the function may ask, as its last argument.
        most_questions: How often it may ask; one more fails the case as `TOO_MANY`.
        knows: What the oracle answers from. It never enters the child either.
    """

    name: str
    arguments: tuple
    expected: Any
    points: float
    hidden: bool = False
    rel_tolerance: float = 0.0
    mistakes: Mapping[str, Any] = field(default_factory=dict)
    oracle: str | None = None
    most_questions: int = 0
    knows: Any = None


class Draw:
    """Numbers drawn one after the other from a key: the same on every machine and Python."""

    def __init__(self, key: str, label: str):
        self._key, self._label, self._count = key.encode(), label, 0

    def integer(self, low: int, high: int, step: int = 1) -> int:
        """One of low, low + step, ..., at most `high`."""
        self._count += 1
        message = f"{self._label}|{self._count}".encode()
        digest = hmac.digest(self._key, message, "sha256")
        # 256 bits: the remainder's bias is far below anything a class could notice.
        return low + step * (int.from_bytes(digest, "big") % ((high - low) // step + 1))

    def choice(self, options: Sequence) -> Any:
        """One of them."""
        return options[self.integer(0, len(options) - 1)]

    def several(self, count: int, low: int, high: int) -> list[int]:
        """Different integers, in the order drawn."""
        found: list[int] = []
        while len(found) < count:
            number = self.integer(low, high)
            if number not in found:
                found.append(number)
        return found


@dataclass(frozen=True)
class Numbers:
    """One student's source of numbers for one assignment; made by `numbers`."""

    assignment: str
    student_id: str
    secret: str = field(repr=False)

    def public(self, label: str) -> Draw:
        """Draws for what goes into the student's notebook."""
        return self._draw("public", label)

    def hidden(self, label: str) -> Draw:
        """Draws for what never leaves the instructor."""
        return self._draw("hidden", label)

    def _draw(self, part: str, label: str) -> Draw:
        # repr() of the tuple: no two lists of strings share it, whatever an id contains.
        return Draw(self.secret, repr((part, self.assignment, self.student_id, label)))


@dataclass(frozen=True)
class Exercise:
    """A function to write.

    Args:
        function: Its name; submissions are searched for it at the top level.
        title: In the notebook, the rubric and the feedback.
        minutes: That a prepared student needs.
        reread: Where it is explained, e.g. "lesson 03, section 2".
        cases: The student's cases from the student's numbers.
        mistakes: Name to one friendly sentence: what is wrong, how to mend it.
        oracles: Name to `answer(case, *question)`. The grader's parent answers, over a pipe, so
            that what it knows never enters the child. A question that makes no sense raises
            ValueError, which fails the case.
        solution: The reference, for tests and the answer key.
        wrong: Name of each mistake to a function that makes it, for tests.
        cpu_seconds: Limit of the child process that runs all of its cases.
        memory_bytes: Limit of that child.
        needs_torch: Whether a submission may only be graded where torch is installed.
    """

    function: str
    title: str
    minutes: int
    reread: str
    cases: Callable[[Numbers], tuple[Case, ...]]
    mistakes: Mapping[str, str]
    oracles: Mapping[str, Callable] = field(default_factory=dict)
    solution: Callable | None = None
    wrong: Mapping[str, Callable] = field(default_factory=dict)
    cpu_seconds: float = 2.0
    memory_bytes: int = 512 * 1024 * 1024
    needs_torch: bool = False

    @functools.cached_property
    def points(self) -> float:
        """What a student without a mistake gets; the same for all."""
        sample = Numbers("points", "sample", "no secret is needed to count")
        return sum(case.points for case in self.cases(sample))


@dataclass(frozen=True)
class Assignment:
    """Exercises that are handed out and graded together."""

    name: str
    title: str
    lesson: str
    exercises: tuple[Exercise, ...]

    @functools.cached_property
    def points(self) -> float:
        """Of all exercises."""
        return sum(exercise.points for exercise in self.exercises)


def names() -> tuple[str, ...]:
    """The assignments that there are: files, and folders with a file for each exercise."""
    paths = [*ASSIGNMENTS.glob("[a-z]*.py"), *ASSIGNMENTS.glob("[a-z]*/__init__.py")]
    return tuple(sorted(p.stem if p.stem != "__init__" else p.parent.name for p in paths))


def sources(assignment: Assignment) -> list[Path]:
    """Its py:percent files in the notebook's order: its own, then those of exercises apart."""
    own = sys.modules[f"{__package__}.assignments.{assignment.name}"].__file__
    apart = [exercise.solution.__code__.co_filename for exercise in assignment.exercises]
    return [Path(name) for name in dict.fromkeys([own, *apart])]


def load(name: str) -> Assignment:
    """The assignment whose source is `instructor/assignments/NAME.py`, or the folder NAME.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in names():
        raise refusal("assignment", f"be one of {', '.join(names())}", name, "check the spelling")
    return importlib.import_module(f"instructor.assignments.{name}").ASSIGNMENT


def numbers(assignment: str, student_id: str, secret: str) -> Numbers:
    """A student's numbers: distinct between students, the same on every machine.

    Raises:
        ValueError: The id or the secret is empty.
    """
    for name, value in {"student_id": student_id, "secret": secret}.items():
        if not value.strip():
            raise refusal(name, "not be empty", value, "give one")
    return Numbers(assignment, student_id.strip(), secret)


def read_secret(path: str | Path) -> str:
    """The instructor's secret: the file's text without the white space around it.

    Raises:
        ValueError: It is no file, or so short that a student could guess it.
    """
    if not Path(path).is_file():
        raise refusal("--secret-file", "be a file", str(path), "see step 1 of instructor/README.md")
    secret = Path(path).read_text("utf-8").strip()
    if len(secret) < SHORTEST_SECRET:
        raise refusal(
            "secret",
            f"have at least {SHORTEST_SECRET} characters",
            len(secret),
            f"write one with: python -c 'import secrets; print(secrets.token_hex(32))' > {path}",
        )
    return secret
