"""Fewer and larger operations in plain PyTorch: adapters, optimizer, no mask to read.

A step of many small operations waits for Python, which takes 5 to 50 microseconds to launch each,
and every operation more is a trip through memory more. Not modelled: optimizers that treat
parameters unlike (no decay for some of them).

Shapes: B batch, S sequence, r rank, T tokens (B x S).
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F

from fitcast.step import lean, levers


def use_adapters_in_place(model: torch.nn.Module) -> None:
    """Let each adapter add its share into the base's output, rather than into a copy of it.

    Saves a copy of (batch, seq, out) for each adapted layer, in time and in bytes.

    Raises:
        ValueError: Adapters that `lean.use_lean_lora` refuses, too.
    """
    from peft.tuners.lora import LoraLayer

    lean.use_lean_lora(model)
    for module in model.modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), torch.nn.Linear):
            module.forward = MethodType(_added_in_place, module)


def _added_in_place(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if args or kwargs or not lean._is_one_plain_adapter(self, x):
        return type(self).forward(self, x, *args, **kwargs)
    name = self.active_adapters[0]
    rows = x.flatten(0, -2)  # (T, in)
    base = self.base_layer(rows)  # (T, out), which nobody else holds
    down = F.linear(self.lora_dropout[name](rows), self.lora_A[name].weight)  # (T, r)
    up = self.lora_B[name].weight * self.scaling[name]  # (out, r)
    base.addmm_(down.to(base.dtype), up.to(base.dtype).T)  # in place, so autocast casts nothing
    return base.view(*x.shape[:-1], -1)


class Flat:
    """Trainable parameters as pieces of one tensor: an optimizer steps once, not once for each.

    bitsandbytes' 8-bit Adam launches a kernel, and prepares it in Python, for each parameter: 256
    for adapters on four layers of each of 32. Its blocks of 256 numbers stay what they were if each
    parameter has a multiple of 256.

    Attributes:
        parameter: All of them, one vector; give it to the optimizer.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]):
        self._pieces = list(parameters)
        sizes = [piece.numel() for piece in self._pieces]
        self.parameter = torch.nn.Parameter(torch.cat([p.data.flatten() for p in self._pieces]))
        for piece, part in zip(self._pieces, self.parameter.data.split(sizes), strict=True):
            piece.data = part.view_as(piece)

    def gather(self) -> None:
        """Put the pieces' gradients into the one's, before unscaling, clipping and the step.

        They become pieces of it, so that whoever scales them scales it.
        """
        self.parameter.grad = torch.cat([piece.grad.flatten() for piece in self._pieces])  # pyright: ignore[reportOptionalMemberAccess]
        parts = self.parameter.grad.split([piece.numel() for piece in self._pieces])
        for piece, part in zip(self._pieces, parts, strict=True):
            piece.grad = part.view_as(piece)

    def clear(self) -> None:
        """Forget all gradients."""
        for parameter in (self.parameter, *self._pieces):
            parameter.grad = None


def use_causal_padding(model: Any) -> Any:
    """Let training forget the mask of batches whose padding is all at the end.

    A causal model's tokens see none that come later, so padding behind them changes nothing of
    theirs, and it has no labels of its own. Without a mask the kernels need not read one, and skip
    the half of the scores that nobody sees. Asking where the padding is makes the CPU wait once.

    Args:
        model: A causal language model of transformers, or a PEFT model around it.

    Returns:
        A handle whose `remove()` takes it back.
    """
    trunk = levers.unwrap(model).model
    if hasattr(trunk, "_causal_padding"):  # used before
        trunk._causal_padding.remove()
    trunk._causal_padding = trunk.register_forward_pre_hook(_without_mask, with_kwargs=True)
    return trunk._causal_padding


def _without_mask(trunk: Any, args: tuple, inputs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    mask = inputs.get("attention_mask")
    if trunk.training and mask is not None and mask.dim() == 2 and is_padded_behind(mask):
        inputs = inputs | {"attention_mask": None}
    return args, inputs


def is_padded_behind(mask: torch.Tensor) -> bool:
    """Whether no row of a mask, (B, S) of zeros and ones, has a one behind a zero."""
    return bool((mask[:, 1:] <= mask[:, :-1]).all())
