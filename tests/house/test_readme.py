"""README and CONTRIBUTING, held: every command is run or is a verb that exists, every link leads
somewhere (also in the lessons and beside them), the picture has its words, and a reader finds what
the course is on the first screen.
"""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from fitcast.units import GIB
from tools import closing_act, stamp
from tools.notebooks import LESSONS, ROOT, lesson_scripts

PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
SHEETS = sorted(path.name for path in LESSONS.glob("*.md"))
COMMAND = r"(?:make|pip|pip-compile|conda|git|(?:\.venv/bin/)?python3?(?:\.\d+)?|\.ci/run)\b"
FIRST_SCREEN = 900  # characters of text before the lessons, the picture's words aside


def text(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def blocks(page: str) -> list[str]:
    """Fenced blocks without their fences."""
    return re.findall(r"^```\w*\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    """What a page tells its reader to type: in blocks, and in backticks when it is a command."""
    found = []
    for block in blocks(page):
        console = [re.sub(r"\\\n\s*", "", c) for c in stamp.COMMAND.findall(block)]
        found += console or [line.split("  #")[0].strip() for line in block.splitlines()]
    inline = re.sub(r"^```\w*\n.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    inline = (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", inline))
    return [*found, *(code for code in inline if re.match(rf"(?:{COMMAND} |\.ci/run$)", code))]


def verbs() -> set[str]:
    shown = subprocess.check_output(["make", "help"], cwd=ROOT, text=True)
    return set(re.findall(r"^  make ([\w-]+) ", shown, re.MULTILINE))


def run(arguments: list[str]) -> str:
    """What it says when it does not run: empty, if all is well."""
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def trouble(command: str) -> str:
    """What is wrong with a command, empty if nothing is. Expensive verbs are looked up, not run."""
    words = re.sub(r'=("[^"]*"|\S+)', "=", command).split()
    if words[0] == "make":
        unknown = {word for word in words[1:] if "=" not in word} - verbs()
        return f"make has no {sorted(unknown)}" if unknown or len(words) == 1 else ""
    if words[0].endswith("python") and words[1:2] == ["-m"]:
        cheap = words[2:] == ["course_utils", "doctor"] or "--help" in words
        arguments = command.split(" | ")[0].split()[1:] + ([] if cheap else ["--help"])
        return run([sys.executable, *arguments])
    if words[:3] == ["conda", "env", "create"]:
        return environment(ROOT / words[-1])
    if words[0] == ".ci/run":
        return run(["bash", "-n", ".ci/run"])
    return f"nobody has said how to test {command!r}"


def environment(path) -> str:
    """What is wrong with a conda environment file: each file that pip gets must be there."""
    if not path.exists():
        return f"{path.name} does not exist"
    (pip,) = [part["pip"] for part in yaml.safe_load(path.read_text())["dependencies"]
              if isinstance(part, dict)]  # fmt: skip
    named = [line.split()[1] for line in pip if line.startswith(("--constraint", "--requirement"))]
    missing = [name for name in named if not (ROOT / name).exists()]
    return f"{missing} does not exist" if missing or len(named) != 2 else ""


def dead_links(page: str, folder: Path = ROOT) -> list[str]:
    """Links into the repository, from a page in `folder`, that lead nowhere."""
    targets = re.findall(r"\]\(([^)\s]+)\)", page)
    local = [target.split("#")[0] for target in targets if not target.startswith("http")]
    return [target for target in local if target and not (folder / target).exists()]


def prose(lesson: Path) -> str:
    """The Markdown of a lesson."""
    cells = nbformat.read(lesson.with_suffix(".ipynb"), as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def dead_names(page: str) -> list[str]:
    """Files and folders of the repository named in backticks that are not there."""
    folders = r"(?:lessons|course_utils|tools|tests|instructor|docs|\.github|\.ci)/[\w./-]*"
    files = r"[\w.-]+\.(?:txt|toml|yml|cff|md)"
    named = re.findall(rf"`({folders}|{files})`", page)
    return [name for name in named if "NN_topic" not in name and not (ROOT / name).exists()]


ALL = [(name, command) for name in ("README.md", "CONTRIBUTING.md")
       for command in dict.fromkeys(commands(text(name)))]  # fmt: skip


@pytest.mark.parametrize(("name", "command"), ALL)
def test_command_works(name, command):
    assert trouble(command) == "", f"{name}: {command}"


def test_commands_are_found():
    readme = [command for name, command in ALL if name == "README.md"]
    assert {"make lessons", "make test", "make lab", "conda env create -f environment.yml"} <= {
        *readme
    }
    assert sum(" forecast " in command for command in readme) == 2
    assert len(ALL) > 20


@pytest.mark.parametrize(
    "command",
    ["make tests", "make", "python -m course_utils forecst", "conda env create -f env.yml",
     "python -m tools.no_such", "sudo rm x"],
)  # fmt: skip
def test_planted_command_is_caught(command):
    assert trouble(command) != ""


@pytest.mark.timeout(300)
def test_shown_output_is_real():
    (shown,) = stamp.CONSOLE.findall(text("README.md"))
    assert "does not fit a T4" in shown and "\nfits a T4" in shown
    assert stamp.console(shown) == shown, "make stamp"


def test_forecast_shown_is_what_a_gpu_measured():
    """The README's two forecasts against the two recorded steps of the picture."""
    (shown,) = stamp.CONSOLE.findall(text("README.md"))
    usual, _ = closing_act.extremes()
    native = next(row for row in closing_act.rungs() if row["name"] == "native RMSNorm")
    forecasts = [float(number) for number in re.findall(r"peak ([\d.]+) GiB in", shown)]
    for forecast, row in zip(forecasts, (usual, native), strict=True):
        assert forecast == pytest.approx(row["peak_allocated_bytes"] / GIB, rel=0.01)


@pytest.mark.parametrize("name", PAGES)
def test_links_and_names_lead_somewhere(name):
    assert dead_links(text(name)) == []
    assert dead_names(text(name)) == []


@pytest.mark.parametrize("name", SHEETS)
def test_what_lies_beside_the_lessons_is_on_the_map(name):
    assert f"](lessons/{name})" in text("README.md")
    assert dead_links(text(f"lessons/{name}"), LESSONS) == []


@pytest.mark.parametrize("script", lesson_scripts(), ids=lambda path: path.stem)
def test_links_of_a_lesson_lead_somewhere(script):
    assert "](glossary.md)" in prose(script)
    assert dead_links(prose(script), LESSONS) == []


def test_planted_dead_ends_are_caught():
    assert dead_links("[x](../README.md) [y](README.md)", LESSONS) == ["README.md"]
    assert dead_links("[x](lessons/07_x.ipynb) [y](https://example.org) [z](LICENSE)") == [
        "lessons/07_x.ipynb"
    ]
    assert dead_names("`tools/nothing.py`, `requirement.txt`, `tools/`, `lessons/NN_topic.py`") == [
        "tools/nothing.py", "requirement.txt",
    ]  # fmt: skip


def test_first_screen_says_what_for_whom_and_shows_the_closing_act():
    readme = text("README.md")
    opening, lessons = readme.split("<!-- lessons: make stamp -->")
    words = re.sub(r"!\[[^]]*\]\([^)]*\)", "", opening)
    assert len(words) < FIRST_SCREEN
    for part in ("memory", "fine-tuning", "for people who", "T4", "out of memory", "No GPU"):
        assert part in words
    assert f"![{closing_act.alt()}](docs/closing_act.svg)" in opening
    table = lessons.split("<!-- end of lessons -->")[0]
    for script in lesson_scripts():
        said = stamp.opening(script.read_text("utf-8"))
        (row,) = [line for line in table.splitlines() if line.startswith(f"| {said['number']} |")]
        for part in (said["question"], said["minutes"], said["hardware"], "Open in Colab"):
            assert part in row
    order = ["make lessons ", "## The map", "## How it works", "## How the numbers are made",
             "## Contribute", "## Licence and citation"]  # fmt: skip
    assert [lessons.index(part) for part in order] == sorted(map(lessons.index, order))


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=str)
def test_workflows_run_what_exists(path):
    workflow = yaml.safe_load(path.read_text("utf-8"))
    lines = []
    for job in workflow["jobs"].values():
        include = job["strategy"]["matrix"].get("include", [])
        steps = [step["run"] for step in job["steps"]]
        lines += [each["run"] for each in include] + "\n".join(steps).splitlines()
    ours = [line for line in lines if re.match(r"make |\.ci/run|\.venv", line)]
    assert ours and [trouble(line.removesuffix(" || true")) for line in ours] == [""] * len(ours)


def test_ci_runs_tests_browser_and_colab():
    jobs = yaml.safe_load(text(".github/workflows/ci.yml"))["jobs"]
    last = {name: job["steps"][-1]["run"] for name, job in jobs.items()}
    assert last == {"test": ".ci/run", "browser": "make test-browser", "colab": "make test-colab"}


def test_drift_is_looked_for_every_week():
    drift = yaml.safe_load(text(".github/workflows/drift.yml"))
    (when,) = drift[True]["schedule"]  # YAML reads the key `on` as true
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", when["cron"])
    included = drift["jobs"]["run"]["strategy"]["matrix"]["include"]
    runs = {each["name"]: each["run"] for each in included}
    assert runs.keys() == {"pins", "newest", "colab"}
    newest = ["make", "--dry-run", *runs["newest"].split()[1:]]
    shown = subprocess.check_output(newest, cwd=ROOT, text=True)
    assert "--constraint /dev/null" in shown and "constraints.txt" not in shown
    assert re.search(r"touch \.venv/ready-\d", shown), "set up anew: these are other pins"


def test_licence_and_citation_agree():
    licence, citation = text("LICENSE"), yaml.safe_load(text("CITATION.cff"))
    assert licence.startswith("MIT License") and "CC BY 4.0" in licence
    assert citation["cff-version"] == "1.2.0"
    assert "license" not in citation, "a list would let a reader choose; each part has its own"
    assert citation["license-url"] == stamp.facts().page("LICENSE")
    assert citation["title"].startswith(text("README.md").splitlines()[0].removeprefix("# "))
    assert citation["authors"][0]["name"].removeprefix("The ") in licence
