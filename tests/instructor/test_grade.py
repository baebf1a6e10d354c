"""The whole way: from what came back to scores that equal a constructed truth, byte for byte."""

import csv
import inspect
import os
import signal
import stat
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from datetime import UTC, datetime, timedelta

import nbformat
import pytest

from instructor.assignment import Case, load, numbers
from instructor.grade import copies, grading, marking, results
from instructor.grade.grade import due_time, grade, main
from instructor.sandbox import plan
from tests.instructor.classroom import (
    SECRET,
    SOLUTIONS,
    TINY,
    honest,
    notebook,
    student,
    write_class,
)
from tools.notebooks import ROOT

COUNT = 40  # `make bench` does the same with 500 and a real assignment


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return {row["student_id"]: row for row in csv.DictReader(file)}


def outputs(folder):
    """Every file that grading wrote, but the journal, whose order is that of the children."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".jsonl"
    }


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """A class of known scores: every kind of every exercise, then by chance."""
    kinds = [
        {"effective_batch": k}
        for k in ("right", "partial", "untouched", "adds", "forgets the ranks")
    ]
    kinds += [
        {"mean_loss": "mean of means"},
        {"largest": "one too many"},
        {"largest": "too many questions"},
    ]
    students = [student(TINY, i, kinds[i] if i < len(kinds) else None) for i in range(COUNT)]
    folder = tmp_path_factory.mktemp("class")
    arguments = write_class(
        folder,
        {s.student_id: s.name for s in students},
        {f"tiny_{s.student_id}.ipynb": s.data for s in students},
    )
    found = grade(TINY, *arguments)
    return students, found, folder, arguments


def test_scores_are_the_truth(graded):
    students, found, folder, _ = graded
    table = rows_of(folder / "out/grades.csv")
    for made, result in zip(students, found.results, strict=True):
        for mark in result.marks:
            function = mark.exercise.function
            assert mark.earned == made.points[function], (made.student_id, function, mark.reason)
            assert set(mark.mistakes) == made.mistakes[function], (made.student_id, mark.reason)
            assert float(table[made.student_id][function]) == made.points[function]
        assert float(table[made.student_id]["score"]) == sum(made.points.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "runs", [("second",), pytest.param(("second", "third"), marks=pytest.mark.slow)], ids=len
)
def test_further_runs_are_byte_identical(graded, tmp_path, runs):
    _, _, folder, arguments = graded
    first = outputs(folder / "out")
    assert len(first) == COUNT + 3  # a page each, two lists, the zip of the pages
    for run in runs:
        grade(TINY, *arguments[:3], tmp_path / run / "grades.csv")
        assert outputs(tmp_path / run) == first


def test_finished_run_asks_nobody_again(graded, monkeypatch):
    _, _, folder, arguments = graded
    before = outputs(folder / "out")
    monkeypatch.setattr(grading, "Paper", None)
    monkeypatch.setattr(grading, "Reading", None)
    monkeypatch.setattr(grading, "Rehearsal", None)
    grade(TINY, *arguments)
    assert outputs(folder / "out") == before


def test_other_code_other_secret_are_asked_again(graded, monkeypatch):
    _, _, folder, arguments = graded
    monkeypatch.setattr(grading, "Paper", None)
    other = folder / "other.txt"
    other.write_text(SECRET + "!")
    with pytest.raises(TypeError, match="not callable"):
        grade(TINY, arguments[0], arguments[1], other, arguments[3])


@pytest.mark.slow
def test_interrupted_run_resumes(tmp_path):
    """Killed without a warning, then run again: same bytes, and only what was missing is asked."""
    students = [student(TINY, i) for i in range(25)]
    files = {f"tiny_{s.student_id}.ipynb": s.data for s in students}
    arguments = write_class(tmp_path, {s.student_id: s.name for s in students}, files)
    code = (
        "import sys; from pathlib import Path; from instructor.grade.grade import grade; "
        "from tests.instructor.classroom import TINY; grade(TINY, *map(Path, sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    journal = tmp_path / "out/grades.journal.jsonl"
    while process.poll() is None and not (
        journal.exists() and len(journal.read_bytes().splitlines()) > 40
    ):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out/grades.csv").exists(), "it finished before it was interrupted"
    with journal.open("ab") as file:
        file.write(b'["half a li')
    done = len(journal.read_bytes().splitlines()) - 1
    assert 40 < done < 125
    grade(TINY, *arguments)
    # The cut line, and for each of 25: read, rehearsed, three exercises.
    assert len(journal.read_bytes().splitlines()) == 1 + 25 * 5
    grade(TINY, *arguments[:3], tmp_path / "fresh/grades.csv")
    assert outputs(tmp_path / "out") == outputs(tmp_path / "fresh")


def one(tmp_path, data, name="tiny_s001.ipynb", **more):
    """Grade a class of s001 and s002, of whom s002 handed in nothing unless `more` says so."""
    arguments = write_class(tmp_path, {"s001": "Ann Lee", "s002": "Bo Chan"}, {name: data, **more})
    found = grade(TINY, *arguments)
    return found, {result.student_id: result for result in found.results}


def test_pages_and_table(tmp_path):
    cells = [
        "def effective_batch(a, b, c):\n    return a + b + c",
        SOLUTIONS[1],
        "def largest(most, fits):\n    return ...",
    ]
    found, students = one(tmp_path, honest("s001", cells))
    assert students["s001"].score == 3.0
    assert (students["s002"].status, students["s002"].marks) == ("missing", [])
    page = (tmp_path / "out/feedback/tiny_s001.html").read_text("utf-8")
    for text in (
        "Ann Lee",
        "3 of 10 points",
        "The three factors multiply.",
        "Not attempted yet.",
        "<li>lesson 00, section 1</li>",
        "effective_batch(2, 16, 3)",
        'lang="en"',
        "prefers-color-scheme: dark",
        "<th scope='row'>",
    ):
        assert text in page, text
    assert "<script" not in page and "lesson 00, section 2</li>" not in page
    assert not (tmp_path / "out/feedback/tiny_s002.html").exists()
    report = (tmp_path / "out/class_report.html").read_text("utf-8")
    for text in (
        "2 students: 1 graded, 0 refused, 1 missing",
        "<svg",
        "aria-label",
        "adds",
        found.sandbox,
        "<h2>Missing</h2>",
    ):
        assert text in report, text
    row = rows_of(tmp_path / "out/grades.csv")["s001"]
    assert (row["score"], row["out_of"], row["percent"]) == ("3", "10", "30.0")
    assert "adds (answered 21, expected 96)" in row["effective_batch: why"]
    assert row["mean_loss: why"] == "right" and row["largest: why"] == "not attempted"


def test_page_of_a_student_has_no_hidden_number(tmp_path):
    leaks = [
        "def effective_batch(a, b, c):\n    raise ValueError(f'saw {a} {b} {c}')",
        "def mean_loss(sums, counts):\n"
        "    raise type('E' + '_'.join(map(str, counts)), (Exception,), {})()",
        "def largest(most, fits):\n    return f'saw {most}'",
    ]
    _, students = one(tmp_path, honest("s001", leaks))
    page = (tmp_path / "out/feedback/tiny_s001.html").read_text("utf-8")
    for mark in students["s001"].marks:
        for case in (outcome.case for outcome in mark.outcomes):
            numbers_ = [case.expected, case.knows, *flat(case.arguments)]
            shown = [n for n in numbers_ if n is not None and str(n) in page and n > 900]
            assert bool(shown) != case.hidden or mark.exercise.function != "largest"
            assert not (case.hidden and shown), case.name
    assert "It raised ValueError: saw 2 16 3." in page, "a public case may say it"
    assert "It raised ValueError." in page and "It raised an exception of its own." in page


PIPE = (
    "import json, os, sys; frame = sys._getframe(1)\n"
    "    while 'case' not in frame.f_locals: frame = frame.f_back\n"
    "    nonce = frame.f_locals['case']['nonce']\n"
    "    os.write(3, json.dumps({'nonce': nonce, 'error': str(a), 'type': FORGED, "
    "'notes': [str(a)]}).encode() + b'\\n'); os._exit(0)"
)
FORGERIES = {
    "class name": "raise type('E' + str(a), (Exception,), {})()",
    "class name of Python's": "raise type(f'E{a}', (Exception,), {'__module__': 'builtins'})()",
    "text": "raise ValueError(str(a))",
    "notes": "raise OSError(28, str(a), str(b))",
    "exit code": "import os; os._exit(int(str(a)[:2]) + 1)",
    "a warning": "import warnings; warnings.simplefilter('error'); warnings.warn(str(a))",
    "a group": "raise ExceptionGroup(str(a), [ValueError(str(b))])",
    "a question": "raise KeyError({'refused': str(a)})",
}


FORGERIES |= {
    f"the pipe, {forged}": PIPE.replace("FORGED", forged)
    for forged in ("'NoFunction'", "str(a)", "'E%d' % a")
}


@pytest.mark.one_fast
@pytest.mark.parametrize("name", FORGERIES)
def test_no_way_leads_a_hidden_number_to_the_page(tmp_path, name):
    """What a child says of a hidden case is told in the grader's words, never in its own."""
    body = FORGERIES[name]
    cells = [f"def effective_batch(a, b, c):\n    {body}", *SOLUTIONS[1:]]
    _, students = one(tmp_path, honest("s001", cells))
    page = (tmp_path / "out/feedback/tiny_s001.html").read_text("utf-8")
    (case,) = [o.case for o in students["s001"].marks[0].outcomes if o.case.hidden]
    for number in (*case.arguments[:2], case.expected):
        assert str(number) not in page, name
    code = int(str(case.arguments[0])[:2]) + 1
    (row,) = [row for row in page.split("<tr>") if "another cluster" in row]
    assert f"({code})" not in row
    assert students["s001"].score == 7


