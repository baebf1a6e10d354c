"""CUDA's autocast on fake CPU tensors: which operations it runs in float32 where a CPU's does not.

`torch.autocast` keeps one list of operations for each kind of device. CUDA's is longer: layer norm,
powers, exponentials, most losses are computed in float32 there, and their results stay float32. The
lists are read from the header that the installed PyTorch brings along, so that they are those of
its version, and are registered as autocast kernels of the CPU while CUDA is pretended.

Source: aten/src/ATen/autocast_mode.h (AT_FORALL_FP32, AT_FORALL_FP32_SET_OPT_DTYPE,
AT_FORALL_PROMOTE) and autocast_mode.cpp. Not modelled: autocast's cache of casted weights, which is
the CPU's own and works alike.
"""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

KEY = "AutocastCPU"
LISTS = ("AT_FORALL_FP32", "AT_FORALL_FP32_SET_OPT_DTYPE", "AT_FORALL_PROMOTE")
# These are re-expressed by `kernels` before autocast could see them.
ELSEWHERE = {"rms_norm", "softmax.int"}


@functools.cache
def cuda_lists() -> dict[str, tuple[str, ...]]:
    """Names of operations ("layer_norm", "pow.Tensor_Scalar") by list of the installed header."""
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    text = header.read_text("utf-8").replace("\\\n", "\n")
    found = {}
    for name in LISTS:
        body = re.search(rf"#define {name}\(_\)(.*?)(?=\n\s*\n|\n#|\n//)", text, re.DOTALL)
        pairs = re.findall(r"_\((\w+)(?:,\s*(\w+))?\)", body[1] if body else "")
        found[name] = tuple(".".join(filter(None, pair)) for pair in pairs)
    return found


@contextlib.contextmanager
def cuda_autocast() -> Iterator[None]:
    """Inside, autocast on the CPU is CUDA's: for operations that the CPU's list lacks."""
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a kernel is registered twice: on purpose
            for name, wrap in _kernels():
                library.impl(name, wrap, KEY)
        yield
    finally:
        library._destroy()


@functools.cache
def _kernels() -> tuple[tuple[str, Callable], ...]:
    policies: dict[str, Callable] = dict(
        zip(LISTS, (in_float32, with_result_in_float32, in_the_widest), strict=True)
    )
    made = []
    for listed, names in cuda_lists().items():
        for name in names:
            packet, _, overload = name.partition(".")
            operation: Any = getattr(
                getattr(torch.ops.aten, packet, None), overload or "default", None
            )
            known = operation is not None and not torch._C._dispatch_has_kernel_for_dispatch_key(
                f"aten::{name}", KEY
            )
            if known and name not in ELSEWHERE:
                made.append((name, functools.partial(policies[listed], operation)))
    return tuple(made)


def in_float32(operation: Callable, *args, **kwargs):
    """Casts what is 16 bits wide to float32 first. Source: `CastPolicy::fp32`."""
    args, kwargs = tree_map(_widened, (args, kwargs))
    return _below(operation, args, kwargs)


def with_result_in_float32(operation: Callable, *args, **kwargs):
    """Asks for a float32 result, which the kernel makes without a cast before it.

    Source: `CastPolicy::fp32_set_opt_dtype`.
    """
    if _eligible(args[0]) and kwargs.get("dtype") is None and not _has_dtype(args[1:]):
        kwargs = {**kwargs, "dtype": torch.float32}
    return _below(operation, args, kwargs)


def in_the_widest(operation: Callable, *args, **kwargs):
    """Casts to float32 when one argument has it. Source: `CastPolicy::promote`."""
    tensors = []
    tree_map(lambda x: tensors.append(x) if _eligible(x) else None, (args, kwargs))
    if any(tensor.dtype == torch.float32 for tensor in tensors):
        args, kwargs = tree_map(_widened, (args, kwargs))
    return _below(operation, args, kwargs)


def _below(operation: Callable, args: tuple, kwargs: dict):
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    with torch._C._ExcludeDispatchKeyGuard(keys):
        return operation(*args, **kwargs)


def _eligible(value: object) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.dtype != torch.float64
    )


def _has_dtype(args: tuple) -> bool:
    return any(isinstance(value, torch.dtype) for value in args)


def _widened(value: Any) -> Any:
    return value.to(torch.float32) if _eligible(value) else value
