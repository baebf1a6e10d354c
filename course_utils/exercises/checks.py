"""Feedback on a learner's answer: one sentence, never an exception.

A check runs the answer or measures it; an answer that only looks right does not pass. `...` is "not
attempted yet". Not offered: marks, hints (they are in the lesson), protection from a learner who
wants to cheat (`instructor/` grades in a process of its own).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from course_utils.exercises.answers import (
    blanks,
    describe,
    difference,
    equal,
    is_empty,
    number,
    unfinished,
)
from fitcast.units import GB, GIB, KIB, MIB

NOT_ATTEMPTED = "Not attempted yet: replace the `...` above by your answer and run both cells."
# How many times too large (or too small) an answer is that has another unit than the target.
UNIT_SLIPS = {
    GIB / GB: "that counts in GB (10**9); a T4's 14.56 and everything here is GiB (2**30)",
    8: "that counts bits; a byte has 8 of them",
    KIB: "that is a factor of 1024 away: check B, KiB, MiB and GiB",
    MIB: "that is a factor of 1024**2 away: check bytes and MiB",
    GIB: "that is a factor of 1024**3 away: check bytes and GiB",
}
SLIP = 5e-3  # how closely a ratio must be one of these; below it two numbers are "about equal"


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


class Unfinished(Exception):
    """A learner's function still has a `...` in it."""


class NoAnswer(TypeError):
    """A learner's answer cannot be called, or computes something and returns nothing."""


def right(message: str) -> Verdict:
    """The verdict on a passing answer; the message adds what to take away."""
    return Verdict(True, f"Right: {message}")


def not_yet(message: str) -> Verdict:
    """The verdict on a failing answer; the message says what is wrong with it."""
    return Verdict(False, f"Not yet: {message}")


def check(asked: int = 1) -> Callable[[Callable[..., Verdict]], Callable[..., Verdict]]:
    """Decorator: `...` is not attempted yet, and whatever the answer raises becomes a sentence.

    Args:
        asked: How many `...` the exercise has in the lesson. With fewer of them left it is begun,
            and the sentence names the rest.
    """

    def decorate(judge: Callable[..., Verdict]) -> Callable[..., Verdict]:
        @functools.wraps(judge)
        def safely(answer: Any = ..., *args: Any, **kwargs: Any) -> Verdict:
            if unfinished(answer):
                return _left(answer, asked)
            try:
                verdict = judge(answer, *args, **kwargs)
            except Unfinished:
                return _left(answer, asked)
            except NoAnswer as error:
                verdict = not_yet(f"{error}.")
            except Exception as error:  # an answer can raise anything; the sentence names it
                if _is_about_dots(error, answer):
                    return _left(answer, asked)
                verdict = not_yet(f"your answer raised {type(error).__name__}: {error}")
            left = "" if verdict.passed else _still_there(answer, asked)
            return Verdict(verdict.passed, f"{verdict.message} ({left})") if left else verdict

        return safely

    return decorate


def _is_about_dots(error: Exception, answer: object) -> bool:
    """Whether an error comes of a `...` that was computed with."""
    named = "ellipsis" in str(error).lower()
    return named and (isinstance(error, (TypeError, AttributeError)) or bool(blanks(answer)))


def _left(answer: object, asked: int) -> Verdict:
    """The verdict on an answer that has a `...`: not attempted, or begun and what is left of it."""
    left = _still_there(answer, asked)
    return not_yet(f"{left}.") if left else Verdict(None, NOT_ATTEMPTED)


def _still_there(answer: object, asked: int) -> str:
    """Which `...` of an answer that was begun are left; "" for an untouched or a finished one."""
    left = blanks(answer)
    if not 0 < len(left) < asked:
        return ""
    lines = ", ".join(f"`{line}`" for line in left)
    return f"{len(left)} of {asked} `...` still there: {lines}"


def call(answer: Callable, *args: Any) -> Any:
    """What a learner's function returns.

    Raises:
        NoAnswer: It cannot be called, or has a body and returns nothing.
        Unfinished: It returns `...`, or that in a list, or has no body yet.
    """
    if not callable(answer):
        raise NoAnswer(f"a function is asked for, got {type(answer).__name__}")
    result = answer(*args)
    if result is None and not is_empty(answer):
        raise NoAnswer("your function returns nothing: end it with `return` and what it computed")
    if unfinished(result):
        raise Unfinished
    return result


def name_mistake(answer: object, mistakes: Sequence[Mistake]) -> str | None:
    """The sentence of the first mistake that leads to this answer; `None` for an unknown one."""
    return next((one.sentence for one in mistakes if equal(answer, one.answer)), None)


def judge_number(
    answer: object,
    target: float,
    *,
    mistakes: Sequence[Mistake] = (),
    takeaway: str = "that is the number.",
) -> Verdict:
    """Whether a number is the target, up to rounding.

    Args:
        answer: The learner's.
        target: The right number.
        mistakes: Those that have a sentence of their own, each with its number.
        takeaway: Follows "Right: ".
    """
    found = number(answer)
    if found is None:
        got = f"{answer}" if isinstance(answer, float) else type(answer).__name__
        return not_yet(f"a number is asked for, got {got}.")
    if equal(answer, target):
        return right(takeaway)
    return not_yet(name_mistake(answer, mistakes) or _how_far(found, target))


def _how_far(found: float, target: float) -> str:
    """How a wrong number lies to the target: by its unit, by a factor, or by a difference."""
    side = "large" if found > target else "small"
    if target > 0 and found <= 0:
        return f"{found:,} is not above 0."
    if target <= 0:
        return f"{found:,} is too {side}."
    ratio = max(found / target, target / found)
    if ratio < 1 + SLIP:
        off = abs(found - target)
        return f"{found:,} is {off:{',' if isinstance(off, int) else '.3g'}} too {side}."
    for slip, sentence in UNIT_SLIPS.items():
        if abs(ratio / slip - 1) < SLIP:
            return f"{sentence}."
    return f"{found:,} is {ratio:.3g} times too {side}."


def judge_function(
    answer: Callable,
    cases: Sequence[tuple],
    expected: Sequence,
    *,
    mistakes: Sequence[Mistake] = (),
    takeaway: str = "on every case.",
) -> Verdict:
    """Whether a function returns what is expected on every case.

    A mistake is named when the answer makes it on every case: on one, two may lead to one number.

    Args:
        answer: The learner's function.
        cases: Arguments of each call.
        expected: Result of each: a number, or a list of numbers.
        mistakes: Those that have a sentence of their own, each with a function that makes it.
        takeaway: Follows "Right: ".
    """
    # An answer may write into what it is given.
    results = [call(answer, *copy.deepcopy(case)) for case in cases]
    runs = list(zip(cases, results, expected, strict=True))
    wrong = next((run for run in runs if not equal(run[1], run[2])), None)
    if wrong is None:
        return right(takeaway)
    for mistake in mistakes:
        if all(equal(result, mistake.answer(*case)) for case, result, _ in runs):
            return not_yet(mistake.sentence)
    case, result, wanted = wrong
    return not_yet(f"{describe(case)} {difference(result, wanted)}.")
