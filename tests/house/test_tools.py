"""The tools that execute the lessons and report on them, on a lesson of their own."""

import json
import os
import re
from collections import Counter

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course_utils.exercises import checks
from tools import execute, notebooks, report, reproduce, stamp
from tools.surroundings import ENVIRONMENT, ROOT

LESSON = """# %% [markdown]
# # 01 · Does it run?
#
# **40 minutes**, then [the next](02_next.ipynb).

# %% tags=["run"]
print("counted")

# %% tags=["check"]
print("Not attempted yet: replace the `...`")
"""


@pytest.fixture
def lessons(tmp_path, monkeypatch):
    folder = tmp_path / "lessons"
    folder.mkdir()
    (folder / "01_try.py").write_text(LESSON, "utf-8")
    monkeypatch.setattr(notebooks, "LESSONS", folder)
    monkeypatch.setattr(report, "BUILD", tmp_path / "build")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "KEPT", tmp_path / "build" / "executed")
    return folder


@pytest.mark.slow
def test_execute_is_repeatable_and_keeps_cell_ids(lessons):
    assert execute.main([]) == 0
    first = (lessons / "01_try.ipynb").read_text("utf-8")
    assert execute.main(["01"]) == 0
    assert (lessons / "01_try.ipynb").read_text("utf-8") == first
    (lessons / "01_try.py").write_text(LESSON + '\n# %% tags=["run"]\nprint("more")\n', "utf-8")
    assert execute.main(["01"]) == 0
    ids = [cell["id"] for cell in json.loads(first)["cells"]]
    after = nbformat.read(lessons / "01_try.ipynb", as_version=4)
    assert [cell.id for cell in after.cells[:3]] == ids
    assert after.cells[3].outputs[0].text == "more\n"
    assert after.metadata == notebooks.METADATA


def test_what_is_compared_or_committed_never_sees_a_gpu(lessons, monkeypatch):
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "", "tests/conftest.py hides it"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    shown = 'print(os.environ["CUDA_VISIBLE_DEVICES"], "is visible")'
    (lessons / "01_try.py").write_text(f"{LESSON}\n# %%\nimport os\n{shown}\n", "utf-8")
    assert execute.main([]) == 0
    made = nbformat.read(lessons / "01_try.ipynb", as_version=4)
    assert made.cells[-1].outputs[0].text == " is visible\n"


def test_execute_refuses_an_unknown_lesson(lessons, capsys):
    assert execute.main(["77"]) == 2
    assert "LESSON must be one of 01, got '77'" in capsys.readouterr().err


def test_failing_cell_is_shown_and_nothing_is_written(lessons, capfd):
    (lessons / "01_try.py").write_text(LESSON + "\n# %%\nmissing + 1\n", "utf-8")
    assert execute.main([]) == 1
    assert not (lessons / "01_try.ipynb").exists()
    shown = capfd.readouterr().out
    assert "cell 4 failed" in shown
    assert "    missing + 1" in shown
    assert "NameError: name 'missing' is not defined" in shown


def test_dead_kernel_and_endless_cell_are_named(lessons, capfd, monkeypatch):
    monkeypatch.setattr(notebooks, "CELL_TIMEOUT_SECONDS", 3)
    for cell, message in [
        ("import os\nos._exit(1)", "the kernel died in this cell"),
        ("import time\ntime.sleep(600)", "still running after 3 s"),
    ]:
        (lessons / "01_try.py").write_text(LESSON + f"\n# %%\n{cell}\n", "utf-8")
        assert execute.main([]) == 1
        assert message in capfd.readouterr().out


def test_a_preloaded_kernel_is_as_fresh_as_any_and_its_death_is_named(tmp_path):
    """It finds the libraries, nothing of this repository, and nothing that another one left."""
    seen = """
import os, sys
ours = {name.partition(".")[0] for name in sys.modules} & {"fitcast", "course_utils", "tools"}
print("torch" in sys.modules, ours, os.getcwd(), os.environ["SAID"], hasattr(sys, "left"))
sys.left = True
"""
    for kernel in ("first", "second"):
        surroundings = {**os.environ, **ENVIRONMENT, "SAID": kernel}
        notebook = new_notebook(cells=[new_code_cell(seen)])
        notebooks.execute(notebook, tmp_path, environment=surroundings, preloaded=True)
        assert notebook.cells[0].outputs[0].text == f"True set() {tmp_path} {kernel} False\n"
    notebook = new_notebook(cells=[new_code_cell("import os; os._exit(1)")])
    with pytest.raises(notebooks.LessonError, match="the kernel died in this cell"):
        notebooks.execute(notebook, tmp_path, preloaded=True)


