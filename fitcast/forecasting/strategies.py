"""Which way to use several GPUs: each with the whole model, each with a part, parts on the host.

    fit(recipe, T4, world_size=2).strategy

DDP is the fastest and holds all on each card; FSDP2 holds a part and gathers each layer three times
a step, the embedding too unless the host sends its rows; with offload each layer comes from the
host first. So the first one that fits is taken, and each answer says how the others were weighed.
What travels takes time that no forecast here counts: `KEPT` is what two H200 over NVLink kept of
twice one card's speed, a T4's PCIe keeps less.

Not weighed: device maps (`forecasting.device_map`), which use one card at a time. Not modelled: the
bus.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fitcast.forecasting import search
from fitcast.forecasting.checks import check_card, check_recipe
from fitcast.forecasting.ranks import forecast_ranks
from fitcast.forecasting.search import DoesNotFit, Fit
from fitcast.forecasting.verdict import Forecast
from fitcast.gpus import T4, Gpu
from fitcast.recipe import TrainRecipe
from fitcast.step.apply import BEST
from fitcast.units import show_bytes

# Tokens/s of two ranks over twice those of one process: "8b ..." in tests/data/h200_ranks.json.
KEPT = {"ddp": 0.88, "fsdp2": 0.69}
SPEED = "without what travels; two H200 over NVLink kept {:.0%}, PCIe keeps less"
HOST_EMBEDDING, OFFLOAD = "fsdp2 --embedding host", "fsdp2 --offload"
WHOLE = {
    "ddp": "ddp",
    "fsdp2": "fsdp2",
    HOST_EMBEDDING: "fsdp2 with the embedding on the host",
    OFFLOAD: "fsdp2 with its parts on the host",
}
# What a step waits for, and tokens/s of Qwen3-32B at 1 x 1024: "32b ..." in the same file.
FROM_HOST = {
    HOST_EMBEDDING: ("the embedding's rows come", 1267),
    OFFLOAD: ("each layer comes", 1103),
}
NOT_NEEDED = {
    HOST_EMBEDDING: "not needed, and slower",
    OFFLOAD: "not needed, and the slowest",
}


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """A way to use the cards: its name, why it is taken or not, and one rank's forecast, if any."""

    name: str
    why: str
    forecast: Forecast | None = None

    def __str__(self) -> str:
        return f"{WHOLE[self.name]}: {self.why}"


@dataclass(frozen=True, kw_only=True)
class RanksFit(Fit):
    """Settings for several cards; `forecast` is one rank's.

    Attributes:
        strategy: "ddp" or "fsdp2".
        offload: Whether FSDP2's parts wait on the host.
        weighed: Every way, in the order of its speed.
    """

    strategy: str
    offload: bool = False
    weighed: tuple[Weighed, ...] = ()


def fit(
    recipe: TrainRecipe,
    gpu: Gpu = T4,
    target_effective_batch: int | None = None,
    *,
    world_size: int | None = None,
    **options: Any,
) -> Fit:
    """The fastest settings that fit one card, or each of several with the strategy for them.

    Args:
        recipe: What is trained.
        gpu: The card, or each of them.
        target_effective_batch: Sequences behind one optimizer step; by default the recipe's own.
        world_size: How many cards; by default the recipe's.
        options: As for `search.fit`, which explains what is tried on one card.

    Returns:
        A `Fit`; of several cards a `RanksFit`, with the reason for its strategy.

    Raises:
        ValueError: A target that cannot be divided, or an option's value.
        DoesNotFit: Nothing fits, on the host neither.
    """
    check_recipe(recipe)
    check_card(gpu)
    if world_size is not None:
        recipe = dataclasses.replace(recipe, world_size=world_size)
    if recipe.world_size < 2:
        return search.fit(recipe, gpu, target_effective_batch, **options)
    try:
        found = search.fit(recipe, gpu, target_effective_batch, **options)
    except DoesNotFit as error:
        return _in_parts(recipe, gpu, target_effective_batch, options, f"does not fit ({error})")
    return _whole_on_each(found)


