"""Real modules beside the model that a step of the reader's own uses: a teacher, a critic, an EMA.

The first time that the step reaches for one it is put on fake tensors, and counted as on the card
from the start; afterwards it is as it was. A parameter that comes from no module is refused before
anything is written to it.

Not modelled: parts of such a module that the step never reaches for.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import _disable_current_modes

from fitcast.forecasting import fake, own_step
from fitcast.memory.stream import DeviceLedger
from fitcast.units import Said, refusal

# Methods by which a step reaches a module's tensors without running it: `.to` and `.half`;
# `.parameters` and what is built on it; modes and state dictionaries.
REACHING = ("_apply", "_named_members", "train", "state_dict", "load_state_dict")


class OwnStepLedger(DeviceLedger):
    """Refuses a real parameter: it would be counted only while used, and get a fake gradient."""

    def counts(self, tensor: Any) -> bool:
        if super().counts(tensor):
            return True
        if isinstance(tensor, torch.nn.Parameter) and not isinstance(tensor, FakeTensor):
            raise refusal(
                "step", "reach parameters by their module",
                Said(f"a real one of shape {tuple(tensor.shape)} by itself"),
                "take it from module.parameters() inside step, or make it a part of the model",
            )  # fmt: skip
        return False


class Beside:
    """Puts real modules on fake tensors when a step reaches for them.

    Args:
        ledger: Counts them as weights.
        model: The step's own, on fake tensors when `faked` is entered.
        before: Its parameters by name, as they were: what another module shares with it stays one.
    """

    def __init__(
        self, ledger: DeviceLedger, model: torch.nn.Module, before: Mapping[str, torch.Tensor]
    ):
        self._ledger, self._model, self._before = ledger, model, before
        self._made: dict[int, Any] = {}  # id of a real tensor -> its fake
        self._kept = contextlib.ExitStack()
        self._busy = False  # faking asks for parameters, which is reaching for them

    @contextlib.contextmanager
    def faked(self) -> Iterator[None]:
        """Inside, it does so; afterwards they are as they were. Enter it before the ledger."""
        module = torch.nn.Module
        fakes = dict(self._model.named_parameters(remove_duplicate=False))
        self._made = {id(real): fakes[name] for name, real in self._before.items()}
        with self._kept, contextlib.ExitStack() as stack:
            hook = register_module_forward_pre_hook(lambda module, _: self.reach(module))
            stack.callback(hook.remove)
            for name in REACHING:
                method = _after(self.reach, getattr(module, name))
                stack.enter_context(mock.patch.object(module, name, method))
            yield

    def reach(self, module: torch.nn.Module) -> None:
        """The step is about to use this module: if it is a real one, it is put on fakes."""
        if self._busy or not any(map(_is_real, module.modules())):
            return
        self._busy = True
        try:
            self._fake(module)
        finally:
            self._busy = False

    def _fake(self, module: torch.nn.Module) -> None:
        # Out of sight of what watches the step, and no inference tensors: nobody could train those.
        functions_unseen = torch._C.DisableTorchFunction()
        with _disable_current_modes(), functions_unseen, torch.inference_mode(False):
            before = dict(module.named_parameters(remove_duplicate=False))
            self._kept.enter_context(fake.faked(module, self._made))
            if any(parameter.requires_grad for parameter in before.values()):
                self._kept.enter_context(own_step.optimizers_of(module, before))
        name = type(module).__name__
        self._ledger.watch_too(module, f"{name}.")
        self._ledger._names[id(module)] = name


def _after(first: Callable[[torch.nn.Module], None], method: Callable) -> Callable:
    """A method of a module that first calls `first` with it."""

    @functools.wraps(method)
    def both(self: torch.nn.Module, *args: Any, **options: Any) -> Any:
        first(self)
        return method(self, *args, **options)

    return both


def _is_real(module: torch.nn.Module) -> bool:
    """Whether a module itself holds a tensor that is not fake."""
    held = (*module._parameters.values(), *module._buffers.values())
    return any(tensor is not None and not isinstance(tensor, FakeTensor) for tensor in held)
