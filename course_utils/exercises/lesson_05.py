"""The targets of lesson 05's exercises: PyTorch's own scaler, and gradients that are counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from course_utils.exercises.checks import Verdict, call, check, is_number, not_yet, right
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


@check
def check_best_scale(answer: float, gradients: Sequence[torch.Tensor]) -> Verdict:
    """Exercise 05.1: the largest power of two under which no gradient overflows float16."""
    if not is_number(answer) or answer <= 0 or math.frexp(answer)[0] != 0.5:
        return not_yet(f"a power of two is asked for, such as 2**10, got {answer!r}.")
    here, doubled = (land(gradients, "float16", scale) for scale in (answer, 2 * answer))
    if here.infinite:
        return not_yet(
            f"{here.infinite:.1g} of them overflow there, and one is enough to lose the step."
        )
    if not doubled.infinite:
        why = "that is where GradScaler starts, not where it ends; " if answer == 65536 else ""
        return not_yet(
            f"{why}twice the scale overflows nothing either, and saves more of the small ones."
        )
    return right(
        f"at 2**{int(math.log2(answer))} nothing overflows, and {here.zero:.2%} become "
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
        if not isinstance(state, (tuple, list)) or len(state) != 3:
            raise TypeError(f"three values are asked for, got {state!r}")
        states.append((float(state[0]), int(state[1]), bool(state[2])))
        scale, good_steps = state[:2]
    return states


@check
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


def train_scaled(step: Callable | None) -> list[tuple]:
    """Twelve steps of a small regression, four of them overflowing, with a step of one's own.

    Args:
        step: Takes (loss, weights, optimizer, scheduler, scale, max_norm), says whether it
            stepped; `None` for PyTorch's scaler.

    Returns:
        After each step: whether it stepped, the learning rate, the weights, and the gradients that
        came back to the loss: the scale, once.
    """
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(16, n, generator=random) for n in (4, 1))
    weights = [torch.nn.Parameter(torch.full((4, 1), 0.7)), torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(weights, lr=0.4, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 0.8**done)
    scaler, scale, rows = torch.amp.GradScaler("cpu", init_scale=1024.0), 1024.0, []
    for number in range(12):
        loss = (x @ weights[0] + weights[1] - y).square().mean()
        before, came_back = weights[0].detach().clone(), []
        loss.register_hook(lambda grad, came_back=came_back: came_back.append(grad.item()))
        which, value = OVERFLOWING.get(number, ((), 0.0))
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
        scale /= 2 if number in OVERFLOWING else 1
        rows.append(
            (
                stepped,
                optimizer.param_groups[0]["lr"],
                torch.cat([w.detach().flatten() for w in weights]).tolist(),
                came_back,
            )
        )
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
        if finite or flaw == "step anyway":
            optimizer.step()
        if finite or flaw == "schedule anyway":
            scheduler.step()
        if flaw != "keep gradients" and (finite or flaw != "keep infinity"):
            optimizer.zero_grad()
        return finite

    return step


@check
def check_step(answer: Callable) -> Verdict:
    """Exercise 05.3: a step with a scaled loss, its parts in the order that PyTorch's needs."""
    ours, wanted = train_scaled(answer), train_scaled(None)
    if _same(ours, wanted):
        return right(
            "twelve steps, four of them skipped: weights and learning rate are those "
            "of PyTorch's scaler."
        )
    for flaw, sentence in FLAWS.items():
        if _same(ours, train_scaled(flawed_step(flaw))):
            return not_yet(sentence)
    step = next(i for i in range(len(wanted)) if not _same(ours[i : i + 1], wanted[i : i + 1]))
    (stepped, rate, *_), (did, had, *_) = wanted[step], ours[step]
    return not_yet(
        f"step {step + 1} differs: (stepped, learning rate) should be "
        f"({stepped}, {rate:.3g}), got ({did}, {had:.3g}), or the weights are others."
    )


def _same(left: list[tuple], right: list[tuple]) -> bool:
    return all(
        a[0] == b[0]
        and math.isclose(a[1], b[1])
        and a[3] == b[3]
        and torch.allclose(
            torch.tensor(a[2]), torch.tensor(b[2]), rtol=1e-5, atol=1e-6, equal_nan=True
        )
        for a, b in zip(left, right, strict=True)
    )
