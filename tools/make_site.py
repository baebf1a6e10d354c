"""Author's tool: the public site, from what the repository holds, into `build/site/`.

    python -m tools.make_site

Lays the pages in order under `build/site-source/` (README as the first page, the lessons as they
were executed and committed, the sheets beside them, the engine's names, what it refuses, the
instructor's guide) and has Sphinx build them; a warning is an error. Nothing here executes a
lesson, and no page asks another server for anything.
"""

import os
import posixpath
import re
import shutil
import sys
import tomllib
from pathlib import Path

import nbformat

import fitcast
from tools import refusals, stamp
from tools.notebooks import ROOT, lesson_scripts

SITE = ROOT / "site"
SOURCE = ROOT / "build" / "site-source"
BUILT = ROOT / "build" / "site"
KAGGLE = "https://kaggle.com/kernels/welcome?src="
# Pages of the repository that are pages of the site, too.
PAGES = {
    "README.md": "index.md",
    "fitcast/README.md": "fitcast.md",
    "instructor/README.md": "teach.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
READING = "add_a_t4_reading"
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s]+)(?=\))")
BADGE = re.compile(r"\[!\[[^]]*\]\(https?:[^)]*\)\]\(([^)]*)\)")
PICTURE = re.compile(r"(!\[[^]]*\])\((docs/[^)]*)\)")
# An icon in the theme's script, and where a page wants one.
ICON = re.compile(r'[{,]"?([a-z0-9-]+)"?:\[(\d+),(\d+),\[[^]]*\],"[^"]*","([^"]+)"\]')
ICON_PLACE = re.compile(r'(<(?:i|span) class="[^"]*)\bfa(?:-solid|b) fa-([a-z-]+)([^>]*>)')
MENDED = {
    r"<script[^>]*fontawesome\.js[^>]*></script>\s*": "",
    r"<summary>(?=<span[^>]*toctree-toggle)": '<summary aria-label="The pages of this chapter">',
    # The words on it name it.
    r'(<button class="btn search-button-field[^>]*?)\s+aria-label="Search"': r"\1",
}
TITLES = {
    "recipe": "A run in one object",
    "gpus": "Cards",
    "units": "Bytes as text",
    "memory.ledger": "Counting real steps",
    "memory.report": "What a ledger saw",
    "forecasting.ask": "The forecast of a run",
    "forecasting.forecast": "The forecast of a step",
    "forecasting.search": "What a change saves",
    "forecasting.strategies": "What fits, on one card or several",
    "forecasting.generation": "Generating",
    "forecasting.merging": "Merging, before it happens",
    "forecasting.other_steps": "Evaluating and resuming",
    "forecasting.fake": "Tensors without numbers",
    "forecasting.block": "One layer, tensor by tensor",
    "step.apply": "Levers on a script's model",
    "step.losses": "The chunked loss",
    "training.measurement": "A real step, measured",
    "training.preflight": "Before a run",
    "training.trainer": "Training",
    "training.export": "Merging",
    "cli.doctor": "This machine",
}


def write(name: str, text: str) -> None:
    path = SOURCE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def link(target: str, origin: str, page: str) -> str:
    """Where a relative link of a file of the repository leads from that file's page of the site.

    Args:
        target: The link as the file has it.
        origin: The file, as a path in the repository.
        page: Its page, as a path in the site's sources.
    """
    path, _, anchor = target.partition("#")
    anchor = f"#{anchor}" if anchor else ""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
    there = PAGES.get(path, path)
    ours = path in PAGES or re.fullmatch(r"lessons/\w+\.(ipynb|md)", path)
    if path == "lessons":
        there, ours = "lessons/index.md", True
    if ours:
        return posixpath.relpath(there, posixpath.dirname(page) or ".") + anchor
    return stamp.facts().page(path) + anchor


