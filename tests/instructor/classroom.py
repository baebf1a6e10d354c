"""A class made up: students whose scores are known, because their answers were chosen.

A student's notebook holds functions that look their answers up in a table: the right answer of a
case, or the one of a known mistake. So the truth does not pass through the grader.
"""

import io
import json
import random
import subprocess
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from instructor.assignment import TOO_MANY, Assignment, Case, Exercise, Numbers, numbers

SECRET = "a secret of the tests, long enough"
# Little memory, so that a bomb meets this limit long before the one on time.
LIMITS = {"cpu_seconds": 1.0, "memory_bytes": 128 * 1024 * 1024}
HIDDEN_TEXT = "what nobody may read 7391"


def _batches(own: Numbers) -> tuple[Case, ...]:
    shown, kept = own.public("batch"), own.hidden("batch")
    draws = [
        ("a T4", False, (2, 16, 3)),
        ("your cluster", False, tuple(shown.several(3, 11, 99))),
        ("another cluster", True, tuple(kept.several(3, 1001, 9999))),
    ]
    return tuple(
        Case(
            name,
            numbers_,
            numbers_[0] * numbers_[1] * numbers_[2],
            1.0,
            hidden,
            mistakes={"adds": sum(numbers_), "forgets the ranks": numbers_[0] * numbers_[1]},
        )
        for name, hidden, numbers_ in draws
    )


def _means(own: Numbers) -> tuple[Case, ...]:
    cases = []
    for name, draw, hidden in (
        ("two micro batches", own.public("mean"), False),
        ("three micro batches", own.hidden("mean"), True),
    ):
        counts = draw.several(3 if hidden else 2, 2, 400)
        sums = [draw.integer(1, 999) / 7 for _ in counts]
        naive = sum(s / c for s, c in zip(sums, counts, strict=True)) / len(counts)
        cases.append(
            Case(
                name,
                (sums, counts),
                sum(sums) / sum(counts),
                1.5,
                hidden,
                rel_tolerance=1e-6,
                mistakes={"mean of means": naive},
            )
        )
    return tuple(cases)


def _limits(own: Numbers) -> tuple[Case, ...]:
    cases = []
    for name, draw, hidden in (
        ("a small card", own.public("limit"), False),
        ("another card", own.hidden("limit"), True),
    ):
        limit, most = draw.integer(3, 900), draw.integer(901, 2000)
        cases.append(
            Case(
                name,
                (most,),
                limit,
                2.0,
                hidden,
                mistakes={"one too many": limit + 1},
                oracle="fits",
                most_questions=12,
                knows=limit,
            )
        )
    return tuple(cases)


def _fits(case: Case, *question: object) -> bool:
    if len(question) != 1 or not isinstance(question[0], int):
        raise ValueError(f"fits takes one whole number, got {question!r}")
    return question[0] <= case.knows


TINY = Assignment(
    "tiny",
    "A tiny assignment",
    "lesson 00",
    (
        Exercise(
            "effective_batch",
            "The formula",
            2,
            "lesson 00, section 1",
            _batches,
            {
                "adds": "the three factors multiply.",
                "forgets the ranks": "multiply by `world_size` too.",
            },
            **LIMITS,
        ),
        Exercise(
            "mean_loss",
            "The mean over tokens",
            3,
            "lesson 00, section 2",
            _means,
            {"mean of means": "weigh each micro batch by its tokens."},
            **LIMITS,
        ),
        Exercise(
            "largest",
            "The largest micro batch",
            4,
            "lesson 00, section 3",
            _limits,
            {
                "one too many": "the last one that fits, not the first that does not.",
                TOO_MANY: "halve the interval at each question.",
            },
            oracles={"fits": _fits},
            **LIMITS,
        ),
    ),
)

SOLUTIONS = [
    "def effective_batch(micro, accumulation, ranks):\n    return micro * accumulation * ranks",
    "def mean_loss(sums, counts):\n    return sum(sums) / sum(counts)",
    """def largest(most, fits):
    low, high = 0, most
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low""",
]


