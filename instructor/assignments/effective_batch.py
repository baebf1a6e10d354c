# %% tags=["hidden"]
"""Assignment on lesson 03: effective batch size, accumulation, schedule, two cards."""

from instructor.assignment import TOO_MANY, Assignment
from instructor.cases import Idea, Oracle, exercise

EXERCISES = []

# %% [markdown]
# # How big is my batch, really? The assignment
#
# Fourteen functions about one question: on how many sequences does an update train, and what does
# that cost? Lesson 03 is the background. Plain Python, no GPU, nothing to install.

# %% tags=["setup"]
import math

# %% [markdown]
# A warm-up. On how many sequences does one optimizer step train?


# %% tags=["exercise"]
def effective_batch_size(micro_batch_size, gradient_accumulation_steps, world_size):
    """Sequences that one optimizer step trains on, over all processes."""
    ### BEGIN SOLUTION
    return micro_batch_size * gradient_accumulation_steps * world_size
    ### END SOLUTION


# %% tags=["hidden"]
def split(draw):
    return draw.integer(2, 9), draw.integer(3, 24), draw.integer(2, 8)


EXERCISES += [exercise(
    effective_batch_size, title="The formula", minutes=2, reread="lesson 03, section 1",
    ideas=[
        Idea("one T4", (2, 16, 1), 0.5),
        Idea("your cluster", split, 0.5, tells=("adds", "forgets the ranks")),
        Idea("another cluster", split, 1, hidden=True, tells=("adds", "forgets the ranks")),
    ],
    mistakes={
        "adds": ("the three factors multiply: each process runs every micro batch.",
                 lambda micro, accumulation, ranks: micro + accumulation + ranks),
        "forgets the ranks": ("each of `world_size` processes trains its own sequences; "
                              "multiply by it as well.",
                              lambda micro, accumulation, ranks: micro * accumulation),
        "forgets the accumulation": (
            "a step comes after `gradient_accumulation_steps` micro batches; multiply by it.",
            lambda micro, accumulation, ranks: micro * ranks),
    })]

# %% [markdown]
# The same formula, solved for the micro batch. A paper reports an effective batch, and you want
# exactly that one. Not every split can make it; then the answer is 0.


# %% tags=["exercise"]
def micro_batch_for(effective_batch_size, gradient_accumulation_steps, world_size):
    """The micro batch that makes exactly the effective batch; 0 if no whole number does."""
    ### BEGIN SOLUTION
    micro, rest = divmod(effective_batch_size, gradient_accumulation_steps * world_size)
    return micro if rest == 0 else 0
    ### END SOLUTION


# %% tags=["hidden"]
def whole(draw):
    micro, accumulation, ranks = split(draw)
    return micro * accumulation * ranks, accumulation, ranks


def not_whole(draw):
    target, accumulation, ranks = whole(draw)
    return target + draw.integer(1, accumulation * ranks - 1), accumulation, ranks


