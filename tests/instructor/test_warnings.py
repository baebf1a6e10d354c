"""What is said before any grade: a class that was graded wrongly looks wrong, another does not."""

import json
import unicodedata

import nbformat
import pytest

from instructor.assignment import load, numbers
from instructor.build.notebooks import answer_key, student_notebook
from instructor.grade.grade import LOOK_FIRST, grade, main
from tests.instructor.classroom import SECRET, SOLUTIONS, TINY, honest, notebook, write_class

STUDENTS = [f"s{number:03}" for number in range(6)]
NAME = "loss_scaling"


def graded(tmp_path, files, people=None, assignment=TINY, **how):
    people = people or dict.fromkeys(STUDENTS, "A")
    return grade(assignment, *write_class(tmp_path, people, files), **how)


def built(secret, own):
    """A right notebook whose public numbers are those of a secret."""
    assignment = load(NAME)
    handed_out = student_notebook(assignment, numbers(NAME, own, secret) if secret else None)
    key = {c.source.split("(")[0]: c.source for c in answer_key(assignment).cells}
    for cell in handed_out.cells:
        if "exercise" in cell.metadata.get("tags", []):
            cell.source = key[cell.source.split("(")[0]]
    return nbformat.writes(handed_out).encode()


def test_a_usual_class_has_none(tmp_path):
    half = ["def effective_batch(*_): return 0", *SOLUTIONS[1:]]
    files = {f"tiny_{own}.ipynb": honest(own) for own in STUDENTS[:3]}
    files |= {f"tiny_{own}.ipynb": notebook(half, own) for own in STUDENTS[3:]}
    assert graded(tmp_path, files).warnings == []


@pytest.mark.one_fast
@pytest.mark.parametrize("count", [1, 3])
def test_wrong_assignment(tmp_path, count):
    files = {f"{own}.ipynb": built(SECRET, own) for own in STUDENTS[:count]}
    (warning, *_) = graded(tmp_path, files).warnings
    assert warning == (
        f"{count} of {count} notebooks hold no exercise of tiny: is it the right assignment?; "
        f"their functions are those of {NAME}"
    )


@pytest.mark.slow
def test_one_student_with_another_assignments_notebook(tmp_path):
    """No warning for the class; but one student's 0 is to be looked at."""
    files = {f"tiny_{own}.ipynb": honest(own) for own in STUDENTS[:4]}
    files["tiny_s004.ipynb"] = built(SECRET, "s004")
    found = graded(tmp_path, files)
    assert found.results[4].flags == [
        f"the notebook holds no exercise of tiny; its functions are those of {NAME}"
    ]
    assert not found.results[0].flags and not any("assignment" in w for w in found.warnings)


@pytest.mark.slow
def test_what_stopped_in_a_notebook_is_to_be_looked_at(tmp_path):
    """Right functions earn their points beside a cell that fills the memory or never ends."""
    cells = "x = [0] * 10**11", "while True:\n    pass", "y = 1"
    files = {
        f"tiny_{own}.ipynb": notebook([text, *SOLUTIONS], own)
        for own, text in zip(STUDENTS[:3], cells, strict=True)
    }
    memory, endless, usual, *_ = graded(tmp_path, files).results
    assert [r.score for r in (memory, endless, usual)] == [TINY.points] * 3
    (flag,) = memory.flags
    assert flag.startswith("stopped in the notebook: code cell 2, 'x = [0] * 10**11': MemoryError")
    (flag,) = endless.flags
    assert "'while True:': took too long or too much, and was left out" in flag
    assert usual.flags == []


def test_wrong_secret(tmp_path):
    """Each notebook holds public numbers of its own, from the secret it was built with."""
    other = {
        f"{NAME}_{own}.ipynb": built("another secret, long enough", own) for own in STUDENTS[:2]
    }
    (warning,) = graded(tmp_path / "a", other, assignment=load(NAME)).warnings
    assert "the public numbers in 2 of 2 notebooks come from another secret" in warning
    for folder, secret in (("b", SECRET), ("c", None)):
        right = {f"{NAME}_{own}.ipynb": built(secret, own) for own in STUDENTS[:2]}
        found = graded(tmp_path / folder, right, assignment=load(NAME))
        assert found.warnings == []
        assert [r.score for r in found.results[:2]] == [load(NAME).points] * 2


@pytest.mark.slow
def test_ids_that_look_alike(tmp_path):
    people = {"josé": "A", "JOSÉ": "B", unicodedata.normalize("NFD", "josé"): "C", "x": "D"}
    found = graded(tmp_path, {"tiny_x.ipynb": honest("x")}, people)
    (warning,) = [w for w in found.warnings if "differ only in case" in w]
    assert "'jos\\xe9'" in warning and "'JOS\\xc9'" in warning and "u0301" in warning


