"""The committed notebooks: each reproduces, each is whole, each keeps the course's form.

`nbval` runs every notebook again and compares every output. What it cannot see (a notebook without
outputs passes it) is a check here: a function from a notebook to complaints, held against every
lesson and against a planted fault.
"""

import ast
import copy
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools.notebooks import CELL_TIMEOUT_SECONDS, LESSONS, METADATA, ROOT, clean, lesson_scripts

NOTEBOOKS = sorted(LESSONS.glob("*.ipynb"))
MAX_CELL_LINES = 15
MAX_LOOSE_CELLS = 4
LOOSE = {"nbval-ignore-output", "nbval-skip"}
REQUIRED_TAGS = {"setup", "predict", "run", "exercise", "check"}
TAGS = REQUIRED_TAGS | LOOSE | {"recorded", "raises-exception"}
SKELETON = {  # what each lesson has, by a word of its heading or of its opening table
    "a numbered title": r"^# \d\d · \S",
    "a Colab badge": r"colab\.research\.google\.com",
    "its duration": r"\d+ min",
    "objectives": r"objectives|be able to",
    "what it needs": r"\bneeds?\b",
    "its new concepts": r"concepts",
    "an exercise": r"^#+ .*exercise",
    "For those who struggle": r"^#+ .*for those who struggle",
    "Go further": r"^#+ .*go further",
    "Try with AI": r"^#+ .*try with ai",
    "what it left out": r"^#+ .*left out",
    "sources": r"^#+ .*sources",
    "glossary terms": r"glossary",
}


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


def outputs(notebook):
    return [(cell, output) for cell in code_cells(notebook) for output in cell.outputs]


def where(cell) -> str:
    return f"cell {cell.source.splitlines()[0]!r}" if cell.source.strip() else "an empty cell"


def shown_text(output) -> str:
    """All text of an output that a reader sees, an error's traceback aside."""
    data = output.get("data", {})
    text = [value for kind, value in data.items() if kind.startswith("text/")]
    return "\n".join([output.get("text", ""), output.get("evalue", ""), *text])


def executed(notebook) -> list[str]:
    counts = [cell.execution_count for cell in code_cells(notebook)]
    complete = counts == list(range(1, len(counts) + 1)) and counts
    return [] if complete else [f"code cells ran as {counts}, not 1..N in order: make execute"]


def loose_cells(notebook) -> list[str]:
    loose = [cell for cell in code_cells(notebook) if tags(cell) & LOOSE]
    complaints = [
        f"{where(cell)} is not compared: its first line must say why, as '# loose: <reason>'"
        for cell in loose
        if not re.match(r"# loose: \w", cell.source)
    ]
    if len(loose) > MAX_LOOSE_CELLS:
        complaints.append(f"{len(loose)} cells are not compared: at most {MAX_LOOSE_CELLS}")
    return complaints + [
        f"{where(cell)} switches nbval by comment: use a tag, which is counted"
        for cell in code_cells(notebook)
        if re.search(r"^\s*#\s*(NBVAL|PYTEST_VALIDATE)_", cell.source, re.MULTILINE)
    ]


def errors(notebook) -> list[str]:
    complaints = []
    for cell in code_cells(notebook):
        raised = any(output.output_type == "error" for output in cell.outputs)
        if raised != ("raises-exception" in tags(cell)):
            complaints.append(
                f"{where(cell)} raised, without the tag raises-exception"
                if raised
                else f"{where(cell)} has the tag raises-exception, and raised nothing"
            )
    return complaints


def metadata(notebook) -> list[str]:
    """Nothing that a machine or a widget left behind; opens on a T4."""
    complaints = [] if notebook.metadata == METADATA else ["metadata differ from tools.notebooks"]
    if "widgets" in notebook.metadata:
        complaints.append("widget state is stored: it breaks GitHub's preview")
    return complaints + [
        f"{where(cell)} has metadata besides tags: {sorted(set(cell.metadata) - {'tags'})}"
        for cell in notebook.cells
        if set(cell.metadata) - {"tags"}
    ]


def cell_length(notebook) -> list[str]:
    return [
        f"{where(cell)} has {len(cell.source.splitlines())} lines: at most {MAX_CELL_LINES}"
        for cell in code_cells(notebook)
        if len(cell.source.splitlines()) > MAX_CELL_LINES
    ]


