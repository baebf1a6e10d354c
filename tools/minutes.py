"""How long a lesson's main path takes, computed, and how many new concepts it brings.

    python -m tools.minutes         # all lessons
    python -m tools.minutes 01 03   # these

The main path runs from the title to the heading "Go further"; what stands behind that is optional.
Left out of it are the set-up cells and what is folded: hints, and answers that wait for a guess are
counted as the lines of output that they unfold to. The rates are the design's, for a reader who
follows: 180 words a minute, 5 s for a line of code, 2 s for a line of output, a minute to make a
prediction; an exercise takes the minutes that it states. Not modelled: how long a cell runs, and
readers in a hurry.
"""

import html
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from tools.notebooks import LESSONS, lesson_scripts

WORDS_A_MINUTE = 180
CODE_LINE_SECONDS = 5
OUTPUT_LINE_SECONDS = 2
PREDICTION_MINUTES = 1
END = re.compile(r"^## Go further", re.MULTILINE)
STATED = re.compile(r"\*(?:Easy|Medium|Hard), (\d+) minutes")
FENCED = re.compile(r"^```\w*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FOLDED = re.compile(r"<details>.*?</details>", re.DOTALL)
TERM = re.compile(r"^\| \*\*(.+?)\*\*.* \| \[(\d\d)\]", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class MainPath:
    """What a lesson's main path consists of; `minutes` is what it takes."""

    words: int
    code_lines: int
    output_lines: int
    predictions: int
    exercise_minutes: int
    concepts: tuple[str, ...]

    @property
    def minutes(self) -> float:
        """Minutes, set-up excluded."""
        seconds = self.code_lines * CODE_LINE_SECONDS + self.output_lines * OUTPUT_LINE_SECONDS
        return (
            self.words / WORDS_A_MINUTE
            + seconds / 60
            + self.predictions * PREDICTION_MINUTES
            + self.exercise_minutes
        )


def main_path(notebook: NotebookNode, glossary: str = "") -> MainPath:
    """Measure an executed lesson.

    Args:
        notebook: With its outputs.
        glossary: The Markdown of the glossary; a term of this lesson that stands there and is
            bold in the main path is a new concept, announced or not.
    """
    cells = _before_the_end(notebook)
    prose = [cell.source for cell in cells if cell.cell_type == "markdown"]
    code = [cell for cell in _behind_set_up(cells) if cell.cell_type == "code"]
    read = [cell for cell in code if not {"exercise", "check", "predict"} & _tags(cell)]
    return MainPath(
        words=sum(map(words, prose)),
        code_lines=sum(len(code_lines(cell.source)) for cell in read)
        + sum(len(code_lines(block)) for text in prose for block in FENCED.findall(text)),
        output_lines=sum(output_lines(output) for cell in code for output in cell.outputs),
        predictions=sum("predict" in _tags(cell) for cell in code),
        exercise_minutes=sum(int(n) for text in prose for n in STATED.findall(text)),
        concepts=tuple(concepts(prose, glossary)),
    )


def _before_the_end(notebook: NotebookNode) -> list[NotebookNode]:
    """The cells up to "Go further"; of the cell with that heading, what stands above it."""
    found = []
    for cell in notebook.cells:
        end = END.search(cell.source) if cell.cell_type == "markdown" else None
        if end:
            return [*found, nbformat.v4.new_markdown_cell(cell.source[: end.start()])]
        found.append(cell)
    return found


def _behind_set_up(cells: list[NotebookNode]) -> list[NotebookNode]:
    """The cells from the first heading with a number, or from the first code without one."""
    numbered = (
        at
        for at, cell in enumerate(cells)
        if cell.cell_type == "markdown" and re.search(r"^## \d", cell.source, re.MULTILINE)
    )
    return cells[next(numbered, 0) :]


def _tags(cell: NotebookNode) -> set[str]:
    return set(cell.metadata.get("tags", []))


def words(markdown: str) -> int:
    """Words of prose, without code blocks, folded hints, addresses and marks."""
    text = FOLDED.sub(" ", FENCED.sub(" ", markdown))
    text = re.sub(r"!?\[!?([^]]*)\]\([^)]*\)", r"\1", re.sub(r"<[^>]*>|\$\$.*?\$\$", " ", text))
    return sum(any(sign.isalnum() for sign in word) for word in text.split())


def code_lines(source: str) -> list[str]:
    """Lines of code that are read: neither empty nor only a comment."""
    return [line for line in source.splitlines() if line.strip() and line.strip()[0] != "#"]


def output_lines(output: NotebookNode) -> int:
    """Lines of an output: a picture is one, an error its message."""
    match output.output_type:
        case "stream":
            text = output.text
        case "error":
            text = output.evalue
        case _:
            text = output.data.get("text/plain", "")
            if "text/html" in output.data:
                text = html.unescape(re.sub(r"<[^>]*>", "", output.data["text/html"]))
    return sum(bool(line.strip()) for line in text.splitlines())


def concepts(prose: list[str], glossary: str) -> list[str]:
    """New concepts: those that the lesson announces, and others of its own that it sets in bold."""
    opening = " ".join(prose[0].split()) if prose else ""
    number = opening[2:4]
    announced = re.search(r"New concepts \(\d\):\*\* (.*?)\. Each", opening)
    found = announced[1].split(" · ") if announced else []
    bold = {_stem(term) for text in prose for term in re.findall(r"\*\*([^*]+)\*\*", text)}
    known = [_stem(word) for word in found]
    for term, lesson in TERM.findall(glossary):
        for one in re.sub(r"\(.*?\)", "", term).split(","):
            stem = _stem(one)
            if lesson == number and stem in bold and not any(stem in said for said in known):
                found.append(one.strip())
                known.append(stem)
    return found


def _stem(term: str) -> str:
    return re.sub(r"[^\w ]", "", " ".join(term.lower().split())).removesuffix("s")


def measured(script: Path) -> MainPath:
    """The main path of a lesson as it is committed."""
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    return main_path(notebook, (LESSONS / "glossary.md").read_text("utf-8"))


def main(numbers: list[str]) -> int:
    print("lesson  words  code  output  predictions  exercises  minutes  concepts")
    for script in lesson_scripts(numbers):
        path = measured(script)
        print(
            f"{script.stem[:2]:6}{path.words:7}{path.code_lines:6}{path.output_lines:8}"
            f"{path.predictions:13}{path.exercise_minutes:11}{path.minutes:9.1f}"
            f"{len(path.concepts):10}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
