# %% tags=["hidden"]
"""Exercise of the assignment on lesson 03: the formula, backwards."""

from instructor.cases import Idea, exercise

from .effective_batch_size import split

# %% [markdown]
# The same formula, solved for the micro batch. A paper reports an effective batch, and you want
# exactly that one. Not every split can make it; then the answer is 0.


# %% tags=["exercise"]
def micro_batch_for(effective_batch_size, gradient_accumulation_steps, world_size):
    """The micro batch that makes exactly the effective batch; 0 if no whole number does."""
    ### BEGIN SOLUTION
    micro, rest = divmod(effective_batch_size, gradient_accumulation_steps * world_size)
    return micro if rest == 0 else 0
    ### END SOLUTION


# %% tags=["hidden"]
def whole(draw):
    micro, accumulation, ranks = split(draw)
    return micro * accumulation * ranks, accumulation, ranks


def not_whole(draw):
    target, accumulation, ranks = whole(draw)
    return target + draw.integer(1, accumulation * ranks - 1), accumulation, ranks


EXERCISE = exercise(
    micro_batch_for, title="The formula, backwards", minutes=3, reread="lesson 03, section 1",
    ideas=[
        Idea("the paper's 32", (32, 16, 1), 0.5),
        Idea("a split that cannot make it", (100, 8, 2), 0.5),
        Idea("your cluster", whole, 0.5, tells=("forgets the ranks",)),
        Idea("another cluster", whole, 1, hidden=True, tells=("forgets the ranks",)),
        Idea("another split that cannot make it", not_whole, 0.5, hidden=True,
             tells=("rounds down", "rounds up")),
    ],
    mistakes={
        "rounds down": ("if it does not divide evenly, the rounded micro batch trains on another "
                        "batch than the paper's; return 0.",
                        lambda target, accumulation, ranks: target // (accumulation * ranks)),
        "rounds up": ("a micro batch rounded up makes a batch larger than the paper's; return 0 "
                      "when it does not divide evenly.",
                      lambda target, accumulation, ranks: -(-target // (accumulation * ranks))),
        "forgets the ranks": ("the batch is shared by all ranks: divide by `world_size` too.",
                              lambda target, accumulation, ranks:
                              0 if target % accumulation else target // accumulation),
    })
