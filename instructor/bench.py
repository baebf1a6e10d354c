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


def main() -> int:
    """Returns 1 if a score is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--students", type=int, default=500)
    parser.add_argument("--assignment", default="effective_batch")
    parser.add_argument("--sandbox", help="a level, instead of the strongest")
    options = parser.parse_args()
    assignment = load(options.assignment)
    bad = int(HOSTILE_SHARE * options.students)
    files, truth = {}, {}
    for index in range(options.students - bad):
        made = student(assignment, index)
        files[f"{assignment.name}_{made.student_id}.ipynb"] = made.data
        truth[made.student_id] = sum(made.points.values())
    for index in range(bad):
        own = f"x{index:03}"
        name, data, truth[own] = hostile(assignment, index, own)
        files[name] = data
    with tempfile.TemporaryDirectory() as folder:
        arguments = write_class(Path(folder), {own: f"Student {own}" for own in truth}, files)
        said = io.StringIO()
        start, cpu = time.perf_counter(), time.process_time()
        with contextlib.redirect_stderr(said):
            found = grade(assignment, *arguments, level=options.sandbox, weak=True)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    rest = assignment.points - assignment.exercises[0].points
    wrong = [
        (r.student_id, r.score, truth[r.student_id])
        for r in found.results
        if (
            abs(r.score - truth[r.student_id]) > 1e-9
            if truth[r.student_id] is not None
            else not rest <= r.score <= assignment.points
        )
    ]
    print(f"sandbox: {found.sandbox}")
    print(
        f"{options.students} submissions, {bad} of them hostile or broken, "
        f"{len(assignment.exercises)} exercises each, {os.cpu_count()} cores"
    )
    print(
        f"{seconds:.1f} s, {seconds / ALLOWED_SECONDS:.2f} of the {ALLOWED_SECONDS} s allowed; "
        f"the grader's own process: {cpu:.1f} s of CPU, "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB; its children: "
        f"{children.ru_utime + children.ru_stime:.1f} s of CPU"
    )
    print(f"load of the machine: {os.getloadavg()[0]:.1f}")
    print(f"{len(wrong)} scores differ from the truth", *wrong[:5])
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
