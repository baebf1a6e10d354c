"""Which platform a table or a path is from."""

from __future__ import annotations

from collections.abc import Sequence

from .base import PLAIN, Platform
from .canvas import Canvas
from .github import GitHub
from .moodle import Moodle

PLATFORMS: tuple[Platform, ...] = (Canvas(), Moodle(), GitHub())


def of_table(header: Sequence[str]) -> Platform | None:
    """The platform that exports a table with this header; None if none does."""
    return next((one for one in (*PLATFORMS, PLAIN) if one.fits(header)), None)


def of_path(path: str, roster: Platform) -> Platform:
    """The platform whose names a path has: the roster's own, or one that cannot be mistaken."""
    if roster is not PLAIN:
        return roster
    return next((one for one in PLATFORMS[:2] if one.owner(path, ())), PLAIN)
