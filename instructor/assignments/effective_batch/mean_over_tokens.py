# %% tags=["hidden"]
"""Exercise of the assignment on lesson 03: token-weighted loss."""

from instructor.cases import Idea, exercise

# %% [markdown]
# Token weighting. Each micro batch reports the *mean* loss over its labelled tokens, and their
# number. What would one large batch have reported? A micro batch without any labelled token has
# the mean `None`: 0 divided by 0.


# %% tags=["exercise"]
def mean_over_tokens(means, tokens):
    """Mean loss over all labelled tokens; at least one micro batch has some."""
    ### BEGIN SOLUTION
    total = sum(mean * count for mean, count in zip(means, tokens, strict=True) if count)
    return total / sum(tokens)
    ### END SOLUTION


# %% tags=["hidden"]
def labelled(means):
    return [mean for mean in means if mean is not None]


def uneven(draw):
    count = draw.integer(3, 6)
    means = [number / 64 for number in draw.several(count, 20, 400)]
    return means, draw.several(count, 1, 900)


def with_an_empty_one(draw):
    means, tokens = uneven(draw)
    return [*means[:1], None, *means[1:]], [*tokens[:1], 0, *tokens[1:]]


LOSS_MISTAKES = ("mean of means", "adds the means", "never divides")
EXERCISE = exercise(
    mean_over_tokens, title="Token-weighted loss", minutes=5, reread="lesson 03, section 2",
    rel_tolerance=1e-9,
    ideas=[
        Idea("4 tokens and 1", ([1.0, 5.0], [4, 1]), 0.5),
        Idea("your micro batches", uneven, 0.5, tells=LOSS_MISTAKES),
        Idea("a micro batch without labels", ([2.0, None, 3.0], [3, 0, 1]), 0.5,
             tells=("counts the empty one",)),
        Idea("other micro batches", uneven, 1.5, hidden=True, tells=LOSS_MISTAKES),
        Idea("others, one without labels", with_an_empty_one, 1, hidden=True,
             tells=("mean of means",)),
    ],
    mistakes={
        "mean of means": (
            "each micro batch gets the same say there; each *token* should: weigh a mean by its "
            "tokens.", lambda means, tokens: sum(labelled(means)) / len(labelled(means))),
        "adds the means": ("a sum of means grows with the number of micro batches; divide.",
                           lambda means, tokens: sum(labelled(means))),
        "never divides": (
            "that is the sum over tokens; divide by all labelled tokens.",
            lambda means, tokens: sum(m * n for m, n in zip(means, tokens, strict=True) if n)),
        "counts the empty one": (
            "a micro batch without labels has no say, and is not one more to divide by.",
            lambda means, tokens: sum(labelled(means)) / len(means)),
    })
