"""A grader that stood still: what its children lost by it is asked again, and nothing else is.

Stalls are forced here, not waited for: every pass of `Sandbox.run` counts as one.
"""

import pytest

from instructor.assignment import numbers
from instructor.grade.exam import Exam, Paper, Round
from instructor.sandbox import box, talk
from instructor.sandbox.reading import Reading, Rehearsal
from tests.instructor.classroom import SECRET, TINY, honest

ANSWERS_THEN_WAITS = """import os, time
real = os.read
def read(*arguments):
    data = real(*arguments)
    if not data:
        time.sleep(1000)
    return data
os.read = read
def effective_batch(a, b, c):
    return a * b * c"""


@pytest.fixture(scope="module")
def sandbox():
    with box.Sandbox() as found:
        yield found


@pytest.fixture
def always_stalled(monkeypatch):
    monkeypatch.setattr(box, "STALL_SECONDS", -1)


@pytest.mark.parametrize("kind", [Round, Exam])
def test_child_that_has_answered_all_is_not_asked_again(sandbox, kind, always_stalled):
    """It reads on when nothing is left to read, until its clock ends it."""
    exercise = TINY.exercises[0]
    paper = Paper(
        exercise, exercise.cases(numbers("tiny", "s1", SECRET)), [[[1, ANSWERS_THEN_WAITS]]]
    )
    jobs = [Round([paper])] if kind is Round else [Exam(paper)]
    done = list(sandbox.run(jobs))
    assert paper.clear
    assert [type(job) for job in done] == ([Round, Round] if kind is Round else [Exam])


class Begun(Rehearsal):
    """Its second child finds another statement, as if the first had only been starved there."""

    times = 0

    def begin(self):
        self.times += 1
        if self.times == 2:
            self.statements = [self.statements[0], [1, "y = 2"], self.statements[2]]
        return super().begin()


def test_rehearsal_that_is_begun_anew_begins_at_its_first_statement(sandbox, always_stalled):
    statements = [[1, "x = 1 / 0"], [1, "import time; time.sleep(1000)"], [2, "z = 3"]]
    job = Begun(statements)
    assert list(sandbox.run([job])) == [job]
    assert job.times == 2
    assert job.complete
    assert job.left_out == []
    assert [*job.notes] == [0]


def test_reading_that_has_come_is_not_begun_anew(sandbox, always_stalled, monkeypatch):
    begun = []
    real = Reading.begin
    monkeypatch.setattr(Reading, "begin", lambda job: begun.append(job) or real(job))
    job = Reading(honest("s1"), ["effective_batch"])
    assert list(sandbox.run([job])) == [job]
    assert job.about and "effective_batch" in job.about["functions"]
    assert begun == [job]


def test_a_child_that_sleeps_holds_up_a_starved_class_only_so_long(
    sandbox, always_stalled, monkeypatch
):
    monkeypatch.setattr(talk, "MOST_STALLS", 1)
    job = Rehearsal([[1, "import time; time.sleep(1000)"]])
    done = list(sandbox.run([job]))
    assert done[0] is job
    assert (job.stalls, job.left_out) == (1, [0])
