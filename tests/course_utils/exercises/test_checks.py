"""Feedback: right, wrong in a named way, wrong, not attempted; never an exception."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from course_utils.exercises.checks import (
    Mistake,
    check,
    judge_function,
    judge_number,
    right,
)
from course_utils.exercises.lesson_03 import check_accumulation, check_search
from fitcast.units import MIB

check_number, check_function = check()(judge_number), check()(judge_function)
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
        (TARGET + 1, "Not yet: 536,870,913 is 1 too large."),
        (TARGET - 0.5, "Not yet: 536,870,911.5 is 0.5 too small."),
        (0, "Not yet: 0 is not above 0"),
        (-TARGET, "Not yet: -536,870,912 is not above 0"),
        (np.int64(TARGET), "Right: "),
        (torch.tensor(TARGET), "Right: "),
        (np.array(256 * MIB), "Not yet: you forgot the float32 copy."),
        (Fraction(3 * TARGET, 2), "Not yet: 805,306,368.0 is 1.5 times too large."),
        ("512 MiB", "Not yet: a number is asked for, got str"),
        (True, "Not yet: a number is asked for, got bool"),
        (np.bool_(True), "Not yet: a number is asked for, got bool"),
        (torch.tensor(True), "Not yet: a number is asked for, got Tensor"),
        (math.nan, "Not yet: a number is asked for, got nan."),
        (10**400, "Not yet: a number is asked for, got int."),
        ([TARGET], "Not yet: a number is asked for, got list"),
        (torch.ones(2), "Not yet: a number is asked for, got Tensor"),
    ],
)
def test_number(answer, start):
    verdict = check_number(answer, TARGET, mistakes=HINTS)
    assert repr(verdict).startswith(start)
    assert verdict.passed is {"R": True, "N": False}[start[0]] or start.startswith("Not att")
    assert "\n" not in repr(verdict)


@pytest.mark.parametrize(
    ("answer", "target", "words"),
    [
        (0.1 + 0.2, 0.3, "Right: "),
        (np.float32(0.1) + np.float32(0.2), 0.3, "Right: "),
        (0.3001, 0.3, "Not yet: 0.3001 is 0.0001 too large."),
        (0, 0, "Right: "),
        (0.0, 0, "Right: "),
        (0.3 - 0.1 - 0.2, 0, "Right: "),
        (3, 0, "Not yet: 3 is too large."),
        (-3, 0, "Not yet: -3 is too small."),
        (-2, -2, "Right: "),
        (2, -2, "Not yet: 2 is too large."),
        (-5, -2, "Not yet: -5 is too small."),
    ],
)
def test_fractions_zero_and_what_lies_below(answer, target, words):
    assert repr(check_number(answer, target)).startswith(words)


def broken(n):
    raise KeyError("weight")


def open_end(n):
    return n * ...


def empty(n): ...


def forgot_return(n):
    doubled = [n, 2 * n]
    doubled.sort()


def half_done(n):
    first = n
    second = ...  # twice as much
    return [first, second + ...]


def half_done_and_broken(n):
    second = ...
    raise KeyError("weight")


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


@pytest.mark.parametrize(
    ("answer", "asked", "message"),
    [
        (half_done, 2, "Not attempted yet: replace"),
        (
            half_done,
            3,
            "Not yet: 2 of 3 `...` still there: `second = ...`, `return [first, second + ...]`.",
        ),
        (
            half_done_and_broken,
            2,
            "Not yet: your answer raised KeyError: 'weight' (1 of 2 `...` still there: "
            "`second = ...`)",
        ),
        (empty, 2, "Not yet: 1 of 2 `...` still there: `def empty(n): ...`."),
        (broken, 2, "Not yet: your answer raised KeyError: 'weight'"),
    ],
)
def test_what_is_begun_hears_what_is_left(answer, asked, message):
    verdict = check(asked)(judge_function)(answer, [(3,)], [[3, 6]])
    assert repr(verdict).startswith(message)
    assert verdict.passed is (None if "attempted" in message else False)


def test_answers_by_name_hear_which_is_left():
    @check(asked=2)
    def judge(answer):
        return right("both.")

    assert judge({"a": ..., "b": ...}).passed is None
    assert repr(judge({"a": 1, "b": ...})) == "Not yet: 1 of 2 `...` still there: `b = ...`."
    assert judge({"a": 1, "b": 2}).passed


def test_an_error_about_dots_in_a_finished_answer_is_not_hidden():
    def finished(n):
        raise ValueError("no ellipsis here, please")

    assert repr(check_function(finished, [(3,)], [3])).startswith("Not yet: your answer raised Va")


def test_a_mistake_is_named_when_it_explains_every_case():
    """At n = 2 squaring and doubling give the same."""
    mistakes = [
        Mistake("that doubles.", lambda n: 2 * n),
        Mistake("that squares.", lambda n: n * n),
    ]

    def said(answer):
        return repr(check_function(answer, [(2,), (3,)], [8, 27], mistakes=mistakes))

    assert said(lambda n: n * n) == "Not yet: that squares."
    assert said(lambda n: 2 * n) == "Not yet: that doubles."
    assert said(lambda n: 4) == "Not yet: (2) should give 8, got 4."


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
    @check()
    def judge(answer):
        return right(f"{1 / answer}")

    assert repr(judge(0)).startswith("Not yet: your answer raised ZeroDivisionError")
    assert judge(...).passed is None and judge().passed is None


def test_interrupt_escapes():
    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_function(stopped, [()], [1])


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
