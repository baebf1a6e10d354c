"""Author's tool: facts that stand in one place, written wherever a reader meets them.

    python -m tools.stamp

The address and the version come from pyproject.toml, bitsandbytes' version from requirements.lock.
From them it writes each lesson's badge and set-up cell (in the `.py` and in the `.ipynb`, whose
other outputs stay), README's table of lessons, its picture and example outputs, CITATION.cff,
.zenodo.json and `__version__`.
"""

import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_output

from course_utils.topics.welcome import banner
from tools import closing_act
from tools.notebooks import LESSONS, ROOT, lesson_scripts

SETUP_PROSE = """\
## Set up
On Colab, and on Kaggle with *Internet* on, this fetches the course and the one package that is
missing there; elsewhere it does nothing. A second run changes nothing."""
SETUP = """\
import os
import sys
if "course_utils" not in sys.modules:
    hosted = {{"COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"}} & set(os.environ)
    if hosted and not os.path.isdir("course"):
        os.system(f"{{sys.executable}} -m pip install -q --no-deps bitsandbytes=={bitsandbytes} && "
                  "git clone -qb {tag} {repository} course")
    sys.path += [os.path.abspath("course"), os.path.abspath("..")]
from course_utils.topics.welcome import welcome
print(welcome())"""
COLAB = "https://colab.research.google.com"
KAGGLE = "https://kaggle.com"
BADGE = (
    rf"\[!\[Open in Colab\]\([^)]*\)\]\({re.escape(COLAB)}[^)]*\)"
    rf"(?:(?P<gap>\s(?:# )?)\[!\[Open in Kaggle\]\([^)]*\)\]\({re.escape(KAGGLE)}[^)]*\))?"
)
TABLE = re.compile(r"(?<=<!-- lessons: make stamp -->\n).*?(?=<!-- end of lessons -->)", re.DOTALL)
CONSOLE = re.compile(r"(?<=^```console\n).*?(?=^```$)", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)$", re.MULTILINE)  # a backslash continues it
RACE = re.compile(r"(?<=<!-- race: make stamp -->\n).*?(?=<!-- end of race -->)", re.DOTALL)
PICTURE = re.compile(r"!\[[^]]*\]\(docs/closing_act\.svg\)")


@dataclass(frozen=True)
class Facts:
    """What badges and set-up cells name."""

    repository: str
    version: str
    bitsandbytes: str

    @property
    def tag(self) -> str:
        return f"v{self.version}"

    @property
    def setup(self) -> str:
        """Source of the set-up cell, the same in every lesson."""
        return SETUP.format(
            tag=self.tag, repository=self.repository, bitsandbytes=self.bitsandbytes
        )

    def page(self, path: str) -> str:
        """Where this tag's copy of a file of the repository can be read."""
        return f"{self.repository}/blob/{self.tag}/{path}"

    def badge(self, lesson: str) -> str:
        """Markdown that opens this lesson of this tag in Colab."""
        path = self.page(f"lessons/{lesson}.ipynb").removeprefix("https://github.com/")
        picture = f"![Open in Colab]({COLAB}/assets/colab-badge.svg)"
        return f"[{picture}]({COLAB}/github/{path})"

    def badges(self, lesson: str, gap: str | None) -> str:
        """The same; behind a gap, one for Kaggle, of a lesson that wants its two T4s."""
        if gap is None:
            return self.badge(lesson)
        picture = f"![Open in Kaggle]({KAGGLE}/static/images/open-in-kaggle.svg)"
        page = self.page(f"lessons/{lesson}.ipynb")
        return f"{self.badge(lesson)}{gap}[{picture}]({KAGGLE}/kernels/welcome?src={page})"


def facts(root: Path = ROOT) -> Facts:
    """The facts as they stand in pyproject.toml and requirements.lock."""
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    pins = (root / "requirements.lock").read_text("utf-8")
    return Facts(
        repository=project["urls"]["Repository"],
        version=project["version"],
        bitsandbytes=re.search(r"^bitsandbytes==(\S+)", pins, re.MULTILINE)[1],
    )


def lesson_source(text: str, lesson: str, now: Facts) -> str:
    """A lesson's `.py` with the badge and the set-up cell of now.

    Raises:
        ValueError: The lesson has no badge, or no section "Set up" with a code cell behind it.
    """
    prose = "\n".join(f"# {line}".rstrip() for line in SETUP_PROSE.splitlines())
    section = f'# %% [markdown]\n{prose}\n\n# %% tags=["setup"]\n{now.setup}\n\n'
    text, badges = re.subn(BADGE, lambda found: now.badges(lesson, found["gap"]), text, count=1)
    text, sections = re.subn(
        r'# %% \[markdown\]\n# ## Set up\n(?:#.*\n)*\n# %% tags=\["setup"\]\n(?:.+\n)+\n',
        lambda _: section,
        text,
        count=1,
    )
    if not (badges and sections):
        raise ValueError(
            f"{lesson} must have a Colab badge and a section 'Set up' with a code cell, got "
            f"{badges} and {sections}; copy both from another lesson, then make stamp"
        )
    return text


