# %% tags=["hidden"]
"""Exercise of the assignment on lesson 03: the largest micro batch."""

from instructor.assignment import TOO_MANY
from instructor.cases import Idea, Oracle, exercise

# %% [markdown]
# The largest micro batch, found by trying. A rank has to train `per_rank` sequences in a step, so
# only divisors of that make an exact batch. `fits(size)` says whether a micro batch of that size
# trains; what trains, trains in every smaller size too. Each question costs a run, so you may ask
# only a few times: five for the ten divisors of 48, one more than halving their list needs.


# %% tags=["exercise"]
def largest_micro_batch(per_rank, fits):
    """The largest divisor of `per_rank` that fits, 0 if not even 1 does; asks few questions."""
    ### BEGIN SOLUTION
    sizes = [size for size in range(1, per_rank + 1) if per_rank % size == 0]
    good, bad = -1, len(sizes)
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(sizes[middle]):
            good = middle
        else:
            bad = middle
    return sizes[good] if good >= 0 else 0
    ### END SOLUTION


# %% tags=["hidden"]
def divisors(number):
    return [size for size in range(1, number + 1) if number % size == 0]


def halving(sizes, fits):
    good, bad = -1, len(sizes)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(sizes[middle]) else (good, middle)
    return good, bad


def one_after_the_other(per_rank, fits):
    return max((size for size in divisors(per_rank) if fits(size)), default=0)


def one_too_many(per_rank, fits):
    _, bad = halving(divisors(per_rank), fits)
    return divisors(per_rank)[min(bad, len(divisors(per_rank)) - 1)]


def powers_of_two(per_rank, fits):
    sizes = [size for size in divisors(per_rank) if size & (size - 1) == 0]
    good, _ = halving(sizes, fits)
    return sizes[good] if good >= 0 else 0


def at_least_one(per_rank, fits):
    good, _ = halving(divisors(per_rank), fits)
    return divisors(per_rank)[max(good, 0)]


def a_card(draw):
    per_rank = draw.choice((60, 72, 84, 90, 96, 108, 120, 126, 132, 140, 144, 150, 156, 168, 180))
    return (per_rank,), draw.integer(3, per_rank // 2 - 1)


def a_full_card(draw):
    return (draw.choice((24, 36, 48, 60, 72, 96)),), 0


EXERCISE = exercise(
    largest_micro_batch, title="The largest micro batch", minutes=12,
    reread='lesson 03, "How many fit?" and exercise 03.4',
    ask=Oracle("fits", lambda per_rank: len(divisors(per_rank)).bit_length() + 1),
    ideas=[
        Idea("48 sequences, room for 13", ((48,), 13), 0.5),
        Idea("not even one fits", ((40,), 0), 0.5, tells=("at least one",)),
        Idea("everything fits", ((30,), 64), 0.25),
        Idea("your card", a_card, 0.75, tells=("one too many", "powers of two only")),
        Idea("another card", a_card, 1.5, hidden=True, tells=("one too many",
                                                              "powers of two only")),
        Idea("a smaller card", a_card, 1.5, hidden=True, tells=("one too many",)),
        Idea("a full card", a_full_card, 1, hidden=True, tells=("at least one",)),
    ],
    mistakes={
        "one too many": ("that is the first size that fails; return the last one that trained.",
                         one_too_many),
        "powers of two only": ("sizes between the powers of two divide the batch as well; look at "
                               "all divisors.", powers_of_two),
        "at least one": ("if not even 1 fits, the answer is 0; ask before you trust it.",
                         at_least_one),
        TOO_MANY: ("each question is a run on the GPU: halve the list of divisors, do not walk "
                   "through it, and ask about no other sizes.", one_after_the_other),
    })
