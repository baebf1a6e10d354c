"""The guide: every command in it runs as it stands there, every name and number in it is true."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from instructor.assignment import load, names
from instructor.build.discussion import main, page
from instructor.sandbox import cage
from tools.notebooks import LESSONS, ROOT

GUIDE = (ROOT / "instructor" / "README.md").read_text("utf-8")
COMMANDS = re.findall(r"^```bash\n(.*?)^```$", GUIDE, re.S | re.M)


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """A folder in which somebody has typed every command of the guide, top to bottom."""
    folder = tmp_path_factory.mktemp("instructor")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    for command in COMMANDS:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return folder / "class"


def test_there_are_commands_for_each_step():
    text = "".join(COMMANDS)
    for module in ("build", "selfcheck", "grade", "discussion", "release"):
        assert f"python -m instructor.{module} " in text


@pytest.mark.slow
def test_guide_leads_to_a_graded_class(followed):
    grades = followed / "effective_batch" / "graded" / "grades.csv"
    with grades.open(encoding="utf-8-sig", newline="") as file:
        rows = {row["student_id"]: row for row in csv.DictReader(file)}
    full = load("effective_batch").points
    assert list(rows) == ["s001", "s002", "s003"]
    assert float(rows["s001"]["score"]) == full
    assert float(rows["s002"]["score"]) == 0
    assert 0 < float(rows["s003"]["score"]) < full
    assert "forgets the ranks" in rows["s003"]["effective_batch_size: why"]
    for student, other in (("s001", "s003"), ("s003", "s001")):
        assert f"alike with {other} and the published solution" in rows[student]["flags"]


@pytest.mark.slow
def test_every_file_that_the_guide_promises_is_there(followed):
    graded = followed / "effective_batch" / "graded"
    written = re.findall(r"^- `([\w./]+)`:", GUIDE, re.M)
    assert written == [
        "grades.csv",
        "feedback/",
        "feedback.zip",
        "class_report.html",
        "grades.journal.jsonl",
    ]
    promised = [
        *(graded / name for name in written),
        *(followed / name for name in re.findall(r"`class/([\w./-]+)`", GUIDE)),
    ]
    assert [path for path in promised if not path.exists()] == []
    assert len(list((graded / "feedback").glob("*.html"))) == 3
    named = re.findall(r"`(feedback/[\w./-]+\.html)`", GUIDE)
    assert named and all((graded / name).is_file() for name in named)


@pytest.mark.slow
def test_secret_is_in_nothing_that_is_handed_out(followed):
    secret = (followed / "secret.txt").read_text("utf-8").strip()
    assert len(secret) == 64
    graded = followed / "effective_batch" / "graded"
    handed_out = [
        *followed.glob("*/students/*"),
        *graded.glob("feedback/*"),
        graded / "class_report.html",
        graded / "grades.csv",
    ]
    assert len(handed_out) > 8
    assert [path.name for path in handed_out if secret in path.read_text("utf-8")] == []


def test_git_ignores_the_class():
    done = subprocess.run(
        ["git", "check-ignore", "class/secret.txt", "class/grades.csv"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert len(done.stdout.splitlines()) == 2


def test_table_of_assignments_is_true():
    rows = re.findall(r"^\| `(\w+)` \| (lesson 0\d) \| (\d+) \| (\d+) \| (\d+) \|$", GUIDE, re.M)
    assert {row[0] for row in rows} == set(names())
    for name, lesson, *counts in rows:
        assignment = load(name)
        assert lesson == assignment.lesson
        assert [int(count) for count in counts] == [
            len(assignment.exercises),
            assignment.points,
            sum(exercise.minutes for exercise in assignment.exercises),
        ]


def test_first_half_of_the_long_assignment_needs_the_sections_that_the_plan_says():
    text = " ".join(GUIDE.split())
    (minutes,) = re.findall(
        r"Exercises 1, 2, 5 and 7 to 10 \((\d+) minutes\) need sections 1 and", text
    )
    assert "`effective_batch`, exercises 1, 2, 5 and 7 to 10 |" in GUIDE
    found = {
        number: exercise.minutes
        for number, exercise in enumerate(load("effective_batch").exercises, start=1)
        if set(re.findall(r'(?<!\.)\b(\d)\b(?!\.)|"', exercise.reread.partition(",")[2]))
        <= {"1", "2"}
    }
    assert list(found) == [1, 2, 5, 7, 8, 9, 10] and sum(found.values()) == int(minutes)


def test_sandbox_levels_are_the_graders():
    names_ = [name for name in cage.LEVELS if name != "hook"]
    places = [" ".join(GUIDE.split()).index(f"`{name}` (") for name in names_]
    assert places == sorted(places)


def test_links_and_named_exercises_exist():
    headings = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^##+ (.+)$", GUIDE, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", GUIDE)) <= headings
    for target in re.findall(r"\]\(([^#)]+)\)", GUIDE):
        assert (ROOT / "instructor" / target).exists(), target
    lessons = "".join(path.read_text("utf-8") for path in LESSONS.glob("[0-9][0-9]_*.py"))
    for exercise in re.findall(r"\b(0\d\.\d)\b", GUIDE):
        assert f"# ## Exercise {exercise} " in lessons


def test_what_students_are_told_to_reread_is_there():
    for name in names():
        for exercise in load(name).exercises:
            lesson, _, where = exercise.reread.removeprefix("lesson ").partition(", ")
            (path,) = LESSONS.glob(f"{lesson}_*.py")
            text = path.read_text("utf-8")
            found = re.findall(r'\bexercise (0\d\.\d)|\b(\d)\b(?!\.)|"([^"]+)"', where)
            assert found, exercise.reread
            for exercise_id, section, title in found:
                headings = [f"# ## Exercise {exercise_id} ", f"# ## {section} · "]
                headings += [f"# ### {title}\n", f'# ### "{title}"\n'] if title else []
                assert any(heading in text for heading in headings), (
                    f"{exercise.function}: {exercise.reread}"
                )


def test_page_of_answers_has_every_lesson_with_its_numbers(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "new" / "page.md")]) == 0
    text = (tmp_path / "new" / "page.md").read_text("utf-8")
    timing, *sections = re.split(r"^## ", text, flags=re.M)[1:]
    rows = re.findall(r"^\| 0(\d) · .+ \| (\d+) \| (.+) \|$", timing, re.M)
    assert [row[0] for row in rows] == list("12345678")
    for lesson, minutes, exercises in rows:
        took = [int(n) for n in re.findall(rf"0{lesson}\.\d [^;]+: (\d+) \([\w, ]+\)", exercises)]
        assert 0 < sum(took) < int(minutes)
        (path,) = LESSONS.glob(f"0{lesson}_*.py")
        assert len(took) == len(re.findall(r"^# #+ Exercise", path.read_text("utf-8"), re.M)) > 0
    assert [section[:2] for section in sections] == [f"0{row[0]}" for row in rows]
    for section in sections:
        assert re.search(r"^> ", section, re.M), "a prompt"
        assert re.search(r"A right answer", section)
        assert re.search(r"```text\n.*\d", section), "printed numbers"
        assert "left out" not in section


def test_a_lesson_without_outputs_is_refused(tmp_path):
    (source, *_) = LESSONS.glob("01_*.ipynb")
    text = source.read_text("utf-8")
    (tmp_path / source.name).write_text(text.replace("## Try with AI", "## Try"), "utf-8")
    with pytest.raises(ValueError, match="must have a section '## Try with AI'"):
        page(tmp_path)