@pytest.mark.one_fast
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_file_name_of_another_unicode_form_is_known(tmp_path, form):
    """macOS takes names apart: an accented id in a zip from there is the same id."""
    own = unicodedata.normalize("NFC", "zoë-é")
    name = unicodedata.normalize(form, f"{own}.ipynb")
    found = graded(tmp_path, {name: honest("...")}, {own: "A", "other": "B"})
    assert found.results[0].score == TINY.points and found.ungraded == []


def test_exact_spelling_decides_between_ids_that_look_alike(tmp_path):
    people = {"ab1": "A", "AB1": "B"}
    found = graded(tmp_path, {"one.ipynb": honest("ab1"), "two.ipynb": honest("AB1")}, people)
    assert [result.score for result in found.results] == [10, 10]


@pytest.mark.slow
def test_nobody_right_and_everybody_equal(tmp_path):
    wrong = ["def effective_batch(*_): return 0", *SOLUTIONS[1:]]
    nothing = ["def effective_batch(*_): return 0"]
    for folder, cells, says in (
        ("a", SOLUTIONS, ["all 6 have the same score, 10: is that possible?"]),
        ("b", wrong, ["all 6 have the same score, 7", "nobody of 6 who tried has a point in effe"]),
        ("c", nothing, ["nobody of 6 has a point: is something wrong with the set-up?"]),
    ):
        files = {f"tiny_{own}.ipynb": notebook(cells, own) for own in STUDENTS}
        found = graded(tmp_path / folder, files).warnings
        assert len(found) == len(says)
        assert all(w.startswith(s) for w, s in zip(found, says, strict=True)), found


@pytest.mark.slow
def test_many_files_that_were_not_graded(tmp_path):
    files = {f"tiny_{own}.ipynb": honest(own) for own in STUDENTS[:2]}
    files |= {f"x{n}.pdf": b"%PDF" for n in range(3)}
    found = graded(tmp_path, files)
    assert "3 of 5 files were not graded; 3 times: it is no notebook (.ipynb)" in found.warnings


@pytest.mark.slow
def test_newer_python(tmp_path):
    files = {}
    for number, own in enumerate(STUDENTS):
        document = json.loads(honest(own))
        document["metadata"]["language_info"] = {"version": f"9.{number % 2}.3"}
        files[f"tiny_{own}.ipynb"] = json.dumps(document).encode()
    warnings = graded(tmp_path, files).warnings
    assert any(
        w.startswith("6 of 6 notebooks were saved with a newer Python than the grader's")
        and "(3 with 9.0, 3 with 9.1): grade with --python python9.1" in w
        for w in warnings
    )


def test_warnings_come_first_and_change_the_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("instructor.grade.grade.load", lambda name: TINY)
    files = {f"tiny_{own}.ipynb": honest(own) for own in STUDENTS}
    submissions, roster, secret, out = write_class(tmp_path, dict.fromkeys(STUDENTS, "A"), files)
    words = ["tiny", str(submissions), "--roster", str(roster), "--secret-file", str(secret)]
    assert main([*words, "--out", str(out)]) == LOOK_FIRST == 4
    said = capsys.readouterr()
    assert "Look at this first: all 6 have the same score" in said.err
    assert said.out.startswith("6 graded")
    page = (tmp_path / "out/class_report.html").read_text("utf-8")
    body = page[page.index("<body>") :]
    assert body.index("all 6 have the same score") < body.index("6 students: 6 graded")


@pytest.mark.slow
def test_thirty_thousand_broken_cells_make_no_long_report(tmp_path):
    broken = "def effective_batch(:"
    cells = [*SOLUTIONS, *[broken] * 30_000]
    files = {f"tiny_{STUDENTS[0]}.ipynb": notebook(cells, STUDENTS[0])}
    found = graded(tmp_path, files)
    assert found.results[0].score == TINY.points
    for path in (tmp_path / "out").rglob("*.*"):
        if path.suffix in (".html", ".csv"):
            assert path.stat().st_size < 50_000, path


@pytest.mark.slow
def test_thousands_of_strange_files_make_no_long_report(tmp_path):
    files = {f"tiny_{STUDENTS[0]}/{n}.pdf": b"%PDF" for n in range(3000)}
    graded(tmp_path, files)
    assert (tmp_path / "out/class_report.html").stat().st_size < 300_000
    assert (tmp_path / "out/grades.csv").stat().st_size < 20_000
