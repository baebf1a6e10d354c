"""Numbers in prose, of lessons and pages: each is generated, set by a cell, cited, or has a reason.

A figure is a number with a unit of memory, speed or time, a percentage, a "times" or a "2.4x".
Claims that a lesson quotes to test them stand in quotation marks, and are left alone, as are code
and formulas.
"""

import json
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course_utils.exercises import lesson_03, lesson_06
from course_utils.topics import bus, recorded
from fitcast import gpus
from fitcast.units import GIB, KIB, MIB
from tools import compare, stamp
from tools.notebooks import LESSONS, ROOT

NOTEBOOKS = sorted(LESSONS.glob("*.ipynb"))
PAGES = ("README.md", "CONTRIBUTING.md", "lessons/glossary.md")
GENERATED = (stamp.TABLE, stamp.CONSOLE, stamp.PICTURE, stamp.RACE, compare.TABLE)
UNITS = r"GiB|MiB|KiB|TB|GB|MB|kB|%|percent|TFLOP/s|GB/s|tokens/s|seconds?|ms|s|times"
NUMBER = r"(?:\d{1,3}(?:[ ,\u202f]\d{3})+|\d+)(?:\.\d+)?"
FIGURE = re.compile(rf"(?<![\w.,^])({NUMBER})(?: ?({UNITS})(?![\w/])|(x)(?!\w))")
QUIET = [  # what is not this lesson's own statement, in the order in which it is taken out
    r"```.*?```", r"`[^`]*`", r"\$\$.*?\$\$", r"\$[^$\n]*\$",
    r"^>.*$",  # a text that a reader gives to an assistant
    r'"[^"]*"', r"“[^”]*”",
    r"\]\([^)]*\)",  # an address
]  # fmt: skip
SOURCE = r"\[[^\]]*[A-Za-z]{2}[^\]]*\]"  # a source in brackets, or a link to one
# Figures that no cell shows: an expression that gives them, checked to the digits that are shown...
CALCULATED = {
    "01_where_does_the_memory_go": {
        "512 MiB": "32 * 1 * 2048 * 4096 * 2 / MIB",  # the formula of the sentence
        "4 KiB": "4 * 128 * 8 / KIB",  # token ids, 8 bytes each
        "7.36 GiB": "16 * 494_032_768 / GIB",  # counted in test_lesson_01.py
    },
    "03_how_big_is_my_batch": {
        "125 TFLOP/s": "A10.matmul_flops / 1e12",
        "600 GB/s": "A10.bandwidth / 1e9",
        "10 %": "100 * (lesson_03.SLOWER_AT_MOST - 1)",
    },
    "04_half_the_bits": {
        "0.4 %": "100 * 2**-8",  # half a step of bfloat16's seven fraction bits
        "0.05 %": "100 * 2**-11",
    },
    "05_where_did_my_gradient_go": {"10 %": "100 * 0.1"},
    "06_what_does_the_usual_recipe_waste": {
        "6 GiB": "lesson_06.PHI_BYTES / GIB",
        "6 MiB": "lesson_06.LOSS_BYTES / MIB",
        "8 MiB": "2 * 256 * lesson_06.VOCABULARY * 4 / MIB",  # float32
    },
    "08_beyond_one_gpu": {"256 KiB": "bus.FROZEN_BYTES / bus.LAYERS / KIB"},
}
# ... or the reason why nobody need: they state nothing that could be measured.
GIVEN = {
    "01_where_does_the_memory_go": {
        "2 GiB": "an example of how to type an answer",
        "9 GiB": "the script's own steps are forecast in test_lesson_01.py",
    },
    "03_how_big_is_my_batch": {"24 GB": "the vendor's name for the card"},
    "README.md": {
        "1 GB": "what set-up downloads, about, as the Makefile says while it does",
        "1.4 %": "fitcheck-llm's author says so, on the page that is linked",
    },
}
KNOWN = {
    "lesson_03": lesson_03, "lesson_06": lesson_06, "bus": bus,
    "GIB": GIB, "KIB": KIB, "MIB": MIB, "A10": gpus.A10,
}  # fmt: skip


def digits(number: str) -> str:
    """A number without separators of thousands."""
    return re.sub(r"[ ,\u202f]", "", number)


def prose(cell) -> str:
    text = cell.source
    for pattern in QUIET:
        text = re.sub(pattern, " ", text, flags=re.DOTALL | re.MULTILINE)
    return text


def figures(cell) -> list[tuple[str, str, str]]:
    """Each figure of a Markdown cell: its number, its unit, the paragraph around it."""
    found = []
    for paragraph in re.split(r"\n\s*\n", prose(cell)):
        flat = " ".join(paragraph.split())
        for number, unit, short in FIGURE.findall(flat):
            found.append((digits(number), unit or short, flat))
    return found


def shown(notebook) -> str:
    """All that the lesson's cells print and draw, in words, and what is recorded for it."""
    parts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            parts += [output.get("text", ""), output.get("evalue", "")]
            parts += [value for kind, value in data.items() if kind.startswith("text/")]
    return re.sub(r"<img[^>]*alt='([^']*)'[^>]*>", r"\1", "\n".join(parts))  # its words


def numbers(text: str) -> set[str]:
    """The numbers of a text, as digits without separators."""
    return {digits(number) for number in re.findall(rf"(?<![\w.]){NUMBER}", text)}


