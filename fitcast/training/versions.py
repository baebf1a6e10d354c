"""Is this a runtime that the course was run on, and what to do when it is not.

`data/verified.json` says when and with which versions every lesson last reproduced; it is written
by `make test-colab` and by nothing else. Not modelled: whether a version in between works.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__, hardware

PATH = Path(__file__).parent / "data" / "verified.json"
# The floors of requirements.txt that a lesson cannot do without.
FLOORS = {"torch": (2, 11), "transformers": (5, 15), "peft": (0, 20), "bitsandbytes": (0, 50)}
COLAB_VARIABLE = "COLAB_RELEASE_TAG"  # Colab sets it, nobody else does
NO_GPU = ('This Colab runtime has no GPU: every lesson runs; for the lines that say "measured" '
          "choose Runtime > Change runtime type > T4 GPU.")


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what was found, and what to do about it (`None`: it is fine)."""

    name: str
    found: str
    fix: str | None = None


@cache
def record() -> dict[str, Any]:
    """Date, Colab image, and the versions by package on both sides: pins and Colab."""
    return json.loads(PATH.read_text("utf-8"))


def banner() -> str:
    """When and with what the course was last verified, in one line."""
    seen = record()
    pins, colab = (f"torch {side['torch']} and transformers {side['transformers']}"
                   for side in (seen["pins"], seen["colab"]))
    return (f"Course {__version__}, last verified on {seen['date']} with {pins}, "
            f"and with Colab's {colab}.")


def numbers(version: str) -> tuple[int, int]:
    """Major and minor version; what follows them (patch, suffix) does not count here.

    Example:
        >>> numbers("2.11.0+cu128")
        (2, 11)
    """
    major, minor = (version.split("+")[0].split(".") + ["0"])[:2]
    return int(major), int("".join(filter(str.isdigit, minor)) or 0)


def installed(name: str) -> str | None:
    """The installed version of a package, `None` when it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def too_old() -> list[str]:
    """Packages below their floor, each in words; missing ones are not old."""
    found = {name: installed(name) for name in FLOORS}
    return [f"{name} {version} (needed: {'.'.join(map(str, FLOORS[name]))})"
            for name, version in found.items() if version and numbers(version) < FLOORS[name]]


def drifted() -> list[str]:
    """Packages newer than any the course was verified with, each in words."""
    drift = []
    for name, pinned in record()["pins"].items():
        newest = max((pinned, record()["colab"].get(name, pinned)), key=numbers)
        if (version := installed(name)) and numbers(version) > numbers(newest):
            drift.append(f"{name} {version} (verified: {newest})")
    return drift


def on_colab() -> bool:
    """Whether this is a Colab runtime."""
    return COLAB_VARIABLE in os.environ


def remarks() -> list[str]:
    """What this runtime calls for, one sentence each; none on a verified one like a T4's."""
    if old := too_old():
        remedy = ("choose Runtime > Change runtime type > Runtime version > Latest, then run this "
                  "cell again" if on_colab() else "run `pip install -r requirements.txt` in the "
                  "course's folder, then restart the kernel")
        return [f"This runtime is older than the course, {', '.join(old)}: {remedy}."]
    said = []
    if drift := drifted():
        said.append(f"Newer here than when verified: {', '.join(drift)}; if a cell fails, "
                    "`python -m course_utils doctor` shows what to report.")
    gpu = hardware.detect()
    if gpu is None and on_colab():
        said.append(NO_GPU)
    elif gpu is not None and gpu.total_bytes > hardware.T4.total_bytes:
        said.append(f"{gpu.name} holds more than a T4: what fits here may not fit there; "
                    f"forecasts for a T4 still hold, and "
                    f"{hardware.EMULATE_VARIABLE}=T4 in the environment turns this card into one.")
    return said


def welcome() -> str:
    """What every lesson's set-up cell prints: the banner and this runtime's remarks."""
    return "\n".join([banner(), *remarks()])
