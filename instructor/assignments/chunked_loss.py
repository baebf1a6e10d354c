# %% tags=["hidden"]
"""Assignment on lesson 06: the loss in chunks, the logits' bytes, and levers at several moments."""

from instructor.assignment import Assignment
from instructor.cases import Idea, exercise

EXERCISES = []

# %% [markdown]
# # What does the usual recipe waste? The assignment
#
# Three functions about what stands at the peak and need not. Lesson 06 is the background. Plain
# Python, no GPU, nothing to install.

# %% tags=["setup"]
import math
from itertools import combinations

# %% [markdown]
# The loss, some rows at a time. `logits[row][position]` lists a number for each token of the
# vocabulary, `labels[row][position]` is a token or -100, which is skipped. Position i predicts the
# label of position i + 1 of its row: the last position and the first label have no partner.
#
# Lay what is left of all rows one behind the other, and go through it `chunk_tokens` positions at a
# time; the last chunk may be smaller. The cross entropy of a position is log(sum of exp of its
# logits) minus the logit of its label. Give the mean over all labelled positions, and how many
# logits the largest chunk holds. At least one position is labelled.


# %% tags=["exercise"]
def loss_in_chunks(logits, labels, chunk_tokens):
    """[mean cross entropy, most logits at once], the loss taken chunk by chunk."""
    ### BEGIN SOLUTION
    rows = [one for row in logits for one in row[:-1]]
    targets = [label for row in labels for label in row[1:]]
    total, labelled, most = 0.0, 0, 0
    for start in range(0, len(rows), chunk_tokens):
        chunk = rows[start:start + chunk_tokens]
        most = max(most, sum(len(row) for row in chunk))
        for row, target in zip(chunk, targets[start:start + chunk_tokens], strict=True):
            if target != -100:
                total += math.log(sum(math.exp(number) for number in row)) - row[target]
                labelled += 1
    return [total / labelled, most]
    ### END SOLUTION


# %% tags=["hidden"]
def shifted(logits, labels):
    return [pair for row, wanted in zip(logits, labels, strict=True)
            for pair in zip(row[:-1], wanted[1:], strict=True)]


def not_shifted(logits, labels):
    return [pair for row, wanted in zip(logits, labels, strict=True)
            for pair in zip(row, wanted, strict=True)]


def across_rows(logits, labels):
    rows = [one for row in logits for one in row]
    targets = [label for row in labels for label in row]
    return [*zip(rows[:-1], targets[1:], strict=True)]


def entropy(row, target):
    return math.log(sum(math.exp(number) for number in row)) - row[target]


def total_of(pairs):
    return sum(entropy(row, target) for row, target in pairs if target != -100)


def labelled_in(pairs):
    return sum(target != -100 for _, target in pairs)


def mean_of(pairs):
    return total_of(pairs) / labelled_in(pairs)


def most_in(pairs, chunk_tokens):
    return min(len(pairs), chunk_tokens) * len(pairs[0][0])


def loss_mistake(value, pairs_of=shifted):
    def mistaken(logits, labels, chunk_tokens):
        pairs = pairs_of(logits, labels)
        chunks = [pairs[n:n + chunk_tokens] for n in range(0, len(pairs), chunk_tokens)]
        return [value(pairs, chunks), most_in(shifted(logits, labels), chunk_tokens)]
    return mistaken


def mean_of_means(pairs, chunks):
    means = [mean_of(chunk) if labelled_in(chunk) else 0.0 for chunk in chunks]
    return sum(means) / len(means)


def without_the_rest(pairs, chunks):
    size = len(chunks[0])
    return sum(total_of(chunk) for chunk in chunks if len(chunk) == size) / labelled_in(pairs)


def positions_at_once(logits, labels, chunk_tokens):
    pairs = shifted(logits, labels)
    return [mean_of(pairs), min(len(pairs), chunk_tokens)]


def all_at_once(logits, labels, chunk_tokens):
    pairs = shifted(logits, labels)
    return [mean_of(pairs), sum(len(one) for row in logits for one in row)]


