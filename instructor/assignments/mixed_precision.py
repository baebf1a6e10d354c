# %% tags=["hidden"]
"""Assignment on lesson 04: what 16 bits can hold, what they save, which ones to take."""

from instructor.assignment import Assignment
from instructor.cases import Idea, exercise

EXERCISES = []

# %% [markdown]
# # Half the bits, all the quality? The assignment
#
# Five functions about numbers of 16 bits and the runs that use them. Lesson 04 is the background.
# Plain Python floats are exact enough for all of it. No GPU, nothing to install.

# %% tags=["setup"]
import math

# %% [markdown]
# Read a number from its bits: a sign, `exponent_bits` of exponent, the rest fraction. The exponent
# is stored with a bias of `2 ** (exponent_bits - 1) - 1` added. A normal number is (1 + fraction)
# times its power of two. If all exponent bits are 0 the number is *subnormal*: no leading 1, and
# the power of two is that of the smallest normal number. (All exponent bits 1 would be infinite or
# not a number; that does not come up.)


# %% tags=["exercise"]
def number_from(bits, exponent_bits):
    """The number that a string of "0" and "1" stands for, sign first."""
    ### BEGIN SOLUTION
    sign = -1 if bits[0] == "1" else 1
    exponent, fraction = bits[1:1 + exponent_bits], bits[1 + exponent_bits:]
    bias = 2 ** (exponent_bits - 1) - 1
    share = int(fraction, 2) / 2 ** len(fraction)
    if int(exponent, 2) == 0:
        return sign * share * 2.0 ** (1 - bias)
    return sign * (1 + share) * 2.0 ** (int(exponent, 2) - bias)
    ### END SOLUTION


# %% tags=["hidden"]
def fields(bits, width):
    exponent, fraction = bits[1:1 + width], bits[1 + width:]
    return -1 if bits[0] == "1" else 1, int(exponent, 2), int(fraction, 2) / 2 ** len(fraction)


def read_as(leading=lambda exponent: 1 if exponent else 0, shift=0, signed=True,
            lowest=lambda exponent: max(exponent, 1)):
    def mistaken(bits, width):
        sign, exponent, share = fields(bits, width)
        power = lowest(exponent) - 2 ** (width - 1) + 1 + shift
        return (sign if signed else 1) * (leading(exponent) + share) * 2.0**power
    return mistaken


def pattern(draw, width, exponent):
    fraction = draw.integer(1, 2 ** (15 - width) - 1)
    return f"{draw.integer(0, 1)}{exponent:0{width}b}{fraction:0{15 - width}b}", width


def a_normal_number(draw):
    width = draw.choice((4, 5, 6, 8))
    return pattern(draw, width, draw.integer(1, 2**width - 2))


def a_negative_number(draw):
    bits, width = a_normal_number(draw)
    return "1" + bits[1:], width


def a_subnormal_number(draw):
    return pattern(draw, draw.choice((4, 5, 6)), 0)


EXERCISES += [exercise(
    number_from, title="Read the bits", minutes=10, reread="lesson 04, section 1",
    ideas=[
        Idea("1.5 in float16", ("0011111000000000", 5), 0.5),
        Idea("a negative one in bfloat16", ("1100000001000000", 8), 0.25),
        Idea("a subnormal one in float16", ("0000000001000000", 5), 0.5),
        Idea("your number", a_normal_number, 0.75),
        Idea("another negative number", a_negative_number, 1.5, hidden=True),
        Idea("another subnormal number", a_subnormal_number, 1.5, hidden=True),
    ],
    mistakes={
        "no leading 1": ("a normal number is *1 +* its fraction; the 1 is not stored.",
                         read_as(leading=lambda exponent: 0)),
        "a leading 1 everywhere": (
            "a subnormal number has no leading 1, its exponent bits are all 0.",
            read_as(leading=lambda exponent: 1)),
        "bias off by one": ("the bias is 2 ** (exponent_bits - 1) - 1: 15 with five bits.",
                            read_as(shift=-1)),
        "forgets the sign": ("the first bit is the sign: 1 makes the number negative.",
                             read_as(signed=False)),
        "subnormals one power lower": (
            "subnormal numbers share the power of two of the smallest normal one.",
            read_as(lowest=lambda exponent: exponent)),
    })]

