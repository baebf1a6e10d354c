"""Numbers that were measured on a GPU and written down, with the GPU, the versions and the date.

`tools/record_gpu_run.py` writes them, lessons read them: no lesson types such a number in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from course_utils.data import REMEDY
from fitcast.units import Said, refusal

PATH = Path(__file__).parents[1] / "data" / "recorded_runs.json"


def recording() -> dict[str, Any]:
    """The whole recording: its protocol, and rows that name their gpu, versions and date.

    Raises:
        FileNotFoundError: The file is missing; it comes with a clone and with the wheel.
        ValueError: The file is damaged.
    """
    if not PATH.exists():
        raise FileNotFoundError(f"{PATH} is missing; {REMEDY}")
    try:
        return json.loads(PATH.read_text(encoding="utf-8"))
    except ValueError as error:
        raise refusal("recorded_runs", "be JSON", Said(f"{PATH} ({error})"), REMEDY) from error


def rows(group: str) -> list[dict[str, Any]]:
    """The recorded runs of one group, in the order in which they ran.

    Raises:
        ValueError: No such group.
    """
    recorded = recording()["rows"]
    found = [row for row in recorded if row["group"] == group]
    if not found:
        groups = ", ".join(sorted({row["group"] for row in recorded}))
        raise refusal("group", f"be one of {groups}", group, "see recorded_runs.json")
    return found


def stamp(measured: Iterable[dict[str, Any]]) -> str:
    """Where and when these rows were measured, in one line."""
    found = list(measured)
    cards = {
        f"{row['gpu']} as a {row['emulated']}" if row["emulated"] else row["gpu"] for row in found
    }
    versions = {row["versions"]["torch"] for row in found}
    dates = {choose(row["date"] for row in found) for choose in (min, max)}
    return (
        f"{' and '.join(sorted(cards))}, torch {' and '.join(sorted(versions))}, "
        f"{' to '.join(sorted(dates))}"
    )


def show(group: str, line: Callable[[dict[str, Any]], str]) -> None:
    """Print one line for each recorded run of a group, or plainly that nobody has recorded it."""
    found = []
    if PATH.exists():
        found = [row for row in recording()["rows"] if row["group"] == group]
    for row in found:
        print(line(row))
    print(f"[recorded: {stamp(found)}]" if found else f"{group}: not recorded yet")
