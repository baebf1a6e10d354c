"""What every lesson has: predictions, exercises with three hints each, one control, five words,
and a set-up of eight names at most."""

import ast
import re

import pytest

from tools.notebooks import lesson_scripts

# part: (how to find it, fewest, most)
COUNTS = {
    "predictions": (r"^# ### Predict$", 3, 6),
    "cells to predict in": (r'^# %% tags=\["predict"\]$', 3, 6),
    "exercises": (r"^# ##+ Exercise \d\d\.\d · \w", 2, 5),
    "pictures": (r"figures\.(?!\w+_explorer)\w+\(", 1, 20),
    "controls": (r"^figures\.\w+_explorer\(", 1, 1),
}
HINT = "<details><summary>Hint {}</summary>"
# A lesson's set-up: what stands between the cell that every lesson has and the five questions.
SET_UP = re.compile(r"^print\(welcome\(\)\)\n(.*?)^# ## Five questions", re.DOTALL | re.MULTILINE)
OURS, MOST_NAMES = {"course_utils", "fitcast"}, 8


def imported(source: str) -> list[str]:
    """Names that a source imports from this repository's two packages."""
    return [
        name.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS
        for name in node.names
    ]


def taken_from_the_questions(lesson: str) -> list[str]:
    """Names of the reader's five answers that another cell assigns: they would be lost."""
    asked = r'^# %% tags=\["self-check"\]\n.*\n'
    cells = re.split(r"^# %%.*\n", re.sub(asked, "", lesson, flags=re.M), flags=re.M)
    return [
        name for name in ("before", "after") for cell in cells
        if re.search(rf"^{name}\b[^(\n]*=[^=]", cell, re.M)
    ]  # fmt: skip


def faults(lesson: str) -> list[str]:
    """Where a lesson's `.py` leaves the form."""
    found = {
        part: len(re.findall(pattern, lesson, re.M)) for part, (pattern, _, _) in COUNTS.items()
    }
    wrong = [
        f"{n} {part}: from {COUNTS[part][1]} to {COUNTS[part][2]}"
        for part, n in found.items()
        if not COUNTS[part][1] <= n <= COUNTS[part][2]
    ]
    hints = [lesson.count(HINT.format(number)) for number in (1, 2, 3, 4)]
    if hints != [found["exercises"]] * 3 + [0]:
        wrong.append(f"hints {hints}: three for each exercise")
    wrong += [f"a cell takes the name {name!r} away" for name in taken_from_the_questions(lesson)]
    names = imported(SET_UP.search(lesson)[1])
    if len(names) > MOST_NAMES:
        wrong.append(f"{len(names)} names from this repository in the set-up: {names}")
    prose = " ".join(re.findall(r"^# (.*)", lesson, re.M))
    said, words = re.search(r"New concepts \((\d)\):\*\* (.*?)\. Each", prose).groups()
    if not int(said) == len(words.split(" · ")) <= 5:
        wrong.append(f"{len(words.split(' · '))} new concepts, {said} announced: at most 5")
    minutes = int(re.search(r"\*\*(\d+) min", prose)[1])
    took = sum(map(int, re.findall(r"\*(?:Easy|Medium|Hard), (\d+) minutes", prose)))
    if minutes > 45 or not 0 < took < minutes:
        wrong.append(f"{minutes} minutes, {took} of them for exercises: at most 45")
    return wrong


@pytest.mark.parametrize("path", lesson_scripts(), ids=lambda path: path.stem)
def test_lesson_has_the_form(path):
    assert faults(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("# ### Predict\n", "", "0 predictions"),
        ('# %% tags=["predict"]\n', "# %%\n", "0 cells to predict in"),
        ("## Exercise 04.", "## Task 04.", "0 exercises"),
        (HINT.format(3), "", r"hints \[3, 3, 0, 0\]"),
        ("figures.updates_explorer(", "print(", "0 controls"),
        ("range and spacing · ", "range · spacing · ", "6 new concepts, 5 announced"),
        ("**45 min**", "**50 min**", "50 minutes"),
        ("import TrainRecipe, gpus,", "import GIB, TrainRecipe, gpus,", "9 names from this"),
        ("memory_before = gpus", "before = gpus", "takes the name 'before' away"),
        ("6 minutes.* Given", "40 minutes.* Given", "45 minutes, 49 of them"),
    ],
)
def test_planted_fault_is_caught(old, new, fault):
    lesson = lesson_scripts(["04"])[0].read_text("utf-8")
    assert old in lesson
    assert re.search(fault, " ".join(faults(lesson.replace(old, new))))
