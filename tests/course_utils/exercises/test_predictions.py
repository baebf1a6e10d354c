"""A guess beside the result; before there is one, the result is folded, and nowhere in the text."""

import html
import re

import numpy as np
import pytest
import torch

from course_utils.exercises.predictions import OPEN, printed, show_prediction
from course_utils.figures import base
from fitcast.units import MIB


@pytest.fixture
def displayed(monkeypatch):
    """What is displayed, in order."""
    found = []
    monkeypatch.setattr("course_utils.exercises.predictions._display", found.append)
    return found


@pytest.mark.parametrize("open_guess", [..., None])
def test_without_a_guess_everything_is_folded(open_guess, displayed, capsys):
    picture = base.losses({"ours": [3.0, 0.2]})
    show_prediction(open_guess, counted=3 * MIB, measured=None, also=[picture, "and 7 < 8"])
    (shown,) = displayed
    assert capsys.readouterr().out == ""
    visible = re.sub(r"<details>.*</details>", "", shown._repr_html_(), flags=re.DOTALL)
    assert html.unescape(re.sub("<[^>]*>", "", visible)).strip() == OPEN.replace("`", "")
    folded = shown._repr_html_().partition("</summary>")[2]
    assert "counted   3.00 MiB\nmeasured  not measured on cpu" in folded
    assert "<pre>and 7 &lt; 8</pre>" in folded
    assert f"alt='{picture.alt}'" in folded and "src='data:image/png;base64," in folded
    assert repr(shown) == OPEN, "where only text is shown, the answer is not"


def test_outside_a_notebook_the_answer_is_not_printed(capsys):
    show_prediction(..., counted=3 * MIB)
    assert capsys.readouterr().out == f"{OPEN}\n"


def test_with_a_guess_nothing_is_folded(displayed, capsys):
    picture = base.losses({"ours": [3.0, 0.2]})
    show_prediction(MIB, counted=2 * MIB, also=[picture, "and more"])
    assert capsys.readouterr().out.splitlines() == [
        "predicted  1.00 MiB (0.50 times the counted)",
        "counted    2.00 MiB",
        "and more",
    ]
    assert displayed == [picture]


@pytest.mark.parametrize(
    ("predicted", "first"),
    [
        (MIB, "predicted  1.00 MiB (0.50 times the counted)"),
        (0, "predicted  0 B"),
        (-MIB, "predicted  -1.00 MiB"),
        ("2 MiB", "predicted  '2 MiB', which is not a number"),
    ],
)
def test_prediction(predicted, first, capsys):
    show_prediction(predicted, counted=2 * MIB, measured=None)
    assert capsys.readouterr().out.splitlines() == [
        first,
        "counted    2.00 MiB",
        "measured   not measured on cpu",
    ]


def test_prediction_of_a_ratio(capsys):
    show_prediction(2.0, show="{:.1f} x".format, counted=4.0)
    assert capsys.readouterr().out.splitlines() == [
        "predicted  2.0 x (0.50 times the counted)",
        "counted    4.0 x",
    ]


@pytest.mark.parametrize(
    ("predicted", "words"),
    [
        (0.3, "30% (1.15 times the counted)"),
        (1, "100% (3.85 times the counted)"),
        (40, "4000% (a share from 0 to 1 is asked for: 40% is 0.4)"),
    ],
)
def test_prediction_of_a_share(predicted, words, capsys):
    show_prediction(predicted, show="{:.0%}".format, counted=0.26)
    assert capsys.readouterr().out.splitlines()[0] == f"predicted  {words}"


@pytest.mark.parametrize(
    ("predicted", "words"),
    [
        ({"8B", "1B, 512"}, "1B, 512; 8B"),
        (["8B", "8B", 1], "1; 8B"),
        ("8B", "8B"),
        (set(), "none"),
        (2, "2, which names none"),
    ],
)
def test_prediction_of_names(predicted, words, capsys):
    show_prediction(predicted, forecast={"8B", "1B, 2048"})
    assert capsys.readouterr().out.splitlines() == [
        f"predicted  {words}",
        "forecast   1B, 2048; 8B",
    ]


def test_prediction_of_an_exponent_has_no_ratio(capsys):
    show_prediction(12, show="scale 2**{:.0f}".format, computed=16)
    assert capsys.readouterr().out.splitlines()[0] == "predicted  scale 2**12"


@pytest.mark.parametrize("predicted", [np.int64(MIB), torch.tensor(MIB), float(MIB)])
def test_prediction_by_any_library(predicted, capsys):
    show_prediction(predicted, counted=2 * MIB)
    assert capsys.readouterr().out.startswith("predicted  1.00 MiB (0.50 times the counted)")


def test_prediction_beside_what_nobody_measured_or_zero(capsys):
    show_prediction(MIB, measured=None, counted=0)
    assert capsys.readouterr().out.splitlines()[0] == "predicted  1.00 MiB"


def test_what_a_function_prints_can_be_folded(capsys):
    assert (
        printed(lambda *rows, end: print(*rows, sep="\n", end=end), "a", "b", end="\n\n") == "a\nb"
    )
    assert capsys.readouterr().out == ""