def _whole_on_each(found: Fit) -> RanksFit:
    """DDP's answer, with FSDP2's forecast of the same step beside it."""
    gpu, recipe = found.forecast.gpu, found.recipe
    speed = SPEED.format(KEPT["ddp"])
    taken = f"taken, it fits each {gpu.name}, and travels least: gradients, once a step ({speed})"
    weighed = [Weighed(name="ddp", why=taken, forecast=found.forecast)]
    try:
        parts = forecast_ranks(_lean(recipe, 1, 1), gpu, strategy="fsdp2",
                               world_size=recipe.world_size)  # fmt: skip
    except ValueError as error:
        weighed.append(Weighed(name="fsdp2", why=f"cannot be forecast ({error})"))
    else:
        needs = f"not needed, 1 sequence takes {show_bytes(parts.device_bytes[1])} a card"
        slower = SPEED.format(KEPT["fsdp2"])
        weighed.append(Weighed(name="fsdp2", why=f"{needs} ({slower})", forecast=parts))
    weighed += [Weighed(name=name, why=why) for name, why in NOT_NEEDED.items()]
    return RanksFit(**vars(found), strategy="ddp", weighed=tuple(weighed))


def _in_parts(
    recipe: TrainRecipe, gpu: Gpu, target: int | None, options: dict[str, Any], why_not: str
) -> RanksFit:
    """FSDP2's answer: on the cards, or else with ever more on the host."""
    weighed = [Weighed(name="ddp", why=why_not)]
    per_gpu = search._sequences_per_gpu(recipe, target)
    progress: Callable[[str], None] = options.get("progress", lambda text: None)
    ways = _ways(recipe)
    for name, start in ways.items():
        progress(name)
        try:
            best, smallest = _largest_batch(start, gpu, per_gpu, name == OFFLOAD)
        except ValueError as error:
            if start is recipe:
                raise
            weighed.append(Weighed(name=name, why=f"cannot be taken ({error})"))
            continue
        if best is None:
            wanted = smallest.unlimited_reserved_bytes[1] + gpu.context_bytes
            needs = f"{show_bytes(wanted)} with one sequence"
            weighed.append(Weighed(name=name, why=f"does not fit ({needs})", forecast=smallest))
            continue
        why = f"taken, a part of the model fits each {gpu.name} ({_pace(name)})"
        weighed.append(Weighed(name=name, why=why, forecast=best[1]))
        left = [way for way in ways if way not in {one.name for one in weighed}]
        weighed += [Weighed(name=way, why=NOT_NEEDED[way]) for way in left]
        found = search._found(best, options.get("utilisation"), search.as_it_came(recipe, gpu))
        return RanksFit(
            **vars(found), strategy="fsdp2", offload=name == OFFLOAD, weighed=tuple(weighed)
        )
    raise DoesNotFit("; ".join(map(str, weighed)) + "; shorten the sequence, or take more cards")


def _ways(recipe: TrainRecipe) -> dict[str, TrainRecipe]:
    """FSDP2's ways in the order of their speed, each with the recipe that it starts from."""
    hosted = dataclasses.replace(recipe, embedding="host")
    ways = {"fsdp2": recipe, HOST_EMBEDDING: hosted, OFFLOAD: recipe}
    if hosted == recipe:  # asked for already
        del ways[HOST_EMBEDDING]
    return ways


def _pace(name: str) -> str:
    """What is known of the speed of FSDP2, on the cards or with a part on the host."""
    if name not in FROM_HOST:
        return SPEED.format(KEPT["fsdp2"])
    what, speed = FROM_HOST[name]
    return f"{what} over the bus; {speed:,} tokens/s for 32B on two H200".replace(",", " ")


def _largest_batch(
    recipe: TrainRecipe, gpu: Gpu, per_gpu: int, offload: bool
) -> tuple[tuple[TrainRecipe, Forecast] | None, Forecast]:
    """The largest micro batch of 1, 2, 4, ... that fits in parts, and what one sequence takes."""
    best, smallest, batch = None, None, 1
    while per_gpu % batch == 0:
        lean = _lean(recipe, batch, per_gpu // batch)
        seen = forecast_ranks(
            lean, gpu, strategy="fsdp2", world_size=recipe.world_size, offload=offload
        )
        smallest = smallest or seen
        if seen.margin_bytes < 0:
            break
        best, batch = (lean, seen), 2 * batch
    assert smallest is not None  # one sequence divides any number
    return best, smallest


def _lean(recipe: TrainRecipe, micro_batch: int, accumulated: int) -> TrainRecipe:
    """The recipe with what saves memory in parts, and the optimizer that takes them."""
    levers: dict[str, Any] = {name: value for name, (value, _) in BEST.items()}
    return dataclasses.replace(
        recipe,
        **levers,
        loss="lean" if recipe.lora_rank else "chunked",
        optimizer="adamw",
        checkpointed_layers="all",
        micro_batch_size=micro_batch,
        gradient_accumulation_steps=accumulated,
    )
