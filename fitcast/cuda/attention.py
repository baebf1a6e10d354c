"""Scaled dot product attention as a given GPU computes it: which kernel runs, what it keeps.

The kernel follows from the GPU, the dtypes, the mask and the head counts, as PyTorch decides.
Sources are files under aten/src/ATen/native/transformers of PyTorch. Not modelled: nested tensors,
AMD GPUs, cuDNN plans other than its first.

Shapes of all kernels: query and the result (batch, heads, rows, head_dim), key and value (batch,
kv_heads, keys, head_dim) with kv_heads a divisor of heads, mask `None` or broadcast to (batch,
heads, rows, keys). `scale` is that of the scores; `None` is head_dim ** -0.5.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fitcast.gpus import Gpu
from fitcast.units import round_up

Gradients = tuple[
    torch.Tensor | None, ...
]  # of query, key, value, and of the mask where it has one
aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)


def scratch(n_bytes: int) -> torch.Tensor:
    """Memory that a kernel takes for itself, gone when nobody holds the result."""
    return torch.empty(n_bytes, dtype=torch.uint8)


def attention_kernel(
    gpu: Gpu,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    enable_gqa: bool = True,
) -> Callable[..., torch.Tensor]:
    """The kernel that `F.scaled_dot_product_attention` takes on `gpu`.

    Source: cuda/sdp_utils.cpp, `select_sdp_backend`, `check_prefer_cudnn_attention` and the
    `can_use_*` functions.
    """
    head_dim = query.shape[-1]
    if query.shape[-3] != key.shape[-3] and not enable_gqa:
        return functools.partial(math_attention, repeat=False)  # no other one broadcasts
    half = query.dtype in HALF and (gpu.has_bfloat16 or query.dtype == torch.float16)
    flash = gpu.has_flash_attention and half and head_dim == value.shape[-1]
    if flash and gpu.capability == (9, 0) and head_dim <= 128 and head_dim % 8 == 0:
        return cudnn_attention  # Hopper prefers it
    if flash and mask is None and head_dim <= 256:
        return flash_attention
    aligned = (head_dim | value.shape[-1]) % (8 if half else 4) == 0
    same_heads = query.shape[-3] == key.shape[-3]  # it cannot repeat them itself
    if same_heads and aligned and (half or query.dtype == torch.float32):
        return efficient_attention
    return math_attention


def math_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    repeat: bool = True,
) -> torch.Tensor:
    """Writes the scores out, in float32 for half inputs, heads repeated or broadcast by `@`.

    Source: attention.cpp, `_scaled_dot_product_attention_math`.
    """
    q, k, v = (t.float() if t.dtype in HALF else t for t in (query, key, value))  # kept to the end
    root = (scale or q.shape[-1] ** -0.5) ** 0.5
    scaled = q * root
    if is_causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    mask = additive_mask(mask, q.dtype)
    groups = q.shape[-3] // k.shape[-3] if repeat else 1
    many_k, many_v = (t.repeat_interleave(groups, -3) if groups > 1 else t for t in (k, v))
    scores = scaled @ (many_k.transpose(-2, -1) * root)
    if mask is not None:
        scores.add_(mask)
    weights, scores = _SafeSoftmax.apply(scores), None
    if dropout:
        weights = F.dropout(weights, dropout)
    second_result = weights.to(query.dtype)  # dropped by the caller, alive until then
    output = (weights @ many_v).to(query.dtype)
    del weights, many_k, many_v, scaled, mask, v, k, q, second_result  # as C++ leaves a scope
    return output


def additive_mask(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A boolean mask as 0 and -inf. Source: attention.cpp, `convert_boolean_attn_mask`."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, torch.empty((), dtype=dtype), torch.empty((), dtype=dtype))


class _SafeSoftmax(torch.autograd.Function):
    """Softmax whose fully masked rows are 0. Source: ../SoftMax.cpp, `_safe_softmax`."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(scores, -1)
        masked = scores.eq(0)  # a byte a score
        masked.all(-1, keepdim=True)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (weights,) = ctx.saved_tensors
        return aten._softmax_backward_data(grad, weights, -1, weights.dtype)


def efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Keeps q, k, v, the output and one float32 a row; an unaligned mask is padded.

    Source: attention.cpp, `pre_process_mask`.
    """
    mask = additive_mask(mask, query.dtype)
    if mask is not None:
        if mask.shape[-1] % 16:
            mask = F.pad(mask, (0, -mask.shape[-1] % 16))[..., : mask.shape[-1]]
        mask = mask.expand(*query.shape[:-1], key.shape[-2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, _needs_grad(query, key, value), dropout, is_causal, scale=scale
    )[0]


def efficient_attention_backward(gpu: Gpu, func: Callable, *args: Any, **kwargs: Any) -> Gradients:
    """A float32 sum for each row, and float32 tiles in which blocks of keys add up dQ.

    Beyond a head size of 128, half inputs also add up dK and dV in float32. Source:
    cuda/mem_eff_attention/kernel_backward.h, `workspace_size`; kernels/cutlassB.h for the blocks.
    """
    (batch, heads, rows, head_dim), keys = args[1].shape, args[2].shape[-2]
    result = func(*args, **kwargs)
    delta = scratch(4 * batch * heads * rows)
    block = 64 if head_dim <= 64 else 128
    lock_and_tile = 16 + 4 * block * block
    n_bytes = -(-rows // block) * -(-head_dim // block) * lock_and_tile
    if head_dim > 128 and args[1].dtype in HALF:
        n_bytes += 2 * 4 * round_up(keys, 64) * round_up(head_dim, block)
    scratch(batch * heads * n_bytes)
    del delta
    return result


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Keeps q, k, v, the output and one float32 a row; head sizes are padded to multiples of 8.

    Source: attention.cpp, `pad_last_dim`.
    """
    head_dim = query.shape[-1]
    if head_dim % 8:
        query, key, value = (F.pad(t, (0, -head_dim % 8)) for t in (query, key, value))
    return aten._scaled_dot_product_flash_attention(
        query, key, value, dropout, is_causal, scale=scale or head_dim**-0.5
    )[0][..., :head_dim]


def flash_attention_backward(gpu: Gpu, func: Callable, *args: Any, **kwargs: Any) -> Gradients:
    """dQ and row sums in float32, in blocks of 128 rows; dK and dV of each of grouped heads.

    Source: cuda/flash_attn/flash_api.cpp, `mha_bwd`.
    """
    (batch, heads, rows, head_dim), key = args[1].shape, args[2]
    result = func(*args, **kwargs)
    n_bytes = 4 * batch * heads * round_up(rows, 128) * (round_up(head_dim, 32) + 1)
    scratch(n_bytes + _gradients_of_grouped_heads(heads, key))
    return result


def cudnn_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Like flash attention, with a mask where one is given.

    Source: attention.cpp, case `SDPBackend::cudnn_attention`.
    """
    return aten._scaled_dot_product_cudnn_attention(
        query,
        key,
        value,
        additive_mask(mask, query.dtype),
        _needs_grad(query, key, value),
        dropout,
        is_causal,
        scale=scale,
    )[0]


def cudnn_attention_backward(gpu: Gpu, func: Callable, *args: Any, **kwargs: Any) -> Gradients:
    """dQ and row sums in float32; dK and dV of each of grouped heads.

    cuDNN's source is closed: its own allocations on an H200 (cuDNN 9) equal this to the byte.
    """
    (batch, heads, rows, head_dim), key = args[1].shape, args[2]
    result = func(*args, **kwargs)
    n_bytes = 256 + 4 * batch * heads * rows * (head_dim + 1)
    scratch(n_bytes + _gradients_of_grouped_heads(heads, key))
    return result


def _gradients_of_grouped_heads(heads: int, key: torch.Tensor) -> int:
    batch, key_heads, keys, head_dim = key.shape
    return 0 if key_heads == heads else 2 * batch * heads * keys * head_dim * key.itemsize


def _needs_grad(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
