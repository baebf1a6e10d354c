# %% tags=["hidden"]
"""Assignment on lesson 03: effective batch size, accumulation, schedule, two cards.

An exercise a file; below stands their order. The notebook starts with the cells of this one.
"""

from instructor.assignment import Assignment

from . import (
    accumulation_on,
    combined_gradient,
    compare_cards,
    effective_batch_size,
    largest_micro_batch,
    last_line,
    last_update,
    learning_rate,
    mean_over_tokens,
    micro_batch_for,
    real_and_padded,
    split_for,
    steps_for,
    update_seconds,
)

ORDER = (
    effective_batch_size,
    micro_batch_for,
    split_for,
    accumulation_on,
    steps_for,
    real_and_padded,
    last_update,
    learning_rate,
    last_line,
    mean_over_tokens,
    combined_gradient,
    largest_micro_batch,
    update_seconds,
    compare_cards,
)

# %% [markdown]
# # How big is my batch, really? The assignment
#
# Fourteen functions about one question: on how many sequences does an update train, and what does
# that cost? Lesson 03 is the background. Plain Python, no GPU, nothing to install.

# %% tags=["setup"]
import math

# %% tags=["hidden"]
ASSIGNMENT = Assignment(
    "effective_batch", "How big is my batch, really?", "lesson 03",
    tuple(part.EXERCISE for part in ORDER))
