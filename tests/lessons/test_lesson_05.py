"""Lesson 05: its exercises know right from wrong; what it says of scalers is true of PyTorch's."""

import ast
import math
import re

import pytest
import torch

from course_utils.exercises import lesson_05
from course_utils.exercises.lesson_05 import FLAWS, GROWTH_INTERVAL, OVERFLOWS, STEPS, flawed_step
from course_utils.figures import widgets
from tests.lessons.exercises import complaints
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


def half_unfinished_state(scale, good_steps, overflow, growth_interval):
    if overflow:
        return (..., 0, True)
    return next_state(scale, good_steps, overflow, growth_interval)


CAREFUL = """
def careful_step(loss, weights, optimizer, scheduler, scale, max_norm):
    (loss * scale).backward()
    for weight in weights:
        weight.grad /= scale
    finite = all(weight.grad.isfinite().all() for weight in weights)
    torch.nn.utils.clip_grad_norm_(weights, max_norm)
    if finite:
        optimizer.step()
        scheduler.step()
    optimizer.zero_grad()
    return finite
"""
UNSCALE = "    for weight in weights:\n        weight.grad /= scale\n"
CLIP = "    torch.nn.utils.clip_grad_norm_(weights, max_norm)\n"
STEP, SCHEDULE = "        optimizer.step()\n", "        scheduler.step()\n"
CLEAR = "    optimizer.zero_grad()\n"
FINITE = "weight.grad.isfinite().all() for weight in weights"


def edited(*edits: tuple[str, str]):
    """`CAREFUL` as a learner gets it wrong: each text replaced by another."""
    source = CAREFUL
    for old, new in edits:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    defined = {"torch": torch}
    exec(source, defined)
    return defined["careful_step"]


def by_the_norm(loss, weights, optimizer, scheduler, scale, max_norm):
    """It is not finite when a gradient is not."""
    (loss * scale).backward()
    for weight in weights:
        weight.grad /= scale
    finite = bool(torch.nn.utils.clip_grad_norm_(weights, max_norm).isfinite())
    if finite:
        optimizer.step()
        scheduler.step()
    optimizer.zero_grad()
    return finite