# %% [markdown]
# From the widths alone: how far does a format reach, and how fine is it? The largest exponent
# pattern is reserved for infinity, the smallest for subnormal numbers.


# %% tags=["exercise"]
def limits(exponent_bits, fraction_bits):
    """[largest, smallest normal, smallest positive (subnormal), distance from 1 to the next]."""
    ### BEGIN SOLUTION
    bias = 2 ** (exponent_bits - 1) - 1
    finest = 2.0**-fraction_bits
    smallest = 2.0 ** (1 - bias)
    return [(2 - finest) * 2.0**bias, smallest, smallest * finest, finest]
    ### END SOLUTION


# %% tags=["hidden"]
def reach(largest=lambda bias, finest: (2 - finest) * 2.0**bias, shift=0,
          subnormal=lambda smallest, finest: smallest * finest, extra=0):
    def mistaken(exponent_bits, fraction_bits):
        bias, finest = 2 ** (exponent_bits - 1) - 1, 2.0 ** -(fraction_bits + extra)
        smallest = 2.0 ** (1 - bias + shift)
        return [largest(bias, finest), smallest, subnormal(smallest, finest), finest]
    return mistaken


def a_format(draw):
    return draw.integer(3, 9), draw.integer(3, 40)


EXERCISES += [exercise(
    limits, title="How far, how fine", minutes=8, reread="lesson 04, section 1",
    ideas=[
        Idea("float16", (5, 10), 0.5),
        Idea("bfloat16", (8, 7), 0.5),
        Idea("your format", a_format, 0.5),
        Idea("another format", a_format, 1.25, hidden=True),
        Idea("a third format", a_format, 1.25, hidden=True),
    ],
    mistakes={
        "uses the reserved exponent": (
            "the largest exponent pattern means infinity; the largest number is one power lower.",
            reach(largest=lambda bias, finest: (2 - finest) * 2.0 ** (bias + 1))),
        "a power of two as the largest": (
            "below infinity there is room for all fraction bits: nearly twice the largest power.",
            reach(largest=lambda bias, finest: 2.0**bias)),
        "normal with exponent 0": (
            "exponent pattern 0 is for subnormal numbers; the smallest normal one has pattern 1.",
            reach(shift=-1)),
        "no subnormals": ("below the smallest normal number there are subnormal ones, each "
                          "fraction bit gives one more power of two.",
                          reach(subnormal=lambda smallest, finest: smallest)),
        "half the distance": ("that is half the distance, where rounding decides; the next number "
                              "is a whole one away.", reach(extra=1)),
    })]

# %% [markdown]
# The update that vanishes. A weight is stored in a format with `fraction_bits`. It gets the same
# update `times` times; after *each* addition the sum is rounded to the closest number of the
# format, and of two equally close ones to the even one, as Python's `round` does. The numbers of
# the format between 2ᵉ and 2ᵉ⁺¹ are 2ᵉ divided by `2 ** fraction_bits` apart. All numbers are
# positive and in range.


# %% tags=["exercise"]
def updated(weight, update, times, fraction_bits):
    """The weight after `times` updates, each rounded to the format."""
    ### BEGIN SOLUTION
    for _ in range(times):
        total = weight + update
        spacing = 2.0 ** (math.floor(math.log2(total)) - fraction_bits)
        weight = round(total / spacing) * spacing
    return weight
    ### END SOLUTION


# %% tags=["hidden"]
def spaced(number, bits):
    return 2.0 ** (math.frexp(number)[1] - 1 - bits)


