"""Lessons as files: where they are, how one is read, executed and made ready to commit."""

import asyncio
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jupytext
import nbformat
from jupytext.combine import combine_inputs_with_outputs
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from tools import preloaded as preloading
from tools.surroundings import ENVIRONMENT, ROOT

LESSONS = ROOT / "lessons"
CELL_TIMEOUT_SECONDS = 300  # the longest, a training, takes a quarter of it on one core

METADATA = {
    "accelerator": "GPU",
    "colab": {"gpuType": "T4", "provenance": []},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
WIDGET = "application/vnd.jupyter.widget-view+json"


class LessonError(Exception):
    """A cell failed: the message shows its source and the error."""


def lesson_scripts(numbers: Sequence[str] = ()) -> list[Path]:
    """The `.py` of each lesson, in order; of the given numbers (`"01"`) only, if any are given."""
    scripts = sorted(LESSONS.glob("[0-9][0-9]_*.py"))
    known = {path.name[:2]: path for path in scripts}
    for number in numbers:
        if number not in known:
            raise ValueError(
                f"LESSON must be one of {', '.join(known) or '(none yet)'}, got {number!r}; "
                "give the two digits that the file name starts with"
            )
    return [known[number] for number in numbers] if numbers else scripts


def from_script(script: Path) -> NotebookNode:
    """The lesson's notebook without outputs; cells that the committed one has keep their id."""
    notebook = jupytext.read(script)
    committed = script.with_suffix(".ipynb")
    for cell in notebook.cells:
        cell.id = "new"
    if committed.exists():
        notebook = combine_inputs_with_outputs(notebook, nbformat.read(committed, as_version=4))
    taken = {cell.id for cell in notebook.cells}
    for number, cell in enumerate(notebook.cells):
        if cell.id == "new":
            while cell.id in taken:
                cell.id = hashlib.sha256(f"{number} {cell.id}".encode()).hexdigest()[:8]
            taken.add(cell.id)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def execute(
    notebook: NotebookNode,
    folder: Path,
    kernel: str = "python3",
    environment: Mapping[str, str] | None = None,
    preloaded: bool = False,
) -> None:
    """Run all cells in place, in a fresh kernel that starts in `folder`, as a learner's does.

    Args:
        notebook: Gets its outputs; on failure, those up to the failing cell.
        folder: The kernel's working directory.
        kernel: Which of Jupyter's kernels.
        environment: The kernel's environment variables; if not given, this process's and those
            of `ENVIRONMENT`.
        preloaded: Start from a process that has imported the libraries (tools/preloaded.py), where
            that is possible.

    Raises:
        LessonError: A cell raised without the tag `raises-exception`, ran too long, or took the
            kernel down with it.
    """
    running = {}

    def started(cell: NotebookNode, cell_index: int) -> None:
        running.update(cell=cell, number=cell_index + 1)

    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_SECONDS,
        kernel_name=kernel,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # no notice that the kernel listens on localhost
        on_cell_execute=started,
    )
    surroundings = {**os.environ, **ENVIRONMENT} if environment is None else dict(environment)
    if preloaded and preloading.possible(surroundings):
        client.kernel_manager_class = preloading.ForkedKernelManager
    try:
        asyncio.run(client.async_execute(env=surroundings))  # in any thread
    except CellExecutionError as error:
        raised = [out for out in running["cell"].outputs if out.output_type == "error"]
        what = "\n".join(raised[-1].traceback) if raised else f"{error.ename}: {error.evalue}"
        raise LessonError(_report(running, _plain(what))) from error
    except CellTimeoutError as error:
        what = f"still running after {CELL_TIMEOUT_SECONDS} s"
        raise LessonError(_report(running, what)) from error
    except DeadKernelError as error:
        raise LessonError(_report(running, "the kernel died in this cell")) from error


def _report(running: dict, what: str) -> str:
    source = "\n".join(f"    {line}" for line in running["cell"].source.splitlines())
    return f"cell {running['number']} failed\n\n{source}\n\n{what.strip()}"


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def clean(notebook: NotebookNode) -> None:
    """Leave in the notebook what a reader needs and nothing that a machine put there."""
    notebook.metadata = NotebookNode(METADATA)
    notebook.nbformat_minor = 5
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = NotebookNode(tags=tags) if tags else NotebookNode()
        for output in cell.get("outputs", []):
            if "data" in output and len(output.data) > 1:
                output.data.pop(WIDGET, None)  # its state is not stored: show the fallback
            if output.output_type == "error":
                # A failure shown on purpose: our frames tell the story, the libraries' do not.
                ours = [part for part in output.traceback if "site-packages" not in part]
                output.traceback = [part.replace(f"{ROOT}{os.sep}", "") for part in ours]
