"""Are the answers right: tickets field by field, free text by the words in common.

Not modelled: judging free text.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from course_utils.data import parse_answer
from fitcast.units import refusal


@dataclass(frozen=True)
class Score:
    """Shares (0 to 1) of answers that have the ticket's structure, and that are right entirely."""

    structure: float
    correct: float

    def __str__(self) -> str:
        return f"{self.structure:.0%} have the structure, {self.correct:.0%} are right"


@dataclass(frozen=True)
class Overlap:
    """For free text, where no answer is the only right one: mean share of words in common (F1)."""

    correct: float

    def __str__(self) -> str:
        return f"{self.correct:.0%} of the words in common with the expected answers"


def score(answers: Sequence[str], expected: Sequence[str]) -> Score | Overlap:
    """How many answers are tickets and right in every field; for other data, words in common.

    Raises:
        ValueError: Not one answer for each expected one.

    Source of the F1: Rajpurkar et al. 2016, "SQuAD", section 6.1.
    """
    if len(answers) != len(expected) or not answers:
        raise refusal(
            "answers",
            f"be as many as expected ({len(expected)}, at least 1)",
            len(answers),
            "generate one answer for each example",
        )
    wanted, found = ([parse_answer(text) for text in texts] for texts in (expected, answers))
    if None in wanted:
        return Overlap(sum(map(_f1, answers, expected)) / len(answers))
    structured = sum(ticket is not None for ticket in found)
    return Score(structured / len(answers), sum(map(operator.eq, found, wanted)) / len(answers))


def _f1(answer: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of an answer's words; 0 without one in common."""
    one, other = (Counter(re.findall(r"\w+", text.lower())) for text in (answer, wanted))
    common = (one & other).total()
    return 2 * common / (one.total() + other.total()) if common else 0.0
