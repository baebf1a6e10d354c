"""Whose is what: files to students. A file's name, which an LMS makes, goes before its content."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from .marking import show
from .results import Result
from .submissions import Names, Submission

STRANGER = "{}'s {} is not in the roster; has the student left the class?"
MOST_FILES = 10  # of a student: the best one counts, so many would be guesses
TOO_MANY_FILES = f"the student has {MOST_FILES} later files, which are graded"
NOBODYS = "neither its name nor its STUDENT_ID is in the roster"


@dataclass
class Attempt:
    """A submission that is graded for a student.

    Args:
        submission: The file.
        about: What the reader says of it.
        newer: The Python that it was saved with, if that is newer than the grader's.
        rehearsal: What its rehearsal found.
        replies: For each exercise what its function answered, one a case.
    """

    submission: Submission
    about: Mapping
    newer: str = ""
    rehearsal: Mapping = field(default_factory=dict)
    replies: dict[str, list[dict]] = field(default_factory=dict)


def match(
    submissions: Sequence[Submission],
    abouts: Sequence[Mapping],
    names: Names,
    results: Mapping[str, Result],
) -> tuple[dict[str, list[Attempt]], list[tuple[str, str]]]:
    """Each student's attempts, in the order of the results, and the files that are not graded.

    Args:
        submissions: The files.
        abouts: What the reader says of each.
        names: Whom a path or an id names.
        results: By student, flagged here; a refused file's owner is told so.
    """
    named, claimed = defaultdict(list), defaultdict(list)
    ungraded: list[tuple[str, str]] = []
    for submission, about in zip(submissions, abouts, strict=True):
        if key := names.stranger(submission.name):
            ungraded.append((submission.name, STRANGER.format(names.platform.name, key)))
            continue
        whose = names.of(submission.name)
        owner = whose[0] if whose else names.by_id(about.get("student_id"))
        if "unreadable" in about:
            ungraded.append((submission.name, about["unreadable"]))
            if owner:
                _refuse(results[owner], submission.name, about["unreadable"])
        elif owner is None:
            says = about.get("student_id")
            ungraded.append((submission.name, NOBODYS + (f" ({show(says)})" if says else "")))
        else:
            results[owner].flags += _odd(submission.name, about, whose, owner, names)
            (named if whose else claimed)[owner].append(Attempt(submission, about))
    for owner, attempts in claimed.items():
        if owner in named:
            ungraded += _only_claimed(results[owner], attempts)
        else:
            named[owner] = attempts
    for owner, attempts in named.items():
        attempts.sort(key=_age)
        named[owner], others = attempts[-MOST_FILES:], attempts[:-MOST_FILES]
        ungraded += [(one.submission.name, TOO_MANY_FILES) for one in others]
        if others:
            results[owner].flags.append(
                f"handed in {len(attempts)} files, of which the {MOST_FILES} latest were graded"
            )
    return {own: named[own] for own in results if own in named}, sorted(ungraded)


def with_group(
    attempts: Mapping[str, Sequence[Attempt]],
    groups: Mapping[str, str],
    results: Mapping[str, Result],
) -> dict[str, list[Attempt]]:
    """The attempts, and what one student of a group has handed in as the others' too.

    Args:
        attempts: By student.
        groups: By student, who has handed in for them.
        results: By student, in the roster's order; whose file was another's is flagged.
    """
    found = {own: [*several] for own, several in attempts.items()}
    for own, other in groups.items():
        if shared := attempts.get(other):
            found.setdefault(own, []).extend(Attempt(one.submission, one.about) for one in shared)
            results[own].flags.append(f"handed in by {other}, says the CSV of changes")
    return {own: found[own] for own in results if own in found}


def _age(attempt: Attempt) -> tuple[datetime, str]:
    return attempt.submission.modified or datetime.min, attempt.submission.name


def _refuse(result: Result, name: str, problem: str) -> None:
    result.status, result.file, result.problem = "refused", name, problem
    result.flags.append(f"refused, {problem}: {name}")


def _odd(name: str, about: Mapping, whose: Sequence[str], owner: str, names: Names) -> list[str]:
    """What an instructor should know of whose a file is."""
    says, flags = about.get("student_id"), []
    if says and names.by_id(says) != owner:
        flags.append(
            f"the notebook says STUDENT_ID {show(says)}, the file's name says "
            f"{owner}; graded as {owner}: {name}"
        )
    if len(whose) > 1:
        flags.append(f"the file's name also names {', '.join(whose[1:])}: {name}")
    return flags


def _only_claimed(result: Result, attempts: Sequence[Attempt]) -> list[tuple[str, str]]:
    """Files that say to be of somebody whose name another file bears; they are not graded."""
    own, found = result.student_id, []
    for attempt in attempts:
        name = attempt.submission.name
        result.flags.append(f"another file says STUDENT_ID {own}, which was not graded: {name}")
        found.append((name, f"it says STUDENT_ID {own}, whose file is another one"))
    return found
