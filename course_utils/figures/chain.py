"""Pictures of a chain's training step: which inputs wait in memory, action by action.

Drawn in the language of `figures`, which keeps matplotlib to itself. Not drawn: sizes; every input
counts as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from course_utils.figures.base import COLOURS, INK, SHADES, Figure, finish, new_canvas, styled
from course_utils.topics.checkpointing import Moment

GREEN = COLOURS["activations"]


@styled
def chains(traces: Mapping[str, Sequence[Moment]], steps: int) -> Figure:
    """A row a chain: its actions from left to right, the inputs held at each stacked up.

    Args:
        traces: Name of each chain, to its trace from `checkpointing.trace_chain`.
        steps: Length of the chains.
    """
    canvas, _ = new_canvas(0.7 + 2.5 * len(traces))
    canvas.clear()
    axes = canvas.subplots(len(traces), squeeze=False)[:, 0]
    longest, said = max(map(len, traces.values())), []
    for ax, (name, trace) in zip(axes, traces.items(), strict=True):
        _draw(ax, trace, steps, longest)
        most, runs = max(len(moment.held) for moment in trace), _forward_steps(trace)
        ax.set_title(f"{name}: at most {most} held, {runs} forward steps", loc="left", fontsize=13)
        counts = ", ".join(f"{moment.action} {len(moment.held)}" for moment in trace)
        said.append(
            f"{name}: at most {most} inputs held, {runs} forward steps; held during each "
            f"action: {counts}"
        )
    canvas.supxlabel("f: a forward step; b: a backward step; hatched: computed again", fontsize=12)
    return finish(
        canvas,
        f"training steps of a chain of {steps}, action by action",
        words=f"{'. '.join(said)}.",
    )


def _forward_steps(trace: Sequence[Moment]) -> int:
    return sum(moment.action.startswith("forward") for moment in trace)


def _draw(ax: Any, trace: Sequence[Moment], steps: int, longest: int) -> None:
    kept = {moment.held[-1] for moment in trace[:steps] if moment.held}
    for x, moment in enumerate(trace):
        kind, step, *again = moment.action.split()
        ax.axvspan(
            x - 0.5,
            x + 0.5,
            linewidth=0,
            zorder=0,
            color=SHADES["forward" if kind == "forward" else "backward"],
        )
        for y, number in enumerate(moment.held):
            again_now = number not in kept
            look = {"facecolor": "white", "hatch": "////"} if again_now else {"facecolor": GREEN}
            ax.bar(x, 0.86, bottom=y + 0.07, width=0.84, edgecolor=GREEN, **look)
            ax.text(
                x,
                y + 0.48,
                f"$a_{number}$",
                ha="center",
                va="center",
                fontsize=12.5,
                color=INK if again_now else "white",
                bbox={"facecolor": "white" if again_now else GREEN, "edgecolor": "none", "pad": 1},
            )
        ax.text(
            x,
            -0.15,
            f"{kind[0]}{step}",
            ha="center",
            va="top",
            fontsize=12,
            weight="bold" if again else "normal",
            color=INK,
        )
    ax.set(xlim=(-0.6, longest - 0.4), ylim=(-0.75, steps + 0.1), xticks=[], yticks=[])
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)


@styled
def held_beside(
    yours: Mapping[str, Sequence[float]], counted: Mapping[str, Sequence[int]]
) -> Figure:
    """Inputs held during each backward step: a learner's counts beside those of a chain that ran.

    Args:
        yours: Name of each chain, to the counts for its last step, the one before, and so on; empty
            for a picture of what was counted alone.
        counted: The same names, to the right counts.
    """
    canvas, _ = new_canvas(2.9)
    canvas.clear()
    axes, said = canvas.subplots(1, len(counted), squeeze=False, sharey=True)[0], []
    for ax, (name, right) in zip(axes, counted.items(), strict=True):
        places = range(len(right))
        ax.bar(places, right, color=GREEN, width=0.8, label="counted")
        if name in yours:
            ax.plot(places, yours[name], "D", color=INK, markersize=7, label="yours")
            same = sum(a == b for a, b in zip(yours[name], right, strict=True))
            said.append(f"{name}: {same} of {len(right)} as counted")
        said.append(f"{name}: {', '.join(map(str, right))} held")
        ax.set(xticks=list(places), xticklabels=[f"b{n}" for n in range(len(right), 0, -1)])
        ax.set_title(name, loc="left", fontsize=13)
    axes[0].set_ylabel("inputs held")
    axes[-1].legend(fontsize=12)
    return finish(canvas, "inputs held in each backward step", words=f"{'; '.join(said)}.")
