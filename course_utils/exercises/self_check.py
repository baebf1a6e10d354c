"""Five questions before a lesson and the same five after it, scored by the learner's own machine.

Answers are typed as five letters into a cell; the right ones stay folded until then. Nothing is
stored and nothing leaves the notebook. Not offered: questions in another order, free text.
"""

from __future__ import annotations

import html
from dataclasses import dataclass

from course_utils.exercises.predictions import Folded

LETTERS = "abcd"
UNKNOWN = "x"  # an honest "I do not know"


@dataclass(frozen=True)
class Question:
    """A question with its choices, the letter of the right one, and why it is right."""

    asks: str
    choices: tuple[str, ...]
    right: str
    why: str


class SelfCheck:
    """The questions of a lesson: shown in the notebook, and compared with answers.

    Args:
        questions: In the order in which they are asked.
    """

    def __init__(self, *questions: Question) -> None:
        self.questions = questions

    @property
    def key(self) -> str:
        """The letters of the right answers."""
        return "".join(question.right for question in self.questions)

    def _repr_html_(self) -> str:
        items = [
            f"<li>{html.escape(one.asks)}<br>"
            + "<br>".join(f"({letter}) {html.escape(said)}" for letter, said in _lettered(one))
            + "</li>"
            for one in self.questions
        ]
        return "<ol>\n" + "\n".join(items) + "\n</ol>"

    def __repr__(self) -> str:
        lines = []
        for number, one in enumerate(self.questions, start=1):
            lines.append(f"{number}. {one.asks}")
            lines += [f"   ({letter}) {said}" for letter, said in _lettered(one)]
        return "\n".join(lines)

    def score(self, before: object = ..., after: object = ...) -> Score:
        """How many are right, before and after.

        Args:
            before: Five letters, `x` where the answer was not known; `...` when not answered.
            after: The same at the end of the lesson.
        """
        return Score(self, before, after)

    def read(self, answer: object) -> str | None:
        """An answer as letters, blanks and case aside; `None` when it is not one."""
        letters = "".join(answer.lower().split()) if isinstance(answer, str) else ""
        valid = set(letters) <= {*LETTERS, UNKNOWN} and len(letters) == len(self.questions)
        return letters if valid else None


class Score(Folded):
    """The line about both answers; the right ones, with their reasons, are folded below it."""

    def __init__(self, asked: SelfCheck, before: object, after: object) -> None:
        self.line = "; ".join(
            _said(asked, name, answer) for name, answer in (("before", before), ("after", after))
        )
        super().__init__(
            "\n".join(
                f"{number}. ({one.right}) {one.why}"
                for number, one in enumerate(asked.questions, start=1)
            )
        )

    def _repr_html_(self) -> str:
        _, folded = super()._repr_html_().split("\n", 1)
        said = "The right answers, with reasons"
        return f"<p>{html.escape(self.line)}</p>\n" + folded.replace(
            "The answer, without a guess", said
        )

    def __repr__(self) -> str:
        return self.line


def _lettered(question: Question) -> list[tuple[str, str]]:
    return list(zip(LETTERS, question.choices, strict=False))


def _said(asked: SelfCheck, name: str, answer: object) -> str:
    """One answer in words: how many are right, and which are not."""
    count = len(asked.questions)
    if answer is ... or answer is None:
        return f"{name}: not answered yet"
    letters = asked.read(answer)
    if letters is None:
        return f"{name}: {count} letters from a to d are asked for (x: not known), got {answer!r}"
    wrong = [
        str(number)
        for number, pair in enumerate(zip(letters, asked.key, strict=True), start=1)
        if pair[0] != pair[1]
    ]
    missed = f" (not yet: {', '.join(wrong)})" if wrong else ""
    return f"{name}: {count - len(wrong)} of {count} right{missed}"
