"""Canvas, Moodle, GitHub Classroom: from what they export to what they take back.

The formats are those of their documentation and sources: Canvas's gradebook CSV, its zip of
submissions and `infer_comment_context_from_filename`; Moodle's grading worksheet, its zip and
`is_valid_filename_for_import`; the roster and grades of `gh classroom`.
"""

import csv
import io
import os
import zipfile
from datetime import datetime

import pytest

from instructor.grade.changes import read_changes
from instructor.grade.grade import grade, main
from instructor.grade.late import Policy
from instructor.grade.roster import read_class, read_roster
from instructor.grade.submissions import Names
from instructor.lms.base import PLAIN
from instructor.lms.known import PLATFORMS, of_path
from tests.instructor.classroom import SECRET, SOLUTIONS, TINY, honest, notebook, student, zipped

CANVAS, MOODLE, GITHUB = PLATFORMS
COUNT = 30
PEOPLE = [
    f"{first} {last}"
    for first in ("Ann", "José", "Zoë van", "=cmd|'A", "Bo", "Li")
    for last in ("Lee", "Núñez", "Dam", "O'Neil", "Chan")
]


def table(rows):
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue()


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file)]


def canvas_export():
    head = [
        "Student",
        "ID",
        "SIS User ID",
        "SIS Login ID",
        "Section",
        "Essay (77)",
        "A tiny assignment (991)",
        "Current Score",
    ]
    lines = [["    Points Possible", "", "", "", "", "5", "10", "(read only)"]]
    for number, name in enumerate(PEOPLE):
        first, _, last = name.rpartition(" ")
        lines.append(
            [
                f"{last}, {first}",
                str(4000 + number),
                f"u{number}",
                f"login{number}",
                "Section 1",
                "4",
                "",
                "80",
            ]
        )
    return table([head, *lines, ["Student, Test", "", "", "", "Section 1", "", "", ""]])


def canvas_path(number, late=False, own="homework-1.ipynb"):
    name = "".join(c for c in PEOPLE[number].casefold() if c.isalnum())
    return f"{name}_{'LATE_' if late else ''}{4000 + number}_{88000 + number}_{own}"


def moodle_export(number_ids=True, most="Maximum Grade"):
    head = [
        "Identifier",
        "Full name",
        "ID number",
        "Email address",
        "Status",
        "Grade",
        most,
        "Grade can be changed",
        "Last modified (submission)",
        "Last modified (grade)",
        "Feedback comments",
    ]
    return table(
        [
            head,
            *(
                [
                    f"Participant {700 + number}",
                    name,
                    f"m{number}" if number_ids else "",
                    f"s{number}@example.org",
                    "Submitted for grading",
                    "",
                    "100.00",
                    "Yes",
                    "Sunday, 1 November 2026, 12:00 PM",
                    "-",
                    "",
                ]
                for number, name in enumerate(PEOPLE)
            ),
        ]
    )


def moodle_path(number, folder=True, new=False):
    start = f"{PEOPLE[number]}_{700 + number}_assignsubmission_file"
    return f"{start}{'' if new else '_'}{'/' if folder else ''}tiny.ipynb"


def github_export():
    head = ["identifier", "github_username", "github_id", "name"]
    return table(
        [
            head,
            *(
                [f"g{number}", f"User-{number}" if number % 2 else f"u{number}", str(number), name]
                for number, name in enumerate(PEOPLE)
            ),
        ]
    )


def student_with(own, index):
    """A student whose points are known, with the id that the platform gives."""
    found = student(TINY, index, own=own)
    found.data = found.data.replace(f"STUDENT_ID = '{own}'".encode(), b"STUDENT_ID = '...'")
    return found


def a_class(tmp_path, export, files):
    (tmp_path / "roster.csv").write_text(export, "utf-8")
    (tmp_path / "secret.txt").write_text(SECRET, "utf-8")
    (tmp_path / "in.zip").write_bytes(zipped(files))
    return [
        tmp_path / "in.zip",
        tmp_path / "roster.csv",
        tmp_path / "secret.txt",
        tmp_path / "out/grades.csv",
    ]


