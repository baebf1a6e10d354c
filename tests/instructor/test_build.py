"""What the builder writes: students' notebooks without secrets, a key that passes, a rubric."""

import ast
import contextlib
import io
import json
import re
import subprocess
import sys

import jupytext
import nbformat
import pytest

from instructor.assignment import load, names, numbers, sources
from instructor.build.build import build, main
from instructor.build.notebooks import METADATA, answer_key, student_notebook
from instructor.build.selfcheck import NOT_ATTEMPTED, same
from instructor.grade.roster import file_name, read_roster
from instructor.grade.rubric import rubric
from tools.notebooks import METADATA as LESSONS
from tools.notebooks import ROOT, execute

SECRET = "the instructor's, of this test"


@pytest.fixture
def roster(tmp_path):
    path = tmp_path / "roster.csv"
    path.write_text('student_id,name,group\ns001,Ada,A\ns/2,"Noether, Emmy",B\n', "utf-8")
    return path


@pytest.fixture
def secret_file(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text(f"{SECRET}\n", "utf-8")
    return path


def run(notebook) -> list[str]:
    """Every code cell's printed text, the cells run one after the other as a kernel would."""
    namespace, printed = {"__name__": "__main__"}, []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(cell.source, "cell", "exec"), namespace)
            printed.append(out.getvalue().strip())
    return printed


def check_cells(notebook) -> int:
    return sum("check" in cell.metadata.get("tags", []) for cell in notebook.cells)


@pytest.mark.one_fast
@pytest.mark.parametrize("name", names())
def test_untouched_notebook_raises_nothing_and_says_not_attempted(name):
    notebook = student_notebook(load(name))
    said = [text for text in run(notebook) if text]
    assert said == [NOT_ATTEMPTED] * check_cells(notebook) != []


def test_run_all_in_a_real_kernel_without_the_course(tmp_path):
    notebook = student_notebook(load("effective_batch"), numbers("effective_batch", "s1", SECRET))
    execute(notebook, tmp_path)
    texts = [out.text.strip() for cell in notebook.cells for out in cell.get("outputs", [])]
    assert texts == [NOT_ATTEMPTED] * check_cells(notebook)


