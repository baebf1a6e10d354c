"""Reading an answer: whatever type a number or a list comes in, and every `...` that is left."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from course_utils.exercises.answers import (
    blanks,
    describe,
    difference,
    equal,
    is_empty,
    items,
    number,
    whole,
)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (3, 3),
        (0.5, 0.5),
        (Fraction(1, 2), 0.5),
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.array(3), 3),
        (torch.tensor(3), 3),
        (torch.tensor(0.5, dtype=torch.float16, requires_grad=True), 0.5),
    ],
)
def test_a_number_may_come_from_any_library(answer, found):
    assert number(answer) == found and type(number(answer)) is type(found)


@pytest.mark.parametrize(
    "answer",
    [
        True,
        np.bool_(True),
        torch.tensor(True),
        math.nan,
        -math.inf,
        torch.tensor(math.inf),
        10**400,
        1j,
        "3",
        None,
        ...,
        [3],
        np.array([3]),
        torch.tensor([3]),
    ],
    ids=repr,
)
def test_what_is_no_finite_number(answer):
    assert number(answer) is None


def test_whole_numbers_have_bounds():
    assert [whole(n, 1, 4) for n in (0, 1, 4.0, 5, 2.5, "2", True)] == [None, 1, 4] + [None] * 4
    assert whole(10**9, 1) == 10**9 and type(whole(torch.tensor(4.0), 1)) is int


@pytest.mark.parametrize(
    ("found", "wanted", "same"),
    [
        (0.1 + 0.2, 0.3, True),
        (0.3 - 0.1 - 0.2, 0, True),
        (1e-9, 0, False),
        (0.3 * (1 + 1e-9), 0.3, False),
        (2**40 + 1, 2**40, False),
        (2.0**40, 2**40, True),
        (np.float32(0.3), 0.3, True),  # as near as float32 comes
        (np.float32(0.3001), 0.3, False),
        (torch.tensor(0.3, dtype=torch.float16), 0.3, True),
        (torch.tensor(0.31, dtype=torch.float16), 0.3, False),
        (1e30, 10**30, True),
        (True, 1, False),
        (np.bool_(True), True, True),
        (torch.tensor([1, 2]), [1, 2], True),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]], True),
        (np.array([[1, 2], [3, 4]]), [1, 2], False),
        (range(1, 3), (1, 2), True),
        ([1, [0.1 + 0.2]], (1, [0.3]), True),
        ([1, 2, 3], [1, 2], False),
        ("12", ["1", "2"], False),
        ("ab", "ab", True),
        ({1}, [1], False),
    ],
)
def test_equal_up_to_rounding_and_type_of_list(found, wanted, same):
    assert equal(found, wanted) is same


def test_lists_of_any_library():
    assert items(range(2)) == items((0, 1)) == items(np.arange(2)) == items(torch.arange(2))
    assert items(torch.tensor(3)) is items("ab") is items({1: 2}) is items(3) is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.tensor(3), "3"),
        (np.float64(0.5), "0.5"),
        (torch.ones(2, 3), "a tensor of shape (2, 3)"),
        (([0] * 8, 3), "([0, 0, 0, 0, 0, 0, 0, 0], 3)"),
        ((list(range(300)), 61), "(a list of 300, 61)"),
    ],
)
def test_values_in_a_sentence(value, words):
    assert describe(value) == words


def test_long_lists_are_told_apart_by_their_first_difference():
    wanted = list(range(300))
    assert difference(wanted[:40] + [7] + wanted[41:], wanted) == (
        "should give 40 at index 40 of 300, got 7"
    )
    assert difference(wanted[1:], wanted) == "should give a list of 300, got a list of 299"
    assert difference([1, 2], [1, 3]) == "should give [1, 3], got [1, 2]"


def two_left(x, dtype):
    """Words with ... in them are no blanks."""
    power: tuple[int, ...] = ...
    rows = x[..., 0]  # no blank ...
    return rows * torch.ones(...)


class Forget(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, x):
        ctx.save_for_backward(...)  # what waits?
        return function(x)

    @staticmethod
    def backward(ctx, grad):
        output, again = ..., ...
        return None, grad


def test_every_blank_is_found_where_it_stands():
    assert blanks(two_left) == ["power: tuple[int, ...] = ...", "return rows * torch.ones(...)"]
    assert blanks(Forget.apply) == [
        "ctx.save_for_backward(...)",
        "output, again = ..., ...",
        "output, again = ..., ...",
    ]
    assert blanks({"keep_all": ..., "keep_135": [6]}) == ["keep_all = ..."]
    assert blanks(equal) == blanks(len) == blanks(3) == []


def test_code_without_source_has_no_blanks_that_could_be_counted():
    made = {}
    exec("def half(x):\n    y = ...\n    return y", made)
    assert blanks(made["half"]) == [] and not is_empty(made["half"])


def test_an_empty_body_is_none_that_returns_nothing():
    def only_dots(x): ...

    def passes(x):
        """As its docstring says."""
        pass

    def returns_nothing(x):
        return

    def sorts(x):
        x.sort()

    def returns_none(x):
        return None if x else 0

    assert all(map(is_empty, (only_dots, passes, returns_nothing)))
    assert not any(map(is_empty, (sorts, returns_none, two_left, len, lambda x: None)))
