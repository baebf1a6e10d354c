"""Pictures: their words, their colours, and that lengths and areas are in proportion."""

import ast
import io
import itertools
import re
import struct
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import _pylab_helpers, colors
from PIL import Image

from course_utils import figures
from course_utils.figures import base, training
from fitcast import gpus
from fitcast.memory.ledger import MemoryLedger
from fitcast.memory.report import CATEGORIES
from fitcast.units import GIB, MIB
from tools.notebooks import lesson_scripts


def report():
    """A ledger of 1 MiB of inputs and, for a while, 3 MiB of temporaries."""
    x = torch.ones(256, 1024)
    with MemoryLedger(inputs=x) as ledger:
        y = torch.cat([x, x, x])
        for _ in range(8):
            x.add_(1)
        del y
    return ledger.report()


DRAWN = {
    "memory_over_time": lambda: base.memory_over_time(report(), "a test"),
    "compare": lambda: base.compare(
        {"small": {"weights": GIB}, "big": {"weights": 20 * GIB}}, gpus.T4, "a test"
    ),
    "curves": lambda: base.curves([1, 2, 4], {"one": [1, 2, 4], "two": [1, 4, 16]}, "n"),
    "forward_backward": base.forward_backward,
}


def test_type_checkers_see_the_names_that_lessons_use():
    """They read the imports under `TYPE_CHECKING`, where Python reads `__getattr__`'s table."""
    body = ast.parse(Path(figures.__file__).read_text("utf-8")).body
    (typed,) = [node for node in body if isinstance(node, ast.If)]
    homes = {alias.name: node.module for node in typed.body for alias in node.names}
    assert homes == {name: f"course_utils.figures.{home}" for name, home in figures._HOMES.items()}
    assert sorted(homes) == figures.__all__ == dir(figures)
    assert [name for name in homes if not callable(getattr(figures, name))] == []
    drawn = {
        name
        for script in lesson_scripts()
        for name in re.findall(r"\bfigures\.(\w+)\(", script.read_text("utf-8"))
    }
    assert drawn and drawn <= set(homes)


def test_a_picture_that_is_not_there_lists_those_that_are():
    with pytest.raises(AttributeError, match="figures has no 'pie'; it has Figure, Watcher, adap"):
        figures.pie  # noqa: B018


def pixels(figure) -> np.ndarray:
    """(height, width, 4), 0 to 255."""
    return np.asarray(Image.open(io.BytesIO(figure.png)).convert("RGBA"))


def painted(figure, holder: str) -> np.ndarray:
    """Where the holder's colour is: (height, width), bool."""
    wanted = np.array(colors.to_rgb(base.COLOURS[holder])) * 255
    return (np.abs(pixels(figure)[..., :3] - wanted) < 3).all(axis=-1)