def test_canvas_there_and_back(tmp_path):
    own = [str(4000 + number) for number in range(COUNT)]
    work = {number: student_with(own[number], number) for number in range(COUNT - 2)}
    files = {canvas_path(number, late=number == 3): one.data for number, one in work.items()}
    files["leftclass_9999_1_homework.ipynb"] = honest("4000")
    arguments = a_class(tmp_path, canvas_export(), files)
    found = grade(TINY, *arguments, due=datetime(2026, 11, 1, 11), late_percent=10)
    assert len(found.results) == COUNT, "neither Points Possible nor the test student"
    assert found.results[0].row["name"] == "Ann Lee"
    for number, one in work.items():
        points = sum(one.points.values()) * (0.9 if number == 3 else 1)
        assert found.results[number].score == pytest.approx(points), one.student_id
    assert (
        "leftclass_9999_1_homework.ipynb",
        "Canvas's 9999 is not in the roster; has the student left the class?",
    ) in found.ungraded
    assert [r.late for r in found.results if r.late] == ["some time"]
    # What goes back: Canvas's columns, the assignment's with its number, nobody without a grade.
    lines = rows_of(tmp_path / "out/gradebook.csv")
    assert list(lines[0]) == [
        "Student",
        "ID",
        "SIS User ID",
        "SIS Login ID",
        "Section",
        "A tiny assignment (991)",
    ]
    assert (lines[0]["Student"].strip(), lines[0]["A tiny assignment (991)"]) == (
        "Points Possible",
        "10",
    )
    assert [line["ID"] for line in lines[1:]] == own[: COUNT - 2]
    for number, line in enumerate(lines[1:]):
        got = float(line["A tiny assignment (991)"])
        assert got == pytest.approx(found.results[number].score, abs=0.005)
    # Canvas reads a file's owner from the numbers in its name.
    with zipfile.ZipFile(tmp_path / "out/feedback.zip") as pages:
        for number in work:
            (name,) = [n for n in pages.namelist() if str(4000 + number) in n.split("_")]
            user, attachment = [part for part in name.split("_") if part.isdigit()][:2]
            assert (user, attachment) == (own[number], str(88000 + number))
            assert name.endswith(".html")
            assert "A tiny assignment" in pages.read(name).decode()
        assert len(pages.namelist()) == COUNT - 2


@pytest.mark.one_fast
@pytest.mark.parametrize(("folder", "new"), [(True, False), (True, True), (False, False)])
def test_moodle_there_and_back(tmp_path, folder, new):
    few = range(COUNT if folder and not new else 4)
    work = {number: student_with(f"m{number}", number) for number in few}
    files = {moodle_path(n, folder, new): one.data for n, one in work.items() if n != 2}
    arguments = a_class(tmp_path, moodle_export(), files)
    found = grade(TINY, *arguments)
    for number, one in work.items():
        if number != 2:
            assert found.results[number].score == pytest.approx(sum(one.points.values()))
    before = [*csv.DictReader(io.StringIO(moodle_export()))]
    after = rows_of(tmp_path / "out/gradebook.csv")
    assert [*after[0]] == [*before[0]], "every column in its place"
    for number, (old, new_) in enumerate(zip(before, after, strict=True)):
        changed = {name for name in old if old[name] != new_[name].removeprefix("'")}
        assert changed <= {"Grade", "Feedback comments"}
        if number in work and number != 2:
            assert float(new_["Grade"]) == pytest.approx(10 * found.results[number].score)
        else:
            assert new_["Grade"] == "", "who handed in nothing keeps what stood there"
    with zipfile.ZipFile(tmp_path / "out/feedback.zip") as pages:
        assert len(pages.namelist()) == len(work) - 1
        for name in pages.namelist():  # Moodle takes the first four parts between underscores
            _, participant, kind, plugin, *_ = name.split("/")[0].split("_")
            assert int(participant) - 700 in work and (kind, plugin) == ("assignsubmission", "file")


@pytest.mark.slow
def test_moodle_of_any_release_scales_to_its_maximum(tmp_path):
    """English Moodle calls the column `Maximum Grade`; a worksheet without it keeps its columns."""
    for most, factor in (("Maximum Grade", 10), ("Maximum grade", 10), ("Group", 1)):
        export = moodle_export(most=most)
        arguments = a_class(tmp_path, export, {moodle_path(0): honest("m0")})
        (result, *_) = grade(TINY, *arguments).results
        (row, *_) = rows_of(tmp_path / "out/gradebook.csv")
        assert float(row["Grade"]) == factor * result.score
        assert [*row] == export.splitlines()[0].split(",")


