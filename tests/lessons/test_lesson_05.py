"""Lesson 05: its exercises know right from wrong; what it says of scalers is true of PyTorch's."""

import ast
import math
import re

import pytest
import torch

from course_utils.exercises import lesson_05
from course_utils.exercises.checks import not_yet, right
from course_utils.exercises.lesson_05 import FLAWS, GROWTH_INTERVAL, OVERFLOWS, STEPS, flawed_step
from course_utils.figures import widgets
from tools.notebooks import lesson_scripts

GRADIENTS = [torch.tensor([1e-8, 3e-5]), torch.tensor([-0.05, 0.0])]  # 65504 / 0.05 = 2**20.3


def next_state(scale, good_steps, overflow, growth_interval):
    if overflow:
        return scale / 2, 0, True
    if good_steps + 1 == growth_interval:
        return scale * 2, 0, False
    return scale, good_steps + 1, False


def with_overflow(scale, good_steps, skipped):
    """The rule with another answer to an overflow."""
    return lambda s, g, o, n: (scale(s), good_steps(g), skipped) if o else next_state(s, g, o, n)


def unfinished_state(scale, good_steps, overflow, growth_interval):
    if overflow:
        return ...
    return ...


def half_unfinished_state(scale, good_steps, overflow, growth_interval):
    return (..., 0, True) if overflow else next_state(scale, good_steps, overflow, growth_interval)


def careful_step(loss, weights, optimizer, scheduler, scale, max_norm):
    """By the norm: it is not finite when a gradient is not."""
    (loss * scale).backward()
    for weight in weights:
        weight.grad /= scale
    finite = bool(torch.nn.utils.clip_grad_norm_(weights, max_norm).isfinite())
    if finite:
        optimizer.step()
        scheduler.step()
    optimizer.zero_grad()
    return finite


def unfinished_step(loss, weights, optimizer, scheduler, scale, max_norm):
    (loss * scale).backward()
    finite = ...
    return finite


def judge_scale(check, answer):
    return check(answer, GRADIENTS)


def judge(check, answer):
    return check(answer)


# exercise: (how to call its check, reference, {wrong answer's name: answer}, untouched)
EXERCISES = {
    "check_best_scale": (
        judge_scale,
        2.0**20,
        {
            "overflows": 2.0**21,
            "GradScaler's start": 65536,
            "too small": 2.0**10,
            "not a power of two": 20000,
            "text": "2**14",
        },
        ...,
    ),
    "check_scaler": (
        judge,
        next_state,
        {
            "keeps counting": with_overflow(lambda s: s / 2, lambda g: g, True),
            "steps anyway": with_overflow(lambda s: s / 2, lambda g: 0, False),
            "does not halve": with_overflow(lambda s: s, lambda g: 0, True),
            "quarters": with_overflow(lambda s: s / 4, lambda g: 0, True),
            "a step late": lambda s, g, o, n: next_state(s, g, o, n + 1),
            "grows for ever": lambda s, g, o, n: (
                (2 * s, g + 1, False) if not o and g + 1 >= n else next_state(s, g, o, n)
            ),
            "never grows": lambda s, g, o, n: next_state(s, g, o, 10**9),
            "20 built in": lambda s, g, o, n: next_state(s, g, o, 20),
            "one value": lambda s, g, o, n: s,
            "not a function": 65536,
        },
        unfinished_state,
    ),
    "check_step": (
        judge,
        careful_step,
        {
            **{flaw: flawed_step(flaw) for flaw in FLAWS},
            "never steps": lambda *_: False,
            "not a function": 3,
        },
        unfinished_step,
    ),
}


def complaints(check, judge, reference, mistakes, untouched) -> list[str]:
    """What is wrong with a check, going by answers whose verdict is known."""
    verdict = judge(check, reference)
    found = [] if verdict.passed else [f"refuses the reference: {verdict}"]
    verdicts = {mistake: judge(check, answer) for mistake, answer in mistakes.items()}
    found += [f"accepts {mistake}" for mistake, verdict in verdicts.items() if verdict.passed]
    if len({repr(verdict) for verdict in verdicts.values()}) < len(verdicts):
        found.append("says the same of different mistakes")
    for answer in (untouched, ...):
        verdict = judge(check, answer)
        if verdict.passed is not None or "not attempted yet" not in repr(verdict).lower():
            found.append(f"says of an untouched exercise: {verdict}")
    return found


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # two flaws provoke it
@pytest.mark.parametrize("name", EXERCISES)
def test_check_knows_right_from_wrong(name):
    assert complaints(getattr(lesson_05, name), *EXERCISES[name]) == []


