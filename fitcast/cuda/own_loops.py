"""A loop of the reader's own that speaks to a CUDA device, on fake CPU tensors.

`torch.autocast("cuda", ...)`, `device="cuda"`, `model.to("cuda")`, `GradScaler("cuda")` and the
calls of `torch.cuda` around a step mean what they mean on the card: autocast is on, tensors are on
the one device that there is, nobody waits. Not modelled: tensors that go to the CPU (a note says so
where they are told by name); code that asks `x.is_cuda` or `x.device.type`, which is told the
truth; a device named inside a checkpointed function, which backward runs again without this;
several devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from fitcast.cuda.trainers import adapters_on_fake_weights, address

CUDA, HERE = "cuda", torch.device("cpu")
ON_HOST = (
    "what the step makes or moves by name to the CPU (device='cpu', .cpu()) is counted as on the "
    "card: make it before the step if it stays on the host"
)
WAITS = ("synchronize", "empty_cache", "reset_peak_memory_stats", "ipc_collect")


@contextlib.contextmanager
def on_the_card(notes: list[str]) -> Iterator[None]:
    """Inside, a device called "cuda" is where fake tensors are. Enter it within fake tensors.

    Args:
        notes: Gains a sentence where the step speaks to the CPU.
    """
    with contextlib.ExitStack() as stack:
        for target, name, stand_in in (
            (torch.amp.autocast, "__init__", _of_the_cpu(torch.amp.autocast.__init__)),
            (torch.amp.GradScaler, "__init__", _of_the_cpu(torch.amp.GradScaler.__init__)),
            (torch.nn.Module, "_apply", apply_in_place),
            (torch.Tensor, "data_ptr", address),
        ):
            stack.enter_context(mock.patch.object(target, name, stand_in))
        for name in WAITS:
            stack.enter_context(mock.patch(f"torch.{CUDA}.{name}", lambda *_, **__: None))
        for name, answer in (("is_available", True), ("device_count", 1), ("current_device", 0)):
            stack.enter_context(mock.patch(f"torch.{CUDA}.{name}", lambda said=answer: said))
        stack.enter_context(adapters_on_fake_weights())
        stack.enter_context(OneDevice(notes))
        yield


def _of_the_cpu(made: Callable[..., None]) -> Callable[..., None]:
    """`__init__` of autocast or of a scaler: for "cuda" that of the fake tensors' device.

    Autocast's dtype, where none is given, is float16 as on CUDA. Source: torch/amp/autocast_mode.py
    and grad_scaler.py, which switch themselves off without CUDA.
    """

    def init(self: Any, device: str = CUDA, *args: Any, **options: Any) -> None:
        device = options.pop("device_type", options.pop("device", device))
        if str(device).startswith(CUDA):
            device = "cpu"
            if isinstance(self, torch.amp.autocast) and not args and options.get("dtype") is None:
                options["dtype"] = torch.float16
        made(self, device, *args, **options)

    return init


def apply_in_place(self: torch.nn.Module, fn: Callable, recurse: bool = True) -> torch.nn.Module:
    """`Module._apply`, behind `.to`, `.half` and `.cuda`, for parameters that cannot be swapped.

    A parameter stays the object that it was and gets other data, as on a real device. Source:
    torch/nn/modules/module.py, `_apply`.
    """
    for module in self.modules() if recurse else [self]:
        for parameter in module._parameters.values():
            if parameter is not None:
                with torch.no_grad():
                    new = fn(parameter)
                if new is not parameter:
                    parameter.data = new
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fn(buffer)
    return self


class OneDevice(TorchFunctionMode):
    """Every device called "cuda" is the one where fake tensors are.

    Args:
        notes: Gains a sentence where a tensor of more than one number is on the CPU by name.
    """

    def __init__(self, notes: list[str]):
        super().__init__()
        self.notes = notes

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.device:  # a name for one, which is here as soon as it is used
            return func(*args, **(kwargs or {}))
        kwargs = {name: here(value) for name, value in (kwargs or {}).items()}
        args = tuple(here(value) for value in args)
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **kwargs)
        if func is torch.Tensor.cpu or _says_cpu((kwargs.get("device"),)) or _says_cpu(args[1:2]):
            self._note_host(result)
        return result

    def _note_host(self, result: Any) -> None:
        # One number may be anywhere; optimizers keep theirs on the host.
        if isinstance(result, torch.Tensor) and result.numel() > 1 and ON_HOST not in self.notes:
            self.notes.append(ON_HOST)


def _says_cpu(args: tuple) -> bool:
    return any(isinstance(value, str) and value == "cpu" for value in args)


def here(value: Any) -> Any:
    """The device of fake tensors instead of a CUDA one; anything else as it is."""
    if isinstance(value, torch.device) and value.type == CUDA:
        return HERE
    if isinstance(value, str) and (value == CUDA or value.startswith(f"{CUDA}:")):
        return HERE
    return value