@pytest.mark.slow
def test_github_there_and_back(tmp_path):
    users = [row["github_username"] for row in csv.DictReader(io.StringIO(github_export()))]
    work = {number: student_with(f"g{number}", number) for number in range(6)}
    files = {}
    for number, one in work.items():
        place = f"tiny-submissions/tiny-{users[number].lower()}"
        files[f"{place}/tiny.ipynb"] = one.data
        files[f"{place}/README.md"] = b"# hello"
        files[f"{place}/.git/objects/ab/cdef.ipynb"] = b"x"
    arguments = a_class(tmp_path, github_export(), files)
    changes = tmp_path / "changes.csv"
    changes.write_text("student_id,handed_in\ng1,2026-11-03T11:30\n", "utf-8")
    found = grade(TINY, *arguments, due=datetime(2026, 11, 1, 11), changes=changes)
    for number, one in work.items():
        result = found.results[number]
        assert (result.score, result.flags) == (pytest.approx(sum(one.points.values())), [])
    assert found.ungraded == []
    assert [(r.student_id, r.late) for r in found.results if r.late] == [("g1", "2 d 0 h 30 min")]
    lines = rows_of(tmp_path / "out/gradebook.csv")
    assert len(lines) == 6 and lines[1]["student_repository_name"] == "tiny-user-1"
    assert (lines[1]["roster_identifier"], lines[1]["points_available"]) == ("g1", "10")
    with zipfile.ZipFile(tmp_path / "out/feedback.zip") as pages:
        assert "tiny-user-1/feedback.html" in pages.namelist()


@pytest.mark.parametrize("make", [canvas_export, moodle_export, github_export])
def test_names_are_known_and_formulas_are_text(tmp_path, make):
    path = tmp_path / "roster.csv"
    path.write_text(make(), "utf-8")
    rows = read_roster(path)
    assert [row["name"] for row in rows] == PEOPLE
    assert len({row["student_id"] for row in rows}) == COUNT


@pytest.mark.slow
def test_moodle_without_id_numbers_takes_the_address(tmp_path):
    path = tmp_path / "roster.csv"
    path.write_text(moodle_export(number_ids=False), "utf-8")
    assert read_roster(path)[3]["student_id"] == "s3@example.org"


def test_gradebook_has_no_formula(tmp_path):
    for export, name in ((canvas_export(), "Student"), (moodle_export(), "Full name")):
        arguments = a_class(tmp_path, export, {})
        grade(TINY, *arguments)
        for line in rows_of(tmp_path / "out/gradebook.csv"):
            assert not line[name].startswith(("=", "+", "@"))


@pytest.mark.parametrize(
    ("platform", "path", "owner", "rest"),
    [
        (CANVAS, "doejane_4012_99_s003.ipynb", "4012", "s003.ipynb"),
        (CANVAS, "doejane_LATE_4012_99_s003_2.ipynb", "4012", "s003_2.ipynb"),
        (CANVAS, "zip/doejane_4012_99_x.ipynb", "4012", "x.ipynb"),
        (CANVAS, "homework.ipynb", None, "homework.ipynb"),
        (MOODLE, "J Doe_4012_assignsubmission_file_/a/s003.ipynb", "4012", "a/s003.ipynb"),
        (MOODLE, "J Doe_4012_assignsubmission_file/s003.ipynb", "4012", "s003.ipynb"),
        (MOODLE, "J_D Doe_4012_assignsubmission_file_s003.ipynb", "4012", "s003.ipynb"),
        (MOODLE, "x.ipynb", None, "x.ipynb"),
        (GITHUB, "all/hw-cat/x.ipynb", "cat", "x.ipynb"),
        (GITHUB, "hw-big-cat/x.ipynb", "big-cat", "x.ipynb"),
        (GITHUB, "hw-dog/x.ipynb", None, "x.ipynb"),
        (PLAIN, "s001.ipynb", None, "s001.ipynb"),
    ],
)
def test_whose_a_path_is(platform, path, owner, rest):
    assert platform.owner(path, {"cat", "big-cat", "4012"}) == owner
    assert platform.own_part(path) == rest


