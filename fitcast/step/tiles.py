"""The MLP a tile of tokens at a time: at long sequences the peak stands in one layer's MLP.

An MLP treats each token alone, so its tensors of (tokens, intermediate) need never be there whole.
Not modelled: mixtures of experts, which sort tokens themselves.

Shapes: T tokens (batch x seq), H hidden, I intermediate, t tokens of a tile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import get_device_states, set_device_states

from fitcast.step.alike import alike, random_numbers, real_numbers
from fitcast.step.lean import HIDDEN, gated_mlps, with_small_products
from fitcast.units import refusal


class Kept(torch.autograd.Function):
    """Its input, kept for who comes next.

    A node of its own, ahead of the MLP: when a checkpointed layer is recomputed, PyTorch stops at
    the last tensor that backward asks for. That is this one, so the MLP itself is not run again.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class Tiled(torch.autograd.Function):
    """mlp(x), tile by tile; backward computes each tile once more and takes its gradients.

    Saves all but a tile of what the MLP keeps and makes, about 4 T I numbers at the peak of a
    layer's backward. Costs no product that checkpointing would not take; without checkpointing
    one more forward pass of the MLP. Each tile dequantizes 4-bit weights anew.

    Source: Luo et al. 2024, "Mini-Sequence Transformer".
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        mlp: Callable[[torch.Tensor], torch.Tensor],
        tile: int,
        kept: Any,
        *trained: torch.Tensor,
    ) -> torch.Tensor:
        ctx.mlp, ctx.tile, ctx.kept, ctx.trained = mlp, tile, kept, trained
        ctx.same = _as_now(x)
        y: Any = None
        for start in range(0, len(x), tile):
            out = mlp(x[start : start + tile])  # (t, H), maybe of another dtype than x
            y = out.new_empty(x.shape) if y is None else y
            y[start : start + tile] = out
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,), (grad,) = ctx.kept.saved_tensors, grads
        grad_x, sums = torch.empty_like(x), ()
        with ctx.same(), torch.enable_grad():
            for start in range(0, len(x), ctx.tile):
                tile = slice(start, start + ctx.tile)
                rows = x[tile].detach().requires_grad_()
                found = torch.autograd.grad(
                    ctx.mlp(rows), (rows, *ctx.trained), grad[tile], materialize_grads=True
                )
                grad_x[tile] = found[0]
                sums = (
                    [s.add_(g) for s, g in zip(sums, found[1:], strict=True)] if sums else found[1:]
                )
        return grad_x, None, None, None, *sums


def _as_now(x: torch.Tensor) -> Callable[[], contextlib.AbstractContextManager]:
    """A context for later with today's autocast and random numbers: dropout drops the same."""
    kind = x.device.type
    state, (devices, states) = torch.get_rng_state(), get_device_states(x)
    autocast = partial(
        torch.autocast,
        kind,
        torch.get_autocast_dtype(kind),
        torch.is_autocast_enabled(kind),
        cache_enabled=False,  # what it casts goes with its tile
    )

    @contextlib.contextmanager
    def same() -> Iterator[None]:
        with torch.random.fork_rng(devices), autocast():
            torch.set_rng_state(state)
            set_device_states(devices, states)
            yield

    return same


def use_tiled_mlp(model: torch.nn.Module, tile_tokens: int = 4096) -> None:
    """Let every gated MLP of the model, lean or not, compute `tile_tokens` tokens at a time.

    Raises:
        ValueError: An MLP that does not treat each token alone, or no gated MLP at all.
    """
    mlps = gated_mlps(model)
    if not mlps:
        raise _refused("a model without a gated MLP", tile_tokens, "nothing would change")
    for mlp in mlps:
        if not _treats_tokens_alone(mlp):
            kind = type(mlp).__name__
            raise _refused(f"a model with {kind}", tile_tokens, "its tokens are not independent")
    for mlp in mlps:
        whole = vars(mlp).get("forward", mlp.forward)
        if isinstance(whole, partial):  # tiled before
            whole = whole.args[1]
        mlp.forward = partial(tiled, mlp, whole, tile_tokens)


def _refused(whom: str, value: int, why: str) -> ValueError:
    return refusal("mlp_tile_tokens", f"be None for {whom}", value, why)


@real_numbers()
def _treats_tokens_alone(mlp: torch.nn.Module) -> bool:
    """Whether an MLP's own forward gives each token what it gives it among others."""
    small, x = with_small_products(mlp), random_numbers(1, 5, HIDDEN, seed=9)
    whole = type(mlp).forward
    pieces = x.split(2, dim=1)
    return alike(
        lambda: whole(small, x), lambda: torch.cat([whole(small, piece) for piece in pieces], 1)
    )


def tiled(
    mlp: torch.nn.Module,
    whole: Callable[[torch.Tensor], torch.Tensor],
    tile: int,
    x: torch.Tensor,
) -> torch.Tensor:
    """An MLP's output, (batch, seq, hidden), `tile` tokens at a time if there are more.

    Args:
        mlp: Whose parameters get gradients.
        whole: Its forward on all tokens at once.
        tile: Tokens of a tile.
        x: (batch, seq, hidden).
    """
    rows = x.flatten(0, -2)
    if len(rows) <= tile:
        return whole(x)
    trained = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
    if not rows.requires_grad:  # nothing before it is trained: `Kept` needs a node all the same
        rows = rows.detach().requires_grad_()
    rows = Kept.apply(rows)
    return Tiled.apply(rows, whole, tile, rows.grad_fn, *trained).view_as(x)
