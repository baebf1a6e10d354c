"""Pictures of training runs: one while it runs, and the ladder of levers against a T4's memory.

Drawn in the language of `figures`, which keeps matplotlib to itself. Not drawn: gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

from course_utils.figures.base import (
    COLOURS,
    INK,
    LINES,
    Canvas,
    Figure,
    finish,
    place_of,
    styled,
)
from fitcast.gpus import Gpu
from fitcast.units import GIB, MIB, show_bytes, with_article

SPEED = "#6B6B6B"  # no holder's colour


@styled
def progress(
    rows: Sequence[Mapping[str, Any]],
    total: int,
    forecast_bytes: int | None = None,
    title: str = "",
) -> Figure:
    """Loss and memory peak of each step so far, on an axis that has room for all steps.

    Args:
        rows: Of each step: step, loss, tokens_per_second, peak_allocated_bytes (`None` on CPU).
        total: Steps that there will be.
        forecast_bytes: The forecast's peak, a dashed line.
        title: What is trained.
    """
    canvas = Canvas(figsize=(8, 3.6), layout="constrained")
    left, right = canvas.subplots(1, 2)
    steps = [row["step"] for row in rows]
    dot = "o" if len(rows) == 1 else None  # one point makes no line
    left.plot(steps, [row["loss"] for row in rows], color=LINES[0], linewidth=2.5, marker=dot)
    left.set(
        title=title,
        xlabel="optimizer steps",
        ylabel="loss, nats per token",
        ylim=(0, None),
        xlim=(0, total),
    )
    peaks = [row["peak_allocated_bytes"] for row in rows]
    highest = max([n for n in (*peaks, forecast_bytes) if n], default=0)
    size, unit = (GIB, "GiB") if highest >= GIB else (MIB, "MiB")
    if any(peaks):
        right.plot(steps, [n / size for n in peaks], color=LINES[1], linewidth=2.5, marker=dot)
    else:
        right.text(0.5, 0.4, "not measured on cpu", ha="center", transform=right.transAxes)
    if forecast_bytes:
        right.axhline(forecast_bytes / size, color=INK, linestyle="--")
        right.annotate(
            f"forecast {show_bytes(forecast_bytes)}",
            (total, forecast_bytes / size),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            fontsize=12,
        )
    right.set(
        xlabel="optimizer steps",
        ylabel=f"peak memory, {unit}",
        xlim=(0, total),
        ylim=(0, 1.25 * highest / size or 1),
    )
    for ax in (left, right):
        ax.grid(axis="y")
    measured = show_bytes(max((n for n in peaks if n), default=None))
    return finish(
        canvas,
        f"a run{': ' * bool(title)}{title} at step {steps[-1]} of {total}. Loss "
        f"from {rows[0]['loss']:.1f} to {rows[-1]['loss']:.1f}; peak memory "
        f"{measured}, forecast "
        f"{show_bytes(forecast_bytes) if forecast_bytes else 'none'}",
    )


@styled
def lengths(tokens: Sequence[int], learned: Sequence[int], limit: int) -> Figure:
    """How long examples are, in tokens, and how many of those are learned.

    Args:
        tokens: Of each example.
        learned: Labelled ones among them.
        limit: The recipe's sequence length.
    """
    canvas = Canvas(figsize=(8, 3.2), layout="constrained")
    ax = canvas.add_subplot()
    bins = range(0, limit + 1, max(1, limit // 32))
    for name, numbers, colour in (
        ("prompt and answer", tokens, LINES[0]),
        ("answer, learned", learned, LINES[1]),
    ):
        ax.hist(numbers, bins=bins, color=colour, alpha=0.75, label=name)
    ax.set(
        title=f"examples, cut at {limit:,} tokens",
        xlabel="tokens in an example",
        ylabel="examples",
        xlim=(0, limit),
    )
    ax.yaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    canvas.legend(loc="outside lower center", ncols=2)  # inside, it may lie on a bar
    return finish(
        canvas,
        f"histogram of {len(tokens)} examples: {min(tokens)} to {max(tokens)} "
        f"tokens are read, {min(learned)} to {max(learned)} of them learned",
    )


@styled
def two_worlds(pairs: Sequence[Any], gpu: Gpu, title: str = "") -> Figure:
    """Stacked bytes at the peak of each rung, without a mask and padded, against a GPU's memory.

    Args:
        pairs: With a `name`, and a `no_mask` and a `padded` that have a `forecast` and what was
            `measured`, as `course_utils.topics.ladder.twins` gives them.
        gpu: Its usable memory is the line that a bar must not cross.
        title: What is trained.
    """
    names, limit = [pair.name for pair in pairs], gpu.usable_bytes / GIB
    canvas = Canvas(figsize=(9.6, 1.9 + 0.62 * len(names)), layout="constrained")
    axes = canvas.subplots(1, 2, sharey=True)
    worlds = {
        "no mask": [pair.no_mask for pair in pairs],
        "padded": [pair.padded for pair in pairs],
    }
    end = 1.75 * max(one.forecast.peak_bytes for rungs in worlds.values() for one in rungs) / GIB
    said = []
    for ax, (world, rungs) in zip(axes, worlds.items(), strict=True):
        _stack(ax, names, [one.forecast.composition for one in rungs])
        for name, one in zip(names, rungs, strict=True):
            peak, seen = one.forecast.peak_bytes, one.measured.get("peak_allocated_bytes")
            words = f"{peak / GIB:.2f} {one.forecast.verdict}"
            words += f"\n{seen / GIB:.2f} measured" if seen else ""
            ax.annotate(
                words,
                (peak / GIB, name),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=11,
                zorder=4,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )
            known = f", measured {show_bytes(seen)}" if seen else ""
            said.append(f"{world}, {name}: {show_bytes(peak)}, {one.forecast.verdict}{known}")
        ax.axvline(limit, color=INK, linestyle="--", zorder=3)
        ax.set(title=world, xlabel="GiB at the peak", xlim=(0, end))
    axes[0].invert_yaxis()
    card = with_article(gpu.name)
    canvas.suptitle(f"{title}\n(dashed: the {show_bytes(gpu.usable_bytes)} that {card} has)")
    canvas.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6,
                  fontsize=11)  # fmt: skip
    return finish(
        canvas, f"bars against the {show_bytes(gpu.usable_bytes)} of {card}", title,
        f"{'; '.join(said)}.",
    )  # fmt: skip


def _stack(ax: Any, names: list[str], rows: Sequence[Mapping[str, int]]) -> None:
    """A stacked bar of GiB for each name; holders too thin to see are left out."""
    ends = [0.0] * len(names)
    seen = max(sum(row.values()) for row in rows) / 1000
    for holder in sorted({h for row in rows for h in row if row[h] > seen}, key=place_of):
        widths = [row.get(holder, 0) / GIB for row in rows]
        ax.barh(names, widths, left=ends, label=holder, height=0.66, color=COLOURS.get(holder, INK))
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