def is_generated(number: str, unit: str, outputs: str) -> bool:
    """Whether an output shows the figure: with its unit, or as a number that is no accident."""
    if re.search(rf"(?<![\d.]){re.escape(number)} ?{re.escape(unit)}", outputs.replace(",", "")):
        return True
    significant = len(number.replace(".", "").strip("0"))
    if unit in ("%", "percent"):  # shown as a share
        share = f"{float(number) / 100:.10f}".rstrip("0")
        return significant > 1 and share in numbers(outputs)
    bare = re.sub(rf"{NUMBER} ?(?:{UNITS})(?!\w)", "", outputs)
    return significant > 1 and number in numbers(bare)


def is_set(number: str, unit: str, code: str) -> bool:
    """Whether a cell sets the figure: `budget_bytes=120 * MIB`."""
    return bool(re.search(rf"(?<![\w.]){re.escape(number)} \* {unit.upper()}\b", code))


def is_recorded(number: str, unit: str) -> bool:
    """Whether the recorded runs have it, as rounded as it is given."""
    scale = {"GiB": GIB, "MiB": MIB, "tokens/s": 1, "TFLOP/s": 1e12}.get(unit)
    if scale is None or len(number.replace(".", "")) < 2:
        return False
    places = len(number.partition(".")[2])
    found = re.findall(r": (\d+(?:\.\d+)?)", json.dumps(recorded.recording()["rows"]))
    return any(f"{float(value) / scale:.{places}f}" == number for value in found)


def is_calculated(number: str, unit: str, expressions: dict[str, str]) -> bool:
    """Whether an expression gives the figure, to as many places as it has."""
    expression = expressions.get(f"{number} {unit}")
    if expression is None:
        return False
    places = len(number.partition(".")[2])
    return f"{eval(expression, dict(KNOWN)):.{places}f}" == number


def untraced(notebook, lesson="") -> list[str]:
    """Figures of the prose that nothing stands behind."""
    outputs = shown(notebook)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    found = []
    for cell in notebook.cells:
        for number, unit, paragraph in figures(cell) if cell.cell_type == "markdown" else ():
            if not (
                re.search(SOURCE, paragraph)
                or is_generated(number, unit, outputs)
                or is_set(number, unit, code)
                or is_recorded(number, unit)
                or is_calculated(number, unit, CALCULATED.get(lesson, {}))
                or f"{number} {unit}" in GIVEN.get(lesson, {})
            ):
                found.append(f"{number} {unit} has no cell and no source: {paragraph[:160]}")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_figure_is_traced(path):
    assert untraced(nbformat.read(path, as_version=4), path.stem) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_exception_is_left_over(path):
    notebook = nbformat.read(path, as_version=4)
    said = {f"{number} {unit}" for cell in notebook.cells if cell.cell_type == "markdown"
            for number, unit, _ in figures(cell)}  # fmt: skip
    listed = {*CALCULATED.get(path.stem, {}), *GIVEN.get(path.stem, {})}
    assert listed - said == set()


def page(text: str):
    """Markdown as a lesson: what tools write into it is its output, the rest its prose."""
    written = []
    for pattern in GENERATED:
        text = pattern.sub(lambda found: written.append(found[0]) or "", text)
    outputs = [new_output("stream", name="stdout", text="\n".join(written))]
    return new_notebook(cells=[new_markdown_cell(text), new_code_cell("", outputs=outputs)])


@pytest.mark.parametrize("name", PAGES)
def test_every_figure_of_a_page_is_traced(name):
    text = (ROOT / name).read_text("utf-8")
    assert untraced(page(text), name) == []
    assert len(untraced(page(f"{text}\n\nIt needs 3.21 GiB.\n"), name)) == 1
    said = {f"{number} {unit}" for number, unit, _ in figures(page(text).cells[0])}
    assert GIVEN.get(name, {}).keys() - said == set()


def lesson(text, printed="peak 9.16 GiB, 8,218 tokens/s, share 0.275", code="x = 120 * MIB"):
    cell = new_code_cell(code, outputs=[new_output("stream", name="stdout", text=printed)])
    return new_notebook(cells=[new_markdown_cell(text), cell])


@pytest.mark.parametrize(
    "text",
    [
        "It needs 9.16 GiB.", "It runs at 8 218 tokens/s.", "A card of 120 MiB.",
        "That is 27.5 % of them.", 'They say "30-40 %, 2.4x".', "`--budget 7 GiB` and $7\\%$ x",
        "It took 19.4 GiB [ZeRO, section 3.1].", "The usual recipe took 19.28 GiB on the card.",
        "A batch of 2 x 16, 45 min, 16 layers.", "> at 37 % of memory",
    ],
)  # fmt: skip
def test_traced_figures_pass(text):
    assert untraced(lesson(text)) == []


@pytest.mark.parametrize(
    "text",
    [
        "It needs 9.17 GiB.", "It needs 9.16 MiB.", "That is 2.4x as fast.", "It is 37 % smaller.",
        "It runs 3 times as fast.", "It takes 1.5 s.", "At 8,219 tokens/s.", "A card of 121 MiB.",
        "It needs 9.17 GiB ([glossary](glossary.md)).", "First 1 GiB.\n\nThen more [ZeRO].",
    ],
)  # fmt: skip
def test_planted_figure_is_caught(text):
    assert len(untraced(lesson(text))) == 1


def test_wrong_calculation_is_caught():
    wrong = {"5 GiB": "32 * 8 * 2048 * 4096 * 2 / GIB"}
    assert not is_calculated("5", "GiB", wrong)
    assert is_calculated("4", "GiB", {"4 GiB": wrong["5 GiB"]})
