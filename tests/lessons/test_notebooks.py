"""The committed notebooks: each reproduces, each is whole, each leaves a learner's work open.

Each lesson is executed once (tools/reproduce.py) and every output compared. What a comparison
cannot see is a check here: a function from a notebook to complaints, held against every lesson and
against a planted fault.
"""

import copy
import re
import subprocess
import sys

import jupytext
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools import notebooks, reproduce
from tools.notebooks import LESSONS, METADATA, clean, lesson_scripts
from tools.reproduce import LOOSE, differences
from tools.surroundings import ROOT

NOTEBOOKS = sorted(LESSONS.glob("[0-9]*.ipynb"))  # the T4 reading runs on a T4 only
MAX_CELL_LINES = 15
MAX_LOOSE_CELLS = 4
TAGS = LOOSE | {
    "setup", "predict", "run", "exercise", "check", "recorded", "raises-exception", "self-check",
}  # fmt: skip
KINDS = r"(\d\d_\w+|add_a_t4_reading)\.(py|ipynb)|\w+\.md|__pycache__|\.ipynb_checkpoints"


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


def magics(notebook) -> list[str]:
    """A shell or magic line: the `.py` has it as a comment, where no linter sees it."""
    return [
        f"{where(cell)} has a line that is not Python: {found[0]}"
        for cell in code_cells(notebook)
        if (found := re.search(r"^\s*[%!].*", cell.source, re.MULTILINE))
    ]


def alt_text(notebook) -> list[str]:
    return [
        f"{where(cell)} shows an image without words: text/plain must start with 'Figure: '"
        for cell, output in outputs(notebook)
        if {"image/png", "image/svg+xml", "image/jpeg"} & set(output.get("data", {}))
        and not re.match(r"Figure: \w", output.data.get("text/plain", ""))
    ] + [
        f"{where(cell)} folds an image without words: {picture[:40]}"
        for cell, output in outputs(notebook)
        for picture in re.findall(r"<img[^>]*>", output.get("data", {}).get("text/html", ""))
        if not re.search(r"alt='\w", picture)
    ]


def known_tags(notebook) -> list[str]:
    present = set().union(*(tags(cell) for cell in notebook.cells))
    return [f"the tag {tag} is unknown" for tag in sorted(present - TAGS)]


def untouched(notebook) -> list[str]:
    """Predictions and exercises are committed open, as a learner must find them."""
    return [
        f"{where(cell)} is committed with an answer: leave ..."
        for cell in code_cells(notebook)
        if (tags(cell) & {"predict", "exercise"} or is_self_check(cell))
        and "..." not in cell.source
    ]


def is_self_check(cell) -> bool:
    """Whether a learner writes five letters into this cell."""
    return "self-check" in tags(cell) and bool(re.match(r"(before|after) =", cell.source))


def spoiled(notebook) -> list[str]:
    """Answers that stand open between a prediction and the words that explain it."""
    complaints, folded, shown = [], set(), []
    for cell in notebook.cells:
        if "predict" in tags(cell):
            folded, shown = set(), []
        elif cell.cell_type == "markdown":
            complaints += [
                f"{where(one)} shows {number}, which a prediction folds"
                for one, text in shown
                for number in sorted(folded & telling(text))
            ]
            folded, shown = set(), []
        for output in cell.get("outputs", []):
            page = output.get("data", {}).get("text/html", "")
            inside = re.findall(r"<details>.*?</details>", page, re.DOTALL)
            folded |= telling(" ".join(re.sub(r"<[^>]*>", " ", part) for part in inside))
            shown.append((cell, shown_text_unfolded(output)))
    return complaints


def telling(text: str) -> set[str]:
    """Numbers of a text that are no accident: three digits or more."""
    return {number for number in re.findall(r"\d+\.?\d*", text) if len(number) > 3}


def shown_text_unfolded(output) -> str:
    """What a reader sees of an output without unfolding anything."""
    text = re.sub(r"<details>.*?</details>", "", shown_text(output), flags=re.DOTALL)
    return re.sub(r"<[^>]*>", " ", text)


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
    executed, loose_cells, errors, metadata, cell_length, magics, alt_text, known_tags, untouched,
    spoiled, machine_traces, silent_stderr,
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


def read(path):
    return nbformat.read(path, as_version=4)


