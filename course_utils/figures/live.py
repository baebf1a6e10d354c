"""A run watched while it runs: a bar of text, loss and memory, redrawn in place.

Plain display updates: no widget, so any notebook front end shows them. In a headless run (a script,
a notebook that nobody looks at) nothing is shown until the end, so that stored outputs are the same
everywhere. A kernel cannot know who looks: whoever runs it unseen says so, by `HEADLESS`.

Not modelled: several runs at once in one figure.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from typing import Any

from course_utils.figures.training import progress
from fitcast.recipe import TrainRecipe
from fitcast.units import show_bytes

SECONDS_BETWEEN = 2.0  # drawing takes a tenth of a second: too much for every step
BAR = 24  # characters
# One of these in the environment: nobody looks.
HEADLESS = ("FITCAST_HEADLESS", "CI")


class Watcher:
    """Pass it to `fitcast.train(on_step=...)`: it is called with the row of each step.

    Args:
        recipe: Says how many steps there will be.
        forecast_bytes: The forecast's peak, drawn beside the measured one.
        title: What is trained.
    """

    def __init__(self, recipe: TrainRecipe, forecast_bytes: int | None = None, title: str = ""):
        self.total, self.forecast_bytes, self.title = recipe.max_steps, forecast_bytes, title
        self.rows: list[dict[str, Any]] = []
        self._display = None if _is_headless() else _publisher()
        self._id, self._drawn, self._start = uuid.uuid4().hex, 0.0, time.monotonic()

    def __call__(self, row: dict[str, Any]) -> None:
        """Note a step; redraw when the last time is long enough ago, or at the end."""
        self.rows.append(row)
        now = time.monotonic()
        due = now - self._drawn > SECONDS_BETWEEN or row["step"] == self.total
        if self._display and due:
            figure = progress(self.rows, self.total, self.forecast_bytes, self.title)
            data, metadata = figure._repr_mimebundle_()
            shown = {"line": ({"text/plain": self.line()}, {}), "figure": (data, metadata)}
            for name, (content, about) in shown.items():
                self._display.publish(
                    data=content,
                    metadata=about,
                    update=self._drawn > 0,
                    transient={"display_id": f"{name}-{self._id}"},
                )
            self._drawn = now

    def line(self) -> str:
        """One line: how far, how fast, how much memory, how long it will take."""
        if not self.rows:
            return "no step was left to do: this run had ended before"
        row = self.rows[-1]
        done = row["step"] / self.total
        bar = "█" * round(BAR * done) + "░" * (BAR - round(BAR * done))
        left = (time.monotonic() - self._start) * (self.total - row["step"]) / len(self.rows)
        return (
            f"{bar} step {row['step']} of {self.total}, loss {row['loss']:.2f}, "
            f"{row['tokens_per_second']:,.0f} tokens/s, peak "
            f"{show_bytes(row['peak_allocated_bytes'])}, {left / 60:.0f} min left"
        )


def _is_headless() -> bool:
    return any(os.environ.get(name) for name in HEADLESS)


def _publisher() -> Any | None:
    """What shows things in the notebook that this runs in; `None` in a plain Python."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return getattr(shell, "display_pub", None)
