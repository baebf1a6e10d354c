"""Errors of the reader's own trainer, callback or loss, told apart from the libraries' and ours."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

import fitcast
from fitcast.forecasting.refusals import NEEDS_NUMBERS, first_line
from fitcast.units import Said, refusal

OURS = Path(fitcast.__file__).parent
PYTHON = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]


def of_reader(error: Exception) -> ValueError | None:
    """The error as one sentence with the reader's line; `None` if a library or we raised it.

    What PyTorch raises is its caller's. A question for numbers is said elsewhere.

    Args:
        error: Whatever running the trainer raised.
    """
    calls = traceback.extract_tb(error.__traceback__)
    if isinstance(error, NEEDS_NUMBERS) or _within(calls[-1].filename, [OURS]):
        return None
    outside = [call for call in calls if not _within(call.filename, [OURS, *_torch()])]
    if not outside or _within(outside[-1].filename, PYTHON):
        return None
    where = f"{outside[-1].filename}:{outside[-1].lineno}"
    return refusal(
        "trainer", "run without an error of its own",
        Said(f"{type(error).__name__} in {where} ({first_line(error)})"),
        "mend that line; if it runs on a card, it may ask a tensor for numbers: measure it there",
    )  # fmt: skip


def _torch() -> list[Path]:
    return [folder / "torch" for folder in PYTHON]


def _within(filename: str, folders: list[Path]) -> bool:
    frozen = filename.startswith("<frozen")  # of Python itself
    return frozen or any(Path(filename).is_relative_to(folder) for folder in folders)
