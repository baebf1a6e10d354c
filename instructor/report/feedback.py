"""A student's page: points, what was right, what went wrong in a sentence, what to reread.

It holds no number of a hidden case, nor anything about other students.
"""

from __future__ import annotations

from ..assignment import Assignment, Case
from ..build import selfcheck
from ..grade.marking import points_of
from ..grade.results import Result
from ..grade.rubric import show_points
from .page import page

SIGNS = {
    "right": ("good", "✓ right"),
    "wrong": ("bad", "✗ not yet"),
    "failed": ("bad", "✗ no answer"),
    "unfinished": ("soft", "– not attempted"),
}


def feedback(assignment: Assignment, result: Result, out_of: float | None = None) -> str:
    """The page of one student whose work came back.

    Args:
        assignment: Which.
        result: The student's.
        out_of: Points of the assignment as it counts; all of its points if None.
    """
    out_of = assignment.points if out_of is None else out_of
    return page(
        "feedback",
        assignment=assignment,
        result=result,
        out_of=out_of,
        overall=_overall(result.score / out_of if out_of else 0.0),
        reread=_reread(result),
        signs=SIGNS,
        points_of=points_of,
        show_points=show_points,
        show_call=_show_call,
    )


def _show_call(function: str, case: Case) -> str:
    return selfcheck.show_call(function, vars(case))


def _overall(share: float) -> str:
    if share == 1:
        return "Everything is right. Well done!"
    if share >= 0.75:
        return "Most of it is right; what is left is below."
    if share >= 0.4:
        return "A good part is right. Take the exercises below one at a time."
    return "This was hard going. Start with the sections named below; they hold what is missing."


def _reread(result: Result) -> list[str]:
    """What to reread: once each, what costs most first."""
    lost: dict[str, float] = {}
    for mark in result.marks:
        missing = mark.weight * (mark.exercise.points - mark.earned)
        if missing > 0:
            lost[mark.exercise.reread] = lost.get(mark.exercise.reread, 0.0) + missing
    return [place for place, _ in sorted(lost.items(), key=lambda pair: -pair[1])]