@pytest.mark.one_fast
@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_every_figure_is_png_with_words_on_white(draw):
    before = dict(matplotlib.rcParams)
    figure = draw()
    data, metadata = figure._repr_mimebundle_()
    assert set(data) == {"image/png", "text/plain"}
    assert data["text/plain"] == f"Figure: {figure.alt}" and len(figure.alt) > 40
    assert metadata["image/png"]["alt"] == figure.alt
    assert struct.unpack(">8sLL4sL", figure.png[:24])[0] == b"\x89PNG\r\n\x1a\n"
    image = pixels(figure)
    assert (image[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()  # opaque white on a dark page too
    assert 600 < image.shape[1] < 1000
    assert figure.png == draw().png  # the same bytes each time: no version, no date
    assert _pylab_helpers.Gcf.figs == {}
    assert dict(matplotlib.rcParams) == before


def test_both_worlds_stand_beside_each_other_with_what_was_measured():
    def rung(verdict, n_bytes, **measured):
        f = SimpleNamespace(composition={"weights": n_bytes}, peak_bytes=n_bytes, verdict=verdict)
        return SimpleNamespace(forecast=f, measured=measured)

    pair = SimpleNamespace(
        name="all levers",
        no_mask=rung("fits", 9 * GIB, peak_allocated_bytes=8 * GIB),
        padded=rung("tight", 14 * GIB),
    )
    figure = training.two_worlds([pair], gpus.T4, "8B")
    assert "no mask, all levers: 9.00 GiB, fits, measured 8.00 GiB" in figure.alt
    assert "padded, all levers: 14.00 GiB, tight" in figure.alt
    found = painted(figure, "weights")
    wide = found[found.sum(axis=1).argmax()]  # a line of pixels through both bars
    half = len(wide) // 2
    assert wide[half:].sum() / wide[:half].sum() == pytest.approx(14 / 9, rel=0.1)


def test_timeline_names_peak_and_cause():
    alt = base.memory_over_time(report(), "a test").alt
    assert "a test. From 1.00 MiB up to a peak of 4.00 MiB" in alt
    assert "in forward by cat" in alt and "down to 1.00 MiB" in alt
    assert "temporaries 3.00 MiB" in alt


def test_timeline_areas_are_in_proportion():
    figure = base.memory_over_time(report())
    above_legend = slice(0, int(0.87 * len(pixels(figure))))
    heights = [
        painted(figure, name)[above_legend].sum(axis=0).max() for name in ("inputs", "temporaries")
    ]
    assert heights[1] / heights[0] == pytest.approx(3, rel=0.1)


def test_a_spike_of_one_moment_among_thousands_is_drawn_to_its_top():
    base_line, spike = [MIB] * 5000, [0] * 5000
    spike[2501] = 3 * MIB
    one = SimpleNamespace(
        timeline={"inputs": base_line, "temporaries": spike}, phases=["forward"] * 5000,
        peak_operation="cat", peak_module="", peak_phase="forward",
    )  # fmt: skip
    figure = base.memory_over_time(one)
    above_legend = slice(0, int(0.87 * len(pixels(figure))))
    heights = [
        painted(figure, name)[above_legend].sum(axis=0).max() for name in ("inputs", "temporaries")
    ]
    assert heights[1] / heights[0] == pytest.approx(3, rel=0.1)


def test_bars_are_in_proportion():
    rows = {"a": {"weights": 5 * GIB}, "b": {"weights": 15 * GIB, "activations": 0}}
    figure = base.compare(rows, gpus.T4)
    lengths = np.unique(painted(figure, "weights").sum(axis=1))
    assert lengths[-1] / lengths[lengths > 60][0] == pytest.approx(3, rel=0.05)
    assert "a: 5.00 GiB (" in figure.alt and "14.42 GiB of a T4" in figure.alt
    assert "fits" not in figure.alt, "bytes of tensors alone are no verdict"


@pytest.mark.parametrize("verdict", ["fits", "tight", "does not fit"])
def test_a_forecast_says_whether_it_fits(verdict):
    row = SimpleNamespace(composition={"weights": 15 * GIB}, verdict=verdict)
    assert f"a: 15.00 GiB, {verdict} (" in base.compare({"a": row}, gpus.T4).alt


def test_a_bar_within_the_card_that_does_not_fit_says_why():
    for n_bytes, words in ((12 * GIB, "does not fit, with gaps"), (16 * GIB, "does not fit")):
        row = SimpleNamespace(composition={"weights": n_bytes}, verdict="does not fit")
        assert f"GiB, {words} (weights" in base.compare({"a": row}, gpus.T4).alt


def test_on_a_fixed_axis_a_bar_changes_its_length_and_a_long_one_is_cut():
    def length(n_bytes):
        figure = base.compare({"a": {"weights": n_bytes}}, axis_bytes=8 * GIB)
        return painted(figure, "weights").sum(axis=1).max()

    assert length(4 * GIB) / length(2 * GIB) == pytest.approx(2, rel=0.05)
    assert 0.97 * length(8 * GIB) < length(80 * GIB) < length(8 * GIB), "a gap says: it goes on"


def test_bars_take_reports():
    assert "inputs 1.00 MiB" in base.compare({"step": report()}).alt


def test_no_line_is_dropped_for_want_of_a_colour():
    lines = {str(n): [n, 2 * n] for n in range(1, 8)}
    assert (
        base.curves([1, 2], lines, "n").png != base.curves([1, 2], lines | {"7": [7, 1]}, "n").png
    )
    assert base.losses(lines).png != base.losses(lines | {"7": [7, 1]}).png


def test_curves_say_their_ends():
    alt = base.curves([512, 4096], {"SDPA": [MIB, 8 * MIB]}, "sequence length").alt
    assert "SDPA: 1.00 MiB at 512, 8.00 MiB at 4,096" in alt


# How a deuteranope sees linear RGB: Machado, Oliveira and Fernandes 2009, table 1, severity 1.0.
DEUTERANOPE = np.array(
    [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]
)
PROTANOPE = np.array(
    [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ]
)


def nearest(palette: list[str], eye: np.ndarray) -> float:
    """Smallest distance of two colours of the palette as this eye sees them (sRGB, 0 to 1.7)."""
    seen = [np.clip(eye @ np.array(colors.to_rgb(c)) ** 2.2, 0, 1) ** (1 / 2.2) for c in palette]
    return min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2))


@pytest.mark.parametrize("eye", [np.eye(3), DEUTERANOPE, PROTANOPE], ids=["all", "green", "red"])
def test_colours_stay_apart_for_colour_blind_eyes(eye):
    assert set(base.COLOURS) == set(CATEGORIES)
    assert nearest(list(base.COLOURS.values()), eye) > 0.15


def test_red_beside_green_would_be_caught():
    assert nearest(["#b05030", "#708030"], DEUTERANOPE) < 0.15
