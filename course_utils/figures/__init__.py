"""Every picture and control of the lessons, each under `figures.`; loaded when first drawn."""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "base": "Figure compare curves forward_backward losses memory_over_time",
    "batches": "attempts token_shares updates",
    "chain": "chains",
    "live": "Watcher",
    "numbers": "bit_fields loss_scale magnitudes scale_window smallest_updates",
    "training": "ladder lengths progress",
    "widgets": "forgetting_explorer layers_explorer levers_explorer scale_explorer split_explorer "
    "updates_explorer",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"figures has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
