"""Try something on a model and leave no trace: each `with` block puts back what it names.

Evaluation borrows a model for a moment, a gate trains it for some steps, a search trains it until
memory ends; whoever lent it finds it as it was, however the block ends.

Each takes the model (or optimizer) that is lent, and works on it in place.

Not modelled: Python's and NumPy's random state, data loaders, hooks.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def kept_modes(model: torch.nn.Module) -> Iterator[None]:
    """Each module is afterwards in the mode, training or evaluation, in which it was.

    `model.train()` alone would wake a part that somebody had put to sleep: a frozen batch norm, a
    dropout that was switched off.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients, for the block."""
    with kept_modes(model), torch.no_grad():
        model.eval()
        yield


@contextlib.contextmanager
def kept_weights(model: torch.nn.Module) -> Iterator[None]:
    """Trainable parameters and buffers are afterwards what they were; copies wait on the host."""
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [(tensor, _on_host(tensor)) for tensor in (*trained, *model.buffers())]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)


@contextlib.contextmanager
def kept_gradients(model: torch.nn.Module) -> Iterator[None]:
    """Gradients are cleared for the block and come back after it; copies wait on the host."""
    before = [(p, p.grad.cpu()) for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        for parameter, gradient in before:
            parameter.grad = gradient.to(parameter.device)


@contextlib.contextmanager
def kept_chance(model: torch.nn.Module) -> Iterator[None]:
    """PyTorch's random state, of the CPU and of the model's GPUs, is afterwards what it was."""
    with torch.random.fork_rng({p.device for p in model.parameters() if p.device.type == "cuda"}):
        yield


@contextlib.contextmanager
def kept_optimizer(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """An optimizer's state and settings are afterwards what they were; copies wait on the host."""
    groups = [
        {key: copy.copy(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    state = {
        parameter: {key: _on_host(value) for key, value in entries.items()}
        for parameter, entries in optimizer.state.items()
    }
    try:
        yield
    finally:
        for parameter in set(optimizer.state) - set(state):  # it appeared in the block
            del optimizer.state[parameter]
        for parameter, entries in state.items():
            _put_back(optimizer.state[parameter], entries)
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            parameters = group["params"]
            group.clear()
            group.update(before, params=parameters)


@contextlib.contextmanager
def unchanged(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> Iterator[None]:
    """Whatever is trained inside, model, optimizer and PyTorch's chance are as before after.

    Args:
        model: Its weights, buffers, gradients and modes are put back. Gradients are cleared at
            entry.
        optimizer: One that steps inside and is used afterwards, too.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(kept_modes(model))
        stack.enter_context(kept_weights(model))
        if optimizer is not None:
            stack.enter_context(kept_optimizer(optimizer))
        stack.enter_context(kept_gradients(model))
        stack.enter_context(kept_chance(model))
        yield


@torch.no_grad()
def _put_back(entries: dict[str, Any], before: dict[str, Any]) -> None:
    """Tensors are copied into, so that who holds one sees it; the rest is put back."""
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            entries[key].copy_(value)
        else:
            entries[key] = value


def _on_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    return copy.deepcopy(value)
