"""What a step is told when it asks a tensor for its numbers: a stated answer, never a guess.

Fake tensors hold no numbers. Trainers ask for some all the same: a loss to log, a gradient norm,
whether a loss is NaN, which positions of a mask are set. Each question has one answer here:

- a number (`.item()`, `float(...)`, `int(...)`, each of a `.tolist()`): 1, and `False` for a truth
  value, so that no loss is NaN, no gradient has overflowed and no early exit is taken;
- which positions are set (`x[mask]`, `nonzero`, `masked_select`): all of them, which is the most
  memory that the answer can cost: every token carries a label, no row is padding;
- which experts have tokens, and which tokens they have: those of the `routing` that is set.

A step of the reader's own is told nothing: there the question is an error that names the line
(`forecast_step`). Not modelled: control flow that follows the numbers, other than these answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fitcast.cuda.experts import Routing

aten = torch.ops.aten
MASKS = (torch.bool, torch.uint8)


class Answers(TorchDispatchMode):
    """Inside, a question for numbers is answered. Enter it after the fake tensors.

    Attributes:
        asked: Names of the questions that came, and how often.
        routing: While a loop over experts runs: how many it meets, and their tokens.
    """

    def __init__(self):
        super().__init__()
        self.asked: dict[str, int] = {}
        self.routing: Routing | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else every operation pays for telling torch.compile to stay away

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten.index.Tensor and any(is_mask(index) for index in args[1]):
            self._note(func)
            return func(args[0], positions(args[1]))
        answer = ANSWERS.get(func)
        if answer is None:
            return func(*args, **kwargs)
        self._note(func)
        if self.routing is not None and func is aten.nonzero.default:
            return routed_positions(args[0], self.routing)
        return answer(*args, **kwargs)

    def _note(self, func) -> None:
        name = func.name()
        self.asked[name] = self.asked.get(name, 0) + 1


def number(tensor: torch.Tensor) -> bool | int | float:
    """The answer to `tensor.item()`: 1, or `False` where the question is a truth value."""
    if tensor.dtype == torch.bool:
        return False
    return 1.0 if tensor.is_floating_point() else 1


@contextlib.contextmanager
def lists() -> Iterator[None]:
    """Inside, `tensor.tolist()` of a tensor without numbers is a list of `number`s."""
    original = torch.Tensor.tolist

    def tolist(tensor: torch.Tensor) -> Any:
        if not isinstance(tensor, FakeTensor):
            return original(tensor)
        if tensor.dim() == 0:
            return number(tensor)
        return [tolist(part) for part in tensor]

    with mock.patch.object(torch.Tensor, "tolist", tolist):
        yield


def all_positions(tensor: torch.Tensor) -> torch.Tensor:
    """Indices of all elements, (elements, dimensions) int64, as if none were zero."""
    return tensor.new_empty((tensor.numel(), tensor.dim()), dtype=torch.long)


def routed_positions(mask: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Indices, (positions, dimensions) int64: of experts that are hit, or of one's tokens.

    Args:
        mask: (experts,) or (experts, 1) where experts are told, (k, tokens) where tokens are.
        routing: Of this batch.
    """
    tells_tokens = mask.dim() == 2 and mask.shape[1] > 1
    count = routing.tokens if tells_tokens else routing.experts
    return mask.new_empty((min(count, mask.numel()), mask.dim()), dtype=torch.long)


def all_elements(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Every element, (elements,), as if the mask were true everywhere."""
    return tensor.new_empty((max(tensor.numel(), mask.numel()),))


def is_mask(index: object) -> bool:
    """Whether an index is a mask, whose true positions only its numbers tell."""
    return isinstance(index, torch.Tensor) and index.dtype in MASKS


def positions(indices: list) -> list:
    """Masks among indices turned into the positions of all their elements.

    As CUDA's `index` does before its kernel: one int64 for each dimension of the mask. Source:
    aten/src/ATen/native/IndexingUtils.h, `expandTensors`.
    """
    found = []
    for index in indices:
        if is_mask(index):
            found += [index.new_empty(index.numel(), dtype=torch.long) for _ in index.shape]
        else:
            found.append(index)
    return found


ANSWERS = {
    aten._local_scalar_dense.default: number,
    aten.nonzero.default: all_positions,
    aten.masked_select.default: all_elements,
}
