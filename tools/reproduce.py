"""A lesson, executed once for `make lessons` and `make test`, and held against what is committed.

    python -m tools.reproduce         # all lessons, two at a time; says where one differs
    python -m tools.reproduce 01 07   # these

An execution is kept in build/executed/ under a checksum of all that can change an output: the
lesson's `.py`, both packages with their data, this tool, Python, every installed version, and
whether there is a GPU to see. While none of them changes, whoever asks next gets it without a run.
Not compared: pictures (fonts differ from machine to machine; their words are compared), tracebacks
(what is raised is compared), and cells that carry a tag of `LOOSE`.
"""

import difflib
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from tools.notebooks import (
    ROOT,
    WIDGET,
    LessonError,
    clean,
    execute,
    from_script,
    lesson_scripts,
)

KEPT = ROOT / "build" / "executed"
AT_ONCE = 2
LOOSE = {"nbval-ignore-output", "nbval-skip"}
DRAWN = {"image/png", "image/jpeg"}
INLINE = re.compile(r"(?<=data:image/png;base64,)[\w+/=]+")


@dataclass(frozen=True)
class Execution:
    """One run of a lesson: its notebook with outputs, cleaned as the committed one is."""

    notebook: NotebookNode
    seconds: float
    failure: str = ""


def fingerprint(script: Path) -> str:
    """Checksum of everything that can change what the lesson shows."""
    found = hashlib.sha256()
    packages = (path for name in ("fitcast", "course_utils") for path in (ROOT / name).rglob("*"))
    tools = (
        ROOT / "tools" / name
        for name in ("notebooks.py", "preloaded.py", "surroundings.py", "reproduce.py")
    )
    ours = [script, *tools, *sorted(packages)]
    for path in ours:
        if path.is_file() and "__pycache__" not in path.parts:
            found.update(f"\n{path}\n".encode() + path.read_bytes())
    installed = sorted(
        {info.name for place in sys.path for info in Path(place).glob("*.dist-info")}
    )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not shutil.which("nvidia-smi")
    emulated = os.environ.get("COURSE_EMULATE_GPU", "")
    found.update(json.dumps([sys.version, installed, hidden, emulated]).encode())
    return found.hexdigest()


def executed(script: Path) -> Execution:
    """The lesson's run on this state of the repository: the kept one, or a new one in its folder.

    Returns:
        The execution; when a cell failed, with the notebook up to that cell, and not kept.
    """
    kept, key = KEPT / f"{script.stem}.json", fingerprint(script)
    if kept.exists():
        record = json.loads(kept.read_text("utf-8"))
        if record["key"] == key:
            return Execution(nbformat.from_dict(record["notebook"]), record["seconds"])
    notebook, failure, start = from_script(script), "", time.perf_counter()
    try:
        execute(notebook, script.parent, preloaded=True)
    except LessonError as error:
        failure = str(error)
    clean(notebook)
    done = Execution(notebook, time.perf_counter() - start, failure)
    if not failure:
        KEPT.mkdir(parents=True, exist_ok=True)
        written = kept.with_suffix(f".{os.getpid()}")  # a reader sees a whole file or the old one
        written.write_text(json.dumps(dict(key=key, seconds=done.seconds, notebook=notebook)))
        written.replace(kept)
    return done


def all_executed(scripts: Sequence[Path]) -> Iterator[tuple[Path, Execution]]:
    """The lessons' runs in order, `AT_ONCE` at a time (a kernel computes on one core)."""
    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        # The last lesson takes longest: begun last, it would leave the other core idle.
        begun = {script: pool.submit(executed, script) for script in reversed(scripts)}
        for script in scripts:
            yield script, begun[script].result()


def differences(committed: NotebookNode, now: NotebookNode) -> list[str]:
    """Where two runs of one lesson show something else, as a diff for each such cell."""
    before, after = ([cell for cell in side.cells if cell.cell_type == "code"]
                     for side in (committed, now))  # fmt: skip
    if len(before) != len(after):
        return [f"{len(before)} code cells are committed, {len(after)} ran: make execute"]
    found = []
    for number, (old, new) in enumerate(zip(before, after, strict=True), start=1):
        compared = not LOOSE & {*old.metadata.get("tags", []), *new.metadata.get("tags", [])}
        shown = [[_shown(output) for output in cell.outputs] for cell in (old, new)]
        if compared and shown[0] != shown[1]:
            lines = [json.dumps(side, indent=1, ensure_ascii=False).replace("\\n", "\n")
                     .splitlines() for side in shown]  # fmt: skip
            diff = difflib.unified_diff(*lines, "committed", "now", lineterm="", n=1)
            first = new.source.splitlines()[0] if new.source else "an empty cell"
            found.append("\n".join([f"code cell {number}, {first!r}, shows otherwise:", *diff]))
    return found


def _shown(output: NotebookNode) -> dict[str, object]:
    """What of an output is compared: all that a reader sees, a picture by its words."""
    match output.output_type:
        case "stream":
            return {output.name: output.text}
        case "error":
            return {output.ename: output.evalue}
        case kind:
            data = {mime: value for mime, value in output.data.items() if mime != WIDGET}
            return {kind: {mime: _words(mime, data[mime]) for mime in sorted(data)}}


def _words(mime: str, value: str) -> str:
    """One form of an output without what is drawn, which is part of HTML where it is folded."""
    return "drawn" if mime in DRAWN else INLINE.sub("drawn", value)


def complaints(script: Path, run: Execution) -> list[str]:
    """What is wrong with a lesson's run, held against its committed notebook."""
    if run.failure:
        return [run.failure]
    return differences(nbformat.read(script.with_suffix(".ipynb"), as_version=4), run.notebook)


def main(numbers: list[str]) -> int:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is committed is a CPU's
    wrong = 0
    for script, run in all_executed(lesson_scripts(numbers)):
        found = complaints(script, run)
        wrong += bool(found)
        print(f"{script.stem}: {'DIFFERS' if found else 'as committed'}, {run.seconds:.1f} s")
        print("\n".join(found))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