def test_platforms_number_goes_before_every_name(tmp_path):
    """A file of Ann's that is called after Bo, by id and by name, is Ann's."""
    path = tmp_path / "roster.csv"
    path.write_text(canvas_export(), "utf-8")
    names = Names(read_roster(path), "tiny", CANVAS)
    assert names.of("chanbo_4000_4024_tiny_4024.ipynb")[0] == "4000"
    assert names.of("x_4000_99_4024 Bo Chan.ipynb") == ["4000", "4024"]
    assert names.stranger("x_5_99_4024.ipynb") == "5"
    assert names.stranger("4024.ipynb") == ""


@pytest.mark.slow
def test_zip_of_a_platform_with_a_plain_roster(tmp_path):
    """Names tell whose it is; feedback still goes where the platform looks."""
    (tmp_path / "plain.csv").write_text("student_id,name\ns1,Ann Lee\n", "utf-8")
    (tmp_path / "secret.txt").write_text(SECRET, "utf-8")
    for path, page in (
        (
            "Ann Lee_12_assignsubmission_file_/t.ipynb",
            "Ann Lee_12_assignsubmission_file_/feedback.html",
        ),
        ("leeann_12_13_t.ipynb", "leeann_12_13_feedback.html"),
        ("s1.ipynb", "tiny_s1.html"),
    ):
        (tmp_path / "in.zip").write_bytes(zipped({path: honest("s1")}))
        out = tmp_path / "out/grades.csv"
        grade(TINY, tmp_path / "in.zip", tmp_path / "plain.csv", tmp_path / "secret.txt", out)
        with zipfile.ZipFile(tmp_path / "out/feedback.zip") as pages:
            assert pages.namelist() == [page]
        assert not (tmp_path / "out/gradebook.csv").exists()
        assert of_path(path, PLAIN).name in ("Moodle", "Canvas", "")


def changed(tmp_path, text, **how):
    """A class of four: right, wrong in one exercise, nothing, refused; with these changes."""
    (tmp_path / "changes.csv").write_text(text, "utf-8")
    people = "student_id,name\ns1,A\ns2,B\ns3,C\ns4,D\n"
    wrong = ["def effective_batch(*_): return 0", *SOLUTIONS[1:]]
    files = {
        "tiny_s1.ipynb": honest("s1"),
        "tiny_s2.ipynb": notebook(wrong, "s2"),
        "tiny_s4.ipynb": b"no notebook",
    }
    arguments = a_class(tmp_path, people, files)
    found = grade(TINY, *arguments, changes=tmp_path / "changes.csv", **how)
    return found, {row["student_id"]: row for row in rows_of(arguments[3])}


def test_points_by_hand_are_shown_as_such_and_survive_every_run(tmp_path):
    text = (
        "student_id,exercise,points,comment\ns2,effective_batch,2.5,at the board; =1+1\n"
        "s3,mean_loss,3,on paper\ns1,,,well done <b>\n"
    )
    for _ in range(2):
        found, rows = changed(tmp_path, text)
        assert (tmp_path / "changes.csv").read_text("utf-8") == text, "it is never written"
        assert (rows["s2"]["score"], rows["s2"]["effective_batch"]) == ("9.5", "2.5")
        why = rows["s2"]["effective_batch: why"]
        assert why.startswith("set by hand to 2.5, the grader found 0: at the board")
        assert (rows["s3"]["score"], rows["s3"]["status"]) == ("3", "by hand")
        assert rows["s1"]["comment"] == "well done <b>"
    page = (tmp_path / "out/feedback/tiny_s2.html").read_text("utf-8")
    assert "Set by your instructor: 2.5 of 3; the grader found 0. at the board" in page
    page = (tmp_path / "out/feedback/tiny_s3.html").read_text("utf-8")
    assert "nothing was handed in" in page and "3 of 3" in page
    assert "well done &lt;b&gt;" in (tmp_path / "out/feedback/tiny_s1.html").read_text("utf-8")
    report = (tmp_path / "out/class_report.html").read_text("utf-8")
    assert "Changed by hand" in report and "1 by hand" in report


