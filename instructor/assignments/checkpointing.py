# %% tags=["hidden"]
"""Assignment on lesson 02: what checkpointing saves, what it costs, how much of it."""

from instructor.assignment import Assignment
from instructor.cases import Idea, exercise

EXERCISES = []

# %% [markdown]
# # What if we forget on purpose? The assignment
#
# Four functions about gradient checkpointing: trace it, choose it, pay for it. Lesson 02 is the
# background. Plain Python, no GPU, nothing to install.

# %% [markdown]
# A chain of `steps` steps; step *i* reads the input aᵢ and backward of step *i* needs it. Forward
# keeps only the inputs listed in `kept`, from 1 upwards in order, always with 1 among them.
# Backward runs from the last step to the first. If aᵢ is not in memory, it is computed again from
# the closest input before it that is: all inputs in between come back too, and stay until their own
# step has used them. A step's input is freed after the step's backward.


# %% tags=["exercise"]
def trace(steps, kept):
    """[most inputs in memory at once, steps computed again], over the whole backward pass."""
    ### BEGIN SOLUTION
    held, most, again = set(kept), len(kept), 0
    for step in range(steps, 0, -1):
        while max(held) < step:
            held.add(max(held) + 1)
            again += 1
        most = max(most, len(held))
        held.remove(step)
    return [most, again]
    ### END SOLUTION


# %% tags=["hidden"]
def without_freeing(steps, kept):
    again = trace(steps, kept)[1]
    return [len(set(kept)) + again, again]


def from_the_start(steps, kept):
    again = sum(step - max(k for k in kept if k <= step) for step in range(steps, 0, -1))
    return [trace(steps, kept)[0], again]


def kept_only(steps, kept):
    return [len(kept), trace(steps, kept)[1]]


def longest_segment(steps, kept):
    ends = [*kept[1:], steps + 1]
    longest = max(end - start for start, end in zip(kept, ends, strict=True))
    return [len(kept) + longest - 1, trace(steps, kept)[1]]


def uneven_chain(draw):
    steps = draw.integer(12, 60)
    others = sorted(draw.several(draw.integer(2, 5), 3, steps - 3))
    return steps, [1, *others]


CHAIN_MISTAKES = ("never frees", "counts only what was kept", "recomputes for each step anew",
                  "adds the longest segment")
EXERCISES += [exercise(
    trace, title="A trace by program", minutes=12, reread="lesson 02, section 1",
    ideas=[
        Idea("six steps, 1, 3 and 5 kept", (6, [1, 3, 5]), 0.5),
        Idea("six steps, all kept", (6, [1, 2, 3, 4, 5, 6]), 0.5),
        Idea("a long segment first", (8, [1, 7]), 0.5),
        Idea("your chain", uneven_chain, 0.5, tells=CHAIN_MISTAKES),
        Idea("another chain", uneven_chain, 2, hidden=True, tells=CHAIN_MISTAKES),
        Idea("only the start is kept", lambda draw: (draw.integer(5, 90), [1]), 1, hidden=True),
    ],
    mistakes={
        "never frees": ("what backward has used is freed: earlier segments find the room of later "
                        "ones.", without_freeing),
        "counts only what was kept": ("inputs that come back take room too, until their step has "
                                      "used them.", kept_only),
        "recomputes for each step anew": (
            "inputs that were computed on the way stay in memory: a segment is computed again "
            "once, not once for each of its steps.", from_the_start),
        "adds the longest segment": (
            "when an early segment comes back, the checkpoints after it are gone already; follow "
            "the steps.", longest_segment),
    })]

# %% [markdown]
# Spending what is left. The first `k` of `layers` layers forget; each of them leaves its boundary
# of `boundary_mib`. The others keep everything, `layer_mib` each. `fixed_mib` is there anyway. (A
# layer that comes back finds the room of the layers behind it, which backward has freed: as long as
# `k` is below `layers`. If *all* forget, the one that comes back needs `layer_mib` on top.)