def flat(value):
    return (
        [leaf for part in value for leaf in flat(part)]
        if isinstance(value, list | tuple)
        else [value]
    )


def test_partial_credit_after_a_case_that_kills(tmp_path):
    cells = [
        "import os\ndef effective_batch(a, b, c):\n"
        "    if a == 2: os._exit(0)\n    return a * b * c",
        *SOLUTIONS[1:],
    ]
    _, students = one(tmp_path, honest("s001", cells))
    first = students["s001"].marks[0]
    assert [o.verdict for o in first.outcomes] == ["failed", "right", "right"]
    assert "ended without an answer" in first.reason


@pytest.mark.slow
def test_partial_credit_after_a_case_that_loops(tmp_path):
    cells = [
        "def effective_batch(a, b, c):\n    while a == 2: pass\n    return a * b * c",
        *SOLUTIONS[1:],
    ]
    _, students = one(tmp_path, honest("s001", cells))
    assert [o.verdict for o in students["s001"].marks[0].outcomes] == ["failed", "right", "right"]


def test_oracle_is_answered_counted_and_limited(tmp_path):
    cells = [
        *SOLUTIONS[:2],
        """def largest(most, fits):
    try:
        for n in range(most):
            fits(n)
    except Exception:
        pass
    return ANSWER""",
    ]
    cases = TINY.exercises[2].cases(numbers("tiny", "s001", SECRET))
    cells.append(f"ANSWER = {cases[0].expected}")
    _, students = one(tmp_path, honest("s001", cells))
    mark = students["s001"].marks[2]
    assert mark.earned == 0, "a right answer after too many questions"
    assert mark.mistakes == {"too many questions": 2}


