"""Controls: a static picture without a kernel, a new one for each move, labels, no state."""

import asyncio
import itertools
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import ipywidgets
import pytest
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from course_utils.figures import base, widgets
from course_utils.figures.base import Figure
from course_utils.topics import recorded
from fitcast import TrainRecipe, models
from fitcast.forecasting import forecast, ranks
from fitcast.forecasting.fake import meta_model
from fitcast.units import GIB, show_bytes


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
    assert "on every linear layer: 2.50 GiB" in explorer.picture.value, "the axis holds it"


# --- what the explorers show at their ends -------------------------------------------------------


@pytest.fixture
def forecasts(monkeypatch):
    """The recipes that were forecast; each gets the same bar with the longest verdict."""
    asked = []

    def ask(recipe, *_, **__):
        asked.append(recipe)
        holders = dict.fromkeys(base.COLOURS, 29 * GIB // 10)
        return SimpleNamespace(composition=holders, verdict="does not fit")

    monkeypatch.setattr(forecast, "forecast", ask)
    monkeypatch.setattr(ranks, "forecast_ranks", ask)
    monkeypatch.setattr(widgets, "_adapters_of_rank_1", lambda *_: 2_621_440)  # 8B, every layer
    return asked


def ranks_explorer():
    known = {name: forecast.forecast(None) for name in ("one card", "ddp on 2", "fsdp2 on 2")}
    recipe = TrainRecipe(model="llama-3.1-8b", micro_batch_size=2, sequence_length=2048)
    return widgets.ranks_explorer(recipe, known)


EXPLORERS = [
    widgets.adapters_explorer,
    widgets.forgetting_explorer,
    widgets.levers_explorer,
    widgets.split_explorer,
    ranks_explorer,
]


def misplaced(canvas) -> list[str]:
    """Texts of a drawn canvas that leave it, or lie on another one."""
    canvas.set_dpi(base.DPI)  # letters do not scale exactly
    canvas.draw_without_rendering()
    texts = [one for one in canvas.findobj(Text) if one.get_text() and one.get_visible()]
    boxes = {one: Text.get_window_extent(one) for one in texts}
    ticks = {label for ax in canvas.axes for label in ax.get_xticklabels()}  # some lie outside
    page = canvas.bbox.padded(-3)
    found = [
        one.get_text()
        for one, box in boxes.items()
        if one not in ticks and not (page.x0 <= box.x0 and box.x1 <= page.x1)
    ]
    for (one, box), (other, its) in itertools.combinations(boxes.items(), 2):
        if Bbox.intersection(box.padded(-2), its.padded(-2)) and {one, other} - ticks:
            found.append(f"{one.get_text()} on {other.get_text()}")
    return found


@pytest.mark.one_fast
@pytest.mark.parametrize("make", EXPLORERS, ids=lambda make: make.__name__)
def test_no_label_is_cut_off_or_covered_at_either_end(make, forecasts, monkeypatch):
    seen = []

    def look(canvas, *words, **_):
        seen.extend(misplaced(canvas))
        return Figure(b"png", repr(words))

    monkeypatch.setattr(base, "finish", look)
    explorer = make()
    for end in (0, -1):
        explorer.draw(**{name: one.options[end] for name, one in explorer.controls.items()})
    assert seen == []


def test_a_title_that_is_too_long_is_found(monkeypatch):
    seen = []
    monkeypatch.setattr(base, "finish", lambda canvas, *_: seen.extend(misplaced(canvas)))
    title = "llama-3.1-8b: float32 adapters of rank 16, 8-bit Adam"  # it was
    base.compare({"on every linear layer": {"weights": GIB}}, None, title)
    assert seen == [title]


@pytest.mark.slow
def test_each_models_own_layers_get_the_adapters(forecasts):
    """PEFT finds a target by the end of a module's name; phi-4-mini has no `q_proj`."""
    for make in (widgets.levers_explorer, ranks_explorer):
        explorer = make()
        explorer.draw(**explorer.settings | {"model": "phi-4-mini"})
        names = {name.split(".")[-1] for name, _ in PHI.named_modules()}
        assert set(forecasts[-1].lora_targets) <= names, make.__name__


PHI = meta_model(models.config("phi-4-mini"))