def test_missing_refused_and_zero_are_three_things(tmp_path):
    _, rows = changed(
        tmp_path,
        "student_id,exercise,points\n" + "".join(f"s2,{e.function},0\n" for e in TINY.exercises),
    )
    assert [(rows[own]["status"], rows[own]["score"]) for own in ("s2", "s3", "s4")] == [
        ("graded", "0"),
        ("missing", ""),
        ("refused", ""),
    ]


@pytest.mark.slow
def test_an_exercise_is_dropped_or_counts_twice(tmp_path):
    text = "student_id,exercise,weight,comment\n*,effective_batch,0,not taught\n*,largest,2,\n"
    found, rows = changed(tmp_path, text)
    assert found.out_of == 0 * 3 + 3 + 2 * 4
    assert (rows["s1"]["score"], rows["s2"]["score"], rows["s1"]["out_of"]) == ("11", "11", "11")
    assert rows["s2"]["effective_batch: why"].startswith("dropped; ")
    page = (tmp_path / "out/feedback/tiny_s2.html").read_text("utf-8")
    assert "Does not count." in page and "Counts 2 times." in page
    assert "lesson 00, section 1</li>" not in page, "nothing to reread for what is dropped"


@pytest.mark.slow
def test_late_costs_by_the_day_and_extensions_count(tmp_path):
    text = "student_id,due,handed_in\ns2,2026-11-02T12:00,\n"
    noon = {"due": datetime(2026, 11, 1, 11, 50), "late_percent": 20}
    found, rows = changed(tmp_path, text, **noon)  # files are of noon
    assert (rows["s1"]["score"], rows["s1"]["late"], rows["s1"]["penalty"]) == (
        "8",
        "0 h 10 min",
        "20",
    )
    assert (rows["s2"]["score"], rows["s2"]["late"]) == ("7", "")
    page = (tmp_path / "out/feedback/tiny_s1.html").read_text("utf-8")
    assert "0 h 10 min after the due time, which costs 20 % of the points" in page
    _, rows = changed(tmp_path, text, **noon, grace_minutes=15)
    assert rows["s1"]["score"] == "10" and rows["s1"]["late"] == ""
    text = "student_id,handed_in\ns1,2026-11-04T11:51\n"
    _, rows = changed(tmp_path, text, **noon, late_most=50)
    assert (rows["s1"]["score"], rows["s1"]["penalty"]) == ("5", "50")


@pytest.mark.slow
def test_canvas_mark_knows_nothing_of_an_extension(tmp_path):
    """Whom the instructor gave more time loses nothing by the mark, and is to be looked at."""
    files = {canvas_path(number, late=True): honest(str(4000 + number)) for number in range(3)}
    arguments = a_class(tmp_path, canvas_export(), files)
    (tmp_path / "changes.csv").write_text(
        "student_id,due,handed_in\n4000,2026-11-09T23:59,\n4001,2026-11-09T23:59,2026-11-10T10:00\n",
        "utf-8",
    )
    how = {"due": datetime(2026, 11, 1, 11), "late_percent": 10}
    given, proved, other, *_ = grade(
        TINY, *arguments, changes=tmp_path / "changes.csv", **how
    ).results
    assert (given.score, given.late) == (10, "")
    assert any("Canvas marks it late" in f and "2026-11-09 23:59" in f for f in given.flags)
    assert (proved.score, proved.late) == (9, "10 h 01 min"), "the time that was written counts"
    assert (other.score, other.late, other.flags) == (9, "some time", [])


def test_a_group_hands_in_once(tmp_path):
    """Canvas has one file for a group; each is graded with their own hidden numbers."""
    found, rows = changed(tmp_path, "student_id,group_of\ns3,s1\ns2,s1\n")
    assert (rows["s3"]["status"], rows["s3"]["score"]) == ("graded", "10")
    assert (rows["s2"]["score"], rows["s2"]["file"]) == ("10", "tiny_s1.ipynb"), "the best counts"
    assert "handed in by s1" in rows["s3"]["flags"] and rows["s1"]["flags"] == ""
    with pytest.raises(ValueError, match="group_of must be in the roster, got 's9' in line 2"):
        changed(tmp_path, "student_id,group_of\ns3,s9\n")


