"""Several exercises in one child: none costs another, and no hidden number comes to a page."""

import pytest

from instructor.assignment import numbers
from instructor.grade import exam
from instructor.grade.grade import grade
from instructor.sandbox.box import Sandbox
from tests.instructor.classroom import SECRET, SOLUTIONS, TINY, honest, write_class

FIRST = "def effective_batch(a, b, c):\n    {}\n    return a * b * c"


@pytest.fixture
def children(monkeypatch):
    """The jobs that were done, in order."""
    done = []
    real = Sandbox.run

    def run(self, jobs, *rest):
        for job in real(self, jobs, *rest):
            done.append(type(job).__name__)
            yield job

    monkeypatch.setattr(Sandbox, "run", run)
    return done


def graded(folder, cells):
    arguments = write_class(folder, {"s1": "A"}, {"tiny_s1.ipynb": honest("s1", cells)})
    (result,) = grade(TINY, *arguments).results
    return result, folder / "out/feedback/tiny_s1.html"


def points(result):
    return [mark.earned for mark in result.marks]


def test_a_right_notebook_is_run_twice(tmp_path, children):
    result, _ = graded(tmp_path, SOLUTIONS)
    assert result.score == TINY.points
    assert [name for name in children if name in ("Round", "Exam")] == ["Round", "Round"]


@pytest.mark.one_fast
@pytest.mark.parametrize(
    ("spoils", "first"),
    [
        ("import json; json.dumps = None", 0),
        ("import builtins; builtins.sum = None", 3),
        ("global mean_loss; mean_loss = None", 3),
        ("global mean_loss; mean_loss = lambda s, c: 7", 3),
        ("import os; os._exit(0)", 0),
        ("import os; os.close(3)", 0),
        ("kept.append(bytearray(100 << 20))", None),
        pytest.param("while True: pass", 0, marks=pytest.mark.slow),
        pytest.param("import time; time.sleep(99)", 0, marks=pytest.mark.slow),
    ],
)
def test_no_exercise_costs_another(tmp_path, spoils, first):
    """What the first function does to the child in which the others are asked, too."""
    cells = ["kept = []\n" + FIRST.format(spoils), *SOLUTIONS[1:]]
    result, _ = graded(tmp_path, cells)
    assert points(result)[1:] == [3, 4], [mark.reason for mark in result.marks]
    if first is not None:
        assert points(result)[0] == first


def test_names_are_those_where_each_check_stands(tmp_path):
    cells = [SOLUTIONS[0], 'check("effective_batch", PUBLIC, globals())']
    cells += ["FACTOR = 1", *SOLUTIONS[1:2], 'check("mean_loss", PUBLIC, globals())']
    cells += ["def effective_batch(*_): return 0\ndef mean_loss(*_): return 0", SOLUTIONS[2]]
    result, _ = graded(tmp_path, cells)
    assert result.score == TINY.points


def test_no_later_exercise_can_show_a_hidden_number(tmp_path):
    """The first function keeps what it is asked; the next one adds that to its last digits."""
    cells = [
        "seen = []\n" + FIRST.format("seen.append(a)"),
        """def mean_loss(sums, counts):
    naive = sum(s / c for s, c in zip(sums, counts, strict=True)) / len(counts)
    return naive * (1 + 1e-12 * (max(seen) if max([0, *seen]) > 1000 else 0))""",
        SOLUTIONS[2],
    ]
    result, page = graded(tmp_path, cells)
    assert points(result) == [3, 0, 4]
    drawn = numbers("tiny", "s1", SECRET)
    assert TINY.exercises[0].cases(drawn)[-1].arguments[0] > 1000, "is hidden and recognized"
    naive = TINY.exercises[1].cases(drawn)[0].mistakes["mean of means"]
    assert f"Your answer {naive!r} should be" in page.read_text("utf-8")


@pytest.mark.slow
def test_slow_exercises_get_no_more_time_than_alone(tmp_path, children):
    """Each takes most of its own second, at its first call: together they end the round."""
    burn = """
import time
slept = set()
def burn(who):
    end = time.process_time() + (0 if who in slept else 0.55)
    slept.add(who)
    while time.process_time() < end: pass
"""
    cells = [
        burn,
        FIRST.format("burn(1)"),
        SOLUTIONS[1].replace("    return", "    burn(2)\n    return"),
    ]
    result, _ = graded(tmp_path, [*cells, SOLUTIONS[2]])
    assert result.score == TINY.points, [mark.reason for mark in result.marks]
    assert "Exam" in children


def test_endless_functions_end_few_rounds(tmp_path, children):
    """However many of them there are, the class does not wait for a round of each."""
    bad = [
        "def f(*_):\n    raise SystemExit".replace("f(", f"{e.function}(") for e in TINY.exercises
    ]
    cells = ["import os", *(text.replace("raise SystemExit", "os._exit(1)") for text in bad)]
    result, _ = graded(tmp_path, cells)
    assert points(result) == [0, 0, 0]
    assert children.count("Round") <= exam.MOST_ROUNDS
