"""Feedback: right, wrong in a named way, wrong, not attempted; never an exception."""

import math

import numpy as np
import pytest
import torch

from course_utils.exercises.checks import (
    Mistake,
    check,
    check_function,
    check_number,
    right,
    show_prediction,
)
from course_utils.exercises.lesson_03 import check_accumulation, check_search
from fitcast.units import MIB

TARGET = 512 * MIB
HINTS = [Mistake("you forgot the float32 copy.", 256 * MIB)]


@pytest.mark.parametrize(
    ("answer", "start"),
    [
        (TARGET, "Right: "),
        (float(TARGET), "Right: "),
        (..., "Not attempted yet"),
        (None, "Not attempted yet"),
        (256 * MIB, "Not yet: you forgot the float32 copy."),
        (round(TARGET / 2**30 * 10**9), "Not yet: that counts in GB (10**9)"),
        (round(TARGET * 2**30 / 10**9), "Not yet: that counts in GB (10**9)"),
        (8 * TARGET, "Not yet: that counts bits"),
        (512, "Not yet: that is a factor of 1024**2 away"),
        (0.5, "Not yet: that is a factor of 1024**3 away"),
        (512 * 1024, "Not yet: that is a factor of 1024 away"),
        (3 * TARGET, "Not yet: 1,610,612,736 is 3 times too large"),
        (TARGET // 3, "Not yet: 178,956,970 is 3 times too small"),
        (TARGET + 1, "Not yet: "),
        (0, "Not yet: 0 is not above 0"),
        (-TARGET, "Not yet: "),
        ("512 MiB", "Not yet: a number is asked for, got str"),
        (True, "Not yet: a number is asked for, got bool"),
        (math.nan, "Not yet: a number is asked for"),
        ([TARGET], "Not yet: a number is asked for, got list"),
        (torch.ones(2), "Not yet: a number is asked for, got Tensor"),
    ],
)
def test_number(answer, start):
    verdict = check_number(answer, TARGET, mistakes=HINTS)
    assert repr(verdict).startswith(start)
    assert verdict.passed is {"R": True, "N": False}[start[0]] or start.startswith("Not att")
    assert "\n" not in repr(verdict)


def broken(n):
    raise KeyError("weight")


def open_end(n):
    return n * ...


def empty(n): ...


def forgot_return(n):
    doubled = [n, 2 * n]
    doubled.sort()


@pytest.mark.parametrize(
    ("answer", "start"),
    [
        (lambda n: [n, 2 * n], "Right: "),
        (lambda n: (n, 2.0 * n), "Right: "),
        (lambda n: [n, n], "Not yet: you forgot to double."),
        (lambda n: [n], "Not yet: (3) should give [3, 6], got [3]."),
        (
            lambda n: torch.ones(n, 2),
            "Not yet: (3) should give [3, 6], got a tensor of shape (3, 2).",
        ),
        (lambda: 1, "Not yet: your answer raised TypeError"),
        (broken, "Not yet: your answer raised KeyError: 'weight'"),
        (open_end, "Not attempted yet"),
        (empty, "Not attempted yet"),
        (lambda n: [n, ...], "Not attempted yet"),
        (forgot_return, "Not yet: your function returns nothing: end it with `return`"),
        (lambda n: [np.int64(n), np.float64(2 * n)], "Right: "),
        (lambda n: torch.ones(...), "Not attempted yet"),
        (..., "Not attempted yet"),
        (3, "Not yet: a function is asked for, got int."),
    ],
)
def test_function(answer, start):
    verdict = check_function(
        answer, [(3,)], [[3, 6]], mistakes=[Mistake("you forgot to double.", lambda n: [n, n])]
    )
    assert repr(verdict).startswith(start)


def test_an_answer_may_write_into_what_it_is_given():
    def double_all(numbers):
        for i, number in enumerate(numbers):
            numbers[i] = 2 * number
        return numbers

    cases = [([1, 2],)]
    verdict = check_function(
        double_all, cases, [[2, 4]], mistakes=[Mistake("not doubled.", lambda n: n)]
    )
    assert verdict.passed and cases == [([1, 2],)]


def test_function_is_held_to_every_case():
    verdict = check_function(lambda n: 4, [(2,), (3,)], [4, 9])
    assert repr(verdict) == "Not yet: (3) should give 9, got 4."


def test_learners_error_never_escapes():
    @check
    def judge(answer):
        return right(f"{1 / answer}")

    assert repr(judge(0)).startswith("Not yet: your answer raised ZeroDivisionError")
    assert judge(...).passed is None and judge().passed is None


def test_interrupt_escapes():
    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_function(stopped, [()], [1])


@pytest.mark.parametrize(
    ("predicted", "first"),
    [
        (..., "predicted  no prediction yet"),
        (None, "predicted  no prediction yet"),
        (MIB, "predicted  1.00 MiB (0.50 times the counted)"),
        (0, "predicted  0 B"),
        (-MIB, "predicted  -1.00 MiB"),
        ("2 MiB", "predicted  '2 MiB', which is not a number"),
    ],
)
def test_prediction(predicted, first, capsys):
    show_prediction(predicted, counted=2 * MIB, measured=None)
    assert capsys.readouterr().out.splitlines() == [
        first,
        "counted    2.00 MiB",
        "measured   not measured on cpu",
    ]


def test_prediction_of_a_ratio(capsys):
    show_prediction(2.0, show="{:.1f} x".format, counted=4.0)
    assert capsys.readouterr().out.splitlines() == [
        "predicted  2.0 x (0.50 times the counted)",
        "counted    4.0 x",
    ]


def test_a_gradient_of_nan_is_not_equal():
    def poisoned(model, micro_batches):
        for batch in micro_batches:
            (model(**batch).loss * math.nan).backward()

    assert repr(check_accumulation(poisoned)).startswith("Not yet: the relative error")


def test_an_answer_may_take_the_labels_out_of_its_batches():
    def takes(model, micro_batches):
        for batch in micro_batches:
            labels = batch.pop("labels")
            (model(**batch, labels=labels).loss / len(micro_batches)).backward()

    assert repr(check_accumulation(takes)).startswith("Not yet: that is the mean of the micro")


def test_a_search_without_end_is_ended():
    def halves(train, upper):
        low, high = 0, upper
        while low < high:
            mid = (low + high) // 2
            try:
                train(mid or 1)
                low = mid
            except Exception:
                high = mid - 1
        return low

    assert "and no end: after each, one end of the interval" in repr(check_search(halves))


def test_a_search_may_know_out_of_memory_by_its_text():
    def doubles_and_halves(train, upper):
        def fits(size):
            try:
                train(size)
            except RuntimeError as error:
                if "out of memory" not in str(error):
                    raise
                return False
            return True

        low, high = 0, upper
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    assert check_search(doubles_and_halves).passed
