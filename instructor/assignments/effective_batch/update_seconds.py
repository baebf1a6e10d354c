# %% tags=["hidden"]
"""Exercise of the assignment on lesson 03: T4 or A10: how long is an update?."""

from instructor.cases import Idea, exercise

# %% [markdown]
# A T4 with 2 x 16 against an A10 with 8 x 4. With full checkpointing and frozen 16-bit weights, a
# micro batch runs forward, forward again and backward: 6 floating-point operations per parameter
# and token, and every weight (2 bytes) is read 3 times. It takes whichever is longer, computing or
# reading. Data sheets: T4 65 TFLOP/s and 320 GB/s, A10 125 TFLOP/s and 600 GB/s; T is `10**12`, G
# is `10**9`.


# %% tags=["exercise"]
def update_seconds(micro_batch_size, gradient_accumulation_steps, sequence_length, parameters,
                   tflops_per_s, gb_per_s):
    """Seconds of one optimizer step, at the data sheet's peaks; the optimizer itself is free."""
    ### BEGIN SOLUTION
    tokens = micro_batch_size * sequence_length
    computing = 6 * parameters * tokens / (tflops_per_s * 10**12)
    reading = 3 * 2 * parameters / (gb_per_s * 10**9)
    return gradient_accumulation_steps * max(computing, reading)
    ### END SOLUTION


# %% tags=["hidden"]
def seconds(combine=max, giga=10**9):
    def mistaken(micro, accumulation, length, parameters, tflops, gb):
        computing = 6 * parameters * micro * length / (tflops * 10**12)
        return accumulation * combine(computing, 6 * parameters / (gb * giga))
    return mistaken


T4, A10 = (65, 320), (125, 600)


def computing_run(draw):
    card = draw.choice((T4, A10))
    return draw.integer(2, 8), draw.integer(2, 16), draw.integer(1024, 4096, 128), \
        draw.integer(1000, 8000) * 10**6, *card


def reading_run(draw):
    card = draw.choice((T4, A10))
    return 1, draw.integer(8, 32), draw.integer(48, 176, 8), draw.integer(1000, 8000) * 10**6, *card


EXERCISE = exercise(
    update_seconds, title="T4 or A10: how long is an update?", minutes=8,
    reread='lesson 03, "Does it cost time?"', rel_tolerance=1e-6,
    ideas=[
        Idea("2 x 16 on a T4", (2, 16, 2048, 3_212_749_824, *T4), 0.5),
        Idea("8 x 4 on an A10", (8, 4, 2048, 3_212_749_824, *A10), 0.5),
        Idea("short sequences on a T4", (1, 32, 64, 3_212_749_824, *T4), 0.5),
        Idea("your run", computing_run, 0.5, tells=("one micro batch", "adds both")),
        Idea("another run", computing_run, 1, hidden=True, tells=("one micro batch", "adds both")),
        Idea("another run with short sequences", reading_run, 2, hidden=True,
             tells=("only computes", "adds both", "GiB for GB")),
    ],
    mistakes={
        "one micro batch": ("that is one micro batch; a step has `gradient_accumulation_steps`.",
                            lambda micro, accumulation, *others: seconds()(micro, 1, *others)),
        "adds both": ("the GPU reads while it computes: take the longer of the two, not the sum.",
                      seconds(combine=lambda a, b: a + b)),
        "only computes": ("with few tokens the weights cannot be read fast enough: compare with "
                          "the time for reading.", seconds(combine=lambda a, b: a)),
        "GiB for GB": ("data sheets count in GB, 10**9 bytes.", seconds(giga=2**30)),
    })
