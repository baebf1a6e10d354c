"""A student's check with the grader's limits: in the notebook, and as a command."""

import json

import nbformat
import pytest

from instructor.assignment import load
from instructor.build.notebooks import answer_key, student_notebook
from instructor.build.selfcheck import check, plain, same, slow
from instructor.grade.own_check import main

NAME = "loss_scaling"


def written(tmp_path, function, text):
    """The answer key, with another text for one function."""
    notebook = answer_key(load(NAME))
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source.startswith(f"def {function}("):
            cell.source = text
    path = tmp_path / "notebook.ipynb"
    path.write_text(nbformat.writes(notebook), "utf-8")
    return path


def check_it(path, capsys, name=NAME):
    code = main([name, str(path)])
    said = capsys.readouterr()
    return code, said.out.splitlines(), said.err


def test_key_is_right_and_an_untouched_notebook_not_attempted(tmp_path, capsys):
    path = written(tmp_path, "none", "")
    code, lines, _ = check_it(path, capsys)
    assert code == 0
    assert [line.split(": ")[1][:7] for line in lines] == ["right ("] * len(load(NAME).exercises)
    path.write_text(nbformat.writes(student_notebook(load(NAME))), "utf-8")
    code, lines, _ = check_it(path, capsys)
    assert code == 1 and all(": not attempted (" in line for line in lines)


@pytest.mark.slow
def test_limits_are_the_graders(tmp_path, capsys):
    first = load(NAME).exercises[0].function
    for body, says in (
        ("import numpy", "standard library only"),
        ("while True: pass", "did not come back in time"),
        ("return bytearray(1 << 40)", "more memory"),
        ("return open('/etc/passwd').read()", "no files of its own"),
    ):
        path = written(tmp_path, first, f"def {first}(*_):\n    {body}")
        code, lines, _ = check_it(path, capsys)
        assert code == 1 and says in lines[0] and ": right (" in lines[1], lines[0]
    assert "of 2 s)" in lines[0]


def test_another_assignment_or_no_notebook_is_refused(tmp_path, capsys):
    path = written(tmp_path, "none", "")
    notebook = json.loads(path.read_text("utf-8"))
    kept = [c for c in notebook["cells"] if "PUBLIC =" not in "".join(c["source"])]
    path.write_text(json.dumps(notebook | {"cells": kept}), "utf-8")
    code, _, said = check_it(path, capsys)
    assert code == 2 and "must hold the public cases of" in said
    path.write_text("no notebook", "utf-8")
    code, _, said = check_it(path, capsys)
    assert code == 2 and "cannot be graded: it is not JSON" in said
    code, _, said = check_it(tmp_path / "nowhere.ipynb", capsys)
    assert code == 2 and "nowhere.ipynb" in said


def test_notebook_says_when_a_right_answer_is_slow(capsys):
    case = {
        "arguments": [2],
        "expected": 4,
        "rel_tolerance": 0.0,
        "mistakes": {},
        "oracle": None,
        "most_questions": 0,
        "knows": None,
    }
    public = json.dumps({"f": {"cases": [case], "mistakes": {}, "cpu_seconds": 2.0}})
    for seconds, says in (
        (0.4, "Right: all 1"),
        (1.5, "Right, but slow: the public cases took 1.5"),
    ):
        times = iter([10.0, 10.0 + seconds])
        check("f", public, {"f": lambda x: 2 * x}, clock=times.__next__)
        assert says in capsys.readouterr().out
    times = iter([0.0, 9.0])
    check("f", public, {"f": lambda x: x}, clock=times.__next__)
    assert capsys.readouterr().out.startswith("Not yet")
    assert slow(1.0, 2.0) is None and "after 2 s" in slow(1.1, 2.0)
    old = json.dumps({"f": {"cases": [case], "mistakes": {}}})  # a notebook of an older build
    check("f", old, {"f": lambda x: 2 * x})
    assert "Right: all 1" in capsys.readouterr().out


def test_notebook_states_what_is_graded():
    text = "\n".join(c.source for c in student_notebook(load("effective_batch")).cells)
    assert "no numpy, no torch, no files, no network" in text
    text = " ".join(text.split())
    assert "gets 2 s of processor time for all its cases, 512 MiB of memory" in text


def test_notebook_and_grader_take_the_same_answers():
    """What the check of a notebook calls right, the grader does, and the other way round."""
    from array import array
    from decimal import Decimal
    from fractions import Fraction

    for answer, expected in (
        (Fraction(1, 2), 0.5),
        (Decimal("0.5"), 0.5),
        (array("d", [1.0]), [1]),
        ((Fraction(2), (1, 2)), [2, [1, 2]]),
        ({"a": (Fraction(1, 4),)}, {"a": [0.25]}),
    ):
        assert same(plain(answer), expected), answer
    for answer, expected in ((True, 1), ("1", 1), ([1], 1), (None, 0), (1j, 1)):
        assert not same(plain(answer), expected), answer
