"""Pictures of batches: an update's events, what a token counts, a search's attempts.

Drawn in the language of `figures`, which keeps matplotlib to itself. Not drawn: time in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

from course_utils.figures.base import COLOURS, GRID, INK, Figure, finish, new_canvas, styled
from fitcast.training.batching import Search
from fitcast.units import MIB, show_bytes

EVENTS = {"accumulate": COLOURS["gradients"], "update": COLOURS["weights"], "clear": INK}


@styled
def updates(events: Sequence[tuple[str, float]], title: str = "") -> Figure:
    """Length of the summed gradient after each event; updates are counted.

    Args:
        events: ("accumulate", "update" or "clear", length of the gradient afterwards), in order.
        title: What ran.
    """
    canvas, ax = new_canvas(4.2)
    highest = max(length for _, length in events)
    micro_batches = optimizer_steps = 0
    said = []
    for x, (event, length) in enumerate(events):
        ax.bar(
            x,
            length,
            color=EVENTS[event],
            width=0.8,
            hatch="//" if event == "update" else None,
            edgecolor="white",
        )
        micro_batches += event == "accumulate"
        optimizer_steps += event == "update"
        label = f"micro\nbatch\n{micro_batches}" if event == "accumulate" else event
        ax.text(
            x,
            -0.04 * highest,
            label,
            ha="center",
            va="top",
            fontsize=10.5,
            color=EVENTS[event],
            weight="normal" if event == "accumulate" else "bold",
        )
        if event == "update":
            ax.annotate(
                f"optimizer step {optimizer_steps}",
                (x, length),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=10.5,
            )
        said.append(f"{event} {length / highest:.1f}")
    ax.axhline(0, color=INK, linewidth=1)
    ax.set(
        title=title,
        ylabel="length of .grad",
        ylim=(-0.24 * highest, 1.18 * highest),
        yticks=[0],
        xticks=[],
    )
    ax.spines[["bottom"]].set_visible(False)
    return finish(
        canvas,
        f"the summed gradient over {micro_batches} micro batches and "
        f"{optimizer_steps} optimizer steps",
        title,
        "It grows with each micro batch, is used by the update and then cleared. "
        f"Lengths in parts of the highest: {', '.join(said)}.",
    )


@styled
def token_shares(counts: Sequence[int], title: str = "") -> Figure:
    """What one labelled token counts when micro batches' means are averaged; 1 is its fair share.

    Args:
        counts: Labelled tokens of each micro batch.
        title: Which batch.
    """
    total, number = sum(counts), len(counts)
    shares = [total / (number * count) for count in counts]
    canvas, ax = new_canvas(3.9)
    ax.bar(
        range(1, number + 1),
        shares,
        width=0.8,
        color=[COLOURS["gradients" if share > 1 else "adapters"] for share in shares],
    )
    for x, (share, count) in enumerate(zip(shares, counts, strict=True), start=1):
        ax.annotate(
            f"{share:.2g}",
            (x, share),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=10.5,
        )
        ax.annotate(
            f"{count}",
            (x, 0),
            xytext=(0, -6),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=10.5,
        )
    ax.axhline(1, color=INK, linestyle="--")
    ax.set(
        title=title,
        ylabel="what one token counts\n(dashed: its fair share)",
        ylim=(0, 1.15 * max(max(shares), 1.2)),
        xlabel="labelled tokens of each micro batch",
        xlim=(0.4, number + 0.6),
        xticks=[],
    )
    ax.xaxis.labelpad = 18
    said = ", ".join(
        f"{count} tokens: {share:.2g}" for share, count in zip(shares, counts, strict=True)
    )
    return finish(
        canvas,
        "bars: what one token counts in a mean of micro batches' means",
        title,
        f"{said}. The fair share, 1, is dashed.",
    )


@styled
def attempts(search: Search, budget_bytes: int, title: str = "") -> Figure:
    """The peaks of a search for the largest micro batch, attempt by attempt, under the budget."""
    canvas, ax = new_canvas(3.9)
    limit = budget_bytes / MIB
    for x, probe in enumerate(search.probes):
        height = limit if probe.peak_bytes is None else probe.peak_bytes / MIB
        ax.bar(
            x,
            height,
            width=0.7,
            edgecolor="#888888" if not probe.fits else "none",
            color=COLOURS["activations"] if probe.fits else GRID,
            hatch=None if probe.fits else "xx",
        )
        ax.annotate(
            show_bytes(probe.peak_bytes) if probe.fits else "out of\nmemory",
            (x, height),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=11.5,
        )
    ax.axhline(limit, color=INK, linestyle="--")
    ax.set(
        title=title,
        ylabel="peak, MiB",
        ylim=(0, 1.3 * limit),
        xlabel="micro batch tried",
        xlim=(-0.6, len(search.probes) - 0.4),
    )
    ax.set_xticks(range(len(search.probes)), [p.micro_batch_size for p in search.probes])
    said = "; ".join(map(repr, search.probes))
    return finish(
        canvas,
        f"attempts against a budget of {show_bytes(budget_bytes)}",
        title,
        f"{said}. Largest that fits: {search.micro_batch_size}.",
    )