def by_name(path) -> str:
    return path.stem


def test_lessons_are_there():
    assert {"01", "07"} <= {path.name[:2] for path in lesson_scripts()}
    assert [path.stem for path in lesson_scripts()] == [path.stem for path in NOTEBOOKS]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("script", lesson_scripts(), ids=by_name)
def test_lesson_reproduces(script):
    found = reproduce.complaints(script, reproduce.executed(script))
    assert not found, "\n\n".join(found)
    left = [path.name for path in LESSONS.iterdir() if not re.fullmatch(KINDS, path.name)]
    assert left == [], "a lesson writes only to temporary folders"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_lesson_is_whole(check, path):
    assert check(read(path)) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_pair_is_equal(path):
    assert pair_differs(jupytext.read(path.with_suffix(".py")), read(path)) == []


def good_lesson():
    """A lesson that no check complains about; planted faults change one thing in it."""
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
    notebook = new_notebook(cells=[new_markdown_cell("# 00 · Does it run?")])
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


def folds(answer: str, also: str = "nothing", behind=None):
    """A fault: a prediction's answer is folded, and the next cell prints something."""

    def plant(notebook):
        page = f"<details><summary>The answer</summary>{answer}</details>"
        shown = new_output("display_data", {"text/html": page, "text/plain": "Write your guess."})
        notebook.cells[RUN].outputs = [shown]
        told = new_output("stream", name="stdout", text=also)
        notebook.cells[FIGURE].outputs = [told]
        notebook.cells.append(behind or new_markdown_cell("Because."))

    return plant


def answered(notebook):
    notebook.cells[RUN].update(source='before = "abcda"')
    notebook.cells[RUN].metadata["tags"] = ["self-check"]


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
    (magics, source(RUN, "%pip install x"), "not Python: %pip"),
    (magics, source(RUN, "if True:\n    !ls"), "not Python:     !ls"),
    (alt_text, lambda nb: nb.cells[FIGURE].outputs[0].data.pop("text/plain"), "without words"),
    (
        alt_text,
        lambda nb: nb.cells[FIGURE].outputs[0].data.update({"text/plain": "<Figure size 6x4>"}),
        "without words",
    ),
    (known_tags, tagged(CHECK, "check", "chek"), "the tag chek is unknown"),
    (untouched, source(PREDICT, "predicted = 3"), "with an answer"),
    (untouched, source(EXERCISE, "def answer():\n    return 3"), "with an answer"),
    (untouched, answered, "with an answer"),
    (alt_text, folds("<img src='x'>"), "folds an image without words"),
    (spoiled, folds("<pre>26.50 MiB</pre>", "peak 26.50 MiB"), "shows 26.50"),
    (spoiled, folds("<pre>26.50</pre>", "26.50", new_markdown_cell("### Explain")), "shows 26.50"),
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


def shows(cell: int, *shown):
    """A fault: this cell's outputs are these."""
    return lambda notebook: notebook.cells[cell].update(outputs=list(shown))


def text(name: str, shown: str):
    return new_output("stream", name=name, text=shown)


