# %% tags=["hidden"]
"""Assignment on lesson 01: who holds the memory, and how it grows."""

from instructor.assignment import Assignment
from instructor.cases import Idea, exercise

EXERCISES = []

# %% [markdown]
# # Where does the memory go? The assignment
#
# Five functions about the holders of memory and how they grow. Lesson 01 is the background. All
# answers are in bytes unless the text says otherwise. Plain Python, no GPU, nothing to install.

# %% [markdown]
# First what folklore says: "gradients are as large as the weights, Adam's state is twice that". Be
# exact about *which* parameters. All weights stay in memory, with `weight_bytes` bytes each. Only
# `trained` of them have a gradient (float32) and the two averages of Adam (float32 each).
#
# (With adapters, `parameters` counts them too, and `weight_bytes` is taken for all, to keep it
# simple.)


# %% tags=["exercise"]
def holders(parameters, trained, weight_bytes):
    """[weights, gradients, optimizer state] in bytes."""
    ### BEGIN SOLUTION
    return [parameters * weight_bytes, trained * 4, trained * 8]
    ### END SOLUTION


# %% tags=["hidden"]
def all_trained(draw):
    parameters = draw.integer(100_000_000, 9_000_000_000, 1024)
    return parameters, parameters, 4


def adapters(draw):
    parameters = draw.integer(1_000_000_000, 9_000_000_000, 1024)
    return parameters, draw.integer(1_000_000, 90_000_000, 1024), 2


EXERCISES += [exercise(
    holders, title="Three of the four holders", minutes=5,
    reread='lesson 01, section 1 and "LoRA to the rescue?"',
    ideas=[
        Idea("a small model, all trained", (1000, 1000, 4), 0.5),
        Idea("your model with adapters", adapters, 0.5),
        Idea("another model, all trained", all_trained, 1, hidden=True),
        Idea("another model with adapters", adapters, 2, hidden=True),
    ],
    mistakes={
        "everything is trained": (
            "only trained parameters have a gradient and Adam's state; frozen ones have neither.",
            lambda parameters, trained, size: [parameters * size, parameters * 4, parameters * 8]),
        "one average": ("Adam keeps two averages for each trained parameter, 4 bytes each.",
                        lambda parameters, trained, size: [parameters * size, trained * 4,
                                                           trained * 4]),
        "everything in the weights' format": (
            "gradients and averages are float32 here, 4 bytes, whatever the weights are.",
            lambda parameters, trained, size: [parameters * size, trained * size,
                                               trained * 2 * size]),
        "only trained weights": ("frozen weights take part in forward: all of them are in memory.",
                                 lambda parameters, trained, size: [trained * size, trained * 4,
                                                                    trained * 8]),
    })]

# %% [markdown]
# The estimate that goes around for activations: one tensor of shape (batch, sequence, hidden) for
# each layer, in 16 bits. You know that it counts only the boundaries. A layer keeps
# `kept_per_boundary` times as much (lesson 01 counted it).


# %% tags=["exercise"]
def estimate_and_truth(layers, batch, sequence_length, hidden_size, kept_per_boundary):
    """[the usual estimate, what the layers really keep] in bytes, as whole numbers."""
    ### BEGIN SOLUTION
    estimate = layers * batch * sequence_length * hidden_size * 2
    return [estimate, estimate * kept_per_boundary]
    ### END SOLUTION


# %% tags=["hidden"]
def a_model(draw):
    return draw.integer(8, 48), draw.integer(2, 16), draw.integer(256, 4096, 64), \
        draw.integer(1024, 8192, 128), draw.integer(17, 75)


def estimated(bytes_each=2, layer_count=True, batch_counts=True):
    def mistaken(layers, batch, length, hidden, kept):
        estimate = (layers if layer_count else 1) * (batch if batch_counts else 1) \
            * length * hidden * bytes_each
        return [estimate, estimate * kept]
    return mistaken


MODEL_MISTAKES = ("counts numbers", "forgets the layers", "forgets the batch", "adds")
EXERCISES += [exercise(
    estimate_and_truth, title="The usual estimate", minutes=4,
    reread='lesson 01, "The usual estimate"',
    ideas=[
        Idea("7B, one sequence", (32, 1, 2048, 4096, 23), 0.5),
        Idea("your model", a_model, 0.5, tells=MODEL_MISTAKES),
        Idea("another model", a_model, 2, hidden=True, tells=MODEL_MISTAKES),
    ],
    mistakes={
        "counts numbers": ("that counts numbers; in 16 bits each takes 2 bytes.", estimated(1)),
        "counts float32": ("that takes 4 bytes a number; in 16 bits it is 2.", estimated(4)),
        "forgets the layers": ("every layer leaves its boundary behind: multiply by `layers`.",
                               estimated(layer_count=False)),
        "forgets the batch": ("every sequence of the batch has activations of its own.",
                              estimated(batch_counts=False)),
        "adds": ("`kept_per_boundary` already counts the whole layer; multiply, do not add the "
                 "boundary once more.",
                 lambda layers, batch, length, hidden, kept: [
                     layers * batch * length * hidden * 2,
                     layers * batch * length * hidden * 2 * (kept + 1)]),
    })]

