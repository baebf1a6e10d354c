"""Grade a class: read what came back, find out whose it is, ask every function, judge.

The notebooks are read and run in children (`sandbox`); only here, in the grader's own process, are
the expected answers, and here nothing of a student's is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from ..assignment import Assignment, Case, Exercise, numbers
from ..sandbox.box import Sandbox
from ..sandbox.reading import Reading, Rehearsal
from . import copies
from .exam import Exam
from .journal import Journal, key_of
from .marking import Mark, mark
from .matching import Attempt, match
from .results import ClassResult, Result
from .submissions import Names, Refused, Submission

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
        self._base = key_of(*ENGINE, sandbox.version, sandbox.level)
        self._done, self._total = 0, 0

    def grade(self, submissions: Sequence[Submission]) -> ClassResult:
        """Everything, in the roster's order."""
        self._total = len(submissions) + len(self.rows)
        abouts = self._read(submissions)
        results = {row["student_id"]: Result(row) for row in self.rows}
        attempts, ungraded = match(submissions, abouts, self._names, results)
        self._rehearse(attempts)
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

    def _rehearse(self, attempts: Mapping[str, Sequence[Attempt]]) -> None:
        """Run each attempt's notebook once, to learn which statements stop it and which fail."""

        def jobs() -> Iterator[Rehearsal]:
            for tried in attempts.values():
                for attempt in tried:
                    statements = attempt.about["statements"]
                    key = key_of(self._base, "rehearsal", statements)
                    if (known := self.journal.get(key)) is not None:
                        attempt.rehearsal = known
                    else:
                        yield Rehearsal(statements, (attempt, key))

        for job in self.sandbox.run(jobs()):
            if job.over:
                attempt, key = job.label
                attempt.rehearsal = json.loads(json.dumps(job.about))  # as the journal has it
                self.journal.put(key, attempt.rehearsal)

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
                        plans = plans_of(attempt, exercise.function)
                        seconds = attempt.rehearsal["seconds"]
                        key = self._key(student, exercise, mine, [plans, seconds])
                        replies = self.journal.get(key) or []
                        attempt.replies[exercise.function] = replies
                        if not replies:
                            keys[id(replies)] = key
                            yield Exam(exercise, mine, plans, replies, seconds)
                if not exercises[0].needs_torch:
                    self._step()

        for job in sandbox.run(jobs()) if exercises else ():
            if job.done and (key := keys.pop(id(job.replies), None)) and job.firm:
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
            marks = [self._mark(attempt, exercise, cases) for exercise in self.assignment.exercises]
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

    def _mark(
        self, attempt: Attempt, exercise: Exercise, cases: Mapping[str, Sequence[Case]]
    ) -> Mark:
        function, age = exercise.function, self._age(attempt.about)
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

    def _age(self, about: Mapping) -> str:
        """That the notebook is from a newer Python than the grader's, if it is."""
        ours, theirs = self.sandbox.version, about["python"]
        if not theirs or _version(theirs) <= _version(ours):
            return ""
        return (
            f"the notebook was saved with Python {theirs}, newer than the grader's {ours}; "
            f"grade it with --python python{theirs}"
        )

    def _late(self, changed: datetime | None) -> str:
        if self.due is None or changed is None or changed <= self.due:
            return ""
        minutes = int((changed - self.due).total_seconds() // 60)
        days, minutes = divmod(minutes, 24 * 60)
        return (f"{days} d " if days else "") + f"{minutes // 60} h {minutes % 60:02d} min"
