# %% tags=["hidden"]
"""Assignment on lesson 05: gradients in float16's range, the scaler's rule, the order of a step."""

from instructor.assignment import Assignment
from instructor.cases import Idea, exercise

EXERCISES = []

# %% [markdown]
# # Where did my gradient go? The assignment
#
# Four functions about float16 gradients and the scale that saves them. Lesson 05 is the background.
# Plain Python, no GPU, nothing to install.

# %% tags=["setup"]
import math

# %% [markdown]
# What becomes of gradients in float16? Multiply each by `scale`, then round: what is at most
# `2 ** -25` in size becomes 0, what is 65 520 or more becomes infinite. Between 0 and the smallest
# normal number, `2 ** -14`, lie subnormal numbers, and they survive. A gradient that was 0 before
# is not lost.


# %% tags=["exercise"]
def lost_gradients(gradients, scale):
    """[how many become 0, how many become infinite] in float16 under the scale."""
    ### BEGIN SOLUTION
    sizes = [abs(gradient * scale) for gradient in gradients if gradient]
    return [sum(size <= 2**-25 for size in sizes), sum(size >= 65520 for size in sizes)]
    ### END SOLUTION


# %% tags=["hidden"]
def losses(size=lambda gradient, scale: abs(gradient * scale), floor=2**-25, ceiling=65520,
           zeros=False):
    def mistaken(gradients, scale):
        sizes = [size(gradient, scale) for gradient in gradients if gradient or zeros]
        return [sum(s <= floor for s in sizes), sum(s >= ceiling for s in sizes)]
    return mistaken


def some_gradients(draw):
    power = draw.integer(4, 16)
    low = [draw.integer(17, 31) / 16 * 2.0 ** -draw.integer(27 + power, 32 + power)
           for _ in range(draw.integer(2, 7))]
    subnormal = [draw.integer(17, 31) / 16 * 2.0 ** -draw.integer(16 + power, 23 + power)
                 for _ in range(draw.integer(2, 7))]
    normal = [draw.integer(17, 31) / 16 * 2.0 ** -draw.integer(power, 10 + power)
              for _ in range(draw.integer(2, 7))]
    high = [draw.integer(17, 31) / 16 * 2.0 ** (draw.integer(16, 19) - power)
            for _ in range(draw.integer(2, 7))]
    signs = [-1 if number % 2 else 1 for number in range(40)]
    mixed = [*low, *subnormal, 0.0, *normal, *high]
    return [sign * number for sign, number in zip(signs, mixed, strict=False)], 2.0**power


LOST_MISTAKES = ("subnormals are lost", "divides by the scale", "counts zeros", "forgets the sign")
EXERCISES += [exercise(
    lost_gradients, title="What float16 loses", minutes=6, reread="lesson 05, section 1",
    ideas=[
        Idea("scale 1", ([2.0**-30, -(2.0**-30), 0.0, 2.0**-20, -1.0, 70000.0], 1.0), 0.5),
        Idea("scale 1024", ([2.0**-30, -(2.0**-40), 0.0, 2.0**-20, -1.0, 70.0], 1024.0), 0.5),
        Idea("your gradients", some_gradients, 0.5, tells=LOST_MISTAKES),
        Idea("other gradients", some_gradients, 2.5, hidden=True, tells=LOST_MISTAKES),
    ],
    mistakes={
        "subnormals are lost": ("below 2**-14 numbers lose bits, but become 0 only at 2**-25.",
                                losses(floor=2**-14)),
        "divides by the scale": ("the loss is multiplied by the scale, and so is each gradient.",
                                 losses(size=lambda gradient, scale: abs(gradient / scale))),
        "counts zeros": ("a gradient that was 0 before was not lost to float16.",
                         losses(zeros=True)),
        "forgets the sign": ("negative gradients have a size too: take the absolute value.",
                             losses(size=lambda gradient, scale: gradient * scale)),
    })]

# %% [markdown]
# The scaler at work. It starts with `[scale, good_steps]`. A step overflows if its scale is above
# `ceiling`. An overflow skips the step, halves the scale and starts the count of good steps again
# at 0; otherwise the step is good, and when `growth_interval` good steps in a row are reached, the
# scale doubles and the count starts again at 0.


# %% tags=["exercise"]
def run_scaler(state, steps, ceiling, growth_interval):
    """[scale, good_steps, skipped steps] after `steps` steps from `state`, [scale, good_steps]."""
    ### BEGIN SOLUTION
    scale, good_steps = state
    skipped = 0
    for _ in range(steps):
        if scale > ceiling:
            scale, good_steps, skipped = scale / 2, 0, skipped + 1
        else:
            good_steps += 1
            if good_steps == growth_interval:
                scale, good_steps = scale * 2, 0
    return [scale, good_steps, skipped]
    ### END SOLUTION


