"""The Makefile's verbs and the pins behind them: one lock, and a set-up that runs once."""

import re
import shutil
import subprocess
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tools.surroundings import ROOT

PINS = ("requirements.txt", "requirements.lock", "pyproject.toml")
TEACHING = ROOT / "instructor" / "verbs.mk"  # not in the students' archive
SET_UP = ("lessons", "test", "test-all", "lint", "bench", "execute", "stamp", "lock")
PIN = re.compile(r"^([\w.-]+)==([\w.]+)((?: ;.*)?) \\\n +--hash=sha256:[0-9a-f]{64}\b", re.M)


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def floors() -> dict[str, list[Requirement]]:
    """What the distribution asks for: of everybody under "", and in each extra."""
    lines = [line.partition("#")[0] for line in read("requirements.txt").splitlines()]
    found = {"": [Requirement(line) for line in lines if line.strip()]}
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    for extra, asked in extras.items():
        found[extra] = [Requirement(one) for one in asked if not one.startswith("fitcast[")]
    return found


def locked() -> dict[str, set[str]]:
    """Versions by package of the lock: one, or one for each Python."""
    found: dict[str, set[str]] = {}
    for name, version, _ in PIN.findall(read("requirements.lock")):
        found.setdefault(name, set()).add(version)
    return found


def colab() -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)$", read("constraints-colab.txt"), re.M))


def test_each_floor_has_a_reason_and_colab_passes_it_untouched():
    lines = [line for line in read("requirements.txt").splitlines() if not line.startswith("#")]
    assert lines and all(re.search(r"  # \w", line) for line in lines)
    there = {name.lower(): version for name, version in colab().items()}
    asked = [*floors()[""], *floors()["course"]]
    missing = {floor.name for floor in asked} - set(there)
    assert missing == {"bitsandbytes", "jupyterlab"}, "what Colab lacks; it has a notebook already"
    assert [f for f in asked if f.name in there and there[f.name] not in f.specifier] == []


def test_the_lock_has_a_version_above_each_floor_and_a_hash_for_each_version():
    lock = read("requirements.lock")
    assert len(PIN.findall(lock)) == len(re.findall(r"^[\w.-]+==", lock, re.M)) > 150
    for floor in (floor for asked in floors().values() for floor in asked):
        versions = locked()[floor.name.lower().replace("_", "-")]
        assert all(floor.specifier.contains(Version(version)) for version in versions), floor


def make(verb: str, folder, *flags: str) -> str:
    done = subprocess.run(
        ["make", *flags, verb], cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def house(tmp_path):
    for name in ("Makefile", *PINS):
        shutil.copy(ROOT / name, tmp_path)
    if TEACHING.exists():
        (tmp_path / "instructor").mkdir()
        shutil.copy(TEACHING, tmp_path / "instructor")
    (tmp_path / ".venv").mkdir()
    return tmp_path


def test_every_verb_is_explained():
    shown = make("help", ROOT)
    verbs = set(re.findall(r"^\.PHONY: (.+)$", read("Makefile"), re.M)[0].split())
    if TEACHING.exists():
        verbs |= {"assignment", "grade", "release"}
    assert set(re.findall(r"^  make ([\w-]+) +\w", shown, re.M)) >= verbs


@pytest.mark.parametrize("pins", PINS)
def test_set_up_runs_when_the_pins_change_and_only_then(house, pins):
    for verb in SET_UP:
        assert "pip" in make(verb, house, "--dry-run"), verb
    stamp = re.search(r"touch (\S+)", make("test", house, "--dry-run"))[1]
    (house / stamp).touch()
    for verb in set(SET_UP) - {"lock"}:
        assert "pip" not in make(verb, house, "--dry-run"), verb
    with (house / pins).open("a") as file:
        file.write("# another pin\n")
    assert "pip" in make("test", house, "--dry-run")


def test_hashes_let_nothing_else_in_and_are_another_set_up(house):
    (plain, locked_) = (make("lessons", house, "--dry-run", hashes) for hashes in
                        ("HASHES=", "HASHES=1"))  # fmt: skip
    pips = [[line for line in shown.splitlines() if "pip " in line] for shown in (plain, locked_)]
    assert len(pips[0]) == 2
    assert not any("hashes" in line or "no-index" in line for line in pips[0])
    first, *others = pips[1]
    assert "--only-binary :all: --require-hashes --requirement requirements.lock" in first
    assert len(others) == 2 and all("--no-index" in line for line in others)
    stamps = [re.search(r"touch (\S+)", shown)[1] for shown in (plain, locked_)]
    assert stamps[0] != stamps[1]


def test_without_hashes_the_locks_versions_hold(house):
    """What pip gets as constraints: every version and marker of the lock, and no hash."""
    (line,) = [
        line for line in make("lessons", house, "--dry-run").splitlines() if "sed -nE" in line
    ]
    subprocess.run(["bash", "-c", line.lstrip("@")], cwd=house, check=True)
    pins = (house / ".venv/pins.txt").read_text().splitlines()
    wanted = [f"{name}=={version}{marker}" for name, version, marker
              in PIN.findall(read("requirements.lock"))]  # fmt: skip
    assert pins == wanted
    assert [Requirement(pin) for pin in pins if "networkx" in pin][0].marker is not None


def test_newest_releases_are_asked_for_by_another_lock():
    shown = make("test", ROOT, "--dry-run", "LOCK=/dev/null")
    assert "/dev/null > .venv/pins.txt" in shown and "requirements.lock" not in shown
    assert re.search(r"touch \.venv/ready-\d", shown), "set up anew: these are other pins"


def test_old_python_is_refused_with_the_remedy(house):
    old = house / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for python in (old, house / "missing"):
        done = subprocess.run(
            ["make", "test", f"PYTHON={python}"], cwd=house, capture_output=True, text=True
        )
        assert done.returncode != 0
        assert "Python 3.11 or newer is needed" in done.stderr