def test_report_writes_pages_and_a_table(lessons, tmp_path, capfd):
    before = {path: path.read_bytes() for path in lessons.iterdir()}
    assert report.main() == 0
    assert {path: path.read_bytes() for path in lessons.iterdir()} == before
    shown = capfd.readouterr().out
    assert re.search(r"^01_try +[\d.]+ +2  1 \(1 not attempted\)$", shown, re.MULTILINE)
    page = (tmp_path / "build/lessons/01_try.html").read_text("utf-8")
    assert "counted" in page
    assert 'href="02_next.html"' in page
    assert not re.search(r'(?:<script|<link)[^>]*(?:src|href)="https?:', page), "nothing is fetched"
    index = (tmp_path / "build/index.html").read_text("utf-8")
    row = r'<a href="lessons/01_try.html">01 · Does it run\?</a></td>\s*<td>40</td>\s*<td>2</td>'
    assert re.search(row, index)


def dead_ends(page: str) -> list[str]:
    """Links of a page that lead to no lesson's page and to no file of this repository."""
    links = re.findall(r'<a href="([^"#]*)', page)
    lessons = {f"{path.stem}.html" for path in notebooks.LESSONS.glob("*.py")}
    start = stamp.facts().page("")
    files = [link.removeprefix(start) for link in links if link.startswith(start)]
    others = {link for link in links if link and not re.match("https?:", link)}
    return [*(path for path in files if not (ROOT / path).is_file()), *sorted(others - lessons)]


def test_links_of_a_page_lead_to_pages_or_to_the_repository():
    text = (
        "[a](02_what_if_we_forget_on_purpose.ipynb#x) [b](glossary.md) [c](#here) "
        "[d](../course_utils/topics/ranks.py) [e](../course_utils/data/recorded_runs.json) "
        "[f](https://pytorch.org/x.md)"
    )
    page = report.page(new_notebook(cells=[new_markdown_cell(text)]))
    tag = stamp.facts().page("")
    assert re.findall(r'<a href="([^"]+)"', page) == [
        "02_what_if_we_forget_on_purpose.html#x", f"{tag}lessons/glossary.md", "#here",
        f"{tag}course_utils/topics/ranks.py", f"{tag}course_utils/data/recorded_runs.json",
        "https://pytorch.org/x.md",
    ]  # fmt: skip
    assert dead_ends(page) == []
    dead = new_markdown_cell("[x](nothing.md) [y](../course_utils/no.py)")
    assert dead_ends(report.page(new_notebook(cells=[dead]))) == [
        "lessons/nothing.md", "course_utils/no.py",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "path", sorted([*notebooks.LESSONS.glob("*.ipynb"), *notebooks.LESSONS.glob("*.md")]),
    ids=lambda path: path.stem,
)  # fmt: skip
def test_every_link_of_the_book_leads_somewhere(path):
    text = path.read_text("utf-8")
    cells = (
        nbformat.reads(text, as_version=4).cells
        if path.suffix == ".ipynb"
        else [new_markdown_cell(text)]
    )
    prose = new_notebook(cells=[cell for cell in cells if cell.cell_type == "markdown"])
    assert dead_ends(report.page(prose)) == []


def test_report_fails_loudly(lessons, capfd):
    (lessons / "01_try.py").write_text(LESSON + "\n# %%\nmissing + 1\n", "utf-8")
    (lessons / "02_next.py").write_text(LESSON, "utf-8")
    assert report.main() == 1
    shown = capfd.readouterr()
    assert re.search(r"^01_try .*FAILED$", shown.out, re.MULTILINE)
    assert re.search(r"^02_next .*1 not attempted", shown.out, re.MULTILINE)
    assert "    missing + 1" in shown.err


def test_report_without_lessons_fails(lessons, capfd):
    (lessons / "01_try.py").unlink()
    assert report.main() == 1
    assert "no lesson" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (checks.right("it is."), ["right"]),
        (checks.not_yet("that is not right."), ["not yet"]),
        (checks.check()(checks.right)(...), ["not attempted"]),
        ("nothing to say", ["silent"]),
    ],
)
def test_verdicts_are_told_apart(verdict, expected):
    shown = [new_output("execute_result", {"text/plain": str(verdict)})]
    cell = new_code_cell("check", outputs=shown, metadata={"tags": ["check"]})
    assert report.check_verdicts(cell) == expected
    result = report.Result("01_x", "q", "40", 3, Counter(expected * 2), 1.0)
    assert result.checks == f"2 (2 {expected[0]})"
