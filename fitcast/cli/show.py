"""Answers as text for readers and as JSON for programs.

In JSON, bytes and operations are integers, two bounds are a pair, and nothing is rounded.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fitcast.cli import changes, ranks
from fitcast.cli.options import as_options, command_line
from fitcast.recipe import TrainRecipe
from fitcast.units import show_bytes

if TYPE_CHECKING:
    from fitcast.forecasting.forecast import Forecast
    from fitcast.forecasting.search import Fit, Lever
    from fitcast.training.versions import Finding

FORECAST_FIELDS = (
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "device_bytes",
    "unlimited_reserved_bytes",
    "margin_bytes",
    "verdict",
    "retries",
    "fits",
    "composition",
    "phase_peaks",
    "peak_phase",
    "peak_operation",
    "peak_module",
    "loaded_bytes",
    "resident_bytes",
    "saved_activation_bytes",
    "flops",
    "ideal_seconds",
    "notes",
)
VERDICTS = {"fits": "yes", "tight": "tight", "does not fit": "no"}


def as_json(answer: object) -> str:
    """An answer of the functions below, for programs."""
    return json.dumps(answer, indent=1)


def forecast_data(recipe: TrainRecipe, f: Forecast) -> dict[str, Any]:
    """A forecast and what it is about, as JSON's types."""
    return {"recipe": dataclasses.asdict(recipe), "gpu": f.gpu.name} | _numbers(f)


def file_data(path: str, f: Forecast) -> dict[str, Any]:
    """The same of the run in a file."""
    return {"file": path, "gpu": f.gpu.name} | _numbers(f)


def _numbers(f: Forecast) -> dict[str, Any]:
    return {name: getattr(f, name) for name in FORECAST_FIELDS}


def forecast_text(f: Forecast) -> str:
    """The verdict, who holds the bytes at the peak, the peak of each phase, what was assumed."""
    phases = ((f"peak in {phase}", n_bytes) for phase, n_bytes in f.phase_peaks.items())
    rows = (*f.composition.items(), *phases)
    lines = [f"  {name:18}{show_bytes(n):>12}" for name, n in rows]
    return "\n".join([str(f), *lines, *(f"  note: {note}" for note in f.notes)])


def fit_data(recipe: TrainRecipe, best: Fit) -> dict[str, Any]:
    """Settings that were found, what they changed, their forecast, speed and command."""
    return forecast_data(best.recipe, best.forecast) | {
        "before": None if best.before is None else _numbers(best.before),
        "changed": changes.changed(recipe, best.recipe),
        "script": changes.in_a_script(recipe, best.recipe),
        "tokens_per_second": best.tokens_per_second,
        "utilisation": best.utilisation,
        "basis": best.forecast.gpu.basis,
        "launch_basis": best.launch_basis,
        "command": command_line("forecast", best.recipe, best.forecast.gpu),
        **ranks.fit_data(best),
    }


def fit_text(recipe: TrainRecipe, best: Fit) -> str:
    """The same for a reader."""
    r = best.recipe
    sizes = (
        f"micro batch {r.micro_batch_size} x {r.gradient_accumulation_steps} accumulated x "
        f"{r.world_size} GPUs"
    )
    lines = [str(best.forecast), f"  {sizes}", f"  {_speed(best)}", f"  was: {_before(best)}"]
    lines += ranks.fit_lines(best)
    if ours := changes.in_our_names(recipe, r):
        lines += ["changed:", *(f"  {line}" for line in ours)]
        lines += ["in a script with a stock trainer:"]
        lines += [f"  {line}" for line in changes.in_a_script(recipe, r)]
    lines += ["from there, one change at a time:"]
    return "\n".join([*lines, f"  {command_line('levers', r, best.forecast.gpu)}"])


def _before(best: Fit) -> str:
    """The verdict on the recipe as it came, and what it takes of the device."""
    if best.before is None:
        return "cannot run as it is"
    low, high = (show_bytes(n, "GiB") for n in best.before.device_bytes)
    return f"{best.before.verdict}, {low} to {high}"


def _speed(best: Fit) -> str:
    """Tokens per second as a range, and what it rests on."""
    low, high = best.tokens_per_second
    gpu = best.forecast.gpu
    basis = gpu.basis if best.utilisation == gpu.sustained else "the utilisation that was asked for"
    many = f"{low:.0f}" if round(low) == round(high) else f"{low:.0f} to {high:.0f}"
    return f"about {many} tokens/s a GPU ({basis}; {best.launch_basis})"


def levers_data(recipe: TrainRecipe, before: Forecast, levers: Iterable[Lever]) -> dict[str, Any]:
    """A recipe's forecast, and below it each single change with its own."""
    changes = [
        {
            "change": lever.change,
            "options": as_options(lever.recipe, recipe),
            "saved_bytes": lever.saved_bytes,
            "speedup": lever.speedup,
            "verdict": lever.forecast.verdict,
            "fits": lever.forecast.fits,
            "peak_allocated_bytes": lever.forecast.peak_allocated_bytes,
            "device_bytes": lever.forecast.device_bytes,
            "margin_bytes": lever.forecast.margin_bytes,
        }
        for lever in levers
    ]
    return forecast_data(recipe, before) | {"levers": changes}


def levers_text(recipe: TrainRecipe, before: Forecast, levers: Iterable[Lever]) -> str:
    """The same as a table, the change that saves most first."""
    rows = [("one change at a time", "peak", "speed", "fits", "option")]
    for lever in levers:
        sign = "-" if lever.saved_bytes > 0 else "+" if lever.saved_bytes < 0 else ""
        rows.append(
            (
                lever.change,
                sign + show_bytes(abs(lever.saved_bytes)),
                f"x {lever.speedup:.2f}",
                VERDICTS[lever.forecast.verdict],
                " ".join(as_options(lever.recipe, recipe)),
            )
        )
    return f"{before}\n{_table(rows)}"


def _table(rows: Sequence[tuple[str, str, str, str, str]]) -> str:
    width = max(len(row[0]) for row in rows)
    return "\n".join(
        f"  {change:{width}}  {peak:>12}  {speed:>7}  {fits:5}  {option}".rstrip()
        for change, peak, speed, fits, option in rows
    )


def doctor_data(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """What was looked at; memory and disk also as integers."""
    return [dataclasses.asdict(finding) for finding in findings]


def doctor_text(findings: Iterable[Finding]) -> str:
    """One line a finding, and below it what to do about it."""
    lines = []
    for finding in findings:
        lines.append(f"{'mend' if finding.fix else 'ok':5}{finding.name:14}{finding.found}")
        if finding.fix:
            lines.append(f"{'':19}-> {finding.fix}")
    return "\n".join(lines)
