"""Cross entropy from hidden states without all logits: chunked, lean, fused.

`chunked_loss` computes a chunk's logits again in backward; the lean loss takes the gradient while
they are there; the fused one does so in fewer operations, and `compiled` in fewer yet. Not
modelled: heads with a bias or an adapter (the chunked loss takes those), logits that are more than
the head's product, other losses.

Shapes: B batch, S sequence, H hidden, V vocabulary, T tokens (B x S), t tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from fitcast.units import IGNORED, refusal


def chunked_loss(
    hidden: torch.Tensor,
    head: Any,
    labels: torch.Tensor,
    chunk_tokens: int = 512,
    num_items_in_batch: torch.Tensor | int | None = None,
    *,
    lean: bool | Callable[..., torch.Tensor] = False,
    skip_unlabelled: bool = False,
) -> torch.Tensor:
    """Cross entropy from hidden states, `chunk_tokens` rows of logits at a time.

    Saves the logits, (batch x seq, vocab): three float32 copies of them at the peak of the usual
    loss. Each chunk forgets its logits and computes them again in backward, so at most one chunk's
    exist. Costs one more product with the head, or nothing with `lean`.

    PyTorch 2.13 has `F.linear_cross_entropy`, which gives the same (a test holds them together).
    It is not used, because Colab's 2.11 lacks it, and `lean` takes less time.

    Args:
        hidden: (batch, seq, hidden).
        head: The output embedding, a module of hidden -> vocab.
        labels: (batch, seq); each position's target is the next one's label.
        chunk_tokens: Rows of logits alive at once.
        num_items_in_batch: What to divide the sum by; `None` means this batch's labelled tokens.
        lean: Take the gradient together with the logits (`lean_loss`; needs a frozen head);
            or who does, in its place: `fused_loss`, `compiled.compiled_loss`.
        skip_unlabelled: Compute no logits for prompts and padding. Finding them makes the CPU wait
            for the GPU, so it is worth it for padded batches and not for packed ones.

    Returns:
        The mean, a float32 scalar.

    Raises:
        ValueError: `lean` with a head that is trained, adapted or has a bias.
    """
    rows, targets = hidden.flatten(0, 1), F.pad(labels, (0, 1), value=IGNORED)[:, 1:].reshape(-1)
    if num_items_in_batch is None:
        num_items_in_batch = (targets != IGNORED).sum()
    if skip_unlabelled:
        rows, targets = _labelled(rows, targets)
    if lean:
        _check_plain(head)
        summed = lean_loss if lean is True else lean
        return summed(rows, head.weight, targets, chunk_tokens) / num_items_in_batch
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for chunk, wanted in zip(rows.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        total = total + checkpoint(_summed_loss, chunk, head, wanted, use_reentrant=False)
    return total / num_items_in_batch


def _labelled(rows: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of the positions with a label.

    Fake tensors have no values to tell which: then of all positions, the most that a batch needs.
    """
    if isinstance(targets, FakeTensor):
        kept = torch.arange(len(targets), device=targets.device)
    else:
        kept = (targets != IGNORED).nonzero().squeeze(1)
    return rows.index_select(0, kept), targets.index_select(0, kept)


def _summed_loss(rows: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(rows).float(), targets, reduction="sum")


def _check_plain(head: Any) -> None:
    """Refuse a head that is more than its weight: the lean loss would leave the rest out."""
    more = "a bias" if getattr(head, "bias", None) is not None else ""
    more = "an adapter" if hasattr(head, "base_layer") else more
    if more:
        raise refusal(
            "loss",
            f"be 'full' or 'chunked' for a head with {more}",
            "lean",
            "the lean loss takes the head's weight alone",
        )


