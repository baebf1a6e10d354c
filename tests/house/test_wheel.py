"""The wheel: what `pip install .` brings, and that it works where the repository is not."""

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest
from packaging.requirements import Requirement

from tools.surroundings import ROOT

PACKAGES = ("fitcast", "course_utils")
# In a folder of its own, with the packages of the wheel and no repository in sight.
LEARNER = """
import sys
import course_utils, fitcast
from course_utils.exercises import lesson_01
from course_utils.topics import ladder
from fitcast import TrainRecipe, T4, forecast
from course_utils.data import BUNDLED

assert all(sys.prefix in package.__file__ for package in (course_utils, fitcast))
print(forecast(TrainRecipe(model=BUNDLED, sequence_length=128), T4).fits)
print(lesson_01.check_saved_numbers(lambda *widths: 1))
print(ladder.table(ladder.ladder()[:2]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy, so that nothing of an earlier build is in it."""
    source = tmp_path_factory.mktemp("wheel") / "source"
    for name in PACKAGES:
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=skip)
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(source.parent), str(source)]
    subprocess.run(command, check=True)
    (built,) = source.parent.glob("*.whl")
    return built


def test_it_holds_both_packages_and_all_their_data(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if "dist-info" not in name}
    ours = {
        path.relative_to(ROOT).as_posix()
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == ours
    assert {
        "fitcast/py.typed",
        "course_utils/py.typed",
        "course_utils/data/recorded_runs.json",
    } < packed
    assert any(name.endswith(".safetensors") for name in packed)


def test_it_says_what_it_needs_and_which_command_it_brings(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if "dist-info" in name}
        metadata = archive.read(f"{info}/METADATA").decode()
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert re.search(r"^fitcast = fitcast\.cli", scripts, re.M)
    needs = [Requirement(line) for line in re.findall(r"^Requires-Dist: (.+)$", metadata, re.M)]
    always = {need.name for need in needs if not need.marker}
    assert {"torch", "transformers", "peft", "bitsandbytes", "packaging"} <= always
    assert not always & {"jupyterlab", "ipywidgets", "matplotlib", "pytest", "nbconvert"}
    assert all(need.specifier for need in needs if need.name in always), "each has a floor"
    assert {"course", "dev"} <= set(re.findall(r"^Provides-Extra: (.+)$", metadata, re.M))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_works_in_a_clean_environment_outside_the_repository(wheel, tmp_path):
    """Heavy packages come from here, by a path that brings no editable install along."""
    home = tmp_path / "clean"
    venv.create(home, with_pip=True, symlinks=True)
    python = home / "bin" / "python"
    (place,) = home.glob("lib/python*/site-packages")
    (place / "heavy.pth").write_text(sysconfig.get_path("purelib"))
    install = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel]
    subprocess.run(install, check=True)

    def run(*command) -> str:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    command = home / "bin" / "fitcast"
    recipe = ("--model", "llama-3.2-1b", "--sequence-length", "512")
    assert run(command, "forecast", *recipe).startswith("fits a T4")
    assert "micro batch" in run(command, "fit", *recipe)
    fits, verdict, *table = run(python, "-c", LEARNER).splitlines()
    assert fits == "True" and verdict.startswith("Not yet")
    assert "the usual recipe" in "\n".join(table)
