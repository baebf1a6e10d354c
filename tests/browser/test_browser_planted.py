"""What the tests of the lessons look for, planted in a notebook: each fault is found."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from . import controls
from .controls import Explorer
from .test_browser import failures

CELLS = [
    "import base64, io\n"
    "import ipywidgets\n"
    "from IPython.display import HTML, Javascript\n"
    "from PIL import Image\n"
    "from course_utils.figures import widgets\n"
    "from course_utils.figures.base import Figure\n"
    "def png(width, colour):\n"
    "    file = io.BytesIO()\n"
    "    Image.new('RGB', (width, 40), colour).save(file, 'png')\n"
    "    return file.getvalue()\n"
    "def draw(stuck, words, both, menu):\n"
    "    return Figure(png(100 + both, 'black'), f'{words}, {both}, {menu}')",
    "explorer = widgets.Explorer(draw, stuck=(1, 2), words=(1, 2), both=(1, 2), menu=('a', 'b'))\n"
    "menu = ipywidgets.Dropdown(options=['a', 'b'], description='menu')\n"
    "ipywidgets.link((menu, 'value'), (explorer.controls['menu'], 'value'))\n"
    "explorer.box.children = [*explorer.box.children[:3], menu, explorer.box.children[-1]]\n"
    "explorer",
    "picture = base64.b64encode(png(10, 'black')).decode()\n"
    "HTML(f\"<img style='width: 5000px; max-width: none' src='data:image/png;base64,{picture}'>\")",
    "HTML('<img src=\"data:image/png;base64,planted\">')",
    "HTML('<img src=\"https://example.org/pixel.svg\">')",
    "Javascript('console.error(\"planted\")')",
    "'this one promises to raise'",
    "missing + 1",
    "'and this one is not reached'",
]


@pytest.fixture(scope="module")
def planted(lab, open_notebook):
    notebook = new_notebook(cells=[new_code_cell(source) for source in CELLS])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    notebook.cells[6].metadata.tags = ["raises-exception"]
    nbformat.write(notebook, lab[1] / "99_planted.ipynb")
    opened = open_notebook("99_planted.ipynb")
    opened.run_all()
    yield opened
    opened.close()


def test_cells_that_fail_or_do_not_run_are_found(planted):
    order, promised, failed = failures(planted)
    assert order.startswith("not every cell ran, once, in order: [1, 2, 3, 4, 5, 6, 7, 8, None]")
    assert promised == "\"'this one promises to raise'\" raised nothing"
    assert failed == "'missing + 1' raised ['NameError']"


def test_controls_that_nothing_follows_are_found(planted, monkeypatch):
    monkeypatch.setattr(controls, "REDRAWN_SECONDS", 2)
    box = planted.page.locator(".jupyter-widgets.widget-vbox")
    found = [said.split(": ") for said in Explorer(planted.page, box).complaints()]
    assert [(what, said.split(" stay")[0]) for what, said, *_ in found] == [
        ("stuck, by keyboard", "the words"), ("words, by keyboard", "the picture"),
        ("menu, by keyboard", "the words"),  # JupyterLab takes a menu's arrow keys
        ("stuck, by mouse", "the words"), ("words, by mouse", "the picture"),
        ("menu, by mouse", "the picture"),
    ]  # fmt: skip


def test_pictures_too_wide_or_not_drawn_are_found(planted):
    fits = [figure["fits"] for figure in planted.figures()]
    assert fits == [True, False, False, True]


def test_what_the_console_says_and_who_is_asked_is_found(planted):
    assert any(said.startswith("console: planted") for said in planted.complaints)
    assert planted.foreign == {"https://example.org/pixel.svg"}
