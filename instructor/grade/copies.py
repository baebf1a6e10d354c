"""Answers that two students can hardly have found independently, with what speaks for it.

Evidence for a conversation, not a verdict: there are innocent ways, such as working together.
Right answers to short exercises look alike, so they never count. Long ones do however many share
them, and one student is enough where it is the solution that the course publishes. Comments, white
space, line ends and other names for variables hide nothing (`sandbox.shape`). Students who are
alike in several ways are one group.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import textwrap
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..sandbox.shape import shape
from .marking import Mark, Outcome, equal, show, some_of

LONG_PARTS = 60  # of a function, from which on the same shape is no accident, in no number
SHORT_PARTS = 15  # of a wrong one
FEW = 3  # students; what more share is an obvious way to write it, if it is short
FEW_SHARE = 0.05  # of the class
KEY_PARTS = 30  # of a function of the key; equal to it by accident now and then, but not in all:
KEY_SHARE = 0.75  # of the parts of all such functions
FEWEST_ANSWERS = 2  # wrong answers in common
MOST_NAMED = 10  # in a flag


@dataclass(frozen=True)
class Alike:
    """Students whose work is alike, and in what."""

    students: tuple[str, ...]
    evidence: str
    key: bool = False  # alike with the published solution, so one student is enough

    def flag(self, student: str) -> str:
        """What the grade list says of one of them; a crowd is counted, not named."""
        others = [other for other in self.students if other != student]
        crowd = len(others) > MOST_NAMED
        them = [f"{len(others)} others" if crowd else ", ".join(others)] if others else []
        them += ["the published solution"] if self.key else []
        return f"alike with {' and '.join(them)}, see the class report"


def find(
    marks: Mapping[str, Sequence[Mark]],
    code: Mapping[str, Mapping[str, Mapping]],
) -> list[Alike]:
    """Everything alike, in a fixed order.

    Args:
        marks: By student.
        code: By student and function, what `plan.read` said of it.
    """
    few = max(FEW, int(FEW_SHARE * len(marks)))
    code_alike = _same_code(marks, code, few)
    with_key = [alike for alike in code_alike if alike.key]
    among = [alike for alike in code_alike if not alike.key]
    groups = _merged([*among, *_same_answers(marks, few), *_anothers(marks)])
    return sorted([*with_key, *groups], key=lambda alike: (alike.students, alike.evidence))


def flags(found: Sequence[Alike], student: str) -> list[str]:
    """What the grade list says of a student: one line of the published solution, one of others."""
    mine = [alike for alike in found if student in alike.students]
    same_key = {other for alike in mine if alike.key for other in alike.students}
    one = [Alike(tuple(sorted(same_key)), "", True)] if same_key else []
    return [alike.flag(student) for alike in [*one, *(a for a in mine if not a.key)]]


def _merged(found: Sequence[Alike]) -> list[Alike]:
    """One for each group of students who are linked, directly or by others."""
    groups: list[tuple[set[str], list[Alike]]] = []
    for alike in sorted(found, key=lambda alike: (alike.students, alike.evidence)):
        linked = [group for group in groups if group[0] & set(alike.students)]
        groups = [group for group in groups if group not in linked]
        students = set(alike.students).union(*(group[0] for group in linked))
        groups.append((students, [*(one for _, several in linked for one in several), alike]))
    return [_group(students, several) for students, several in groups]


def _group(students: set[str], several: Sequence[Alike]) -> Alike:
    """The group's one line: who is meant by a piece of evidence is said where not all are."""
    lines = [
        one.evidence if set(one.students) == students else f"{_named(one.students)}: {one.evidence}"
        for one in several
    ]
    return Alike(tuple(sorted(students)), "; ".join(some_of(lines, MOST_NAMED)))


def _named(students: Sequence[str]) -> str:
    return ", ".join(some_of([*students], MOST_NAMED))


def _same_code(marks: Mapping, code: Mapping, few: int) -> list[Alike]:
    shared: dict[tuple, list[str]] = defaultdict(list)
    for student in sorted(marks):
        copied = _of_the_key(marks[student], code.get(student, {}))
        for mark in marks[student]:
            about = code.get(student, {}).get(mark.exercise.function, {})
            if mark.unfinished or not mark.outcomes or "shape" not in about:
                continue
            name, long = mark.exercise.function, about["parts"] >= LONG_PARTS
            right = all(o.verdict == "right" for o in mark.outcomes)
            odd = any(o.verdict != "right" and not o.mistake for o in mark.outcomes)
            if name in copied:
                shared[name, "key", True, about["shape"]].append(student)
            elif right and long:
                shared[name, "right", True, about["shape"]].append(student)
            elif odd and about["parts"] >= SHORT_PARTS:
                shared[name, "shape", long, about["shape"]].append(student)
    groups: dict[tuple, list[str]] = defaultdict(list)
    for (name, kind, long, _), students in sorted(shared.items()):
        if kind == "key" or len(students) > 1 and (long or len(students) <= few):
            groups[tuple(students), kind == "key"].append(
                {
                    "key": f"`{name}` is the published solution but for names and layout",
                    "right": f"`{name}` is the same but for names and layout",
                    "shape": f"`{name}` is not right and the same but for names and layout",
                }[kind]
            )
    return [Alike(students, "; ".join(lines), key) for (students, key), lines in groups.items()]


