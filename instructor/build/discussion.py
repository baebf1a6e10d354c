"""The page for the meeting: each lesson's minutes, and its "Try with AI" with the right answer.

    python -m instructor.discussion --out class/meeting.md

Prompts, answers and numbers are those of the committed lessons, so they are always the course's
own. What to make of them in class is in `instructor/README.md`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from fitcast.units import Said, refusal
from tools.notebooks import LESSONS

SECTION = "Try with AI"


def section(notebook: dict) -> Iterator[str]:
    """The parts of one lesson's section: text, and in between what its cells printed."""
    inside = 0  # the level of the section's heading
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            for part in re.split(r"^(?=##+ )", source, flags=re.MULTILINE):
                if heading := re.match(rf"(##+) ({SECTION})?", part):
                    level = len(heading[1])
                    if heading[2]:
                        inside, part = level, part.partition("\n")[2]
                    elif level <= inside:
                        inside = 0
                if inside and part.strip():
                    yield part.strip()
        elif inside:
            printed = "".join("".join(output.get("text", "")) for output in cell["outputs"])
            yield f"```text\n{printed.rstrip()}\n```"


def timing(notebook: dict) -> str:
    """A row of the table of minutes: the lesson, its minutes, its exercises with theirs.

    Raises:
        ValueError: The lesson does not say how long it takes.
    """
    text = "\n".join(
        "".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown"
    )
    title = re.search(r"^# (.+)$", text, re.M)[1]
    if not (minutes := re.search(r"\*\*(\d+) min\*\*", text)):
        raise refusal(
            f"lesson {title!r}", "say '**45 min**' or so at its top", Said("no minutes"), "add them"
        )
    exercises = re.findall(
        r"^##+ Exercise (\S+) · (.+)\n+\*(\w+), (\d+) minutes(, at home)?", text, re.M
    )
    listed = "; ".join(
        f"{number} {name}: {took} ({level.lower()}{home})"
        for number, name, level, took, home in exercises
    )
    return f"| {title} | {minutes[1]} | {listed} |"


def page(lessons: Path = LESSONS) -> str:
    """The page as Markdown, one heading per lesson.

    Raises:
        ValueError: A lesson has no such section, or it has not been executed.
    """
    parts, rows = [], []
    for path in sorted(lessons.glob("[0-9][0-9]_*.ipynb")):
        notebook = json.loads(path.read_text("utf-8"))
        rows.append(timing(notebook))
        title = rows[-1].split(" | ")[0].removeprefix("| ")
        found = list(section(notebook))
        if not found or "```text\n\n```" in found:
            raise refusal(
                path.name,
                f"have a section '## {SECTION}' with printed numbers",
                Said("none"),
                "execute the lesson",
            )
        parts += [f"## {title}", *found]
    table = ["| lesson | minutes | its exercises, in minutes |", "|---|---|---|", *rows]
    return (
        "\n\n".join(
            [
                "# For the meeting",
                "## Timing",
                "\n".join(table),
                "# Try with AI: prompts and right answers",
                *parts,
            ]
        )
        + "\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m instructor.discussion", description="Write the page for the meeting."
    )
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    out = parser.parse_args(arguments).out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(), "utf-8")
    print(f"minutes, prompts and right answers in {out}")
    return 0
