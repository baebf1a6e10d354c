"""One exercise of one student, asked in a child: a question a case, answers kept as they came.

A case that kills its child costs only itself: the cases after it get a new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..assignment import Case, Exercise
from ..sandbox.talk import End, Job, Questions, line

MOST_ASKED = 10_000  # questions, after which a child that asks on is ended
LIVES = {"time": 2, "idle": 1}  # children that may end this way; else one for each case


class Exam(Questions):
    """One exercise of one student: its cases, one after the other.

    Args:
        exercise: Which.
        cases: The student's.
        source: The student's code, from `source.read`.
        replies: What was answered so far, one for each case; it is filled in here.
    """

    def __init__(
        self,
        exercise: Exercise,
        cases: Sequence[Case],
        source: Sequence[Sequence],
        replies: list[dict],
    ):
        super().__init__(source, exercise.function)
        self.exercise, self.cases, self.source, self.replies = exercise, cases, source, replies
        self.cpu_seconds, self.memory_bytes = exercise.cpu_seconds, exercise.memory_bytes
        self._asked, self._spoilt = 0, None

    @property
    def done(self) -> bool:
        """Whether every case has its reply."""
        return len(self.replies) == len(self.cases)

    def next(self) -> tuple[Sequence, bool]:
        self._asked, self._spoilt = 0, None
        case = self.cases[len(self.replies)]
        return list(case.arguments), case.oracle is not None

    def receive(self, message: dict) -> bytes | None:
        if self.done or not self.asked_now(message):
            raise ValueError("no question is open that this answers")
        if "ask" in message:
            return line(self._oracle(message["ask"]))
        self.replies.append(self._spoilt or _tidy(message))
        return None if self.done else self.put()

    def _oracle(self, question: Any) -> dict:
        """Answer a question, here, where the child cannot see what the answer comes from."""
        case = self.cases[len(self.replies)]
        self._asked += 1
        if case.oracle is None or not isinstance(question, list) or self._asked > MOST_ASKED:
            raise ValueError("there is no such question")
        if self._asked > case.most_questions:
            self._spoilt = {"too_many": True}
            return self._spoilt
        try:
            return {"says": self.exercise.oracles[case.oracle](case, *question)}
        except (ValueError, TypeError, ArithmeticError) as error:
            self._spoilt = {"refused": str(error)[:300]}
            return self._spoilt

    def ended(self, end: End) -> Iterable[Job]:
        if self.done:
            return ()
        self.replies.append(self._spoilt or {"ended": end.how, "detail": end.detail})
        spent = sum(reply.get("ended") == end.how for reply in self.replies)
        if spent >= LIVES.get(end.how, len(self.cases)):
            self.replies += [{"not_run": True}] * (len(self.cases) - len(self.replies))
        if self.done:
            return ()
        return [Exam(self.exercise, self.cases, self.source, self.replies)]


def _tidy(message: Mapping) -> dict:
    """A child's answer with the fields that one has, of the types they have."""
    if "value" in message:
        return {"value": message["value"]}
    if message.get("unfinished"):
        return {"unfinished": True}
    if "error" not in message:
        raise ValueError("an answer has a value or an error")
    notes = message.get("notes")
    notes = [str(note)[:300] for note in notes[:3]] if isinstance(notes, list) else []
    return {
        "error": str(message["error"])[:300],
        "type": str(message.get("type"))[:40],
        "notes": notes,
    }