def text(markdown: str, origin: str, page: str) -> str:
    """A file's Markdown as a page of the site: links led on, no badge fetched from elsewhere."""
    pictures = posixpath.relpath("_static", posixpath.dirname(page) or ".")
    markdown = PICTURE.sub(rf"\1({pictures}/\2)", markdown).replace("_static/docs/", "_static/")
    markdown = BADGE.sub(lambda found: f"[{_where(found[1])}]({found[1]})", markdown)
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    kept = pictures + "/"
    return "".join(
        part
        if part.startswith("```")
        else LINK.sub(
            lambda found: found[1] if found[1].startswith(kept) else link(found[1], origin, page),
            part,
        )
        for part in parts
    )


def _where(address: str) -> str:
    return "Colab" if "colab" in address else "badge"


def doors(lesson: str) -> str:
    """Where a lesson can be run, in place of its badge."""
    now = stamp.facts()
    page = now.page(f"lessons/{lesson}.ipynb")
    colab = f"{stamp.COLAB}/github/{page.removeprefix('https://github.com/')}"
    return (
        f"[Open in Colab]({colab}){{.door}} [Open in Kaggle]({KAGGLE}{page}){{.door}} "
        f"[Source]({page}){{.door}}"
    )


def lessons() -> None:
    """Each committed notebook, its badge replaced by doors, its links led on."""
    for script in stamp.notebooks():
        origin = f"lessons/{script.stem}.ipynb"
        notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
        opening = notebook.cells[0]
        opening.source = re.sub(stamp.BADGE, lambda _: doors(script.stem), opening.source)  # noqa: B023
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = text(cell.source, origin, origin)
        write(origin, nbformat.writes(notebook))


def sheets() -> list[str]:
    """What lies beside the lessons; the glossary's table becomes Sphinx's glossary."""
    names = sorted(path.name for path in (ROOT / "lessons").glob("*.md"))
    for name in names:
        markdown = (ROOT / "lessons" / name).read_text("utf-8")
        if name == "glossary.md":
            markdown = glossary(markdown)
        write(f"lessons/{name}", text(markdown, f"lessons/{name}", f"lessons/{name}"))
    return [Path(name).stem for name in names]


def glossary(markdown: str) -> str:
    """The glossary with each row of its table as an entry that pages can link to."""
    head, _, table = markdown.partition("| term | meaning | lesson |\n|---|---|---|\n")
    rows = [re.split(r"(?<!\\) \| ", row.strip("| ")) for row in table.strip().splitlines()]
    entries = []
    for term, meaning, lesson in rows:
        names = re.sub(r"\*\*|\(.*\)", "", term).split(", ")
        entries.append("\n".join(name.strip() for name in names) + f"\n  {meaning} ({lesson})\n")
    return f"{head}:::{{glossary}}\n" + "\n".join(entries) + ":::\n"


def contents() -> None:
    """The lists of pages: what Sphinx calls toctrees."""
    titles = {script.stem: stamp.opening(script.read_text("utf-8")) for script in lesson_scripts()}
    rows = [
        f"- [{said['number']} · {said['question']}]({name}.ipynb): {said['minutes']} minutes, "
        f"{said['hardware']}"
        for name, said in titles.items()
    ]
    tree = "\n".join([*titles, *sheets(), READING])
    write(
        "lessons/index.md",
        "# Learn: the lessons\n\nEach is a notebook that was executed on a CPU; what you read here "
        "is what it printed.\n\n"
        + "\n".join(rows)
        + f"\n\n```{{toctree}}\n:hidden:\n\n{tree}\n```\n",
    )


def api() -> None:
    """A page of names for each module of the public face, from its docstrings."""
    pages = {}
    for name in fitcast.__all__:
        pages.setdefault(fitcast._HOMES[name], []).append(name)
    for home, names in pages.items():
        parts = [f"{TITLES[home]}\n{'=' * len(TITLES[home])}\n", *map(_entry, names)]
        write(f"api/{home}.rst", "\n".join(parts))
    order = [home for home in TITLES if home in pages]
    rows = "\n".join(
        f"- [{TITLES[home]}]({home}.rst): " + ", ".join(f"`{name}`" for name in pages[home])
        for home in order
    )
    tree = "\n".join(order)
    write(
        "api/index.md",
        "# The names of fitcast\n\nEverything that `import fitcast` offers, from its docstrings. "
        "What each is for, with examples, is in [the engine's own page](../fitcast.md).\n\n"
        f"{rows}\n\n```{{toctree}}\n:hidden:\n\n{tree}\n```\n",
    )


