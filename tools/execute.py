"""Author's tool: make the committed `.ipynb` of each lesson from its `.py`, and run it.

python -m tools.execute         # all lessons
python -m tools.execute 01 07   # these
"""

import os
import sys
import time

import nbformat

from tools.notebooks import LessonError, clean, execute, from_script, lesson_scripts


def main(numbers: list[str]) -> int:
    # What is committed is a CPU's, which every machine can make again; `make lessons` uses a GPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        scripts = lesson_scripts(numbers)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    failed = 0
    for script in scripts:
        notebook = from_script(script)
        print(f"{script.stem}: {len(notebook.cells)} cells ... ", end="", flush=True)
        start = time.perf_counter()
        try:
            execute(notebook, script.parent)
        except LessonError as error:
            print(f"not written, {error}\n")
            failed += 1
            continue
        clean(notebook)
        nbformat.write(notebook, script.with_suffix(".ipynb"))
        print(f"{time.perf_counter() - start:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