# mistake in the order of a step: what a learner has in place of what; the key is that of `FLAWS`
ORDER_BUGS = {
    "clip first": [(CLIP, ""), (UNSCALE, CLIP + UNSCALE)],
    "step anyway": [(f"    if finite:\n{STEP}", f"{STEP[4:]}    if finite:\n")],
    "schedule anyway": [(SCHEDULE, SCHEDULE[4:])],
    "no if": [("    if finite:\n", ""), (STEP, STEP[4:]), (SCHEDULE, SCHEDULE[4:])],
    "never unscale": [(UNSCALE, "")],
    "never scale": [("(loss * scale)", "loss"), (UNSCALE, "")],
    "no clip": [(CLIP, "")],
    "keep gradients": [(CLEAR, "")],
    "keep infinity": [(CLEAR, f"    {CLEAR}")],
    "first only": [(FINITE, f"{FINITE}[:1]")],
    "last only": [(FINITE, f"{FINITE}[-1:]")],
    "NaN only": [("isfinite().all()", "isnan().any().logical_not()")],
    "infinity only": [("isfinite().all()", "isinf().any().logical_not()")],
}
# exercise: answers that pass, {what is wrong with one: (answer, words of its verdict)}
EXERCISES = {
    "check_best_scale": (
        [2.0**20, 2**20, torch.tensor(2.0**20)],
        {
            "overflows": (2.0**21, "of them overflow there"),
            "GradScaler's start": (65536, "that is where GradScaler starts"),
            "too small": (2.0**10, "Not yet: twice the scale overflows nothing either"),
            "not a power of two": (20000, "a power of two is asked for"),
            "negative": (-1024, "a power of two is asked for"),
            "text": ("2**14", "a power of two is asked for, such as 2**10, got '2**14'"),
        },
    ),
    "check_scaler": (
        [next_state, lambda *state: list(next_state(*state))],
        {
            "keeps counting": (
                with_overflow(lambda s: s / 2, lambda g: g, True),
                "an overflow starts the count of good steps again",
            ),
            "steps anyway": (
                with_overflow(lambda s: s / 2, lambda g: 0, False),
                "must be skipped",
            ),
            "does not halve": (with_overflow(lambda s: s, lambda g: 0, True), "there it stays"),
            "quarters": (with_overflow(lambda s: s / 4, lambda g: 0, True), "went further down"),
            "a step late": (lambda s, g, o, n: next_state(s, g, o, n + 1), "grows one step late"),
            "grows for ever": (
                lambda s, g, o, n: (
                    (2 * s, g + 1, False) if not o and g + 1 >= n else next_state(s, g, o, n)
                ),
                "after growing the count starts again at 0",
            ),
            "never grows": (
                lambda s, g, o, n: next_state(s, g, o, 10**9),
                "after step 24 (scale, good steps, skipped) should be (65536.0, 0, False), got (",
            ),
            "20 built in": (lambda s, g, o, n: next_state(s, g, o, 20), "use the argument"),
            "one value": (lambda s, g, o, n: s, "three values are asked for, got 65536.0"),
            "half done": (half_unfinished_state, "1 of 2 `...` still there: `return (..., 0, Tru"),
            "not a function": (65536, "a function is asked for"),
        },
    ),
    "check_step": (
        [edited(), by_the_norm],
        {flaw: (edited(*edits), FLAWS[flaw]) for flaw, edits in ORDER_BUGS.items()}
        | {
            "never steps": (
                lambda *_: False,
                "after step 1 your function should return True, got False",
            ),
            "unscales what was never scaled": (
                edited(("(loss * scale)", "loss")),
                "after step 1 the loss should have been scaled by [1024.0], got [1.0]",
            ),
            "steps twice": (
                edited((STEP, 2 * STEP)),
                "after step 1 a weight should be ",
            ),
            "no schedule": (
                edited((SCHEDULE, "")),
                "after step 1 the learning rate should be 0.32, got 0.4",
            ),
            "says it stepped": (
                edited(("return finite", "return True")),
                "after step 3, in which a gradient overflows, your function should return False",
            ),
            "not a function": (3, "a function is asked for"),
        },
    ),
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # some flaws provoke it
@pytest.mark.parametrize("name", EXERCISES)
def test_check_knows_right_from_wrong(name):
    def check(answer):
        more = (GRADIENTS,) if name == "check_best_scale" else ()
        return getattr(lesson_05, name)(answer, *more)

    assert complaints(check, name, *EXERCISES[name]) == []


def test_every_named_flaw_has_a_learners_mistake():
    assert set(ORDER_BUGS) == set(FLAWS)


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


def test_small_gradients_that_vanish_leave_the_large_one_unbalanced():
    """Those of a token's logits sum to zero; 256 times smaller, float16 keeps one of them."""
    logits = torch.randn(1280, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(7)) / 3000  # tokens in a step
    (loss * 2.0**-8).backward()
    right, kept = logits.grad.double(), logits.grad.half().double()
    assert abs(right.sum()) < 1e-4 * abs(right[7])
    assert (right > 0).sum() == 1279 and abs(kept.sum()) > 0.9 * abs(right[7])


@pytest.mark.slow
def test_a_run_at_its_ceiling_loses_one_step_in_2001():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**17, growth_interval=2000)
    optimizer = torch.optim.SGD([weight := torch.nn.Parameter(torch.zeros(1))])
    scales = []
    for _ in range(4002):
        scaler.scale(weight.sum()).backward()
        weight.grad = (weight.grad * 0.25).half().float()  # what float16 makes of it
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    lost = [step for step in range(1, 4002) if scales[step] < scales[step - 1]]
    assert lost == [2000, 4001]


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
        if {keyword.arg for keyword in call.keywords} - {"show", "also"}
    }
    assert predicted
    return [name for name in predicted if name not in compared]


def test_prediction_without_a_number_is_caught():
    lesson = "predicted_a = ...\npredicted_b = ...\nshow_prediction(predicted_b, counted=3)\n"
    assert uncompared(lesson) == ["predicted_a"]
    assert uncompared(lesson + "show_prediction(predicted_a, show=str)") == ["predicted_a"]
    assert uncompared(lesson + "show_prediction(predicted_a, show=str, **counted)") == []
