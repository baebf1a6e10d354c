"""JupyterLab on a copy of the lessons, and one notebook in it, used as a learner uses it."""

import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import nbformat
from playwright.sync_api import Locator, Page, expect

from tools.notebooks import ENVIRONMENT, LESSONS

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update",
         "--disable-dev-shm-usage")  # fmt: skip
TOKEN = "browser-tests"
START_SECONDS = 90
# What a machine without a network draws for the Colab badge, the one picture that a lesson fetches.
BADGE = "<svg xmlns='http://www.w3.org/2000/svg' width='117' height='20'/>"
# A Playwright selector takes no quotation from the page: cells are found by their number.
CELL, PROMPT = ".jp-Notebook .jp-Cell", ".jp-InputArea-prompt"


def find_browser(environment: Mapping[str, str] = os.environ) -> str:
    """The browser's path: CHROMIUM, else the first known name on the path."""
    asked = environment.get("CHROMIUM")
    names = [asked] if asked else BROWSERS
    found = next(filter(None, (shutil.which(n, path=environment.get("PATH")) for n in names)), None)
    if not found:
        raise ValueError(
            f"CHROMIUM must name a browser, got {asked or 'nothing'}"
            f"{'' if asked else ', and found no ' + ' or '.join(BROWSERS)}; "
            "install Chromium or Chrome (Debian: `apt-get install chromium`), "
            "or set CHROMIUM to its path"
        )
    return found


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """JupyterLab on a free port, with nothing of the user's; its address.

    Args:
        folder: Gets a copy of the lessons and everything that JupyterLab writes.
    """
    unwanted = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    shutil.copytree(LESSONS, folder / "lessons", ignore=unwanted)
    # Otherwise the first start asks whether it may fetch news.
    news = folder / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    places = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
              "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data",
              "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython"}  # fmt: skip
    environment = {**os.environ, **ENVIRONMENT, "JUPYTER_TOKEN": TOKEN}
    environment |= {name: str(folder / place) for name, place in places.items()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
               "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
               f"--ServerApp.root_dir={folder}"]  # fmt: skip
    log = folder / "server.log"
    with log.open("w") as written:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=written,
                                  stderr=subprocess.STDOUT)  # fmt: skip
        try:
            _wait_for(f"http://127.0.0.1:{port}/api/status?token={TOKEN}", server, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()  # shuts its kernels down, too
            server.wait(30)


def _wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:  # not listening yet
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start within {START_SECONDS} s:\n{log.read_text()}")


class Notebook:
    """A notebook in JupyterLab, and what the browser complained about meanwhile.

    Args:
        page: An empty one; closed with its context by who made it.
        address: The server's.
        path: The notebook's.
        patience_seconds: The longest that all its cells may run.
    """

    def __init__(self, page: Page, address: str, path: Path, patience_seconds: float):
        self.page, self.path, self.patience_ms = page, path, 1000 * patience_seconds
        self.complaints: list[str] = []
        self.foreign: set[str] = set()
        page.set_default_timeout(30_000)
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))
        page.route(re.compile(rf"^https?://(?!{re.escape(address[7:])}/)"), self._elsewhere)
        # In a workspace of its own: else JupyterLab opens beside it what was open last.
        page.goto(f"{address}/lab/workspaces/{path.stem}/tree/lessons/{path.name}?token={TOKEN}")
        self.cells = page.locator(CELL)
        expect(self.cells).to_have_count(len(self.stored().cells), timeout=60_000)
        self.wait_until_idle()

    def _said(self, message) -> None:
        if message.type == "error":
            self.complaints.append(f"console: {message.text} ({message.location.get('url')})")

    def _elsewhere(self, route) -> None:
        self.foreign.add(route.request.url)
        route.fulfill(body=BADGE, content_type="image/svg+xml")

    def stored(self) -> nbformat.NotebookNode:
        """The file, as last saved."""
        return nbformat.read(self.path, as_version=4)

    def menu(self, *path: str) -> None:
        """Click through the menu bar."""
        for level, name in enumerate(path):
            label = ".lm-Menu-itemLabel" if level else ".lm-MenuBar-itemLabel"
            self.page.locator(label).get_by_text(name, exact=True).click()

    def wait_until_idle(self) -> None:
        """No cell waits or runs, and none did a second ago.

        The status bar says "Idle" between two cells as well; a prompt gets its number when its cell
        starts, and the file knows it only after the reply.
        """
        idle = self.page.locator("#jp-bottom-panel").get_by_text("| Idle")
        waiting = self.page.locator(f"{CELL} {PROMPT}", has_text="*")
        for _ in range(2):
            expect(waiting).to_have_count(0, timeout=self.patience_ms)
            expect(idle).to_be_visible(timeout=self.patience_ms)
            self.page.wait_for_timeout(1000)

    def run_all(self) -> None:
        """Run > Run All Cells, to the end."""
        last = self.code_cells()[-1]
        self.menu("Run", "Run All Cells")
        # The stored numbers stand there until the cells are queued.
        expect(self.prompt(last)).to_contain_text("*")
        self.wait_until_idle()

    def save(self) -> nbformat.NotebookNode:
        """Control-S, and the file that it wrote."""
        before = self.path.stat().st_mtime_ns
        self.page.keyboard.press("Control+s")
        deadline = time.monotonic() + 60
        while self.path.stat().st_mtime_ns == before:
            assert time.monotonic() < deadline, "nothing was saved within 60 s"
            self.page.wait_for_timeout(200)
        self.page.wait_for_timeout(500)  # the server writes in more than one go
        return self.stored()

    def code_cells(self) -> list[int]:
        """Numbers of the code cells, from 0, among all cells."""
        return [n for n, cell in enumerate(self.stored().cells) if cell.cell_type == "code"]

    def prompt(self, number: int) -> Locator:
        """What stands to the left of a cell: `[3]:`."""
        return self.cells.nth(number).locator(PROMPT)

    def write(self, number: int, source: str) -> None:
        """Replace a cell's text, as pasted."""
        editor = self.cells.nth(number).locator(".cm-content")
        editor.scroll_into_view_if_needed()
        editor.click()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.insert_text(source)

    def run_from(self, number: int, cells: int) -> None:
        """Shift-Enter, as many times, in the cell where the cursor is; to the end."""
        last = self.prompt(number + cells - 1)
        before = last.text_content()
        for _ in range(cells):
            self.page.keyboard.press("Shift+Enter")
        expect(last).not_to_have_text(before)
        self.wait_until_idle()

    def figures(self) -> list[dict]:
        """Whether each figure is drawn, and no wider than its cell."""
        return self.page.locator(".jp-OutputArea-output img").evaluate_all("""all => all.map(e => ({
            source: e.src.slice(0, 60), fits: e.naturalWidth > 0 && e.getBoundingClientRect().right
                <= e.closest('.jp-Cell').getBoundingClientRect().right + 1}))""")

    def photograph(self, folder: Path) -> int:
        """Save the notebook as pictures, one below the other; how many there are."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        scroller = self.page.locator(".jp-WindowedPanel-outer:visible")
        size = self.page.viewport_size
        self.page.set_viewport_size({"width": 1100, "height": 2000})
        self.page.keyboard.press("Control+b")  # hides the list of files
        scroller.evaluate("e => { e.scrollTop = 0 }")
        for shots in itertools.count(1):
            self.page.wait_for_timeout(500)  # what comes into sight is rendered
            scroller.screenshot(path=folder / f"{shots:02}.png")
            if scroller.evaluate("""e => {
                const before = e.scrollTop;
                e.scrollTop += e.clientHeight;
                return e.scrollTop === before; }"""):
                break
        self.page.keyboard.press("Control+b")
        self.page.set_viewport_size(size)
        return shots

    def close(self) -> None:
        """Shut its kernel down, then leave."""
        self.menu("Kernel", "Shut Down Kernel")
        self.page.locator("#jp-bottom-panel").get_by_text("No Kernel").wait_for()
        self.page.close()

    def output(self, number: int) -> str:
        """The text below a cell."""
        found = self.cells.nth(number).locator(".jp-OutputArea-output")
        return found.text_content()  # inner_text() is empty where the cell is out of sight