class LeanLoss(torch.autograd.Function):
    """See `lean_loss`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        chunk_tokens: int,
    ) -> torch.Tensor:
        grad_hidden = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunks = (tensor.split(chunk_tokens) for tensor in (hidden, targets, grad_hidden))
        for rows, wanted, grad in zip(*chunks, strict=True):
            wanted, labelled = wanted.clamp(min=0)[:, None], (wanted != IGNORED)[:, None]
            logits = F.linear(rows, weight).float()  # (chunk, vocab), the only tensor of its size
            logits -= logits.amax(-1, keepdim=True)  # logsumexp would hold a second one
            at_target = logits.gather(1, wanted)
            sums = logits.exp_().sum(-1, keepdim=True)
            total += ((sums.log() - at_target) * labelled).sum()
            # d loss / d logits = softmax(logits) - one at the target
            probabilities = logits.div_(sums)
            probabilities.scatter_add_(1, wanted, -torch.ones_like(sums))
            grad.copy_(probabilities.mul_(labelled).to(weight.dtype) @ weight)
        ctx.save_for_backward(grad_hidden)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad_total, None, None, None


def lean_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk_tokens: int = 512
) -> torch.Tensor:
    """Summed cross entropy of a frozen head, its gradient taken while the logits are there.

    Saves all but `chunk_tokens` rows of logits, like `chunked_loss`, and the second product
    with the head that recomputing costs: cross entropy's gradient is known as soon as the logits
    are, so forward keeps it, (tokens, hidden), and backward only scales it.

    Args:
        hidden: (tokens, hidden).
        weight: (vocab, hidden), frozen.
        targets: (tokens,), -100 where there is none.
        chunk_tokens: Rows of logits alive at once.

    Returns:
        The sum over labelled tokens, a float32 scalar.

    Raises:
        ValueError: The head is trained: it would get no gradient.
    """
    check_frozen(weight)
    return LeanLoss.apply(hidden, weight, targets, chunk_tokens)


def check_frozen(weight: torch.Tensor) -> None:
    """Refuse a head that is trained: a loss that forgets its logits gives it no gradient."""
    if weight.requires_grad and torch.is_grad_enabled():  # an evaluation asks for no gradient
        raise refusal(
            "loss",
            "be 'full' or 'chunked' for a head that is trained",
            "lean",
            "the lean loss gives the head no gradient",
        )


# Summed loss of a chunk of logits, (t, V), and its gradient by them, given their targets, (t,).
# What it says of rows without a target is not used.
OfChunk = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class FusedLoss(torch.autograd.Function):
    """`lean_loss`, whose way from a chunk's logits to their gradient is a function of its own.

    Saves what the lean one does, and one chunk of logits more: none outlives its turn.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        chunk_tokens: int,
        of_chunk: OfChunk,
    ) -> torch.Tensor:
        grad_hidden = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunks = (tensor.split(chunk_tokens) for tensor in (hidden, targets, grad_hidden))
        for rows, wanted, grad in zip(*chunks, strict=True):
            loss, by_logits = of_chunk(F.linear(rows, weight), wanted)
            total += loss
            torch.mul(by_logits @ weight, (wanted != IGNORED)[:, None], out=grad)
            del by_logits  # (chunk, vocab)
        ctx.save_for_backward(grad_hidden)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad_total, None, None, None, None


def loss_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross entropy of a chunk and its gradient by the logits, (t, V), in their dtype.

    Five trips of (t, V) through memory instead of thirteen: PyTorch's `log_softmax` casts,
    subtracts, exponentiates and sums in one kernel, and `exp` writes the probabilities where the
    logits were.
    """
    wanted, labelled = targets.clamp(min=0)[:, None], (targets != IGNORED)[:, None]
    log_probabilities = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    loss = -(log_probabilities.gather(1, wanted) * labelled).sum()
    torch.exp(log_probabilities, out=logits)
    logits.scatter_add_(1, wanted, logits.new_full(wanted.shape, -1))
    return loss, logits


def fused_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk_tokens: int = 512
) -> torch.Tensor:
    """`lean_loss` in fewer operations; arguments, result and refusal are its own."""
    check_frozen(weight)
    return FusedLoss.apply(hidden, weight, targets, chunk_tokens, loss_and_gradient)
