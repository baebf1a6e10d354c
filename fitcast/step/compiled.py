"""Elementwise parts in one kernel each, by torch.compile: SwiGLU, rotary embedding, the loss.

A product is bound by arithmetic, what stands between two of them by memory traffic: each operation
of PyTorch reads and writes its tensors whole. `torch.compile` writes one kernel for several;
products stay with cuBLAS. Optional: the first step compiles, which takes seconds and a C compiler,
and a card needs Triton's elementwise kernels. On a CPU the same functions run as they are written
here; in a forecast a function takes what it gives back, and nothing in between. Not modelled: the
first step, in which Inductor times its kernels with a buffer as large as the card's L2 cache beside
them (60 MiB on an H200, 4 on a T4); models whose MLP or rotary embedding the lean levers refuse.
Shapes: B batch, S sequence, I intermediate, V vocabulary, t tokens of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F

from fitcast.step import lean, losses
from fitcast.units import IGNORED

SHAPES = 64  # of a part, in one process


def one_kernel(part: str) -> Callable[[Callable], Callable]:
    """The function of a part, compiled for tensors on a GPU; compiling waits for the first."""

    def one(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*tensors: torch.Tensor) -> Any:
            return launch(function, tensors, part)

        return call

    return one


def launch(function: Callable, tensors: tuple[torch.Tensor, ...], part: str) -> Any:
    """Run a part's function of tensors where they are; a forecast says which part it was."""
    return (_compiled(function) if tensors[0].is_cuda else function)(*tensors)


@functools.cache
def _compiled(function: Callable) -> Callable:
    """By torch.compile, as often as shapes and strides ask for it: tiles, batches, query and key.

    PyTorch's own limit, 8, is that of a function which changes by mistake, and ends the run.
    """
    from torch._dynamo import config  # brings the compiler

    config.recompile_limit = max(config.recompile_limit, SHAPES)
    return torch.compile(function, fullgraph=True)


@one_kernel("MLP")
def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) x up, (B, S, I): two tensors read and one written."""
    return F.silu(gate) * up


@one_kernel("MLP")
def swiglu_gradients(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of gate and up, (B, S, I) each: three tensors read and two written."""
    open_part = torch.sigmoid(gate)
    silu = gate * open_part
    return grad * up * (open_part + silu * (1 - open_part)), grad * silu


class SwiGLU(torch.autograd.Function):
    """`lean.SwiGLU` in one kernel forward and one backward."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return swiglu_gradients(grad, *ctx.saved_tensors)


@one_kernel("rotary embedding")
def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x, (B, heads, S, head_dim), turned by the angles of (B, 1, S, head_dim / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


@one_kernel("loss")
def loss_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross entropy of a chunk and its gradient by the logits, (t, V), in their dtype.

    The logits are read twice and the gradient written once. That of rows without a target is not
    used.
    """
    labelled, wanted = (targets != IGNORED)[:, None], targets.clamp(min=0)[:, None]
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    loss = -(log_probabilities.gather(1, wanted) * labelled).sum()
    at_target = torch.arange(logits.shape[1], device=logits.device)[None] == wanted
    return loss, (log_probabilities.exp() - at_target.float()).to(logits.dtype)


def compiled_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk_tokens: int = 512
) -> torch.Tensor:
    """`losses.lean_loss` with a kernel or two between a chunk's products; the rest is its own."""
    losses.check_frozen(weight)
    return losses.FusedLoss.apply(hidden, weight, targets, chunk_tokens, loss_and_gradient)


def _separate_mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


def _fused_mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(SwiGLU.apply(*self.gate_up_proj(x).chunk(2, dim=-1)))


def use_compiled_mlp(model: torch.nn.Module) -> None:
    """Let every gated MLP of the model compute with `SwiGLU` of this module.

    Saves traffic: 11 trips of (batch, seq, intermediate) through memory instead of 21, forward,
    recomputation and backward together.

    Raises:
        ValueError: An MLP that the lean one refuses, too.
    """
    lean.use_lean_mlp(model)
    for mlp in lean.gated_mlps(model):
        mlp.forward = MethodType(_separate_mlp if hasattr(mlp, "gate_proj") else _fused_mlp, mlp)


def use_compiled_rotary(model: torch.nn.Module) -> None:
    """Let every attention layer turn query and key in one kernel each.

    Raises:
        ValueError: A model that the lean rotary embedding refuses, too.
    """
    lean.use_lean_rotary(model, apply_rotary)


class Rotary(torch.autograd.Function):
    """`lean.Rotary` in one kernel, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return turn(grad, cos, -sin), None, None


def apply_rotary(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`lean.apply_rotary` with this module's `Rotary`."""
    rotated = cos.shape[-1]
    cos, sin = (t[..., : rotated // 2].unsqueeze(unsqueeze_dim) for t in (cos, sin))
    turned = [Rotary.apply(x[..., :rotated], cos, sin) for x in (query, key)]
    if rotated == query.shape[-1]:
        return turned[0], turned[1]
    rest = (x[..., rotated:] for x in (query, key))
    query, key = (torch.cat(pair, dim=-1) for pair in zip(turned, rest, strict=True))
    return query, key
