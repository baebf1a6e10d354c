"""The targets of lesson 05's exercises: PyTorch's own scaler, and gradients that are counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from course_utils.exercises.answers import describe, items, number
from course_utils.exercises.checks import Verdict, call, check, not_yet, right
from course_utils.exercises.self_check import Question, SelfCheck
from course_utils.topics.precision import land

STEPS, GROWTH_INTERVAL = 200, 20
OTHER_INTERVAL = 7  # so that no answer passes that has the first one built in
# Single overflows, two in a row, one in the step that would have grown the scale.
OVERFLOWS = frozenset({3, 40, 41, 61, 100, 120, 140, 141, 142, 199})
FLAWS = {  # of a training step with a scaled loss: what is wrong, in a sentence
    "clip first": "the gradients are clipped before they are unscaled: their norm is the scale "
    "times too large then, and what is left of them far too small.",
    "step anyway": "the optimizer steps although a gradient is infinite (a finite loss does not "
    "rule that out): weights become NaN.",
    "no if": "the optimizer steps and the schedule moves on although a gradient is infinite: both "
    "only if all gradients are finite.",
    "schedule anyway": "the learning rate's schedule moves on in a step that was skipped.",
    "never unscale": "the gradients are never divided by the scale.",
    "never scale": "the loss is not multiplied by the scale: float16 would lose the small "
    "gradients before there is anything to divide.",
    "no clip": "the gradients are not clipped to max_norm.",
    "keep gradients": "the gradients are not cleared after the step: the next one adds to them.",
    "keep infinity": "the gradients are cleared in good steps only: after an overflow the infinity "
    "stays, and no later step is good.",
    "first only": "an overflow can be in any weight: look at every gradient, not at the first.",
    "last only": "an overflow can be in any weight: look at every gradient, not at the last.",
    "NaN only": "an infinite gradient is no NaN, and as bad: isfinite() knows both.",
    "infinity only": "NaN is not infinite, and as bad: isfinite() knows both.",
}
# Steps of `train_scaled` that overflow: in which weights' gradient one number becomes what.
OVERFLOWING = {
    2: ((0, 1), math.nan),
    3: ((0, 1), math.inf),
    6: ((0,), math.inf),
    8: ((1,), math.nan),
}

QUESTIONS = SelfCheck(
    Question(
        "Why is the loss multiplied by a large number before backward?",
        (
            "to learn faster",
            "so that small gradients stay within float16's range",
            "to make clipping unnecessary",
        ),
        "b",
        "The chain rule carries the factor to every gradient; it is divided out before the update.",
    ),
    Question(
        "One gradient is infinite. GradScaler",
        (
            "clips it",
            "sets it to zero",
            "raises an error",
            "skips the optimizer's step and halves the scale",
        ),
        "d",
        "Clipping would make NaN of it: infinity times zero.",
    ),
    Question(
        "When must gradients be clipped?",
        ("before unscaling", "after unscaling, before the step", "after the step", "never in fp16"),
        "b",
        "Before, their norm is the scale times too large, and clipping leaves next to nothing.",
    ),
    Question(
        "After 2000 good steps in a row the scale",
        ("is doubled", "is halved", "stays", "starts again at 65 536"),
        "a",
        "It finds the ceiling by bumping into it: one skipped step, then one power of two below.",
    ),
    Question(
        "bfloat16 needs no scaler because",
        ("it has more fraction bits", "its gradients are larger", "it has float32's exponent"),
        "c",
        "A scale would shift numbers within a range that holds them all.",
    ),
)


@check()
def check_best_scale(answer: float, gradients: Sequence[torch.Tensor]) -> Verdict:
    """Exercise 05.1: the largest power of two under which no gradient overflows float16."""
    scale = number(answer)
    if scale is None or math.frexp(scale)[0] != 0.5:
        return not_yet(f"a power of two is asked for, such as 2**10, got {describe(answer)}.")
    here, doubled = (land(gradients, "float16", factor) for factor in (scale, 2 * scale))
    if here.infinite:
        return not_yet(
            f"{here.infinite:.1g} of them overflow there, and one is enough to lose the step."
        )
    if not doubled.infinite:
        why = "that is where GradScaler starts, not where it ends; " if scale == 65536 else ""
        return not_yet(
            f"{why}twice the scale overflows nothing either, and saves more of the small ones."
        )
    return right(
        f"at 2**{int(math.log2(scale))} nothing overflows, and {here.zero:.2%} become "
        f"zero instead of {land(gradients).zero:.2%} at scale 1."
    )


def traced_states(
    overflows: frozenset[int] = OVERFLOWS, growth_interval: int = GROWTH_INTERVAL
) -> list[tuple[float, int, bool]]:
    """PyTorch's scaler over 200 steps: scale, good steps and whether it skipped, after each."""
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=growth_interval)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    states = []
    for step in range(STEPS):
        before = weight.item()
        optimizer.zero_grad()
        scaler.scale(weight.sum() * (math.inf if step in overflows else 1e-3)).backward()
        scaler.step(optimizer)
        scaler.update()
        tracker = scaler.state_dict()["_growth_tracker"]
        states.append((scaler.get_scale(), tracker, weight.item() == before))
    return states


