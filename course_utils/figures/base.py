"""Every picture of the course, in one visual language.

A function returns a `Figure`: a PNG with its alt text, no open matplotlib figure behind it. Colours
are Okabe and Ito's, told apart by colour-blind readers too, and one holder of memory keeps its
colour through all lessons. The paper is white on purpose: it reads on light and dark pages.

Not drawn: animations, anything live. Source of the palette: Okabe and Ito 2008, "Color Universal
Design".
"""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from fitcast.gpus import Gpu
from fitcast.units import GIB, MIB, show_bytes, with_article

COLOURS = {
    "weights": "#0072B2",
    "adapters": "#56B4E9",
    "gradients": "#D55E00",
    "optimizer state": "#E69F00",
    "activations": "#009E73",
    "temporaries": "#CC79A7",
    "inputs": "#F0E442",
}
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
INK, GRID = "#222222", "#DDDDDD"
SHADES = {"forward": "#EFEFEF", "backward": "#FFFFFF", "optimizer": "#DFDFDF"}
STYLE: dict[Any, Any] = {  # keys of matplotlib.rcParams
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 13.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "legend.frameon": False,
}
DPI = 110
COLUMNS = 360  # of a line over many moments: each wider than two pixels, so none is blurred away
styled = matplotlib.rc_context(STYLE)  # decorates a function that draws


@dataclass(frozen=True)
class Figure:
    """A finished picture: PNG bytes, and the words that say what it shows."""

    png: bytes
    alt: str

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict, dict]:
        data = {"image/png": base64.b64encode(self.png).decode(), "text/plain": repr(self)}
        return data, {"image/png": {"alt": self.alt}}

    def as_html(self) -> str:
        """The picture as an HTML image, with its words."""
        png = base64.b64encode(self.png).decode()
        return (
            f"<img alt='{html.escape(self.alt, quote=True)}' style='max-width: 100%' "
            f"src='data:image/png;base64,{png}'>"
        )

    def __repr__(self) -> str:
        return f"Figure: {self.alt}"


def new_canvas(height: float = 4.6) -> tuple[Canvas, Any]:
    """An empty picture 8 inches wide, and its axes."""
    canvas = Canvas(figsize=(8, height), layout="constrained")
    return canvas, canvas.add_subplot()


def finish(canvas: Canvas, what: str, title: str = "", words: str = "") -> Figure:
    """The picture, and in words what it is, its title if it has one, and what it shows."""
    png = io.BytesIO()
    canvas.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
    said = f"{what}{': ' * bool(title)}{title}.{' ' * bool(words)}{words}"
    return Figure(png.getvalue(), said)


def _unit(n_bytes: float) -> tuple[str, int]:
    return ("GiB", GIB) if n_bytes >= GIB else ("MiB", MIB)


