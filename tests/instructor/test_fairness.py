"""Right notebooks get full marks, however students write them; wrong ones do not."""

import json
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell

from instructor.assignment import load, numbers
from instructor.build.notebooks import student_notebook
from instructor.grade.grade import grade
from tests.instructor import new_forms
from tests.instructor.classroom import (
    SECRET,
    TINY,
    honest,
    notebook,
    other_python,
    write_class,
)
from tests.instructor.fresh_notebooks import FRESH
from tests.instructor.more_notebooks import MORE, WRONG
from tests.instructor.right_notebooks import SOL, V, edit

LONG = load("effective_batch")
NEW_SYNTAX = {"nested_quotes_312", "generic_312"}  # of Python 3.12
RIGHT = V | MORE | FRESH


def handed_in(name, own, written, version="3.11.7"):
    """The student's notebook, with their answers and the cells that they added, as bytes."""
    handed_out = student_notebook(LONG, numbers(LONG.name, own, SECRET))
    cells = []
    for cell in handed_out.cells:
        if "exercise" in cell.metadata.get("tags", []):
            function = cell.source.split("(")[0].removeprefix("def ")
            cells += map(new_code_cell, written["before"])
            cell.source = written["changes"].get(function, SOL[function])
        if name == "id_as_int" and cell.source.startswith("STUDENT_ID"):
            cell.source = f"STUDENT_ID = {own}"
        if name != "deleted_stub_import" or cell.source != "import math":
            cells.append(cell)
        if cell.source.startswith("# @title The public cases"):
            cells += map(new_code_cell, written["top"])
    handed_out.cells = cells + [new_code_cell(text) for text in written["end"]]
    handed_out.metadata["language_info"] = {"name": "python", "version": version}
    return nbformat.writes(handed_out).encode()


def graded(folder, notebooks, **how):
    """Results by name."""
    ids = {name: str(1000 + number) for number, name in enumerate(notebooks)}
    files = {
        f"{LONG.name}_{own}.ipynb": handed_in(name, own, notebooks[name])
        for name, own in ids.items()
    }
    arguments = write_class(folder, {own: name for name, own in ids.items()}, files)
    found = grade(LONG, *arguments, **how)
    return {result.row["name"]: result for result in found.results}


def lost(result):
    """What cost points, for the message of a test that fails."""
    return [
        (mark.exercise.function, mark.reason[:300])
        for mark in result.marks
        if mark.earned < mark.exercise.points
    ] or result.problem


OLD_SYNTAX = sorted(set(RIGHT) - NEW_SYNTAX)
SOME = OLD_SYNTAX[::8]  # for `make test`


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    return graded(tmp_path_factory.mktemp("some"), {name: RIGHT[name] for name in SOME})


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    return graded(tmp_path_factory.mktemp("right"), RIGHT)


