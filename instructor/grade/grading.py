"""Grade a class: read what came back, find out whose it is, ask every function, judge.

The notebooks are read and run in children (`sandbox`); only here, in the grader's own process, are
the expected answers, and here nothing of a student's is ever run.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from ..assignment import Assignment, Case, Exercise, numbers
from ..sandbox.box import Sandbox
from ..sandbox.reading import Reading
from . import copies
from .exam import Exam
from .journal import Journal, key_of
from .marking import Mark, mark, show
from .results import ClassResult, Result
from .submissions import Names, Refused, Submission

# What answers depend on besides the submission: the code that reads and runs it.
ENGINE = [
    (Path(__file__).parent.parent / name).read_bytes()
    for name in (
        "grade/exam.py",
        "sandbox/cage.py",
        "sandbox/child.py",
        "sandbox/forkserver.py",
        "sandbox/reading.py",
        "sandbox/source.py",
        "sandbox/syscalls.py",
        "sandbox/talk.py",
    )
]
NOBODYS = "neither its name nor its STUDENT_ID is in the roster"


@dataclass
class Attempt:
    """A submission that is graded for a student: for each exercise its replies, or the problem."""

    submission: Submission
    about: Mapping
    replies: dict[str, list[dict]] = field(default_factory=dict)


class Grader:
    """Grades one class.

    Args:
        assignment: What was handed out.
        rows: The roster.
        secret: The instructor's, which the hidden numbers come from.
        sandbox: In which students' code runs; opened by the caller.
        journal: Of earlier runs and this one.
        due: Files changed later are listed as late.
        progress: Called with what is done and what there is to do.
    """

    def __init__(
        self,
        assignment: Assignment,
        rows: Sequence[Mapping[str, str]],
        secret: str,
        sandbox: Sandbox,
        journal: Journal,
        due: datetime | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.assignment, self.rows, self.secret = assignment, rows, secret
        self.sandbox, self.journal, self.due, self._progress = sandbox, journal, due, progress
        self._functions = [exercise.function for exercise in assignment.exercises]
        self._names = Names(rows, assignment.name)
        self._base = key_of(*ENGINE, list(sys.version_info[:2]), sandbox.level)
        self._done, self._total = 0, 0

    def grade(self, submissions: Sequence[Submission]) -> ClassResult:
        """Everything, in the roster's order."""
        self._total = len(submissions) + len(self.rows)
        abouts = self._read(submissions)
        results = {row["student_id"]: Result(row) for row in self.rows}
        attempts, ungraded = self._match(submissions, abouts, results)
        cases = self._ask(attempts)
        for student, tried in attempts.items():
            self._judge(results[student], tried, cases[student])
        alike = copies.find(
            {s: r.marks for s, r in results.items() if r.marks},
            {s: r.code for s, r in results.items()},
        )
        for group in alike:
            for student in group.students:
                results[student].flags.append(group.flag(student))
        for result in results.values():
            result.flags = list(dict.fromkeys(result.flags))
        return ClassResult(list(results.values()), ungraded, alike, self.sandbox.says)

    def _step(self, count: int = 1) -> None:
        self._done += count
        self._progress(self._done, self._total)

    def _read(self, submissions: Sequence[Submission]) -> list[dict]:
        """What the reader says of each; a refused one is `unreadable`."""
        abouts: list[dict] = [{}] * len(submissions)

        def jobs() -> Iterator[Reading]:
            for index, submission in enumerate(submissions):
                try:
                    if submission.problem:
                        raise Refused(submission.problem)
                    data = submission.read()
                except Refused as error:
                    abouts[index] = {"unreadable": str(error)}
                    self._step()
                    continue
                key = key_of(self._base, data, self._functions)
                if (known := self.journal.get(key)) is not None:
                    abouts[index] = known
                    self._step()
                else:
                    yield Reading(data, self._functions, (index, key))

        for job in self.sandbox.run(jobs()):
            index, key = job.label
            abouts[index] = job.about
            self.journal.put(key, job.about)
            self._step()
        return abouts

    def _match(
        self,
        submissions: Sequence[Submission],
        abouts: Sequence[Mapping],
        results: Mapping[str, Result],
    ) -> tuple[dict[str, list[Attempt]], list]:
        """Whose is what. A file's name, which an LMS makes, goes before what a notebook says."""
        named, claimed = defaultdict(list), defaultdict(list)
        ungraded: list[tuple[str, str]] = []
        for submission, about in zip(submissions, abouts, strict=True):
            says = about.get("student_id")
            known = self._names.by_id(says)
            whose = self._names.of(submission.name)
            owner = whose[0] if whose else known
            if "unreadable" in about:
                ungraded.append((submission.name, about["unreadable"]))
                if owner:
                    self._refuse(results[owner], submission.name, about["unreadable"])
                continue
            if owner is None:
                ungraded.append((submission.name, NOBODYS + (f" ({show(says)})" if says else "")))
                continue
            flags = results[owner].flags
            if says and known != owner:
                flags.append(
                    f"the notebook says STUDENT_ID {show(says)}, the file's name says "
                    f"{owner}; graded as {owner}: {submission.name}"
                )
            if len(whose) > 1:
                flags.append(
                    f"the file's name also names {', '.join(whose[1:])}: {submission.name}"
                )
            (named if whose else claimed)[owner].append(Attempt(submission, about))
        for owner, attempts in claimed.items():
            if owner not in named:
                named[owner] = attempts
                continue
            for attempt in attempts:
                name = attempt.submission.name
                results[owner].flags.append(
                    f"another file says STUDENT_ID {owner}, which was not graded: {name}"
                )
                ungraded.append((name, f"it says STUDENT_ID {owner}, whose file is another one"))
        return {
            row["student_id"]: named[row["student_id"]]
            for row in self.rows
            if row["student_id"] in named
        }, sorted(ungraded)

    @staticmethod
    def _refuse(result: Result, name: str, problem: str) -> None:
        result.status, result.file, result.problem = "refused", name, problem
        result.flags.append(f"refused, {problem}: {name}")

    def _ask(self, attempts: Mapping[str, Sequence[Attempt]]) -> dict[str, dict[str, tuple]]:
        """Ask every function of every attempt; returns the cases by student and function."""
        cases: dict[str, dict[str, tuple[Case, ...]]] = {}
        for torch in (False, True):
            exercises = [e for e in self.assignment.exercises if e.needs_torch == torch]
            if not torch:
                self._run(self.sandbox, attempts, exercises, cases)
            elif exercises:
                with Sandbox(self.sandbox.level, torch=True) as sandbox:
                    self._run(sandbox, attempts, exercises, cases)
        self._step(self._total - self._done)
        return cases

    def _run(
        self,
        sandbox: Sandbox,
        attempts: Mapping[str, Sequence[Attempt]],
        exercises: Sequence[Exercise],
        cases: dict[str, dict[str, tuple]],
    ) -> None:
        keys: dict[int, str] = {}

        def jobs() -> Iterator[Exam]:
            for student, tried in attempts.items():
                own = numbers(self.assignment.name, student, self.secret)
                for exercise in exercises:
                    mine = exercise.cases(own)
                    cases.setdefault(student, {})[exercise.function] = mine
                    for attempt in tried:
                        about = attempt.about["functions"][exercise.function]
                        if "problem" in about:
                            continue
                        key = self._key(student, exercise, mine, about["source"])
                        replies = self.journal.get(key) or []
                        attempt.replies[exercise.function] = replies
                        if not replies:
                            keys[id(replies)] = key
                            yield Exam(exercise, mine, about["source"], replies)
                if not exercises[0].needs_torch:
                    self._step()

        for job in sandbox.run(jobs()) if exercises else ():
            if job.done and (key := keys.pop(id(job.replies), None)):
                self.journal.put(key, job.replies)

    def _key(
        self, student: str, exercise: Exercise, cases: Sequence[Case], source: Sequence
    ) -> str:
        """Of the journal: all that the replies depend on."""
        return key_of(
            self._base,
            self.secret,
            student,
            exercise.function,
            source,
            [[case.arguments, case.oracle, case.most_questions, case.knows] for case in cases],
            exercise.cpu_seconds,
            exercise.memory_bytes,
            exercise.needs_torch,
        )

    def _judge(
        self, result: Result, attempts: Sequence[Attempt], cases: Mapping[str, Sequence[Case]]
    ) -> None:
        """Judge each attempt; the best one counts, so that nobody can spoil another's."""
        judged = []
        for attempt in attempts:
            marks = []
            for exercise in self.assignment.exercises:
                about = attempt.about["functions"][exercise.function]
                if "problem" in about:
                    marks.append(Mark(exercise, problem=about["problem"]))
                else:
                    marks.append(
                        mark(
                            exercise,
                            cases[exercise.function],
                            attempt.replies[exercise.function],
                            about["notes"],
                        )
                    )
            changed = attempt.submission.modified or datetime.min
            score = sum(m.earned for m in marks)
            judged.append(((score, changed, attempt.submission.name), attempt, marks))
        _, best, result.marks = max(judged, key=lambda entry: entry[0])
        if len(judged) > 1:
            others = ", ".join(a.submission.name for _, a, _ in judged if a is not best)
            result.flags.append(
                f"handed in {len(judged)} files, the best one counts; the others: {others}"
            )
        result.status, result.file, result.problem = "graded", best.submission.name, ""
        result.code = best.about["functions"]
        result.late = self._late(best.submission.modified)
        result.flags += [note for m in result.marks for note in m.notes]

    def _late(self, changed: datetime | None) -> str:
        if self.due is None or changed is None or changed <= self.due:
            return ""
        minutes = int((changed - self.due).total_seconds() // 60)
        days, minutes = divmod(minutes, 24 * 60)
        return (f"{days} d " if days else "") + f"{minutes // 60} h {minutes % 60:02d} min"