@pytest.mark.parametrize("name", names())
def test_student_notebook_needs_the_standard_library_only(name, tmp_path):
    cells = [c.source for c in student_notebook(load(name)).cells if c.cell_type == "code"]
    script = tmp_path / "cells.py"
    script.write_text("\n".join(cells), "utf-8")
    done = subprocess.run(
        [sys.executable, "-I", "-S", script], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.one_fast
@pytest.mark.parametrize("name", names())
def test_key_passes_every_check(name):
    key = answer_key(load(name))
    said = [text for text in run(key) if text]
    assert len(said) == check_cells(key) == len(load(name).exercises)
    assert all(text.startswith("Right: all") for text in said)
    assert not any("SOLUTION" in cell.source for cell in key.cells)


def leaks(notebook, name: str, student: str | None) -> list[str]:
    """What a student must not see, and would: solutions, the secret, hidden cells, instances."""
    text = nbformat.writes(notebook) + "\n".join(cell.source for cell in notebook.cells)
    cells = [c for path in sources(load(name)) for c in jupytext.read(path).cells]
    hidden = [cell.source for cell in cells if "hidden" in cell.metadata.get("tags", [])]
    private = {SECRET, "BEGIN SOLUTION", "END SOLUTION"}
    private |= {
        f"def {node.name}("
        for source in hidden
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
    }
    for cell in cells:
        body = re.findall(r"BEGIN SOLUTION\n(.*?)### END", cell.source, re.S)
        private |= {line.strip() for line in "".join(body).splitlines() if len(line.strip()) > 12}
    for exercise in load(name).exercises:
        for student_id in [student] if student else [f"s{n}" for n in range(30)]:
            private |= {
                json.dumps(list(case.arguments))
                for case in exercise.cases(numbers(name, student_id, SECRET))
                if case.hidden
            }
    return sorted(one for one in private if one in text)


@pytest.mark.one_fast
@pytest.mark.parametrize("student", [None, "s1", "s2"])
@pytest.mark.parametrize("name", names())
def test_student_notebook_keeps_every_secret(name, student):
    own = numbers(name, student, SECRET) if student else None
    assert leaks(student_notebook(load(name), own), name, student) == []


def test_a_leak_is_seen():
    key = answer_key(load("effective_batch"))
    found = leaks(key, "effective_batch", None)
    assert "return micro_batch_size * gradient_accumulation_steps * world_size" in found
    instance = numbers("effective_batch", "s1", SECRET)
    (hidden, *_) = [c for c in load("effective_batch").exercises[0].cases(instance) if c.hidden]
    key.cells[0].source += f"{list(hidden.arguments)} {SECRET}"
    assert {SECRET, json.dumps(list(hidden.arguments))} <= set(leaks(key, "effective_batch", "s1"))


def test_notebook_is_ready_for_colab():
    notebook = student_notebook(load("effective_batch"), numbers("effective_batch", "s1", SECRET))
    nbformat.validate(notebook)
    assert notebook.metadata == METADATA
    assert METADATA["kernelspec"] == LESSONS["kernelspec"]
    assert not {"GPU", "T4"} & set(re.findall(r"\w+", str(notebook.metadata)))
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code[0].source == 'STUDENT_ID = "s1"'
    assert not any(cell.outputs or cell.execution_count for cell in code)
    points = [cell.metadata.points for cell in code if "exercise" in cell.metadata.tags]
    assert points == [exercise.points for exercise in load("effective_batch").exercises]
    shared = student_notebook(load("effective_batch"))
    assert [c.source for c in shared.cells if c.cell_type == "code"][0] == 'STUDENT_ID = "..."'


@pytest.mark.parametrize("student", ['quote"d', "back\\slash", "ümläut", "line\nbreak", "'''"])
def test_any_student_id_is_itself_in_the_notebook(student):
    notebook = student_notebook(load("loss_scaling"), numbers("loss_scaling", student, SECRET))
    namespace = {}
    exec([c.source for c in notebook.cells if c.cell_type == "code"][0], namespace)
    assert namespace["STUDENT_ID"] == student


@pytest.mark.parametrize("name", names())
def test_example_in_the_heading_is_right(name):
    assignment = load(name)
    text = "\n".join(cell.source for cell in student_notebook(assignment).cells)
    examples = re.findall(r"^For example, `(.+)` gives `(.+)`\.$", text, re.M)
    assert len(examples) == len(assignment.exercises)
    for exercise, (call, result) in zip(assignment.exercises, examples, strict=True):
        if not exercise.oracles:
            answer = eval(call, {exercise.function: exercise.solution})
            assert same(answer, ast.literal_eval(result), 1e-11)


@pytest.mark.parametrize("name", names())
def test_rubric_has_points_time_and_mistakes(name):
    assignment, text = load(name), rubric(load(name))
    assert text.startswith(f"# Rubric: {assignment.title}\n\n{assignment.points:g} points, about ")
    for exercise in assignment.exercises:
        row = f"`{exercise.function}` | {exercise.points:g} | {exercise.minutes} |"
        assert row in text
        assert all(sentence in text for sentence in exercise.mistakes.values())
    rows = re.findall(r"^\| [^|]+ \| (?:public|hidden) \| ([\d.]+) \|$", text, re.M)
    assert sum(map(float, rows)) == assignment.points


def test_build_writes_a_notebook_for_each_student(tmp_path, roster, secret_file, capsys):
    out = tmp_path / "out"
    arguments = [
        "effective_batch",
        "--out",
        str(out),
        "--roster",
        str(roster),
        "--secret-file",
        str(secret_file),
    ]
    assert main(arguments) == 0
    assert "2 student notebooks" in capsys.readouterr().out
    first = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert {path.relative_to(out).as_posix() for path in first} == {
        "effective_batch_answer_key.ipynb",
        "effective_batch_rubric.md",
        "students/effective_batch_s001.ipynb",
        f"students/{file_name('effective_batch', 's/2')}",
    }
    texts = [text for path, text in first.items() if path.parent.name == "students"]
    assert texts[0] != texts[1]
    assert main(arguments) == 0
    assert first == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_build_without_a_roster_writes_one_for_all(tmp_path, capsys):
    assert main(["checkpointing", "--out", str(tmp_path)]) == 0
    assert "1 student notebook in" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "students").iterdir()] == ["checkpointing.ipynb"]


