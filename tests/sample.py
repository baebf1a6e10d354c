"""A sample of many cases for `make test`; `make test-all` has them all."""

import zlib
from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest


def sampled(cases: Iterable[Any], name: Callable[[Any], str], every: int = 5) -> list[Any]:
    """Parameters for pytest: about one case in `every` as it is, the others marked `slow`.

    Which ones is a checksum of their names, so that it does not change when others are added.
    """
    return [
        pytest.param(
            case,
            id=name(case),
            marks=[] if zlib.crc32(name(case).encode()) % every == 0 else pytest.mark.slow,
        )
        for case in cases
    ]


def by_turns(kinds: Iterable[str], levers: Collection[str]) -> list[Any]:
    """Parameters (kind, lever, padded) for pytest: each lever on each kind, on padded rows or not.

    By turns; the other of the two is marked `slow`.
    """
    return [
        pytest.param(
            kind,
            lever,
            padded,
            id=f"{kind}-{lever}-{'padded' if padded else 'packed'}",
            marks=[] if (row + column) % 2 == padded else pytest.mark.slow,
        )
        for row, kind in enumerate(kinds)
        for column, lever in enumerate(levers)
        for padded in (False, True)
    ]
