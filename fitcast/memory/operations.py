"""Which operations a step dispatches, how often, and in which format each one's result is.

Not modelled: time, memory (`ledger` counts it).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

MATMULS = ("mm", "addmm")  # with a weight matrix; attention's own products are batched


def name_of(dtype: torch.dtype) -> str:
    """A dtype as the formats go here: "float16" for `torch.float16`."""
    return str(dtype).removeprefix("torch.")


class OperationLog(TorchDispatchMode):
    """Counts the operations that run inside it by name and dtype of their result.

    Attributes:
        counts: (operation, format) to how often; backward operations included.
    """

    def __init__(self):
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        if isinstance(first, torch.Tensor) and first.is_floating_point():
            self.counts[func.__name__.split(".")[0], name_of(first.dtype)] += 1
        return result

    @property
    def matmuls(self) -> dict[str, int]:
        """Products with weight matrices, by the format in which they ran."""
        formats: Counter[str] = Counter()
        for (name, dtype), count in self.counts.items():
            formats[dtype] += count if name in MATMULS else 0
        return dict(sorted((+formats).items()))
