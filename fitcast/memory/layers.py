"""Which layer a module belongs to, by its name, and which layers make up a unit that repeats.

Models name their list of layers as they like: `model.layers`, `transformer.h`, `blocks`. A unit is
one layer, or a period of several where kinds alternate (a sliding window, then full attention).

Units, in order: `before` single layers, `periods` units of `period` layers, then single layers.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

ANYWHERE = r"\blayers"  # where nobody has looked: a list called layers, wherever it is


@dataclass(frozen=True)
class Layers:
    """How a module's name tells its unit.

    Attributes:
        where: Regular expression for the name of the list of layers.
        before: Layers ahead of those that repeat, a unit each.
        period: Layers of a unit that repeats.
        periods: Units that repeat; only needed where `period` is more than 1.
    """

    where: str = ANYWHERE
    before: int = 0
    period: int = 1
    periods: int = 0

    def unit(self, module: str) -> int | None:
        """The unit that a module belongs to; `None` outside of every layer."""
        found = _pattern(self.where).search(module)
        return None if found is None else self._unit_of(int(found[1]))

    def repeats(self, name: str) -> bool:
        """Whether a parameter is one of the unit that stands for all further ones."""
        return self.unit(name) == self.before + 1

    def anonymous(self, module: str) -> str:
        """The module's name within its unit: the same in every unit."""
        return self.moved(module, 0, Layers(self.where))

    def moved(self, module: str, unit: int, into: Layers) -> str:
        """The name that a module has when its unit becomes number `unit` of `into`."""
        found = _pattern(self.where).search(module)
        if found is None:
            return module
        layer = int(found[1])
        offset = layer - self._first(self._unit_of(layer))
        return f"{module[: found.start(1)]}{into._first(unit) + offset}{module[found.end(1) :]}"

    def _unit_of(self, layer: int) -> int:
        repeating = layer - self.before
        if self.period == 1 or repeating < 0:
            return layer
        if repeating < self.periods * self.period:
            return self.before + repeating // self.period
        return self.before + self.periods + repeating - self.periods * self.period

    def _first(self, unit: int) -> int:
        """The first layer of a unit."""
        repeating = unit - self.before
        if self.period == 1 or repeating < 0:
            return unit
        return unit + min(repeating, self.periods) * (self.period - 1)


@functools.cache
def _pattern(where: str) -> re.Pattern[str]:
    return re.compile(where + r"\.(\d+)\b")
