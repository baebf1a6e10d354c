# %% tags=["hidden"]
"""Exercise of the assignment on lesson 03: T4 or A10: the verdict."""

from instructor.cases import Idea, exercise

# %% [markdown]
# And the verdict, with numbers. `t4` and `a10` are lists `[micro_batch_size,
# gradient_accumulation_steps, tokens_per_second, budget_mib]`, measured or estimated; a run needs
# `fixed_mib` plus `sequence_mib` for each sequence of its micro batch. `weighting` is `"tokens"`
# (an update divides by all its labelled tokens) or `"micro batches"` (mean of means, and answers
# have uneven lengths). Return a dictionary:
#
# - `"fits"`: `[does it fit the T4, does it fit the A10]`
# - `"same_update"`: whether both cards compute the same gradient from the same data, to rounding
# - `"times_faster"`: the A10's tokens per second by the T4's
# - `"update_ratio"`: how many times as long an *update* takes on the T4, if all sequences have the
#   same length


# %% tags=["exercise"]
def compare_cards(t4, a10, fixed_mib, sequence_mib, weighting):
    """{"fits": [bool, bool], "same_update": bool, "times_faster": ..., "update_ratio": ...}."""
    ### BEGIN SOLUTION
    fits = [fixed_mib + micro * sequence_mib <= budget for micro, _, _, budget in (t4, a10)]
    batches = [micro * accumulation for micro, accumulation, _, _ in (t4, a10)]
    times_faster = a10[2] / t4[2]
    return {
        "fits": fits,
        "same_update": batches[0] == batches[1] and weighting == "tokens",
        "times_faster": times_faster,
        "update_ratio": times_faster * batches[0] / batches[1],
    }
    ### END SOLUTION


# %% tags=["hidden"]
def verdict(size=lambda micro, accumulation: micro,
            same=lambda t4, a10, weighting: t4[0] * t4[1] == a10[0] * a10[1]
            and weighting == "tokens",
            update=lambda speed, t4, a10: speed * t4[0] * t4[1] / (a10[0] * a10[1])):
    def mistaken(t4, a10, fixed, each, weighting):
        speed = a10[2] / t4[2]
        return {"fits": [fixed + size(*card[:2]) * each <= card[3] for card in (t4, a10)],
                "same_update": same(t4, a10, weighting), "times_faster": speed,
                "update_ratio": update(speed, t4, a10)}
    return mistaken


def cards(draw, weighting="tokens", same_batch=True):
    times = draw.choice((2, 3, 4))
    micro, accumulation = draw.integer(1, 4), times * draw.integer(2, 6)
    larger = accumulation // times if same_batch else accumulation // times + draw.integer(1, 5)
    fixed, each = draw.integer(3000, 6000), draw.integer(300, 2000)
    t4 = [micro, accumulation, draw.integer(300, 700), 14_771]
    return t4, [micro * times, larger, draw.integer(800, 1900), 22_500], fixed, each, weighting


def by_micro_batches(draw):
    return cards(draw, "micro batches")


def other_batches(draw):
    return cards(draw, same_batch=False)


EXERCISE = exercise(
    compare_cards, title="T4 or A10: the verdict", minutes=8,
    reread='lesson 03, "Does it cost time?"',
    rel_tolerance=1e-9,
    ideas=[
        Idea("2 x 16 against 8 x 4", ([2, 16, 500, 14_771], [8, 4, 1000, 22_500], 5000, 1200,
                                      "tokens"), 0.5, tells=("memory follows the batch",)),
        Idea("mean of means", ([2, 16, 480, 14_771], [8, 4, 1100, 22_500], 5000, 2300,
                               "micro batches"), 0.5, tells=("any weighting",)),
        Idea("your two batches", other_batches, 0.5, tells=("compares tokens for updates",)),
        Idea("two other cards", cards, 1, hidden=True, tells=("quality follows the micro batch",)),
        Idea("two other batches", other_batches, 1, hidden=True,
             tells=("compares tokens for updates",)),
        Idea("another mean of means", by_micro_batches, 0.5, hidden=True, tells=("any weighting",)),
    ],
    mistakes={
        "memory follows the batch": (
            "activations follow the micro batch; accumulation costs no memory.",
            verdict(size=lambda micro, accumulation: micro * accumulation)),
        "quality follows the micro batch": (
            "with token weighting, equal effective batches give the same gradient, however they "
            "are split.", verdict(same=lambda t4, a10, weighting: t4[0] == a10[0])),
        "any weighting": (
            "a mean of means depends on how the batch is split; only token weighting does not.",
            verdict(same=lambda t4, a10, weighting: t4[0] * t4[1] == a10[0] * a10[1])),
        "compares tokens for updates": (
            "updates of different size take different time: the ratio of the times is the speeds' "
            "times that of the effective batches.",
            verdict(update=lambda speed, t4, a10: speed)),
    })
