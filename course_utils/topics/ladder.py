"""The usual recipe out of memory, and lever by lever into it: 8B, 4 x 2048 tokens, on a T4.

Each rung of the ladder keeps the changes of those before it. Forecasts are made here and now;
measurements come from `recorded` (a GPU with a T4's kernels and memory). Not modelled: what the
levers do to the loss, which is nothing (tests/fitcast/step/test_levers.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from course_utils.topics import recorded
from fitcast.forecasting.forecast import Forecast, forecast
from fitcast.forecasting.search import tokens_per_second
from fitcast.gpus import T4
from fitcast.recipe import TrainRecipe
from fitcast.units import show_bytes

USUAL, TRAINED = "the usual recipe", "trained"


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A recipe with its forecast and what was recorded of it.

    Attributes:
        name: What is new in it.
        recipe: All of it.
        forecast: For a T4, made now.
        measured: The row of recorded_runs.json.
    """

    name: str
    recipe: TrainRecipe
    forecast: Forecast
    measured: dict[str, Any]

    @property
    def ideal_tokens_per_second(self) -> float:
        """Tokens per second by roofline at the middle of what the GPU sustains."""
        return tokens_per_second(self.recipe, self.forecast)


def rungs(group: str = "ladder", names: Sequence[str] = ()) -> list[Rung]:
    """The recorded rows of a group that ended well, each with today's forecast.

    Args:
        group: "ladder", "fit", "menu" or "budgets".
        names: Only these rows.
    """
    found = []
    for row in recorded.rows(group):
        if row["outcome"] == TRAINED and (not names or row["name"] in names):
            recipe = TrainRecipe(**row["recipe"])
            found.append(
                Rung(name=row["name"], recipe=recipe, forecast=forecast(recipe, T4), measured=row)
            )
    return found


def ladder() -> list[Rung]:
    """The rungs from the usual recipe on; each keeps the changes of those before it."""
    found = rungs("ladder")
    start = next(i for i, rung in enumerate(found) if rung.name == USUAL)
    return found[start:]


# The rungs that matter, and what a reader calls them.
IN_SHORT = {
    USUAL: "the usual recipe",
    "explicit key/value heads": "+ repeated keys, values",
    "chunked loss": "+ loss in chunks",
    "lean rotary embedding": "+ no dropout, lean pieces",
    "checkpoints on the host": "+ checkpoints on the host",
}


@dataclass(frozen=True, kw_only=True)
class Twin:
    """A rung without a mask and the same with padded rows, whose mask picks other kernels.

    Attributes:
        name: What is new in it.
        no_mask, padded: Each with its forecast; `measured` is empty where nobody recorded it.
    """

    name: str
    no_mask: Rung
    padded: Rung


def twins() -> list[Twin]:
    """The rungs of `IN_SHORT`, each in both worlds, the usual recipe first."""
    seen = {}
    if any(row["group"] == "padded" for row in recorded.recording()["rows"]):
        seen = {row["name"]: row for row in recorded.rows("padded") if row["outcome"] == TRAINED}
    found = []
    for rung in rungs("ladder", names=tuple(IN_SHORT)):
        recipe, name = replace(rung.recipe, padded=True), IN_SHORT[rung.name]
        padded = Rung(
            name=name,
            recipe=recipe,
            forecast=forecast(recipe, T4),
            measured=seen.get(rung.name, {}),
        )
        found.append(Twin(name=name, no_mask=rung, padded=padded))
    return found


def peaks(pairs: Sequence[Twin]) -> str:
    """A line for each: forecast and measured peak and a T4's verdict, in both worlds."""

    def half(rung: Rung) -> str:
        seen = rung.measured.get("peak_allocated_bytes")
        return (
            f"{show_bytes(rung.forecast.peak_allocated_bytes):>11}"
            f"{show_bytes(seen) if seen else '-':>11}  {rung.forecast.verdict:12}"
        )

    head = [f"{'':26}{'no mask':^36}{'padded':^36}", f"{'':26}" + 2 * _HALF]
    lines = [f"{pair.name:26}{half(pair.no_mask)}{half(pair.padded)}".rstrip() for pair in pairs]
    return "\n".join([*(line.rstrip() for line in head), *lines, _stamp_of(pairs)])


_HALF = f"{'forecast':>11}{'measured':>11}  {'verdict':12}"


def speeds(pairs: Sequence[Twin]) -> str:
    """A line for each: tokens a second that a T4 is forecast, and what was measured elsewhere.

    A ratio is to the usual recipe in the same world.
    """

    def half(rung: Rung, first: Rung) -> str:
        low, high = pace(rung)
        times = rung.ideal_tokens_per_second / first.ideal_tokens_per_second
        seen, base = (one.measured.get("tokens_per_second") for one in (rung, first))
        measured = f"{seen:,.0f} {seen / base:.1f}x" if seen and base else "-"
        return f"{f'{low:,.0f}-{high:,.0f}':>10} {times:.1f}x{measured:>14}   "

    head = [
        f"{'tokens a second':26}{'no mask':^29}   {'padded':^29}",
        f"{'':26}" + 2 * f"{'a T4, forecast':>15}{'measured':>14}   ",
    ]
    lines = [
        f"{pair.name:26}{half(pair.no_mask, pairs[0].no_mask)}"
        f"{half(pair.padded, pairs[0].padded)}".rstrip()
        for pair in pairs
    ]
    return "\n".join([*(line.rstrip() for line in head), *lines, _stamp_of(pairs)])


def pace(rung: Rung) -> tuple[float, float]:
    """Tokens a second on a T4, between the least and the most that it sustains of its peaks."""
    low, high = (tokens_per_second(rung.recipe, rung.forecast, part) for part in T4.sustained)
    return low, high


def _stamp_of(pairs: Sequence[Twin]) -> str:
    measured = [rung.measured for pair in pairs for rung in (pair.no_mask, pair.padded)]
    return f"[measured: {recorded.stamp(row for row in measured if row)}; speeds are that card's]"


def usual(model: str) -> Rung:
    """The usual recipe at 4 x 2048 tokens: the row to which others are compared."""
    groups = {"llama-3.1-8b": ("ladder", USUAL)}
    group, name = groups.get(model, ("menu", f"{model}, usual"))
    return rungs(group, names=(name,))[0]


def fastest(group: str, count: int) -> list[Rung]:
    """Those of a group that trained fastest within a T4's memory, the best one first."""
    fitting = [r for r in recorded.rows(group) if r["limited"] and r["outcome"] == TRAINED]
    best = sorted(fitting, key=lambda row: -row["tokens_per_second"])[:count]
    found = rungs(group, names=[row["name"] for row in best])
    return sorted(found, key=lambda rung: -rung.measured["tokens_per_second"])


def table(rows: Sequence[Rung]) -> str:
    """A line for each rung: forecast and measured peak, verdict, tokens per second, ratio."""
    base = usual(rows[0].recipe.model)
    first = base.measured["tokens_per_second"]
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}  {'forecast':>9}{'measured':>11}  {'verdict':12} tokens/s"]
    for row in rows:
        speed = row.measured["tokens_per_second"]
        lines.append(
            f"{row.name:{width}}  {show_bytes(row.forecast.peak_allocated_bytes):>9}"
            f" {show_bytes(row.measured['peak_allocated_bytes']):>10}  {row.forecast.verdict:12}"
            f"{speed:>9,.0f}  {speed / first:.2f}x"
        )
    return "\n".join((*lines, f"[measured: {recorded.stamp(row.measured for row in rows)}]"))
