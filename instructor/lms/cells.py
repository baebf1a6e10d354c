"""Cells of a CSV that no spreadsheet computes, whatever a student is called or writes."""

from __future__ import annotations

import re

# What makes a spreadsheet take a text for a formula; the wide forms count in some.
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20", "|", "%")
# Where the list separator is a semicolon, a spreadsheet begins another cell in the middle of one.
INSIDE = re.compile(r"([;\t]\s*)(?=[=+\-@|%\uff1d\uff0b\uff0d\uff20])")
NUMBER = re.compile(r"-?\d+([.,]\d+)?")


def safe(text: str) -> str:
    """A cell that no spreadsheet computes: one line, with a quote in front of a formula.

    Example:
        >>> safe("=1+1"), safe("Ann"), safe("-2"), safe("x;=1+1")
        ("'=1+1", 'Ann', "'-2", "x;'=1+1")
    """
    line = " ".join(text.encode("utf-8", "replace").decode().splitlines())
    risky = text.startswith(FORMULA) or line.lstrip().startswith(FORMULA)
    inside = line[:1] + INSIDE.sub(r"\1'", line[1:])
    return "'" + inside if risky else inside


def safe_row(cells: list[str]) -> list[str]:
    """The same for cells that may be numbers or a dash, which stay."""
    return [cell if NUMBER.fullmatch(cell) or cell == "-" else safe(cell) for cell in cells]