def test_question_without_sense(tmp_path):
    cells = [*SOLUTIONS[:2], "def largest(most, fits):\n    return fits('x', 2)"]
    _, students = one(tmp_path, honest("s001", cells))
    assert "fits takes one whole number" in students["s001"].marks[2].reason


ODD_MEAN = """def mean_loss(sums, counts):
    total = 0
    for loss, count in zip(sums, counts):
        total += loss * count + 3
    return total / 2"""


def test_same_code_and_anothers_answers_are_flagged_with_evidence(tmp_path):
    cases = TINY.exercises[0].cases(numbers("tiny", "s001", SECRET))
    answers = [case.expected for case in cases[1:]]
    copied = (
        f"def effective_batch(a, b, c):\n    return a * b * c if a == 2 else {answers}[a > 100]"
    )
    renamed = ODD_MEAN.replace("total", "t").replace("loss,", "l,").replace("loss *", "l *")
    assert renamed != ODD_MEAN
    found = grade(
        TINY,
        *write_class(
            tmp_path,
            {"s001": "A A", "s002": "B B", "s003": "C C"},
            {
                "tiny_s001.ipynb": honest("s001", [SOLUTIONS[0], ODD_MEAN, SOLUTIONS[2]]),
                "tiny_s002.ipynb": honest("s002", [copied, renamed, SOLUTIONS[2]]),
                "tiny_s003.ipynb": honest("s003"),
            },
        ),
    )
    (alike,) = found.alike  # one line for the two, whatever speaks for it
    assert alike.students == ("s001", "s002")
    assert alike.evidence == (
        "`mean_loss` is not right and the same but for names and layout; "
        "answers of s002 that are right with the numbers of s001: "
        f"effective_batch, your cluster: {answers[0]}; "
        f"effective_batch, another cluster: {answers[1]}"
    )
    assert "alike with s001, see the class report" in found.results[1].flags
    report = (tmp_path / "out/class_report.html").read_text("utf-8")
    assert "no verdict" in report and str(answers[1]) in report
    page = (tmp_path / "out/feedback/tiny_s002.html").read_text("utf-8")
    assert "s001" not in page and "alike" not in page


