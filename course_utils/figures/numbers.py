"""Pictures of numbers: where magnitudes lie in a format, what updates move, what a scaler did.

The horizontal axis of a magnitude is its power of two. Drawn in the language of `figures`, which
keeps matplotlib to itself. Not drawn: signs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from course_utils.figures.base import (
    COLOURS,
    GRID,
    INK,
    LINES,
    Figure,
    finish,
    new_canvas,
    styled,
)
from course_utils.topics.precision import FORMATS, ScalerStep, bits, dtype_of, land, moved_share

GROUPS = {name: COLOURS[name] for name in ("weights", "activations", "gradients")}
LOWEST, HIGHEST = -48, 24  # powers of two that are drawn


def _powers(low: int, high: int, step: int) -> dict[str, list]:
    """Ticks of an axis of powers of two."""
    ticks = list(range(low, high + 1, step))
    return {"xticks": ticks, "xticklabels": [f"$2^{{{tick}}}$" for tick in ticks]}


@styled
def bit_fields(names: Sequence[str] = tuple(FORMATS), value: float = 0.1) -> Figure:
    """The bits of one number in each format: sign, exponent, fraction."""
    canvas, ax = new_canvas(0.9 + 0.75 * len(names))
    shades = (COLOURS["gradients"], COLOURS["optimizer state"], COLOURS["adapters"])
    for row, name in enumerate(names):
        left = 0
        for part, shade in zip(bits(value, name).split(), shades, strict=True):
            for bit in part:
                ax.barh(-row, 0.92, left=left, color=shade, height=0.6)
                ax.text(left + 0.46, -row, bit, ha="center", va="center", fontsize=10)
                left += 1
        ax.text(-0.6, -row, name, ha="right", va="center", weight="bold")
    for label, x, shade in zip(("sign", "exponent", "fraction"), (0, 5, 14), shades, strict=True):
        ax.text(
            x,
            0.62,
            label,
            color=INK,
            ha="left",
            va="center",
            bbox={"facecolor": shade, "alpha": 0.35, "edgecolor": "none", "pad": 2},
        )
    ax.set(xlim=(-6, 32.2), ylim=(0.4 - len(names), 0.9))
    ax.axis("off")
    said = "; ".join(f"{name} {bits(value, name)}" for name in names)
    return finish(canvas, f"the bits of {value} as sign, exponent and fraction: {said}")


@styled
def magnitudes(
    groups: Mapping[str, Sequence[torch.Tensor]],
    names: Sequence[str] = ("float32", "bfloat16", "float16"),
    scale: float = 1.0,
    title: str = "",
    say_landing: bool = True,
) -> Figure:
    """Histograms of magnitudes over the range of each format; `scale` multiplies the numbers.

    Args:
        groups: Name of each histogram, to tensors.
        names: Formats, drawn as bars: solid where numbers are normal, pale where subnormal.
        scale: Every number is multiplied by it first.
        title: What is drawn.
        say_landing: Whether the words give the shares that land in float16; otherwise they say
            where the numbers lie, and a reader can still guess.
    """
    canvas, ax = new_canvas(1.6 + 0.42 * len(names) + 0.95 * len(groups))
    for row, name in enumerate(names):
        info, y = torch.finfo(dtype_of(name)), len(groups) + 0.25 + 0.42 * row
        low, tiny, high = map(math.log2, (info.tiny * info.eps, info.tiny, info.max))
        ax.barh(y, tiny - low, left=low, height=0.26, color=GRID)
        ax.barh(y, high - tiny, left=tiny, height=0.26, color="#888888")
        ax.text(LOWEST - 1, y, name, ha="right", va="center", fontsize=12)
    edges = torch.finfo(torch.float16)
    for edge in (edges.tiny * edges.eps, edges.tiny, edges.max):
        ax.axvline(math.log2(edge), color=INK, linewidth=1, linestyle=":")
    said = []
    for row, (name, tensors) in enumerate(reversed(list(groups.items()))):
        numbers = torch.cat([t.detach().flatten().abs().double().cpu() for t in tensors])
        powers = (numbers[numbers > 0] * scale).log2().clamp(LOWEST, HIGHEST)
        counts = torch.histc(powers, HIGHEST - LOWEST, LOWEST, HIGHEST)
        colour = GROUPS.get(name.split()[-1], LINES[row])
        ax.bar(
            range(LOWEST, HIGHEST),
            (0.8 * counts / counts.max()).tolist(),
            bottom=row,
            width=1,
            align="edge",
            color=colour,
        )
        ax.text(LOWEST - 1, row + 0.2, name, ha="right", va="center", color=colour, fontsize=12)
        if say_landing:
            landing = land(tensors, "float16", scale)
            words = (
                f"{name}: {landing.zero:.0%} become zero, {landing.subnormal:.0%} are "
                f"subnormal, {landing.normal:.0%} normal, {landing.infinite:.0%} infinite"
            )
        else:
            power = LOWEST + int(counts.argmax())
            words = f"{name} are most often between 2**{power} and 2**{power + 1}"
        said.insert(0, words)
    ax.set(
        title=title,
        xlim=(LOWEST, HIGHEST),
        ylim=(0, len(groups) + 0.42 * len(names) + 0.1),
        yticks=[],
        xlabel="magnitude (dotted: float16's smallest, smallest normal, largest)",
        **_powers(LOWEST, HIGHEST, 8),
    )
    ax.spines["left"].set_visible(False)
    at = f", times {scale:,.0f}" if scale != 1 else ""
    return finish(
        canvas,
        f"histograms of magnitudes{at}",
        title,
        f"{'In float16, ' * say_landing}{'; '.join(said)}.",
    )


@styled
def smallest_updates(
    learning_rate: float, weights: Sequence[torch.Tensor], title: str = ""
) -> Figure:
    """The update that a weight of each magnitude needs to move at all, by format, and who moves.

    Args:
        learning_rate: Size of an update by Adam, which divides gradients by their own size.
        weights: Their histogram is drawn below; their share that moves is said.
        title: Whose weights.
    """
    canvas, ax = new_canvas()
    powers = range(-16, 3)
    said = []
    for (name, dtype), colour in zip(FORMATS.items(), LINES, strict=False):
        line = [2.0**power * torch.finfo(dtype).eps / 2 for power in powers]
        share = moved_share(weights, learning_rate, name)
        ax.plot(powers, line, color=colour, linewidth=2.5, drawstyle="steps-post")
        ax.annotate(
            f"{name}: {share:.0%} move",
            (powers[-1], line[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
        said.append(f"{name} {share:.0%}")
    ax.axhline(learning_rate, color=INK, linestyle="--")
    ax.annotate(
        f"update {learning_rate:g}",
        (powers[0], learning_rate),
        xytext=(2, 5),
        textcoords="offset points",
    )
    ax.set(
        title=title,
        yscale="log",
        ylim=(1e-13, 1e-1),
        xlim=(powers[0], powers[-1] + 8),
        xlabel="magnitude of the weight (below: how many there are)",
        ylabel="smallest update that moves it",
        **_powers(-16, 2, 2),
    )
    below = ax.twinx()
    numbers = torch.cat([w.detach().flatten().abs().double().cpu() for w in weights])
    counts = torch.histc(numbers[numbers > 0].log2(), len(powers) - 1, powers[0], powers[-1])
    below.bar(
        powers[:-1],
        (counts / counts.max()).tolist(),
        width=1,
        align="edge",
        color=COLOURS["weights"],
        alpha=0.35,
    )
    below.set(ylim=(0, 5), yticks=[])
    return finish(
        canvas,
        "smallest update that moves a weight, over the weight's magnitude",
        title,
        f"With an update of {learning_rate:g} move: {', '.join(said)}.",
    )


@styled
def loss_scale(trace: Sequence[ScalerStep], title: str = "") -> Figure:
    """The scale of each step, and the steps that were skipped."""
    canvas, ax = new_canvas(3.8)
    steps = range(1, len(trace) + 1)
    scales = [step.scale for step in trace]
    skipped = [number for number, step in zip(steps, trace, strict=True) if step.skipped]
    ax.plot(steps, scales, drawstyle="steps-mid", color=COLOURS["weights"], linewidth=2.5)
    ax.plot(
        skipped,
        [scales[number - 1] for number in skipped],
        "X",
        markersize=11,
        color=COLOURS["gradients"],
        label="overflow: step skipped, scale halved",
    )
    low, high = (int(torch.tensor(edge).log2()) for edge in (min(scales), max(scales)))
    ticks = list(range(low - 1, high + 3))
    ax.set(
        title=title,
        yscale="log",
        ylim=(2.0 ** ticks[0], 2.0 ** ticks[-1]),
        xlabel="step",
        ylabel="scale",
    )
    ax.set_yticks([2.0**tick for tick in ticks], [f"$2^{{{tick}}}$" for tick in ticks])
    ax.minorticks_off()
    ax.grid(axis="y")
    if skipped:
        ax.legend(loc="upper right")
    return finish(
        canvas,
        f"loss scale over {len(trace)} steps",
        title,
        f"From {scales[0]:,.0f} to {scales[-1]:,.0f}, at most {max(scales):,.0f}; "
        f"steps skipped: {', '.join(map(str, skipped)) or 'none'}.",
    )


@styled
def scale_window(errors: Mapping[int, float], title: str = "", limit: float = 0.02) -> Figure:
    """Relative error of a float16 gradient over the scale of its loss.

    Args:
        errors: Power of two of the scale, rising, to the error; not finite where it overflowed.
        title: Whose gradient.
        limit: Errors up to this one are called good.
    """
    canvas, ax = new_canvas(4.2)
    finite = {power: error for power, error in errors.items() if math.isfinite(error)}
    lost = [power for power in errors if power not in finite]
    good = [power for power, error in finite.items() if error <= limit]
    ax.axvspan(good[0], good[-1], color=GRID, alpha=0.6, linewidth=0)
    ax.plot(
        *zip(*finite.items(), strict=True), color=COLOURS["gradients"], marker="o", linewidth=2.5
    )
    ax.plot(lost, [1.0] * len(lost), "X", color=INK, markersize=11)
    ax.set(
        title=title,
        yscale="log",
        ylim=(1e-3, 10),
        xlabel="scale (grey: the good ones)",
        ylabel="error of the gradient",
        **_powers(min(errors), max(errors), 4),
    )
    ax.grid(axis="y")
    if lost:
        ax.annotate(
            "overflow: infinite",
            (lost[-1], 1.0),
            xytext=(8, 12),
            ha="right",
            textcoords="offset points",
        )
    over = f", infinite from 2**{lost[0]}" if lost else ""
    return finish(
        canvas,
        "error of a float16 gradient over the loss scale",
        title,
        f"At most {limit:.0%} from 2**{good[0]} to 2**{good[-1]}, more below{over}.",
    )