# %% tags=["hidden"]
def scaler(keep=False, late=0, once=False, back=2, counts_good=False, grows=True):
    def mistaken(state, steps, ceiling, growth_interval):
        (scale, good_steps), skipped = state, 0
        for _ in range(steps):
            if scale > ceiling:
                scale, good_steps = scale / back, good_steps if keep else 0
                skipped += 1
                continue
            good_steps += 1
            if grows and good_steps >= growth_interval + late:
                scale, good_steps = scale * 2, good_steps if once else 0
        return [scale, good_steps, steps - skipped if counts_good else skipped]
    return mistaken


def a_run(draw):
    interval, power = draw.integer(5, 19), draw.integer(17, 22)
    return [2.0**power, draw.integer(1, interval - 2)], draw.integer(40, 160), \
        2.0 ** draw.integer(10, 15) * draw.integer(9, 15) / 8, interval


def resumed(draw):
    _, steps, ceiling, interval = a_run(draw)
    saved = 2.0 ** (math.floor(math.log2(ceiling)) - draw.integer(2, 4))
    return [saved, draw.integer(1, interval - 1)], steps, ceiling, interval


SCALER_MISTAKES = ("keeps counting", "grows late", "counts good steps", "never grows")
EXERCISES += [exercise(
    run_scaler, title="The scaler at work", minutes=10, reread="lesson 05, section 3",
    ideas=[
        Idea("a fresh scaler", ([65536.0, 0], 60, 30000.0, 10), 0.5),
        Idea("a few steps", ([65536.0, 3], 4, 20000.0, 5), 0.25),
        Idea("room to grow", ([1024.0, 0], 25, 60000.0, 10), 0.25),
        Idea("your run", a_run, 0.5, tells=SCALER_MISTAKES),
        Idea("another run", a_run, 2, hidden=True, tells=SCALER_MISTAKES),
        Idea("resumed from a checkpoint", resumed, 1.5, hidden=True,
             tells=("grows late", "grows at every step")),
    ],
    mistakes={
        "keeps counting": ("an overflow starts the count of good steps again at 0.",
                           scaler(keep=True)),
        "grows late": ("this step is a good one too: count it before you compare.",
                       scaler(late=1)),
        "grows at every step": ("after growing, the count starts again at 0.", scaler(once=True)),
        "quarters": ("an overflow halves the scale, no more.", scaler(back=4)),
        "counts good steps": ("the third number is how many steps were skipped.",
                              scaler(counts_good=True)),
        "never grows": ("after `growth_interval` good steps in a row the scale doubles.",
                        scaler(grows=False)),
    })]

# %% [markdown]
# A step in the right order. `gradients` are what backward left: the true gradients times `scale`,
# or `None` where float16 overflowed. Unscale, look, clip, in this order: clipping multiplies *all*
# by `max_norm` / norm if their common norm (the root of the sum of squares) is above `max_norm`. A
# step with an overflow is skipped.


# %% tags=["exercise"]
def what_arrives(gradients, scale, max_norm):
    """The gradients that reach the optimizer, as a list; the empty list if the step is skipped."""
    ### BEGIN SOLUTION
    if None in gradients:
        return []
    true = [gradient / scale for gradient in gradients]
    norm = math.sqrt(sum(gradient**2 for gradient in true))
    factor = max_norm / norm if norm > max_norm else 1.0
    return [gradient * factor for gradient in true]
    ### END SOLUTION


# %% tags=["hidden"]
def clipped(numbers, max_norm):
    norm = math.sqrt(sum(number**2 for number in numbers))
    return [number * min(1.0, max_norm / norm) for number in numbers] if norm else numbers


def clip_first(gradients, scale, max_norm):
    if None in gradients:
        return []
    return [number / scale for number in clipped(gradients, max_norm)]


def never_unscaled(gradients, scale, max_norm):
    return [] if None in gradients else clipped(gradients, max_norm)


def each_alone(gradients, scale, max_norm):
    if None in gradients:
        return []
    return [max(-max_norm, min(max_norm, number / scale)) for number in gradients]


def never_clipped(gradients, scale, max_norm):
    return [] if None in gradients else [number / scale for number in gradients]


def always_to_the_norm(gradients, scale, max_norm):
    if None in gradients:
        return []
    norm = math.sqrt(sum((number / scale) ** 2 for number in gradients))
    return [number / scale * max_norm / norm for number in gradients]


def step_anyway(gradients, scale, max_norm):
    return clipped([(number or 0.0) / scale for number in gradients], max_norm)