# %% [markdown]
# The quadratic part. Eager attention keeps, for each head and each *pair* of positions, a score's
# softmax in float32 and once more in 16 bits: 6 bytes. SDPA keeps one float32 number for each head
# and position instead. (Everything else that attention keeps is the same for both.)


# %% tags=["exercise"]
def kept_scores(batch, heads, sequence_length, kernel):
    """Bytes that one layer keeps for its scores; `kernel` is "eager" or "sdpa"."""
    ### BEGIN SOLUTION
    if kernel == "eager":
        return 6 * batch * heads * sequence_length**2
    return 4 * batch * heads * sequence_length
    ### END SOLUTION


# %% tags=["hidden"]
def eager(draw):
    return draw.integer(2, 8), draw.integer(8, 64), draw.integer(256, 4096, 64), "eager"


def sdpa(draw):
    return *eager(draw)[:3], "sdpa"


def scores(per_pair=6, per_row=4, heads_count=True, batch_counts=True):
    def mistaken(batch, heads, length, kernel):
        each = per_pair * length**2 if kernel == "eager" else per_row * length
        return each * (heads if heads_count else 1) * (batch if batch_counts else 1)
    return mistaken


EXERCISES += [exercise(
    kept_scores, title="Linear or quadratic", minutes=5, reread="lesson 01, section 3",
    ideas=[
        Idea("32 heads, 2048 positions", (1, 32, 2048, "eager"), 0.5),
        Idea("the same with SDPA", (1, 32, 2048, "sdpa"), 0.5),
        Idea("your batch, eager", eager, 0.5),
        Idea("another batch, eager", eager, 1.5, hidden=True),
        Idea("another batch with SDPA", sdpa, 1, hidden=True),
    ],
    mistakes={
        "one copy": ("the softmax is kept twice, in float32 and in 16 bits: 4 + 2 bytes a pair.",
                     scores(per_pair=4)),
        "linear": ("a score belongs to a *pair* of positions: eager grows with the square of the "
                   "length.", lambda batch, heads, length, kernel:
                   (6 if kernel == "eager" else 4) * batch * heads * length),
        "quadratic with SDPA": (
            "SDPA keeps one number for each position, not one for each pair.",
            lambda batch, heads, length, kernel:
            (6 if kernel == "eager" else 4) * batch * heads * length**2),
        "forgets the heads": ("every head has scores of its own.", scores(heads_count=False)),
        "half a matrix": ("a causal mask hides half of the scores, but the whole square is "
                          "stored.", scores(per_pair=3)),
    })]

# %% [markdown]
# Two runs, measured: with `batch_a` sequences the peak was `peak_a` bytes, with `batch_b` it was
# `peak_b`. Memory is linear in the batch. How many sequences fit?