def notebook(cells: Sequence[str], student_id: str | None = None) -> bytes:
    """A notebook of these code cells, with a first one that gives the id."""
    first = [] if student_id is None else [f"STUDENT_ID = {student_id!r}"]
    cells = [
        {
            "cell_type": "code",
            "metadata": {},
            "outputs": [],
            "execution_count": None,
            "source": text.splitlines(keepends=True),
        }
        for text in [*first, *cells]
    ]
    prose = {"cell_type": "markdown", "metadata": {}, "source": ["# An assignment"]}
    return json.dumps(
        {"cells": [prose, *cells], "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    ).encode()


def table_function(
    exercise: Exercise, cases: Sequence[Case], choose: Callable[[Case], object]
) -> str:
    """A function that gives each case the answer chosen for it."""
    rows = {json.dumps(case.arguments): choose(case) for case in cases}
    assert len(rows) == len(cases), f"two cases of {exercise.function} have the same arguments"
    arguments = len(cases[0].arguments)
    return (
        f"import json\n\nTABLE_{exercise.function} = {rows!r}\n\n"
        f"def {exercise.function}(*given):\n"
        f"    return TABLE_{exercise.function}[json.dumps(given[:{arguments}])]\n"
    )


@dataclass
class Student:
    """One made-up student: what is handed in, and what the grader has to find."""

    student_id: str
    name: str
    data: bytes
    points: dict[str, float] = field(default_factory=dict)
    mistakes: dict[str, set[str]] = field(default_factory=dict)


def student(
    assignment: Assignment,
    index: int,
    kinds: Mapping[str, str] | None = None,
    own: str | None = None,
) -> Student:
    """Each exercise right, with one known mistake, wrong in one case, or untouched; by chance.

    Args:
        assignment: Which.
        index: Of the student; chance depends on it alone.
        kinds: By function: `right`, `partial`, `untouched`, or the name of a mistake.
        own: The student's id, instead of one made of the index.
    """
    chance = random.Random(index)
    found = Student(own or f"s{index:03}", f"Student {index}", b"")
    drawn = numbers(assignment.name, found.student_id, SECRET)
    cells = []
    for exercise in assignment.exercises:
        cases = exercise.cases(drawn)
        kind = (kinds or {}).get(exercise.function) or chance.choice(
            ["right", "right", "partial", "untouched", *exercise.mistakes]
        )
        name = exercise.function
        spoilt = chance.randrange(len(cases)) if kind == "partial" else None
        wrong = f"no answer {index}"
        chosen = {}
        for place, case in enumerate(cases):
            chosen[id(case)] = wrong if place == spoilt else case.mistakes.get(kind, case.expected)
        if kind == "untouched":
            cells.append(f"def {name}(*given):\n    return ...")
            found.points[name], found.mistakes[name] = 0.0, set()
            continue
        if kind == TOO_MANY:
            cells.append(f"def {name}(*given):\n    return [given[-1](n) for n in range(5000)]")
            found.points[name], found.mistakes[name] = 0.0, {TOO_MANY}
            continue
        cells.append(table_function(exercise, cases, lambda case, chosen=chosen: chosen[id(case)]))
        found.points[name] = sum(
            case.points
            for place, case in enumerate(cases)
            if place != spoilt and kind not in case.mistakes
        )
        found.mistakes[name] = {kind} & {m for case in cases for m in case.mistakes}
    found.data = notebook(cells, found.student_id)
    return found


def honest(student_id: str, cells: Sequence[str] = SOLUTIONS) -> bytes:
    """A notebook of the tiny assignment; right if its cells are left as they are."""
    return notebook(cells, student_id)


def write_class(folder: Path, students: Mapping[str, str], files: Mapping[str, bytes]) -> list:
    """A roster, a secret and a zip of submissions; the arguments of `grade` after the assignment.

    Args:
        folder: Where to.
        students: Id to name.
        files: Path in the zip to contents.
    """
    folder.mkdir(parents=True, exist_ok=True)
    roster = "\n".join(["student_id,name", *(f'{i},"{n}"' for i, n in students.items())])
    (folder / "roster.csv").write_text(roster, "utf-8")
    (folder / "secret.txt").write_text(SECRET, "utf-8")
    (folder / "in.zip").write_bytes(zipped(files))
    return [
        folder / "in.zip",
        folder / "roster.csv",
        folder / "secret.txt",
        folder / "out" / "grades.csv",
    ]


def zipped(files: Mapping[str, bytes]) -> bytes:
    """A zip with these entries, whatever their names."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name, (2026, 11, 1, 12, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, data)
    return memory.getvalue()


def other_python(version):
    """A Python of that version that starts, or None."""
    named = f"python{version}"
    found = [named, *map(str, Path.home().glob(f".pyenv/versions/{version}*/bin/python3"))]
    for python in found:
        try:
            if subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
                return python
        except OSError:
            continue
    return None
