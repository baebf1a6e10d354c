"""The notebooks of an assignment: what students get, and the answer key.

Without a student's numbers there is one notebook for all, with the same public numbers; with them,
each has their own id and numbers in it. Hidden numbers are in neither.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Sequence

import jupytext
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from fitcast.units import Said, refusal

from ..assignment import Assignment, Exercise, Numbers, sources
from ..cases import EVERYBODY
from ..grade.rubric import show_points
from ..sandbox.reading import Rehearsal
from . import selfcheck

# Of every notebook for students: a lesson's, but no GPU, which a class would take for nothing.
METADATA = {
    "colab": {"provenance": []},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
USUAL_SECONDS = Exercise.cpu_seconds
GRADED_WITH = "3.11 to 3.13"
SOLUTION = re.compile(r"^( *)### BEGIN SOLUTION\n.*?^ *### END SOLUTION$", re.M | re.S)
MARKER = re.compile(r"^ *### (BEGIN|END) SOLUTION\n?", re.M)
HOW = """**How it works.** Replace each `...` by your code, and run the cell below it: it knows some
public cases and says in a sentence what is wrong. Grading adds cases with numbers that are yours
alone, so write the rule, not the number. Keep the functions' names and arguments; add cells and
functions of your own as you like. Plain Python is enough.

**What grading runs.** Your notebook from the top, up to each function's check, in Python {python}
with its standard library: no numpy, no torch, no files, no network, no threads. A function gets
{seconds} s of processor time for all its cases, {memory} MiB of memory, and may print 1 MiB; the
check says when it is slow. What stands in other cells is run if it takes less than {others} s
together.

