"""The self-check: what it asks, what it says to answers, and that it gives nothing away before."""

import importlib
import re

import pytest

from course_utils.exercises.self_check import LETTERS, Question, SelfCheck

ASKED = SelfCheck(
    Question("How many bytes < 5?", ("one", "four"), "b", "float32 has 32 bits."),
    Question("And in float16?", ("one", "two", "three"), "b", "Half of it."),
)


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        (..., ..., "before: not answered yet; after: not answered yet"),
        ("ax", ..., "before: 0 of 2 right (not yet: 1, 2); after: not answered yet"),
        ("ba", "BB", "before: 1 of 2 right (not yet: 2); after: 2 of 2 right"),
        (None, "b b", "before: not answered yet; after: 2 of 2 right"),
        ("b", "bb", "before: 2 letters from a to d are asked for (x: not known), got 'b'; after: 2 "
         "of 2 right"),
        ("be", ("b", "b"), "before: 2 letters from a to d are asked for (x: not known), got 'be'; "
         "after: 2 letters from a to d are asked for (x: not known), got ('b', 'b')"),
    ],
)  # fmt: skip
def test_score(before, after, line):
    score = ASKED.score(before, after)
    assert repr(score) == line
    visible, folded = score._repr_html_().split("<details>")
    assert "float32 has 32 bits." in folded and "float32" not in visible
    assert "<summary>The right answers, with reasons</summary>" in folded


def test_questions_give_no_answer_away():
    assert "(a) one<br>(b) four</li>" in ASKED._repr_html_()
    assert "bytes &lt; 5?" in ASKED._repr_html_()
    assert repr(ASKED).splitlines()[:3] == ["1. How many bytes < 5?", "   (a) one", "   (b) four"]
    for one in ASKED.questions:
        assert one.why not in ASKED._repr_html_() + repr(ASKED)


LESSONS = ("01", "02", "03", "04", "05", "08")


@pytest.mark.parametrize("number", LESSONS)
def test_each_lesson_asks_five_that_guessing_one_letter_does_not_pass(number):
    asked = importlib.import_module(f"course_utils.exercises.lesson_{number}").QUESTIONS
    assert len(asked.questions) == 5
    for question in asked.questions:
        choices = [re.sub(r"\W+", " ", one.lower()) for one in question.choices]
        assert len(set(choices)) == len(choices) >= 3
        assert question.right in LETTERS[: len(choices)]
    assert max(map(asked.key.count, asked.key)) <= 2
