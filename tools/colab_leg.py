"""The course as a Colab runtime sees it, on its packages: set-up cell, tests, scripts, lessons.

    python -m tools.colab_leg         # all lessons; then verified.json says when and with what
    python -m tools.colab_leg 01 07   # these

Makes `.venv-colab` from constraints-colab.txt, with `python3.13` (Colab's) when there is one. Works
in an empty folder, on a clone of the last commit that answers to the course's public address.
Not the same as on Colab: the GPU, torch's CUDA build where the CPU wheel is installed, and the
packages that no lesson touches.
"""

import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from course_utils.topics import welcome
from fitcast.training import versions
from tools import stamp
from tools.notebooks import ENVIRONMENT, ROOT, LessonError, clean, execute, lesson_scripts
from tools.reproduce import differences

HOME = ROOT / ".venv-colab"
PYTHON = HOME / "bin" / "python"
PINS = ROOT / "constraints-colab.txt"
KERNEL = "colab"
# Controls under ipywidgets 7, what torch counts, forecasts.
TESTS = ("course_utils/figures/test_widgets.py", "fitcast/memory/test_flops.py",
         "fitcast/forecasting/test_forecast.py::test_other_packages_forecast_the_same",
         "fitcast/forecasting/test_forecast.py::test_events_of_a_step_are_those_of_the_gpu",
         "course_utils/topics/test_recorded.py::test_who_holds_what_is_as_forecast")  # fmt: skip
SCRIPT = "lessons/test_in_your_script.py::test_it_runs[{}]"  # what a lesson gives to take home
# What `pip install trl`, which the scripts ask for, adds and raises on Colab's packages.
WITH_TRL = ("trl==1.16.0", "datasets==5.2.0", "huggingface_hub==1.33.0", "pyarrow==26.0.1")
# Beside the packages, not among them. Named as theirs: dill pickles modules that lie elsewhere.
TRL = HOME / WITH_TRL[0] / "site-packages"
SEEN = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "numpy",
        "matplotlib", "ipywidgets")  # fmt: skip
# What a lesson rightly shows otherwise on Colab, here and there, and why.
OTHERWISE = {
    "04_half_the_bits": {  # autocast lists rms_norm after torch 2.11
        "rms_norm         float32    float32    float32    float16   ":
        "rms_norm         float32    float32    float16    float16   ",
    },
    "06_what_does_the_usual_recipe_waste": {  # transformers renames it after 5.15
        "renamed  gradient_checkpointing=True                activation_checkpointing=True":
        "works    gradient_checkpointing=True",
        "5 of 13 just work": "6 of 13 just work",
        # The same peak; other temporaries of PyTorch 2.11 leave another gap.
        "12.40 GiB, reserved up to 15.47 GiB": "12.40 GiB, reserved up to 15.52 GiB",
    },
    "07_qlora_on_a_t4": {
        # What a hosted lesson leaves behind is to be found again.
        "chat_template.jinja ...\nmerged":
        "chat_template.jinja ...\nin /content/lesson_07_xxxxxxxx/adapter\nmerged",
        "model.safetensors ...\n":
        "model.safetensors ...\nin /content/lesson_07_xxxxxxxx/merged\n",
    },
    "08_beyond_one_gpu": {  # PEFT 0.20 runs its model's forward past the model's hooks
        "_log_softmax_backward_data.default in base_model.model\n":
        "_log_softmax_backward_data.default in base_model\n",
    },
}  # fmt: skip
# Runs the set-up cell twice in one process that has already imported what Colab imports for its
# user, and tells what that did to the packages: a restart would be needed if one of them moved.
PROBE = """
import contextlib, io, json, subprocess, sys
import ipywidgets, matplotlib, numpy, torch, transformers

def freeze():
    command = [sys.executable, "-m", "pip", "freeze"]
    return sorted(subprocess.run(command, capture_output=True, text=True).stdout.split("\\n"))

cell = compile(open(sys.argv[1]).read(), "set-up cell", "exec")
told, frozen = [], [freeze()]
for _ in range(2):
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        exec(cell, {})
    told.append(shown.getvalue())
    frozen.append(freeze())
import bitsandbytes, course_utils
print(json.dumps({"told": told, "frozen": frozen, "path": sys.path,
                  "course_utils": course_utils.__file__, "bitsandbytes": bitsandbytes.__version__}))
"""


class LegError(Exception):
    """Something is not on Colab as the course promises; the message says what."""


