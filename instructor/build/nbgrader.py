"""The same assignment for those who grade with nbgrader: its source notebook.

nbgrader has one source for the whole class, so the hidden numbers are the class's, not the
student's; and it runs a student's code beside the expected values. The guide says what that means.
"""

from __future__ import annotations

import re

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from ..assignment import Assignment, Case, Exercise, Numbers
from .notebooks import METADATA, self_check_source, source_cells

CLASS = "the whole class"  # whose numbers an nbgrader class has


def nbgrader_source(assignment: Assignment, secret: str) -> NotebookNode:
    """The notebook for nbgrader's `source/NAME/NAME.ipynb`.

    Each case is a cell of its own, so that partial credit is the grader's; hidden ones stand
    between nbgrader's marks for hidden tests.

    Args:
        assignment: Which.
        secret: The instructor's; the class's hidden numbers come from it.
    """
    exercises = {exercise.function: exercise for exercise in assignment.exercises}
    own = Numbers(assignment.name, CLASS, secret)
    cells: list[NotebookNode] = []
    for cell in source_cells(assignment):
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "markdown":
            cells.append(new_markdown_cell(cell.source))
        elif "exercise" not in tags:
            cells.append(new_code_cell(cell.source))
        else:
            exercise = exercises[re.search(r"^def (\w+)", cell.source, re.M)[1]]
            cells.append(_cell(cell.source, exercise.function, solution=True))
            cells += [
                _test(exercise, case, number)
                for number, case in enumerate(exercise.cases(own), start=1)
            ]
    cells.insert(1, _cell(self_check_source(), "self_check", locked=True))
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
    notebook = new_notebook(cells=cells, metadata=METADATA)
    notebook.nbformat_minor = 5
    return notebook


def _test(exercise: Exercise, case: Case, number: int) -> NotebookNode:
    asks = (
        [f"oracle({dict(knows=case.knows, most_questions=case.most_questions)!r})"]
        if case.oracle
        else []
    )
    call = f"{exercise.function}({', '.join([*map(repr, case.arguments), *asks])})"
    lines = [f"assert same({call}, {case.expected!r}, {case.rel_tolerance!r})"]
    if case.hidden:
        lines = ["### BEGIN HIDDEN TESTS", *lines, "### END HIDDEN TESTS"]
    return _cell(
        "\n".join([f"# {case.name}", *lines]),
        f"{exercise.function}_{number}",
        points=case.points,
        locked=True,
    )


def _cell(
    source: str,
    grade_id: str,
    *,
    points: float | None = None,
    solution: bool = False,
    locked: bool = False,
) -> NotebookNode:
    marks = {
        "grade": points is not None,
        "grade_id": grade_id,
        "locked": locked,
        "schema_version": 3,
        "solution": solution,
        "task": False,
    }
    return new_code_cell(
        source, metadata={"nbgrader": marks if points is None else marks | {"points": points}}
    )
