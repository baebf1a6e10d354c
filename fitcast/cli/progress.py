"""Says on stderr what is going on, when it goes on for over a second.

No bar: a search does not know beforehand how many settings it will weigh.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time

PATIENCE_SECONDS = 1.0


class Progress:
    """Call it with what comes next; `stop` it before the answer is printed.

    Args:
        text: What comes first.
    """

    def __init__(self, text: str = "forecasting"):
        self.start, self.text = time.monotonic(), text
        self._timer = threading.Timer(PATIENCE_SECONDS, self._show)
        self._timer.daemon = True
        self._timer.start()

    def __call__(self, text: str) -> None:
        self.text = text
        if time.monotonic() - self.start > PATIENCE_SECONDS:
            self._show()

    def _show(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody reads it; the answer needs no reader
            print(f"... {self.text}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Say nothing from now on."""
        self._timer.cancel()
