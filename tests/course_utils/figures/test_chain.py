"""The picture of a chain: its words count right, and what is computed again looks different."""

import io
import re

import numpy as np
import pytest
from matplotlib import colors
from PIL import Image

from course_utils.figures import base
from course_utils.figures.chain import chains
from course_utils.topics.checkpointing import trace_chain

ALL, SOME = trace_chain(6, range(1, 7)), trace_chain(6, [1, 3, 5])


def test_words_hold_every_count():
    alt = chains({"all": ALL, "some": SOME}, steps=6).alt
    assert "all: at most 6 inputs held, 6 forward steps" in alt
    assert "some: at most 4 inputs held, 9 forward steps" in alt
    told = re.search(r"some: .*action: (.*)\.", alt)[1].split(", ")
    assert told == [f"{moment.action} {len(moment.held)}" for moment in SOME]


def green(figure) -> int:
    """Pixels in the colour of activations."""
    image = np.asarray(Image.open(io.BytesIO(figure.png)).convert("RGB"))
    wanted = np.array(colors.to_rgb(base.COLOURS["activations"])) * 255
    return int((np.abs(image - wanted) < 3).all(axis=-1).sum())


def test_only_what_was_kept_is_filled():
    """42 filled boxes, against 30 filled and 6 hatched: areas in proportion."""
    everything, some = chains({"x": ALL}, steps=6), chains({"x": SOME}, steps=6)
    boxes = [sum(len(moment.held) for moment in trace) for trace in (ALL, SOME)]
    assert boxes == [42, 36]
    filled = sum(number in (1, 3, 5) for moment in SOME for number in moment.held)
    widths = len(SOME) / len(ALL)  # more actions make narrower boxes
    assert filled == 30
    assert green(some) * widths / green(everything) == pytest.approx(30 / 42, rel=0.15)
    assert everything.png == chains({"x": ALL}, steps=6).png
