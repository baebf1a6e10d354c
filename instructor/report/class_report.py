"""The class at a glance, for the instructor: scores, hardest exercises, mistakes, flags."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from markupsafe import Markup

from ..assignment import Assignment
from ..grade.results import ClassResult, Result
from ..grade.rubric import show_points
from .page import code, page, sentence

BINS = 10
MOST_FILES = 1000
LINE_BREAK = Markup("<br>")
MOST_MISTAKES = 15
ALIKE = """Evidence for a conversation, no verdict: working together or a common source explain some
of it. The published solution stands in the course's public repository: who has it has read it
there, or has it from somebody who did, or, rarely, has come upon the same lines alone. Ask how the
function works."""


def class_report(assignment: Assignment, found: ClassResult) -> str:
    """The page. It names students: for the instructor alone."""
    graded = [result for result in found.results if result.status == "graded"]
    bars = _bars(found, graded) if graded else []
    return page(
        "class_report",
        assignment=assignment,
        found=found,
        summary=_summary(found, graded),
        bars=bars,
        words=", ".join(f"{bar['range'].replace('-', ' to ')} %: {bar['count']}" for bar in bars),
        sections=[*_exercises(assignment, graded), *_students(found)],
        line_break=LINE_BREAK,
    )


def _summary(found: ClassResult, graded: Sequence[Result]) -> list[str]:
    counts = Counter(result.status for result in found.results)
    late = sum(bool(result.late) for result in found.results)
    by_hand = f"{counts['by hand']} by hand, " if counts["by hand"] else ""
    lines = [
        f"{len(found.results)} students: {counts['graded']} graded, {counts['refused']} "
        f"refused, {counts['missing']} missing, {by_hand}{late} late."
    ]
    if graded:
        scores = [result.score for result in graded]
        lines.append(
            f"Of {show_points(found.out_of)} points: median "
            f"{statistics.median(scores):.1f}, mean {statistics.fmean(scores):.1f}, from "
            f"{show_points(min(scores))} to {show_points(max(scores))}."
        )
    return lines


def _bars(found: ClassResult, graded: Sequence[Result]) -> list[dict]:
    """The histogram's bars: students by share of the points, in tenths."""
    counts = [0] * BINS
    for result in graded:
        counts[min(BINS - 1, int(BINS * result.score / found.out_of) if found.out_of else 0)] += 1
    return [
        {
            "x": 10 + 60 * index,
            "tall": round(150 * count / max(counts)),
            "count": count,
            "range": f"{100 * index // BINS}-{100 * (index + 1) // BINS}",
        }
        for index, count in enumerate(counts)
    ]


def _exercises(assignment: Assignment, graded: Sequence[Result]) -> list[tuple]:
    """What the exercises say about the class, as arguments of the template's `table`."""
    if not graded:
        return []
    return [
        (
            "Hardest first",
            (
                "exercise",
                "points earned",
                "not attempted or not found",
                "commonest mistake",
                "background",
            ),
            _hardest(assignment, graded),
        ),
        (
            "Commonest mistakes",
            ("mistake", "where", "students", "what to say"),
            _mistakes(graded),
        ),
    ]


def _students(found: ClassResult) -> list[tuple]:
    """Whom and which files to look at, as arguments of the template's `table`."""
    who = {r.student_id: _who(r) for r in found.results}
    return [
        (
            "Look alike",
            ("students", "what is alike"),
            [(", ".join(who[s] for s in a.students), sentence(a.evidence)) for a in found.alike],
            ALIKE,
        ),
        (
            "To look at",
            ("student", "what"),
            [
                (who[r.student_id], LINE_BREAK.join(map(sentence, r.flags)))
                for r in found.results
                if r.flags
            ],
        ),
        (
            "Changed by hand",
            ("student", "what"),
            [
                (who[r.student_id], LINE_BREAK.join(map(sentence, c)))
                for r in found.results
                if (c := _changed(r))
            ],
            "From the CSV of changes.",
        ),
        (
            "Files that were not graded",
            ("file", "why"),
            [(name, sentence(why)) for name, why in _files(found.ungraded)],
        ),
        (
            "Late",
            ("student", "by"),
            [(who[r.student_id], r.late) for r in found.results if r.late],
            "By the time that the folder or zip has.",
        ),
        (
            "Missing",
            ("student",),
            [(who[r.student_id],) for r in found.results if r.status == "missing"],
        ),
    ]


def _who(result: Result) -> str:
    """A platform's number says nothing to a reader, and a name may be there twice."""
    return f"{result.row['name']} ({result.student_id})"


def _files(ungraded: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    rest = len(ungraded) - MOST_FILES
    return [*ungraded[:MOST_FILES], *([(f"and {rest} more", "")] if rest > 0 else [])]


def _changed(result: Result) -> list[str]:
    """What the instructor changed for one student."""
    points = [f"{m.exercise.function}: {m.changed}" for m in result.marks if m.by_hand is not None]
    return [*points, *([result.comment] if result.comment else [])]


def _hardest(assignment: Assignment, graded: Sequence[Result]) -> list[tuple]:
    rows = []
    for index, exercise in enumerate(assignment.exercises):
        marks = [result.marks[index] for result in graded]
        share = statistics.fmean(mark.earned for mark in marks) / exercise.points
        common = Counter(name for mark in marks for name in mark.mistakes).most_common(1)
        rest = sum(mark.unfinished or bool(mark.problem) for mark in marks)
        cells = (
            Markup("{} {}").format(exercise.title, code(exercise.function, "name")),
            f"{100 * share:.0f} %",
            rest,
            f"{common[0][0]} ({common[0][1]})" if common else "",
            exercise.reread,
        )
        rows.append((share, index, cells))
    return [cells for _, _, cells in sorted(rows)]


def _mistakes(graded: Sequence[Result]) -> list[tuple]:
    counts: Counter = Counter()
    sentences = {}
    for result in graded:
        for mark in result.marks:
            for name in mark.mistakes:
                place = (mark.exercise.function, name)
                counts[place] += 1
                sentences[place] = mark.exercise.mistakes.get(name, "")
    rows = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_MISTAKES]
    return [
        (name, code(function, "name"), count, sentence(sentences[function, name]))
        for (function, name), count in rows
    ]