def _of_the_key(marks: Sequence[Mark], code: Mapping[str, Mapping]) -> set[str]:
    """The functions in which a student's right code has the shape of the published solution.

    Only long ones; shorter ones too where nearly all of them have it.
    """
    equal_parts, all_parts = {}, 0
    for mark in marks:
        name, (form, parts) = mark.exercise.function, _shape_of(mark.exercise.solution)
        if parts >= KEY_PARTS:
            all_parts += parts
            if (
                code.get(name, {}).get("shape") == form
                and mark.outcomes
                and all(o.verdict == "right" for o in mark.outcomes)
            ):
                equal_parts[name] = parts
    nearly_all = len(equal_parts) > 1 and sum(equal_parts.values()) >= KEY_SHARE * all_parts
    least = KEY_PARTS if nearly_all else LONG_PARTS
    return {name for name, parts in equal_parts.items() if parts >= least}


@functools.cache
def _shape_of(solution: Callable | None) -> tuple[str, int]:
    """A reference's shape and parts, as the reader of notebooks (`source`) gives a student's."""
    if solution is None:
        return "", 0
    return shape(ast.parse(textwrap.dedent(inspect.getsource(solution))).body[0])


def _odd(marks: Sequence[Mark]) -> list[tuple[str, Outcome]]:
    """Wrong answers that no known mistake explains, each with where it was given."""
    return [
        (f"{mark.exercise.function}, {outcome.case.name}", outcome)
        for mark in marks
        for outcome in mark.outcomes
        if outcome.verdict == "wrong" and not outcome.mistake and _telling(outcome.answer)
    ]


def _telling(answer: Any) -> bool:
    """Whether an answer is one that two people do not give by accident."""
    if isinstance(answer, bool) or answer is None:
        return False
    return not isinstance(answer, int | float) or abs(answer) >= 10 or answer != answer // 1


def _same_answers(marks: Mapping[str, Sequence[Mark]], few: int) -> list[Alike]:
    by_answer: dict[tuple[str, str], list[tuple[str, Outcome]]] = defaultdict(list)
    for student in sorted(marks):
        for place, outcome in _odd(marks[student]):
            by_answer[place, json.dumps(outcome.answer)].append((student, outcome))
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for (place, _), given in sorted(by_answer.items()):
        numbers = {json.dumps(outcome.case.arguments) for _, outcome in given}
        if 1 < len(given) <= few and len(numbers) > 1:
            groups[tuple(student for student, _ in given)].append(
                f"{place}: {show(given[0][1].answer)}"
            )
    return [
        Alike(students, "the same wrong answers though their numbers differ: " + "; ".join(lines))
        for students, lines in groups.items()
        if len(lines) >= FEWEST_ANSWERS
    ]


def _anothers(marks: Mapping[str, Sequence[Mark]]) -> list[Alike]:
    """Wrong answers that would be right with one other student's numbers."""
    right: dict[tuple[str, str], list[str]] = defaultdict(list)
    for student in sorted(marks):
        for mark in marks[student]:
            for outcome in mark.outcomes:
                place = f"{mark.exercise.function}, {outcome.case.name}"
                right[place, json.dumps(outcome.case.expected)].append(student)
    found = []
    for student in sorted(marks):
        lines: dict[str, list[str]] = defaultdict(list)
        for place, outcome in _odd(marks[student]):
            owners = right.get((place, json.dumps(outcome.answer)), [])
            for owner in owners if len(owners) <= FEW else []:
                if owner != student and not equal(outcome.answer, outcome.case.expected, 0.0):
                    lines[owner].append(f"{place}: {show(outcome.answer)}")
        found += [
            Alike(
                tuple(sorted((student, owner))),
                f"answers of {student} that are right with the numbers of {owner}: "
                + "; ".join(given),
            )
            for owner, given in lines.items()
            if len(given) >= FEWEST_ANSWERS
        ]
    return found