# %% tags=["exercise"]
def smallest_k(layers, boundary_mib, layer_mib, fixed_mib, budget_mib):
    """The fewest layers that must forget to stay within the budget; -1 if no number is enough."""
    ### BEGIN SOLUTION
    for k in range(layers + 1):
        remembering = layers - k if k < layers else 1
        if fixed_mib + k * boundary_mib + remembering * layer_mib <= budget_mib:
            return k
    return -1
    ### END SOLUTION


# %% tags=["hidden"]
def search(peak):
    def mistaken(layers, boundary, layer, fixed, budget):
        for k in range(layers + 1):
            if peak(k, layers, boundary, layer, fixed) <= budget:
                return k
        return -1
    return mistaken


def how_many_remember(layers, boundary, layer, fixed, budget):
    found = smallest_k(layers, boundary, layer, fixed, budget)
    return layers - found if found >= 0 else -1


def a_budget(draw):
    layers, boundary, fixed = draw.integer(16, 48), draw.integer(4, 24), draw.integer(2000, 7000)
    layer = boundary * draw.integer(12, 23) + draw.integer(0, 9)
    k = draw.integer(layers // 2 + 1, layers - 3)
    return layers, boundary, layer, fixed, \
        fixed + k * boundary + (layers - k) * layer + draw.integer(0, 3)


def no_room(draw):
    layers, boundary, layer, fixed, _ = a_budget(draw)
    return layers, boundary, layer, fixed, fixed + layers * boundary + draw.integer(1, layer - 1)


K_MISTAKES = ("counts those that remember", "forgets what is there anyway",
              "forgotten layers are free")
EXERCISES += [exercise(
    smallest_k, title="The smallest k", minutes=8, reread="lesson 02, section 5",
    ideas=[
        Idea("ten layers", (10, 10, 100, 1000, 1500), 0.5),
        Idea("no k fits", (10, 10, 100, 1000, 1150), 0.5),
        Idea("your model", a_budget, 0.5, tells=K_MISTAKES),
        Idea("another model", a_budget, 2, hidden=True, tells=K_MISTAKES),
        Idea("another model without room", no_room, 1.5, hidden=True,
             tells=("forgets the layer that comes back",)),
    ],
    mistakes={
        "counts those that remember": (
            "that is how many layers may remember; the question is how many must forget.",
            how_many_remember),
        "forgets what is there anyway": (
            "weights and optimizer state are in the budget too: add `fixed_mib`.",
            search(lambda k, layers, boundary, layer, fixed:
                   k * boundary + (layers - k if k < layers else 1) * layer)),
        "forgotten layers are free": (
            "a layer that forgets still keeps its boundary.",
            search(lambda k, layers, boundary, layer, fixed:
                   fixed + (layers - k if k < layers else 1) * layer)),
        "forgets the layer that comes back": (
            "when all layers forget, the one that is computed again needs room on top.",
            search(lambda k, layers, boundary, layer, fixed:
                   fixed + k * boundary + (layers - k) * layer)),
    })]

# %% [markdown]
# The price. A layer's backward takes `backward_per_forward` times its forward (about 2 when all
# weights are trained, about 1 with frozen ones). A layer that forgets runs forward once more. The
# model is nothing but `layers` equal layers.


# %% tags=["exercise"]
def more_work(layers, forgetting, backward_per_forward):
    """By how much a step's work grows, in percent, when `forgetting` of `layers` layers forget."""
    ### BEGIN SOLUTION
    return 100 * forgetting / (layers * (1 + backward_per_forward))
    ### END SOLUTION


# %% tags=["hidden"]
def a_price(draw):
    layers = draw.integer(12, 96)
    return layers, draw.integer(2, layers - 1), draw.integer(80, 260) / 100


EXERCISES += [exercise(
    more_work, title="The price", minutes=5, reread="lesson 02, section 4", rel_tolerance=1e-6,
    ideas=[
        Idea("all of 32 forget, all trained", (32, 32, 2.0), 0.5),
        Idea("half of 32 forget, LoRA", (32, 16, 1.0), 0.5),
        Idea("your model", a_price, 0.5),
        Idea("another model", a_price, 1.5, hidden=True),
    ],
    mistakes={
        "twice the forward is twice the step": (
            "a step is forward *and* backward; compare with both.",
            lambda layers, forgetting, ratio: 100 * forgetting / layers),
        "compares with backward": ("the step that keeps everything has a forward too.",
                                   lambda layers, forgetting, ratio:
                                   100 * forgetting / (layers * ratio)),
        "the whole step": (
            "by how much it *grows* is asked: leave the 100 % out that it was.",
            lambda layers, forgetting, ratio: 100 + 100 * forgetting / (layers * (1 + ratio))),
        "a share, no percent": ("in percent, please: times 100.",
                                lambda layers, forgetting, ratio:
                                forgetting / (layers * (1 + ratio))),
        "all layers forget": ("only `forgetting` of the layers run forward again.",
                              lambda layers, forgetting, ratio: 100 / (1 + ratio)),
    })]

# %% [markdown]
# Is it √N? `layers` layers are cut into segments of `size` layers each (a divisor of `layers`).
# Between segments a boundary of 1 is kept, one per segment; the segment that comes back holds
# `inside` boundaries for each of its layers. So a cut into segments of `size` holds
# `layers / size + size * inside` boundaries. Which size holds the least?


# %% tags=["exercise"]
def best_segment(layers, inside):
    """[best size, boundaries held with it]; if two sizes hold equally few, the smaller size."""
    ### BEGIN SOLUTION
    sizes = [size for size in range(1, layers + 1) if layers % size == 0]
    best = min(sizes, key=lambda size: layers // size + size * inside)
    return [best, layers // best + best * inside]
    ### END SOLUTION


# %% tags=["hidden"]
def segment(layers, size, inside):
    return [size, layers // size + size * inside]


def nearest_root(layers, inside):
    sizes = [size for size in range(1, layers + 1) if layers % size == 0]
    return segment(layers, min(sizes, key=lambda size: abs(size - layers**0.5)), inside)


def larger_when_equal(layers, inside):
    sizes = [size for size in range(1, layers + 1) if layers % size == 0]
    best = min(reversed(sizes), key=lambda size: layers // size + size * inside)
    return segment(layers, best, inside)


def without_inside(layers, inside):
    sizes = [size for size in range(1, layers + 1) if layers % size == 0]
    best = min(sizes, key=lambda size: layers // size + size)
    return [best, layers // best + best]


def a_transformer(draw):
    return draw.choice((16, 24, 28, 32, 36, 40, 48, 60, 64, 72, 80, 96)), draw.integer(12, 76)


def thin_layers(draw):
    return draw.choice((36, 48, 60, 72, 84, 96, 120, 144, 180)), draw.integer(3, 9)


def a_tie(draw):
    inside = draw.integer(6, 60)  # 2 x inside + inside = inside + 2 x inside
    return 2 * inside, inside


EXERCISES += [exercise(
    best_segment, title="Is it the square root?", minutes=8,
    reread='lesson 02, "Memory grows like √N"',
    ideas=[
        Idea("Chen's chain of 64", (64, 1), 0.5),
        Idea("a tie", (8, 4), 0.5),
        Idea("your transformer", a_transformer, 0.5, tells=("always the root",
                                                           "one inside a layer")),
        Idea("another transformer", a_transformer, 1.5, hidden=True,
             tells=("always the root", "one inside a layer")),
        Idea("layers that keep little", thin_layers, 1, hidden=True,
             tells=("always the root", "always 1")),
        Idea("another tie", a_tie, 1, hidden=True, tells=("the larger of two",)),
    ],
    mistakes={
        "always the root": (
            "√N is best only if a layer keeps one boundary inside; compare all sizes with yours.",
            nearest_root),
        "one inside a layer": (
            "each layer of the segment that comes back holds `inside` boundaries, not one.",
            without_inside),
        "always 1": ("one layer a segment is best when layers keep much; here compare the others.",
                     lambda layers, inside: segment(layers, 1, inside)),
        "the larger of two": ("two sizes hold equally few: take the smaller one.",
                              larger_when_equal),
    })]

# %% tags=["hidden"]
ASSIGNMENT = Assignment("checkpointing", "What if we forget on purpose?", "lesson 02",
                        tuple(EXERCISES))
