"""What an instructor should know of one notebook, whatever its points."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ..assignment import Assignment, load, names
from .marking import some_of
from .matching import Attempt

MOST_STOPPED = 3  # of a notebook's statements that are named


def strange(attempt: Attempt) -> bool:
    """Whether a notebook holds no function of the assignment."""
    return all("problem" in about for about in attempt.about["functions"].values())


def whose(assignment: Assignment, attempts: Iterable[Attempt]) -> str:
    """The other assignment that most of the notebooks' functions are of; empty if none is."""
    seen = Counter(name for attempt in attempts for name in attempt.about["defines"])
    fits = {
        name: sum(seen[exercise.function] for exercise in load(name).exercises)
        for name in names()
        if name != assignment.name
    }
    best = max(fits, key=lambda name: fits[name], default="")
    return best if fits.get(best) else ""


def odd(assignment: Assignment, attempt: Attempt) -> list[str]:
    """That it is another assignment's, or that something in it stopped or had to be stopped."""
    found = []
    if strange(attempt):
        other = whose(assignment, [attempt])
        hint = f"; its functions are those of {other}" if other else ""
        found.append(f"the notebook holds no exercise of {assignment.name}{hint}")
    if stopped := _stopped(attempt):
        found.append(f"stopped in the notebook: {'; '.join(some_of(stopped, MOST_STOPPED))}")
    return found


def _stopped(attempt: Attempt) -> list[str]:
    """Statements that failed when the notebook was run, or that ended the run."""
    rehearsal, statements = attempt.rehearsal, attempt.about["statements"]
    said = {int(number): note for number, note in rehearsal["notes"].items()}
    for number in rehearsal["left_out"]:
        cell, text = statements[number]
        first = (text.strip().splitlines() or [""])[0][:80]
        said[number] = f"code cell {cell}, {first!r}: took too long or too much, and was left out"
    return [said[number] for number in sorted(said)]
