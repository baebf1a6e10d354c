"""A guess can be made after everything has run: its two cells show again what they showed.

The README says to run all cells, and what waits for a guess says to run both of its cells then: no
later cell may take a name away that they read, or leave something else under it.
"""

import copy
import re
from pathlib import Path

import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from tools.notebooks import LessonError, execute, from_script, lesson_scripts
from tools.reproduce import differences


def pairs(notebook: NotebookNode) -> list[tuple[NotebookNode, NotebookNode]]:
    """Each cell to guess in, and the cell that compares the guess."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = []
    for number, cell in enumerate(code):
        if "predict" in cell.metadata.get("tags", []):
            name = re.match(r"\w+", cell.source)[0]
            found.append((cell, next(one for one in code[number + 1 :] if name in one.source)))
    return found


def shown_otherwise(notebook: NotebookNode, folder: Path) -> list[str]:
    """What the pairs show after all cells have run and did not show before, as diffs."""
    first = pairs(notebook)
    again = copy.deepcopy(first)
    for number, cell in enumerate(cell for pair in again for cell in pair):
        cell.id = f"again-{number}"
        notebook.cells.append(cell)
    execute(notebook, folder, preloaded=True)
    sides = [new_notebook(cells=[shown for _, shown in side]) for side in (first, again)]
    return differences(*sides)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("script", lesson_scripts(), ids=lambda script: script.stem)
def test_a_guess_can_be_made_after_all_cells_have_run(script):
    notebook = from_script(script)
    assert len(pairs(notebook)) >= 3
    for guess, _ in pairs(notebook):
        guess.source = re.sub(r"= \.\.\.", "= 1", guess.source)  # typed in
        assert " = 1" in guess.source
    assert shown_otherwise(notebook, script.parent) == []


def test_a_name_that_a_later_cell_changes_is_found(tmp_path):
    def lesson(later: str) -> NotebookNode:
        guess = new_code_cell("guess = ...", metadata={"tags": ["predict"]})
        return new_notebook(cells=[*map(new_code_cell, ["x = 1"]), guess,
                                   *map(new_code_cell, ["print(guess, x)", later])])  # fmt: skip

    assert shown_otherwise(lesson("y = 2"), tmp_path) == []
    (diff,) = shown_otherwise(lesson("x = 2"), tmp_path)
    assert "Ellipsis 2" in diff
    with pytest.raises(LessonError, match="'x' is not defined"):
        shown_otherwise(lesson("del x"), tmp_path)