def _entry(name: str) -> str:
    value = getattr(fitcast, name)
    if isinstance(value, type):
        return f".. autoclass:: fitcast.{name}\n   :members:\n"
    kind = "autofunction" if callable(value) else "autodata"
    return f".. {kind}:: fitcast.{name}\n"


def front() -> None:
    """README as the first page, with the site's chapters behind it."""
    for origin, page in PAGES.items():
        write(page, text((ROOT / origin).read_text("utf-8"), origin, page))
    chapters = (SITE / "chapters.md").read_text("utf-8").replace("<home>", home_address())
    with (SOURCE / "index.md").open("a", encoding="utf-8") as file:
        file.write("\n" + chapters)


def sources() -> None:
    """All pages, laid anew under build/site-source/."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree(
        SITE,
        SOURCE,
        ignore=shutil.ignore_patterns("explorer", "__pycache__", "*.toml", "chapters.md"),
    )
    for picture in (ROOT / "docs").glob("*.svg"):
        shutil.copy(picture, SOURCE / "_static")
    front()
    lessons()
    contents()
    api()
    write("errors.md", refusals.page())


def finish() -> None:
    """Mend what the theme leaves: its 1.5 MB script of icons, buttons that a screen reader misses.

    Each icon becomes a drawing in its page.
    """
    script = BUILT / "_static" / "scripts" / "fontawesome.js"
    drawings = {name: shape for name, *shape in ICON.findall(script.read_text("utf-8"))}

    def drawn(found: re.Match) -> str:
        before, name, after = found.groups()
        width, height, path = drawings[name]
        return (
            f'{before}{after}<svg class="icon" viewBox="0 0 {width} {height}" aria-hidden="true">'
            f'<path d="{path}"/></svg>'
        )

    for page in BUILT.rglob("*.html"):
        html = ICON_PLACE.sub(drawn, at_home(page.read_text("utf-8"), page))
        for pattern, mended in MENDED.items():
            html = re.sub(pattern, mended, html)
        page.write_text(html, "utf-8")
    script.unlink()
    for left in [*BUILT.rglob("*.map"), *BUILT.rglob("*webpack-macros.html")]:
        left.unlink()


def at_home(html: str, page: Path) -> str:
    """A page whose links to the published site stay within the one that was built."""
    top = "../" * (len(page.relative_to(BUILT).parts) - 1)
    home = re.escape(home_address())
    return re.sub(rf'href="{home}((?:[^"]*/)?)"', rf'href="{top}\1index.html"', html)


def home_address() -> str:
    """Where the site is published, as pyproject.toml says it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return project["urls"]["Documentation"]


def explorer() -> None:
    """The explorer, as it stands; it is a page of its own."""
    if (SITE / "explorer" / "index.html").exists():
        shutil.copytree(SITE / "explorer", BUILT / "explorer", dirs_exist_ok=True)


def main() -> int:
    from sphinx.cmd.build import main as sphinx  # of the extra `site`; the rest works without

    sources()
    shutil.rmtree(BUILT, ignore_errors=True)
    os.environ["FITCAST_CACHE"] = "0"
    sys.path.insert(0, str(SOURCE))
    doctrees = ROOT / "build" / "site-doctrees"
    options = ["-W", "--keep-going", "-q", "-j", "auto", "-d", str(doctrees)]
    failed = sphinx(["-b", "html", *options, str(SOURCE), str(BUILT)])
    if not failed:
        finish()
        explorer()
        pages = len(list(BUILT.rglob("*.html")))
        print(f"{pages} pages. To read: {(BUILT / 'index.html').relative_to(ROOT)}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
