"""A student's exercises, asked in children: a question a case, answers kept as they came.

First a `Round`: one child runs the notebook as a kernel does and asks each function where its check
stands, for the public cases; then another one for the hidden ones, so that no child that has seen
a hidden number says anything that a student reads. What it finds right, untouched or a known
mistake stays. All else is asked again in an `Exam`, a child for that exercise alone: so one
exercise never costs another, and a case that kills its child costs only itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..assignment import Case, Exercise
from ..sandbox.talk import End, Job, Questions, line
from .marking import mark

MOST_ASKED = 10_000  # questions, after which a child that asks on is ended
UNTOUCHED = {"unfinished", "no_function"}
LIVES = {"time": 2, "idle": 1}  # children that may end this way; else one for each case
CLOCK_LIVES = 1  # that a clock on the wall may end: who neither works nor sleeps holds up the rest
MOST_ROUNDS = 3  # that an exercise may end before the rest is asked alone


@dataclass(eq=False)
class Paper:
    """One exercise of one student: its cases, one after the other.

    Args:
        exercise: Which.
        cases: The student's.
        plans: What runs before the function is called: `[cell, text]` of each statement; and, if
            the function is not there or unfinished after it, what to run instead.
        replies: What was answered so far, one for each case; it is filled in here.
    """

    exercise: Exercise
    cases: Sequence[Case]
    plans: Sequence[Sequence[Sequence]]
    replies: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.spoilt: dict | None = None
        self._asked = 0

    @property
    def done(self) -> bool:
        """Whether every case has its reply."""
        return len(self.replies) == len(self.cases)

    @property
    def clear(self) -> bool:
        """Whether asking again would change nothing: all right, untouched, or a known mistake."""
        cases = self.cases[: len(self.replies)]
        outcomes = mark(self.exercise, cases, self.replies).outcomes
        return all(o.mistake or o.verdict in ("right", "unfinished") for o in outcomes)

    @property
    def hidden_next(self) -> bool:
        """Whether the next case is a hidden one, or there is none."""
        return self.done or self.cases[len(self.replies)].hidden

    @property
    def shares(self) -> bool:
        """Whether a round may ask it: there is one plan, and hidden cases come last."""
        hidden = [case.hidden for case in self.cases]
        return len(self.plans) == 1 and not hidden[0] and hidden == sorted(hidden)

    def question(self) -> tuple[Sequence, bool]:
        """The next case's arguments, and whether its function may ask an oracle."""
        self._asked, self.spoilt = 0, None
        case = self.cases[len(self.replies)]
        return list(case.arguments), case.oracle is not None

    def answer(self, message: Mapping) -> dict | None:
        """Take in an answer; or what to say to a question of the function's.

        Raises:
            ValueError: It is neither.
        """
        if self.done:
            raise ValueError("no question is open that this answers")
        if "ask" in message:
            return self._oracle(message["ask"])
        self.replies.append(self.spoilt or _tidy(message))
        return None

    def _oracle(self, question: Any) -> dict:
        """Answer a question, here, where the child cannot see what the answer comes from."""
        case = self.cases[len(self.replies)]
        self._asked += 1
        if case.oracle is None or not isinstance(question, list) or self._asked > MOST_ASKED:
            raise ValueError("there is no such question")
        if self._asked > case.most_questions:
            self.spoilt = {"too_many": True}
            return self.spoilt
        try:
            return {"says": self.exercise.oracles[case.oracle](case, *question)}
        except (ValueError, TypeError, ArithmeticError) as error:
            self.spoilt = {"refused": str(error)[:300]}
            return self.spoilt


