"""A student's page: points, what was right, what went wrong in a sentence, what to reread.

It holds no number of a hidden case, nor anything about other students.
"""

from __future__ import annotations

from ..assignment import Assignment
from ..build.selfcheck import show_call
from ..grade.marking import Mark, Outcome, points_of
from ..grade.results import Result
from .page import code, escape, page, sentence

SIGNS = {
    "right": ("good", "✓ right"),
    "wrong": ("bad", "✗ not yet"),
    "failed": ("bad", "✗ no answer"),
    "unfinished": ("soft", "– not attempted"),
}


def feedback(assignment: Assignment, result: Result) -> str:
    """The page of one student whose work came back."""
    parts = [
        f"<h1>{escape(assignment.title)}</h1>",
        f"<p>{escape(result.row['name'])} <span class='soft'>({escape(result.student_id)})"
        "</span></p>",
    ]
    if not result.marks:
        parts.append(
            f"<p class='note'>Your file {code(result.file)} could not be graded: "
            f"{sentence(result.problem)}. Please hand it in again.</p>"
        )
        return page(f"{assignment.title}: feedback", "\n".join(parts))
    out_of = assignment.points
    parts.append(
        f"<p><strong>{points_of(result.score, out_of)} points.</strong> "
        f"{_overall(result.score / out_of)}</p>"
    )
    parts += _reread(result)
    if result.late:
        parts.append(f"<p class='soft'>Handed in {escape(result.late)} after the due time.</p>")
    parts.append(
        f"<p class='soft'>Graded: {code(result.file)}. Cases marked <em>hidden</em> use "
        "numbers that stay with your instructor.</p>"
    )
    parts += [_exercise(number, mark) for number, mark in enumerate(result.marks, start=1)]
    return page(f"{assignment.title}: feedback", "\n".join(parts))


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
        missing = mark.exercise.points - mark.earned
        if missing > 0:
            lost[mark.exercise.reread] = lost.get(mark.exercise.reread, 0.0) + missing
    if not lost:
        return []
    rows = "".join(
        f"<li>{escape(place)}</li>" for place, _ in sorted(lost.items(), key=lambda pair: -pair[1])
    )
    return [f"<h2>Worth rereading</h2>\n<ul>{rows}</ul>"]


def _exercise(number: int, mark: Mark) -> str:
    exercise = mark.exercise
    head = (
        f"<h2>{number}. {escape(exercise.title)}</h2>\n<p>{code(exercise.function)}: "
        f"<strong>{points_of(mark.earned, exercise.points)}</strong></p>"
    )
    if mark.problem:
        return f"{head}\n<p class='note'>Not graded: {sentence(mark.problem)}.</p>"
    notes = "".join(f"<p class='soft'>Note: {sentence(note)}.</p>" for note in mark.notes)
    if all(outcome.verdict == "right" for outcome in mark.outcomes):
        return f"{head}\n<p class='good'>✓ right in all {len(mark.outcomes)} cases</p>\n{notes}"
    rows = "".join(_case(exercise.function, outcome) for outcome in mark.outcomes)
    return (
        f"{head}\n<div class='wide'><table><caption>Cases of {escape(exercise.function)}"
        "</caption>\n<thead><tr><th scope='col'>case</th><th scope='col'>result</th>"
        "<th scope='col' class='number'>points</th><th scope='col'>what happened</th></tr>"
        f"</thead>\n<tbody>{rows}</tbody></table></div>\n{notes}"
        f"<p>Reread {escape(exercise.reread)}.</p>"
    )


def _case(function: str, outcome: Outcome) -> str:
    kind, sign = SIGNS[outcome.verdict]
    case = outcome.case
    what = (
        " <span class='soft'>(hidden)</span>"
        if case.hidden
        else f"<br>{code(show_call(function, vars(case)))}"
    )
    return (
        f"<tr><th scope='row'>{escape(case.name)}{what}</th>"
        f"<td class='tight {kind}'>{sign}</td>"
        f"<td class='tight number'>{points_of(outcome.earned, case.points)}</td>"
        f"<td>{'' if outcome.verdict == 'right' else sentence(outcome.told)}</td></tr>\n"
    )
