"""One exercise of one student, asked in a child: a question a case, answers kept as they came.

A case that kills its child costs only itself: the cases after it get a new one. Where the check of
the notebook sees a function that nobody has touched and another one follows, that one is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..assignment import Case, Exercise
from ..sandbox.talk import End, Job, Questions, line

MOST_ASKED = 10_000  # questions, after which a child that asks on is ended
UNTOUCHED = {"unfinished", "no_function"}
LIVES = {"time": 2, "idle": 1}  # children that may end this way; else one for each case
CLOCK_LIVES = 1  # that a clock on the wall may end: who neither works nor sleeps holds up the rest


class Exam(Questions):
    """One exercise of one student: its cases, one after the other.

    Args:
        exercise: Which.
        cases: The student's.
        plans: What runs before the function is called: `[cell, text]` of each statement; and, if
            the function is not there or unfinished after it, what to run instead.
        replies: What was answered so far, one for each case; it is filled in here.
        seconds: CPU time that running the statements is known to take.

    Attributes:
        firm: Whether the same replies would come again; not if a clock on the wall ended a child.
    """

    def __init__(
        self,
        exercise: Exercise,
        cases: Sequence[Case],
        plans: Sequence[Sequence[Sequence]],
        replies: list[dict],
        seconds: float = 0.0,
    ):
        super().__init__(plans[0], exercise.function)
        self.exercise, self.cases, self.plans, self.replies = exercise, cases, plans, replies
        self.cpu_seconds, self.memory_bytes = exercise.cpu_seconds + seconds, exercise.memory_bytes
        self.seconds = seconds
        self.firm = True
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
        if not self.done:
            self.firm &= not end.by_clock
            self.replies.append(self._spoilt or {"ended": end.how, "detail": end.detail})
            spent = sum(reply.get("ended") == end.how for reply in self.replies)
            lives = CLOCK_LIVES if end.by_clock else LIVES.get(end.how, len(self.cases))
            if spent >= lives:
                self.replies += [{"not_run": True}] * (len(self.cases) - len(self.replies))
        if not self.done:
            return [self._again(self.plans)]
        if len(self.plans) > 1 and all(UNTOUCHED & reply.keys() for reply in self.replies):
            self.replies.clear()
            return [self._again(self.plans[1:])]
        return ()

    def _again(self, plans: Sequence[Sequence[Sequence]]) -> Exam:
        other = Exam(self.exercise, self.cases, plans, self.replies, self.seconds)
        other.firm = self.firm
        return other


def _tidy(message: Mapping) -> dict:
    """A child's answer with the fields that one has, of the types they have."""
    if "value" in message:
        return {"value": message["value"]}
    if message.get("unfinished"):
        return {"unfinished": True}
    if "no_function" in message:
        return {"no_function": message["no_function"] == "missing"}
    if "error" not in message:
        raise ValueError("an answer has a value or an error")
    return {"error": str(message["error"])[:300], "type": str(message.get("type"))[:40]}
