"""How big a batch really is: gradients that add up, and the largest micro batch that fits.

An effective batch is micro_batch_size x gradient_accumulation_steps x world_size sequences. Its
gradient is a mean over *tokens*, so each micro batch brings its tokens' sum, divided by the number
of labelled tokens of all of them.

Not modelled: batch norm (it sees micro batches), losses that compare examples, fragmentation that
builds up over hours, sequences longer than the probed ones.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fitcast import gpus
from fitcast.memory.ledger import MemoryLedger
from fitcast.training.restoring import unchanged
from fitcast.units import IGNORED, refusal, show_bytes

# How cuBLAS and cuDNN say that the card is full; they raise a plain RuntimeError.
OUT_OF_MEMORY = ("out of memory", "cublas_status_alloc_failed", "cudnn_status_alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the card is full, whichever library raised it."""
    return any(words in str(error).lower() for words in OUT_OF_MEMORY)


def labelled_tokens(batch: dict[str, torch.Tensor]) -> int:
    """Tokens that the loss counts: those with a label, but for each row's first.

    A causal model predicts the next token, so nothing predicts position 0.

    Args:
        batch: Its labels, (batch, seq), are -100 where there is no target.

    Example:
        >>> labelled_tokens({"labels": torch.tensor([[7, 8, 9], [-100, 8, -100]])})
        3
    """
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def split(batch: dict[str, torch.Tensor], micro_batch_size: int) -> list[dict[str, torch.Tensor]]:
    """The batch as micro batches of `micro_batch_size` rows, the last one shorter if need be.

    Args:
        batch: Tensors of (rows, ...), as many rows in each.
        micro_batch_size: Rows of each part.

    Returns:
        Views of the batch's tensors, in order.

    Raises:
        ValueError: Not a whole number from 1.
    """
    if not isinstance(micro_batch_size, int) or micro_batch_size < 1:
        raise refusal(
            "micro_batch_size", "be a whole number from 1", micro_batch_size, "1 always splits"
        )
    rows = len(next(iter(batch.values())))
    return [
        {name: tensor[start : start + micro_batch_size] for name, tensor in batch.items()}
        for start in range(0, rows, micro_batch_size)
    ]


def accumulate(
    model: torch.nn.Module,
    micro_batches: Iterable[dict[str, torch.Tensor]],
    num_items: int | None = None,
) -> torch.Tensor:
    """Add the gradient of the mean loss over all labelled tokens to the parameters' `.grad`.

    One micro batch's graph is gone before the next one's is built. Neither steps nor clears.

    Args:
        model: A Hugging Face causal language model.
        micro_batches: Each with input_ids, labels (batch, seq) and maybe attention_mask.
        num_items: What to divide by; by default the labelled tokens of these micro batches. Give
            the number of all ranks' tokens when there are several.

    Returns:
        The loss, a scalar without a graph: nats per labelled token.

    Raises:
        ValueError: No token has a label.
    """
    micro_batches = list(micro_batches)
    if num_items is None:
        num_items = sum(map(labelled_tokens, micro_batches))
    if num_items < 1:
        raise refusal(
            "micro_batches",
            "hold at least one labelled token",
            num_items,
            "a mean over no token is NaN, drop rows whose answer was cut off",
        )
    total: Any = 0
    for batch in micro_batches:
        loss = model(**batch, num_items_in_batch=num_items).loss  # a sum over tokens / num_items
        loss.backward()
        total = total + loss.detach()
    return total


@dataclass(frozen=True)
class Probe:
    """One attempt: a micro batch's size, whether it fitted, and its peak in bytes if it did."""

    micro_batch_size: int
    fits: bool
    peak_bytes: int | None

    def __repr__(self) -> str:
        return f"micro batch {self.micro_batch_size:3}: " + (
            f"fits, peak {show_bytes(self.peak_bytes)}" if self.fits else "out of memory"
        )


@dataclass(frozen=True)
class Search:
    """The largest micro batch that fitted (0: none did), and every attempt in order."""

    micro_batch_size: int
    probes: list[Probe]


def largest_micro_batch(
    backward: Callable[[int], object],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    upper: int = 256,
    gradient_accumulation_steps: int = 2,
    budget_bytes: int | None = None,
) -> Search:
    """Find the most sequences of a micro batch that train without running out of memory.

    Doubles from 1 until a size fails, then halves the interval. An attempt is a whole optimizer
    step; the first attempt is two, because Adam's state appears in the first step and the second
    has to live with it. Weights, gradients, optimizer state, train/eval modes and PyTorch's random
    state are afterwards what they were.

    Args:
        backward: Called with a size: forward and backward of one micro batch, as the run will do
            it: the longest sequences, the same loss and autocast.
        model: Set to training mode; in eval mode checkpointing and dropout would be off.
        optimizer: The run's own.
        upper: The largest size to consider.
        gradient_accumulation_steps: Of the run; from 2 on a forward pass meets gradients.
        budget_bytes: A pretended card's memory, enforced by a `MemoryLedger`, e.g.
            `gpus.T4.usable_bytes`. `None`: the memory that is really there.

    Raises:
        ValueError: No budget where nothing limits memory, on a CPU; or a count below 1.
    """
    if budget_bytes is None and gpus.device() == "cpu":
        raise refusal(
            "budget_bytes",
            "be a number of bytes on a CPU",
            None,
            "pretend a card, for example budget_bytes=gpus.T4.usable_bytes",
        )
    _check_count("upper", upper, "256 suits most runs")
    _check_count("gradient_accumulation_steps", gradient_accumulation_steps, "1 is none")
    probes: list[Probe] = []

    def fits(size: int) -> bool:
        probes.append(
            _probe(
                backward, size, model, optimizer, min(gradient_accumulation_steps, 2), budget_bytes
            )
        )
        # Only here, with the exception and the frames that it held gone, is memory free again.
        if not probes[-1].fits:
            gc.collect()  # the exception may be part of a cycle
            model.zero_grad(set_to_none=True)
        return probes[-1].fits

    with unchanged(model, optimizer):
        model.train()
        largest = _largest(fits, upper)
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    return Search(largest, probes)


def _check_count(name: str, value: int, advice: str) -> None:
    if value < 1:
        raise refusal(name, "be at least 1", value, advice)


def _largest(fits: Callable[[int], bool], upper: int) -> int:
    """The largest size up to `upper` that fits, 0 for none: doubling, then halving the interval."""
    good, bad = 0, 1  # `good` fits, `bad` is not known to
    while bad <= upper and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, upper + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def _probe(
    backward: Callable[[int], object],
    size: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    accumulated: int,
    budget_bytes: int | None,
) -> Probe:
    """One attempt: an optimizer step at this size (two where the optimizer has no state yet)."""
    ledger = None
    if budget_bytes is not None:
        ledger = MemoryLedger(model, optimizer=optimizer, budget_bytes=budget_bytes)
    gpus.reset_peak()
    try:
        with ledger or contextlib.nullcontext():
            for _ in range(1 if optimizer.state else 2):
                for _ in range(accumulated):
                    backward(size)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return Probe(size, False, None)
    peak_bytes = ledger.report().peak_bytes if ledger else gpus.peak_allocated_bytes()
    return Probe(size, True, peak_bytes)