def large_ones(draw):
    scale = 2.0 ** draw.integer(4, 12)
    return [n / 8 * scale for n in draw.several(draw.integer(3, 6), -60, 60)], scale, 1.0


def small_ones(draw):
    numbers, scale, _ = large_ones(draw)
    return [number / 64 for number in numbers], scale, draw.integer(8, 12) / 2


def overflowed(draw):
    numbers, scale, max_norm = large_ones(draw)
    return [*numbers[:2], None, *numbers[2:]], scale, max_norm


LARGE_MISTAKES = ("clips first", "clips each alone", "never clips")
EXERCISES += [exercise(
    what_arrives, title="The right order", minutes=8, reread="lesson 05, section 4",
    rel_tolerance=1e-9,
    ideas=[
        Idea("3, 4 and a scale of 1024", ([3072.0, 4096.0], 1024.0, 1.0), 0.5),
        Idea("an overflow", ([3072.0, None], 1024.0, 1.0), 0.5),
        Idea("a short gradient", ([0.5, 0.25], 2.0, 1.0), 0.5),
        Idea("your gradients", large_ones, 0.5, tells=LARGE_MISTAKES),
        Idea("other gradients", large_ones, 1.5, hidden=True, tells=LARGE_MISTAKES),
        Idea("other short gradients", small_ones, 1, hidden=True,
             tells=("clips first", "never unscales", "stretches")),
        Idea("another overflow", overflowed, 0.5, hidden=True, tells=("steps anyway",)),
    ],
    mistakes={
        "clips first": ("unscale before you clip: the norm is `scale` times too large until then.",
                        clip_first),
        "never unscales": ("divide the gradients by the scale, or the update is that much too "
                           "large.", never_unscaled),
        "clips each alone": ("clipping shortens the gradient as a whole: one factor for all.",
                             each_alone),
        "never clips": ("a norm above `max_norm` has to be brought down to it.", never_clipped),
        "stretches": ("a short gradient stays as it is; clipping only shortens.",
                      always_to_the_norm),
        "steps anyway": ("an overflow skips the whole step: nothing reaches the optimizer.",
                         step_anyway),
    })]

# %% [markdown]
# And the schedule. Warm-up raises the rate to `peak` over `warmup` updates: the first update has
# `peak / warmup`, the second twice that, until it stays at `peak`. It moves with the *optimizer*:
# `skipped[i]` says whether step *i* was skipped. A skipped step uses no rate.


# %% tags=["exercise"]
def rates(skipped, peak, warmup):
    """Learning rates of the updates that happened, in order."""
    ### BEGIN SOLUTION
    updates = sum(not skip for skip in skipped)
    return [peak * min(1.0, (done + 1) / warmup) for done in range(updates)]
    ### END SOLUTION


# %% tags=["hidden"]
def rates_at(steps, shift=1):
    def mistaken(skipped, peak, warmup):
        return [peak * min(1.0, (done + shift) / warmup) for done in steps(skipped)]
    return mistaken


def happened(skipped):
    return range(sum(not skip for skip in skipped))


def some_skipped(draw):
    steps = draw.integer(9, 16)
    gaps = draw.several(draw.integer(2, 4), 0, 6)
    return [step in gaps for step in range(steps)], draw.integer(1, 40) / 10_000, \
        draw.integer(5, 12)


EXERCISES += [exercise(
    rates, title="The schedule waits", minutes=5, reread="lesson 05, section 4",
    rel_tolerance=1e-9,
    ideas=[
        Idea("the first two skipped", ([True, True, False, False, False], 0.001, 2), 0.5),
        Idea("your steps", some_skipped, 0.5),
        Idea("other steps", some_skipped, 1.5, hidden=True,
             tells=("moves on in skipped steps", "beyond the peak")),
        Idea("more steps", some_skipped, 1.5, hidden=True),
    ],
    mistakes={
        "moves on in skipped steps": (
            "the schedule waits while steps are skipped, or the warm-up is over too early.",
            rates_at(lambda skipped: [step for step, skip in enumerate(skipped) if not skip])),
        "a rate for skipped steps": (
            "a skipped step makes no update: leave it out.",
            rates_at(lambda skipped: range(len(skipped)))),
        "starts at 0": ("here the first update has `peak / warmup`, not 0.",
                        rates_at(happened, shift=0)),
        "beyond the peak": ("after the warm-up the rate stays at `peak`.",
                            lambda skipped, peak, warmup: [
                                peak * (done + 1) / warmup for done in happened(skipped)]),
    })]

# %% tags=["hidden"]
ASSIGNMENT = Assignment("loss_scaling", "Where did my gradient go?", "lesson 05", tuple(EXERCISES))
