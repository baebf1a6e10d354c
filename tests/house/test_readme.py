"""README and CONTRIBUTING, held: every command is run or is a verb that exists, every link and file
name leads somewhere (also in the lessons and beside them), and what is shown is what it prints.
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
from tools.notebooks import LESSONS, lesson_scripts
from tools.surroundings import ROOT

PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
SHEETS = sorted(path.name for path in LESSONS.glob("*.md"))
# What pip may be asked to install.
WAYS = {"-q", ".", "--editable", "fitcast", f"git+{stamp.facts().repository}"}
# What of a command line says that it is one of ours, or one that we can look up.
COMMAND = (
    r"(?:make|pip|conda|git|(?:\.venv/bin/)?(?:python3?(?:\.\d+)?|fitcast|pre-commit)|\.ci/run)\b"
)


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
        return run([sys.executable, *_cheap(command.split()[1:])])
    if words[0].removeprefix(".venv/bin/") == "fitcast":
        return run([sys.executable, "-m", "fitcast", *_cheap(command.split()[1:])])
    if words[0].removeprefix(".venv/bin/") == "pre-commit" and words[1:] == ["install"]:
        return run([sys.executable, "-m", "pre_commit", "validate-config"])
    if words[:2] == ["pip", "install"]:
        return "" if set(words[2:]) <= WAYS else f"pip {words[2:]}"
    if words[:3] == ["conda", "env", "create"]:
        return environment(ROOT / words[-1])
    if words[0] == ".ci/run":
        return run(["bash", "-n", ".ci/run"])
    return f"nobody has said how to test {command!r}"


def _cheap(arguments: list[str]) -> list[str]:
    """A command's arguments without its pipe; what would compute is asked for its help instead."""
    own = " ".join(arguments).split(" | ")[0].split()
    return own if own[-1] in ("doctor", "--help") else [*own, "--help"]


def environment(path) -> str:
    """What is wrong with a conda environment file: each file that pip gets must be there."""
    if not path.exists():
        return f"{path.name} does not exist"
    (pip,) = [part["pip"] for part in yaml.safe_load(path.read_text())["dependencies"]
              if isinstance(part, dict)]  # fmt: skip
    named = [line.split()[1] for line in pip if line.startswith(("--constraint", "--requirement"))]
    missing = [name for name in named if not (ROOT / name).exists()]
    return f"{missing} does not exist" if missing or not named else ""


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
    folders = r"(?:lessons|fitcast|course_utils|tools|tests|instructor|docs|\.github|\.ci)/[\w./-]*"
    files = r"[\w.-]+\.(?:txt|lock|toml|yml|cff|md)"
    named = re.findall(rf"`({folders}|{files})`", page)
    return [name for name in named if "NN_topic" not in name and not (ROOT / name).exists()]


ALL = [(name, command) for name in ("README.md", "CONTRIBUTING.md")
       for command in dict.fromkeys(commands(text(name)))]  # fmt: skip


@pytest.mark.parametrize(("name", "command"), ALL)
def test_command_works(name, command):
    assert trouble(command) == "", f"{name}: {command}"


def test_commands_are_found():
    readme = [command for name, command in ALL if name == "README.md"]
    assert {"make lessons", "make test"} <= set(readme)
    assert sum(" forecast " in command for command in readme) >= 2
    assert len(ALL) > 20


@pytest.mark.parametrize(
    "command",
    ["make tests", "make", "python -m fitcast forecst", "fitcast forecst",
     ".venv/bin/pre-commit instal", "conda env create -f env.yml", "python -m tools.no_such",
     "sudo rm x"],
)  # fmt: skip
def test_planted_command_is_caught(command):
    assert trouble(command) != ""


@pytest.mark.slow
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


WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def runs(workflow: dict) -> list[str]:
    """The lines of a workflow that are commands of this repository."""
    lines = []
    for job in workflow["jobs"].values():
        include = job.get("strategy", {}).get("matrix", {}).get("include", [])
        steps = [step.get("run", "") for step in job["steps"]]
        lines += [each["run"] for each in include] + "\n".join(steps).splitlines()
    return [line for line in lines if re.match(r"make |\.ci/run|\.venv", line)]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_exists(path):
    found = runs(yaml.safe_load(path.read_text("utf-8")))
    assert found and [trouble(line.removesuffix(" || true")) for line in found] == [""] * len(found)


def test_ci_runs_what_readme_says_and_the_rest_runs_every_night():
    (command,) = [line for line in text(".ci/run").splitlines() if line.startswith("make ")]
    assert command.removesuffix(" </dev/null") == "make lint test"
    assert "`make lint test`" in text("README.md") + text("CONTRIBUTING.md")
    every_night = {
        "engine": "make test-all",
        "browser": "make test-browser",
        "colab": "make test-colab",
        "site": "make site test-site",
        "package": "make package",
    }
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text("utf-8"))
        when = workflow[True]  # YAML reads the key `on` as true
        if path.stem == "ci":
            assert runs(workflow) == [".ci/run"]
            assert when["push"] == {"branches": ["main"]}, "a pull request has its own run"
        else:
            days = "1" if path.stem == "drift" else r"\*"
            assert re.fullmatch(rf"\d+ \d+ \* \* {days}", when["schedule"][0]["cron"])
        if path.stem in every_night:
            assert runs(workflow) == [every_night[path.stem]]
            for pattern in when["pull_request"]["paths"]:
                assert (ROOT / pattern.removesuffix("/**")).exists(), pattern


def test_licence_and_citation_agree():
    licence, citation = text("LICENSE"), yaml.safe_load(text("CITATION.cff"))
    assert licence.startswith("MIT License") and "CC BY 4.0" in licence
    assert citation["cff-version"] == "1.2.0"
    assert "license" not in citation, "a list would let a reader choose; each part has its own"
    assert citation["license-url"] == stamp.facts().page("LICENSE")
    assert citation["title"].startswith(text("README.md").splitlines()[0].removeprefix("# "))
    assert citation["authors"][0]["name"].removeprefix("The ") in licence
