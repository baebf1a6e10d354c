"""Feedback on a learner's answer: one sentence, never an exception.

A check runs the answer or measures it; an answer that only looks right does not pass. `...` is "not
attempted yet". Not offered: marks, hints (they are in the lesson), protection from a learner who
wants to cheat (`instructor/` grades in a process of its own).
"""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fitcast.units import GB, GIB, KIB, MIB, show_bytes

NOT_ATTEMPTED = "Not attempted yet: replace the `...` above by your answer and run both cells."
# How many times too large (or too small) an answer is that has another unit than the target.
UNIT_SLIPS = {
    GIB / GB: "that counts in GB (10**9); a T4's 14.56 and everything here is GiB (2**30)",
    8: "that counts bits; a byte has 8 of them",
    KIB: "that is a factor of 1024 away: check B, KiB, MiB and GiB",
    MIB: "that is a factor of 1024**2 away: check bytes and MiB",
    GIB: "that is a factor of 1024**3 away: check bytes and GiB",
}


@dataclass(frozen=True)
class Verdict:
    """What a check found: `passed` is `None` when nothing was attempted."""

    passed: bool | None
    message: str

    def __repr__(self) -> str:
        return self.message


class Mistake(NamedTuple):
    """A mistake that learners make: what is wrong, in a sentence, and the answer it leads to.

    For an exercise that asks for a function the answer is a function with the same mistake.
    """

    sentence: str
    answer: Any


def right(message: str) -> Verdict:
    """The verdict on a passing answer; the message adds what to take away."""
    return Verdict(True, f"Right: {message}")


def not_yet(message: str) -> Verdict:
    """The verdict on a failing answer; the message says what is wrong with it."""
    return Verdict(False, f"Not yet: {message}")


def check(judge: Callable[..., Verdict]) -> Callable[..., Verdict]:
    """Decorator: `...` is not attempted yet, and whatever the answer raises becomes a sentence."""

    def safely(answer: Any = ..., *args: Any, **kwargs: Any) -> Verdict:
        if unfinished(answer):
            return Verdict(None, NOT_ATTEMPTED)
        try:
            return judge(answer, *args, **kwargs)
        except NoAnswer as error:
            return not_yet(f"{error}.")
        except Exception as error:  # an answer can raise anything; the sentence names it
            if isinstance(error, Unfinished) or "ellipsis" in str(error).lower():
                return Verdict(None, NOT_ATTEMPTED)
            return not_yet(f"your answer raised {type(error).__name__}: {error}")

    safely.__name__, safely.__doc__ = judge.__name__, judge.__doc__
    return safely


_EMPTY = (lambda: ...).__code__


class Unfinished(Exception):
    """A learner's function still has a `...` in it."""


class NoAnswer(TypeError):
    """A learner's answer cannot be called, or computes something and returns nothing."""


def unfinished(answer: object) -> bool:
    """Whether an answer is nothing, or it or a part of it is still `...`."""
    parts = (
        answer.values()
        if isinstance(answer, Mapping)
        else answer
        if isinstance(answer, (tuple, list))
        else ()
    )
    return answer is None or any(part is ... for part in (answer, *parts))


def call(answer: Callable, *args: Any) -> Any:
    """What a learner's function returns.

    Raises:
        NoAnswer: It cannot be called, or has a body and returns nothing.
        Unfinished: It returns `...`, or that in a list, or its whole body is `...`.
    """
    if not callable(answer):
        raise NoAnswer(f"a function is asked for, got {type(answer).__name__}")
    result = answer(*args)
    code = getattr(answer, "__code__", _EMPTY)
    if result is None and len(code.co_code) > len(_EMPTY.co_code):
        raise NoAnswer("your function returns nothing: end it with `return` and what it computed")
    if unfinished(result):
        raise Unfinished
    return result


def is_number(answer: object) -> bool:
    """Whether it is a finite int or float, NumPy's too (a bool is neither)."""
    return (
        isinstance(answer, numbers.Real) and not isinstance(answer, bool) and math.isfinite(answer)
    )


@check
def check_number(
    answer: object,
    target: float,
    *,
    mistakes: Sequence[Mistake] = (),
    takeaway: str = "that is the number.",
) -> Verdict:
    """Whether a number is the target.

    Args:
        answer: The learner's.
        target: The right number.
        mistakes: Those that have a sentence of their own, each with its number.
        takeaway: Follows "Right: ".
    """
    if not is_number(answer):
        return not_yet(f"a number is asked for, got {type(answer).__name__}.")
    if answer == target:
        return right(takeaway)
    for mistake in mistakes:
        if math.isclose(answer, mistake.answer):
            return not_yet(mistake.sentence)
    if answer <= 0:
        return not_yet(f"{answer} is not above 0.")
    ratio = max(answer / target, target / answer)
    for slip, sentence in UNIT_SLIPS.items():
        if math.isclose(ratio, slip, rel_tol=5e-3):
            return not_yet(f"{sentence}.")
    return not_yet(
        f"{answer:,} is {ratio:.3g} times too {'large' if answer > target else 'small'}."
    )


@check
def check_function(
    answer: Callable,
    cases: Sequence[tuple],
    expected: Sequence,
    *,
    mistakes: Sequence[Mistake] = (),
    takeaway: str = "on every case.",
) -> Verdict:
    """Whether a function returns what is expected on every case.

    Args:
        answer: The learner's function.
        cases: Arguments of each call.
        expected: Result of each: a number, or a list of numbers.
        mistakes: Those that have a sentence of their own, each with a function that makes it.
        takeaway: Follows "Right: ".
    """
    for case, wanted in zip(cases, expected, strict=True):
        result = call(answer, *copy.deepcopy(case))  # an answer may write into what it is given
        if not equal(result, wanted):
            for mistake in mistakes:
                if equal(result, mistake.answer(*case)):
                    return not_yet(mistake.sentence)
            return not_yet(
                f"{describe(case)} should give {describe(wanted)}, got {describe(result)}."
            )
    return right(takeaway)


def equal(left: Any, right: Any) -> bool:
    """Numbers equal to the digit, lists item by item."""
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    if is_number(left) and is_number(right):
        return math.isclose(left, right, rel_tol=1e-12)
    return type(left) is type(right) and bool(left == right)


def describe(value: Any) -> str:
    """A value in a sentence: a tensor by its shape."""
    if isinstance(value, tuple):
        return f"({', '.join(map(describe, value))})"
    shape = getattr(value, "shape", None)
    return f"a tensor of shape {tuple(shape)}" if shape is not None else f"{value!r}"


def show_prediction(
    predicted: object, *, show: Callable[[Any], str] = show_bytes, **values: float | None
) -> None:
    """Print a prediction above what forecast and instruments say, one a line.

    Args:
        predicted: The learner's; `...` prints "no prediction yet".
        show: How to write a number; bytes by default, e.g. `"{:.1f} times".format`.
        values: Name to number; `None` is a quantity that nobody measured here.
    """
    number = is_number(predicted)
    said = (
        "no prediction yet"
        if predicted is ... or predicted is None
        else show(predicted)
        if number
        else f"{predicted!r}, which is not a number"
    )
    known = next((value for value in values.values() if value), None)
    if number and predicted > 0 and known:
        said += f" ({predicted / known:.2f} times the {next(n for n in values if values[n])})"
    rows = {"predicted": said} | {
        name: show_bytes(None) if value is None else show(value) for name, value in values.items()
    }
    width = max(map(len, rows))
    print("\n".join(f"{name.replace('_', ' '):{width}}  {text}" for name, text in rows.items()))
