"""Every picture and control of the lessons, each under `figures.`; loaded when first drawn."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; what runs is `__getattr__`
    from course_utils.figures.base import (
        Figure,
        compare,
        curves,
        forward_backward,
        losses,
        memory_over_time,
    )
    from course_utils.figures.batches import attempts, token_shares, updates
    from course_utils.figures.chain import chains, held_beside
    from course_utils.figures.live import Watcher
    from course_utils.figures.numbers import (
        bit_fields,
        loss_scale,
        magnitudes,
        scale_window,
        smallest_updates,
    )
    from course_utils.figures.training import lengths, progress, two_worlds
    from course_utils.figures.widgets import (
        adapters_explorer,
        forgetting_explorer,
        layers_explorer,
        levers_explorer,
        ranks_explorer,
        scale_explorer,
        split_explorer,
        updates_explorer,
    )

__all__ = [
    "Figure",
    "Watcher",
    "adapters_explorer",
    "attempts",
    "bit_fields",
    "chains",
    "compare",
    "curves",
    "forgetting_explorer",
    "forward_backward",
    "held_beside",
    "layers_explorer",
    "lengths",
    "levers_explorer",
    "loss_scale",
    "losses",
    "magnitudes",
    "memory_over_time",
    "progress",
    "ranks_explorer",
    "scale_explorer",
    "scale_window",
    "smallest_updates",
    "split_explorer",
    "token_shares",
    "two_worlds",
    "updates",
    "updates_explorer",
]
_MODULES = {
    "base": "Figure compare curves forward_backward losses memory_over_time",
    "batches": "attempts token_shares updates",
    "chain": "chains held_beside",
    "live": "Watcher",
    "numbers": "bit_fields loss_scale magnitudes scale_window smallest_updates",
    "training": "lengths progress two_worlds",
    "widgets": "adapters_explorer forgetting_explorer layers_explorer levers_explorer "
    "ranks_explorer scale_explorer split_explorer updates_explorer",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"figures has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
