"""Grade 500 made-up submissions of a real assignment, 100 of them hostile or broken.

    python -m instructor.bench [--students 500] [--assignment effective_batch]

Prints seconds, the ratio to the 60 s that grading is allowed on two cores, and whether every score
is the one that the made-up class was made with. Fails if one is not.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

from instructor.assignment import load, numbers
from instructor.grade.grade import grade
from tests.instructor import attacks
from tests.instructor.classroom import SECRET, notebook, student, table_function, write_class

ALLOWED_SECONDS = 60
HOSTILE_SHARE = 0.2


def hostile(assignment, number: int, own: str) -> tuple[str, bytes, float | None]:
    """A file that attacks or is broken, in turn: its name, bytes, and points if they are known."""
    kinds = [*attacks.CODE, *attacks.FILES]
    kind = kinds[number % len(kinds)]
    if kind in attacks.FILES:
        broken = attacks.FILES[kind]
        return broken.name.replace("tiny_ID", f"{assignment.name}_{own}"), broken.data, 0.0
    first, *rest = assignment.exercises
    code = attacks.CODE[kind][0].replace("effective_batch", first.function)
    for word, value in {
        "CANARY": "'/tmp/canary'",
        "SECRET": "'/etc/passwd'",
        "PORT": "9",
        "PARENT": "1",
    }.items():
        code = code.replace(word, value)
    code = code.replace("(a, b, c)", "(a, b, c, *more)")
    drawn = numbers(assignment.name, own, SECRET)
    cells = [code, *(table_function(e, e.cases(drawn), lambda case: case.expected) for e in rest)]
    # What the attack itself earns depends on the exercise that it replaces.
    return f"{assignment.name}_{own}.ipynb", notebook(cells, own), None


def made_up(assignment, students: int) -> tuple[dict, dict]:
    """Files by name, and each student's points if they are known."""
    bad = int(HOSTILE_SHARE * students)
    files, truth = {}, {}
    for index in range(students - bad):
        made = student(assignment, index)
        files[f"{assignment.name}_{made.student_id}.ipynb"] = made.data
        truth[made.student_id] = sum(made.points.values())
    for index in range(bad):
        own = f"x{index:03}"
        name, data, truth[own] = hostile(assignment, index, own)
        files[name] = data
    return files, truth


def cpu_seconds(whose: int) -> float:
    """Of this process, or of its children that have ended."""
    used = resource.getrusage(whose)
    return used.ru_utime + used.ru_stime


def pages(out: Path) -> dict[str, bytes]:
    """What three runs have to write alike: each student's page."""
    return {path.name: path.read_bytes() for path in sorted((out / "feedback").iterdir())}


def wrong_scores(assignment, found, truth) -> list[tuple]:
    """Students whose score is not the truth, as far as it is known."""
    rest = assignment.points - assignment.exercises[0].points
    return [
        (r.student_id, r.score, truth[r.student_id])
        for r in found.results
        if (
            abs(r.score - truth[r.student_id]) > 1e-9
            if truth[r.student_id] is not None
            else not rest <= r.score <= assignment.points
        )
    ]


def run(assignment, arguments: list, level: str | None, truth: dict) -> int:
    """Grade once; prints what it took, returns how many scores are wrong."""
    kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    start, before = time.perf_counter(), [cpu_seconds(kind) for kind in kinds]
    with contextlib.redirect_stderr(io.StringIO()):
        found = grade(assignment, *arguments, level=level, weak=True)
    seconds = time.perf_counter() - start
    own, children = (cpu_seconds(kind) - b for kind, b in zip(kinds, before, strict=True))
    wrong = wrong_scores(assignment, found, truth)
    print(f"sandbox: {found.sandbox}")
    print(
        f"{seconds:.1f} s at a load of {os.getloadavg()[0]:.1f}, {ALLOWED_SECONDS} s allowed; "
        f"CPU: {own:.1f} s here, {children:.1f} s in children, so {(own + children) / 2:.1f} s on "
        f"two cores that do nothing else; {resource.getrusage(kinds[0]).ru_maxrss >> 10} MiB here"
    )
    print(f"{len(wrong)} scores differ from the truth", *wrong[:5])
    return len(wrong)


def main() -> int:
    """Returns 1 if a score is wrong, or a page differs from one run to the next."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--students", type=int, default=500)
    parser.add_argument("--assignment", default="effective_batch")
    parser.add_argument("--sandbox", help="a level, instead of the strongest")
    parser.add_argument("--runs", type=int, default=1, help="that have to write the same pages")
    options = parser.parse_args()
    assignment = load(options.assignment)
    files, truth = made_up(assignment, options.students)
    print(
        f"{options.students} submissions, {int(HOSTILE_SHARE * options.students)} of them hostile "
        f"or broken, {len(assignment.exercises)} exercises each, {os.cpu_count()} cores"
    )
    wrong, written = 0, []
    with tempfile.TemporaryDirectory() as folder:
        names = {own: f"Student {own}" for own in truth}
        *given, _ = write_class(Path(folder), names, files)
        for number in range(options.runs):
            out = Path(folder, f"out{number}")
            wrong += run(assignment, [*given, out / "grades.csv"], options.sandbox, truth)
            written.append(pages(out))
    differ = {name for one in written for name in one if one[name] != written[0].get(name)}
    if options.runs > 1:
        print(f"{len(differ)} of {len(written[0])} pages differ between runs", *sorted(differ)[:5])
    return bool(wrong or differ)


if __name__ == "__main__":
    sys.exit(main())