def plain_python(notebook) -> list[str]:
    """No magics, no `torch.cuda`, no drawing library, no branch on the device."""
    complaints = []
    for cell in code_cells(notebook):
        try:
            nodes = list(ast.walk(ast.parse(cell.source)))
        except SyntaxError:
            complaints.append(f"{where(cell)} is not plain Python: no % and ! lines")
            continue
        for node in nodes:
            text = ast.unparse(node) if isinstance(node, ast.stmt | ast.expr) else ""
            if isinstance(node, ast.Import | ast.ImportFrom) and "matplotlib" in text:
                complaints.append(f"{where(cell)} imports matplotlib: call course_utils.figures")
            if isinstance(node, ast.Attribute) and text == "torch.cuda":
                complaints.append(f"{where(cell)} asks torch.cuda: call fitcast.gpus")
            if isinstance(node, ast.If | ast.IfExp) and "cuda" in ast.unparse(node.test):
                complaints.append(f"{where(cell)} branches on the device: one path for all")
    return complaints


def alt_text(notebook) -> list[str]:
    return [
        f"{where(cell)} shows an image without words: text/plain must start with 'Figure: '"
        for cell, output in outputs(notebook)
        if {"image/png", "image/svg+xml", "image/jpeg"} & set(output.get("data", {}))
        and not re.match(r"Figure: \w", output.data.get("text/plain", ""))
    ]


def known_tags(notebook) -> list[str]:
    present = set().union(*(tags(cell) for cell in notebook.cells))
    missing = [f"no cell has the tag {tag}" for tag in sorted(REQUIRED_TAGS - present)]
    return missing + [f"the tag {tag} is unknown" for tag in sorted(present - TAGS)]


def untouched(notebook) -> list[str]:
    """Predictions and exercises are committed open, as a learner must find them."""
    return [
        f"{where(cell)} is committed with an answer: leave ..."
        for cell in code_cells(notebook)
        if tags(cell) & {"predict", "exercise"} and "..." not in cell.source
    ]


def skeleton(notebook) -> list[str]:
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return [
        f"the lesson lacks {part}"
        for part, pattern in SKELETON.items()
        if not re.search(pattern, prose, re.IGNORECASE | re.MULTILINE)
    ]


def machine_traces(notebook) -> list[str]:
    """No path, escape code, address or stopwatch of the machine that made the outputs."""
    traces = {
        "a path of this machine": r"(?<![\w.:/])/(work|root|home|tmp|usr|opt|mnt)/\w|[A-Z]:\\",
        "a terminal escape code": r"\x1b\[",
        "a memory address": r"\bat 0x[0-9a-f]{6,}",
        "a progress bar": r"\bit/s\b|\bs/it\b|\d+%\|",
    }
    complaints = [
        f"{where(cell)} shows {what}"
        for cell, output in outputs(notebook)
        for what, pattern in traces.items()
        if re.search(pattern, shown_text(output))
    ]
    paths = traces["a path of this machine"]
    return complaints + [
        f"{where(cell)} shows a path of this machine in its traceback"
        for cell, output in outputs(notebook)
        if re.search(paths, re.sub(r"\x1b\[[\d;]*m", " ", "".join(output.get("traceback", []))))
    ]


def silent_stderr(notebook) -> list[str]:
    return [
        f"{where(cell)} writes to stderr: {output.text.strip()[:60]}"
        for cell, output in outputs(notebook)
        if output.output_type == "stream" and output.name == "stderr"
    ]


CHECKS = [
    executed, loose_cells, errors, metadata, cell_length, plain_python, alt_text, known_tags,
    untouched, skeleton, machine_traces, silent_stderr,
]  # fmt: skip


def pair_differs(source, notebook) -> list[str]:
    """Where the `.py` and the `.ipynb` of a lesson are not the same cells."""
    left, right = (
        [(cell.cell_type, cell.source.strip(), sorted(tags(cell))) for cell in side.cells]
        for side in (source, notebook)
    )
    if len(left) != len(right):
        return [f"the .py has {len(left)} cells, the .ipynb {len(right)}: make execute"]
    return [
        f"cell {number} differs between .py and .ipynb ({theirs[1][:60]!r}): make execute"
        for number, (ours, theirs) in enumerate(zip(left, right, strict=True), start=1)
        if ours != theirs
    ]


