"""Execute every lesson headlessly and report: pages to read under `build/`, a table to glance at.

    python -m tools.report

Writes `build/lessons/NN_topic.ipynb` and `.html` and `build/index.html`; the committed notebooks
stay as they are. Exits with 1 when a cell fails, after showing its source and the error.
"""

import html
import itertools
import os
import posixpath
import re
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook
from pygments.formatters import HtmlFormatter

from tools import stamp
from tools.notebooks import ROOT, LessonError, clean, execute, from_script, lesson_scripts

BUILD = ROOT / "build"
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}
</style>
<script>MathJax = {{tex: {{inlineMath: [["$", "$"]]}}}};</script>
<script async src="https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-svg.js"></script>
</head>
<body>
{body}
</body>
</html>
"""
VERDICTS = (
    "Right",
    "Not yet",
    "Not attempted",
)  # how `course_utils.exercises.checks` begins a verdict


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


def run_lesson(script: Path, folder: Path) -> Result:
    """Execute one lesson in its own folder; write its notebook and page to `folder`."""
    notebook = from_script(script)
    failure = ""
    start = time.perf_counter()
    try:
        execute(notebook, script.parent)
    except LessonError as error:
        failure = str(error)
    seconds = time.perf_counter() - start
    clean(notebook)
    opening = "\n".join(cell.source for cell in notebook.cells[:2])
    minutes = re.search(r"(\d+)\s*min", opening)
    question = _heading(opening) or script.stem
    nbformat.write(notebook, folder / f"{script.stem}.ipynb")
    (folder / f"{script.stem}.html").write_text(_page(question, notebook), "utf-8")
    return Result(
        name=script.stem,
        question=question,
        minutes=minutes[1] if minutes else "",
        cells=sum(cell.cell_type == "code" for cell in notebook.cells),
        verdicts=Counter(itertools.chain.from_iterable(map(check_verdicts, notebook.cells))),
        seconds=seconds,
        failure=failure,
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


def _style() -> str:
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    ours = (Path(__file__).parent / "report.css").read_text("utf-8")
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{ours}"


def _page(question: str, notebook: NotebookNode) -> str:
    exporter = HTMLExporter(
        template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True
    )
    body, _ = exporter.from_notebook_node(notebook)
    body = re.sub(r'(?<=href=")(?!\w+:|#)[^"]+', lambda link: _link(link[0]), body)
    body = f'<nav><a href="../index.html">All lessons</a></nav>\n<main>\n{body}\n</main>'
    return PAGE.format(title=html.escape(question), style=_style(), body=body)


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
    rows = "\n".join(
        f'<tr><td><a href="lessons/{r.name}.html">{html.escape(r.question)}</a></td>'
        f"<td>{r.minutes}</td><td>{r.cells}</td><td>{r.checks}</td><td>{r.seconds:.1f}</td></tr>"
        for r in results
    )
    beside = "\n".join(
        f'<li><a href="lessons/{name}.html">{html.escape(title)}</a></li>'
        for name, title in texts.items()
    )
    body = f"""<main>
<h1>Make it fit</h1>
<p>The lessons as they ran on this machine on {time.strftime("%Y-%m-%d")}.</p>
<table>
<thead><tr><th>Lesson</th><th>Minutes to take</th><th>Code cells</th><th>Checks</th>
<th>Seconds to run</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
<p>Beside the lessons:</p>
<ul>
{beside}
</ul>
</main>"""
    return PAGE.format(title="Lessons", style=_style(), body=body)


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
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # a kernel computes on one core
        # The last lesson takes longest: begun last, it would leave the other cores idle.
        begun = [pool.submit(run_lesson, script, folder) for script in reversed(scripts)]
        for future in as_completed(begun):
            result = future.result()
            print(f"{result.name}: {'FAILED' if result.failure else 'done'}", flush=True)
            results.append(result)
    results.sort(key=lambda result: result.name)
    texts = {}
    for path in sorted(scripts[0].parent.glob("*.md")):  # the glossary, and what else lies there
        text = path.read_text("utf-8")
        texts[path.stem] = _heading(text) or path.stem
        page = _page(texts[path.stem], new_notebook(cells=[new_markdown_cell(text)]))
        (folder / f"{path.stem}.html").write_text(page, "utf-8")
    (BUILD / "index.html").write_text(_index_page(results, texts), "utf-8")
    failed = [result for result in results if result.failure]
    for result in failed:
        print(f"\n{result.name}: {result.failure}", file=sys.stderr)
    print(f"\n{table(results)}\n\nTo read: {(BUILD / 'index.html').relative_to(ROOT)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
