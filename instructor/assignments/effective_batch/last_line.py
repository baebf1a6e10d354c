# %% tags=["hidden"]
"""Exercise of the assignment on lesson 03: the last line of the log."""

from instructor.cases import Idea, exercise

# %% [markdown]
# And the log. Trainer writes a line each time `logging_steps` divides the number of optimizer steps
# done. Training breaks off after the *last* line: how many examples has the model seen by then?


# %% tags=["exercise"]
def last_line(examples, micro_batch_size, gradient_accumulation_steps, epochs, logging_steps):
    """[lines, examples seen when the last one is written, counted again in each epoch].

    One process. An epoch ends with an update of what is left. There is at least one line.
    """
    ### BEGIN SOLUTION
    batch = micro_batch_size * gradient_accumulation_steps
    per_epoch = -(-examples // batch)
    lines = epochs * per_epoch // logging_steps
    whole_epochs, steps = divmod(lines * logging_steps, per_epoch)
    return [lines, whole_epochs * examples + steps * batch]
    ### END SOLUTION


# %% tags=["hidden"]
def logged(examples, micro, accumulation, epochs, every):
    batch = micro * accumulation
    lines = epochs * -(-examples // batch) // every
    return [lines, lines * every * batch]


def logged_in_micro_batches(examples, micro, accumulation, epochs, every):
    per_epoch = -(-examples // micro)
    lines = epochs * per_epoch // every
    whole_epochs, steps = divmod(lines * every, per_epoch)
    return [lines, whole_epochs * examples + steps * micro]


def logged_to_the_end(examples, micro, accumulation, epochs, every):
    return [epochs * -(-examples // (micro * accumulation)) // every, epochs * examples]


def a_run(draw):
    micro, accumulation = draw.integer(1, 6), draw.integer(4, 20)
    batch = micro * accumulation
    examples = batch * draw.integer(15, 60) + draw.integer(1, batch - 1)
    return examples, micro, accumulation, draw.integer(2, 4), draw.integer(5, 25)


LOG_MISTAKES = ("counts micro batches", "every update is whole", "trains to the end")
EXERCISE = exercise(
    last_line, title="The last line of the log", minutes=8, reread="lesson 03, section 1",
    ideas=[
        Idea("one epoch", (100, 2, 8, 1, 3), 0.5),
        Idea("your run", a_run, 0.5, tells=LOG_MISTAKES),
        Idea("another run", a_run, 1.5, hidden=True, tells=LOG_MISTAKES),
        Idea("a third run", a_run, 1.5, hidden=True, tells=LOG_MISTAKES),
    ],
    mistakes={
        "counts micro batches": (
            "`logging_steps` counts optimizer steps; a micro batch is no step.",
            logged_in_micro_batches),
        "every update is whole": (
            "the last update of an epoch has fewer examples: count whole epochs, then the steps "
            "after them.", logged),
        "trains to the end": (
            "steps after the last line are not asked for: training breaks off there.",
            logged_to_the_end),
    })