# %% tags=["exercise"]
def largest_batch(batch_a, peak_a, batch_b, peak_b, budget):
    """The largest batch whose peak is at most `budget` bytes, 0 if none; `batch_a` < `batch_b`."""
    ### BEGIN SOLUTION
    each = (peak_b - peak_a) // (batch_b - batch_a)
    fixed = peak_a - batch_a * each
    return max(0, (budget - fixed) // each)
    ### END SOLUTION


# %% tags=["hidden"]
def two_runs(draw):
    each, fixed = draw.integer(20_000_000, 900_000_000), \
        draw.integer(2_000_000_000, 6_000_000_000)
    a = draw.integer(2, 5)
    b = a + draw.integer(2, 4)
    budget = fixed + draw.integer(8, 40) * each + draw.integer(1, each - 1)
    return a, fixed + a * each, b, fixed + b * each, budget


def too_small(draw):
    a, peak_a, b, peak_b, _ = two_runs(draw)
    each = (peak_b - peak_a) // (b - a)
    return a, peak_a, b, peak_b, peak_a - a * each - draw.integer(1, each)


BATCH_MISTAKES = ("scales the peak", "forgets the fixed part", "takes the difference for one",
                  "rounds up")
EXERCISES += [exercise(
    largest_batch, title="Two runs are enough", minutes=8, reread="lesson 01, exercise 01.3",
    ideas=[
        Idea("round numbers", (2, 1400, 4, 1800, 3150), 0.5),
        Idea("not even the fixed part fits", (2, 1400, 4, 1800, 900), 0.5),
        Idea("your two runs", two_runs, 0.5, tells=BATCH_MISTAKES),
        Idea("other runs", two_runs, 2, hidden=True, tells=BATCH_MISTAKES),
        Idea("another card that is too small", too_small, 1.5, hidden=True,
             tells=("a negative batch",)),
    ],
    mistakes={
        "scales the peak": (
            "the weights are in the peak too, and do not grow with the batch: separate the two "
            "parts first.", lambda a, peak_a, b, peak_b, budget: budget // (peak_a // a)),
        "forgets the fixed part": (
            "what is there without any sequence has to be subtracted from the budget.",
            lambda a, peak_a, b, peak_b, budget: budget // ((peak_b - peak_a) // (b - a))),
        "takes the difference for one": (
            "the runs differ by more than one sequence: divide by `batch_b - batch_a`.",
            lambda a, peak_a, b, peak_b, budget:
            max(0, (budget - (peak_a - a * (peak_b - peak_a))) // (peak_b - peak_a))),
        "rounds up": ("the part of a sequence that is left over does not fit: round down.",
                      lambda a, peak_a, b, peak_b, budget: max(0, -(
                          (peak_a - a * ((peak_b - peak_a) // (b - a)) - budget)
                          // ((peak_b - peak_a) // (b - a))))),
        "a negative batch": (
            "there is no batch below 0; if not even the fixed part fits, the answer is 0.",
            lambda a, peak_a, b, peak_b, budget: (
                budget - (peak_a - a * ((peak_b - peak_a) // (b - a))))
            // ((peak_b - peak_a) // (b - a))),
    })]

# %% [markdown]
# The term nobody mentions. At its peak the usual loss holds **three** float32 copies of the logits,
# one number per position and word of the vocabulary. Suppose that checkpointing has left only each
# layer's boundary, in 16 bits. Which of the two is larger now?


# %% tags=["exercise"]
def logits_or_layers(batch, sequence_length, vocab_size, hidden_size, layers):
    """[bytes of the three copies, bytes of the boundaries, "logits" or "layers"]."""
    ### BEGIN SOLUTION
    positions = batch * sequence_length
    logits, boundaries = 3 * positions * vocab_size * 4, layers * positions * hidden_size * 2
    return [logits, boundaries, "logits" if logits > boundaries else "layers"]
    ### END SOLUTION


# %% tags=["hidden"]
def wide_vocabulary(draw):
    return draw.integer(2, 8), draw.integer(256, 4096, 64), \
        draw.integer(100_000, 210_000, 64), draw.integer(1024, 4096, 128), draw.integer(12, 40)


def narrow_vocabulary(draw):
    return draw.integer(2, 8), draw.integer(256, 4096, 64), draw.integer(4000, 12_000, 64), \
        draw.integer(4096, 8192, 128), draw.integer(48, 96)


def larger(copies=3, logit_bytes=4, boundary_bytes=2, names=("logits", "layers")):
    def mistaken(batch, length, vocab, hidden, layers):
        logits = copies * batch * length * vocab * logit_bytes
        boundaries = layers * batch * length * hidden * boundary_bytes
        return [logits, boundaries, names[logits <= boundaries]]
    return mistaken


EXERCISES += [exercise(
    logits_or_layers, title="The term nobody mentions", minutes=5, reread="lesson 01, section 4",
    ideas=[
        Idea("Llama-3.2-1B, 4 x 1024", (4, 1024, 128_256, 2048, 16), 0.5),
        Idea("a small vocabulary", (2, 512, 1280, 4096, 64), 0.5),
        Idea("your model", wide_vocabulary, 0.5),
        Idea("another model", wide_vocabulary, 1.5, hidden=True),
        Idea("another small vocabulary", narrow_vocabulary, 1, hidden=True),
    ],
    mistakes={
        "one copy": ("three copies are alive at the peak, not one.", larger(copies=1)),
        "logits in 16 bits": ("the loss works in float32, 4 bytes a logit.", larger(logit_bytes=2)),
        "boundaries in float32": ("the boundaries are in 16 bits here, 2 bytes a number.",
                                  larger(boundary_bytes=4)),
        "forgets the layers": (
            "each layer has a boundary: multiply by `layers`.",
            lambda batch, length, vocab, hidden, layers:
            larger()(batch, length, vocab, hidden, 1)),
        "answers the other way round": (
            "name the larger one of the two.", larger(names=("layers", "logits"))),
    })]

# %% tags=["hidden"]
ASSIGNMENT = Assignment("activation_memory", "Where does the memory go?", "lesson 01",
                        tuple(EXERCISES))