def with_rounding(rule=round, at=lambda total: total):
    def mistaken(weight, update, times, bits):
        for _ in range(times):
            spacing = spaced(at(weight + update), bits)
            weight = rule((weight + update) / spacing) * spacing
        return weight
    return mistaken


def rounds_at_the_end(weight, update, times, bits):
    total = weight + times * update
    return round(total / spaced(total, bits)) * spaced(total, bits)


def never_rounds(weight, update, times, bits):
    return weight + times * update


def a_stuck_weight(draw):
    bits = draw.choice((7, 10))
    power, part = draw.integer(1, 4), draw.integer(20, 45) / 100
    weight = (2**bits + draw.integer(1, 2**bits - 40)) * 2.0 ** (power - bits)
    return weight, part * 2.0 ** (power - bits), draw.integer(30, 120), bits


def a_moving_weight(draw):
    weight, update, times, bits = a_stuck_weight(draw)
    return weight, update * draw.integer(3, 8), times, bits


EXERCISES += [exercise(
    updated, title="The update that vanishes", minutes=10, reread="lesson 04, section 4",
    rel_tolerance=1e-9,
    ideas=[
        Idea("1.0 in float16, a thousand times 0.0001", (1.0, 0.0001, 1000, 10), 0.5),
        Idea("1.0 in float16, ten times 0.0008", (1.0, 0.0008, 10, 10), 0.5),
        Idea("2.0 in bfloat16, a hundred times 0.01", (2.0, 0.01, 100, 7), 0.5,
             tells=("spacing at 1",)),
        Idea("your weight", a_moving_weight, 0.5, tells=("rounds at the end", "cuts off")),
        Idea("another weight", a_moving_weight, 2, hidden=True,
             tells=("rounds at the end", "cuts off", "spacing at 1")),
        Idea("a weight that is stuck", a_stuck_weight, 1, hidden=True,
             tells=("rounds at the end", "rounds up")),
    ],
    mistakes={
        "never rounds": ("that is arithmetic without rounding; a format has only so many numbers.",
                         never_rounds),
        "rounds at the end": ("the weight is stored after each update: round every time.",
                              rounds_at_the_end),
        "cuts off": ("rounding goes to the closest number, not always down.",
                     with_rounding(rule=math.floor)),
        "rounds up": ("rounding goes to the closest number, not always up.",
                      with_rounding(rule=math.ceil)),
        "spacing at 1": ("the distance between numbers doubles with each power of two; take it "
                         "where the sum is.", with_rounding(at=lambda total: 1.0)),
    })]

# %% [markdown]
# "Mixed precision halves memory." Count one training step's holders, activations left out, with
# everything trained by Adam:
#
# - `"float32"`: weights, gradients and two averages, all of them float32;
# - `"autocast"`: the same, and 16-bit copies of the `copied` weights that matrix products read;
# - `"pure 16 bits"`: weights, gradients and averages, all of them in 16 bits.


# %% tags=["exercise"]
def training_bytes(parameters, copied, mode):
    """Bytes of weights, copies, gradients and averages in the given mode."""
    ### BEGIN SOLUTION
    if mode == "pure 16 bits":
        return 8 * parameters
    return 16 * parameters + (2 * copied if mode == "autocast" else 0)
    ### END SOLUTION


# %% tags=["hidden"]
def counted(autocast=lambda parameters, copied: 16 * parameters + 2 * copied, plain=16, pure=8):
    def mistaken(parameters, copied, mode):
        if mode == "autocast":
            return autocast(parameters, copied)
        return (pure if mode == "pure 16 bits" else plain) * parameters
    return mistaken


def in_mode(mode):
    def draw_model(draw):
        parameters = draw.integer(200_000_000, 9_000_000_000, 1024)
        return parameters, parameters * draw.integer(60, 97) // 100, mode
    return draw_model


