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

WIDTH, LEFT, RIGHT, TOP, ROW = 880, 218, 150, 116, 48  # pixels
AXIS_GIB = 26


def rungs() -> list[dict[str, Any]]:
    """The recorded steps that show a peak: each adds one change to the one before."""
    return [row for row in recorded.rows("ladder") if not row["limited"]]


def padded() -> dict[str, dict[str, Any]]:
    """The recorded steps of padded batches, by the name of their rung."""
    return {row["name"]: row for row in recorded.rows("padded")}


def refused() -> dict[str, Any]:
    """The recorded run that had no more than a T4's memory, and ended."""
    return next(row for row in recorded.rows("ladder") if not row["peak_allocated_bytes"])


def extremes() -> tuple[dict[str, Any], dict[str, Any]]:
    """The usual recipe, and the fastest of the rungs that fit a T4."""
    fitting = [row for row in rungs() if row["peak_allocated_bytes"] <= T4.usable_bytes]
    usual = next(row for row in rungs() if row["name"] == "the usual recipe")
    return usual, max(fitting, key=lambda row: row["tokens_per_second"])


def padded_speedup() -> float:
    """The same, of padded batches: from the usual recipe to the fastest rung that fits."""
    rows = padded()
    fitting = [row for row in rows.values() if row["peak_allocated_bytes"] <= T4.usable_bytes]
    fastest = max(row["tokens_per_second"] for row in fitting)
    return fastest / rows["the usual recipe"]["tokens_per_second"]


def alt() -> str:
    """The picture in words."""
    usual, best = extremes()
    recipe = usual["recipe"]
    speedup = best["tokens_per_second"] / usual["tokens_per_second"]
    bars = ", ".join(f"{r['name']} {show_bytes(r['peak_allocated_bytes'])}" for r in rungs())
    beside = ", ".join(
        f"{name} {show_bytes(row['peak_allocated_bytes'])}" for name, row in padded().items()
    )
    return (
        f"Peak memory of a QLoRA step of {recipe['model']}, {recipe['micro_batch_size']} x "
        f"{recipe['sequence_length']} tokens, one change after the other, without a mask: {bars}. "
        f"Padded: {beside}. A T4 ends at {show_bytes(T4.total_bytes)}. From the usual recipe to "
        f"'{best['name']}' the step became {speedup:.1f} times as fast without a mask, and "
        f"{padded_speedup():.1f} times padded."
    )


RACE = {  # rows of the race -> how they are called; contender -> what it is
    "4x2048": "4 x 2048, no mask",
    "packed": "packed to 2048",
    "4x2048 again": "4 x 2048, no mask",
    "padded": "4 x 2048, padded",
    "1x8192": "1 x 8 192",
    "1x40960": "1 x 40 960",
}
RACERS = {
    "usual": "Trainer, the usual recipe",
    "trl": "TRL's SFTTrainer",
    "unsloth": "Unsloth",
    "ours, embedding on host": "ours: lean, compiled, embedding on the host",
    "ours, lean, compiled": "ours: lean, compiled",
    "ours, compiled, 28 forget, kept": "ours: compiled, 4 of 32 layers keep all",
    "ours, fit's pick": "ours: what `fit` picks",
}


VERSIONS = ("torch", "transformers", "unsloth", "bitsandbytes")


def _versions(rows: dict[str, Any], where: str) -> str:
    """Of Unsloth's process, and of TRL where it raced: Unsloth brings one of its own."""
    found = {name: rows[f"{where}, unsloth"]["versions"][name] for name in VERSIONS}
    trl = rows.get(f"{where}, trl", {})
    if trl.get("tokens_per_second"):
        found["trl"] = trl["versions"]["trl"]
    return ", ".join(f"{name} {version}" for name, version in found.items())


