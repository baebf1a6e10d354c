"""Grade a class: read what came back, find out whose it is, ask every function, judge.

The notebooks are read and run in children (`sandbox`); only here, in the grader's own process, are
the expected answers, and here nothing of a student's is ever run.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from ..assignment import Assignment, Case, Exercise, numbers
from ..lms.base import PLAIN, Platform
from ..sandbox.box import Sandbox
from ..sandbox.reading import Reading, Rehearsal
from ..sandbox.talk import Job
from . import copies
from .changes import Changes
from .exam import Paper, asked
from .journal import Journal, key_of
from .late import MARKED, Policy, show_late
from .marking import Mark, mark, some_of
from .matching import Attempt, match, with_group
from .odd import odd
from .results import ClassResult, Result
from .submissions import Names, Refused, Submission
from .warnings import warnings

# What answers depend on besides the submission: the code that reads and runs it.
ENGINE = [
    (Path(__file__).parent.parent / name).read_bytes()
    for name in (
        "grade/exam.py",
        "build/selfcheck.py",
        "sandbox/cage.py",
        "sandbox/child.py",
        "sandbox/forkserver.py",
        "sandbox/plan.py",
        "sandbox/reading.py",
        "sandbox/shape.py",
        "sandbox/source.py",
        "sandbox/syscalls.py",
        "sandbox/talk.py",
    )
]


def plans_of(attempt: Attempt, function: str) -> list[list]:
    """What runs before a function is called: `[cell, text]` of each statement, for each plan.

    All that a kernel would run above the function's check, but for what stopped the rehearsal; that
    runs only if the function cannot do without it.
    """
    rehearsal, statements = attempt.rehearsal, attempt.about["statements"]
    plans = []
    for cut, must in attempt.about["functions"][function]["plans"]:
        above = set(range(cut)) - set(rehearsal["left_out"]) if rehearsal["complete"] else set()
        run = sorted(above | set(must))
        plans.append([statements[number] for number in run])
    return plans


def failed(attempt: Attempt, function: str) -> list[str]:
    """How the statements failed that a function needs, in the notebook's order."""
    notes = attempt.rehearsal["notes"]
    (_, must), *_ = attempt.about["functions"][function]["plans"]
    return [notes[str(number)] for number in must if str(number) in notes]


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