{points} points, about {minutes} minutes. {id}"""
YOUR_ID = "First put your student id between the quotes:"
THEIR_ID = "This notebook is yours: your id and your numbers are in it already."
HAND_IN = """## Hand in
Run all cells once more, from the top: every check should say "Right". Then save, and hand in this
file as it is, with its name. (On Colab: *File > Download > Download .ipynb*.) Unfinished is better
than nothing: each case counts."""


def student_notebook(assignment: Assignment, own: Numbers | None = None) -> NotebookNode:
    """What a student gets: text, empty functions, self-checks on public cases.

    Args:
        assignment: Which.
        own: The student's numbers; without them, the notebook is for all.
    """
    return _notebook(assignment, own, key=False)


def answer_key(assignment: Assignment) -> NotebookNode:
    """The notebook with its solutions, and below each what students get wrong."""
    return _notebook(assignment, None, key=True)


def source_cells(assignment: Assignment) -> Iterator[NotebookNode]:
    """The cells that an assignment is written in, but those tagged `hidden`."""
    for path in sources(assignment):
        for cell in jupytext.read(path).cells:
            if "hidden" not in cell.metadata.get("tags", []):
                yield cell


def _notebook(assignment: Assignment, own: Numbers | None, *, key: bool) -> NotebookNode:
    exercises = {exercise.function: exercise for exercise in assignment.exercises}
    number, cells = 0, []
    for cell in source_cells(assignment):
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "markdown":
            cells.append(new_markdown_cell(cell.source))
            continue
        if "exercise" not in tags:
            cells.append(new_code_cell(cell.source, metadata={"tags": tags}))
            continue
        exercise = exercises.pop(re.search(r"^def (\w+)", cell.source, re.M)[1])
        number += 1
        cases = public_cases(exercise, own or EVERYBODY)
        cells[-1].source = _heading(number, exercise, cases) + cells[-1].source
        source = MARKER.sub("", cell.source) if key else SOLUTION.sub(r"\1return ...", cell.source)
        cells.append(
            new_code_cell(
                source.strip(),
                metadata={"tags": tags, "points": exercise.points, "minutes": exercise.minutes},
            )
        )
        cells.append(
            new_code_cell(
                f'check("{exercise.function}", PUBLIC, globals())', metadata={"tags": ["check"]}
            )
        )
        if key:
            cells.append(new_markdown_cell(_mistakes(exercise)))
    if exercises:
        raise refusal(
            f"{assignment.name}.py",
            "have a cell tagged exercise for each exercise",
            Said(f"none for {', '.join(exercises)}"),
            "add them",
        )
    cells[1:1] = _front(assignment, own)
    if not key:
        cells.append(new_markdown_cell(HAND_IN))
    for index, cell in enumerate(cells):
        cell.id = hashlib.sha256(f"{assignment.name} {index}".encode()).hexdigest()[:8]
    notebook = new_notebook(cells=cells, metadata=METADATA)
    notebook.nbformat_minor = 5
    return notebook


def _front(assignment: Assignment, own: Numbers | None) -> list[NotebookNode]:
    """What stands between the title and the first exercise: how to, the id, the self-check."""
    minutes = sum(exercise.minutes for exercise in assignment.exercises)
    public = {
        exercise.function: {
            "mistakes": dict(exercise.mistakes),
            "cases": public_cases(exercise, own or EVERYBODY),
            "cpu_seconds": exercise.cpu_seconds,
        }
        for exercise in assignment.exercises
    }
    folded = {"tags": ["setup"], "cellView": "form", "jupyter": {"source_hidden": True}}
    return [
        new_markdown_cell(
            HOW.format(
                python=GRADED_WITH,
                others=f"{Rehearsal.cpu_seconds:g}",
                seconds=" or ".join(sorted({f"{e.cpu_seconds:g}" for e in assignment.exercises})),
                memory=min(e.memory_bytes for e in assignment.exercises) >> 20,
                points=show_points(assignment.points),
                minutes=minutes,
                id=THEIR_ID if own else YOUR_ID,
            )
        ),
        new_code_cell(
            "STUDENT_ID = " + json.dumps(own.student_id if own else "...", ensure_ascii=False),
            metadata={"tags": ["setup"]},
        ),
        new_code_cell(
            "# @title Self-check: run me once, nothing to change here\n" + self_check_source(),
            metadata=folded,
        ),
        new_code_cell(
            f"# @title The public cases\nPUBLIC = {json.dumps(public, ensure_ascii=True)!r}",
            metadata=folded,
        ),
    ]


def self_check_source() -> str:
    """`selfcheck` without its docstring, which speaks to authors."""
    source = inspect.getsource(selfcheck)
    return source[source.index("import copy") :].strip()


def public_cases(exercise: Exercise, own: Numbers) -> list[dict]:
    """What the self-check gets: the cases whose numbers a student may see, as JSON."""
    fields = (
        "name",
        "arguments",
        "expected",
        "rel_tolerance",
        "mistakes",
        "oracle",
        "most_questions",
        "knows",
    )
    shown = [
        {name: getattr(case, name) for name in fields}
        for case in exercise.cases(own)
        if not case.hidden
    ]
    return json.loads(json.dumps(shown))


def _heading(number: int, exercise: Exercise, cases: Sequence[dict]) -> str:
    limit = f" At most {exercise.cpu_seconds:g} s." if exercise.cpu_seconds != USUAL_SECONDS else ""
    lines = [
        f"## {number} · {exercise.title}",
        f"*{show_points(exercise.points)} points, {exercise.minutes} minutes. Background: "
        f"{exercise.reread}.{limit}*",
        f"For example, `{_call(exercise, cases[0])}` gives `{cases[0]['expected']!r}`.",
    ]
    yours = [
        f"{case['name'][0].upper()}{case['name'][1:]}: `{call}`."
        for case in cases
        if case["name"].startswith("your") and len(call := _call(exercise, case)) < 120
    ]
    return "\n".join([*lines, *yours]) + "\n\n"


def _call(exercise: Exercise, case: dict) -> str:
    return selfcheck.show_call(exercise.function, case)


def _mistakes(exercise: Exercise) -> str:
    rows = "\n".join(f"- **{name}**: {sentence}" for name, sentence in exercise.mistakes.items())
    return f"What goes wrong here:\n\n{rows}"
