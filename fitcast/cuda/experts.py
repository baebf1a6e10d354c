"""What a mixture of experts does on CUDA, and which tokens go to which expert.

transformers multiplies by all experts at once (`grouped_mm`), where memory does not depend on the
routing, or goes through them in a loop, where it does: there the routing is stated, `EVEN` (each
expert has its share) or `WORST` (all tokens go to the same ones). Weights of experts are parameters
of three dimensions, which bitsandbytes leaves in 16 bits, so that they are so here, too.

Sources: transformers/integrations/moe.py; PyTorch's native/cuda/GroupedBlas.cpp. Not modelled:
experts on several GPUs, kernels from the hub.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from fitcast.gpus import Gpu

EVEN, WORST = "even", "worst"


@dataclass(frozen=True)
class Routing:
    """How many experts a batch reaches, and how many tokens each of them has.

    Attributes:
        experts: That have at least one token.
        tokens: Of each of those.
    """

    experts: int
    tokens: int


def routed(case: str, experts: int, chosen: torch.Tensor) -> Routing:
    """The routing of a batch in a stated case.

    Args:
        case: `EVEN` or `WORST`.
        experts: How many there are.
        chosen: (tokens, k) of int64: each token's k experts.
    """
    tokens, k = chosen.numel() // chosen.shape[-1], chosen.shape[-1]
    if case == WORST:
        return Routing(min(k, experts), tokens)
    return Routing(experts, -(-tokens * k // experts))


@contextlib.contextmanager
def grouped_products(gpu: Gpu) -> Iterator[None]:
    """Inside, transformers chooses the product for all experts that it would choose on `gpu`.

    Before Ampere it has one of its own, which always makes a gradient of the weights. Source:
    transformers/integrations/moe.py, `_can_use_grouped_mm` and `_grouped_mm_fallback_backward`.
    """
    try:
        from transformers.integrations import moe
    except ImportError:  # before transformers 5
        yield
        return

    def can_use(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> bool:
        return gpu.capability >= (8, 0)

    with mock.patch.object(moe, "_can_use_grouped_mm", can_use):
        yield


def grouped_mm(
    gpu: Gpu,
    func: Callable,
    a: torch.Tensor,
    b: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Products of groups of rows with a weight each; nothing besides the result.

    Args:
        gpu: Whose kernel.
        func: The operation itself, which knows no fake version for float16.
        a: (S, K) rows sorted by group, or (groups, M, K).
        b: (groups, K, N) weights, or (S, N) for a gradient of weights.
        offs: (groups,) of int32, the end of each group.
        bias: Not used by transformers.
        out_dtype: Of the result, by default that of `a`.

    Returns:
        (S, N), or (groups, K, N) for a gradient; rows are padded to 16 bytes.

    Source: native/GroupedMMUtils.h, `create_grouped_gemm_output_tensor`, `_grouped_mm_fallback`.
    """
    dtype = out_dtype or a.dtype
    rows, columns = a.shape[-2], b.shape[-1]
    if a.dim() == 2 and b.dim() == 2:
        assert offs is not None  # the groups are told by it
        shape = (offs.shape[0], rows, columns)
    else:
        shape = (rows, columns) if a.dim() == 2 or b.dim() == 2 else (a.shape[0], rows, columns)
    aligned = 16 // dtype.itemsize
    padded = -(-columns // aligned) * aligned
    stride = (padded, 1) if len(shape) == 2 else (rows * padded, padded, 1)
    return torch.empty_strided(shape, stride, dtype=dtype)


def expert_loops(model: torch.nn.Module) -> list[tuple[torch.nn.Module, int]]:
    """Modules that go through their experts in a loop, and how many each has."""
    found = []
    for module in model.modules():
        count = next((n for n in map(_count_of(module), COUNTS) if n), 0)
        stacked = any(p.dim() == 3 for p in module._parameters.values() if p is not None)
        if count and (stacked or type(module).__name__.endswith("Experts")):
            config = getattr(module, "config", None)
            if getattr(config, "_experts_implementation", "eager") in (None, "eager"):
                found.append((module, count))
    return found


# What classes of experts call their number. Source: transformers/models/*/modeling_*.py.
COUNTS = ("total_experts", "num_experts", "num_local_experts", "moe_num_experts")


def _count_of(module: torch.nn.Module) -> Callable[[str], int]:
    def count(name: str) -> int:
        value = getattr(module, name, 0)
        return value if isinstance(value, int) else 0

    return count


@contextlib.contextmanager
def routing(model: torch.nn.Module, case: str, answers: Any) -> Iterator[None]:
    """Inside, questions that an experts' loop asks are answered by the routing `case`.

    Args:
        model: Whose loops.
        case: `EVEN` or `WORST`.
        answers: Has a `routing`, which is set while a loop runs (`forecasting.answers`).
    """
    handles = []

    def before(experts: int) -> Callable:
        def hook(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            chosen = [x for x in (*args, *kwargs.values()) if _is_choice(x)]
            answers.routing = routed(case, experts, chosen[0]) if chosen else None

        return hook

    def after(module: torch.nn.Module, args: tuple, result: object) -> None:
        answers.routing = None

    for module, experts in expert_loops(model):
        handles.append(module.register_forward_pre_hook(before(experts), with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_choice(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32)
