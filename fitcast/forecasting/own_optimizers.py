"""Optimizers of a step of the reader's own that ask for numbers, or where they are.

Some read a norm or their count of steps to scale the update, which decides no memory: they are told
one. Any other that asks is refused by its name, since what it asks may decide what it does next.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from fitcast.cuda.libraries import foreach_by_default
from fitcast.forecasting.answers import number
from fitcast.units import Said, refusal

# They only scale by what they ask for. Sources: torch/optim, transformers/optimization.py.
SCALING = (("torch", "Adafactor"), ("torch", "ASGD"), ("transformers", "Adafactor"))
QUESTIONS = ("item", "__bool__", "__float__", "__int__")
CAPTURABLE = ("adadelta", "adam", "adamax", "asgd", "nadam", "radam", "rmsprop", "rprop")


@contextlib.contextmanager
def optimizers_on_the_card() -> Iterator[None]:
    """Inside, optimizers are answered so, and take their parameters to be on a CUDA device."""
    from bitsandbytes import functional as bnb

    running: list[Optimizer] = []
    with contextlib.ExitStack() as stack:
        begin = register_optimizer_step_pre_hook(lambda optimizer, *_: running.append(optimizer))
        stack.callback(begin.remove)
        stack.callback(register_optimizer_step_post_hook(lambda *_: running.clear()).remove)
        for target, name, stand_in in (
            *((torch.Tensor, name, _answered(name, running)) for name in QUESTIONS),
            *((_of_torch(name), "_get_capturable_supported_devices", _here) for name in CAPTURABLE),
            (_of_torch("asgd"), "_default_to_fused_or_foreach", foreach_by_default),
            (bnb, "optimizer_update_32bit", _with_known_norm(bnb.optimizer_update_32bit)),
        ):
            stack.enter_context(mock.patch.object(target, name, stand_in))
        yield


def _of_torch(name: str) -> Any:
    return importlib.import_module(f"torch.optim.{name}")


def _here(*_: Any, **__: Any) -> list[str]:
    """Devices that `capturable=True` may be asked on: that of the fake tensors is the card."""
    return ["cpu"]


def _answered(name: str, running: list[Optimizer]) -> Callable:
    """A tensor's question for its number; an optimizer that only scales by it is told one."""
    original = getattr(torch.Tensor, name)

    def ask(self: torch.Tensor) -> Any:
        try:
            return original(self)
        except DataDependentOutputException:
            if not running or torch.is_grad_enabled():  # the step's own line, or its closure's
                raise
        kind = type(running[-1])
        if (kind.__module__.partition(".")[0], kind.__name__) in SCALING:
            return number(self)
        raise refusal(
            "optimizer", "not branch on numbers",
            Said(f"{kind.__name__}, which asks for some in its step"),
            "AdamW, SGD and bitsandbytes' ask for none; Adafactor and ASGD only scale by theirs",
        )  # fmt: skip

    return ask


def _with_known_norm(update: Callable) -> Callable:
    """bitsandbytes' LAMB and LARS give a weight's norm to a kernel that wants a number.

    Source: bitsandbytes/functional.py, `optimizer_update_32bit`.
    """

    def run(*args: Any, **options: Any) -> None:
        norm = torch.norm
        with mock.patch.object(torch, "norm", lambda x: number(norm(x))):
            update(*args, **options)

    return run