def _parts(composition: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {show_bytes(n)}" for name, n in composition.items() if n)


@styled
def memory_over_time(report: Any, title: str = "") -> Figure:
    """Bytes alive after each allocation and free, stacked by holder; the peak with its cause.

    Where several moments share a column of pixels the highest is drawn, so that no spike is lost.

    Args:
        report: A `fitcast.MemoryReport`, or a forecast with the same timeline, phases and peak.
        title: What ran.
    """
    series = {name: line for name, line in report.timeline.items() if max(line)}
    totals = [sum(moment) for moment in zip(*series.values(), strict=True)]
    peak = max(totals)
    moment = totals.index(peak)
    unit, size = _unit(peak)
    canvas, ax = new_canvas()
    spans = [
        (phase, [index for index, _ in run])
        for phase, run in itertools.groupby(enumerate(report.phases), key=lambda pair: pair[1])
    ]
    for phase, events in spans:
        ax.axvspan(
            events[0], events[-1] + 1, color=SHADES.get(phase, "#F7F7F7"), linewidth=0, zorder=0
        )
        if len(events) > 0.06 * len(totals):
            ax.text(
                (events[0] + events[-1]) / 2,
                1.36 * peak / size,
                phase,
                ha="center",
                va="top",
                fontsize=12,
            )
    width = -(-len(totals) // COLUMNS)
    runs = [range(len(totals))[start : start + width] for start in range(0, len(totals), width)]
    drawn = [max(run, key=totals.__getitem__) for run in runs]
    ax.stackplot(
        [*(run.start for run in runs), len(totals)],  # a step is drawn up to where the next begins
        [[line[at] / size for at in (*drawn, drawn[-1])] for line in series.values()],
        colors=[COLOURS[name] for name in series],
        labels=series,
        step="post",
    )
    cause = report.peak_operation.removesuffix(".default")
    cause += f" in {report.peak_module}" if report.peak_module else ""
    ax.plot(moment, peak / size, "o", color=INK)
    ax.annotate(
        f"peak {show_bytes(peak)}\n{cause}",
        (moment, peak / size),
        xytext=(0, 9),
        textcoords="offset points",
        fontsize=12,
        ha=("left", "center", "right")[min(2, 3 * moment // len(totals))],
    )
    ax.set(
        title=title,
        xlim=(0, len(totals) - 1),
        ylim=(0, 1.38 * peak / size),
        ylabel=unit,
        xlabel="allocations and frees, in order",
        xticks=[],
    )
    handles, names = ax.get_legend_handles_labels()
    canvas.legend(handles, names, loc="outside lower center", ncols=4, fontsize=12)
    at_peak = _parts({name: line[moment] for name, line in series.items()})
    return finish(
        canvas,
        "memory over time",
        title,
        f"From {show_bytes(totals[0])} up to a peak of {show_bytes(peak)}, reached in "
        f"{report.peak_phase} by {cause}, and down to {show_bytes(totals[-1])}. At the "
        f"peak: {at_peak}.",
    )


@styled
def compare(
    rows: Mapping[str, Any],
    gpu: Gpu | None = None,
    title: str = "",
    axis_bytes: int | None = None,
) -> Figure:
    """Stacked bars of bytes by holder, one bar a row, against a GPU's memory.

    Args:
        rows: Name of each bar, to bytes by holder: a dict, or anything with a `composition`. A
            forecast's bar also says whether it fits; nobody else knows.
        gpu: Its usable memory is drawn as a line that a bar should not cross; `None` draws none.
        title: What is compared.
        axis_bytes: Where the axis ends, so that two pictures can be compared; a bar that is longer
            is cut. By default a little behind the longest bar.
    """
    verdicts = {name: f", {row.verdict}" for name, row in rows.items() if hasattr(row, "verdict")}
    rows = {name: getattr(row, "composition", row) for name, row in rows.items()}
    totals = {name: sum(row.values()) for name, row in rows.items()}
    limit = gpu.usable_bytes if gpu else 0
    longest = axis_bytes or max([*totals.values(), limit])
    unit, size = _unit(longest)
    canvas, ax = new_canvas(2.0 + 0.6 * len(rows))
    ends = dict.fromkeys(rows, 0)
    for holder in sorted({h for row in rows.values() for h in row if row[h]}, key=place_of):
        widths = [
            min(row.get(holder, 0), max(0, longest - ends[name])) / size
            for name, row in rows.items()
        ]
        ax.barh(
            list(rows),
            widths,
            left=[end / size for end in ends.values()],
            label=holder,
            color=COLOURS.get(holder, INK),
            height=0.62,
        )
        ends = {name: end + rows[name].get(holder, 0) for name, end in ends.items()}
    said = {}
    for name, total in totals.items():
        if total > longest:  # a gap near its end: this bar goes on
            gap = 0.012 * longest / size
            ax.barh(name, gap, left=0.965 * longest / size, color="white", height=0.7)
        said[name] = show_bytes(total) + verdicts.get(name, "")
        if total <= limit and said[name].endswith("does not fit"):
            said[name] += ", with gaps"  # the allocator's: tensors alone would have fitted
        ax.annotate(
            f"{'→ ' * (total > longest)}{said[name]}",
            (min(total, longest) / size, name),
            xytext=(7, 0),
            va="center",
            fontsize=12,
            textcoords="offset points",
            zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
        )
    if gpu:
        ax.axvline(limit / size, color=INK, linestyle="--", zorder=3)
        unit += f" (dashed: the {show_bytes(limit)} that {with_article(gpu.name)} has for tensors)"
    ax.set(title=title, xlabel=unit, xlim=(0, 1.5 * longest / size))
    ax.invert_yaxis()
    canvas.legend(loc="outside lower center", ncols=4, fontsize=12)
    against = f" against the {show_bytes(limit)} of {with_article(gpu.name)}" if gpu else ""
    bars = "; ".join(f"{name}: {said[name]} ({_parts(row)})" for name, row in rows.items())
    return finish(canvas, f"bars{against}", title, f"{bars}.")


def place_of(holder: str) -> int:
    """Where a holder of memory stands in a stack: the same in all pictures."""
    return list(COLOURS).index(holder) if holder in COLOURS else len(COLOURS)


@styled
def curves(
    x: Sequence[float],
    lines: Mapping[str, Sequence[int]],
    xlabel: str,
    title: str = "",
    gpu: Gpu | None = None,
) -> Figure:
    """Bytes as a function of one number, a line for each name: linear or quadratic, by eye.

    Args:
        x: Values of the number, rising.
        lines: Name of each line, to bytes at each x.
        xlabel: What x counts.
        title: What is drawn.
        gpu: Its usable memory is drawn as a line; `None` draws none.
    """
    highest = max(max(line) for line in lines.values())
    unit, size = _unit(highest)
    canvas, ax = new_canvas()
    for (name, line), colour, mark in zip(
        lines.items(), itertools.cycle(LINES), itertools.cycle("osD^v"), strict=False
    ):
        ax.plot(x, [n / size for n in line], color=colour, marker=mark, linewidth=2.5)
        ax.annotate(
            name,
            (x[-1], line[-1] / size),
            xytext=(8, 0),
            textcoords="offset points",
            color=colour,
            va="center",
        )
    if gpu and gpu.usable_bytes < 1.2 * highest:
        ax.axhline(gpu.usable_bytes / size, color=INK, linestyle="--")
        falls = any(line[0] > gpu.usable_bytes for line in lines.values())
        ax.annotate(
            f"{gpu.name}: {show_bytes(gpu.usable_bytes)} usable",
            xytext=(0, 5),
            xy=(x[len(x) // 2 if falls else 0], gpu.usable_bytes / size),
            textcoords="offset points",
        )
    ax.set(
        title=title,
        xlabel=xlabel,
        ylabel=unit,
        ylim=(0, None),
        xticks=x,
        xlim=(None, x[-1] + 0.3 * (x[-1] - x[0])),
    )
    ax.grid(axis="y")
    ends = "; ".join(
        f"{name}: {show_bytes(line[0])} at {x[0]:,}, {show_bytes(line[-1])} at {x[-1]:,}"
        for name, line in lines.items()
    )
    return finish(canvas, f"lines over {xlabel}", title, f"{ends}.")


@styled
def forward_backward(layers: int = 4) -> Figure:
    """The diagram of a training step: forward stores a1 ... an, backward takes them, last first."""
    canvas, ax = new_canvas(4.0)
    arrow = {"arrowstyle": "-|>", "mutation_scale": 16, "linewidth": 1.6}
    rows = {"forward": (2.0, COLOURS["weights"]), "backward": (0.0, COLOURS["gradients"])}
    for row, (y, colour) in rows.items():
        ax.text(-0.75, y, row, ha="right", va="center", weight="bold", color=colour)
        for layer in range(layers):
            ax.add_patch(
                FancyBboxPatch(
                    (layer - 0.3, y - 0.22),
                    0.6,
                    0.44,
                    facecolor=colour,
                    edgecolor="none",
                    boxstyle="round,pad=0.03",
                )
            )
            ax.text(
                layer, y, f"layer {layer + 1}", ha="center", va="center", color="white", fontsize=12
            )
        for edge in range(layers + 1):
            start, end = (edge - 0.67, y), (edge - 0.34, y)
            ax.add_patch(
                FancyArrowPatch(*((start, end) if y else (end, start)), color=colour, **arrow)
            )
    for layer in range(layers):
        ax.text(
            layer,
            1.0,
            f"$a_{layer + 1}$",
            ha="center",
            va="center",
            fontsize=15,
            bbox={
                "boxstyle": "circle",
                "facecolor": COLOURS["activations"],
                "alpha": 0.35,
                "edgecolor": COLOURS["activations"],
            },
        )
        for start, end in ((1.75, 1.27), (0.73, 0.27)):
            ax.add_patch(FancyArrowPatch((layer, start), (layer, end), color=INK, **arrow))
    ax.text(
        -0.75, 1.0, "kept", ha="right", va="center", weight="bold", color=COLOURS["activations"]
    )
    ax.text(layers + 0.14, 1.0, "loss", ha="left", va="center", weight="bold")
    ax.add_patch(
        FancyArrowPatch(
            (layers - 0.33, 2.0),
            (layers - 0.33, 0.0),
            color=INK,
            connectionstyle="arc3,rad=-0.35",
            **arrow,
        )
    )
    ax.set(xlim=(-1.6, layers + 0.6), ylim=(-0.45, 2.45))
    ax.axis("off")
    names = ", ".join(f"a{layer + 1}" for layer in range(layers))
    return finish(
        canvas,
        f"the forward pass runs through layers 1 to {layers} and keeps {names}, "
        "one set of activations a layer, up to the loss; the backward pass "
        f"runs from layer {layers} to 1 and needs each layer's activations "
        "again. The first one kept is the last one used",
    )


@styled
def losses(runs: Mapping[str, Sequence[float]], title: str = "") -> Figure:
    """Training loss of each run, in nats per labelled token, over its optimizer steps."""
    canvas, ax = new_canvas(4.0)
    for (name, line), colour, dashes in zip(
        runs.items(), itertools.cycle(LINES), itertools.cycle(("-", "--", ":", "-.")), strict=False
    ):
        ax.plot(range(1, len(line) + 1), line, dashes, color=colour, linewidth=2.5, label=name)
    ax.set(title=title, xlabel="optimizer steps", ylabel="loss, nats per token", ylim=(0, None))
    ax.grid(axis="y")
    ax.legend()
    ends = {
        name: f"{line[-1]:.1f}" if line[-1] >= 0.1 else "below 0.1" for name, line in runs.items()
    }
    said = "; ".join(
        f"{name}: {len(line)} steps, from {line[0]:.0f} to {ends[name]}"
        for name, line in runs.items()
    )
    return finish(canvas, "training loss", title, f"{said}.")
