"""The assignments: solutions pass, each named mistake is told apart, numbers are the student's."""

import json
import shutil
import subprocess
import sys

import pytest

from instructor.assignment import TOO_MANY, Numbers, load, names, numbers
from instructor.build.notebooks import public_cases
from instructor.build.selfcheck import NOT_ATTEMPTED, TooMany, judge, oracle, same
from instructor.cases import EVERYBODY, Idea, exercise
from tools.notebooks import ROOT

SECRET = "a secret for tests, nobody's class"
ASSIGNMENTS = {name: load(name) for name in names()}
EXERCISES = [
    pytest.param(name, exercise, id=f"{name}-{exercise.function}")
    for name, assignment in ASSIGNMENTS.items()
    for exercise in assignment.exercises
]
STUDENTS = [f"s{number:03}" for number in range(500)]


def of(name: str, student: str) -> Numbers:
    return numbers(name, student, SECRET)


def said(exercise, function, own=EVERYBODY) -> str:
    return judge(exercise.function, function, public_cases(exercise, own), exercise.mistakes)


def test_there_are_seven():
    assert set(ASSIGNMENTS) == {
        "effective_batch",
        "activation_memory",
        "checkpointing",
        "mixed_precision",
        "loss_scaling",
        "chunked_loss",
        "qlora_labels",
    }


def a_few_or(many: int) -> list:
    """How many students: five, and in `make test-all` many."""
    return [5, pytest.param(many, marks=pytest.mark.slow)]


@pytest.mark.one_fast
@pytest.mark.parametrize("students", a_few_or(20))
@pytest.mark.parametrize(("name", "exercise"), EXERCISES)
def test_self_check_accepts_the_solution_and_names_each_mistake(name, exercise, students):
    assert len(exercise.wrong) >= 2
    assert exercise.wrong.keys() == exercise.mistakes.keys()
    assert len(set(exercise.mistakes.values())) == len(exercise.mistakes)
    for own in (EVERYBODY, *(of(name, student) for student in STUDENTS[:students])):
        assert said(exercise, exercise.solution, own).startswith("Right: all")
        for mistake, function in exercise.wrong.items():
            assert said(exercise, function, own) == f"Not yet: {exercise.mistakes[mistake]}"


@pytest.mark.parametrize(("name", "exercise"), EXERCISES)
def test_self_check_knows_what_is_not_attempted(name, exercise):
    assert said(exercise, lambda *_: ...) == NOT_ATTEMPTED
    assert said(exercise, lambda *_: [..., 1]) == NOT_ATTEMPTED
    assert said(exercise, lambda *_: 1 + ...) == NOT_ATTEMPTED
    assert "returns nothing" in said(exercise, lambda *_: None)
    assert "raised SystemExit" in said(exercise, lambda *_: sys.exit())
    assert "should give" in said(exercise, lambda *_: "a sentence")


@pytest.mark.one_fast
@pytest.mark.parametrize(("name", "exercise"), EXERCISES)
def test_every_mistake_loses_points_in_a_hidden_case_and_the_solution_none(name, exercise):
    """A student whose self-check is silenced still loses points for each mistake."""
    for student in STUDENTS[:20]:
        cases = exercise.cases(of(name, student))
        assert any(case.hidden for case in cases)
        for case in cases:
            assert same(answer(exercise.solution, case), case.expected, case.rel_tolerance)
            for mistake, value in case.mistakes.items():
                assert not same(value, case.expected, case.rel_tolerance)
                assert same(answer(exercise.wrong[mistake], case), value, 1e-11)
    lost = {
        mistake
        for student in STUDENTS[:20]
        for case in exercise.cases(of(name, student))
        if case.hidden
        for mistake in case.mistakes
    }
    assert lost >= exercise.mistakes.keys() - {TOO_MANY}


def answer(function, case):
    extra = [oracle(vars(case))] if case.oracle else []
    return json.loads(json.dumps(function(*case.arguments, *extra)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n == "activation_memory" else pytest.mark.slow) for n in names()],
)
def test_500_students_have_numbers_of_their_own(name):
    hidden, public = set(), set()
    for student in STUDENTS:
        cases = [
            case
            for exercise in ASSIGNMENTS[name].exercises
            for case in exercise.cases(of(name, student))
        ]
        hidden.add(json.dumps([case.arguments for case in cases if case.hidden]))
        public.add(json.dumps([case.arguments for case in cases if not case.hidden]))
    assert len(hidden) == len(public) == len(STUDENTS)


@pytest.mark.parametrize("students", a_few_or(50))
@pytest.mark.parametrize(("name", "exercise"), EXERCISES)
def test_no_hidden_case_is_shown_to_anybody(name, exercise, students):
    for student in STUDENTS[:students]:
        cases = exercise.cases(of(name, student))
        shown = [case.arguments for case in [*cases, *exercise.cases(EVERYBODY)] if not case.hidden]
        assert [case.name for case in cases if case.hidden and case.arguments in shown] == []


@pytest.mark.parametrize(("name", "exercise"), EXERCISES)
def test_every_hidden_case_is_drawn(name, exercise):
    drawn = [
        [case.arguments for case in exercise.cases(of(name, student)) if case.hidden]
        for student in STUDENTS[:10]
    ]
    assert all(len(set(map(str, seen))) > 1 for seen in zip(*drawn, strict=True))


