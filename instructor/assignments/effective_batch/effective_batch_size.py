# %% tags=["hidden"]
"""Exercise of the assignment on lesson 03: the formula."""

from instructor.cases import Idea, exercise

# %% [markdown]
# A warm-up. On how many sequences does one optimizer step train?


# %% tags=["exercise"]
def effective_batch_size(micro_batch_size, gradient_accumulation_steps, world_size):
    """Sequences that one optimizer step trains on, over all processes."""
    ### BEGIN SOLUTION
    return micro_batch_size * gradient_accumulation_steps * world_size
    ### END SOLUTION


# %% tags=["hidden"]
def split(draw):
    return draw.integer(2, 9), draw.integer(3, 24), draw.integer(2, 8)


EXERCISE = exercise(
    effective_batch_size, title="The formula", minutes=2, reread="lesson 03, section 1",
    ideas=[
        Idea("one T4", (2, 16, 1), 0.5),
        Idea("your cluster", split, 0.5, tells=("adds", "forgets the ranks")),
        Idea("another cluster", split, 1, hidden=True, tells=("adds", "forgets the ranks")),
    ],
    mistakes={
        "adds": ("the three factors multiply: each process runs every micro batch.",
                 lambda micro, accumulation, ranks: micro + accumulation + ranks),
        "forgets the ranks": ("each of `world_size` processes trains its own sequences; "
                              "multiply by it as well.",
                              lambda micro, accumulation, ranks: micro * accumulation),
        "forgets the accumulation": (
            "a step comes after `gradient_accumulation_steps` micro batches; multiply by it.",
            lambda micro, accumulation, ranks: micro * ranks),
    })
