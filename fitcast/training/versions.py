"""Is this a runtime that everything here was run on.

Versions are read as pip reads them (PEP 440): 5.15rc1 comes before 5.15, 2.11.0+cu128 is 2.11.0.

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

from packaging.version import Version

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

    Args:
        version: As a package says it.

    Raises:
        packaging.version.InvalidVersion: Not a version (a ValueError).

    Example:
        >>> numbers("2.11.0+cu128"), numbers("5.14rc1")
        ((2, 11), (5, 14))
    """
    major, minor = (*Version(version).release, 0)[:2]
    return major, minor


def below(version: str, floor: tuple[int, int]) -> bool:
    """Whether a version is older than a floor; the floor's own release candidates are.

    Args:
        version: As a package says it.
        floor: Major and minor version, as in `FLOORS`.

    Example:
        >>> below("5.15rc1", (5, 15)), below("5.15.0", (5, 15))
        (True, False)
    """
    return Version(version) < Version(".".join(map(str, floor)))


def installed(name: str) -> str | None:
    """The installed version of a package, by its name on PyPI; `None` when it is not there."""
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
        if version and below(version, FLOORS[name])
    ]


def drifted() -> list[str]:
    """Packages newer than any the course was verified with, each in words."""
    drift = []
    for name, pinned in record()["pins"].items():
        newest = max((pinned, record()["colab"].get(name, pinned)), key=numbers)
        if (version := installed(name)) and numbers(version) > numbers(newest):
            drift.append(f"{name} {version} (verified: {newest})")
    return drift
