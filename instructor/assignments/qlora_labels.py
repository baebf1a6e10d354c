# %% tags=["hidden"]
"""Assignment on lesson 07: labels of a conversation, adapters counted, a 4-bit base counted."""

from instructor.assignment import Assignment
from instructor.cases import Idea, exercise

EXERCISES = []

# %% [markdown]
# # QLoRA: labels and counts. The assignment
#
# Three functions about a fine-tune on data of your own. Lesson 07 is the background. Plain Python,
# no GPU, nothing to install.

# %% [markdown]
# From messages to labels. A chat template has written a conversation; `turns` lists, in order,
# `[role, header, words, end]` for each message: who speaks, and the token ids of the mark in front,
# of what is said, and of what ends it. The conversation's ids are all of these, one behind the
# other. Learned is what the assistant says and what ends it, in every turn; every other label is
# -100. The model shifts by itself.


# %% tags=["exercise"]
def labels_of(turns):
    """A label for each token id of the conversation."""
    ### BEGIN SOLUTION
    labels = []
    for role, header, words, end in turns:
        said = [*words, *end]
        labels += [-100] * len(header) + (said if role == "assistant" else [-100] * len(said))
    return labels
    ### END SOLUTION


# %% tags=["hidden"]
def labels_with(header=False, words=True, end=True, who=("assistant",)):
    def mistaken(turns):
        labels = []
        for role, *parts in turns:
            for part, learned in zip(parts, (header, words, end), strict=True):
                labels += part if learned and role in who else [-100] * len(part)
        return labels
    return mistaken


def all_ids(turns):
    return [token for _, *parts in turns for part in parts for token in part]


def all_that_follows(turns):
    labels = labels_of(turns)
    first = next((n for n, label in enumerate(labels) if label != -100), len(labels))
    return labels[:first] + all_ids(turns)[first:]


def only_the_last(turns):
    answers = [n for n, turn in enumerate(turns) if turn[0] == "assistant"]
    return labels_of([turn if n == answers[-1] else ["other", *turn[1:]]
                      for n, turn in enumerate(turns)])


def already_shifted(turns):
    return [*labels_of(turns)[1:], -100]


def some_turns(draw, roles):
    headers = {role: [draw.integer(2, 9), draw.integer(10, 99)]
               for role in ("system", "user", "assistant")}
    ends = [draw.integer(100, 199)]
    return [[role, [*headers[role]], [draw.integer(200, 999) for _ in range(draw.integer(2, 5))],
             [*ends]] for role in roles]


ASK = ("user", "assistant")
LABEL_MISTAKES = ("the header is learned", "never stops", "learns later questions", "shifts",
                  "nothing is masked", "the last answer only", "learns the questions")
EXERCISES += [exercise(
    labels_of, title="Your data, your labels", minutes=10, reread="lesson 07, section 3",
    ideas=[
        Idea("one question", ([["user", [2, 10], [201, 202], [100]],
                               ["assistant", [2, 11], [301], [100]]],), 0.5),
        Idea("with a system message", ([["system", [2, 12], [401], [100]],
                                        ["user", [2, 10], [201], [100]],
                                        ["assistant", [2, 11], [301, 302], [100]]],), 0.5),
        Idea("your conversation", lambda draw: (some_turns(draw, ("system", *ASK, *ASK)),), 1,
             tells=LABEL_MISTAKES),
        Idea("three questions", lambda draw: (some_turns(draw, ASK * 3),), 2.5, hidden=True,
             tells=LABEL_MISTAKES),
        Idea("two answers in a row",
             lambda draw: (some_turns(draw, ("system", *ASK, "assistant", "user")),), 1.5,
             hidden=True, tells=("learns later questions",)),
    ],
    mistakes={
        "the header is learned": ("the mark in front of an answer is given, not learned.",
                                  labels_with(header=True)),
        "never stops": ("what ends an answer is learned too, or generation never stops.",
                        labels_with(end=False)),
        "learns later questions": ("behind the first answer come other questions: mask them.",
                                   all_that_follows),
        "shifts": ("labels are not shifted here: the model compares position i with label i + 1.",
                   already_shifted),
        "nothing is masked": ("only the assistant's words have a label; the rest is -100.",
                              all_ids),
        "the last answer only": ("every answer of the conversation is learned.", only_the_last),
        "learns the questions": ("the assistant's words are learned, not the user's.",
                                 labels_with(who=("user",))),
    })]

# %% [markdown]
# Count the adapters. LoRA of rank `rank` puts two matrices beside a linear layer, A (rank x in) and
# B (out x rank). In each of `layers` layers q and o are `hidden` x `hidden`, k and v go from
# `hidden` to `kv`, gate and up from `hidden` to `intermediate`, down back again. `targets` lists
# which of `"q"`, `"k"`, `"v"`, `"o"`, `"gate"`, `"up"`, `"down"` have adapters.


# %% tags=["exercise"]
def adapter_parameters(layers, hidden, kv, intermediate, rank, targets):
    """Trainable parameters of all adapters."""
    ### BEGIN SOLUTION
    other = {"q": hidden, "o": hidden, "k": kv, "v": kv,
             "gate": intermediate, "up": intermediate, "down": intermediate}
    return layers * rank * sum(hidden + other[name] for name in targets)
    ### END SOLUTION