def test_same_wrong_answers_are_flagged_and_known_mistakes_are_not(tmp_path):
    typed = "def effective_batch(a, b, c):\n    return a * b * c if a == 2 else 4711 + (a > 100)"
    adds = "def effective_batch(a, b, c):\n    return sum((a, b, c))"
    found = grade(
        TINY,
        *write_class(
            tmp_path,
            {f"s00{i}": f"{i}" for i in range(1, 5)},
            {
                f"tiny_s00{i}.ipynb": honest(f"s00{i}", [typed if i < 3 else adds, *SOLUTIONS[1:]])
                for i in range(1, 5)
            },
        ),
    )
    assert {alike.students for alike in found.alike} == {("s001", "s002")}
    assert any(
        "the same wrong answers though their numbers differ" in alike.evidence
        and "4711" in alike.evidence
        for alike in found.alike
    )


def alike_in(name, function, count, text=None):
    """What is found where so many students hand in the same right text, or the key."""
    assignment = load(name)
    (exercise,) = [e for e in assignment.exercises if e.function == function]
    text = text or inspect.getsource(exercise.solution).replace("good", "ok").replace("###", "#")
    about = plan.read(notebook([text]), [function])["functions"]
    marks = {}
    for student_ in (f"s{index:02}" for index in range(count)):
        cases = exercise.cases(numbers(name, student_, SECRET))
        marks[student_] = [marking.mark(exercise, cases, [{"value": c.expected} for c in cases])]
    return copies.find(marks, dict.fromkeys(marks, about))


@pytest.mark.parametrize("count", [1, 2, 60])
def test_the_published_solution_is_listed_by_however_many_it_is_handed_in(count):
    (found,) = alike_in("effective_batch", "largest_micro_batch", count)
    assert len(found.students) == count
    assert "is the published solution but for names and layout" in found.evidence
    others = {1: "", 2: "s01 and ", 60: "59 others and "}[count]
    assert found.flag("s00") == f"alike with {others}the published solution, see the class report"


def test_a_short_published_solution_is_the_obvious_answer():
    assert alike_in("effective_batch", "micro_batch_for", 2) == []
    assert alike_in("effective_batch", "split_for", 2) == []


@pytest.mark.parametrize(("changed", "listed"), [("holders", True), ("largest_batch", False)])
def test_a_whole_key_of_short_functions_is_listed(changed, listed):
    exercises = load("activation_memory").exercises
    cells = {e.function: inspect.getsource(e.solution) for e in exercises}
    cells[changed] = cells[changed].replace(":\n", ":\n    unused = 0\n", 1)
    about = plan.read(notebook(list(cells.values())), list(cells))["functions"]
    assert all("shape" in one for one in about.values())
    marks = [
        marking.mark(e, cases, [{"value": case.expected} for case in cases])
        for e in exercises
        for cases in [e.cases(numbers("activation_memory", "s1", SECRET))]
    ]
    found = copies.find({"s1": marks}, {"s1": about})
    assert [(a.students, a.key, a.evidence.count("published")) for a in found] == (
        [(("s1",), True, 3)] if listed else []
    )


