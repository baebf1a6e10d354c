"""The self-check that is copied into notebooks: equality, and that it never raises."""

import json

import pytest

from instructor.build.selfcheck import check, judge, same, unfinished

CASE = {
    "arguments": [[1, 2]],
    "expected": 3,
    "rel_tolerance": 0.0,
    "mistakes": {"first": 1},
    "oracle": None,
    "most_questions": 0,
    "knows": None,
}
PUBLIC = json.dumps({"total": {"cases": [CASE], "mistakes": {"first": "add them all."}}})


@pytest.mark.parametrize(
    ("answer", "expected", "equal"),
    [
        (3, 3, True),
        (3.0, 3, True),
        (True, 1, False),
        (1, True, False),
        (True, True, True),
        ((1, 2), [1, 2], True),
        ([1], [1, 2], False),
        ({"a": 1.0}, {"a": 1}, True),
        ({"a": 1, "b": 2}, {"a": 1}, False),
        ("3", 3, False),
        (None, 0, False),
        ([], [], True),
        (float("nan"), 1.0, False),
        (10**400, 1.0, False),
        ([[True]], [[1]], False),
    ],
)
def test_same(answer, expected, equal):
    assert same(answer, expected) is equal
    assert same(answer, expected, 1e-9) is equal


def test_tolerance_is_relative_and_reaches_into_lists():
    assert same([1e-12 * (1 + 1e-10)], [1e-12], 1e-9)
    assert not same([1e-12 * (1 + 1e-8)], [1e-12], 1e-9)
    assert not same(1e-12, 0.0, 1e-9)


@pytest.mark.parametrize(
    ("answer", "is_unfinished"),
    [(..., True), ([1, ...], True), ({"a": (1, ...)}, True), ("...", False), ([[]], False)],
)
def test_unfinished(answer, is_unfinished):
    assert unfinished(answer) is is_unfinished


class Rude:
    """Compares, prints and hashes with an error."""

    def __eq__(self, other):
        raise RuntimeError("no")

    __str__ = __repr__ = __eq__


def recursive(numbers):
    return recursive(numbers)


def spoil(numbers):
    numbers.clear()
    return 3


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (sum, "Right: all 1 public cases."),
        (spoil, "Right: all 1 public cases."),
        (min, "Not yet: add them all."),
        (len, "Not yet: total([1, 2]) should give 3, got 2."),
        (str, "should give 3, got [1, 2] (str)."),
        (lambda numbers: numbers.clear() or 5, "total([1, 2]) should give 3, got 5."),
        (lambda numbers: 10**5000, "your answer cannot be looked at (ValueError)"),
        (lambda numbers: Rude(), "your answer cannot be looked at"),
        (lambda numbers, more: 3, "raised TypeError"),
        (recursive, "raised RecursionError"),
        (lambda numbers: exit(), "raised SystemExit"),
        (lambda numbers: None, "returns nothing; is a `return` missing?"),
        (lambda numbers: ..., "Not attempted yet"),
        (3, "there is no function total; run its cell, and keep its name."),
    ],
)
def test_check_prints_one_sentence_and_never_raises(function, sentence, capsys):
    check("total", PUBLIC, {"total": function})
    said = capsys.readouterr().out
    assert sentence in said
    assert said.count("\n") == 1


def test_a_deleted_function_is_said(capsys):
    check("total", PUBLIC, {})
    assert "there is no function total" in capsys.readouterr().out


def test_a_mistake_has_to_explain_every_case():
    second = CASE | {"arguments": [[4, 5]], "expected": 9, "mistakes": {"first": 4}}
    said = judge("total", lambda numbers: 1, [CASE, second], {"first": "add them all."})
    assert said == "Not yet: total([1, 2]) should give 3, got 1."
