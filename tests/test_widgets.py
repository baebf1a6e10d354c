"""Controls: a static picture without a kernel, a new one for each move, labels, no state."""

import re
from pathlib import Path

import ipywidgets
import pytest

from course_utils import widgets
from course_utils.figures import Figure


def drawn(size: int = 1, name: str = "a", dark: bool = False) -> Figure:
    if size == 3:
        raise ValueError("size must not be 3, got <3>; take 2")
    return Figure(b"png", f"size {size}, name '{name}', dark {dark}")


@pytest.fixture
def explorer():
    return widgets.Explorer(drawn, size=(2, 1, 3), name=("a", "b"), dark=False)


def test_stands_still_without_a_kernel(explorer):
    data, metadata = explorer._repr_mimebundle_()
    assert data["text/plain"] == "Figure: size 2, name 'a', dark False"
    assert data["image/png"] == "cG5n"
    assert metadata["image/png"]["alt"] == explorer.figure.alt
    assert data[widgets.VIEW]["model_id"] == explorer.box.model_id


@pytest.mark.parametrize(("control", "value", "shown"), [
    ("size", 1, "size 1"), ("name", "b", "name &#x27;b&#x27;"), ("dark", True, "dark True"),
])
def test_picture_follows_each_control(explorer, control, value, shown):
    assert shown not in explorer.picture.value
    explorer.controls[control].value = value
    assert shown in explorer.picture.value
    assert explorer.figure.alt.startswith("size 2")  # the static picture stays the default


def test_impossible_combination_is_said(explorer):
    explorer.controls["size"].value = 3
    assert "size must not be 3, got &lt;3&gt;; take 2" in explorer.picture.value
    assert "<img" not in explorer.picture.value
    explorer.controls["size"].value = 1
    assert "<img alt=" in explorer.picture.value


def test_impossible_default_raises():
    with pytest.raises(ValueError, match="size must not be 3"):
        widgets.Explorer(drawn, size=(3, 1))


def test_controls_are_labelled_and_reachable_by_keyboard():
    explorer = widgets.layers_explorer()
    focusable = ipywidgets.SelectionSlider | ipywidgets.Checkbox  # JupyterLab takes a menu's keys
    for name, control in explorer.controls.items():
        assert isinstance(control, focusable)
        assert control.description == name.replace("_", " ") and not control.disabled
        if int(ipywidgets.__version__.split(".")[0]) >= 8:  # to be seen on light and dark pages
            assert control.style.handle_color == "#0072B2"
    assert explorer.controls["sequence_length"].options == (256, 512, 1024, 2048, 4096)
    assert explorer.controls["sequence_length"].value == 2048


def test_layers_explorer_draws_every_choice():
    explorer = widgets.layers_explorer()
    assert "usual estimate: 13.05 GiB, fits" in explorer.figure.alt
    assert "what layers keep: 23.93 GiB, does not fit" in explorer.figure.alt
    for name, control in explorer.controls.items():
        default, seen = control.value, set()
        for option in control.options:
            control.value = option
            assert "<img" in explorer.picture.value, (name, option)
            seen.add(explorer.picture.value)
        assert len(seen) == len(control.options), name
        control.value = default


def test_nothing_that_breaks_strict_notebooks():
    source = Path(widgets.__file__).read_text("utf-8")
    assert re.findall(r"\b(interact\w*|Output|clear_output)\(", source) == []


def test_a_setting_that_was_shown_before_is_not_drawn_again():
    drawn = []

    def draw(n):
        drawn.append(n)
        return Figure(b"png", f"n is {n}")

    explorer = widgets.Explorer(draw, n=(1, 2))
    first = explorer.picture.value
    explorer.controls["n"].value = 2
    assert explorer.picture.value != first
    explorer.controls["n"].value = 1
    assert explorer.picture.value == first and drawn == [1, 2]