EXERCISES += [exercise(
    training_bytes, title="Does it halve memory?", minutes=6, reread="lesson 04, section 3",
    ideas=[
        Idea("autocast by hand", (1000, 900, "autocast"), 0.5),
        Idea("float32 by hand", (1000, 900, "float32"), 0.25),
        Idea("16 bits by hand", (1000, 900, "pure 16 bits"), 0.25),
        Idea("your model under autocast", in_mode("autocast"), 0.5),
        Idea("another model under autocast", in_mode("autocast"), 1.5, hidden=True),
        Idea("another model in 16 bits", in_mode("pure 16 bits"), 1, hidden=True),
    ],
    mistakes={
        "autocast halves": ("autocast keeps the float32 weights and *adds* 16-bit copies.",
                            counted(lambda parameters, copied: 8 * parameters)),
        "copies everything": ("autocast copies what matrix products read, `copied`, not all.",
                              counted(lambda parameters, copied: 18 * parameters)),
        "gradients in 16 bits": (
            "the gradients of float32 weights are float32 under autocast, too.",
            counted(lambda parameters, copied: 14 * parameters + 2 * copied)),
        "one average": ("Adam has two averages for each parameter.",
                        counted(lambda parameters, copied: 12 * parameters + 2 * copied, 12, 6)),
    })]

# %% [markdown]
# Choose for a card, from what it says of itself: `capability` is `[major, minor]`, and
# `says_bf16` what `torch.cuda.is_bf16_supported()` returns (which counts emulation). bfloat16 needs
# capability 8.0. Take it where it is real, float16 elsewhere; the 4-bit base computes in the same
# format; only float16 needs a loss scaler.


# %% tags=["exercise"]
def settings_for(capability, says_bf16):
    """{"fp16": bool, "bf16": bool, "compute_dtype": "float16" or "bfloat16", "scaler": bool}."""
    ### BEGIN SOLUTION
    bf16 = capability[0] >= 8
    return {"fp16": not bf16, "bf16": bf16,
            "compute_dtype": "bfloat16" if bf16 else "float16", "scaler": not bf16}
    ### END SOLUTION


# %% tags=["hidden"]
def chosen(real, compute=None, scaler=lambda bf16: not bf16):
    def mistaken(capability, says):
        bf16 = real(capability, says)
        return {"fp16": not bf16, "bf16": bf16, "scaler": scaler(bf16),
                "compute_dtype": compute or ("bfloat16" if bf16 else "float16")}
    return mistaken


def by_capability(capability, says):
    return capability[0] >= 8


def an_old_card(draw):
    return draw.choice(([7, 0], [7, 2], [6, 0], [6, 1], [6, 2], [5, 2], [5, 3])), True


def a_new_card(draw):
    return draw.choice(([8, 6], [8, 7], [8, 9], [9, 0], [10, 0], [10, 3], [12, 0], [12, 1])), True


EXERCISES += [exercise(
    settings_for, title="Which 16 bits?", minutes=5, reread="lesson 04, section 5",
    ideas=[
        Idea("a T4", ([7, 5], True), 0.5),
        Idea("an A100", ([8, 0], True), 0.5),
        Idea("an older card", an_old_card, 1, hidden=True),
        Idea("a newer card", a_new_card, 1, hidden=True),
    ],
    mistakes={
        "believes is_bf16_supported()": (
            "it counts emulation and says yes on a T4; ask for the capability.",
            chosen(lambda capability, says: says)),
        "computes in bfloat16 anyway": (
            "two formats in one run mean casts, and a T4 emulates bfloat16: one format for both.",
            chosen(by_capability, "bfloat16")),
        "scales bfloat16": ("bfloat16 has float32's range; a scaler has nothing to do there.",
                            chosen(by_capability, scaler=lambda bf16: True)),
        "never scales": ("float16 flushes small gradients to zero: it needs the scaler.",
                         chosen(by_capability, scaler=lambda bf16: False)),
    })]

# %% tags=["hidden"]
ASSIGNMENT = Assignment("mixed_precision", "Half the bits, all the quality?", "lesson 04",
                        tuple(EXERCISES))