@pytest.mark.parametrize("name", SOME)
def test_some_right_notebooks_get_full_marks(some, name):
    assert some[name].score == LONG.points, lost(some[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", OLD_SYNTAX)
def test_right_notebook_gets_full_marks(right, name):
    assert right[name].score == LONG.points, lost(right[name])


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_right_notebook_of_a_newer_python(version, tmp_path):
    python = other_python(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    for name, result in graded(tmp_path, RIGHT, python=python).items():
        assert result.score == LONG.points, (name, lost(result))


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    return graded(tmp_path_factory.mktemp("wrong"), WRONG)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_notebook_stays_wrong(wrong, name):
    bad = set(WRONG[name]["wrong"])
    assert {function for function, _ in lost(wrong[name])} == bad


def test_a_newer_python_is_said_where_it_may_be_the_cause(tmp_path):
    """On Python 3.11 an f-string of 3.12 is no Python; the student is not blamed for it."""
    new = {
        "whole": 'f"{dict(a=1)["a"]}"\n' + SOL["split_for"],  # parses from 3.12 on
        "wrong": "def split_for(*_): return 0",
        "stub": "def split_for(*_): return ...",
        "right": SOL["split_for"],
    }
    files = {
        f"{LONG.name}_{name}.ipynb": handed_in(name, name, edit({"split_for": text}), "9.1.2")
        for name, text in new.items()
    }
    arguments = write_class(tmp_path, dict.fromkeys(new, "A"), files)
    found = {r.student_id: r.marks[2].reason for r in grade(LONG, *arguments).results}
    says = "was saved with Python 9.1, newer than the grader's 3.1"
    assert says in found["wrong"] and "grade it with --python python9.1" in found["wrong"]
    assert (found["right"], found["stub"]) == ("right", "not attempted")
    if sys.version_info < (3, 12):
        assert says in found["whole"] and "does not parse" in found["whole"]


def test_python_that_never_starts_is_refused(tmp_path):
    arguments = write_class(tmp_path, {"s001": "A"}, {"tiny_s001.ipynb": honest("s001")})
    with pytest.raises(ValueError, match="--python must be a Python of 3.11 or newer, got 'nopy'"):
        grade(TINY, *arguments, python="nopy")


@pytest.mark.slow
def test_one_endless_cell_costs_a_notebook_nothing(tmp_path):
    """A cell that a kernel would never leave is left out, whatever it ends by, up to three."""
    solutions = honest("s001")
    cells = ["".join(c["source"]) for c in json.loads(solutions)["cells"][2:]]
    endless = ["while True: pass", "import os; os._exit(3)", "import time; time.sleep(99)"]
    mixed = [cells[0], endless[0], cells[1], endless[1], f"{endless[2]}\n{cells[2]}"]
    arguments = write_class(tmp_path, {"s001": "A"}, {"tiny_s001.ipynb": notebook(mixed, "s001")})
    (result,) = grade(TINY, *arguments).results
    assert result.score == TINY.points, lost(result)


@pytest.mark.slow
def test_many_endless_cells_leave_what_a_function_needs(tmp_path):
    cells = ["FACTOR = 1\nwhile True: pass"] + ["import os; os._exit(3)"] * 6
    cells += ["def effective_batch(a, b, c): return a * b * c * FACTOR"]
    arguments = write_class(tmp_path, {"s001": "A"}, {"tiny_s001.ipynb": notebook(cells, "s001")})
    (result,) = grade(TINY, *arguments).results
    assert result.marks[0].earned == 3, lost(result)


def filled_in(assignment, own, answers):
    """The student's notebook of an assignment, with an answer for each function."""
    handed_out = student_notebook(assignment, numbers(assignment.name, own, SECRET))
    for cell in handed_out.cells:
        if "exercise" in cell.metadata.get("tags", []):
            cell.source = answers[cell.source.split("(")[0].removeprefix("def ")]
    return nbformat.writes(handed_out).encode()


def spoilt(function, number):
    """A right form with one mistake in it."""
    _, form, changes = new_forms.WRONG[function][number]
    text = new_forms.RIGHT[function][form]
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.mark.one_fast
@pytest.mark.parametrize("name", ["chunked_loss", "qlora_labels"])
def test_forms_of_the_newest_assignments(name, tmp_path):
    """Five right forms of each function get everything, four wrong ones their mistake's name."""
    assignment = load(name)
    functions = [exercise.function for exercise in assignment.exercises]
    answers = {f"r{n}": {f: new_forms.RIGHT[f][n] for f in functions} for n in range(5)}
    answers |= {f"w{n}": {f: spoilt(f, n) for f in functions} for n in range(4)}
    files = {f"{name}_{own}.ipynb": filled_in(assignment, own, a) for own, a in answers.items()}
    arguments = write_class(tmp_path, dict.fromkeys(answers, "A"), files)
    for result in grade(assignment, *arguments).results:
        if result.student_id.startswith("r"):
            assert result.score == assignment.points, (result.student_id, lost(result))
            continue
        for mark in result.marks:
            mistake = new_forms.WRONG[mark.exercise.function][int(result.student_id[1])][0]
            assert mistake in mark.mistakes, (mark.exercise.function, mark.reason)
            assert mark.earned < mark.exercise.points