def run_strictly(path: Path) -> tuple[int, int, str]:
    """nbval's exit code, the number of cells that reproduced, and what it printed."""
    command = [sys.executable, "-m", "pytest", "--quiet", "--nbval", "--nbval-current-env"]
    command += [f"--nbval-cell-timeout={CELL_TIMEOUT_SECONDS}", "-p", "no:cacheprovider"]
    # Not our test run: notebooks are held to their outputs, not to our warning filters.
    command += ["-o", "addopts=", "-o", "filterwarnings=", "--color=no", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    passed = re.search(r"(\d+) passed", done.stdout)
    return done.returncode, int(passed[1]) if passed else 0, done.stdout + done.stderr


def read(path: Path):
    return nbformat.read(path, as_version=4)


def by_name(path: Path) -> str:
    return path.stem


def test_lessons_are_there():
    assert {"01", "06"} <= {path.name[:2] for path in lesson_scripts()}
    assert [path.stem for path in lesson_scripts()] == [path.stem for path in NOTEBOOKS]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_lesson_reproduces(path):
    before = set(LESSONS.iterdir())
    code, passed, shown = run_strictly(path)
    assert code == 0, shown
    assert passed == len(code_cells(read(path))) > 0
    left = {path.name for path in set(LESSONS.iterdir()) - before} - {"__pycache__"}
    assert left == set(), "a lesson writes only to temporary folders"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_lesson_is_whole(check, path):
    assert check(read(path)) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_pair_is_equal(path):
    assert pair_differs(jupytext.read(path.with_suffix(".py")), read(path)) == []


def good_lesson():
    """A lesson that no check complains about; planted faults change one thing in it."""
    prose = """# 00 · Does it run?
[![Open in Colab](badge.svg)](https://colab.research.google.com/github/x)
**40 minutes.** You will be able to count. It needs nothing. New concepts: bytes.
## Exercise 00.1
## For those who struggle
## Go further
## Try with AI
## Left out
## Sources
[Glossary](glossary.md)"""
    image = {"image/png": "iVBORw0KGgo=", "text/plain": "Figure: one bar, at 3 GiB."}
    printed = new_output("stream", name="stdout", text="3\n")
    cells = [
        ("setup", "import sys", []),
        ("predict", "predicted = ...", []),
        ("run", "print(3)", [printed]),
        ("run", "figure", [new_output("display_data", image)]),
        ("raises-exception", "1 / 0", [new_output("error", ename="E", evalue="by zero")]),
        ("exercise", "def answer():\n    ...", []),
        ("check", "print(3)", [printed]),
    ]
    notebook = new_notebook(cells=[new_markdown_cell(prose)])
    for number, (tag, source, shown) in enumerate(cells, start=1):
        cell = new_code_cell(source, execution_count=number, outputs=copy.deepcopy(shown))
        cell.metadata["tags"] = [tag]
        notebook.cells.append(cell)
    clean(notebook)
    return notebook


SETUP, PREDICT, RUN, FIGURE, RAISES, EXERCISE, CHECK = range(1, 8)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_good_lesson_passes(check):
    assert check(good_lesson()) == []


def with_fault(plant):
    notebook = good_lesson()
    plant(notebook)
    return notebook


def source(cell: int, text: str):
    """A fault: this text in that cell."""
    return lambda notebook: notebook.cells[cell].update(source=text)


def tagged(cell: int, *names: str):
    return lambda notebook: notebook.cells[cell].metadata.update(tags=list(names))


def prints(text: str, name: str = "stdout"):
    shown = new_output("stream", name=name, text=text)
    return lambda notebook: notebook.cells[RUN].outputs.append(shown)


def prose(old: str, new: str = ""):
    def plant(notebook):
        notebook.cells[0].source = notebook.cells[0].source.replace(old, new)

    return plant


def many_loose(notebook):
    cell = notebook.cells[RUN]
    cell.update(source="# loose: times differ")
    cell.metadata["tags"] = ["run", "nbval-ignore-output"]
    notebook.cells += [copy.deepcopy(cell) for _ in range(MAX_LOOSE_CELLS)]


def traceback(notebook):
    notebook.cells[RAISES].outputs[0].traceback = ["\x1b[32m/home/me/lib/x.py\x1b[39m:3"]


FAULTS = [
    (executed, lambda nb: nb.cells[RUN].update(execution_count=None), "not 1..N"),
    (executed, lambda nb: nb.cells[RUN].update(execution_count=9), "not 1..N"),
    (executed, lambda nb: nb.cells.__delitem__(slice(1, None)), "not 1..N"),
    (loose_cells, tagged(RUN, "run", "nbval-ignore-output"), "must say why"),
    (loose_cells, tagged(RUN, "run", "nbval-skip"), "must say why"),
    (loose_cells, many_loose, "5 cells are not compared"),
    (loose_cells, source(RUN, "# NBVAL_IGNORE_OUTPUT\nx"), "by comment"),
    (errors, tagged(RAISES), "raised, without the tag"),
    (errors, tagged(RUN, "raises-exception"), "raised nothing"),
    (metadata, lambda nb: nb.metadata.update(widgets={}), "widget state"),
    (metadata, lambda nb: nb.metadata.update(colab={"gpuType": "A100"}), "metadata differ"),
    (metadata, lambda nb: nb.cells[RUN].metadata.update(execution={}), "['execution']"),
    (cell_length, source(RUN, "x = 1\n" * 16), "has 16 lines"),
    (plain_python, source(RUN, "%pip install x"), "not plain Python"),
    (plain_python, source(RUN, "!ls"), "not plain Python"),
    (plain_python, source(RUN, "import torch\ntorch.cuda.synchronize()"), "asks torch.cuda"),
    (plain_python, source(RUN, "from matplotlib import pyplot"), "imports matplotlib"),
    (plain_python, source(RUN, "if device == 'cuda':\n    x = 1"), "branches on the device"),
    (plain_python, source(RUN, "x = 1 if has_cuda else 2"), "branches on the device"),
    (alt_text, lambda nb: nb.cells[FIGURE].outputs[0].data.pop("text/plain"), "without words"),
    (
        alt_text,
        lambda nb: nb.cells[FIGURE].outputs[0].data.update({"text/plain": "<Figure size 6x4>"}),
        "without words",
    ),
    (known_tags, tagged(CHECK), "no cell has the tag check"),
    (known_tags, tagged(CHECK, "check", "chek"), "the tag chek is unknown"),
    (untouched, source(PREDICT, "predicted = 3"), "with an answer"),
    (untouched, source(EXERCISE, "def answer():\n    return 3"), "with an answer"),
    *[(skeleton, prose(text), part) for text, part in {
        "# 00 · Does it run?": "a numbered title", "colab.research": "a Colab badge",
        "40 minutes": "its duration", "be able to": "objectives", "needs": "what it needs",
        "concepts": "concepts", "## Exercise": "an exercise", "## Go further": "Go further",
        "## For those who struggle": "For those who struggle", "## Try with AI": "Try with AI",
        "## Left out": "left out", "## Sources": "sources",
        "[Glossary](glossary.md)": "glossary terms",
    }.items()],
    (machine_traces, prints("saved to /work/out"), "a path of this machine"),
    (machine_traces, prints("saved to C:\\out"), "a path of this machine"),
    (machine_traces, prints("\x1b[31mred"), "a terminal escape code"),
    (machine_traces, prints("<object at 0x7f3a2b1c>"), "a memory address"),
    (machine_traces, prints("100%|####| 3/3 [00:01, 2.5it/s]"), "a progress bar"),
    (machine_traces, traceback, "in its traceback"),
    (silent_stderr, prints("UserWarning: old name", "stderr"), "writes to stderr"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "plant", "complaint"), FAULTS)
def test_planted_fault_is_caught(check, plant, complaint):
    complaints = check(with_fault(plant))
    assert any(complaint in text for text in complaints), complaints


def test_every_check_has_a_planted_fault():
    assert {check for check, _, _ in FAULTS} == set(CHECKS)
    missed = set(SKELETON) - {
        text.removeprefix("the lesson lacks ")
        for check, plant, _ in FAULTS
        if check is skeleton
        for text in skeleton(with_fault(plant))
    }
    assert missed == set()


@pytest.mark.parametrize(
    "plant",
    [
        source(RUN, "print(4)"),
        tagged(RUN, "run", "recorded"),
        lambda nb: nb.cells.pop(),
        lambda nb: nb.cells[RUN].update(cell_type="markdown"),
    ],
    ids=["source", "tags", "count", "type"],
)
def test_unequal_pair_is_caught(plant):
    text = jupytext.writes(good_lesson(), fmt="py:percent")
    script = jupytext.reads(text, fmt="py:percent")
    assert pair_differs(script, good_lesson()) == []
    assert "make execute" in pair_differs(script, with_fault(plant))[0]


def test_strict_run_compares_outputs(tmp_path):
    same, other, lost, raises = (
        new_code_cell(
            code, execution_count=1, outputs=[new_output("stream", text=text)] if text else []
        )
        for code, text in (
            ("print(3)", "3\n"),
            ("print(3)", "4\n"),
            ("print(3)", ""),
            ("1 / 0", ""),
        )
    )
    path = tmp_path / "planted.ipynb"
    nbformat.write(new_notebook(cells=[same, other, lost, raises]), path)
    code, passed, shown = run_strictly(path)
    failed = re.findall(r"FAILED .*planted.ipynb::Cell (\d)", shown)
    assert (code, passed, failed) == (1, 1, ["1", "2", "3"]), shown