def some_rows(draw):
    rows, length, vocabulary = draw.integer(2, 3), draw.integer(5, 7), draw.integer(3, 4)
    logits = [[[draw.integer(-12, 12) / 4 for _ in range(vocabulary)] for _ in range(length)]
              for _ in range(rows)]
    labels = [[draw.integer(0, vocabulary - 1) for _ in range(length)] for _ in range(rows)]
    labels[0][:length // 2] = [-100] * (length // 2)
    positions = rows * (length - 1)
    return logits, labels, draw.choice([n for n in range(3, positions) if positions % n])


LOSS_MISTAKES = ("not shifted", "shifts across rows", "mean of means", "all positions", "a sum",
                 "without the rest", "all logits at once")
TWO_ROWS = [[[2.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.5, 1.5, 0.0]],
            [[1.0, -1.0, 0.0], [0.0, 2.0, 0.5], [3.0, 0.0, 0.0]]]
EXERCISES += [exercise(
    loss_in_chunks, title="The loss, some rows at a time", minutes=14,
    reread="lesson 06, section 3", rel_tolerance=1e-9,
    ideas=[
        Idea("two rows", (TWO_ROWS, [[-100, -100, 1], [0, 1, 2]], 3), 0.5),
        Idea("your rows", some_rows, 1, tells=LOSS_MISTAKES),
        Idea("other rows", some_rows, 3.5, hidden=True, tells=LOSS_MISTAKES),
        Idea("a chunk larger than all", lambda draw: (*some_rows(draw)[:2], draw.integer(40, 90)),
             1, hidden=True),
    ],
    mistakes={
        "not shifted": ("a position predicts the next one's label, not its own.",
                        loss_mistake(lambda pairs, _: mean_of(pairs), not_shifted)),
        "shifts across rows": (
            "the last position of a row does not predict the next row: shift inside the rows.",
            loss_mistake(lambda pairs, _: mean_of(pairs), across_rows)),
        "mean of means": (
            "a chunk of few labels gets as much say as a full one: sum, and divide once.",
            loss_mistake(mean_of_means)),
        "all positions": ("divide by the positions whose label is not -100.",
                          loss_mistake(lambda pairs, _: total_of(pairs) / len(pairs))),
        "a sum": ("that is the sum; the mean over the labelled positions is asked for.",
                  loss_mistake(lambda pairs, _: total_of(pairs))),
        "without the rest": ("the last chunk may be smaller, and counts.",
                             loss_mistake(without_the_rest)),
        "all logits at once": ("only one chunk's logits are there at a time.", all_at_once),
        "positions, not logits": ("a position has a logit for each token of the vocabulary.",
                                  positions_at_once),
    })]

# %% [markdown]
# What the logits take at the peak, where the loss goes backward: three copies of them in float32.
# In a batch of `rows` sequences of `length` tokens each position has logits, a row's last one too.
# A loss in chunks has the three copies for one chunk at a time: `chunk_tokens` positions, counted
# over the whole batch.


# %% tags=["exercise"]
def logits_bytes(rows, length, vocabulary, chunk_tokens):
    """[bytes of the usual loss, bytes of the loss in chunks], at the peak."""
    ### BEGIN SOLUTION
    positions = rows * length
    return [3 * 4 * vocabulary * count for count in (positions, min(positions, chunk_tokens))]
    ### END SOLUTION


# %% tags=["hidden"]
def some_logits(draw):
    return draw.integer(2, 8), 256 * draw.integer(2, 8), 1000 * draw.integer(30, 150), \
        64 * draw.integer(2, 7)


def a_short_batch(draw):
    return draw.integer(2, 4), draw.integer(20, 60), 1000 * draw.integer(30, 150), \
        1024 * draw.integer(1, 4)


def logits_mistake(copies=12, per_row=False, at_most=min, positions_of=lambda r, n: r * n):
    def mistaken(rows, length, vocabulary, chunk_tokens):
        positions = positions_of(rows, length)
        chunk = at_most(rows * length, chunk_tokens) * (rows if per_row else 1)
        return [copies * vocabulary * positions, copies * vocabulary * chunk]
    return mistaken


EXERCISES += [exercise(
    logits_bytes, title="What the logits take", minutes=5, reread="lesson 06, sections 1 and 3",
    ideas=[
        Idea("8B, 4 rows of 2048", (4, 2048, 128256, 1024), 0.5),
        Idea("fewer positions than a chunk", (1, 100, 32000, 1024), 0.5),
        Idea("your batch", some_logits, 0.5),
        Idea("another batch", some_logits, 1, hidden=True),
        Idea("a short batch", a_short_batch, 1.5, hidden=True, tells=("a chunk is always full",)),
    ],
    mistakes={
        "one copy": ("three copies stand at the peak.", logits_mistake(copies=4)),
        "16 bits": ("the copies are float32, 4 bytes a number.", logits_mistake(copies=6)),
        "a chunk of each row": ("a chunk is of the whole batch's positions, not of each row's.",
                                logits_mistake(per_row=True)),
        "a chunk is always full": ("a batch with fewer positions than a chunk has no more logits.",
                                   logits_mistake(at_most=lambda _, chunk: chunk)),
        "one row": ("each position of each row has logits.",
                    logits_mistake(positions_of=lambda rows, length: length)),
        "without the last": ("the last position of a row has logits too, though no label.",
                             logits_mistake(positions_of=lambda rows, length: rows * (length - 1))),
    })]

# %% [markdown]
# The peak is a moment, not a sum. `moments[m][part]` are the MiB that each part (weights, logits,
# scores, ...) takes at a moment of the step. Lever `p` leaves `left[p]` MiB of part `p` wherever
# it took more; `None` says that nothing can be done about a part. A run fits if *every* moment is
# at most `budget_mib`. How few levers are enough?


# %% tags=["exercise"]
def fewest_levers(moments, left, budget_mib):
    """The smallest number of levers with which the run fits; -1 if all are not enough."""
    ### BEGIN SOLUTION
    levers = [part for part, rest in enumerate(left) if rest is not None]
    for count in range(len(levers) + 1):
        for pulled in combinations(levers, count):
            peak = max(sum(min(mib, left[part]) if part in pulled else mib
                           for part, mib in enumerate(moment)) for moment in moments)
            if peak <= budget_mib:
                return count
    return -1
    ### END SOLUTION


# %% tags=["hidden"]
def after(moments, left, pulled):
    return [sum(min(mib, left[part]) if part in pulled else mib for part, mib in enumerate(moment))
            for moment in moments]


def fewest(moments, left, budget_mib, reduce=max):
    levers = [part for part, rest in enumerate(left) if rest is not None]
    return next((count for count in range(len(levers) + 1)
                 if any(reduce(after(moments, left, pulled)) <= budget_mib
                        for pulled in combinations(levers, count))), -1)


def only_the_highest(moments, left, budget_mib):
    return fewest([max(moments, key=sum)], left, budget_mib)


def sum_of_moments(moments, left, budget_mib):
    return fewest(moments, left, budget_mib, reduce=sum)


def some_moment(moments, left, budget_mib):
    return fewest(moments, left, budget_mib, reduce=min)


def largest_first(moments, left, budget_mib):
    levers = sorted((part for part, rest in enumerate(left) if rest is not None),
                    key=lambda part: -max(moment[part] for moment in moments))
    return next((count for count in range(len(levers) + 1)
                 if max(after(moments, left, levers[:count])) <= budget_mib), -1)


def wholly_gone(moments, left, budget_mib):
    return fewest(moments, [rest if rest is None else 0 for rest in left], budget_mib)


def some_summits(draw):
    """Weights, logits, scores, boundaries, MLP at three moments; two summits of about a height."""
    weights, kept = 100 * draw.integer(20, 60), 100 * draw.integer(5, 12)
    logits, scores, wide = (100 * draw.integer(20, 60) for _ in range(3))
    moments = [[weights, logits, 0, kept, 0], [weights, logits // 3, scores, kept, wide // 2],
               [weights, 0, scores // 2, kept, wide]]
    left = [None, 50 * draw.integer(1, 12), 50 * draw.integer(1, 12), 50 * draw.integer(1, 4),
            50 * draw.integer(4, 14)]
    peak, least = max(map(sum, moments)), max(after(moments, left, range(1, 5)))
    return moments, left, least + (peak - least) * draw.integer(5, 75) // 100


def never_enough(draw):
    moments, left, _ = some_summits(draw)
    return moments, left, max(after(moments, left, range(1, 5))) - draw.integer(1, 200)


TWO_SUMMITS = [[5400, 12000, 0, 1000], [5400, 0, 8200, 1000]]
LEVER_MISTAKES = ("only the highest moment", "adds moments up", "one moment is enough")
EXERCISES += [exercise(
    fewest_levers, title="How few levers are enough?", minutes=12,
    reread="lesson 06, sections 3 and 4",
    ideas=[
        Idea("two summits", (TWO_SUMMITS, [None, 400, 600, None], 14000), 0.5),
        Idea("the smaller part", ([[3000, 4000, 0], [3000, 2000, 3500]], [None, 3900, 100], 7000),
             0.5),
        Idea("it fits already", (TWO_SUMMITS, [None, 400, 600, None], 20000), 0.5),
        Idea("not enough", ([[5400, 900]], [None, 700], 6000), 0.5),
        Idea("your step", some_summits, 0.5, tells=("only the highest moment",)),
        Idea("another step", some_summits, 2, hidden=True,
             tells=("only the highest moment", "adds moments up")),
        Idea("a tight one", some_summits, 1.5, hidden=True, tells=("largest first",)),
        Idea("what a lever leaves", some_summits, 1, hidden=True,
             tells=("wholly gone", "one moment is enough")),
        Idea("out of reach", never_enough, 1, hidden=True, tells=("wholly gone",)),
    ],
    mistakes={
        "only the highest moment": (
            "behind the highest moment may be another one: look at all of them again.",
            only_the_highest),
        "adds moments up": ("moments come one after the other: the highest counts, not their sum.",
                            sum_of_moments),
        "one moment is enough": ("every moment has to fit, not only one.", some_moment),
        "largest first": (
            "the largest part need not be the one that helps: try every choice of levers.",
            largest_first),
        "wholly gone": ("a lever leaves something: `left` MiB of its part.", wholly_gone),
    })]

# %% tags=["hidden"]
ASSIGNMENT = Assignment(
    "chunked_loss", "What does the usual recipe waste?", "lesson 06", tuple(EXERCISES))
