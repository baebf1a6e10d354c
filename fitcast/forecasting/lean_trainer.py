"""A script's trainer with the levers on its model, as `apply_levers(trainer.model)` puts them.

The class is the script's own, which pulls the levers once it is made. So a forecast runs the very
code that the script will run.
"""

from __future__ import annotations

from typing import Any

from fitcast.step.apply import apply_levers
from fitcast.units import refusal


def with_levers(arguments: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Options of `forecast_run`, `levers` among them turned into a trainer that pulls them.

    Args:
        arguments: Of the run; they say the trainer's class, unless the options do.
        options: `levers` is True for all that the model can take, or keywords of `apply_levers`.

    Raises:
        ValueError: Some layers only would be checkpointed, or levers are neither.
    """
    levers = options.pop("levers", None)
    if not levers:
        return options
    if levers is not True and not isinstance(levers, dict):
        raise refusal(
            "levers", "be True or keywords of apply_levers", levers, "for example dict(mlp='stock')"
        )
    named = {} if levers is True else levers
    if named.get("checkpointed_layers") not in (None, "all", 0):
        raise refusal(
            "checkpointed_layers", "be 'all' or 0 in the forecast of a script",
            named["checkpointed_layers"], "a TrainRecipe forecasts some layers",
        )  # fmt: skip
    from fitcast.forecasting.stage import trainer_of

    return options | {"trainer": _lean(options.get("trainer") or trainer_of(arguments), named)}


def _lean(trainer: type, levers: dict[str, Any]) -> type:
    def init(self: Any, *args: Any, **named: Any) -> None:
        trainer.__init__(self, *args, **named)
        apply_levers(self.model, **levers)

    # of the same module: who asks whose trainer this is, asks that
    return type(trainer.__name__, (trainer,), {"__init__": init, "__module__": trainer.__module__})