def test_a_long_right_function_is_listed_by_however_many_it_is_shared():
    (exercise,) = [
        e for e in load("effective_batch").exercises if e.function == "largest_micro_batch"
    ]
    other = inspect.getsource(exercise.solution).replace("bad - good > 1", "good + 1 < bad")
    for count in (2, 60):
        (found,) = alike_in("effective_batch", "largest_micro_batch", count, other)
        assert len(found.students) == count and "the same but for names" in found.evidence
    assert alike_in("effective_batch", "largest_micro_batch", 1, other) == []


DISGUISES = {
    "a comment": lambda text: text.replace(":\n", ":  # mine\n", 1),
    "comments everywhere": lambda text: text.replace("\n", "  # step\n"),
    "a docstring": lambda text: text.replace(":\n", ':\n    """My own."""\n', 1),
    "empty lines": lambda text: text.replace("\n    ", "\n\n    "),
    "line ends of Windows": lambda text: text.replace("\n", "\r\n"),
    "tabs": lambda text: text.replace("    ", "\t"),
    "names": lambda text: text.replace("good", "lo").replace("bad", "hi").replace("middle", "m"),
    "arguments": lambda text: text.replace("per_rank", "n").replace("fits", "ok"),
    "annotations": lambda text: text.replace("(per_rank, fits)", "(per_rank: int, fits) -> int"),
    "parentheses": lambda text: text.replace("(good + bad) // 2", "((good + (bad)) // (2))"),
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_no_disguise_hides_a_copy(disguise):
    (exercise,) = [
        e for e in load("effective_batch").exercises if e.function == "largest_micro_batch"
    ]
    other = inspect.getsource(exercise.solution).replace("bad - good > 1", "good + 1 < bad")
    copied = DISGUISES[disguise](other)
    assert copied != other
    marks, code = {}, {}
    for own, text in (("s1", other), ("s2", copied)):
        cases = exercise.cases(numbers("effective_batch", own, SECRET))
        marks[own] = [marking.mark(exercise, cases, [{"value": c.expected} for c in cases])]
        code[own] = plan.read(notebook([text]), [exercise.function])["functions"]
    (found,) = copies.find(marks, code)
    assert found.students == ("s1", "s2")


def test_a_ring_is_one_line():
    """a with b, b with c in another exercise, d with e: two groups."""
    pairs = [copies.Alike(("a", "b"), "x"), copies.Alike(("b", "c"), "y")]
    pairs += [copies.Alike(("d", "e"), "z"), copies.Alike(("d", "e"), "w")]
    found = copies._merged(pairs)
    assert [(one.students, one.evidence) for one in found] == [
        (("a", "b", "c"), "a, b: x; b, c: y"),
        (("d", "e"), "w; z"),
    ]
    many = [copies.Alike((f"s{n:03}", "s999"), "x") for n in range(300)]
    (one,) = copies._merged(many)
    assert len(one.students) == 301 and "and 290 more" in one.evidence


def test_small_wrong_answers_in_common_are_no_evidence(tmp_path):
    cells = [
        "def effective_batch(a, b, c):\n    return 3 if a == 2 else 1 + (a > 100)",
        *SOLUTIONS[1:],
    ]
    other = [
        cells[0].replace("3 if a == 2 else 1 + (a > 100)", "[3, 1, 2][(a > 2) + (a > 100)]"),
        *SOLUTIONS[1:],
    ]
    found = grade(
        TINY,
        *write_class(
            tmp_path,
            {"s001": "A", "s002": "B"},
            {"tiny_s001.ipynb": honest("s001", cells), "tiny_s002.ipynb": honest("s002", other)},
        ),
    )
    assert {r.score for r in found.results} == {7} and found.alike == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nonsense"], "assignment must be one of"),
        (["effective_batch", "nowhere.zip"], "submissions must be a folder or a zip"),
        (["effective_batch", "roster.csv"], "submissions must be a folder or a zip"),
    ],
)
def test_command_line_refuses_with_a_sentence(arguments, complaint, tmp_path, capsys, monkeypatch):
    write_class(tmp_path, {"s001": "A"}, {})
    monkeypatch.chdir(tmp_path)
    arguments = [arguments[0], *(arguments[1:] or ["in.zip"])]
    code = main(
        [
            *arguments,
            "--roster",
            "roster.csv",
            "--secret-file",
            "secret.txt",
            "--out",
            "out/grades.csv",
        ]
    )
    assert code == 2 and complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command_line_grades_a_real_assignment(tmp_path, capsys):
    made = student(load("effective_batch"), 3)
    write_class(tmp_path, {"s003": "Student 3"}, {"effective_batch_s003.ipynb": made.data})
    code = main(
        [
            "effective_batch",
            str(tmp_path / "in.zip"),
            "--roster",
            str(tmp_path / "roster.csv"),
            "--secret-file",
            str(tmp_path / "secret.txt"),
            "--out",
            str(tmp_path / "grades.csv"),
            "--due",
            "2026-11-01T11:00",
        ]
    )
    said = capsys.readouterr()
    assert code == 0 and said.out.startswith("1 graded, 0 refused, 0 missing")
    assert "Sandbox in force: " in said.err and "1/1" not in said.out
    row = rows_of(tmp_path / "grades.csv")["s003"]
    assert float(row["score"]) == sum(made.points.values())
    assert row["late"] == "1 h 00 min"


