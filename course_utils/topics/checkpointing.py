"""Forgetting on purpose, counted: what waits for backward, and what is computed a second time.

A chain on paper, and a stack of real layers cut into segments that keep only their input. The
production lever is `fitcast.step.levers.checkpoint_layers`. Not modelled: embedding, head,
optimizer, time; FLOPs are those of matrix products and attention.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fitcast import gpus, models
from fitcast.memory.flops import matrix_flops
from fitcast.memory.ledger import MemoryLedger
from fitcast.recipe import TrainRecipe
from fitcast.units import refusal, show_bytes

if TYPE_CHECKING:
    from transformers import LlamaModel


@dataclass(frozen=True)
class Moment:
    """One action in the training step of a chain, and the inputs a_i that it finds in memory."""

    action: str
    held: tuple[int, ...]


def trace_chain(steps: int, kept: Collection[int]) -> list[Moment]:
    """A training step of a chain, action by action, when forward keeps only some of the inputs.

    Step i turns its input a_i into a_(i+1), and its backward needs a_i again. What forward did not
    keep is computed from the nearest one before it that it did; what backward has used is freed.

    Args:
        steps: Length of the chain.
        kept: Numbers of the inputs that forward keeps; the first one always is.

    Raises:
        ValueError: A number that the chain does not have, or the first input is missing.

    Example:
        >>> [moment.action for moment in trace_chain(2, kept=[1])]
        ['forward 1', 'forward 2', 'forward 1 again', 'backward 2', 'backward 1']
        >>> max(len(moment.held) for moment in trace_chain(6, kept=[1, 3, 5]))
        4
    """
    if not set(kept) <= set(range(1, steps + 1)) or 1 not in kept:
        raise refusal(
            "kept",
            f"be numbers from 1 to {steps} with 1 among them",
            sorted(kept),
            "a1 is the chain's own input",
        )
    held: set[int] = set()
    moments = []

    def act(action: str) -> None:
        moments.append(Moment(action, tuple(sorted(held))))

    for step in range(1, steps + 1):
        held |= {step} & set(kept)
        act(f"forward {step}")
    for step in range(steps, 0, -1):
        for again in range(max(held), step):
            held.add(again + 1)
            act(f"forward {again} again")
        act(f"backward {step}")
        held.remove(step)
    return moments


def in_segments(
    layers: Sequence[torch.nn.Module], x: torch.Tensor, size: int, **kwargs: object
) -> torch.Tensor:
    """Run the layers, `size` at a time as one checkpoint; 0 keeps everything.

    Args:
        layers: Each maps (batch, seq, hidden) to the same shape.
        x: (batch, seq, hidden).
        size: Layers in a segment. 1 is a checkpoint a layer.
        kwargs: Passed to every layer.
    """

    def run(segment: Sequence[torch.nn.Module], x: torch.Tensor) -> torch.Tensor:
        for layer in segment:
            x = layer(x, **kwargs)
        return x

    if size == 0:
        return run(layers, x)
    for start in range(0, len(layers), size):
        segment = layers[start : start + size]
        x = checkpoint(functools.partial(run, segment), x, use_reentrant=False)
    return x


def beside_the_first() -> Callable[[dict[str, Any]], str]:
    """What to print of recorded rows: time and peak, as shares of the first row of their kind.

    Returns:
        A function of one row after the other, to its line. A row's kind stands in its name, before
        the comma.
    """
    first_of: dict[str, dict[str, Any]] = {}

    def line(row: dict[str, Any]) -> str:
        first = first_of.setdefault(row["name"].split(",")[0], row)
        slower = first["tokens_per_second"] / row["tokens_per_second"]
        share = row["peak_allocated_bytes"] / first["peak_allocated_bytes"]
        peak = show_bytes(row["peak_allocated_bytes"])
        return f"{row['name']:28} {slower:.2f} x the time, {peak:>9} = {share:4.0%}"

    return line


class WorkCounter(TorchDispatchMode):
    """Counts floating-point operations of matrix products and attention in `flops`.

    `torch.utils.flop_counter.FlopCounterMode` has the same formulas, but its module tracker keeps
    recomputed tensors alive, so it cannot run beside a `MemoryLedger`.

    Example:
        >>> with WorkCounter() as work:
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 5)
        >>> work.flops
        60
    """

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.flops += matrix_flops(func, args, kwargs, result)
        return result


@dataclass(frozen=True, kw_only=True)
class StackStep:
    """Forward and backward of a stack of layers.

    Attributes:
        activation_bytes: Most bytes alive for backward at once, recomputed ones included.
        flops: Of forward, recomputation and backward.
        gradients: Of every weight, in order.
    """

    activation_bytes: int
    flops: int
    gradients: list[torch.Tensor]


def build_stack(recipe: TrainRecipe, num_layers: int) -> LlamaModel:
    """A headless model of the recipe's shape with `num_layers` layers, random float32 weights."""
    from transformers import AutoModel

    config = models.config(recipe.model)
    config.num_hidden_layers = num_layers
    torch.manual_seed(recipe.seed)
    return (
        AutoModel.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        .to(gpus.device())
        .train()
    )


def step_stack(model: LlamaModel, recipe: TrainRecipe, segment_layers: int) -> StackStep:
    """Run a stack forward and backward in segments, and count.

    Args:
        model: From `build_stack`.
        recipe: Uses micro_batch_size, sequence_length and seed.
        segment_layers: Layers in a checkpointed segment; 0 keeps everything, 1 is each layer.
    """
    random = torch.Generator().manual_seed(recipe.seed)
    shape = (recipe.micro_batch_size, recipe.sequence_length, model.config.hidden_size)
    x = torch.randn(shape, generator=random).to(model.device).requires_grad_()
    positions = torch.arange(recipe.sequence_length, device=model.device)[None]
    rotary = model.rotary_emb(x.detach(), positions)
    model.zero_grad()
    with MemoryLedger(model, inputs=(x, rotary)) as ledger, WorkCounter() as work:
        loss = in_segments(list(model.layers), x, segment_layers, position_embeddings=rotary).sum()
        loss.backward()
    gradients = [weight.grad for weight in model.layers.parameters()]
    return StackStep(
        activation_bytes=max(ledger.report().timeline["activations"]),
        flops=work.flops,
        gradients=[gradient.clone() for gradient in gradients if gradient is not None],
    )
