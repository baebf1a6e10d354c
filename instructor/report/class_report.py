"""The class at a glance, for the instructor: scores, hardest exercises, mistakes, flags."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from ..assignment import Assignment
from ..grade.results import ClassResult, Result
from ..grade.rubric import show_points
from .page import code, escape, page, sentence

BINS = 10
MOST_MISTAKES = 15
ALIKE = """Evidence for a conversation, no verdict: working together or a common source explain some
of it. The published solution stands in the course's public repository: who has it has read it
there, or has it from somebody who did, or, rarely, has come upon the same lines alone. Ask how the
function works."""


def class_report(assignment: Assignment, found: ClassResult) -> str:
    """The page. It names students: for the instructor alone."""
    graded = [result for result in found.results if result.status == "graded"]
    parts = [
        f"<h1>{escape(assignment.title)}</h1>\n<p>The class, for the instructor.</p>",
        _summary(assignment, found, graded),
    ]
    if graded:
        parts += [_histogram(assignment, graded), _hardest(assignment, graded), _mistakes(graded)]
    parts += [
        _table(
            "Look alike",
            ALIKE,
            ("students", "what is alike"),
            [(", ".join(a.students), sentence(a.evidence)) for a in found.alike],
        ),
        _table(
            "To look at",
            "",
            ("student", "what"),
            [(r.student_id, "<br>".join(map(sentence, r.flags))) for r in found.results if r.flags],
        ),
        _table(
            "Files that were not graded",
            "",
            ("file", "why"),
            [(name, sentence(why)) for name, why in found.ungraded],
        ),
        _table(
            "Late",
            "By the time that the folder or zip has.",
            ("student", "by"),
            [(r.student_id, escape(r.late)) for r in found.results if r.late],
        ),
        _table(
            "Missing",
            "",
            ("student", "name"),
            [(r.student_id, escape(r.row["name"])) for r in found.results if r.status == "missing"],
        ),
    ]
    return page(f"The class: {assignment.title}", "\n".join(filter(None, parts)))


def _summary(assignment: Assignment, found: ClassResult, graded: Sequence[Result]) -> str:
    counts = Counter(result.status for result in found.results)
    late = sum(bool(result.late) for result in found.results)
    lines = [
        f"{len(found.results)} students: {counts['graded']} graded, {counts['refused']} "
        f"refused, {counts['missing']} missing, {late} late."
    ]
    if graded:
        scores = [result.score for result in graded]
        lines.append(
            f"Of {show_points(assignment.points)} points: median "
            f"{statistics.median(scores):.1f}, mean {statistics.fmean(scores):.1f}, from "
            f"{show_points(min(scores))} to {show_points(max(scores))}."
        )
    weak = "note" if found.sandbox.startswith("WEAK") else "soft"
    return (
        f"<p>{'<br>'.join(lines)}</p>\n<p class='{weak}'>Sandbox in force: "
        f"{escape(found.sandbox)}.</p>"
    )


def _histogram(assignment: Assignment, graded: Sequence[Result]) -> str:
    counts = [0] * BINS
    for result in graded:
        counts[min(BINS - 1, int(BINS * result.score / assignment.points))] += 1
    width, height, floor = 620, 220, 180
    highest = max(counts)
    bars = []
    for index, count in enumerate(counts):
        tall = round(150 * count / highest)
        x = 10 + index * 60
        low, high = 100 * index // BINS, 100 * (index + 1) // BINS
        bars.append(
            f"<rect x='{x}' y='{floor - tall}' width='52' height='{tall}'/>"
            f"<text x='{x + 26}' y='{floor - tall - 6}' text-anchor='middle'>{count}</text>"
            f"<text x='{x + 26}' y='{floor + 18}' text-anchor='middle'>{low}-{high}</text>"
        )
    words = ", ".join(
        f"{100 * i // BINS} to {100 * (i + 1) // BINS} %: {count}" for i, count in enumerate(counts)
    )
    return (
        "<h2>Scores</h2>\n<figure>\n"
        f"<svg viewBox='0 0 {width} {height}' width='{width}' height='{height}' role='img' "
        f"aria-label='Students by score. {words}'>\n{''.join(bars)}"
        f"<line x1='4' y1='{floor}' x2='{width - 4}' y2='{floor}'/>"
        f"<text x='{width // 2}' y='{height - 6}' text-anchor='middle'>percent of the points"
        "</text>\n</svg>\n<figcaption class='soft'>Students by percent of the points."
        "</figcaption>\n</figure>"
    )


def _hardest(assignment: Assignment, graded: Sequence[Result]) -> str:
    rows = []
    for index, exercise in enumerate(assignment.exercises):
        marks = [result.marks[index] for result in graded]
        share = statistics.fmean(mark.earned for mark in marks) / exercise.points
        common = Counter(name for mark in marks for name in mark.mistakes).most_common(1)
        rest = sum(mark.unfinished or bool(mark.problem) for mark in marks)
        rows.append(
            (
                share,
                index,
                (
                    f"{escape(exercise.title)} {code(exercise.function, 'name')}",
                    f"{100 * share:.0f} %",
                    str(rest),
                    escape(f"{common[0][0]} ({common[0][1]})") if common else "",
                    escape(exercise.reread),
                ),
            )
        )
    return _table(
        "Hardest first",
        "",
        (
            "exercise",
            "points earned",
            "not attempted or not found",
            "commonest mistake",
            "background",
        ),
        [row for _, _, row in sorted(rows)],
        raw=True,
    )


def _mistakes(graded: Sequence[Result]) -> str:
    counts: Counter = Counter()
    sentences = {}
    for result in graded:
        for mark in result.marks:
            for name in mark.mistakes:
                place = (mark.exercise.function, name)
                counts[place] += 1
                sentences[place] = mark.exercise.mistakes.get(name, "")
    rows = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_MISTAKES]
    return _table(
        "Commonest mistakes",
        "",
        ("mistake", "where", "students", "what to say"),
        [
            (escape(name), code(function, "name"), str(count), sentence(sentences[function, name]))
            for (function, name), count in rows
        ],
        raw=True,
    )


def _table(
    title: str, note: str, heads: Sequence[str], rows: Iterable[Sequence[str]], raw: bool = False
) -> str:
    """A section with a table, or nothing for no rows. Its cells are HTML, the first one text."""
    lines = [
        "<tr><th scope='row'>"
        + (first if raw else escape(first))
        + "</th>"
        + "".join(f"<td>{cell}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    ]
    if not lines:
        return ""
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in heads)
    about = f"<p class='soft'>{escape(note)}</p>\n" if note else ""
    return (
        f"<h2>{escape(title)}</h2>\n{about}<div class='wide'><table><thead><tr>{head}</tr>"
        "</thead>\n<tbody>" + "\n".join(lines) + "</tbody></table></div>"
    )
