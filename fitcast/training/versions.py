"""Is this a runtime that everything here was run on.

`verified.json` says when and with which versions every lesson of the course last reproduced; it is
written by `make test-colab` and by nothing else. Not modelled: whether a version in between works.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("verified.json")
# The floors of requirements.txt that a lesson cannot do without.
FLOORS = {"torch": (2, 11), "transformers": (5, 15), "peft": (0, 20), "bitsandbytes": (0, 50)}


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
    return [
        f"{name} {version} (needed: {'.'.join(map(str, FLOORS[name]))})"
        for name, version in found.items()
        if version and numbers(version) < FLOORS[name]
    ]


def drifted() -> list[str]:
    """Packages newer than any the course was verified with, each in words."""
    drift = []
    for name, pinned in record()["pins"].items():
        newest = max((pinned, record()["colab"].get(name, pinned)), key=numbers)
        if (version := installed(name)) and numbers(version) > numbers(newest):
            drift.append(f"{name} {version} (verified: {newest})")
    return drift
