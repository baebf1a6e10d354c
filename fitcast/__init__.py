"""Forecast, count and shrink the memory of an LLM fine-tune, from a machine without a GPU.

    from fitcast import T4, TrainRecipe, forecast
    forecast(TrainRecipe(model="llama-3.1-8b", amp_dtype="float16", sequence_length=2048), T4).fits

Every name below is loaded when it is first asked for: `import fitcast` brings no torch. What each
is for, with examples, stands in fitcast/README.md. Cards and shapes by name are in the modules
`fitcast.gpus` and `fitcast.models`.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; what runs is `__getattr__`
    from fitcast.cli.doctor import doctor
    from fitcast.forecasting.ask import forecast
    from fitcast.forecasting.block import count_block
    from fitcast.forecasting.fake import fake_model, fake_tensors
    from fitcast.forecasting.forecast import Forecast, forecast_step
    from fitcast.forecasting.generation import forecast_generation
    from fitcast.forecasting.merging import forecast_merge
    from fitcast.forecasting.other_steps import forecast_evaluation, forecast_resume
    from fitcast.forecasting.search import DoesNotFit, levers
    from fitcast.forecasting.strategies import fit
    from fitcast.gpus import T4, Gpu, describe, detect, device, emulate, preset
    from fitcast.memory.ledger import MemoryLedger
    from fitcast.memory.report import MemoryReport
    from fitcast.recipe import TrainRecipe
    from fitcast.step.apply import apply_levers
    from fitcast.step.losses import chunked_loss
    from fitcast.training.export import merge
    from fitcast.training.measurement import measure_step
    from fitcast.training.preflight import preflight
    from fitcast.training.trainer import build_model, train
    from fitcast.units import GIB, MIB, show_bytes

# On some CPUs bitsandbytes reports a missing optional kernel when transformers imports it; the
# stored outputs of lessons would differ from machine to machine.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# The hub's client counts who uses it unless it is told not to; a learner's own choice stands.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

__all__ = [
    "DoesNotFit",
    "Forecast",
    "GIB",
    "Gpu",
    "MIB",
    "MemoryLedger",
    "MemoryReport",
    "T4",
    "TrainRecipe",
    "apply_levers",
    "build_model",
    "chunked_loss",
    "count_block",
    "describe",
    "detect",
    "device",
    "doctor",
    "emulate",
    "fake_model",
    "fake_tensors",
    "fit",
    "forecast",
    "forecast_evaluation",
    "forecast_generation",
    "forecast_merge",
    "forecast_resume",
    "forecast_step",
    "levers",
    "measure_step",
    "merge",
    "preflight",
    "preset",
    "show_bytes",
    "train",
]
_MODULES = {
    "recipe": "TrainRecipe",
    "gpus": "Gpu T4 describe detect device emulate preset",
    "units": "GIB MIB show_bytes",
    "memory.ledger": "MemoryLedger",
    "memory.report": "MemoryReport",
    "forecasting.ask": "forecast",
    "forecasting.forecast": "Forecast forecast_step",
    "forecasting.search": "DoesNotFit levers",
    "forecasting.strategies": "fit",
    "forecasting.generation": "forecast_generation",
    "forecasting.merging": "forecast_merge",
    "forecasting.other_steps": "forecast_evaluation forecast_resume",
    "forecasting.fake": "fake_model fake_tensors",
    "forecasting.block": "count_block",
    "step.apply": "apply_levers",
    "step.losses": "chunked_loss",
    "training.measurement": "measure_step",
    "training.preflight": "preflight",
    "training.trainer": "build_model train",
    "training.export": "merge",
    "cli.doctor": "doctor",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"fitcast has no {name!r}; it has {', '.join(__all__)}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found  # the next time without this detour
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
