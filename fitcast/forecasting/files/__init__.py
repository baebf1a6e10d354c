"""Files that people train from: axolotl's, LLaMA-Factory's and TRL's YAML, as a forecast.

What decides memory becomes the objects of Hugging Face that the tool itself would make; they are
forecast by `huggingface.forecast_run`. What the tool would patch, and what was not understood, is
named in the forecast's `notes`. A key that is all but one that decides memory is a slip, and is
refused.

Not modelled: the tools' own trainer classes beyond Trainer's and TRL's step.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitcast.forecasting.files import axolotl, llama_factory, trl
from fitcast.forecasting.files.reading import load
from fitcast.forecasting.files.script import Script
from fitcast.gpus import T4, Gpu
from fitcast.units import Said, refusal

if TYPE_CHECKING:
    from fitcast.forecasting.verdict import Forecast

SUFFIXES = (".yaml", ".yml", ".json")
HOW = {
    "axolotl": axolotl.script,
    "LLaMA-Factory": llama_factory.script,
    "TRL": trl.script,
}


def names_one(run: object) -> bool:
    """Whether this names a file that can be read here, by its ending; config.json is a model's.

    Example:
        >>> [names_one(name) for name in ("run.yaml", "a/config.json", "llama-3.1-8b")]
        [True, False, False]
    """
    if not isinstance(run, (str, Path)):
        return False
    path = Path(run)
    return path.suffix.lower() in SUFFIXES and path.name != "config.json"


def forecast_file(path: str | Path, gpu: Gpu = T4, **changes: Any) -> Forecast:
    """What one optimizer step of the run in a file needs on a card.

    Args:
        path: Of a .yaml, .yml or .json of axolotl, LLaMA-Factory or TRL.
        gpu: The card.
        changes: What else `forecast` takes, or takes instead: `model`, `sequence_length`,
            `padded`, `levers`, ...

    Returns:
        A `Forecast`, whose `notes` name what was not understood or is not modelled.

    Raises:
        ValueError: The file cannot be read, or a value of it cannot be; the message names it.
    """
    from fitcast.forecasting.huggingface import forecast_run
    from fitcast.forecasting.lean_trainer import with_levers

    script = read(path, gpu)
    options = script.options() | {name: v for name, v in changes.items() if v is not None}
    model = options.pop("model", script.model)
    arguments = script.training_arguments(gpu)
    found = forecast_run(model, arguments, gpu=gpu, **with_levers(arguments, options))
    return dataclasses.replace(found, notes=(*script.notes, *found.notes))


def read(path: str | Path, gpu: Gpu = T4) -> Script:
    """The run that a file says, in Hugging Face's names.

    Args:
        path: Of the file.
        gpu: The card, which decides what `bf16: auto` is and which attention there is.

    Raises:
        ValueError: As `forecast_file`.
    """
    values = load(Path(path))
    return HOW[tool_of(values, path)](values, gpu)


def tool_of(values: dict[str, Any], path: str | Path) -> str:
    """Whose file this is, told by keys that only one of them has.

    Raises:
        ValueError: Nobody's.

    Example:
        >>> tool_of({"base_model": "m"}, "a.yml"), tool_of({"model_name_or_path": "m"}, "b.yml")
        ('axolotl', 'TRL')
    """
    if "base_model" in values:
        return "axolotl"
    if "model_name_or_path" not in values:
        raise refusal(
            str(path),
            "name its model, as base_model (axolotl) or model_name_or_path (LLaMA-Factory, TRL)",
            Said(f"the keys {', '.join(list(values)[:5]) or 'none'}"),
            "give the file that the tool is started with",
        )
    return "LLaMA-Factory" if llama_factory.KEYS & values.keys() else "TRL"