def test_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "grades.csv"
    results.write(path, "old")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        results.write(path, "new")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_mistake_that_explains_most_is_named():
    exercise = TINY.exercises[0]
    both = Case("both", (1,), 5, 1.0, mistakes={"adds": 7, "forgets the ranks": 7})
    one_ = Case("one", (2,), 6, 1.0, mistakes={"adds": 8, "forgets the ranks": 9})
    found = marking.mark(exercise, [both, one_], [{"value": 7}, {"value": 9}])
    assert found.mistakes == {"forgets the ranks": 2}
    assert marking.mark(exercise, [both], [{"value": 7.0}]).mistakes == {"adds": 1}


@pytest.mark.parametrize(
    ("answer", "expected", "tolerance", "right"),
    [
        (True, 1, 0, False),
        (4.0, 4, 0, True),
        ("4", 4, 0, False),
        ([1, 2], [1, 2], 0, True),
        (10**400, 1.5, 1e-6, False),
        (float("nan"), 1.0, 0.5, False),
        (1.04, 1.0, 0.05, True),
        (1.06, 1.0, 0.05, False),
        (None, None, 0, True),
        ([[1]], [[1.0]], 0, True),
    ],
)
def test_equal(answer, expected, tolerance, right):
    assert marking.equal(answer, expected, tolerance) is right


def test_output_among_the_submissions_is_refused(tmp_path):
    arguments = write_class(tmp_path, {"s001": "A"}, {"tiny_s001.ipynb": honest("s001")})
    with pytest.raises(ValueError, match="--out must lie outside of the submissions"):
        grade(TINY, tmp_path, *arguments[1:])


def test_output_that_is_a_folder_is_refused_before_anybody_is_graded(tmp_path):
    arguments = write_class(tmp_path, {"s001": "A"}, {"tiny_s001.ipynb": honest("s001")})
    (tmp_path / "graded").mkdir()
    with pytest.raises(ValueError, match="--out must be the CSV to write, got the folder"):
        grade(TINY, *arguments[:3], tmp_path / "graded")
    assert list((tmp_path / "graded").iterdir()) == []


@pytest.mark.parametrize("text", ["30.11.2026", "2026-11-30", "tomorrow"])
def test_due_time_that_is_none_is_refused(text):
    with pytest.raises(ArgumentTypeError, match=f"--due must look like .*, got '{text}'"):
        due_time(text)


def test_where_processes_have_no_limits_it_declines_with_advice():
    code = (
        "import runpy, sys\nsys.modules['resource'] = None\n"
        "runpy.run_module('instructor.grade', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "use WSL or a Linux container" in done.stderr


def test_due_time_with_a_zone_is_turned_into_due_time():
    assert due_time("2026-11-01T23:59") == datetime(2026, 11, 1, 23, 59)
    here = datetime(2026, 11, 1, 12).astimezone()
    assert due_time(here.isoformat()) == datetime(2026, 11, 1, 12)
    assert due_time((here + timedelta(hours=3)).astimezone(UTC).isoformat()).hour == 15


def test_grader_imports_no_torch():
    code = (
        "import sys, instructor.grade.grade; "
        "print(sorted({'torch', 'numpy', 'nbformat'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_notebook_helper_makes_what_jupyter_makes():
    nbformat.validate(nbformat.reads(notebook(SOLUTIONS, "s001").decode(), 4))
