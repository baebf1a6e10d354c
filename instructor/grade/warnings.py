"""What may be wrong with the grading itself: read before any grade is handed out.

A wrong assignment, a wrong secret or two ids that look alike give a whole class points that nobody
deserves, and no single page shows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from ..assignment import Assignment, Case
from ..cases import EVERYBODY
from ..sandbox.plan import digest
from .marking import some_of
from .matching import Attempt
from .odd import strange, whose
from .results import Result
from .submissions import Names

FEWEST = 5  # students, below which chance explains what they have in common
MOST_STRAY = 0.2  # of the files
HALF = 0.5


def warnings(
    assignment: Assignment,
    known: Names,
    results: Sequence[Result],
    attempts: Mapping[str, Sequence[Attempt]],
    cases: Mapping[str, Mapping[str, Sequence[Case]]],
    ungraded: Sequence[tuple[str, str]],
) -> list[str]:
    """A sentence for each thing that looks wrong.

    Args:
        assignment: What was graded.
        known: Whom paths name.
        results: Of the class.
        attempts: What was graded, by student.
        cases: By student and function, as the instructor's secret gives them.
        ungraded: Files that were not.
    """
    tried = [(student, one) for student, several in attempts.items() for one in several]
    return [
        *_assignment(assignment, [attempt for _, attempt in tried]),
        *_secret(assignment, cases, tried),
        *_ids(known),
        *_scores(assignment, results),
        *_python(tried),
        *_files(len(tried), ungraded),
    ]


def _assignment(assignment: Assignment, tried: Sequence[Attempt]) -> Iterator[str]:
    strangers = [attempt for attempt in tried if strange(attempt)]
    if not tried or len(strangers) < HALF * len(tried):
        return
    other = whose(assignment, strangers)
    hint = f"; their functions are those of {other}" if other else ""
    yield (
        f"{len(strangers)} of {len(tried)} notebooks hold no exercise of {assignment.name}: is it "
        f"the right assignment?{hint}"
    )


def _public(cases: Mapping[str, Sequence[Case]]) -> str:
    return digest(
        {name: [list(c.arguments) for c in some if not c.hidden] for name, some in cases.items()}
    )


def _secret(
    assignment: Assignment,
    cases: Mapping[str, Mapping[str, Sequence[Case]]],
    tried: Sequence[tuple[str, Attempt]],
) -> Iterator[str]:
    """Public numbers that come neither from this secret nor from none."""
    stated = [(s, a) for s, a in tried if a.about["public"] and not strange(a)]
    if not stated:
        return
    everybody = _public({e.function: e.cases(EVERYBODY) for e in assignment.exercises})
    others = [
        student
        for student, attempt in stated
        if attempt.about["public"] not in (everybody, _public(cases[student]))
    ]
    if len(others) >= HALF * len(stated):
        yield (
            f"the public numbers in {len(others)} of {len(stated)} notebooks come from another "
            "secret, or from another version of the assignment: grade with what they were built "
            "with, or hidden numbers are not those you meant"
        )


def _ids(known: Names) -> Iterator[str]:
    for ids in known.alike:
        yield (
            f"the ids {', '.join(map(ascii, ids))} differ only in case or Unicode form: a file "
            "that spells one of them in another way is nobody's"
        )


def _scores(assignment: Assignment, results: Sequence[Result]) -> Iterator[str]:
    graded = [result for result in results if result.status == "graded"]
    if len(graded) < FEWEST:
        return
    scores = {round(result.score, 9) for result in graded}
    if scores == {0.0}:
        yield f"nobody of {len(graded)} has a point: is something wrong with the set-up?"
        return
    if len(scores) == 1:
        yield f"all {len(graded)} have the same score, {min(scores):g}: is that possible?"
    for number, exercise in enumerate(assignment.exercises):
        marks = [result.marks[number] for result in graded]
        done = [mark for mark in marks if mark.outcomes and not mark.unfinished]
        if len(done) >= FEWEST and not any(mark.found for mark in done):
            yield f"nobody of {len(done)} who tried has a point in {exercise.function}"


def _python(tried: Sequence[tuple[str, Attempt]]) -> Iterator[str]:
    newer = Counter(attempt.newer for _, attempt in tried if attempt.newer)
    if newer:
        most = max(newer, key=lambda version: tuple(map(int, version.split("."))))
        said = ", ".join(f"{count} with {version}" for version, count in sorted(newer.items()))
        yield (
            f"{sum(newer.values())} of {len(tried)} notebooks were saved with a newer Python than "
            f"the grader's ({said}): grade with --python python{most}"
        )


def _files(graded: int, ungraded: Sequence[tuple[str, str]]) -> Iterator[str]:
    total = graded + len(ungraded)
    if len(ungraded) > max(1, MOST_STRAY * total):
        why = Counter(reason for _, reason in ungraded).most_common()
        reasons = some_of([f"{count} times: {reason}" for reason, count in why], 3)
        yield f"{len(ungraded)} of {total} files were not graded; " + "; ".join(reasons)
