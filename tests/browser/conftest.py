"""One browser and one JupyterLab for the run; each lesson opened and run once, then looked at."""

import time
from collections import defaultdict

import pytest

from tools.notebooks import ROOT, lesson_scripts

try:
    from playwright.sync_api import sync_playwright
except ImportError as missing:
    raise pytest.UsageError("playwright is not installed; `make test-browser` does it") from missing

from .jupyterlab import FLAGS, Notebook, find_browser, serve

PICTURES = ROOT / "build/browser"
# A lesson's cells may run as long in all, on two busy cores.
PATIENCE_SECONDS = {"03": 900, "07": 1500}
DEFAULT_PATIENCE_SECONDS = 600
SECONDS = defaultdict(dict)


def pytest_addoption(parser):
    parser.addoption("--lesson", default="", help="two digits: this lesson only")


def pytest_configure(config):
    try:
        find_browser()
        lesson_scripts(config.getoption("lesson").split())
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc):
    if "lesson" in metafunc.fixturenames:
        scripts = lesson_scripts(metafunc.config.getoption("lesson").split())
        metafunc.parametrize("lesson", scripts, indirect=True, scope="module",
                             ids=[script.name[:2] for script in scripts])  # fmt: skip


def pytest_terminal_summary(terminalreporter):
    for number, spent in sorted(SECONDS.items()):
        steps = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in spent.items())
        terminalreporter.write_line(f"lesson {number}: {steps}")


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """The address of JupyterLab, and the folder in which it sees a copy of the lessons."""
    folder = tmp_path_factory.mktemp("lab")
    with serve(folder) as address:
        yield address, folder / "lessons"


@pytest.fixture(scope="session")
def open_notebook(browser, lab):
    """A function that opens a notebook of the copy, by its file name, in a page of its own."""
    address, folder = lab

    def opened(name: str, patience_seconds: float = DEFAULT_PATIENCE_SECONDS) -> Notebook:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        return Notebook(page, address, folder / name, patience_seconds)

    return opened


@pytest.fixture(scope="module")
def lesson(request, open_notebook):
    """A lesson after Run All Cells; its `number` are the digits that it starts with."""
    name = request.param.with_suffix(".ipynb").name
    number = name[:2]
    began = time.monotonic()
    notebook = open_notebook(name, PATIENCE_SECONDS.get(number, DEFAULT_PATIENCE_SECONDS))
    opened = time.monotonic()
    notebook.number = number
    notebook.run_all()
    ran = time.monotonic()
    SECONDS[number] |= {"open": opened - began, "run": ran - opened}
    yield notebook
    SECONDS[number]["tests"] = time.monotonic() - ran
    notebook.close()