def _states(next_state: Callable, growth_interval: int) -> list[tuple[float, int, bool]]:
    scale, good_steps, states = 65536.0, 0, []
    for step in range(STEPS):
        state = call(next_state, scale, good_steps, step in OVERFLOWS, growth_interval)
        values = items(state)
        if values is None or len(values) != 3:
            raise TypeError(f"three values are asked for, got {state!r}")
        scale, good_steps, skipped = float(values[0]), int(values[1]), bool(values[2])
        states.append((scale, good_steps, skipped))
    return states


@check(asked=2)
def check_scaler(answer: Callable) -> Verdict:
    """Exercise 05.2: a dynamic loss scaler, equal to PyTorch's in each of 200 steps."""
    for interval in (GROWTH_INTERVAL, OTHER_INTERVAL):
        ours, wanted = _states(answer, interval), traced_states(growth_interval=interval)
        if ours != wanted:
            return _name_mistake(ours, wanted, interval)
    skipped = sum(skip for *_, skip in wanted)
    return right(f"equal to torch.amp.GradScaler in all {STEPS} steps, {skipped} of them skipped.")


def _name_mistake(ours: list[tuple], wanted: list[tuple], interval: int) -> Verdict:
    def mistaken(
        keep: bool = False,
        late: int = 0,
        never_zero: bool = False,
        skip: bool = True,
        back: float = 0.5,
        built_in: int | None = None,
    ) -> Callable:
        def next_state(scale, good_steps, overflow, growth_interval):
            if overflow:
                return scale * back, good_steps if keep else 0, skip
            if good_steps + 1 >= (built_in or growth_interval) + late:
                return scale * 2, good_steps + 1 if never_zero else 0, False
            return scale, good_steps + 1, False

        return next_state

    mistakes = {
        "an overflow starts the count of good steps again at 0.": mistaken(keep=True),
        "it grows one step late: this step is a good one too, count it first.": mistaken(late=1),
        "after growing the count starts again at 0, else it grows in every step.": mistaken(
            never_zero=True
        ),
        "a step with an overflow must be skipped.": mistaken(skip=False),
        "an overflow halves the scale; there it stays.": mistaken(back=1.0),
        "an overflow multiplies by 0.5; you went further down.": mistaken(back=0.25),
        f"growth_interval is {interval} here, and the scale grows as if it were {GROWTH_INTERVAL}: "
        "use the argument.": mistaken(built_in=GROWTH_INTERVAL),
    }
    for sentence, next_state in mistakes.items():
        if ours == _states(next_state, interval):
            return not_yet(sentence)
    step = next(i for i in range(STEPS) if ours[i] != wanted[i])
    return not_yet(
        f"after step {step + 1}{', an overflow,' * (step in OVERFLOWS)} (scale, good "
        f"steps, skipped) should be {wanted[step]}, got {ours[step]}."
    )


class ScaledStep(NamedTuple):
    """What a step of `train_scaled` did: learning rate and weights are those after it."""

    stepped: bool
    learning_rate: float
    weights: list[float]
    came_back: list[float]  # gradients that came back to the loss: the scale, once


