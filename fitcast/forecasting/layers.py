"""Where a model's layers are and how they repeat, found by structure and not by a name.

The decoder's list of layers is the one of the length that its config tells; two layers are alike
when they have the same modules, parameters and settings. Where the same kinds follow each other
again and again (dense layers first, then experts; five sliding windows, then full attention) a few
units of them are run and `depth` repeats the rest. Layers are cut off a model that was built whole,
so that whatever else depends on their number stays as it is.

Not modelled: layers that share modules with layers that were cut off; such a model is run whole.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from fitcast.forecasting.base import text_config
from fitcast.forecasting.depth import RUN
from fitcast.memory.layers import Layers

MOST_BEFORE, LONGEST_PERIOD = 8, 12  # what the search for a rhythm goes up to
PLAIN = (bool, int, float, str, type(None), torch.dtype)


@dataclass(frozen=True)
class Rhythm:
    """How the kinds of a model's layers follow each other.

    Attributes:
        total: Layers of the model.
        before: Layers ahead of those that repeat.
        period: Layers after which the kinds repeat.
    """

    total: int
    before: int
    period: int

    @property
    def periods(self) -> int:
        """Whole units that repeat."""
        return (self.total - self.before) // self.period

    @property
    def after(self) -> int:
        """Layers behind the last whole unit."""
        return (self.total - self.before) % self.period

    @property
    def run(self) -> int:
        """How many layers have to be run."""
        return self.before + min(RUN, self.periods) * self.period + self.after

    @property
    def counts(self) -> list[int]:
        """Units of each kind, for `depth.deepen`."""
        return [1] * self.before + [self.periods] + [1] * self.after

    def named(self, *paths: str) -> Layers:
        """The layers that are run, in the lists of modules called `paths`: one a model."""
        where = f"^(?:{'|'.join(map(re.escape, paths))})"
        return Layers(where, self.before, self.period, min(RUN, self.periods))


def layer_list(model: Any) -> torch.nn.ModuleList | None:
    """The decoder's list of layers: as long as its config says, else its longest.

    Lists within layers, of experts for example, are not meant.
    """
    lists, inner = [], ()
    for name, module in decoder(model).named_modules():
        if isinstance(module, torch.nn.ModuleList) and not name.startswith(inner):
            inner = (*inner, name + ".")
            lists.append(module)
    told = getattr(text_config(model.config), "num_hidden_layers", None)
    return max(lists, key=lambda found: (len(found) == told, len(found)), default=None)


def decoder(model: Any) -> Any:
    """The part of a model that predicts text; towers that see or hear are not in it."""
    text = text_config(model.config)
    if text is not model.config:
        for module in model.modules():
            if getattr(getattr(module, "config", None), "model_type", None) == text.model_type:
                return module
    try:
        return model.get_decoder()
    except AttributeError:
        return model


def rhythm(model: torch.nn.Module) -> Rhythm | None:
    """How a model's layers repeat; `None` where running fewer would save nothing."""
    layers = layer_list(model)
    if layers is None or len(layers) <= RUN or _shared(layers):
        return None
    kinds = _kinds(layers, _types(model, len(layers)))
    best = min(_rhythms(kinds), key=lambda found: (found.run, found.before), default=None)
    return best if best and best.run < len(layers) else None


def shorten(model: torch.nn.Module, count: int) -> None:
    """Cut a model's layers off after the first `count`."""
    layers = layer_list(model)
    assert layers is not None  # it has a rhythm
    del layers[count:]


def path_of(model: torch.nn.Module) -> str | None:
    """The name of the list of layers in a model that adapters may wrap."""
    layers = layer_list(model)
    names = [name for name, module in model.named_modules() if module is layers]
    return names[0] if layers is not None and names else None


def _rhythms(kinds: list[int]) -> list[Rhythm]:
    """Every way to read the kinds as some single layers and a part that repeats."""
    total, found = len(kinds), []
    for before in range(min(MOST_BEFORE, total - 1) + 1):
        for period in range(1, min(LONGEST_PERIOD, (total - before) // 2) + 1):
            ahead = range(before, total - period)
            if all(kinds[i] == kinds[i + period] for i in ahead):
                found.append(Rhythm(total, before, period))
                break
    return found


def _types(model: Any, count: int) -> list[Any]:
    """What the config says about each layer: every list in it that is as long as they are many."""
    said = vars(text_config(model.config)).values()
    lists = [v for v in said if isinstance(v, (list, tuple)) and len(v) == count]
    return [tuple(map(str, layer)) for layer in zip(*lists, strict=True)] or [()] * count


def _shared(layers: torch.nn.ModuleList) -> bool:
    """Whether a module of one layer is a module of another, too."""
    seen: set[int] = set()
    for layer in layers:
        parts = {id(p) for p in layer.parameters()} or {id(layer)}
        if seen & parts:
            return True
        seen |= parts
    return False


def _kinds(layers: torch.nn.ModuleList, types: list[Any]) -> list[int]:
    """A number for each layer; those that are alike have the same one."""
    settings = [_settings(layer) for layer in layers]
    counting = {
        name
        for name in settings[0]
        if all(type(s.get(name)) is int and s[name] - settings[0][name] == i
               for i, s in enumerate(settings))
    }  # fmt: skip
    numbers: dict[Any, int] = {}
    kinds = []
    for layer, said, type_ in zip(layers, settings, types, strict=True):
        shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters())
        plain = tuple((name, value) for name, value in said.items() if name not in counting)
        kinds.append(numbers.setdefault((shapes, plain, type_), len(numbers)))
    return kinds


def _settings(layer: torch.nn.Module) -> dict[tuple[str, str], Any]:
    """Classes and plain attributes of a layer's modules: (module, attribute) -> value."""
    said: dict[tuple[str, str], Any] = {}
    for name, module in layer.named_modules():
        said[name, "class"] = type(module).__name__
        for attribute, value in vars(module).items():
            if isinstance(value, PLAIN):
                said[name, attribute] = value
    return said
