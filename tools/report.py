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

import jinja2
import nbformat
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook
from pygments.formatters import HtmlFormatter

from tools import stamp
from tools.notebooks import ROOT, lesson_scripts
from tools.reproduce import Execution, all_executed

BUILD = ROOT / "build"
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    undefined=jinja2.StrictUndefined,
)
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


def _style() -> Markup:
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    ours = (Path(__file__).parent / "report.css").read_text("utf-8")
    return Markup(f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{ours}")


def page(title: str, notebook: NotebookNode) -> str:
    """A notebook as a page of the book, its links led to pages or into the repository."""
    exporter = HTMLExporter(
        template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True
    )
    body, _ = exporter.from_notebook_node(notebook)
    body = re.sub(r'(?<=href=")(?!\w+:|#)[^"]+', lambda link: _link(link[0]), body)
    template = TEMPLATES.get_template("lesson.html")
    return template.render(title=title, style=_style(), body=Markup(body))


def _link(target: str) -> str:
    """Where a lesson's relative link leads from its page: to another page, or to the repository."""
    page = re.fullmatch(r"(\w+)\.(?:ipynb|md)(#.*)?", target)
    if page:
        return f"{page[1]}.html{page[2] or ''}"
    return stamp.facts().page(posixpath.normpath(f"lessons/{target}"))


def _heading(text: str) -> str:
    """What a page calls itself: the first heading of its Markdown, empty if it has none."""
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    return title[1] if title else ""


def _index_page(results: list[Result], texts: dict[str, str]) -> str:
    return TEMPLATES.get_template("index.html").render(
        title="Lessons",
        style=_style(),
        results=results,
        texts=texts,
        date=time.strftime("%Y-%m-%d"),
    )


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
        written = page(results[-1].question, run.notebook)
        (folder / f"{script.stem}.html").write_text(written, "utf-8")
        print(f"{script.stem}: {'FAILED' if run.failure else 'done'}", flush=True)
    texts = {}
    for path in sorted(scripts[0].parent.glob("*.md")):  # the glossary, and what else lies there
        text = path.read_text("utf-8")
        texts[path.stem] = _heading(text) or path.stem
        written = page(texts[path.stem], new_notebook(cells=[new_markdown_cell(text)]))
        (folder / f"{path.stem}.html").write_text(written, "utf-8")
    (BUILD / "index.html").write_text(_index_page(results, texts), "utf-8")
    failed = [one for one in results if one.failure]
    for one in failed:
        print(f"\n{one.name}: {one.failure}", file=sys.stderr)
    print(f"\n{table(results)}\n\nTo read: {(BUILD / 'index.html').relative_to(ROOT)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
