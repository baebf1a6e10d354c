"""What bitsandbytes does to memory on CUDA: 4-bit weights, 8-bit and paged optimizer state.

Not modelled: 8-bit weights, values. Sources are files of bitsandbytes.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from fitcast.gpus import Gpu

MANAGED_ELEMENTS = 1e5  # paged optimizers page the state of parameters from this size up


def scales_before_weight(gpu, func, weight, blocksize, quant_type, quant_storage):
    """The scales are allocated first. Source: backends/cuda/ops.py."""
    absmax = torch.empty(-(-weight.numel() // blocksize))
    n_packed = -(-weight.numel() // (2 * quant_storage.itemsize))
    return torch.empty(n_packed, 1, dtype=quant_storage), absmax


def gemm_4bit(
    gpu,
    func,
    x,
    weight,
    shape,
    absmax,
    blocksize,
    quant_type,
    bias=None,
    absmax_8bit=None,
    absmax_code=None,
    absmax_offset=None,
):
    """A fused kernel for few rows; else the whole weight is dequantized for this product.

    Source: backends/cuda/ops.py, `gemm_4bit` and `_dequant_linear_fallback`.
    """
    rows, columns = x.numel() // x.shape[-1], shape[1]
    most_rows, use_fused_kernel = bitsandbytes_choice(gpu)
    if (
        rows <= most_rows
        and columns % blocksize == 0
        and use_fused_kernel(0, x.dtype, rows, shape[0], columns)
    ):
        return torch.empty(*x.shape[:-1], shape[0], dtype=x.dtype)
    unscaled = None
    if absmax_8bit is not None:
        unscaled = torch.empty_like(absmax_8bit, dtype=torch.float32)
        absmax = unscaled + absmax_offset
    dequantized = torch.empty(tuple(shape), dtype=x.dtype)
    result = F.linear(x, dequantized, bias)
    del absmax, unscaled, dequantized
    return result


@functools.cache
def bitsandbytes_choice(gpu: Gpu) -> tuple[int, Callable]:
    """The most rows and the function that choose bitsandbytes' kernel, from its own source.

    Its CUDA module cannot be imported without CUDA, so the two are read from the file.
    """
    folder = Path(importlib.util.find_spec("bitsandbytes").origin).parent
    tree = ast.parse((folder / "backends" / "cuda" / "ops.py").read_text("utf-8"))
    function = next(
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "_gemm_4bit_use_custom_cuda"
    )
    numbers: dict[str, int] = {}
    for node in ast.walk(tree):  # the first one is CUDA's, a second one ROCm's
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            numbers.setdefault(ast.unparse(node.targets[0]), node.value.value)
    names = numbers | {
        "functools": functools,
        "torch": torch,
        "_gpu_dispatch_props": lambda _: (gpu.multiprocessors, *gpu.capability),
    }
    exec(compile(ast.Module([function], []), "bitsandbytes", "exec"), names)
    return numbers["_gemm_4bit_custom_max_m"], names[function.name]


def updates_in_place(gpu, func, *args, **kwargs):
    """Needs nothing besides the state. Source: backends/cuda/ops.py."""


def state_buffer(self, parameter: torch.Tensor, dtype: torch.dtype = torch.float32):
    """Paged state is managed memory, which the caching allocator never sees.

    Source: optim/optimizer.py, `get_state_buffer`.
    """
    if not self.is_paged or parameter.numel() < MANAGED_ELEMENTS:
        return torch.zeros_like(parameter, dtype=dtype)
    state = torch.zeros_like(parameter, dtype=dtype, device="meta")
    state.is_paged, state.page_deviceid = True, 0
    return state
