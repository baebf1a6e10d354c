"""The course's closing act as a picture: an 8B model's step, one change after the other, on a T4.

Drawn from `course_utils/data/recorded_runs.json` as SVG text, without matplotlib, so that the same
recording gives the same file on every machine. `make stamp` writes it to docs/ and its words to
README.
"""

from html import escape
from typing import Any

from course_utils.topics import recorded
from fitcast.gpus import T4
from fitcast.units import GIB, show_bytes

WIDTH, LEFT, RIGHT, TOP, ROW = 880, 218, 150, 92, 34  # pixels
AXIS_GIB = 26


def rungs() -> list[dict[str, Any]]:
    """The recorded steps that show a peak: each adds one change to the one before."""
    return [row for row in recorded.rows("ladder") if not row["limited"]]


def refused() -> dict[str, Any]:
    """The recorded run that had no more than a T4's memory, and ended."""
    return next(row for row in recorded.rows("ladder") if not row["peak_allocated_bytes"])


def extremes() -> tuple[dict[str, Any], dict[str, Any]]:
    """The usual recipe, and the fastest of the rungs that fit a T4."""
    fitting = [row for row in rungs() if row["peak_allocated_bytes"] <= T4.usable_bytes]
    usual = next(row for row in rungs() if row["name"] == "the usual recipe")
    return usual, max(fitting, key=lambda row: row["tokens_per_second"])


def alt() -> str:
    """The picture in words."""
    usual, best = extremes()
    recipe = usual["recipe"]
    speedup = best["tokens_per_second"] / usual["tokens_per_second"]
    bars = ", ".join(f"{r['name']} {show_bytes(r['peak_allocated_bytes'])}" for r in rungs())
    return (
        f"Peak memory of a QLoRA step of {recipe['model']}, {recipe['micro_batch_size']} x "
        f"{recipe['sequence_length']} tokens, one change after the other: {bars}. A T4 ends at "
        f"{show_bytes(T4.total_bytes)}. From the usual recipe to '{best['name']}' the step became "
        f"{speedup:.1f} times as fast."
    )


def _text(x: float, y: float, words: str, **attributes: str) -> str:
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
    return f'<text x="{x:.1f}" y="{y:.1f}"{extra}>{escape(words)}</text>'


def svg() -> str:
    """The picture: a bar and a speed for each rung, the T4's end as a line."""
    # Here, since matplotlib comes along, which nothing else of this tool and of tools.stamp needs.
    from course_utils.figures.base import GRID, INK, LINES

    rows, recipe = rungs(), rungs()[0]["recipe"]
    scale = (WIDTH - LEFT - RIGHT) / (AXIS_GIB * GIB)
    bottom = TOP + ROW * len(rows)
    limit = LEFT + T4.total_bytes * scale
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 78}" '
        f'font-family="DejaVu Sans, Verdana, sans-serif" font-size="14" fill="{INK}" role="img">',
        f"<title>{escape(alt())}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        _text(16, 30, f"{recipe['model']} in 4 bits, {recipe['micro_batch_size']} sequences of "
              f"{recipe['sequence_length']} tokens", font_size="19", font_weight="bold"),
        _text(16, 54, "Peak of one training step. Each row changes one thing in the row above it."),
    ]  # fmt: skip
    for tick in range(0, AXIS_GIB + 1, 5):
        x = LEFT + tick * GIB * scale
        parts.append(f'<path d="M{x:.1f} {TOP}V{bottom}" stroke="{GRID}"/>')
        parts.append(_text(x, bottom + 20, f"{tick} GiB", text_anchor="middle"))
    parts.append(_text(WIDTH - 16, TOP - 10, "tokens/s", text_anchor="end"))
    for number, row in enumerate(rows):
        y, peak = TOP + ROW * number, row["peak_allocated_bytes"]
        colour = LINES[0 if peak <= T4.usable_bytes else 1]
        width = peak * scale
        middle = y + ROW / 2 + 5
        parts += [
            _text(LEFT - 10, middle, row["name"], text_anchor="end"),
            f'<rect x="{LEFT}" y="{y + 5}" width="{width:.1f}" height="{ROW - 10}" '
            f'fill="{colour}"/>',
            _text(LEFT + width - 8, middle, show_bytes(peak), text_anchor="end", fill="white",
                  font_weight="bold"),
            _text(WIDTH - 16, middle, f"{row['tokens_per_second']:,.0f}", text_anchor="end"),
        ]  # fmt: skip
    parts += [
        f'<path d="M{limit:.1f} {TOP - 6}V{bottom}" stroke="{INK}" stroke-width="2.5" '
        'stroke-dasharray="7 4"/>',
        _text(limit, TOP - 12, f"a T4 ends here: {show_bytes(T4.total_bytes)}",
              text_anchor="middle", font_weight="bold"),
        _text(16, bottom + 44, "Held to a T4's memory, the usual recipe stopped: "
              f"{refused()['outcome'].removeprefix('out of memory: ').rstrip('.')}.",
              font_size="13"),
        _text(16, bottom + 64, f"Measured: {recorded.stamp(rows)}. Speeds are that card's.",
              font_size="13"),
        "</svg>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"