@pytest.mark.parametrize(("name", "exercise"), EXERCISES)
def test_most_points_are_hidden_and_the_same_for_all(name, exercise):
    cases = exercise.cases(of(name, "s001"))
    assert sum(case.points for case in cases) == exercise.points
    assert exercise.points == int(exercise.points)
    assert sum(case.points for case in cases if case.hidden) >= 0.5 * exercise.points
    assert len({case.name for case in cases}) == len(cases)


@pytest.mark.parametrize(("name", "exercise"), EXERCISES)
def test_sentences_are_one_friendly_sentence(name, exercise):
    for sentence in exercise.mistakes.values():
        assert sentence.endswith((".", "?"))
        assert len(sentence) < 200
        assert "!" not in sentence
    assert exercise.reread.startswith("lesson 0")
    assert 2 <= exercise.minutes <= 15


def test_another_secret_and_another_student_change_hidden_numbers():
    def arguments(student, secret):
        (first, *_) = ASSIGNMENTS["effective_batch"].exercises
        return [c.arguments for c in first.cases(numbers("effective_batch", student, secret))]

    assert arguments("s1", "x" * 16) == arguments("s1", "x" * 16)
    assert arguments("s1", "x" * 16) != arguments("s1", "y" * 16)
    assert arguments("s1", "x" * 16) != arguments("s2", "x" * 16)


def test_numbers_are_the_same_on_every_machine():
    """HMAC-SHA256 of a text, computed here without `Draw`."""
    import hashlib
    import hmac

    label = repr(("hidden", "effective_batch", "s1", "f"))
    digest = hmac.new(b"key", f"{label}|1".encode(), hashlib.sha256).hexdigest()
    draw = numbers("effective_batch", "s1", "key").hidden("f")
    assert draw.integer(10, 1000, 10) == 10 + 10 * (int(digest, 16) % 100)


def double(number):
    return 2 * number


def a_draw(idea):
    return exercise(
        double,
        title="",
        minutes=1,
        reread="",
        ideas=[idea],
        mistakes={"squares": ("twice is not the square.", lambda number: number**2)},
    )


def test_numbers_are_drawn_until_they_tell_the_mistake():
    """2 + 2 is 2 x 2: that draw would give a point for squaring."""
    told = a_draw(Idea("a number", lambda draw: (draw.integer(1, 3),), 1, tells=("squares",)))
    loose = a_draw(Idea("a number", lambda draw: (draw.integer(1, 3),), 1))
    drawn = [
        [one.cases(of("any", student))[0].arguments[0] for student in STUDENTS[:50]]
        for one in (told, loose)
    ]
    assert [set(found) for found in drawn] == [{1, 3}, {1, 2, 3}]


def test_a_draw_that_never_tells_is_refused():
    never = a_draw(Idea("two", lambda draw: (draw.choice((0, 2)),), 1, tells=("squares",)))
    with pytest.raises(ValueError, match="must tell squares apart, got double 'two'"):
        never.cases(of("any", "s1"))


def test_secret_is_not_shown():
    assert SECRET not in repr(of("effective_batch", "s1"))


def test_oracle_counts_and_answers_from_what_the_case_knows():
    (search,) = [e for e in ASSIGNMENTS["effective_batch"].exercises if e.oracles]
    case = search.cases(EVERYBODY)[0]
    answers = search.oracles["fits"]
    assert (answers(case, 13), answers(case, 14)) == (True, False)
    for nonsense in ((), ("12",), (True,), (1, 2)):
        with pytest.raises(ValueError, match="question must be one number"):
            answers(case, *nonsense)
    ask = oracle(vars(case))
    for _ in range(case.most_questions):
        ask(1)
    with pytest.raises(TooMany):
        ask(1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: load("effective_bach"), "assignment must be one of .*effective_batch"),
        (lambda: numbers("effective_batch", " ", "s"), "student_id must not be empty"),
        (lambda: numbers("effective_batch", "s1", ""), "secret must not be empty"),
    ],
)
def test_errors_say_what_to_change(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_no_torch_is_needed():
    code = (
        "import sys\nsys.modules.update(dict.fromkeys(['torch', 'numpy', 'jupytext', "
        "'nbformat']))\nfrom instructor.assignment import load, names, numbers\n"
        "for name in names():\n"
        "    for exercise in load(name).exercises:\n"
        "        assert exercise.cases(numbers(name, 's1', 'secret'))\n"
        "        assert not exercise.needs_torch\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.one_fast
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_cases_are_the_same_on_every_python(version):
    python = shutil.which(f"python{version}")
    if not python or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"no Python {version} here")
    code = (
        "import hashlib, json\nfrom instructor.assignment import load, names, numbers\n"
        "cases = [vars(case) for name in names() for exercise in load(name).exercises\n"
        "         for student in ('s1', 's2', 's3')\n"
        "         for case in exercise.cases(numbers(name, student, 'a secret'))]\n"
        "print(hashlib.sha256(json.dumps(cases).encode()).hexdigest())"
    )
    runs = [
        subprocess.run(
            [one, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for one, seed in ((sys.executable, "1"), (python, "2"))
    ]
    assert runs[0] == runs[1] != ""