def race() -> str:
    """README's table of the race: tokens a second and peaks; each host's rows stand together."""
    rows = {row["name"]: row for row in recorded.rows("race")}
    head = ["| | who | tokens/s (least to most) | beside Unsloth | peak | runs |",
            "|---|---|---:|---:|---:|---:|"]  # fmt: skip
    lines, host = [], None
    for where, said in RACE.items():
        first = rows[f"{where}, unsloth"]
        here = (
            f"{first['gpu']} with a T4's kernels, {first['cpu']}, {first['launch_microseconds']} "
            f"microseconds a launch, {first['date']}; {_versions(rows, where)}:"
        )
        if here != host:
            lines += [*[""][: len(lines)], here, "", *head]
            host = here
        peer = rows[f"{where}, unsloth"]["tokens_per_second"][1]
        for who, name in RACERS.items():
            row = rows.get(f"{where}, {who}")
            if row is None:
                continue
            if not row["tokens_per_second"]:
                lines.append(f"| {said} | {name} | out of memory | | | |")
                continue
            low, middle, high = row["tokens_per_second"]
            peak = show_bytes(row["peak_allocated_bytes"])
            spread = f"{middle:,}" if low == high else f"{middle:,} ({low:,} to {high:,})"
            lines.append(
                f"| {said} | {name} | {spread} | {middle / peer:.2f} | {peak} | {row['repeats']} |"
            )
    return "\n".join(lines) + "\n"


def _text(x: float, y: float, words: str, **attributes: str) -> str:
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
    return f'<text x="{x:.1f}" y="{y:.1f}"{extra}>{escape(words)}</text>'


def _bar(row: dict[str, Any], y: float, height: int, scale: float, weight: str) -> list[str]:
    """A peak with its number in it, and the speed at the right edge."""
    from course_utils.figures.base import LINES

    peak = row["peak_allocated_bytes"]
    colour, width = LINES[0 if peak <= T4.usable_bytes else 1], peak * scale
    size, opacity = ("14", "1") if weight == "bold" else ("12", "0.82")
    line = y + height / 2 + 5
    return [
        f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{height}" fill="{colour}" '
        f'fill-opacity="{opacity}"/>',
        _text(LEFT + width - 8, line, show_bytes(peak), text_anchor="end", fill="white",
              font_weight=weight, font_size=size),
        _text(WIDTH - 16, line, f"{row['tokens_per_second']:,.0f}", text_anchor="end",
              font_size=size),
    ]  # fmt: skip


def svg() -> str:
    """The picture: a bar and a speed for each rung, the T4's end as a line."""
    # Here, since matplotlib comes along, which nothing else of this tool and of tools.stamp needs.
    from course_utils.figures.base import GRID, INK

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
        _text(16, 76, "Upper bar: no mask (packed, or of one length). Lower bar: padded."),
    ]  # fmt: skip
    for tick in range(0, AXIS_GIB + 1, 5):
        x = LEFT + tick * GIB * scale
        parts.append(f'<path d="M{x:.1f} {TOP}V{bottom}" stroke="{GRID}"/>')
        parts.append(_text(x, bottom + 20, f"{tick} GiB", text_anchor="middle"))
    parts.append(_text(WIDTH - 16, TOP - 10, "tokens/s", text_anchor="end"))
    beside = padded()
    for number, row in enumerate(rows):
        y = TOP + ROW * number
        parts.append(_text(LEFT - 10, y + ROW / 2 + 5, row["name"], text_anchor="end"))
        parts += _bar(row, y + 4, 22, scale, "bold")
        if row["name"] in beside:
            parts += _bar(beside[row["name"]], y + 27, 16, scale, "normal")
    parts += [
        f'<path d="M{limit:.1f} {TOP - 6}V{bottom}" stroke="{INK}" stroke-width="2.5" '
        'stroke-dasharray="7 4"/>',
        _text(limit, TOP - 12, f"a T4 ends here: {show_bytes(T4.total_bytes)}",
              text_anchor="middle", font_weight="bold"),
        _text(16, bottom + 44, "Held to a T4's memory, the usual recipe stopped: "
              f"{refused()['outcome'].removeprefix('out of memory: ').rstrip('.')}.",
              font_size="13"),
        _text(16, bottom + 64, f"Measured: {recorded.stamp(rows)}; padded "
              f"{beside['the usual recipe']['date']}. Two hosts: compare speeds among upper bars "
              "or among lower ones.", font_size="13"),
        "</svg>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"