def test_a_groups_file_brings_its_owner_the_owners_page(tmp_path):
    """The others' pages have names of their own, and nobody is sent another one's."""
    better = canvas_path(1).replace("88001", "89001")
    files = {canvas_path(1): notebook(["x = 1"], "4001"), better: honest("4001")}
    arguments = a_class(tmp_path, canvas_export(), files)
    (tmp_path / "changes.csv").write_text("student_id,group_of\n4000,4001\n4002,4001\n", "utf-8")
    grade(TINY, *arguments, changes=tmp_path / "changes.csv")
    with zipfile.ZipFile(tmp_path / "out/feedback.zip") as pages:
        sent = {name: pages.read(name).decode() for name in pages.namelist()}
    (owners,) = [text for name, text in sent.items() if "_4001_" in name]
    assert "(4001)" in owners
    assert {"tiny_4000.html", "tiny_4002.html"} < set(sent)
    for own in ("4000", "4002"):
        assert f"({own})" in sent[f"tiny_{own}.html"]


@pytest.mark.slow
def test_what_came_by_mail_beside_a_platforms_zip(tmp_path):
    archive, *rest = a_class(tmp_path, canvas_export(), {canvas_path(0): honest("4000")})
    (tmp_path / "mailed").mkdir()
    (tmp_path / "mailed/tiny_4001.ipynb").write_bytes(honest("4001"))
    found = grade(TINY, [archive, tmp_path / "mailed"], *rest)
    assert [r.score for r in found.results[:3]] == [10, 10, 0]
    assert [r.status for r in found.results[:3]] == ["graded", "graded", "missing"]
    with pytest.raises(ValueError, match="--out must lie outside"):
        grade(TINY, [archive, tmp_path / "mailed"], *rest[:2], tmp_path / "mailed/grades.csv")


@pytest.mark.slow
def test_a_student_may_write_what_the_platform_calls_them_otherwise(tmp_path):
    """Nobody knows their number in Canvas: login, SIS user or name say as well who it is."""
    files = {canvas_path(n): notebook(SOLUTIONS, own) for n, own in enumerate(["login0", "U1"])}
    files[canvas_path(2)] = notebook(SOLUTIONS, "login1")
    found = grade(TINY, *a_class(tmp_path, canvas_export(), files))
    assert [r.flags for r in found.results[:2]] == [[], []]
    (flag,) = found.results[2].flags
    assert "the notebook says STUDENT_ID 'login1', the file's name says 4002" in flag


@pytest.mark.slow
def test_best_of_several_files_is_the_best_after_the_penalty(tmp_path):
    wrong = ["def effective_batch(*_): return 0", *SOLUTIONS[1:]]
    arguments = a_class(tmp_path, "student_id,name\ns1,A\n", {})
    folder = tmp_path / "files"
    for place, data, day in (("a", notebook(wrong, "s1"), 1), ("b", honest("s1"), 9)):
        (folder / place).mkdir(parents=True)
        path = folder / place / "tiny_s1.ipynb"
        path.write_bytes(data)
        stamp = datetime(2026, 11, day, 12).timestamp()
        os.utime(path, (stamp, stamp))
    how = {"due": datetime(2026, 11, 2), "late_percent": 10}
    (result,) = grade(TINY, folder, *arguments[1:], **how).results
    assert (result.score, result.file, result.late) == (7, "a/tiny_s1.ipynb", "")
    how["late_most"] = 10
    (result,) = grade(TINY, folder, *arguments[1:], **how).results
    assert (result.score, result.file) == (9, "b/tiny_s1.ipynb")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("student_id,grade\ns1,3\n", "columns of student_id, .*, got grade"),
        ("student_id,exercise,points\ns9,largest,3\n", "student_id must be in the roster.*line 2"),
        ("student_id,exercise,points\ns1,smallest,3\n", "exercise must be one of effective_batch"),
        ("student_id,exercise,points\ns1,largest,5\n", "points must be a number from 0 to 4"),
        ("student_id,exercise,points\ns1,largest,x\n", "points must be a number from 0 to 4"),
        ("student_id,exercise,points\ns1,largest,nan\n", "points must be a number from 0 to 4"),
        ("student_id,points\ns1,3\n", "exercise must say what the points are for"),
        ("student_id,weight\n*,0\n", "exercise must say what counts otherwise"),
        ("student_id,exercise,weight\n*,largest,-1\n", "weight must be a number from 0 to 100"),
        ("student_id,due\ns1,tomorrow\n", "due must look like 2026-11-30T23:59, got 'tomorrow'"),
        ("student_id,due\ns1,2026-11-30\n", "due must look like"),
    ],
)
def test_change_that_makes_no_sense_is_refused(tmp_path, text, complaint):
    path = tmp_path / "changes.csv"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=complaint):
        read_changes(path, TINY, {"s1"})


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ({"percent": 101.0}, "late percent must be from 0 to 100"),
        ({"most": -1.0}, "late most must be from 0 to 100"),
        ({"percent": 10.0}, "--due must be given with --late-percent"),
    ],
)
def test_policy_that_makes_no_sense_is_refused(how, complaint):
    with pytest.raises(ValueError, match=complaint):
        Policy(**how)


