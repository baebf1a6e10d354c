# %% tags=["hidden"]
"""Exercise of the assignment on lesson 03: warm-up."""

from instructor.cases import Idea, exercise

# %% [markdown]
# The learning rate climbs from 0 to its peak during the warm-up, then falls in a straight line to
# 0. It counts optimizer steps: `step` of them have been done when the next one asks.
#
# - Warm-up has `warmup_percent` of `steps`, rounded up to a whole step.
# - Until then the rate is the peak times `step` / warm-up.
# - After it, the peak times what is left of the steps after the warm-up, by their number.


# %% tags=["exercise"]
def learning_rate(step, steps, warmup_percent, peak):
    """Learning rate of the update that comes after `step` updates; 0 <= step < steps."""
    ### BEGIN SOLUTION
    warmup = -(-warmup_percent * steps // 100)
    if step < warmup:
        return peak * step / warmup
    return peak * (steps - step) / (steps - warmup)
    ### END SOLUTION


# %% tags=["hidden"]
def rate(warmup_of=lambda percent, steps: -(-percent * steps // 100), shift=0, falls=True):
    def mistaken(step, steps, percent, peak):
        warmup, step = warmup_of(percent, steps), step + shift
        if step < warmup:
            return peak * step / warmup
        return peak * (steps - step) / (steps - warmup) if falls else peak
    return mistaken


def climbing(draw):
    hundreds, percent = draw.integer(4, 30), draw.integer(3, 9)
    steps = 100 * hundreds + draw.integer(1, 9)
    return draw.integer(2, percent * steps // 100 - 2), steps, percent, draw.integer(1, 9) / 10_000


def falling(draw):
    _, steps, percent, peak = climbing(draw)
    return draw.integer(steps // 2, steps - 2), steps, percent, peak


EXERCISE = exercise(
    learning_rate, title="Warm-up", minutes=8, reread="lesson 03, section 1", rel_tolerance=1e-9,
    ideas=[
        Idea("half-way up", (15, 1000, 3, 2e-4), 0.25),
        Idea("the very first update", (0, 1000, 3, 2e-4), 0.25),
        Idea("your climb", climbing, 0.5, tells=("counts from 1", "no warm-up",
                                                 "rounds the warm-up down")),
        Idea("your descent", falling, 0.5, tells=("never falls", "no warm-up")),
        Idea("another climb", climbing, 1.25, hidden=True,
             tells=("counts from 1", "rounds the warm-up down")),
        Idea("another descent", falling, 1.25, hidden=True, tells=("never falls", "no warm-up")),
    ],
    mistakes={
        "counts from 1": ("`step` updates have been done before this one: the first asks with 0 "
                          "and gets a rate of 0.", rate(shift=1)),
        "no warm-up": ("the rate starts at 0 and climbs; you start at the peak.",
                       lambda step, steps, percent, peak: peak * (steps - step) / steps),
        "never falls": ("after the warm-up the rate falls in a straight line, to 0 at `steps`.",
                        rate(falls=False)),
        "rounds the warm-up down": ("a part of a warm-up step counts as a whole one: round up.",
                                    rate(warmup_of=lambda percent, steps: percent * steps // 100)),
    })