# What an execution may show otherwise than the committed notebook; the cell's number is the code
# cell's.
OTHERWISE = {
    "another number": (shows(RUN, text("stdout", "4\n")), RUN),
    "nothing": (shows(RUN), RUN),
    "more": (shows(RUN, text("stdout", "3\n"), text("stderr", "careful\n")), RUN),
    "to another stream": (shows(RUN, text("stderr", "3\n")), RUN),
    "white space": (shows(RUN, text("stdout", "3 \n")), RUN),
    "a value instead of print": (
        shows(RUN, new_output("execute_result", {"text/plain": "3\n"})), RUN),
    "a value where none was": (
        shows(SETUP, new_output("execute_result", {"text/plain": "3"})), SETUP),
    "other words of a picture": (
        lambda nb: nb.cells[FIGURE].outputs[0].data.update({"text/plain": "Figure: 4 GiB."}),
        FIGURE),
    "no picture": (lambda nb: nb.cells[FIGURE].outputs[0].data.pop("image/png"), FIGURE),
    "another error": (shows(RAISES, new_output("error", ename="F", evalue="by zero")), RAISES),
    "another message": (shows(RAISES, new_output("error", ename="E", evalue="by 1")), RAISES),
    "no error": (shows(RAISES), RAISES),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_shows_otherwise_is_found_in_its_cell(name):
    plant, cell = OTHERWISE[name]
    for pair in ((good_lesson(), with_fault(plant)), (with_fault(plant), good_lesson())):
        (found,) = differences(*pair)
        assert found.startswith(f"code cell {cell}, "), found


def test_what_differs_from_machine_to_machine_is_not_compared():
    for plant in (
        lambda nb: nb.cells[FIGURE].outputs[0].data.update({"image/png": "iVBORw1="}),
        traceback,
        lambda nb: nb.cells[RUN].update(execution_count=9),
    ):
        assert differences(good_lesson(), with_fault(plant)) == []
    both = [with_fault(tagged(RUN, "run", "nbval-ignore-output")) for _ in range(2)]
    both[1].cells[RUN].outputs = []
    assert differences(*both) == []


def test_a_difference_is_told_as_a_diff():
    (found,) = differences(good_lesson(), with_fault(shows(RUN, text("stdout", "4\n"))))
    assert "print(3)" in found and re.search(r'^-.*"3$', found, re.M), found
    assert re.search(r'^\+.*"4$', found, re.M), found


def test_a_missing_cell_is_found():
    assert "make execute" in differences(good_lesson(), with_fault(lambda nb: nb.cells.pop()))[0]


@pytest.fixture
def lesson(tmp_path, monkeypatch):
    """A lesson that counts its own runs, its packages, and the executions that are kept of it."""
    for folder in ("lessons", "fitcast", "course_utils", "tools"):
        (tmp_path / folder).mkdir()
    for kept in ("fitcast/units.py", "course_utils/data.json", "tools/notebooks.py"):
        (tmp_path / kept).write_text("")
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(notebooks, "LESSONS", tmp_path / "lessons")
    script = tmp_path / "lessons" / "01_try.py"
    script.write_text(
        "# %%\nfrom pathlib import Path\nruns = Path('../runs')\n"
        "runs.open('a').write('x')\nprint(3)\n"
    )
    return script


def runs(lesson) -> int:
    return len((lesson.parent.parent / "runs").read_text())


def test_a_lesson_is_executed_once_until_something_changes(lesson, tmp_path):
    first, again = reproduce.executed(lesson), reproduce.executed(lesson)
    assert runs(lesson) == 1 and again == first
    assert again.notebook.cells[0].outputs[-1].text == "3\n"
    (tmp_path / "fitcast" / "units.py").write_text("GIB = 2**30")
    reproduce.executed(lesson)
    assert runs(lesson) == 2


def test_any_change_of_a_source_is_another_execution(lesson, tmp_path):
    keys = [reproduce.fingerprint(lesson)]
    assert reproduce.fingerprint(lesson) == keys[0]
    for touched in ("lessons/01_try.py", "fitcast/units.py", "fitcast/new.py",
                    "course_utils/data.json", "tools/notebooks.py"):  # fmt: skip
        with (tmp_path / touched).open("a") as file:
            file.write("\n# changed\n")
        keys.append(reproduce.fingerprint(lesson))
    assert len(set(keys)) == 6


def test_another_gpu_or_another_version_is_another_execution(lesson, monkeypatch, tmp_path):
    keys = {reproduce.fingerprint(lesson)}
    monkeypatch.setenv("COURSE_EMULATE_GPU", "T4")
    keys.add(reproduce.fingerprint(lesson))
    (tmp_path / "torch-99.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    keys.add(reproduce.fingerprint(lesson))
    assert len(keys) == 3


def test_make_lessons_and_make_test_ask_for_the_same_execution():
    """The one asks from a process of its own, the other from pytest's."""
    code = (
        "from tools import reproduce\nfrom tools.notebooks import lesson_scripts\n"
        "print(reproduce.fingerprint(lesson_scripts(['01'])[0]))"
    )
    asked = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert asked.strip() == reproduce.fingerprint(lesson_scripts(["01"])[0])


def test_a_failure_is_told_and_not_kept(lesson):
    lesson.write_text(lesson.read_text() + "\n# %%\n1 / 0\n")
    for expected in (1, 2):
        (found,) = reproduce.complaints(lesson, reproduce.executed(lesson))
        assert "cell 2 failed" in found and "ZeroDivisionError" in found
        assert runs(lesson) == expected
