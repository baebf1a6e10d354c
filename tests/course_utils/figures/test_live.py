"""A run watched live: displays are updated in place in a notebook, and nothing is shown unseen."""

import sys
from types import SimpleNamespace

import pytest

from course_utils.data import BUNDLED
from course_utils.figures import live, training
from fitcast.recipe import TrainRecipe
from fitcast.units import GIB

HEADLESS = live.HEADLESS  # the real names; a test sees others, for CI sets one of these
RECIPE = TrainRecipe(model=BUNDLED, max_steps=10)


def row(step: int, peak: int | None = 3 * GIB) -> dict:
    return {
        "step": step,
        "loss": 8 / step,
        "tokens_per_second": 1234.5,
        "peak_allocated_bytes": peak,
    }


@pytest.fixture
def notebook(monkeypatch):
    """What a notebook's front end would be told, in order."""
    shown = []
    publisher = SimpleNamespace(publish=lambda **message: shown.append(message))
    shell = SimpleNamespace(display_pub=publisher)
    monkeypatch.setitem(
        sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell, version_info=(9, 0))
    )
    monkeypatch.setattr(live, "HEADLESS", ("NOBODY_LOOKS",))
    monkeypatch.setattr(live, "SECONDS_BETWEEN", 0.0)
    return shown


def test_a_run_that_had_ended_before_says_so():
    assert live.Watcher(RECIPE).line().startswith("no step was left to do")


def test_a_notebook_sees_one_line_and_one_figure_move(notebook):
    watcher = live.Watcher(RECIPE, 4 * GIB, "a run")
    for step in (1, 2, 10):
        watcher(row(step))
    lines, figures = notebook[::2], notebook[1::2]
    for messages in (lines, figures):
        assert [m["update"] for m in messages] == [False, True, True]
        assert len({m["transient"]["display_id"] for m in messages}) == 1
    assert lines[0]["transient"] != figures[0]["transient"]
    assert (
        "step 10 of 10, loss 0.80, 1,234 tokens/s, peak 3.00 GiB" in lines[-1]["data"]["text/plain"]
    )
    assert lines[-1]["data"]["text/plain"].count("█") == live.BAR
    assert figures[-1]["data"]["text/plain"].startswith("Figure: a run: a run at step 10 of 10")


def test_drawing_waits_except_for_the_last_step(notebook, monkeypatch):
    monkeypatch.setattr(live, "SECONDS_BETWEEN", 3600.0)
    monkeypatch.setattr(live.time, "monotonic", lambda: 10_000.0)
    watcher = live.Watcher(RECIPE)
    for step in range(1, 11):
        watcher(row(step))
    assert len(notebook) == 4, "the first and the last step, a line and a figure each"
    assert len(watcher.rows) == 10


@pytest.mark.parametrize("name", ["FITCAST_HEADLESS", "CI"])
def test_a_headless_run_is_quiet(notebook, monkeypatch, capsys, name):
    monkeypatch.setattr(live, "HEADLESS", HEADLESS)
    for known in HEADLESS:
        monkeypatch.delenv(known, raising=False)
    live.Watcher(RECIPE)(row(10))
    assert len(notebook) == 2, "somebody looks"
    monkeypatch.setenv(name, "1")
    watcher = live.Watcher(RECIPE)
    watcher(row(10))
    assert len(notebook) == 2 and capsys.readouterr() == ("", "")
    assert "step 10 of 10" in watcher.line()


def test_a_plain_python_is_quiet(monkeypatch, capsys):
    monkeypatch.setattr(live, "HEADLESS", ())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    live.Watcher(RECIPE)(row(10))
    assert capsys.readouterr() == ("", "")


def test_progress_says_what_was_not_measured():
    figure = training.progress([row(1, None), row(2, None)], 10)
    assert "peak memory not measured on cpu, forecast none" in figure.alt
    assert "forecast 4.00 GiB" in training.progress([row(1)], 10, 4 * GIB).alt


def test_lengths_say_what_is_read_and_learned():
    figure = training.lengths([4, 6], [1, 2], 10)
    assert "2 examples: 4 to 6 tokens are read, 1 to 2 of them learned" in figure.alt