@pytest.mark.parametrize("name", EXERCISES)
@pytest.mark.parametrize(
    ("stub", "complaint"),
    [
        (lambda *_: right("well done."), "accepts"),
        (lambda *_: not_yet("no."), "refuses the reference"),
    ],
    ids=["accepts everything", "refuses everything"],
)
def test_check_that_judges_nothing_is_caught(name, stub, complaint):
    found = complaints(stub, *EXERCISES[name])
    assert any(complaint in text for text in found)
    assert any("untouched" in text for text in found)


@pytest.mark.parametrize("flaw", FLAWS)
def test_each_order_bug_is_named(flaw):
    assert repr(lesson_05.check_step(flawed_step(flaw))) == f"Not yet: {FLAWS[flaw]}"


def test_other_differences_are_said_in_short_numbers():
    verdict = repr(lesson_05.check_step(lambda *_: False))
    assert "should be (True, 0.32), got (False, 0.4)" in verdict


def test_half_finished_scaler_is_not_attempted():
    assert lesson_05.check_scaler(half_unfinished_state).passed is None


def test_targets_are_pytorchs_scaler_on_the_hard_cases():
    """The rule of its documentation, and overflows that stand where a rule can go wrong."""
    scale, good_steps, wanted = 65536.0, 0, []
    for step in range(STEPS):
        if step in OVERFLOWS:
            scale, good_steps, skipped = scale * 0.5, 0, True
        else:
            good_steps, skipped = good_steps + 1, False
            if good_steps == GROWTH_INTERVAL:
                scale, good_steps = scale * 2.0, 0
        wanted.append((scale, good_steps, skipped))
    assert lesson_05.traced_states() == wanted
    without = lesson_05.traced_states(OVERFLOWS - {120})
    assert without[120][0] == 2 * without[119][0]  # this overflow prevents a growth
    assert any(step + 1 in OVERFLOWS for step in OVERFLOWS)


def test_reference_step_clips_some_steps_and_not_others():
    """Otherwise neither a missing clip nor a missing unscale could be seen."""
    rows = lesson_05.train_scaled(None)
    assert [stepped for stepped, *_ in rows].count(False) == 4
    assert [came_back for *_, came_back in rows[:5]] == [[1024], [1024], [1024], [512], [256]]
    finals = {
        flaw: lesson_05.train_scaled(flawed_step(flaw))[-1][2]
        for flaw in ("no clip", "never unscale")
    }
    assert all(
        not torch.allclose(torch.tensor(final), torch.tensor(rows[-1][2]), rtol=1e-2)
        for final in finals.values()
    )


def test_clipped_before_unscaling_a_gradient_is_the_scale_times_too_small():
    weight = torch.nn.Parameter(torch.ones(1000))
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale((weight * 1e-2).sum()).backward()  # norm 0.32: nothing to clip
    torch.nn.utils.clip_grad_norm_([weight], 1.0)
    scaler.step(optimizer)
    assert (1 - weight).norm().item() == pytest.approx(0.0, abs=2e-5)
    assert weight.grad.norm().item() == pytest.approx(1 / 65536, rel=1e-3)


def test_float16_weights_cannot_be_unscaled():
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(weight.sum()).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(torch.optim.SGD([weight], lr=1.0))


def test_scale_explorer_draws_every_choice():
    explorer = widgets.scale_explorer({"gradients": [torch.tensor([1e-8, 1.0, math.pi])]})
    assert "0% become zero" in explorer.figure.alt  # at 256
    explorer.controls["scale"].value = 1
    assert "33% become zero" in explorer.picture.value
    explorer.controls["scale"].value = 2**16
    assert "0% become zero, 0% are subnormal, 33% normal, 67% infinite" in explorer.picture.value


@pytest.mark.parametrize("path", lesson_scripts(["04", "05"]), ids=lambda path: path.stem)
def test_every_prediction_is_compared_with_a_number(path):
    assert uncompared(path.read_text("utf-8")) == []


def uncompared(lesson: str) -> list[str]:
    """Predictions that no `show_prediction` prints beside a value."""
    predicted = re.findall(r"^(predicted_\w+) = \.\.\.$", lesson, re.M)
    calls = [
        node
        for node in ast.walk(ast.parse(lesson))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "show_prediction"
    ]
    compared = {
        ast.unparse(call.args[0])
        for call in calls
        if {keyword.arg for keyword in call.keywords} - {"show"}
    }
    assert predicted
    return [name for name in predicted if name not in compared]


def test_prediction_without_a_number_is_caught():
    lesson = "predicted_a = ...\npredicted_b = ...\nshow_prediction(predicted_b, counted=3)\n"
    assert uncompared(lesson) == ["predicted_a"]
    assert uncompared(lesson + "show_prediction(predicted_a, show=str)") == ["predicted_a"]
    assert uncompared(lesson + "show_prediction(predicted_a, show=str, **counted)") == []
