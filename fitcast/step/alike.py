"""Whether a lever computes what a model's own code does: both are run on small random numbers.

A lever puts code of its own in the place of a model's. Neither a class's name nor a field of a
config tells whether the two are the same function: Gemma's RMSNorm multiplies by 1 + weight where
Llama's multiplies by weight, Falcon-H1 scales inside of its MLP, and the next release may do a
third thing. So the model's own `forward` is asked, on a copy of the module that has other weights.

Not modelled: what 16 bits round away (both run in float32), what happens on other devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

Module = TypeVar("Module", bound=torch.nn.Module)
Tensors = torch.Tensor | tuple[torch.Tensor, ...]


@contextlib.contextmanager
def real_numbers() -> Iterator[None]:
    """Inside, or in a function that this decorates, tensors hold numbers and nobody counts them.

    A lever is also pulled in the middle of a forecast, where tensors are fake and watched.
    """
    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


def random_numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """A float32 tensor on the CPU, the same each time; the global generator is left alone."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def stand_in(module: Module, **pieces: object) -> Module:
    """A copy of the module that shares all with it but `pieces`: weights, submodules, functions."""
    copy = object.__new__(type(module))
    copy.__dict__.update(vars(module))
    for kind in ("_parameters", "_buffers", "_modules"):  # found before what `pieces` brings
        others = {name: held for name, held in vars(module)[kind].items() if name not in pieces}
        copy.__dict__[kind] = others
    copy.__dict__.update(pieces)
    return copy


def alike(theirs: Callable[[], Tensors], ours: Callable[[], Tensors]) -> bool:
    """Whether two computations give the same numbers. One that cannot be run is not alike.

    Call it within `real_numbers`.

    Args:
        theirs: The model's own; it may want other arguments, or attributes that a stand-in lacks,
            and whatever it then raises says that ours is not written for it.
        ours: The lever's.
    """
    try:
        pairs = list(zip(_tuple(theirs()), _tuple(ours()), strict=True))
    except Exception:
        return False
    return all(
        one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-6)
        for one, other in pairs
    )


def _tuple(tensors: Tensors) -> tuple[torch.Tensor, ...]:
    return (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)
