"""What bitsandbytes does to memory on CUDA: 4-bit weights, 8-bit and paged optimizer state.

Not modelled: 8-bit weights, values. Sources are files of bitsandbytes.

Shapes: M rows of the input (B x S), K its columns, N outputs; a weight is (N, K), packed into
N x K / 2 bytes, with one scale (absmax) for each `blocksize` weights.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from fitcast.gpus import Gpu

MANAGED_ELEMENTS = 1e5  # paged optimizers page the state of parameters from this size up


def scales_before_weight(
    gpu: Gpu,
    func: Callable,
    weight: torch.Tensor,
    blocksize: int,
    quant_type: str,
    quant_storage: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_4bit` of a weight, (N, K): its packed bytes and scales; the scales come first.

    Source: backends/cuda/ops.py.
    """
    absmax = torch.empty(-(-weight.numel() // blocksize))
    n_packed = -(-weight.numel() // (2 * quant_storage.itemsize))
    return torch.empty(n_packed, 1, dtype=quant_storage), absmax


def gemm_4bit(
    gpu: Gpu,
    func: Callable,
    x: torch.Tensor,
    weight: torch.Tensor,
    shape: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    bias: torch.Tensor | None = None,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """x times a 4-bit weight: a fused kernel for few rows, else the whole weight is dequantized.

    Args:
        gpu: Whose kernel.
        func: The operation itself, not called.
        x: (..., K).
        weight: (N x K / 2, 1) packed bytes.
        shape: (N, K).
        absmax: Scales in float32; with double quantization those of `absmax_8bit`.
        blocksize: Weights behind one scale.
        quant_type: "nf4" or "fp4"; memory does not depend on it.
        bias: (N,).
        absmax_8bit: One byte a scale, where the scales are quantized, too.
        absmax_code: The 256 values of those bytes.
        absmax_offset: Their mean, a scalar.

    Returns:
        (..., N) in the dtype of x.

    Source: backends/cuda/ops.py, `gemm_4bit` and `_dequant_linear_fallback`.
    """
    rows = x.numel() // x.shape[-1]
    if has_fused_kernel(gpu, x.dtype, rows, shape, blocksize):
        return torch.empty(*x.shape[:-1], shape[0], dtype=x.dtype)
    unscaled = None
    if absmax_8bit is not None and absmax_offset is not None:
        unscaled = torch.empty_like(absmax_8bit, dtype=torch.float32)
        absmax = unscaled + absmax_offset
    dequantized = torch.empty(tuple(shape), dtype=x.dtype)  # (N, K)
    result = F.linear(x, dequantized, bias)
    del absmax, unscaled, dequantized
    return result


def has_fused_kernel(
    gpu: Gpu, dtype: torch.dtype, rows: int, shape: Sequence[int], blocksize: int
) -> bool:
    """Whether bitsandbytes multiplies without dequantizing the weight first, on `gpu`.

    Args:
        gpu: Whose kernel.
        dtype: Of the input.
        rows: M, rows of the input.
        shape: (N, K) of the weight.
        blocksize: Weights behind one scale.

    Source: backends/cuda/ops.py, `gemm_4bit`; the choice by GPU is asked from its own function.
    """
    outputs, columns = shape
    library = cuda_library()
    if rows > library._gemm_4bit_custom_max_m or columns % blocksize:
        return False
    return library._gemm_4bit_use_custom_cuda(gpu, dtype, rows, outputs, columns)


@functools.cache
def cuda_library() -> ModuleType:
    """bitsandbytes' module for CUDA, imported without CUDA, knowing GPUs by our `Gpu`.

    It cannot be imported as it stands where its library of kernels was built without CUDA. This is
    a copy for asking only: a stand-in has the library's place, no operation is registered, and
    `sys.modules` does not have it. Where it asks a device for its properties by an index, this copy
    is given a `Gpu`.
    """
    from bitsandbytes import _ops, cextension

    spec = importlib.util.find_spec("bitsandbytes.backends.cuda.ops")
    assert spec is not None and spec.loader is not None  # a package without its own source
    module = importlib.util.module_from_spec(spec)
    with (
        mock.patch.object(cextension, "lib", mock.MagicMock()),
        mock.patch.object(_ops, "register_kernel", lambda *_: lambda function: function),
        mock.patch.object(torch.version, "hip", None),  # its choices for AMD are others
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", None, create=True),
    ):
        spec.loader.exec_module(module)
    vars(module)["_gpu_dispatch_props"] = lambda gpu: (gpu.multiprocessors, *gpu.capability)
    return module


def updates_in_place(gpu: Gpu, func: Callable, *args: Any, **kwargs: Any) -> None:
    """Needs nothing besides the state. Source: backends/cuda/ops.py."""


def state_buffer(
    self: Any, parameter: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """An optimizer's state for `parameter`, of its shape, one element of `dtype` for each.

    Paged state is managed memory, which the caching allocator never sees.

    Source: optim/optimizer.py, `get_state_buffer`.
    """
    if not self.is_paged or parameter.numel() < MANAGED_ELEMENTS:
        return torch.zeros_like(parameter, dtype=dtype)
    state: Any = torch.zeros_like(parameter, dtype=dtype, device="meta")
    state.is_paged, state.page_deviceid = True, 0
    return state