def interpreter() -> str:
    """Colab's Python if this machine has it, else the one that runs this."""
    try:
        subprocess.run(["python3.13", "--version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return sys.executable
    return "python3.13"


def set_up() -> None:
    """`.venv-colab` with exactly the listed packages, made anew when the list changed."""
    ready = HOME / f"ready-{hashlib.sha256(PINS.read_bytes()).hexdigest()[:12]}"
    pip = [PYTHON, "-m", "pip", "--disable-pip-version-check"]
    if not ready.exists():
        print(f"Making {HOME.name} with {interpreter()} (some minutes)", flush=True)
        subprocess.run([interpreter(), "-m", "venv", "--clear", HOME], check=True)
        subprocess.run([*pip, "install", "--quiet", "--requirement", PINS], check=True)
        ready.touch()
    if not TRL.exists():
        apart = ["--no-deps", "--target", TRL]
        subprocess.run([*pip, "install", "--quiet", *apart, *WITH_TRL], check=True)
    uninstall = [*pip, "uninstall", "--yes", "bitsandbytes"]  # left there by an earlier run
    subprocess.run(uninstall, check=True, capture_output=True)


def surroundings(origin: Path, now: stamp.Facts) -> dict[str, str]:
    """Environment of a Colab runtime whose GitHub is `origin`."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return inherited | ENVIRONMENT | {
        welcome.COLAB_VARIABLE: "release-colab",
        "CUDA_VISIBLE_DEVICES": "",  # the outputs to compare with are a CPU's
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{origin.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": now.repository,
        "GIT_TERMINAL_PROMPT": "0",
    }  # fmt: skip


def publish(folder: Path, now: stamp.Facts, source: Path = ROOT) -> Path:
    """A bare clone of the last commit, with the tag that the set-up cell asks for."""
    origin = folder / "origin.git"
    subprocess.run(["git", "clone", "--quiet", "--bare", source, origin], check=True)
    subprocess.run(["git", "-C", origin, "tag", "--force", now.tag], check=True,
                   capture_output=True)  # fmt: skip
    return origin


def run_set_up_cell(folder: Path, environment: dict[str, str], now: stamp.Facts) -> None:
    """One install, nothing upgraded, a second run that does nothing, no restart.

    Raises:
        LegError: One of these does not hold.
    """
    cell = folder.parent / "set_up_cell.py"
    cell.write_text(now.setup, "utf-8")
    done = subprocess.run(
        [PYTHON, "-c", PROBE, cell], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise LegError(f"the set-up cell failed\n{done.stdout}{done.stderr}")
    for complaint in complaints(json.loads(done.stdout.splitlines()[-1]), folder, now):
        raise LegError(complaint)


def complaints(probe: dict, folder: Path, now: stamp.Facts) -> list[str]:
    """What the probe found that should not be."""
    before, after, again = map(set, probe["frozen"])
    wanted = {f"bitsandbytes=={now.bitsandbytes}"}
    found = []
    if after - before != wanted or before - after:
        found.append(f"installs {sorted(after - before)} for {sorted(before - after)}, "
                     f"not {wanted} and nothing else")  # fmt: skip
    if again != after:
        found.append(f"a second run changes packages: {sorted(again ^ after)}")
    if len(set(probe["told"])) != 1 or not probe["told"][0].startswith(welcome.banner()):
        found.append(f"two runs say {probe['told']}, not twice the banner")
    if not probe["course_utils"].startswith(str(folder / "course")):
        found.append(f"course_utils comes from {probe['course_utils']}, not from the clone")
    if len(probe["path"]) != len(set(probe["path"])):
        found.append(f"a second run adds to sys.path: {probe['path']}")
    return found


def add_kernel(folder: Path) -> Path:
    """A folder for JUPYTER_PATH with the kernel of `.venv-colab`."""
    spec = folder / "jupyter" / "kernels" / KERNEL / "kernel.json"
    spec.parent.mkdir(parents=True)
    argv = [str(PYTHON), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": argv, "display_name": KERNEL, "language": "python"}))
    return folder / "jupyter"


def texts(notebook: NotebookNode) -> Iterator[tuple[dict, str]]:
    """What its cells show as text, printed or folded away: the part of an output, and its key."""
    for cell in notebook.cells:
        for out in cell.get("outputs", []):
            for part in (out, out.get("data", {})):
                yield from ((part, kind) for kind in ("text", "text/html") if kind in part)


def name_folder(notebook: NotebookNode, content: Path) -> None:
    """Call a folder that a lesson made for itself in `content` as on Colab, whatever its end."""
    made = re.compile(rf"{re.escape(str(content.resolve()))}/(lesson_\d\d_)\w{{8}}\b")
    for part, kind in texts(notebook):
        part[kind] = made.sub(r"/content/\g<1>xxxxxxxx", part[kind])


def as_on_colab(lesson: str, folder: Path) -> Path:
    """A copy of the clone's notebook that expects what its cells say on a Colab CPU.

    Raises:
        LegError: The lesson no longer shows what `OTHERWISE` says of it.
    """
    committed = folder / "course" / "lessons" / f"{lesson}.ipynb"
    notebook = nbformat.read(committed, as_version=4)
    (said,) = [out for cell in notebook.cells for out in cell.get("outputs", [])
               if out.get("text", "").startswith(welcome.banner())]  # fmt: skip
    said.text = f"{welcome.banner()}\n{welcome.NO_GPU}\n"
    for here, there in OTHERWISE.get(lesson, {}).items():
        places = [(part, kind) for part, kind in texts(notebook) if here in part[kind]]
        if sum(part[kind].count(here) for part, kind in places) != 1:
            raise LegError(f"{lesson} does not show {here!r} once: mend OTHERWISE")
        ((part, kind),) = places
        part[kind] = part[kind].replace(here, there)
    copy = folder / committed.name
    nbformat.write(notebook, copy)
    return copy


def run_lesson(expected: Path, environment: dict[str, str]) -> int:
    """Number of code cells, all of which reproduced on Colab's packages.

    Raises:
        LegError: A cell failed or shows something else.
    """
    notebook = nbformat.read(expected, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    try:
        execute(notebook, expected.parent, KERNEL, environment)
    except LessonError as error:
        raise LegError(f"{expected.stem}: {error}") from error
    clean(notebook)
    name_folder(notebook, expected.parent)
    if found := differences(nbformat.read(expected, as_version=4), notebook):
        raise LegError("\n\n".join([f"{expected.stem} differs", *found]))
    return sum(cell.cell_type == "code" for cell in notebook.cells)


def run_tests(
    names: Sequence[str], folder: Path, environment: dict[str, str], more: Sequence[Path] = ()
) -> int:
    """Number of the clone's tests of these names, all of which passed on Colab's packages.

    Args:
        names: Files in tests/, or files, `::` and a test.
        folder: Where the clone is.
        environment: Of a Colab runtime.
        more: Folders with packages that come before Colab's.

    Raises:
        LegError: One of them failed, or was skipped.
    """
    tests = [folder / "course" / "tests" / name for name in names]
    command = [PYTHON, "-m", "pytest", "--quiet", "--color=no", "-c", os.devnull]
    command += ["--disable-warnings", "-p", "no:cacheprovider", "--rootdir", folder, *tests]
    path = os.pathsep.join(map(str, [folder / "course", *more]))
    done = subprocess.run(command, cwd=folder, env=environment | {"PYTHONPATH": path},
                          capture_output=True, text=True)  # fmt: skip
    passed = re.search(r"(\d+) passed", done.stdout)
    if done.returncode or not passed or " skipped" in done.stdout:
        raise LegError(f"tests fail\n{done.stdout}{done.stderr}")
    return int(passed[1])


def checks(
    scripts: Sequence[Path], folder: Path, environment: dict[str, str]
) -> Iterator[tuple[str, Callable[[], str]]]:
    """What is checked after the set-up cell: its name, and how, which says what passed."""
    yield "tests", lambda: f"{run_tests(TESTS, folder, environment)} pass"
    taken_home = [SCRIPT.format(script.name[:2]) for script in scripts]
    yield "scripts", lambda: f"{run_tests(taken_home, folder, environment, [TRL])} run"
    for script in scripts:
        yield (
            script.stem,
            lambda stem=script.stem: f"{run_lesson(as_on_colab(stem, folder), environment)} cells",
        )


def write_record(path: Path = versions.PATH) -> None:
    """Today's date and the versions of both sides, for the line that every lesson prints."""
    sides = {}
    for side, pins in (("pins", ROOT / "requirements.lock"), ("colab", PINS)):
        known = dict(re.findall(r"^([\w-]+)==(\S+)", pins.read_text("utf-8"), re.MULTILINE))
        sides[side] = {name: known[name] for name in SEEN if name in known}
    (image,) = re.findall(r"image of (\d{4}-\d\d-\d\d)", PINS.read_text("utf-8"))
    record = {"date": datetime.date.today().isoformat(), "colab_image": image, **sides}
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def main(numbers: list[str]) -> int:
    try:
        scripts = lesson_scripts(numbers)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    set_up()
    now, failed = stamp.facts(), []
    base = Path(tempfile.mkdtemp(prefix="colab-"))
    try:
        folder = base / "content"
        folder.mkdir()
        environment = surroundings(publish(base, now), now)
        run_set_up_cell(folder, environment, now)
        print(f"set-up cell: installs bitsandbytes {now.bitsandbytes} and nothing else", flush=True)
        os.environ["JUPYTER_PATH"] = str(add_kernel(base))
        for name, check in checks(scripts, folder, environment):
            start = time.perf_counter()
            try:
                said = check()
            except LegError as error:
                failed.append(str(error))
                said = "FAILED"
            print(f"{name}: {said}, {time.perf_counter() - start:.1f} s", flush=True)
    except LegError as error:
        failed.append(str(error))
    finally:
        shutil.rmtree(base)
    if failed:
        print("\n\n".join(failed), file=sys.stderr)
    elif not numbers:
        write_record()
        print(f"{versions.PATH.relative_to(ROOT)} is of today; now make stamp")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