def test_refusals_name_the_remedy(tmp_path, roster, secret_file, capsys):
    short = tmp_path / "short.txt"
    short.write_text("guess me", "utf-8")
    twice = tmp_path / "twice.csv"
    twice.write_text("student_id,name\ns1,Ada\ns1,Eve\n", "utf-8")
    other = tmp_path / "other.csv"
    other.write_text("id,name\ns1,Ada\n", "utf-8")
    latin = tmp_path / "latin.csv"
    latin.write_bytes("student_id,name\ns1,Zoë\n".encode("latin-1"))
    semicolons = tmp_path / "semicolons.csv"
    semicolons.write_text("student_id;name\ns1;Ada\n", "utf-8")
    out = str(tmp_path / "out")
    for options, words in (
        (["nothing"], "assignment must be one of"),
        (["checkpointing", "--roster", str(roster)], "--secret-file must be given"),
        (
            ["checkpointing", "--roster", str(roster), "--secret-file", str(short)],
            "secret must have at least 16",
        ),
        (
            ["checkpointing", "--roster", str(twice), "--secret-file", str(secret_file)],
            "got 's1' for 'Eve'",
        ),
        (
            ["checkpointing", "--roster", str(other), "--secret-file", str(secret_file)],
            "columns student_id,name",
        ),
        (
            ["checkpointing", "--roster", "missing.csv", "--secret-file", str(secret_file)],
            "--roster must be a file, got 'missing.csv'; see step 2",
        ),
        (
            ["checkpointing", "--roster", str(roster), "--secret-file", "missing.txt"],
            "--secret-file must be a file, got 'missing.txt'; see step 1",
        ),
        (
            ["checkpointing", "--roster", str(latin), "--secret-file", str(secret_file)],
            "save it as CSV UTF-8",
        ),
        (
            ["checkpointing", "--roster", str(semicolons), "--secret-file", str(secret_file)],
            "got 'student_id;name'; separate columns by commas",
        ),
    ):
        assert main([*options, "--out", out]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_roster_keeps_other_columns_and_reads_spreadsheets(tmp_path):
    path = tmp_path / "roster.csv"
    path.write_bytes("\ufeffstudent_id,name,group\r\n s1 ,Ada,A\r\n".encode())
    assert read_roster(path) == [{"student_id": "s1", "name": "Ada", "group": "A"}]


def test_file_names_are_safe_and_different():
    ids = ["a b", "a-b", "a/b", "../a", "ä", "A", "a.b", "x" * 10, "名前"]
    found = [file_name("effective_batch", student) for student in ids]
    assert len(set(found)) == len(ids)
    assert all(re.fullmatch(r"effective_batch_[A-Za-z0-9-]+\.ipynb", name) for name in found)


def test_a_missing_exercise_cell_is_refused(tmp_path, monkeypatch):
    (path,) = sources(load("loss_scaling"))
    spoilt = tmp_path / "loss_scaling.py"
    spoilt.write_text(
        path.read_text("utf-8").replace('tags=["exercise"]', 'tags=["setup"]', 1), "utf-8"
    )
    monkeypatch.setattr("instructor.build.notebooks.sources", lambda assignment: [spoilt])
    with pytest.raises(ValueError, match="got none for lost_gradients"):
        student_notebook(load("loss_scaling"))


def make(folder, *words):
    return subprocess.run(["make", *words], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def house(tmp_path):
    """A folder with the verbs, set up, and a Python that only says what it is asked."""
    for name in (
        "Makefile",
        "instructor/verbs.mk",
        "requirements.txt",
        "requirements.lock",
        "pyproject.toml",
        "class/effective_batch/graded/grades.csv",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(
            (ROOT / name).read_text("utf-8") if "class" not in name else "student_id\n"
        )
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / ".venv/bin/python").chmod(0o755)
    (tmp_path / re.search(r"touch (\S+)", make(tmp_path, "-n", "lab").stdout)[1]).touch()
    return tmp_path


ALL = ["NAME=effective_batch", "SUBMISSIONS=in.zip", "ROSTER=r.csv", "SECRET=s.txt"]


@pytest.mark.parametrize("missing", ALL)
def test_make_names_what_is_missing(house, missing):
    rest = [word for word in ALL if word != missing]
    for verb in ["grade"] if missing == "SUBMISSIONS=in.zip" else ["grade", "assignment"]:
        done = make(house, verb, *rest)
        name = missing.partition("=")[0]
        assert f"make {verb} must name {name}, got none; for example: make {verb}" in done.stderr
        assert (done.returncode, done.stdout) == (2, "")


def test_make_writes_below_class_and_clean_leaves_it(house):
    assert "--out class/effective_batch/graded/grades.csv" in make(house, "grade", *ALL).stdout
    assert make(house, "assignment", "NAME=checkpointing").stdout.endswith(
        "-m instructor.build checkpointing --out class/checkpointing\n"
    )
    assert make(house, "clean").returncode == 0
    assert (house / "class/effective_batch/graded/grades.csv").exists()


def test_the_first_assignment_waits_for_no_torch(house):
    """Without the lessons' environment a small one does; with the lock's versions."""
    (stamp,) = (house / ".venv").glob("ready-*")
    stamp.unlink()
    shown = make(house, "-n", "assignment", "NAME=checkpointing").stdout
    (pip,) = re.findall(r"-m pip (?:.*\\\n)*.*", shown)
    assert pip.split()[-4:] == ["ipython", "jinja2", "jupytext", "nbformat"]
    assert "--constraint .venv-teaching/pins.txt" in pip
    assert '.venv-teaching/bin/python -m instructor.build "checkpointing"' in shown
    old = make(house, "assignment", "NAME=checkpointing", "PYTHON=false")
    assert old.returncode and "Python 3.11 or newer is needed" in old.stderr


def test_build_returns_what_it_wrote(tmp_path):
    written = build("loss_scaling", tmp_path)
    assert all(path.is_file() for path in written)
    assert {path.suffix for path in written} == {".ipynb", ".md"}


def test_a_students_own_numbers_stand_in_the_text():
    own = numbers("effective_batch", "s1", SECRET)
    text = "\n".join(
        cell.source
        for cell in student_notebook(load("effective_batch"), own).cells
        if cell.cell_type == "markdown"
    )
    for exercise in load("effective_batch").exercises[:5]:
        (case,) = [case for case in exercise.cases(own) if case.name.startswith("your")]
        arguments = ", ".join(map(repr, case.arguments))
        assert f": `{exercise.function}({arguments})`." in text
    assert "your id and your numbers are in it already" in text
    shared = student_notebook(load("effective_batch"))
    assert "First put your student id" in shared.cells[1].source
    assert shared.cells[-1].source.startswith("## Hand in")
