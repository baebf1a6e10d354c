"""Controls: a static picture without a kernel, a new one for each move, labels, no state."""

import asyncio
import re
import threading
from pathlib import Path

import ipywidgets
import pytest

from course_utils.figures import widgets
from course_utils.figures.base import Figure
from course_utils.topics import recorded
from fitcast.units import show_bytes


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


@pytest.mark.parametrize(
    ("control", "value", "shown"),
    [
        ("size", 1, "size 1"),
        ("name", "b", "name &#x27;b&#x27;"),
        ("dark", True, "dark True"),
    ],
)
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
    assert explorer.controls["sequence_length"].value == 1024


@pytest.mark.slow
def test_layers_explorer_draws_every_choice():
    explorer = widgets.layers_explorer()
    assert "usual estimate: 256.00 MiB" in explorer.figure.alt
    assert "what layers keep: 5.69 GiB" in explorer.figure.alt
    assert "fit" not in explorer.figure.alt, "nobody counted weights, gradients and state"
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


def use(moves, then=()):
    """Make an explorer in an event loop as a kernel's cell does, and the moves beside that loop.

    Args:
        then: Moves that follow the first picture that was drawn ahead.

    Returns:
        The explorer, and what it drew in which order.
    """
    drawn, threads = [], set()

    def draw(n, wide, tall):
        drawn.append((n, wide, tall))
        threads.add(threading.current_thread())
        if n == 8:
            raise ValueError("n must not be 8, got 8; take 4")
        return Figure(b"png", f"n is {n}")

    async def kernel():
        explorer = widgets.Explorer(draw, n=(2, 1, 4, 8), wide=False, tall=(3, 5, 9))

        def move(moves):
            for name, value in moves:
                explorer.controls[name].value = value

        thread = threading.Thread(target=move, args=[moves])
        thread.start()
        thread.join()
        at_once = len(drawn)
        while then and len(drawn) < 3:
            await asyncio.sleep(0)
        move(then)
        await asyncio.sleep(0.2)
        return explorer, at_once

    explorer, at_once = asyncio.run(kernel())
    assert at_once == 1, "a move drew while a cell ran"
    assert threads == {threading.main_thread()}
    return explorer, drawn


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(widgets, "PAUSE", 0)


def test_moves_made_in_another_thread_are_drawn_in_the_kernels_own(no_pauses):
    explorer, drawn = use([("n", 4)])
    assert "n is 4" in explorer.picture.value and drawn[1] == (4, False, 3)


def test_what_the_next_move_may_show_is_drawn_while_the_reader_looks(no_pauses):
    _, drawn = use([("n", 4)])
    # the moved control's from near to far, then the others' nearest
    assert drawn[2:4] == [(8, False, 3), (1, False, 3)]
    assert set(drawn[4:]) == {(4, True, 3), (4, False, 5)}


def test_a_picture_that_cannot_be_is_drawn_ahead_as_its_reason(no_pauses):
    explorer, drawn = use([("n", 4), ("n", 8)])
    assert "n must not be 8" in explorer.picture.value
    assert drawn.count((8, False, 3)) == 1


def test_the_next_move_ends_drawing_ahead(monkeypatch):
    monkeypatch.setattr(widgets, "PAUSE", 0.02)
    _, drawn = use([("n", 4)], then=[("wide", True)])
    assert drawn[1:4] == [(4, False, 3), (8, False, 3), (4, True, 3)]
    assert (1, False, 3) not in drawn and (4, False, 5) not in drawn


def test_moves_in_a_row_draw_the_last_one_and_ahead_of_it_once(no_pauses):
    _, drawn = use([("n", 4), ("wide", True)])
    assert drawn[1] == (4, True, 3) and len(drawn) == len(set(drawn))
    assert {n for n, wide, _ in drawn if not wide} == {2, 4}


def test_nothing_is_drawn_ahead_in_a_script():
    drawn = []

    def draw(n):
        drawn.append(n)
        return Figure(b"png", f"n is {n}")

    widgets.Explorer(draw, n=(2, 1, 4, 8)).controls["n"].value = 4
    assert drawn == [2, 4]


@pytest.mark.slow
def test_adapters_explorer_shows_what_was_measured_on_a_gpu():
    """The holders of the recorded 8B step, rank 16 on attention: lesson 07's budget."""
    (row,) = [row for row in recorded.rows("budgets") if row["name"] == "llama-3.1-8b"]
    explorer = widgets.adapters_explorer()
    for holder in ("adapters", "optimizer state"):
        assert f"{holder} {show_bytes(row['composition'][holder])}" in explorer.figure.alt
    explorer.controls["rank"].value = 64
    assert "on every linear layer: 1.57 GiB" in explorer.picture.value  # the lesson's answer
    explorer.controls["optimizer"].value = "Adam"
    explorer.controls["rank"].value = 128
    assert "on every linear layer: 5.00 GiB" in explorer.picture.value, "the axis holds it"
