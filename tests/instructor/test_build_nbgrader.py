"""The source notebook for nbgrader: what it generates from it, and that its tests judge."""

import pytest

from instructor.assignment import load, names
from instructor.build.build import main
from instructor.build.nbgrader import nbgrader_source

SECRET = "the instructor's, of this test"


def cells(notebook, kind):
    return [cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get(kind)]


@pytest.mark.parametrize("name", names())
def test_solutions_pass_every_test_cell(name):
    notebook = nbgrader_source(load(name), SECRET)
    namespace = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, cell.id, "exec"), namespace)
    assert (
        sum(cell.metadata.nbgrader.points for cell in cells(notebook, "grade")) == load(name).points
    )
    marked = [
        cell.metadata.nbgrader.grade_id for cell in notebook.cells if "nbgrader" in cell.metadata
    ]
    assert len(set(marked)) == len(marked)
    assert SECRET not in str(notebook)
    assert "accelerator" not in notebook.metadata


def test_a_mistake_loses_its_cases_and_no_others():
    assignment = load("effective_batch")
    notebook = nbgrader_source(assignment, SECRET)
    exercise = assignment.exercises[0]
    namespace = {}
    exec(next(c.source for c in notebook.cells if "def same(" in c.source), namespace)
    namespace[exercise.function] = exercise.wrong["forgets the ranks"]
    lost = []
    for cell in cells(notebook, "grade")[:3]:
        try:
            exec(cell.source, namespace)
        except AssertionError:
            lost.append(cell.source.splitlines()[0])
    assert lost == ["# your cluster", "# another cluster"]


def test_hidden_cases_stand_between_nbgraders_marks():
    notebook = nbgrader_source(load("loss_scaling"), SECRET)
    hidden = [cell for cell in cells(notebook, "grade") if "HIDDEN" in cell.source]
    assert 0 < len(hidden) < len(cells(notebook, "grade"))
    for cell in hidden:
        name, begin, *_, end = cell.source.splitlines()
        assert (name[0], begin, end) == ("#", "### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS")
    assert all("### BEGIN SOLUTION" in cell.source for cell in cells(notebook, "solution"))


def test_another_secret_gives_other_hidden_numbers():
    one, two = (nbgrader_source(load("checkpointing"), secret) for secret in (SECRET, "x" * 20))
    changed = [
        a.source.splitlines()[1]
        for a, b in zip(one.cells, two.cells, strict=True)
        if a.source != b.source
    ]
    assert "### BEGIN HIDDEN TESTS" in changed


def test_build_writes_it_where_nbgrader_looks(tmp_path, capsys):
    secret = tmp_path / "secret.txt"
    secret.write_text(SECRET, "utf-8")
    out = ["checkpointing", "--out", str(tmp_path / "out"), "--nbgrader"]
    assert main(out) == 2
    assert "--secret-file must be given" in capsys.readouterr().err
    assert main([*out, "--secret-file", str(secret)]) == 0
    assert (tmp_path / "out/nbgrader/source/checkpointing/checkpointing.ipynb").is_file()