class Grader:
    """Grades one class.

    Args:
        assignment: What was handed out.
        rows: The roster.
        secret: The instructor's, which the hidden numbers come from.
        sandbox: In which students' code runs; opened by the caller.
        journal: Of earlier runs and this one.
        platform: Whose names the files have.
        policy: Who is late, and what that costs.
        changes: By hand.
        again: Students whose functions are asked again, whatever the journal knows.
        progress: Called with the stage, what is done and what there is to do.
    """

    def __init__(
        self,
        assignment: Assignment,
        rows: Sequence[Mapping[str, str]],
        secret: str,
        sandbox: Sandbox,
        journal: Journal,
        platform: Platform = PLAIN,
        policy: Policy | None = None,
        changes: Changes | None = None,
        again: Collection[str] = (),
        progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    ):
        self.assignment, self.rows, self.secret = assignment, rows, secret
        self.sandbox, self.journal, self.progress = sandbox, journal, progress
        self.policy, self.changes = policy or Policy(), changes or Changes()
        self._again = set(again)
        self._functions = [exercise.function for exercise in assignment.exercises]
        self._names = Names(rows, assignment.name, platform)
        self._base = key_of(*ENGINE, sandbox.version, sandbox.level)

    def grade(self, submissions: Sequence[Submission]) -> ClassResult:
        """Everything, in the roster's order."""
        ignores = self._names.platform.ignores
        submissions = [one for one in submissions if not ignores(one.name)]
        abouts = self._read(submissions)
        results = {row["student_id"]: Result(row) for row in self.rows}
        attempts, ungraded = match(submissions, abouts, self._names, results)
        attempts = with_group(attempts, self.changes.groups, results)
        for attempt in itertools.chain.from_iterable(attempts.values()):
            python = attempt.about["python"]
            if python and _version(python) > _version(self.sandbox.version):
                attempt.newer = python
        self._rehearse(attempts)
        cases = self._ask(attempts)
        for student, tried in attempts.items():
            self._judge(results[student], tried, cases[student])
        alike = copies.find(
            {s: r.marks for s, r in results.items() if r.marks},
            {s: r.code for s, r in results.items()},
        )
        for result in results.values():
            result.flags += copies.flags(alike, result.student_id)
            self.changes.apply(result, self.assignment.exercises)
            result.flags = some_of([*dict.fromkeys(result.flags)])
        found = [*results.values()]
        return ClassResult(
            found,
            self.changes.out_of(self.assignment),
            ungraded,
            alike,
            self.sandbox.says,
            warnings(self.assignment, self._names, found, attempts, cases, ungraded),
        )

    def _read(self, submissions: Sequence[Submission]) -> list[dict]:
        """What the reader says of each; a refused one is `unreadable`."""
        abouts: list[dict] = [{}] * len(submissions)
        step = self._steps("notebooks read", len(submissions))

        def jobs() -> Iterator[Reading]:
            for index, submission in enumerate(submissions):
                try:
                    if submission.problem:
                        raise Refused(submission.problem)
                    data = submission.read()
                except Refused as error:
                    abouts[index] = {"unreadable": str(error)}
                    step()
                    continue
                key = key_of(self._base, data, self._functions)
                if (known := self.journal.get(key)) is not None:
                    abouts[index] = known
                    step()
                else:
                    yield Reading(data, self._functions, (index, key))

        for job in self.sandbox.run(jobs()):
            index, key = job.label
            abouts[index] = job.about
            self.journal.put(key, job.about)
            step()
        return abouts

    def _steps(self, stage: str, total: int) -> Callable[[], None]:
        """Called at each step of a stage."""
        done = itertools.count(1)
        return lambda: self.progress(stage, next(done), total)

    def _known(self, student: str, key: str) -> Any:
        """What the journal knows, unless the student is to be graded again."""
        return None if student in self._again else self.journal.get(key)

    def _rehearse(self, attempts: Mapping[str, Sequence[Attempt]]) -> None:
        """Run each attempt's notebook once, to learn which statements stop it and which fail."""
        step = self._steps("notebooks run", sum(map(len, attempts.values())))

        def jobs() -> Iterator[Rehearsal]:
            for student, tried in attempts.items():
                for attempt in tried:
                    statements = attempt.about["statements"]
                    key = key_of(self._base, "rehearsal", statements)
                    if (known := self._known(student, key)) is not None:
                        attempt.rehearsal = known
                        step()
                    else:
                        yield Rehearsal(statements, (attempt, key))

        for job in self.sandbox.run(jobs()):
            if job.over:
                attempt, key = job.label
                attempt.rehearsal = json.loads(json.dumps(job.about))  # as the journal has it
                self.journal.put(key, attempt.rehearsal)
                step()

    def _ask(self, attempts: Mapping[str, Sequence[Attempt]]) -> dict[str, dict[str, tuple]]:
        """Ask every function of every attempt; returns the cases by student and function."""
        cases: dict[str, dict[str, tuple[Case, ...]]] = {}
        for torch in (False, True):
            exercises = [e for e in self.assignment.exercises if e.needs_torch == torch]
            if not torch:
                self._run(self.sandbox, attempts, exercises, cases)
            elif exercises:
                with Sandbox(self.sandbox.level, True, self.sandbox.python) as sandbox:
                    self._run(sandbox, attempts, exercises, cases)
        return cases

    def _run(
        self,
        sandbox: Sandbox,
        attempts: Mapping[str, Sequence[Attempt]],
        exercises: Sequence[Exercise],
        cases: dict[str, dict[str, tuple]],
    ) -> None:
        keys: dict[Paper, str] = {}
        tries = sum(map(len, attempts.values()))
        step = self._steps("exercises asked", tries * len(exercises))

        def jobs() -> Iterator[Job]:
            for student, tried in attempts.items():
                own = numbers(self.assignment.name, student, self.secret)
                mine = {exercise.function: exercise.cases(own) for exercise in exercises}
                cases.setdefault(student, {}).update(mine)
                for attempt in tried:
                    papers = self._papers(student, attempt, exercises, mine)
                    for _ in range(len(exercises) - len(papers)):
                        step()
                    keys.update(papers)
                    yield from asked(list(papers), attempt.rehearsal["seconds"])

        for job in sandbox.run(jobs()) if exercises else ():
            for paper in job.finished:
                step()
                if job.firm:
                    self.journal.put(keys.pop(paper), paper.replies)

    def _papers(
        self,
        student: str,
        attempt: Attempt,
        exercises: Sequence[Exercise],
        cases: Mapping[str, Sequence[Case]],
    ) -> dict[Paper, str]:
        """What is to be asked of an attempt, with the journal's key; what is known is filled in."""
        papers = {}
        for exercise in exercises:
            function = exercise.function
            if "problem" in attempt.about["functions"][function]:
                continue
            plans = plans_of(attempt, function)
            source = [plans, attempt.rehearsal["seconds"]]
            key = self._key(student, exercise, cases[function], source)
            attempt.replies[function] = self._known(student, key) or []
            if not attempt.replies[function]:
                paper = Paper(exercise, cases[function], plans, attempt.replies[function])
                papers[paper] = key
        return papers

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
            marks = [self._mark(attempt, exercise, cases) for exercise in self.assignment.exercises]
            late = self._late(result.student_id, attempt.submission)
            score = sum(m.earned for m in marks) * (1 - self.policy.costs(late))
            changed = attempt.submission.modified or datetime.min
            judged.append(((score, changed, attempt.submission.name), attempt, marks, late))
        _, best, result.marks, late = max(judged, key=lambda entry: entry[0])
        if len(judged) > 1:
            others = [a.submission.name for _, a, _, _ in judged if a is not best]
            result.flags.append(
                f"handed in {len(judged)} files, the best one counts; the others: "
                + ", ".join(some_of(others))
            )
        result.status, result.file, result.problem = "graded", best.submission.name, ""
        result.code = best.about["functions"]
        result.late, result.penalty = show_late(late), self.policy.costs(late)
        result.flags += [*odd(self.assignment, best), *self._unsure(result.student_id, best)]
        result.flags += [note for m in result.marks for note in m.notes]

    def _late(self, student: str, submission: Submission) -> timedelta:
        """How late a file is, as far as the platform lets the grader know."""
        platform, given = self._names.platform, self.changes.handed_in.get(student)
        if given or platform.times == "files":
            return self.policy.by(student, given or submission.modified)
        if student in self.policy.extensions:  # which the platform's mark knows nothing of
            return timedelta()
        # By how much is not in the archive: at least a part of a day.
        return MARKED if platform.late(submission.name) and self.policy.due else timedelta()

    def _unsure(self, student: str, attempt: Attempt) -> list[str]:
        """That nobody knows whether a file that a platform marks as late is within an extension."""
        due, name = self.policy.extensions.get(student), attempt.submission.name
        if due is None or student in self.changes.handed_in or not self._names.platform.late(name):
            return []
        return [
            f"{self._names.platform.name} marks it late, and does not say whether it came by "
            f"{due:%Y-%m-%d %H:%M}; taken as in time unless the CSV of changes has its handed_in"
        ]

    def _mark(
        self, attempt: Attempt, exercise: Exercise, cases: Mapping[str, Sequence[Case]]
    ) -> Mark:
        function, age = exercise.function, self._age(attempt)
        about = attempt.about["functions"][function]
        if "problem" in about:
            said = [about["problem"], *([age] if about["broken"] else [])]
            return Mark(exercise, problem="; ".join(filter(None, said)))
        found = mark(
            exercise,
            cases[function],
            attempt.replies[function],
            about["notes"],
            failed(attempt, function),
        )
        if age and not found.right and not found.unfinished:
            return replace(found, notes=(*found.notes, age))
        return found

    def _age(self, attempt: Attempt) -> str:
        """That the notebook is from a newer Python than the grader's, if it is."""
        if not attempt.newer:
            return ""
        return (
            f"the notebook was saved with Python {attempt.newer}, newer than the grader's "
            f"{self.sandbox.version}; grade it with --python python{attempt.newer}"
        )
