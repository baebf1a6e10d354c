"""From a reference solution, draws and mistaken functions to an exercise with its cases.

The expected values and what each mistake leads to are computed, never typed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fitcast.units import Said, refusal

from .assignment import Case, Exercise, Numbers
from .build.selfcheck import TooMany, oracle, same

MOST_DRAWS = 200
# Whose public numbers are in the notebook for all. No roster has an id with a space in front.
EVERYBODY = Numbers("", " everybody", "public numbers need no secret")
NO_VALUE = object()  # on these numbers a mistaken function fails instead of giving an answer


@dataclass(frozen=True)
class Idea:
    """What one case tests.

    Args:
        name: Shown to the student.
        draw: From a `Draw` to the arguments; or the arguments, for a case that all share. An
            exercise with an oracle draws `(arguments, knows)`.
        points: For this case.
        hidden: Whether its numbers stay with the instructor.
        tells: Mistakes that must not be right by accident: numbers are drawn until they are not.
    """

    name: str
    draw: Callable | tuple
    points: float
    hidden: bool = False
    tells: tuple[str, ...] = ()


@dataclass(frozen=True)
class Oracle:
    """A question "is this at most ...?" that a function may ask, as its last argument.

    Args:
        name: Of the last argument, e.g. "fits".
        most_questions: From the other arguments to how often it may be asked.
    """

    name: str
    most_questions: Callable[..., int]


def exercise(
    solution: Callable,
    *,
    title: str,
    minutes: int,
    reread: str,
    ideas: Sequence[Idea],
    mistakes: Mapping[str, tuple[str, Callable]],
    rel_tolerance: float = 0.0,
    ask: Oracle | None = None,
) -> Exercise:
    """An exercise whose cases follow from its solution.

    Args:
        solution: The reference; its name is the one that students keep.
        title: In the notebook, the rubric and the feedback.
        minutes: That a prepared student needs.
        reread: Where it is explained.
        ideas: Its cases, public ones first.
        mistakes: Name to a friendly sentence and a function that makes the mistake.
        rel_tolerance: Relative error of a number that still passes.
        ask: The oracle, if it has one; then `TOO_MANY` is one of the mistakes.
    """

    def cases(numbers: Numbers) -> tuple[Case, ...]:
        found: list[Case] = []
        shown = [] if numbers == EVERYBODY else [case.arguments for case in for_all()]
        for idea in ideas:
            shown += [case.arguments for case in found]
            found.append(_case(idea, numbers, solution, wrong, rel_tolerance, ask, shown))
        return tuple(found)

    @functools.cache
    def for_all() -> tuple[Case, ...]:
        return tuple(case for case in cases(EVERYBODY) if not case.hidden)

    wrong = {name: function for name, (_, function) in mistakes.items()}
    sentences = {name: sentence for name, (sentence, _) in mistakes.items()}
    return Exercise(
        function=solution.__name__,
        title=title,
        minutes=minutes,
        reread=reread,
        cases=cases,
        mistakes=sentences,
        oracles={ask.name: _at_most} if ask else {},
        solution=solution,
        wrong=wrong,
    )


def _case(
    idea: Idea,
    numbers: Numbers,
    solution: Callable,
    wrong: Mapping[str, Callable],
    rel_tolerance: float,
    ask: Oracle | None,
    shown: Sequence[tuple],
) -> Case:
    """The idea with this student's numbers: the first draw that tells its mistakes.

    A hidden case repeats none that is shown to somebody.

    Raises:
        ValueError: No draw of many does; the idea's author has to widen it.
    """
    part = numbers.hidden if idea.hidden else numbers.public
    stream = part(f"{solution.__name__}: {idea.name}")
    for _ in range(MOST_DRAWS if callable(idea.draw) else 1):
        drawn = idea.draw(stream) if callable(idea.draw) else idea.draw
        arguments, knows = drawn if ask else (drawn, None)
        most = ask.most_questions(*arguments) if ask else 0
        case = Case(
            idea.name,
            _json(tuple(arguments)),
            None,
            idea.points,
            idea.hidden,
            rel_tolerance,
            {},
            ask.name if ask else None,
            most,
            knows,
        )
        own = json.dumps(case.arguments)
        if (expected := _answer(solution, case, own)) is NO_VALUE:
            raise refusal(
                "solution",
                "answer",
                Said(f"{solution.__name__}{case.arguments} without an answer"),
                "mend it or its draw",
            )
        found = {name: _answer(function, case, own) for name, function in wrong.items()}
        found = {
            name: value
            for name, value in found.items()
            if value is not NO_VALUE and not same(value, expected, rel_tolerance)
        }
        repeats = idea.hidden and case.arguments in shown
        if found.keys() >= set(idea.tells) and not repeats:
            return replace(case, expected=expected, mistakes=found)
    raise refusal(
        "draw",
        f"tell {', '.join(idea.tells)} apart",
        Said(f"{solution.__name__} {idea.name!r} with {case.arguments}"),
        "draw from a wider range",
    )


def _answer(function: Callable, case: Case, arguments: str) -> Any:
    """What a function of ours gives on a case, as JSON; NO_VALUE if the mistake fails instead.

    Args:
        function: The reference, or one that makes a mistake.
        case: Which.
        arguments: The case's, as JSON: each function gets its own, which it may change.
    """
    extra = [oracle(vars(case))] if case.oracle else []
    try:
        value = _json([function(*json.loads(arguments), *extra)])[0]
        return _rounded(value) if case.rel_tolerance else value
    except (TooMany, ArithmeticError, TypeError):
        return NO_VALUE


def _rounded(value: Any) -> Any:
    """Floats to 12 digits: `sum` of floats differs in the last bit between Python 3.11 and 3.12."""
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return float(f"{value:.12g}") if isinstance(value, float) else value


def _json(value: Sequence) -> tuple:
    return tuple(json.loads(json.dumps(value)))


def _at_most(case: Case, *question: Any) -> bool:
    """The grader's answer to a question of a student's function.

    Raises:
        ValueError: It is not one number.
    """
    if (
        len(question) != 1
        or isinstance(question[0], bool)
        or not isinstance(question[0], (int, float))
    ):
        raise refusal("a question", "be one number", question, "ask with a number")
    return question[0] <= case.knows