def lesson_notebook(notebook: NotebookNode, lesson: str, now: Facts) -> None:
    """The same in place for the notebook, and the line that the set-up cell prints."""
    notebook.cells[0].source = re.sub(
        BADGE,
        lambda found: now.badges(lesson, found["gap"]),
        notebook.cells[0].source,
        count=1,
    )
    headings = [cell.source.startswith("## Set up") for cell in notebook.cells]
    where = headings.index(True)
    cell = notebook.cells[where + 1]
    notebook.cells[where].source, cell.source = SETUP_PROSE, now.setup
    cell.outputs = [new_output("stream", name="stdout", text=f"{banner()}\n")]


def opening(lesson: str) -> dict[str, str]:
    """Number, question, minutes (+: and the card's) and hardware, as its first cell says."""
    number, question = re.search(r"^# # (\d\d) · (.+)$", lesson, re.MULTILINE).groups()
    stated = re.search(r"\*\*(\d+) min\*\*([^·]*) · ([^;.]+)", lesson)
    minutes, more, hardware = stated.groups()
    minutes += " +" if "T4's own time" in more else ""
    return dict(number=number, question=question, minutes=minutes, hardware=hardware)


def table(scripts: list[Path], now: Facts) -> str:
    """README's table of lessons, in Markdown."""
    rows = ["| | the question | minutes | hardware | |", "|---|---|---|---|---|"]
    for script in scripts:
        said = opening(script.read_text("utf-8"))
        rows.append(
            f"| {said['number']} | [{said['question']}](lessons/{script.stem}.ipynb) | "
            f"{said['minutes']} | {said['hardware']} | {now.badge(script.stem)} |"
        )
    return "\n".join(rows) + "\n"


def console(block: str) -> str:
    """A block of `$ command` lines, each with what it prints now."""
    lines = []
    for command in COMMAND.findall(block):
        here = command.replace(".venv/bin/python", sys.executable)
        done = subprocess.run(
            ["bash", "-c", here], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        lines += [f"$ {command}", *done.stdout.splitlines()]
    return "".join(f"{line}\n" for line in lines)


def readme(text: str, scripts: list[Path], now: Facts) -> str:
    """README with the table, the picture's words and the example outputs of now."""
    text = TABLE.sub(lambda _: table(scripts, now), text)
    text = RACE.sub(lambda _: closing_act.race(), text)
    text = CONSOLE.sub(lambda block: console(block[0]), text)
    return PICTURE.sub(lambda _: f"![{closing_act.alt()}](docs/closing_act.svg)", text)


def citation(text: str, now: Facts) -> str:
    """CITATION.cff with the version and the addresses of now."""
    text = re.sub(r"^version: .*$", f"version: {now.version}", text, flags=re.MULTILINE)
    for key, address in (("repository-code", now.repository), ("license-url", now.page("LICENSE"))):
        text = re.sub(rf"^{key}: .*$", f'{key}: "{address}"', text, flags=re.MULTILINE)
    return text


def zenodo(text: str, now: Facts) -> str:
    """.zenodo.json with the version of now."""
    return re.sub(r'(?<="version": ")[^"]*', now.version, text)


def package(text: str, now: Facts) -> str:
    """`fitcast/__init__.py` with the version of now."""
    return re.sub(r'^__version__ = ".*"$', f'__version__ = "{now.version}"', text, flags=re.M)


def notebooks() -> list[Path]:
    """The `.py` of each notebook with a badge and a set-up cell: lessons, and the T4 reading."""
    return [*lesson_scripts(), LESSONS / "add_a_t4_reading.py"]


def texts(root: Path = ROOT) -> dict[Path, str]:
    """Every stamped text file, as it should be."""
    now, scripts = facts(root), lesson_scripts()
    wanted = {path: lesson_source(path.read_text("utf-8"), path.stem, now) for path in notebooks()}
    written = {"CITATION.cff": citation, ".zenodo.json": zenodo, "fitcast/__init__.py": package}
    for name, write in written.items():
        wanted[root / name] = write((root / name).read_text("utf-8"), now)
    wanted[root / "README.md"] = readme((root / "README.md").read_text("utf-8"), scripts, now)
    wanted[root / "docs" / "closing_act.svg"] = closing_act.svg()
    return wanted


def main() -> int:
    changed = []
    for path, wanted in texts().items():
        if not path.exists() or path.read_text("utf-8") != wanted:
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted, "utf-8")
            changed.append(path)
    for script in notebooks():
        path = script.with_suffix(".ipynb")
        before = path.read_text("utf-8")
        notebook = nbformat.reads(before, as_version=4)
        lesson_notebook(notebook, script.stem, facts())
        if (after := nbformat.writes(notebook) + "\n") != before:
            path.write_text(after, "utf-8")
            changed.append(path)
    print("\n".join(f"stamped {path.relative_to(ROOT)}" for path in changed) or "all up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
