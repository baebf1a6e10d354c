"""A DataLoader in a step of the reader's own: it reads, shuffles and collates real data as ever.

Its seed, its order and the texts in it are numbers that nothing on the card asks for, so it runs
outside of the fake tensors; each batch that it hands out is one of fake tensors of its shapes.

Not modelled: a batch that is on the host for a while; it counts from when it is handed out.
"""

from __future__ import annotations

import contextlib
import copy
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter


@contextlib.contextmanager
def real_loaders() -> Iterator[None]:
    """Inside, loaders run so; afterwards random numbers go on as if none had. Enter it first."""
    with (
        torch.random.fork_rng(devices=[]),
        mock.patch.object(DataLoader, "__iter__", _outside(DataLoader.__iter__)),
        mock.patch.object(_BaseDataLoaderIter, "__next__", _handed(_BaseDataLoaderIter.__next__)),
    ):
        yield


def _outside(method: Callable) -> Callable:
    """A method that runs on real tensors."""

    def run(self: Any) -> Any:
        with _disable_current_modes():
            return method(self)

    return run


def _handed(method: Callable) -> Callable:
    """`next`, on real tensors, whose batch is then made fake."""
    read = _outside(method)
    return lambda self: fake_batch(read(self))


def fake_batch(batch: Any) -> Any:
    """A batch with zeros in place of each tensor, nested as it may be, made where this is called.

    Args:
        batch: Of lists, tuples, dictionaries or transformers' BatchEncoding; the rest stays.
    """
    return tree_map(_fake, batch)


def _fake(part: Any) -> Any:
    if isinstance(part, torch.Tensor):
        return torch.zeros(part.shape, dtype=part.dtype)
    if isinstance(part, UserDict):  # a BatchEncoding
        part = copy.copy(part)
        part.data = fake_batch(part.data)
    return part
