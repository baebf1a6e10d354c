"""From what a student's function answered to points, the mistake's name, and a reason in words.

Everything a child says is data: compared, shortened, shown; nothing of it is believed or run.
"""

from __future__ import annotations

import builtins
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..assignment import TOO_MANY, Case, Exercise
from ..build.selfcheck import same
from .rubric import show_points

MOST_SAID = 20  # flags of a student, files of a kind
MOST_NOTES = 3  # of an exercise
LONGEST_SHOWN = 80  # characters of an answer
MISTAKE_TOLERANCE = 1e-9  # relative, as in the notebook's self-check
ENDED = {
    "time": "it did not come back in time: is there an endless loop?",
    "idle": "it waited for something that does not come",
    "memory": "it used more memory than the exercise allows",
    "left": "it ended the process instead of returning (`exit`, `os._exit`)",
    "crash": "it crashed Python",
    "flood": "its answer is far too long",
    "deep": "its answer is nested far too deep",
    "garbage": "it meddled with the grader's pipe instead of returning",
    "finished": "it ended without an answer",
}
NO_WAY_OUT = "the grader allows no network, no other program and no files of its own"
MISSING = "there is no such function where its check stands"
NO_FUNCTION = "it is not a function"
OWN = "an exception of its own"
HINTS = {
    "ModuleNotFoundError": "the grader has Python's standard library only",
    "ImportError": "the grader has Python's standard library only",
    "PermissionError": NO_WAY_OUT,
    "FileNotFoundError": NO_WAY_OUT,
    "EOFError": "nobody is there to answer `input`",
    "MemoryError": "it used more memory than the exercise allows",
    "SystemExit": "it ended the process instead of returning",
}
ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+")  # of an object; another one in every run
FILE_TOO_LARGE, NOT_PERMITTED = "[Errno 27]", "[Errno 1]"  # EFBIG: what it printed, or a file


def equal(answer: Any, expected: Any, rel_tolerance: float) -> bool:
    """`selfcheck.same`, also for integers beyond every float."""
    try:
        return same(answer, expected, rel_tolerance)
    except OverflowError:
        return False


@dataclass(frozen=True)
class Outcome:
    """One case, judged.

    Args:
        case: Which.
        earned: Points.
        verdict: `right`, `wrong`, `failed` (no answer) or `unfinished`.
        mistake: Name of the known mistake that explains it, if one does.
        reason: For the instructor; with numbers.
        told: For the student; without numbers if the case is hidden.
        answer: What it answered, as JSON; None if it did not.
    """

    case: Case
    earned: float
    verdict: str
    mistake: str | None
    reason: str
    told: str
    answer: Any = None


@dataclass(frozen=True)
class Mark:
    """One exercise of one student, judged.

    Args:
        exercise: Which.
        outcomes: One a case.
        problem: Why there is nothing to judge; then no case earned anything.
        notes: What the reader of the notebook found odd.
        weight: How much it counts; 0 if it is dropped.
        by_hand: Points that the instructor gave instead.
        comment: Why.
    """

    exercise: Exercise
    outcomes: tuple[Outcome, ...] = ()
    problem: str = ""
    notes: tuple[str, ...] = field(default=())
    weight: float = 1.0
    by_hand: float | None = None
    comment: str = ""

    @property
    def found(self) -> float:
        """Points that the grader found."""
        return math.fsum(outcome.earned for outcome in self.outcomes)

    @property
    def earned(self) -> float:
        """Points: the instructor's if there are some, else what the grader found."""
        return self.found if self.by_hand is None else self.by_hand

    @property
    def counts(self) -> float:
        """Points by their weight."""
        return self.weight * self.earned

    @property
    def right(self) -> bool:
        """Whether every case is right."""
        return bool(self.outcomes) and all(o.verdict == "right" for o in self.outcomes)

    @property
    def unfinished(self) -> bool:
        """Whether the student left the `...` everywhere."""
        return bool(self.outcomes) and all(o.verdict == "unfinished" for o in self.outcomes)

    @property
    def mistakes(self) -> dict[str, int]:
        """Known mistakes, each with the number of cases that it explains."""
        return dict(Counter(o.mistake for o in self.outcomes if o.mistake))

    @property
    def changed(self) -> str:
        """What the instructor changed, in words; empty for nothing."""
        said = []
        if self.by_hand is not None:
            why = f": {self.comment}" if self.comment else ""
            given, found = show_points(self.by_hand), show_points(self.found)
            said.append(f"set by hand to {given}, the grader found {found}{why}")
        if self.weight != 1:
            said.append(f"counts {show_points(self.weight)} times" if self.weight else "dropped")
        return "; ".join(said)

    @property
    def reason(self) -> str:
        """Why not all points, in a line for the instructor."""
        return "; ".join(filter(None, [self.changed, self._reason]))

    @property
    def _reason(self) -> str:
        if self.problem:
            return "; ".join([self.problem, *self.notes])
        if self.unfinished:
            return "; ".join(["not attempted", *self.notes])
        lost: dict[str, list[str]] = {}
        for outcome in self.outcomes:
            if outcome.verdict != "right":
                lost.setdefault(outcome.reason, []).append(outcome.case.name)
        reasons = [f"{', '.join(cases)}: {reason}" for reason, cases in lost.items()]
        return "; ".join([*(reasons or ["right"]), *self.notes])


