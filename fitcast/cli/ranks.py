"""Several cards on the command line: how they share a model, and what each rank needs.

fitcast forecast --model llama-3.1-8b --world-size 2 --strategy fsdp2
fitcast fit --model llama-3.1-8b --world-size 2
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from fitcast.cli import options
from fitcast.units import refusal, show_bytes

if TYPE_CHECKING:
    from fitcast.forecasting.search import Fit
    from fitcast.forecasting.verdict import Forecast
    from fitcast.gpus import Gpu
    from fitcast.recipe import TrainRecipe

STRATEGIES = ("ddp", "fsdp2", "device_map")


def add_options(verb: argparse.ArgumentParser) -> None:
    """The options of `fitcast forecast` about several cards."""
    group = verb.add_argument_group("several cards (what each rank needs)")
    group.add_argument(
        "--strategy",
        metavar=f"{{{','.join(STRATEGIES)}}}",
        help="ddp: the whole model on each card; fsdp2: a part of it; device_map: some of the "
        "layers, one card at work at a time. (default: ddp)",
    )
    group.add_argument("--offload", action="store_true", help="fsdp2's parts wait in host memory.")


def asked_for(asked: argparse.Namespace) -> bool:
    """Whether a strategy was typed.

    Raises:
        ValueError: It belongs to another step or stands beside a file; or offload without it.
    """
    if asked.strategy is None:
        if asked.offload:
            raise refusal("--offload", "be given with --strategy fsdp2", True, "or be left out")
        return False
    if asked.file or asked.step.lower() != "train":
        raise refusal(
            "--strategy", "be given for a training step of --model", asked.strategy,
            "leave out --step and the file",
        )  # fmt: skip
    return True


def forecast_asked(asked: argparse.Namespace, gpu: Gpu, recipe: TrainRecipe) -> Forecast:
    """One rank's forecast; all are alike. Two ranks unless --world-size says more.

    Of a device map it is the fullest card's. Parts are trained by AdamW, and a device map with the
    full loss, unless something else is typed, which is then refused.

    Raises:
        ValueError: No such strategy, one card only, or an optimizer that takes no parts.
    """
    from fitcast.forecasting.ranks import forecast_ranks

    strategy = options.one_of("strategy", asked.strategy, STRATEGIES)
    world_size = recipe.world_size if hasattr(asked, "world_size") else 2
    needs = {"fsdp2": {"optimizer": "adamw"}, "device_map": {"loss": "full"}}.get(strategy, {})
    own: dict[str, Any] = {n: value for n, value in needs.items() if not hasattr(asked, n)}
    alone = dataclasses.replace(recipe, world_size=1, **own)
    return forecast_ranks(
        alone, gpu, strategy=strategy, world_size=world_size, offload=asked.offload
    )


def fit_data(best: Fit) -> dict[str, Any]:
    """The strategy and how each was weighed, as JSON's types; of one card nothing."""
    weighed = getattr(best, "weighed", ())
    if not weighed:
        return {}
    ways = [
        {
            "strategy": way.name,
            "why": way.why,
            "verdict": way.forecast and way.forecast.verdict,
            "device_bytes": way.forecast and way.forecast.device_bytes,
        }
        for way in weighed
    ]
    return {"strategy": best.strategy, "offload": best.offload, "weighed": ways}  # pyright: ignore


def fit_lines(best: Fit) -> list[str]:
    """The same for a reader: the verdict of each rank, and a line for each way."""
    weighed = getattr(best, "weighed", ())
    if not weighed:
        return []
    low, high = (show_bytes(n, "GiB") for n in best.forecast.device_bytes)
    ranks = range(best.recipe.world_size)
    each = [f"  rank {n}: {best.forecast.verdict}, {low} to {high}" for n in ranks]
    return ["strategy:", *(f"  {way}" for way in weighed), *each]
