# %% tags=["hidden"]
"""Exercise of the assignment on lesson 03: tokens per step."""

import math

from instructor.cases import Idea, exercise

from .effective_batch_size import split

# %% [markdown]
# How many tokens does a step see, and how many steps does a budget of tokens need? All sequences
# are packed to `sequence_length`, so there is no padding.


# %% tags=["exercise"]
def steps_for(token_budget, micro_batch_size, gradient_accumulation_steps, world_size,
              sequence_length):
    """[tokens_per_step, optimizer_steps]: the fewest steps that train on `token_budget` tokens."""
    ### BEGIN SOLUTION
    tokens = micro_batch_size * gradient_accumulation_steps * world_size * sequence_length
    return [tokens, -(-token_budget // tokens)]
    ### END SOLUTION


# %% tags=["hidden"]
def with_tokens(tokens_of):
    def mistaken(budget, *factors):
        tokens = tokens_of(*factors)
        return [tokens, -(-budget // tokens)]
    return mistaken


def token_budget(draw):
    """A few million tokens at most: who counts them one by one is right too, and slow."""
    micro, accumulation, ranks = split(draw)
    length = draw.integer(32, 256, 32)
    tokens = micro * accumulation * ranks * length
    return draw.integer(4, 12) * tokens + draw.integer(1, tokens - 1), micro, accumulation, \
        ranks, length


def whole_steps(draw):
    budget, *factors = token_budget(draw)
    tokens = math.prod(factors)
    return budget // tokens * tokens, *factors


STEP_MISTAKES = ("rounds down", "forgets the ranks", "counts micro batches", "counts sequences")
EXERCISE = exercise(
    steps_for, title="Tokens per step", minutes=5, reread="lesson 03, section 1",
    ideas=[
        Idea("a million tokens on one T4", (1_000_000, 2, 16, 1, 1024), 0.5),
        Idea("your budget", token_budget, 0.5, tells=STEP_MISTAKES),
        Idea("another budget", token_budget, 2, hidden=True, tells=STEP_MISTAKES),
        Idea("a budget without a rest", whole_steps, 1, hidden=True, tells=STEP_MISTAKES[1:]),
    ],
    mistakes={
        "rounds down": ("the last step has to happen too, or some tokens are never seen: round "
                        "up.", lambda budget, micro, accumulation, ranks, length:
                        [micro * accumulation * ranks * length,
                         budget // (micro * accumulation * ranks * length)]),
        "forgets the ranks": ("all ranks train in the same step; multiply by `world_size`.",
                              with_tokens(lambda micro, accumulation, ranks, length:
                                          micro * accumulation * length)),
        "counts micro batches": (
            "an optimizer step comes after `gradient_accumulation_steps` micro batches.",
            with_tokens(lambda micro, accumulation, ranks, length: micro * ranks * length)),
        "counts sequences": ("those are sequences; each has `sequence_length` tokens.",
                             with_tokens(lambda micro, accumulation, ranks, length:
                                         micro * accumulation * ranks)),
    })