def mark(
    exercise: Exercise,
    cases: Sequence[Case],
    replies: Sequence[Mapping],
    notes: Sequence[str] = (),
    failed: Sequence[str] = (),
) -> Mark:
    """Judge what one student's function answered.

    Args:
        exercise: Which.
        cases: The student's.
        replies: One a case.
        notes: What the reader of the notebook found odd.
        failed: Statements that the function needs and that failed, as a rehearsal without any
            hidden number had it; told where it may be the cause.
    """
    named = [_mistakes(case, reply) for case, reply in zip(cases, replies, strict=True)]
    # Of the mistakes that explain a case, the one that explains most cases is named.
    weight = Counter(name for names in named for name in names)
    order = [*exercise.mistakes, TOO_MANY]
    outcomes = []
    for case, reply, names in zip(cases, replies, named, strict=True):
        name = min(names, key=lambda name: (-weight[name], order.index(name)), default=None)
        outcomes.append(_outcome(exercise, case, reply, name))
    right = all(outcome.verdict == "right" for outcome in outcomes)
    why = [] if right else [_note(note) for note in failed[:MOST_NOTES]]
    return Mark(exercise, tuple(outcomes), notes=tuple(dict.fromkeys([*notes, *why])))


def _note(note: str) -> str:
    """What failed before the function was called."""
    hint = next((hint for kind, hint in HINTS.items() if f" {kind}: " in note), "")
    return f"before, {show(note, 300)[1:-1]}" + (f" ({hint})" if hint else "")


def _mistakes(case: Case, reply: Mapping) -> list[str]:
    if "too_many" in reply:
        return [TOO_MANY]
    if "value" not in reply or equal(reply["value"], case.expected, case.rel_tolerance):
        return []
    tolerance = max(MISTAKE_TOLERANCE, case.rel_tolerance)
    return [
        name for name, value in case.mistakes.items() if equal(reply["value"], value, tolerance)
    ]


def _outcome(exercise: Exercise, case: Case, reply: Mapping, mistake: str | None) -> Outcome:
    sentence = exercise.mistakes.get(mistake, "") if mistake else ""
    if "value" in reply:
        answer = reply["value"]
        if equal(answer, case.expected, case.rel_tolerance):
            return Outcome(case, case.points, "right", None, "right", "Right.", answer)
        numbers = f"answered {show(answer)}, expected {show(case.expected)}"
        told = "" if case.hidden else f"Your answer {show(answer)} should be {show(case.expected)}."
        told = " ".join(filter(None, [told, _capital(sentence)])) or "Not the right answer."
        if answer is None:
            told += " The function returns nothing; is a `return` missing?"
        reason = f"{mistake} ({numbers})" if mistake else numbers
        return Outcome(case, 0.0, "wrong", mistake, reason, told, answer)
    if "unfinished" in reply:
        return Outcome(case, 0.0, "unfinished", None, "not attempted", "Not attempted yet.")
    if "too_many" in reply:
        return Outcome(
            case,
            0.0,
            "wrong",
            mistake,
            f"{mistake} (more than {case.most_questions})",
            _capital(sentence) or "It asks too many questions.",
        )
    if "refused" in reply:
        text = reply["refused"]
        told = "A question it asked makes no sense." if case.hidden else _capital(text)
        return Outcome(case, 0.0, "failed", None, text, told)
    reason, told = _no_answer(reply, case.hidden)
    return Outcome(case, 0.0, "failed", None, reason, _capital(told) + ".")


def _no_answer(reply: Mapping, hidden: bool) -> tuple[str, str]:
    """The reason, and what the student is told."""
    if "no_function" in reply:
        reason = MISSING if reply["no_function"] else NO_FUNCTION
        return reason, reason
    if "error" in reply:
        return _error(reply, hidden)
    if "not_run" in reply:
        reason = "not run, because the time was used up by the cases before it"
        return reason, reason
    told = ENDED[reply["ended"]]
    reason = told + (f" ({reply['detail']})" if reply["detail"] else "")
    return reason, told if hidden else reason


def _error(reply: Mapping, hidden: bool) -> tuple[str, str]:
    """The reason, and what the student is told.

    An exception of a hidden case could hold its numbers, in its text and in its class's name: of
    such a one only Python's own classes are told.
    """
    kind, text = reply["type"], reply["error"]
    hint = HINTS.get(kind, "")
    if NOT_PERMITTED in text:
        hint = NO_WAY_OUT
    if FILE_TOO_LARGE in text:
        hint = "it printed or wrote more than 1 MiB"
    said, rest = show(text, 200)[1:-1], f" ({hint})" if hint else ""
    return f"raised {said}{rest}", f"it raised {_known(kind) if hidden else said}{rest}"


def _known(kind: str) -> str:
    """An exception's class if it is one of Python's own."""
    known = getattr(builtins, kind, None)
    return kind if isinstance(known, type) and issubclass(known, BaseException) else OWN


def show(value: Any, longest: int = LONGEST_SHOWN) -> str:
    """A value as Python writes it, in ASCII and not endless."""
    try:
        text = ascii(value) if not isinstance(value, str) else repr(value)
        text = ADDRESS.sub("at 0x...", text.encode("utf-8", "backslashreplace").decode())
    except (ValueError, RecursionError):  # an integer of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= longest else text[: longest - 4] + " ..." + text[-1:]


def some_of(texts: list[str], most: int = MOST_SAID) -> list[str]:
    """The first of them, and how many more there are: a hostile notebook may cause thousands."""
    return texts if len(texts) <= most else [*texts[:most], f"and {len(texts) - most} more"]


def points_of(earned: float, out_of: float) -> str:
    """`2.5 of 4`."""
    return f"{show_points(round(earned, 4))} of {show_points(out_of)}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
