"""A sample of many cases for `make test`; `make test-all` has them all."""

import zlib
from collections.abc import Callable, Iterable
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
