# %% tags=["hidden"]
"""Exercise of the assignment on lesson 03: epochs with a rest."""

from instructor.cases import Idea, exercise

# %% [markdown]
# Now the schedule. `examples` do not always make whole updates: an epoch ends with an update of
# what is left, and the next epoch starts with a fresh one.


# %% tags=["exercise"]
def last_update(examples, effective_batch_size, epochs):
    """[optimizer steps of all epochs, examples in the last one]."""
    ### BEGIN SOLUTION
    steps = epochs * -(-examples // effective_batch_size)
    return [steps, examples % effective_batch_size or effective_batch_size]
    ### END SOLUTION


# %% tags=["hidden"]
def epochs_with_a_rest(draw):
    size, epochs = draw.integer(16, 96), draw.integer(3, 6)
    return size * draw.integer(20, 200) + draw.integer(1, size // 2), size, epochs


def epochs_without(draw):
    size = draw.integer(16, 96)
    return size * draw.integer(20, 200), size, draw.integer(3, 6)


REST_MISTAKES = ("drops the rest", "runs on over epochs")
EXERCISE = exercise(
    last_update, title="Epochs with a rest", minutes=5, reread="lesson 03, exercise 03.3",
    ideas=[
        Idea("a rest of 4, twice", (100, 32, 2), 0.5),
        Idea("no rest", (96, 32, 2), 0.5),
        Idea("your data", epochs_with_a_rest, 0.5, tells=REST_MISTAKES),
        Idea("other data, with a rest", epochs_with_a_rest, 1.5, hidden=True, tells=REST_MISTAKES),
        Idea("other data, without", epochs_without, 1, hidden=True, tells=("a rest of 0",)),
    ],
    mistakes={
        "drops the rest": (
            "the examples left at the end of an epoch make an update too: round up.",
            lambda examples, size, epochs:
            [epochs * (examples // size), examples % size or size]),
        "runs on over epochs": (
            "an update does not reach into the next epoch: round up per epoch, then multiply.",
            lambda examples, size, epochs:
            [-(-epochs * examples // size), examples * epochs % size or size]),
        "a rest of 0": (
            "no update trains on 0 examples; without a rest the last one is whole.",
            lambda examples, size, epochs: [epochs * -(-examples // size), examples % size]),
    })