@pytest.mark.slow
def test_one_student_is_asked_again(tmp_path, monkeypatch):
    """`--again` for what went wrong on the grader's side; all others come from the journal."""
    from instructor.grade import grading

    people = "student_id,name\ns1,A\ns2,B\n"
    arguments = a_class(tmp_path, people, {f"tiny_s{n}.ipynb": honest(f"s{n}") for n in (1, 2)})
    grade(TINY, *arguments)
    asked = []
    real = grading.Paper

    def paper(exercise, cases, plans, *rest):
        asked.append(plans[0][0][1])
        return real(exercise, cases, plans, *rest)

    monkeypatch.setattr(grading, "Paper", paper)
    found = grade(TINY, *arguments, again=("s2",))
    assert asked == ["STUDENT_ID = 's2'"] * 3
    assert [result.score for result in found.results] == [10, 10]
    with pytest.raises(ValueError, match="--again must name students of the roster, got 's9'"):
        grade(TINY, *arguments, again=("s9",))


def test_class_list_keeps_its_table(tmp_path):
    path = tmp_path / "roster.csv"
    path.write_text(canvas_export(), "utf-8")
    found = read_class(path)
    assert found.platform is CANVAS and len(found.rows) == COUNT + 2
    assert found.rows[found.line_of["4000"]][1] == "4000"


def test_command_line_takes_all_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("instructor.grade.grade.load", lambda name: TINY)
    arguments = a_class(tmp_path, canvas_export(), {canvas_path(0): honest("4000")})
    (tmp_path / "changes.csv").write_text("student_id,exercise,points\n4001,largest,4\n")
    words = [
        "tiny",
        *map(str, arguments[:1]),
        "--roster",
        str(arguments[1]),
        "--secret-file",
        str(arguments[2]),
        "--out",
        str(arguments[3]),
        "--changes",
        str(tmp_path / "changes.csv"),
        "--due",
        "2026-11-01T10:00",
        "--late-percent",
        "10",
        "--late-most",
        "50",
        "--grace-minutes",
        "5",
        "--again",
        "4000",
    ]
    assert main(words) == 0
    assert "1 graded, 0 refused, 28 missing, 1 by hand" in capsys.readouterr().out


@pytest.mark.slow
def test_cells_that_nobody_changed_come_back(tmp_path):
    """A dash, a comment of several lines: as the platform wrote them, but on one line."""
    rows = [*csv.reader(io.StringIO(moodle_export()))]
    dash, comment = rows[0].index("Last modified (grade)"), rows[0].index("Feedback comments")
    rows[2][dash], rows[2][comment] = "-", "<p>see me,</p>\n<p>soon</p>"
    grade(TINY, *a_class(tmp_path, table(rows), {moodle_path(0): honest("u0")}))
    back = [*csv.reader(io.StringIO((tmp_path / "out/gradebook.csv").read_text("utf-8")))]
    assert len(back) == COUNT + 1
    assert back[2][dash] == "-" and back[2][comment] == "<p>see me,</p> <p>soon</p>"


def test_canvass_test_student_is_nobody(tmp_path):
    path = tmp_path / "roster.csv"
    path.write_text(canvas_export() + '"Student, Test",4999,,,A,,,\n', "utf-8")
    assert len(read_class(path).students) == COUNT
