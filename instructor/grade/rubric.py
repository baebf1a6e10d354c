"""The rubric of an assignment, as Markdown: points, time, what each case tests, known mistakes."""

from __future__ import annotations

from ..assignment import Assignment, Exercise, Numbers

SAMPLE = Numbers("", "sample", "names and points are the same for every student")


def rubric(assignment: Assignment) -> str:
    """The page an instructor reads before handing an assignment out."""
    rows = [
        f"| {number} | {exercise.title} | `{exercise.function}` | "
        f"{show_points(exercise.points)} | {exercise.minutes} | {exercise.reread} |"
        for number, exercise in enumerate(assignment.exercises, start=1)
    ]
    minutes = sum(exercise.minutes for exercise in assignment.exercises)
    return "\n".join(
        [
            f"# Rubric: {assignment.title}",
            "",
            f"{show_points(assignment.points)} points, about {minutes} minutes for a student who "
            f"has worked through {assignment.lesson}. An exercise is a function; each case that it "
            "gets right earns the case's points, whatever the others do.",
            "",
            "| | exercise | function | points | minutes | background |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            *(line for exercise in assignment.exercises for line in _section(exercise)),
        ]
    )


def _section(exercise: Exercise) -> list[str]:
    cases = [
        f"| {case.name} | {'hidden' if case.hidden else 'public'} | {show_points(case.points)} |"
        for case in exercise.cases(SAMPLE)
    ]
    mistakes = [f"- *{name}*: {sentence}" for name, sentence in exercise.mistakes.items()]
    asks = [f"It may ask `{name}`; the answers stay with the grader." for name in exercise.oracles]
    return [
        f"## {exercise.title}: `{exercise.function}`",
        "",
        *asks,
        "| case | | points |",
        "|---|---|---|",
        *cases,
        "",
        "Common mistakes, each recognised by the self-check and the feedback:",
        "",
        *mistakes,
        "",
    ]


def show_points(points: float) -> str:
    """`2` for 2.0, `2.5` for 2.5."""
    return f"{points:g}"
