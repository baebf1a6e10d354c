"""Floating-point operations of matrix products and attention, from the shapes of their inputs.

PyTorch's own formulas, made to work for grouped keys and values before torch 2.13, too (Colab's
2.11 refuses them). Not counted: everything elementwise. Source: torch/utils/flop_counter.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
# Attention: query and output (batch, heads, rows, head_dim), key and value with kv_heads, keys.
FORWARD = [
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
]
BACKWARD = [
    aten._scaled_dot_product_flash_attention_backward,
    aten._scaled_dot_product_efficient_attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward,
]


def grouped(formula: Callable[..., int], query: int) -> Callable[..., int]:
    """The formula for keys and values with fewer heads than the query: each serves several.

    Args:
        formula: Takes tensors or shapes, (batch, heads, length, head_dim) each.
        query: Position of the query among the arguments; key and value follow.
    """

    def count(*args: Any, **kwargs: Any) -> int:
        heads = args[query].shape[1]
        shared = [
            (tensor.shape[0], heads, *tensor.shape[2:]) for tensor in args[query + 1 : query + 3]
        ]
        return formula(*args[: query + 1], *shared, *args[query + 3 :], **kwargs)

    return count


# Operation: its count, called with the operation's own arguments and `out_val=` its result.
FLOPS = flop_registry | {
    **{kernel: grouped(flop_registry[kernel], 0) for kernel in FORWARD},
    **{kernel: grouped(flop_registry[kernel], 1) for kernel in BACKWARD},  # 0 is the gradient
}
FLOPS |= {  # PyTorch counts attention's CUDA kernels only; the CPU's do the same
    aten._scaled_dot_product_flash_attention_for_cpu: FLOPS[FORWARD[0]],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: FLOPS[BACKWARD[0]],
}


def matrix_flops(func: Any, args: tuple, kwargs: dict, result: object) -> int:
    """Multiplications and additions of a matrix product or an attention kernel, else 0.

    Args:
        func: The operation, an `OpOverload`.
        args, kwargs: What it was called with.
        result: What it gave.
    """
    packet = func.overloadpacket
    if packet in FLOPS:
        return FLOPS[packet](*args, **kwargs, out_val=result)
    if packet._qualified_op_name == "bitsandbytes::gemm_4bit":
        return 2 * args[0].numel() * args[2][0]  # x is (..., K), the weight's shape (N, K)
    if packet is aten._grouped_mm:
        return grouped_flops(*args[:2])
    return 0


def grouped_flops(a: torch.Tensor, b: torch.Tensor) -> int:
    """Of products of groups of rows with a weight each, as experts are multiplied.

    Args:
        a: (S, K) rows in groups, (K, S) for a gradient of weights, or (groups, M, K).
        b: (groups, K, N) weights, (S, N) for a gradient of weights, or (K, S) columns in groups.
    """
    each_column_once = a.dim() == 3 and b.dim() == 2  # meets the rows of its own group only
    return 2 * a.numel() * b.shape[-1] // (a.shape[0] if each_column_once else 1)