class Exam(Questions):
    """One exercise in a child of its own, or in one after the other.

    Args:
        paper: The exercise.
        seconds: CPU time that running the statements is known to take.

    Attributes:
        firm: Whether the same replies would come again; not if a clock on the wall ended a child.
    """

    def __init__(self, paper: Paper, seconds: float = 0.0):
        exercise = paper.exercise
        super().__init__(paper.plans[0], exercise.function)
        self.paper, self.seconds, self.firm = paper, seconds, True
        self.cpu_seconds, self.memory_bytes = exercise.cpu_seconds + seconds, exercise.memory_bytes

    @property
    def finished(self) -> list[Paper]:
        """The papers that are done with."""
        return [self.paper] if self.paper.done else []

    def next(self) -> tuple[Sequence, bool]:
        return self.paper.question()

    def receive(self, message: dict) -> bytes | None:
        if not self.asked_now(message):
            raise ValueError("no question is open that this answers")
        if says := self.paper.answer(message):
            return line(says)
        return None if self.paper.done else self.put()

    def ended(self, end: End) -> Iterable[Job]:
        paper, replies = self.paper, self.paper.replies
        if not paper.done:
            self.firm &= not end.by_clock
            replies.append(paper.spoilt or {"ended": end.how, "detail": end.detail})
            spent = sum(reply.get("ended") == end.how for reply in replies)
            lives = CLOCK_LIVES if end.by_clock else LIVES.get(end.how, len(paper.cases))
            if spent >= lives:
                replies += [{"not_run": True}] * (len(paper.cases) - len(replies))
        if not paper.done:
            return [self._again()]
        if len(paper.plans) > 1 and all(UNTOUCHED & reply.keys() for reply in replies):
            replies.clear()
            paper.plans = paper.plans[1:]
            return [self._again()]
        return ()

    def _again(self) -> Exam:
        other = type(self)(self.paper, self.seconds)
        other.firm = self.firm
        return other


class Round(Questions):
    """Several exercises of one notebook, in one child that runs it once.

    It has the time and the memory of one exercise alone, so none gets more than it would there.

    Args:
        papers: The exercises. What runs before one begins with what runs before the one ahead of
            it, see `asked`.
        seconds: CPU time that running the statements is known to take.
        hidden: Whether hidden cases are asked; else the public ones, up to the first hidden one.
        ended_early: How many rounds of this notebook an exercise has ended.

    Attributes:
        finished: When it has ended: the papers that are done with.
    """

    firm = True

    def __init__(
        self,
        papers: Sequence[Paper],
        seconds: float = 0.0,
        hidden: bool = False,
        ended_early: int = 0,
    ):
        super().__init__((), "")
        self.papers, self.seconds, self.hidden = papers, seconds, hidden
        self.cpu_seconds = min(paper.exercise.cpu_seconds for paper in papers) + seconds
        self.memory_bytes = min(paper.exercise.memory_bytes for paper in papers)
        self.finished: list[Paper] = []
        self._at, self._ended_early = 0, ended_early

    def begin(self) -> bytes:
        paper = self.papers[self._at]
        return self.turn_to(paper.plans[0], paper.exercise.function)

    def next(self) -> tuple[Sequence, bool]:
        return self.papers[self._at].question()

    def receive(self, message: dict) -> bytes | None:
        if self._at == len(self.papers) or not self.asked_now(message):
            raise ValueError("no question is open that this answers")
        paper = self.papers[self._at]
        if says := paper.answer(message):
            return line(says)
        if not (paper.done if self.hidden else paper.hidden_next):
            return self.put()
        self._at += 1
        if self._at == len(self.papers):
            return None
        other = self.papers[self._at]
        return self.turn_to(other.plans[0][len(paper.plans[0]) :], other.exercise.function)

    def ended(self, end: End) -> Iterator[Job]:
        asked, rest = self.papers[: self._at], self.papers[self._at + 1 :]
        clear = [paper for paper in asked if paper.clear]
        alone = [paper for paper in self.papers if paper not in clear and paper not in rest]
        ended_early = self._ended_early + (self._at < len(self.papers))
        if ended_early == MOST_ROUNDS:
            alone, rest = [*alone, *rest], []
        if self.hidden:
            self.finished, clear = clear, []
        for papers, hidden in ((clear, True), (rest, self.hidden)):
            if papers:
                yield Round(papers, self.seconds, hidden, ended_early)
        for paper in alone:
            paper.replies.clear()
            yield Exam(paper, self.seconds)


def asked(papers: Sequence[Paper], seconds: float) -> list[Job]:
    """The jobs that ask a notebook's exercises: one round for those that it can ask, from the
    notebook's top to its bottom, and each of the others alone."""
    together: list[Paper] = []
    run: Sequence[Sequence] = []
    for paper in sorted(papers, key=lambda paper: len(paper.plans[0])):
        plan = paper.plans[0]
        if paper.shares and plan[: len(run)] == run:
            together.append(paper)
            run = plan
    if len(together) < 2:
        together = []
    alone = [Exam(paper, seconds) for paper in papers if paper not in together]
    return [*([Round(together, seconds)] if together else []), *alone]


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
