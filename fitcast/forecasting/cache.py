"""Forecasts that were made before: the same question about the same model is not worked out twice.

A question is a recipe, the content of the model's config (not its path: what a path holds may
change) and a GPU. Whoever asks gets a copy of his own. `store` keeps them beyond the process.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from fitcast import models
from fitcast.forecasting import store
from fitcast.forecasting.verdict import Forecast
from fitcast.gpus import Gpu
from fitcast.recipe import TrainRecipe

REMEMBERED = 48  # forecasts; one of 8B takes about 3 MB
_remembered: OrderedDict[str, Forecast] = OrderedDict()  # the one used last comes last


def remembered(recipe: TrainRecipe, gpu: Gpu, make: Callable[[], Forecast]) -> Forecast:
    """The forecast of `recipe` on `gpu`: a copy of the one made before, or what `make` makes."""
    question = key(recipe, gpu)
    if question not in _remembered:
        found = store.read(question, gpu)
        if found is None:
            found = make()
            store.write(question, found)
        _remembered[question] = found
        if len(_remembered) > REMEMBERED:
            _remembered.popitem(last=False)
    _remembered.move_to_end(question)
    return copied(_remembered[question])


def key(recipe: TrainRecipe, gpu: Gpu) -> str:
    """A short text that is the same for the same question, and for no other.

    Raises:
        ValueError: No such model.
        FileNotFoundError: Its folder holds no config.json.
    """
    asked = dataclasses.asdict(recipe) | {"model": content(recipe.model)}
    question = json.dumps([asked, dataclasses.asdict(gpu)], sort_keys=True)
    return hashlib.sha256(question.encode()).hexdigest()


def content(model: str) -> str:
    """What a model's config says, as text; models of the same text need the same memory.

    Raises:
        ValueError: No such model.
        FileNotFoundError: Its folder holds no config.json.
    """
    if model in models.SHAPES:
        return json.dumps(models.SHAPES[model], sort_keys=True)
    path = Path(model)
    if not path.exists():
        return _hub_content(model)
    file = path if path.is_file() else path / "config.json"
    if not file.is_file():
        models.config(model)  # says what is wrong with it
    return file.read_bytes().decode(errors="replace")


@functools.cache
def _hub_content(model: str) -> str:
    return models.config(model).to_json_string()


def copied(forecast: Forecast) -> Forecast:
    """The same forecast in lists, dicts and blocks of its own."""
    return dataclasses.replace(
        forecast,
        composition=dict(forecast.composition),
        phase_peaks=dict(forecast.phase_peaks),
        largest=[block.resized(block.n_bytes) for block in forecast.largest],
        saved=[block.resized(block.n_bytes) for block in forecast.saved],
        timeline={category: list(line) for category, line in forecast.timeline.items()},
        phases=list(forecast.phases),
    )
