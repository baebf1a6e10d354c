"""Every committed notebook under nbval: the tool that an instructor's CI or a reader would use.

`make test` compares the same cells by an execution that it shares with `make lessons`
(tools/reproduce.py); here nbval runs each notebook itself, each night.
"""

import os
import re
import subprocess
import sys

import nbformat
import pytest

from tools.notebooks import ROOT, lesson_scripts
from tools.surroundings import ENVIRONMENT


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("script", lesson_scripts(), ids=lambda script: script.stem)
def test_nbval_finds_every_output_again(script):
    path = script.with_suffix(".ipynb")
    command = [sys.executable, "-m", "pytest", "--quiet", "--nbval", "--nbval-current-env"]
    command += ["--nbval-cell-timeout=600", "-p", "no:cacheprovider", "--color=no"]
    # Notebooks are held to their outputs, not to this test run's options and warning filters.
    command += ["-o", "addopts=", "-o", "filterwarnings=", str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | ENVIRONMENT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cells = nbformat.read(path, as_version=4).cells
    n_code = sum(cell.cell_type == "code" and bool(cell.source.strip()) for cell in cells)
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) == n_code > 0