# %% tags=["hidden"]
def adapters(one=lambda wide, hidden, rank: rank * (hidden + wide), layered=True, grouped=True):
    def mistaken(layers, hidden, kv, intermediate, rank, targets):
        kv = kv if grouped else hidden
        wide = {"q": hidden, "o": hidden, "k": kv, "v": kv,
                "gate": intermediate, "up": intermediate, "down": intermediate}
        return (layers if layered else 1) * sum(one(wide[name], hidden, rank) for name in targets)
    return mistaken


def some_model(draw):
    groups, head = draw.choice((2, 4, 8)), 64 * draw.integer(1, 2)
    hidden = groups * draw.integer(2, 8) * head
    intermediate = 128 * draw.integer(hidden // 64, hidden // 32)
    return draw.integer(12, 48), hidden, hidden // groups, intermediate, \
        draw.choice((4, 8, 16, 32, 64))


def some_targets(draw):
    more = [["gate"], ["up", "down"], ["down"], ["gate", "up", "down"]]
    return *some_model(draw), ["q", "k", "v", "o", *draw.choice(more)]


FOUR, SEVEN = ["q", "k", "v", "o"], ["q", "k", "v", "o", "gate", "up", "down"]
EXERCISES += [exercise(
    adapter_parameters, title="Count the adapters", minutes=7, reread="lesson 07, exercise 07.2",
    ideas=[
        Idea("Llama-3.2-1B", (16, 2048, 512, 8192, 16, FOUR), 0.5),
        Idea("q and v only", (16, 2048, 512, 8192, 8, ["q", "v"]), 0.5),
        Idea("your model", some_targets, 1),
        Idea("another model", some_targets, 2, hidden=True),
        Idea("every linear layer", lambda draw: (*some_model(draw), [*SEVEN]), 1, hidden=True),
    ],
    mistakes={
        "one layer": ("every layer has its own adapters.", adapters(layered=False)),
        "no grouped queries": ("k and v go to `kv`, not to `hidden`.", adapters(grouped=False)),
        "A only": ("an adapter is two matrices, A and B.",
                   adapters(lambda wide, hidden, rank: rank * hidden)),
        "the weights": ("that is the size of the weights beside the adapters.",
                        adapters(lambda wide, hidden, rank: hidden * wide)),
        "rank twice": ("no matrix is rank x rank: A is rank x in, B is out x rank.",
                       adapters(lambda wide, hidden, rank: rank * (hidden + wide + rank))),
    })]

# %% [markdown]
# Count the base. NF4 stores a weight in 4 bits, and a scale for each 64 weights of a matrix; the
# last block may be smaller. Quantized twice, a scale takes one byte, and each 256 scales of a
# matrix have one float32 in common (the last of them may be fewer). `matrices` lists
# `[out, in]` of each linear layer, all of an even size. Embeddings, head and norms,
# `other_parameters` in all, stay in 16 bits. (A few bytes for tables are left out.)


# %% tags=["exercise"]
def base_bytes(matrices, other_parameters):
    """Bytes of a frozen base in NF4, quantized twice."""
    ### BEGIN SOLUTION
    found = 2 * other_parameters
    for out, into in matrices:
        scales = -(-out * into // 64)
        found += out * into // 2 + scales + 4 * -(-scales // 256)
    return found
    ### END SOLUTION


# %% tags=["hidden"]
def base_mistake(other=2, scale=1, whole=4, per_weight=2, together=False):
    def mistaken(matrices, other_parameters):
        sizes = [out * into for out, into in matrices]
        found = other_parameters * other if other else other_parameters // 2
        for size in [sum(sizes)] if together else sizes:
            scales = -(-size // 64)
            found += size // per_weight + scale * scales + whole * -(-scales // 256)
        return found
    return mistaken


def some_matrices(draw):
    return [[2 * draw.integer(30, 900), draw.integer(60, 3000)]
            for _ in range(draw.integer(3, 5))], 1000 * draw.integer(100, 900)


EXERCISES += [exercise(
    base_bytes, title="Count the base", minutes=8,
    reread='lesson 07, section 4 and "The budget, line by line"',
    ideas=[
        Idea("one matrix", ([[2048, 2048]], 0), 0.5),
        Idea("with embeddings", ([[2048, 2048], [512, 2048]], 1000000), 0.5),
        Idea("a rest", ([[10, 30], [6, 11]], 100), 0.5),
        Idea("your model", some_matrices, 0.5),
        Idea("another model", some_matrices, 2, hidden=True,
             tells=("embeddings in 4 bits", "no scales", "blocks over matrices")),
        Idea("a third model", some_matrices, 1, hidden=True),
    ],
    mistakes={
        "embeddings in 4 bits": (
            "embeddings, head and norms stay in 16 bits, 2 bytes a parameter.",
            base_mistake(other=0)),
        "no scales": ("each 64 weights have a scale.", base_mistake(scale=0, whole=0)),
        "scales in float32": ("quantized twice, a scale takes one byte.",
                              base_mistake(scale=4, whole=0)),
        "scales without theirs": ("each 256 scales have a float32 in common.",
                                  base_mistake(whole=0)),
        "a byte a weight": ("4 bits are half a byte.", base_mistake(per_weight=1)),
        "blocks over matrices": ("each matrix has blocks of its own, with a rest of its own.",
                                 base_mistake(together=True)),
    })]

# %% tags=["hidden"]
ASSIGNMENT = Assignment(
    "qlora_labels", "QLoRA: labels and counts", "lesson 07", tuple(EXERCISES))
