# %% tags=["hidden"]
"""Exercise of the assignment on lesson 03: tokens and padding."""

from instructor.cases import Idea, exercise

# %% [markdown]
# Without packing, a micro batch is padded to its own longest sequence. `lengths` are the sequences
# of one step in their order; the first `micro_batch_size` of them are the first micro batch, and so
# on; the last one may be smaller. What does the GPU compute on, and how much of it is real?


# %% tags=["exercise"]
def real_and_padded(lengths, micro_batch_size):
    """[tokens, positions] of one step: real tokens, and positions with padding counted too."""
    ### BEGIN SOLUTION
    parts = [lengths[start:start + micro_batch_size]
             for start in range(0, len(lengths), micro_batch_size)]
    return [sum(lengths), sum(len(part) * max(part) for part in parts)]
    ### END SOLUTION


# %% tags=["hidden"]
def parts_of(lengths, size):
    return [lengths[start:start + size] for start in range(0, len(lengths), size)]


def ragged(draw):
    size = draw.integer(2, 5)
    return draw.several(size * draw.integer(2, 5) + draw.integer(1, size - 1), 20, 2048), size


def one_at_a_time(draw):
    return draw.several(draw.integer(3, 6), 20, 2048), 1


PAD_MISTAKES = ("pads to the longest of all", "drops the rest", "fills the last one")
EXERCISE = exercise(
    real_and_padded, title="Tokens and padding", minutes=6, reread='lesson 03, "How many fit?"',
    ideas=[
        Idea("two micro batches", ([100, 300, 50, 70], 2), 0.5),
        Idea("your step", ragged, 0.5, tells=PAD_MISTAKES),
        Idea("another step", ragged, 1.5, hidden=True, tells=PAD_MISTAKES),
        Idea("one at a time", one_at_a_time, 0.5, hidden=True, tells=PAD_MISTAKES[:1]),
    ],
    mistakes={
        "pads to the longest of all": (
            "each micro batch is padded to its *own* longest sequence, a short one to less.",
            lambda lengths, size: [sum(lengths), len(lengths) * max(lengths)]),
        "drops the rest": (
            "sequences that fill no whole micro batch are trained too.",
            lambda lengths, size: [
                sum(lengths[:len(lengths) // size * size]),
                sum(size * max(part) for part in parts_of(lengths, size) if len(part) == size)]),
        "fills the last one": (
            "the last micro batch is smaller, nobody adds empty sequences: count its own.",
            lambda lengths, size: [sum(lengths),
                                   sum(size * max(part) for part in parts_of(lengths, size))]),
        "counts no padding": (
            "shorter sequences are filled up to the longest of their micro batch; those positions "
            "cost time and memory.", lambda lengths, size: [sum(lengths), sum(lengths)]),
    })
