"""Execute every lesson headlessly and report: pages to read under `build/`, a table to glance at.

    python -m tools.report

Writes `build/lessons/NN_topic.ipynb` and `.html` and `build/index.html`; the committed notebooks
stay as they are, and a lesson that `make test` has just executed is not executed again. Exits with
1 when a cell fails, after showing its source and the error.
"""

import itertools
import posixpath
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook

from tools import stamp
from tools.notebooks import ROOT, lesson_scripts
from tools.reproduce import Execution, all_executed

BUILD = ROOT / "build"
# How `course_utils.exercises.checks` begins a verdict.
VERDICTS = ("Right", "Not yet", "Not attempted")


@dataclass(frozen=True)
class Result:
    """What one lesson's run showed."""

    name: str
    question: str
    minutes: str
    cells: int
    verdicts: Counter
    seconds: float
    failure: str = ""

    @property
    def checks(self) -> str:
        """Exercise checks shown, by verdict, e.g. `4 (4 not attempted)`."""
        if self.failure:
            return "FAILED"
        parts = ", ".join(f"{count} {verdict}" for verdict, count in self.verdicts.items())
        return f"{self.verdicts.total()} ({parts})" if parts else "0"


def result(script: Path, run: Execution) -> Result:
    """What the table says of a lesson's run."""
    notebook = run.notebook
    opening = "\n".join(cell.source for cell in notebook.cells[:2])
    minutes = re.search(r"(\d+)\s*min", opening)
    return Result(
        name=script.stem,
        question=_heading(opening) or script.stem,
        minutes=minutes[1] if minutes else "",
        cells=sum(cell.cell_type == "code" for cell in notebook.cells),
        verdicts=Counter(itertools.chain.from_iterable(map(check_verdicts, notebook.cells))),
        seconds=run.seconds,
        failure=run.failure,
    )


def check_verdicts(cell: NotebookNode) -> list[str]:
    """How the verdicts shown by an exercise's check cell begin; none for every other cell."""
    if "check" not in cell.metadata.get("tags", []):
        return []
    shown = "\n".join(
        output.get("text", "") or output.get("data", {}).get("text/plain", "")
        for output in cell.outputs
    )
    found = re.findall(rf"^(?:{'|'.join(VERDICTS)})", shown, re.MULTILINE)
    return [verdict.lower() for verdict in found] or ["silent"]


def page(notebook: NotebookNode) -> str:
    """A notebook as nbconvert shows it, its links led to pages or into the repository.

    The site is where lessons are read; this page shows what this machine's run printed.
    """
    nothing = dict(require_js_url="", mathjax_url="", jquery_url="", widget_renderer_url="")
    html, _ = HTMLExporter(**nothing).from_notebook_node(notebook)
    return re.sub(r'(?<=<a href=")(?!\w+:|#)[^"]+', lambda link: _link(link[0]), html)


def _link(target: str) -> str:
    """Where a lesson's relative link leads from its page: to another page, or to the repository."""
    lesson = re.fullmatch(r"(\d\d_\w+)\.ipynb(#.*)?", target)
    if lesson:
        return f"{lesson[1]}.html{lesson[2] or ''}"
    if target.startswith("lessons/"):  # from the list of them
        return target
    return stamp.facts().page(posixpath.normpath(f"lessons/{target}"))


def _heading(text: str) -> str:
    """What a page calls itself: the first heading of its Markdown, empty if it has none."""
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    return title[1] if title else ""


def index(results: list[Result]) -> str:
    """The page that lists the lessons as they ran on this machine."""
    rows = [
        f"| [{one.question}](lessons/{one.name}.html) | {one.minutes} | {one.cells} | {one.checks} "
        f"| {one.seconds:.1f} |"
        for one in results
    ]
    head = (
        "| lesson | minutes to take | code cells | checks | seconds to run |\n|---|---|---|---|---|"
    )
    text = (
        f"# Make it fit\n\nThe lessons as they ran here on {time.strftime('%Y-%m-%d')}.\n\n{head}"
    )
    return page(new_notebook(cells=[new_markdown_cell("\n".join([text, *rows]))]))


def table(results: list[Result]) -> str:
    """The closing table: per lesson seconds, code cells and checks."""
    width = max(len(r.name) for r in results)
    lines = [f"{'lesson':{width}}  seconds  cells  checks"]
    lines += [f"{r.name:{width}}  {r.seconds:7.1f}  {r.cells:5}  {r.checks}" for r in results]
    seconds, cells = sum(r.seconds for r in results), sum(r.cells for r in results)
    checks = sum(r.verdicts.total() for r in results)
    return "\n".join([*lines, f"{'all':{width}}  {seconds:7.1f}  {cells:5}  {checks}"])


def main() -> int:
    scripts = lesson_scripts()
    if not scripts:
        print("There is no lesson in lessons/.", file=sys.stderr)
        return 1
    folder = BUILD / "lessons"
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for script, run in all_executed(scripts):
        results.append(result(script, run))
        nbformat.write(run.notebook, folder / f"{script.stem}.ipynb")
        (folder / f"{script.stem}.html").write_text(page(run.notebook), "utf-8")
        print(f"{script.stem}: {'FAILED' if run.failure else 'done'}", flush=True)
    (BUILD / "index.html").write_text(index(results), "utf-8")
    failed = [one for one in results if one.failure]
    for one in failed:
        print(f"\n{one.name}: {one.failure}", file=sys.stderr)
    print(f"\n{table(results)}\n\nTo read: {(BUILD / 'index.html').relative_to(ROOT)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
