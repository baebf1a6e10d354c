"""Exercises of every lesson: untouched, begun; and a check that judges nothing is found out."""

import importlib

import pytest

from course_utils.exercises.checks import NOT_ATTEMPTED, not_yet, right
from tests.lessons.exercises import complaints, exercise_cells

CHECKS = {
    name: getattr(module, name)
    for number in range(1, 9)
    for module in [importlib.import_module(f"course_utils.exercises.lesson_0{number}")]
    for name in vars(module)
    if name.startswith("check_")
}
MORE = {"check_labels": (lambda messages, header=False: list(range(len(messages) + header)),)}
BEGUN = [
    (name, blank)
    for name, cell in exercise_cells().items()
    if len(cell.blanks) > 1
    for blank in range(len(cell.blanks))
]


def test_every_check_has_its_exercise():
    assert set(CHECKS) == set(exercise_cells())


@pytest.mark.parametrize("name", CHECKS)
def test_untouched_is_not_attempted(name):
    assert "..." in exercise_cells()[name].source
    assert repr(CHECKS[name](exercise_cells()[name].run(), *MORE.get(name, ()))) == NOT_ATTEMPTED


@pytest.mark.parametrize(("name", "blank"), BEGUN)
def test_one_blank_filled_in_is_begun_and_the_others_are_named(name, blank):
    cell = exercise_cells()[name]
    verdict = CHECKS[name](cell.run(cell.filled(blank)), *MORE.get(name, ()))
    count = len(cell.blanks)
    assert verdict.passed is False
    assert f"{count - 1} of {count} `...` still there: `" in repr(verdict)


@pytest.mark.parametrize(
    ("stub", "complaint"),
    [
        (lambda _: right("well done."), "accepts three"),
        (lambda _: not_yet("no."), "refuses a right answer"),
        (lambda n: right("4.") if n == 4 else not_yet("no."), "does not name three"),
        (lambda n: right("4.") if n == 4 else not_yet("odd."), "of an untouched exercise"),
    ],
)
def test_a_check_that_judges_badly_is_found_out(stub, complaint):
    found = complaints(stub, "check_smallest_k", [4], {"three": (3, "odd")})
    assert any(complaint in text for text in found), found