EXERCISES += [exercise(
    micro_batch_for, title="The formula, backwards", minutes=3, reread="lesson 03, section 1",
    ideas=[
        Idea("the paper's 32", (32, 16, 1), 0.5),
        Idea("a split that cannot make it", (100, 8, 2), 0.5),
        Idea("your cluster", whole, 0.5, tells=("forgets the ranks",)),
        Idea("another cluster", whole, 1, hidden=True, tells=("forgets the ranks",)),
        Idea("another split that cannot make it", not_whole, 0.5, hidden=True,
             tells=("rounds down", "rounds up")),
    ],
    mistakes={
        "rounds down": ("if it does not divide evenly, the rounded micro batch trains on another "
                        "batch than the paper's; return 0.",
                        lambda target, accumulation, ranks: target // (accumulation * ranks)),
        "rounds up": ("a micro batch rounded up makes a batch larger than the paper's; return 0 "
                      "when it does not divide evenly.",
                      lambda target, accumulation, ranks: -(-target // (accumulation * ranks))),
        "forgets the ranks": ("the batch is shared by all ranks: divide by `world_size` too.",
                              lambda target, accumulation, ranks:
                              0 if target % accumulation else target // accumulation),
    })]

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
EXERCISES += [exercise(
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
    })]

# %% [markdown]
# You move to a cluster: `nodes` machines with `gpus_per_node` GPUs each, one process per GPU. The
# world size changes, the effective batch must not.


# %% tags=["exercise"]
def accumulation_on(effective_batch_size, micro_batch_size, nodes, gpus_per_node):
    """[world_size, gradient_accumulation_steps] on the cluster, for the same effective batch.

    It divides evenly.
    """
    ### BEGIN SOLUTION
    world_size = nodes * gpus_per_node
    return [world_size, effective_batch_size // (micro_batch_size * world_size)]
    ### END SOLUTION


# %% tags=["hidden"]
def with_world_size(world_size_of):
    def mistaken(target, micro, nodes, gpus):
        world_size = world_size_of(nodes, gpus)
        return [world_size, target // (micro * world_size)]
    return mistaken


def cluster(draw):
    micro, accumulation = draw.integer(1, 8), draw.integer(2, 30)
    nodes, gpus = draw.integer(2, 9), draw.choice((2, 4, 8))
    return micro * accumulation * nodes * gpus, micro, nodes, gpus


EXERCISES += [exercise(
    accumulation_on, title="World size", minutes=4, reread="lesson 03, section 5",
    ideas=[
        Idea("one node of two", (32, 2, 1, 2), 0.5),
        Idea("your cluster", cluster, 0.5, tells=("counts nodes", "counts one node's GPUs",
                                                  "leaves the accumulation")),
        Idea("another cluster", cluster, 1, hidden=True, tells=("counts nodes",)),
        Idea("a large cluster", cluster, 1, hidden=True, tells=("counts one node's GPUs",)),
    ],
    mistakes={
        "counts nodes": ("a process runs on each GPU: the world size is nodes times GPUs per node.",
                         with_world_size(lambda nodes, gpus: nodes)),
        "counts one node's GPUs": ("that is the world size of a single node; all nodes train.",
                                   with_world_size(lambda nodes, gpus: gpus)),
        "leaves the accumulation": (
            "with more ranks, each has fewer micro batches: divide the accumulation by the world "
            "size, or the effective batch grows with it.",
            lambda target, micro, nodes, gpus: [nodes * gpus, target // micro]),
    })]

# %% [markdown]
# How many tokens does a step see, and how many steps does a budget of tokens need? All sequences
# are packed to `sequence_length`, so there is no padding.


# %% tags=["exercise"]
def steps_for(token_budget, micro_batch_size, gradient_accumulation_steps, world_size,
              sequence_length):
    """[tokens_per_step, optimizer_steps]: the fewest steps that train on `token_budget` tokens."""
    ### BEGIN SOLUTION
    tokens = micro_batch_size * gradient_accumulation_steps * world_size * sequence_length
    return [tokens, -(-token_budget // tokens)]
    ### END SOLUTION


# %% tags=["hidden"]
def with_tokens(tokens_of):
    def mistaken(budget, *factors):
        tokens = tokens_of(*factors)
        return [tokens, -(-budget // tokens)]
    return mistaken


def token_budget(draw):
    micro, accumulation, ranks = split(draw)
    length = draw.integer(256, 4096, 128)
    tokens = micro * accumulation * ranks * length
    return draw.integer(20, 900) * tokens + draw.integer(1, tokens - 1), micro, accumulation, \
        ranks, length


def whole_steps(draw):
    budget, *factors = token_budget(draw)
    tokens = math.prod(factors)
    return budget // tokens * tokens, *factors


STEP_MISTAKES = ("rounds down", "forgets the ranks", "counts micro batches", "counts sequences")
EXERCISES += [exercise(
    steps_for, title="Tokens per step", minutes=5, reread="lesson 03, section 1",
    ideas=[
        Idea("a million tokens on one T4", (1_000_000, 2, 16, 1, 1024), 0.5),
        Idea("your budget", token_budget, 0.5, tells=STEP_MISTAKES),
        Idea("another budget", token_budget, 2, hidden=True, tells=STEP_MISTAKES),
        Idea("a budget without a rest", whole_steps, 1, hidden=True, tells=STEP_MISTAKES[1:]),
    ],
    mistakes={
        "rounds down": ("the last step has to happen too, or some tokens are never seen: round "
                        "up.", lambda budget, micro, accumulation, ranks, length:
                        [micro * accumulation * ranks * length,
                         budget // (micro * accumulation * ranks * length)]),
        "forgets the ranks": ("all ranks train in the same step; multiply by `world_size`.",
                              with_tokens(lambda micro, accumulation, ranks, length:
                                          micro * accumulation * length)),
        "counts micro batches": (
            "an optimizer step comes after `gradient_accumulation_steps` micro batches.",
            with_tokens(lambda micro, accumulation, ranks, length: micro * ranks * length)),
        "counts sequences": ("those are sequences; each has `sequence_length` tokens.",
                             with_tokens(lambda micro, accumulation, ranks, length:
                                         micro * accumulation * ranks)),
    })]

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
EXERCISES += [exercise(
    real_and_padded, title="Tokens and padding", minutes=6, reread="lesson 03, section 4",
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
    })]

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
EXERCISES += [exercise(
    last_update, title="Epochs with a rest", minutes=5, reread="lesson 03, exercise 03.1",
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
    })]

# %% [markdown]
# The learning rate climbs from 0 to its peak during the warm-up, then falls in a straight line to
# 0. It counts optimizer steps: `step` of them have been done when the next one asks.
#
# - Warm-up has `warmup_percent` of `steps`, rounded up to a whole step.
# - Until then the rate is the peak times `step` / warm-up.
# - After it, the peak times what is left of the steps after the warm-up, by their number.


# %% tags=["exercise"]
def learning_rate(step, steps, warmup_percent, peak):
    """Learning rate of the update that comes after `step` updates; 0 <= step < steps."""
    ### BEGIN SOLUTION
    warmup = -(-warmup_percent * steps // 100)
    if step < warmup:
        return peak * step / warmup
    return peak * (steps - step) / (steps - warmup)
    ### END SOLUTION


# %% tags=["hidden"]
def rate(warmup_of=lambda percent, steps: -(-percent * steps // 100), shift=0, falls=True):
    def mistaken(step, steps, percent, peak):
        warmup, step = warmup_of(percent, steps), step + shift
        if step < warmup:
            return peak * step / warmup
        return peak * (steps - step) / (steps - warmup) if falls else peak
    return mistaken


def climbing(draw):
    hundreds, percent = draw.integer(4, 30), draw.integer(3, 9)
    steps = 100 * hundreds + draw.integer(1, 9)
    return draw.integer(2, percent * steps // 100 - 2), steps, percent, draw.integer(1, 9) / 10_000


def falling(draw):
    _, steps, percent, peak = climbing(draw)
    return draw.integer(steps // 2, steps - 2), steps, percent, peak


EXERCISES += [exercise(
    learning_rate, title="Warm-up", minutes=8, reread="lesson 03, section 1", rel_tolerance=1e-9,
    ideas=[
        Idea("half-way up", (15, 1000, 3, 2e-4), 0.25),
        Idea("the very first update", (0, 1000, 3, 2e-4), 0.25),
        Idea("your climb", climbing, 0.5, tells=("counts from 1", "no warm-up",
                                                 "rounds the warm-up down")),
        Idea("your descent", falling, 0.5, tells=("never falls", "no warm-up")),
        Idea("another climb", climbing, 1.25, hidden=True,
             tells=("counts from 1", "rounds the warm-up down")),
        Idea("another descent", falling, 1.25, hidden=True, tells=("never falls", "no warm-up")),
    ],
    mistakes={
        "counts from 1": ("`step` updates have been done before this one: the first asks with 0 "
                          "and gets a rate of 0.", rate(shift=1)),
        "no warm-up": ("the rate starts at 0 and climbs; you start at the peak.",
                       lambda step, steps, percent, peak: peak * (steps - step) / steps),
        "never falls": ("after the warm-up the rate falls in a straight line, to 0 at `steps`.",
                        rate(falls=False)),
        "rounds the warm-up down": ("a part of a warm-up step counts as a whole one: round up.",
                                    rate(warmup_of=lambda percent, steps: percent * steps // 100)),
    })]

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
EXERCISES += [exercise(
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
    })]

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
EXERCISES += [exercise(
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
    })]

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
EXERCISES += [exercise(
    combined_gradient, title="Token-weighted gradients, over ranks", minutes=10,
    reread="lesson 03, sections 2 and 5", rel_tolerance=1e-7,
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
    })]

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


EXERCISES += [exercise(
    largest_micro_batch, title="The largest micro batch", minutes=12,
    reread="lesson 03, section 4 and exercise 03.3",
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
    })]

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


EXERCISES += [exercise(
    update_seconds, title="T4 or A10: how long is an update?", minutes=8,
    reread="lesson 03, section 6", rel_tolerance=1e-6,
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
    })]

# %% [markdown]
# And the verdict, with numbers. `t4` and `a10` are lists `[micro_batch_size,
# gradient_accumulation_steps, tokens_per_second, budget_mib]`, measured or estimated; a run needs
# `fixed_mib` plus `sequence_mib` for each sequence of its micro batch. `weighting` is `"tokens"`
# (an update divides by all its labelled tokens) or `"micro batches"` (mean of means, and answers
# have uneven lengths). Return a dictionary:
#
# - `"fits"`: `[does it fit the T4, does it fit the A10]`
# - `"same_update"`: whether both cards compute the same gradient from the same data, to rounding
# - `"times_faster"`: the A10's tokens per second by the T4's
# - `"update_ratio"`: how many times as long an *update* takes on the T4, if all sequences have the
#   same length


# %% tags=["exercise"]
def compare_cards(t4, a10, fixed_mib, sequence_mib, weighting):
    """{"fits": [bool, bool], "same_update": bool, "times_faster": ..., "update_ratio": ...}."""
    ### BEGIN SOLUTION
    fits = [fixed_mib + micro * sequence_mib <= budget for micro, _, _, budget in (t4, a10)]
    batches = [micro * accumulation for micro, accumulation, _, _ in (t4, a10)]
    times_faster = a10[2] / t4[2]
    return {
        "fits": fits,
        "same_update": batches[0] == batches[1] and weighting == "tokens",
        "times_faster": times_faster,
        "update_ratio": times_faster * batches[0] / batches[1],
    }
    ### END SOLUTION


# %% tags=["hidden"]
def verdict(size=lambda micro, accumulation: micro,
            same=lambda t4, a10, weighting: t4[0] * t4[1] == a10[0] * a10[1]
            and weighting == "tokens",
            update=lambda speed, t4, a10: speed * t4[0] * t4[1] / (a10[0] * a10[1])):
    def mistaken(t4, a10, fixed, each, weighting):
        speed = a10[2] / t4[2]
        return {"fits": [fixed + size(*card[:2]) * each <= card[3] for card in (t4, a10)],
                "same_update": same(t4, a10, weighting), "times_faster": speed,
                "update_ratio": update(speed, t4, a10)}
    return mistaken


def cards(draw, weighting="tokens", same_batch=True):
    times = draw.choice((2, 3, 4))
    micro, accumulation = draw.integer(1, 4), times * draw.integer(2, 6)
    larger = accumulation // times if same_batch else accumulation // times + draw.integer(1, 5)
    fixed, each = draw.integer(3000, 6000), draw.integer(300, 2000)
    t4 = [micro, accumulation, draw.integer(300, 700), 14_771]
    return t4, [micro * times, larger, draw.integer(800, 1900), 22_500], fixed, each, weighting


def by_micro_batches(draw):
    return cards(draw, "micro batches")


def other_batches(draw):
    return cards(draw, same_batch=False)


EXERCISES += [exercise(
    compare_cards, title="T4 or A10: the verdict", minutes=8, reread="lesson 03, section 6",
    rel_tolerance=1e-9,
    ideas=[
        Idea("2 x 16 against 8 x 4", ([2, 16, 500, 14_771], [8, 4, 1000, 22_500], 5000, 1200,
                                      "tokens"), 0.5, tells=("memory follows the batch",)),
        Idea("mean of means", ([2, 16, 480, 14_771], [8, 4, 1100, 22_500], 5000, 2300,
                               "micro batches"), 0.5, tells=("any weighting",)),
        Idea("your two batches", other_batches, 0.5, tells=("compares tokens for updates",)),
        Idea("two other cards", cards, 1, hidden=True, tells=("quality follows the micro batch",)),
        Idea("two other batches", other_batches, 1, hidden=True,
             tells=("compares tokens for updates",)),
        Idea("another mean of means", by_micro_batches, 0.5, hidden=True, tells=("any weighting",)),
    ],
    mistakes={
        "memory follows the batch": (
            "activations follow the micro batch; accumulation costs no memory.",
            verdict(size=lambda micro, accumulation: micro * accumulation)),
        "quality follows the micro batch": (
            "with token weighting, equal effective batches give the same gradient, however they "
            "are split.", verdict(same=lambda t4, a10, weighting: t4[0] == a10[0])),
        "any weighting": (
            "a mean of means depends on how the batch is split; only token weighting does not.",
            verdict(same=lambda t4, a10, weighting: t4[0] * t4[1] == a10[0] * a10[1])),
        "compares tokens for updates": (
            "updates of different size take different time: the ratio of the times is the speeds' "
            "times that of the effective batches.",
            verdict(update=lambda speed, t4, a10: speed)),
    })]

# %% tags=["hidden"]
ASSIGNMENT = Assignment("effective_batch", "How big is my batch, really?", "lesson 03",
                        tuple(EXERCISES))
