# %% tags=["hidden"]
"""Exercise of the assignment on lesson 03: a target under a memory budget."""

import math

from instructor.cases import Idea, exercise

# %% [markdown]
# Which split? Of the card's `budget_mib`, `fixed_mib` are taken whatever the batch (weights,
# adapters, optimizer state), and each sequence of a micro batch costs `sequence_mib` more. The
# batch must be *exactly* the target, on `world_size` such cards: take the largest micro batch that
# fits and makes that possible.


# %% tags=["exercise"]
def split_for(effective_batch_size, world_size, budget_mib, fixed_mib, sequence_mib):
    """[micro_batch_size, gradient_accumulation_steps] with the largest micro batch that fits.

    At least one sequence fits, and `world_size` divides `effective_batch_size`.
    """
    ### BEGIN SOLUTION
    per_rank = effective_batch_size // world_size
    most = (budget_mib - fixed_mib) // sequence_mib
    micro = max(size for size in range(1, min(most, per_rank) + 1) if per_rank % size == 0)
    return [micro, per_rank // micro]
    ### END SOLUTION


# %% tags=["hidden"]
def largest_divisor(number, most):
    return max(size for size in range(1, min(most, number) + 1) if number % size == 0)


def by_room(room, share=lambda target, ranks: target // ranks):
    """A wrong `split_for`: with another idea of how many sequences fit, or of a rank's share."""
    def mistaken(target, ranks, budget, fixed, each):
        per_rank = share(target, ranks)
        micro = largest_divisor(per_rank, room(budget, fixed, each))
        return [micro, per_rank // micro]
    return mistaken


def rounds_the_accumulation(target, ranks, budget, fixed, each):
    micro = min((budget - fixed) // each, target // ranks)
    return [micro, math.ceil(target / ranks / micro)]


def under_a_budget(draw):
    ranks, per_rank = draw.integer(2, 4), draw.choice((24, 30, 36, 40, 48, 56, 60, 72, 80, 84, 96))
    fixed, each, fitting = draw.integer(3000, 8000), draw.integer(180, 900), draw.integer(4, 23)
    return ranks * per_rank, ranks, fixed + fitting * each + draw.integer(0, each - 1), fixed, each


def with_room_to_spare(draw):
    ranks, per_rank = draw.integer(2, 4), draw.integer(3, 12)
    fixed, each = draw.integer(1000, 3000), draw.integer(100, 250)
    return ranks * per_rank, ranks, fixed + draw.integer(48, 90) * each, fixed, each


SPLIT_MISTAKES = ("rounds the accumulation up", "forgets what is there anyway",
                  "forgets the ranks")
EXERCISE = exercise(
    split_for, title="A target under a memory budget", minutes=10,
    reread="lesson 03, sections 3 and 4",
    ideas=[
        Idea("32 on one T4", (32, 1, 14000, 8000, 1100), 0.5),
        Idea("your cards", under_a_budget, 0.5, tells=SPLIT_MISTAKES),
        Idea("other cards", under_a_budget, 2, hidden=True, tells=SPLIT_MISTAKES),
        Idea("a smaller card", under_a_budget, 1, hidden=True, tells=SPLIT_MISTAKES),
        Idea("room for more than the batch", with_room_to_spare, 1, hidden=True,
             tells=("forgets the ranks", "always one at a time")),
    ],
    mistakes={
        "rounds the accumulation up": (
            "micro batch x accumulation x ranks has to be the target exactly; look for a micro "
            "batch that divides each rank's share.", rounds_the_accumulation),
        "forgets what is there anyway": (
            "weights and optimizer state are there whatever the batch; take `fixed_mib` off the "
            "budget first.", by_room(lambda budget, fixed, each: budget // each)),
        "forgets the ranks": (
            "each rank has to train only its share, the target divided by `world_size`.",
            by_room(lambda budget, fixed, each: (budget - fixed) // each,
                    lambda target, ranks: target)),
        "always one at a time": (
            "that fits, but larger micro batches fit as well, and are faster.",
            by_room(lambda budget, fixed, each: 1)),
    })