def train_scaled(step: Callable | None) -> list[ScaledStep]:
    """Twelve steps of a small regression, four of them overflowing, with a step of one's own.

    Args:
        step: Takes (loss, weights, optimizer, scheduler, scale, max_norm), says whether it
            stepped; `None` for PyTorch's scaler.
    """
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(16, n, generator=random) for n in (4, 1))
    weights = [torch.nn.Parameter(torch.full((4, 1), 0.7)), torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(weights, lr=0.4, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 0.8**done)
    scaler, scale, rows = torch.amp.GradScaler("cpu", init_scale=1024.0), 1024.0, []
    for index in range(12):
        loss = (x @ weights[0] + weights[1] - y).square().mean()
        before, came_back = weights[0].detach().clone(), []
        loss.register_hook(lambda grad, came_back=came_back: came_back.append(grad.item()))
        which, value = OVERFLOWING.get(index, ((), 0.0))
        hooks = [
            weights[i].register_hook(
                lambda grad, value=value: torch.cat([torch.full_like(grad[:1], value), grad[1:]])
            )
            for i in which
        ]
        if step is None:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            scaler.step(optimizer)
            scaler.update()
            stepped = not torch.equal(before, weights[0])
            if stepped:
                scheduler.step()
            optimizer.zero_grad()
        else:
            stepped = bool(call(step, loss, weights, optimizer, scheduler, scale, 1.0))
        for hook in hooks:
            hook.remove()
        scale /= 2 if index in OVERFLOWING else 1
        values = torch.cat([w.detach().flatten() for w in weights]).tolist()
        rows.append(ScaledStep(stepped, optimizer.param_groups[0]["lr"], values, came_back))
    return rows


def flawed_step(flaw: str) -> Callable:
    """A training step with one of `FLAWS`."""

    def step(loss, weights, optimizer, scheduler, scale, max_norm):
        (loss if flaw == "never scale" else loss * scale).backward()
        if flaw == "clip first":
            torch.nn.utils.clip_grad_norm_(weights, max_norm)
        for weight in weights:
            weight.grad /= 1.0 if flaw.startswith("never") else scale
        grads = [weight.grad for weight in weights]
        seen = {"first only": grads[:1], "last only": grads[-1:]}
        bad = {"NaN only": torch.isnan, "infinity only": torch.isinf}.get(
            flaw, lambda grad: ~torch.isfinite(grad)
        )
        finite = not any(bad(tensor).any() for tensor in seen.get(flaw, grads))
        if flaw not in ("clip first", "no clip"):
            torch.nn.utils.clip_grad_norm_(weights, max_norm)
        if finite or flaw in ("step anyway", "no if"):
            optimizer.step()
        if finite or flaw in ("schedule anyway", "no if"):
            scheduler.step()
        if flaw != "keep gradients" and (finite or flaw != "keep infinity"):
            optimizer.zero_grad()
        return finite

    return step


@check(asked=2)
def check_step(answer: Callable) -> Verdict:
    """Exercise 05.3: a step with a scaled loss, its parts in the order that PyTorch's needs."""
    ours, wanted = train_scaled(answer), train_scaled(None)
    different = _first_difference(ours, wanted)
    if different is None:
        return right(
            "twelve steps, four of them skipped: weights and learning rate are those "
            "of PyTorch's scaler."
        )
    for flaw, sentence in FLAWS.items():
        if _first_difference(ours, train_scaled(flawed_step(flaw))) is None:
            return not_yet(sentence)
    return not_yet(f"{different}.")


def _first_difference(ours: list[ScaledStep], wanted: list[ScaledStep]) -> str | None:
    """In which step, and in what, two runs begin to differ; `None` when they are the same."""
    for index, (one, other) in enumerate(zip(ours, wanted, strict=True)):
        if different := _difference(one, other):
            overflow = ", in which a gradient overflows," if index in OVERFLOWING else ""
            return f"after step {index + 1}{overflow} {different}"
    return None


def _difference(ours: ScaledStep, wanted: ScaledStep) -> str | None:
    if ours.stepped != wanted.stepped:
        return f"your function should return {wanted.stepped}, got {ours.stepped}"
    if not math.isclose(ours.learning_rate, wanted.learning_rate):
        return (
            f"the learning rate should be {wanted.learning_rate:.3g}, got {ours.learning_rate:.3g}"
        )
    if ours.came_back != wanted.came_back:
        return f"the loss should have been scaled by {wanted.came_back}, got {ours.came_back}"
    one, other = torch.tensor(ours.weights), torch.tensor(wanted.weights)
    if not torch.allclose(one, other, rtol=1e-5, atol=1e-6, equal_nan=True):
        return f"a weight should be {_pick(other, one, other)}, got {_pick(one, one, other)}"
    return None


def _pick(values: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> str:
    """The value where two tensors differ most, NaN most of all."""
    return f"{values[(one - other).abs().nan_to_num(math.inf).argmax()].item():.4g}"
