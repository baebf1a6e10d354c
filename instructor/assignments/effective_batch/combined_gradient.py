# %% tags=["hidden"]
"""Exercise of the assignment on lesson 03: token-weighted gradients, over ranks."""

from instructor.cases import Idea, exercise

# %% [markdown]
# The same for gradients, and over ranks. `ranks` is a list with one entry per rank; an entry is a
# list of micro batches; a micro batch is `[tokens, gradient]`, where `gradient` is the list of
# numbers that `backward()` of its *mean* loss left. Return the gradient of the mean loss over all
# labelled tokens of all ranks, as a list.


# %% tags=["exercise"]
def combined_gradient(ranks):
    """Gradient of the mean over all labelled tokens of all ranks: a list of numbers."""
    ### BEGIN SOLUTION
    micro_batches = [micro_batch for rank in ranks for micro_batch in rank]
    total = sum(tokens for tokens, _ in micro_batches)
    combined = [0.0] * len(micro_batches[0][1])
    for tokens, gradient in micro_batches:
        for position, number in enumerate(gradient):
            combined[position] += number * tokens / total
    return combined
    ### END SOLUTION


# %% tags=["hidden"]
def weighted(micro_batches, weights):
    columns = zip(*(gradient for _, gradient in micro_batches), strict=True)
    return [sum(w * n for w, n in zip(weights, column, strict=True)) for column in columns]


def of_rank(rank, weight=lambda tokens, total, count: tokens / total):
    total = sum(tokens for tokens, _ in rank)
    return weighted(rank, [weight(tokens, total, len(rank)) for tokens, _ in rank])


def mean_of_ranks(ranks, of=of_rank):
    return [sum(column) / len(ranks) for column in zip(*map(of, ranks), strict=True)]


def everything(ranks):
    return [micro_batch for rank in ranks for micro_batch in rank]


def gradients(draw):
    width = draw.integer(2, 4)
    return ([[[draw.integer(1, 600), [n / 32 for n in draw.several(width, -160, 160)]]
              for _ in range(draw.integer(2, 4))] for _ in range(draw.integer(2, 3))],)


GRADIENT_MISTAKES = ("mean of means", "each rank by its own tokens", "adds the gradients",
                     "divides once more")
EXERCISE = exercise(
    combined_gradient, title="Token-weighted gradients, over ranks", minutes=10,
    reread='lesson 03, section 2 and "Two processes, one update"', rel_tolerance=1e-7,
    ideas=[
        Idea("one rank", ([[[4, [1.0, 0.0]], [1, [5.0, 10.0]]]],), 0.5),
        Idea("your ranks", gradients, 0.5, tells=GRADIENT_MISTAKES),
        Idea("other ranks", gradients, 2, hidden=True, tells=GRADIENT_MISTAKES),
        Idea("more ranks", gradients, 2, hidden=True, tells=GRADIENT_MISTAKES),
    ],
    mistakes={
        "mean of means": (
            "every micro batch counts the same there, long or short; weigh by its tokens.",
            lambda ranks: of_rank(everything(ranks), lambda tokens, total, count: 1 / count)),
        "each rank by its own tokens": (
            "the tokens of *all* ranks are the divisor; a mean of the ranks' means is the old bug "
            "one floor up.", mean_of_ranks),
        "adds the gradients": (
            "a plain sum grows with the number of micro batches; weigh each by its share of the "
            "tokens.", lambda ranks: of_rank(everything(ranks), lambda *_: 1)),
        "divides once more": (
            "weighted by all tokens it is already right: do not divide by the number of ranks "
            "again.", lambda ranks: [n / len(ranks) for n in of_rank(everything(ranks))]),
    })
