"""Gradients to compare: as one vector, in float64 from end to end, with a measure of how far off.

Not modelled: parameters that get no gradient (they are left out), sparse gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fitcast.step.levers import use_native_norm
from fitcast.units import IGNORED


def gradient(model: torch.nn.Module) -> torch.Tensor:
    """All gradients of the model as one vector, a copy.

    Args:
        model: After a backward pass; parameters without a gradient are left out.

    Returns:
        (numbers,), in the order of `parameters()`.
    """
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def relative_error(approximate: torch.Tensor, exact: torch.Tensor) -> float:
    """Length of the difference by the length of the exact vector: 0 is equal, 1 as bad as zero.

    Args:
        approximate, exact: Of the same shape, in any dtype.

    Example:
        >>> relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0]))
        0.2
    """
    approximate, exact = approximate.double(), exact.double()  # float32's own norm errs by 1e-4
    return ((approximate - exact).norm() / exact.norm()).item()


def in_float64(model: torch.nn.Module) -> torch.nn.Module:
    """The model, from now on in float64 throughout, for comparisons to 1e-12.

    `model.double()` is not enough: the norms and the loss of transformers' Llama compute in
    float32, whatever the weights are.

    Args:
        model: A Hugging Face causal language model; it is changed in place, and returned.
    """
    use_native_norm(model)
    causal: Any = model
    causal.loss_function = token_loss
    return model.double()


def token_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    **_: object,
) -> torch.Tensor:
    """Cross entropy of the next tokens in the logits' own dtype, as a model's `loss_function`.

    Args:
        logits: (batch, seq, vocab).
        labels: (batch, seq), -100 where there is no target.
        vocab_size: Given by transformers, not needed here.
        num_items_in_batch: What to divide the sum by; `None` means this batch's labelled tokens.

    Returns:
        A scalar, nats per labelled token.
    """
    targets = labels[:, 1:].flatten()
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")
    n_items = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / n_items
