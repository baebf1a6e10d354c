"""Which settings fit a GPU and train fastest; which single change saves what, at which price.

Every answer is a forecast: nothing is interpolated. Times are roofline times divided by a stated
utilisation: each operation takes as long as its arithmetic at the GPU's peak rate or its traffic at
the peak bandwidth, whichever is longer. On the GPU-bound rows of tests/data/h200_steps.json that
ratio is 0.56 to 0.64, stock attention or not. A step of small operations takes as long as Python
needs to launch them.

Not modelled: communication; transfers to the host (so `offload_checkpoints` is tried only when
nothing else fits).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from fitcast.forecasting.fake import meta_model
from fitcast.forecasting.forecast import Forecast, checked_config, forecast
from fitcast.gpus import T4, Gpu
from fitcast.recipe import WHOLE_NUMBERS, TrainRecipe
from fitcast.step.levers import odd_head
from fitcast.units import show_bytes, with_article

UTILISATION = 0.6
LAUNCH_SECONDS = 4.5e-5  # of one operation, Python included: recorded_runs.json, group "launch"


class DoesNotFit(ValueError, MemoryError):
    """No setting of this recipe fits the GPU."""


@dataclass(frozen=True, kw_only=True)
class Lever:
    """One change of a recipe and what it does to peak and time.

    Attributes:
        change: What changes, in words.
        recipe: The recipe with this change.
        saved_bytes: Peak before minus peak after.
        speedup: Tokens per second after over before: above 1 is faster.
        forecast: Of the changed recipe.
    """

    change: str
    recipe: TrainRecipe
    saved_bytes: int
    speedup: float
    forecast: Forecast

    def __str__(self) -> str:
        sign = "-" if self.saved_bytes > 0 else "+"
        pace = (
            f"{self.speedup:.1f}x faster"
            if self.speedup >= 1.05
            else f"{1 / self.speedup:.1f}x slower"
            if self.speedup <= 0.95
            else "same speed"
        )
        return f"{self.change}: {sign}{show_bytes(abs(self.saved_bytes))}, {pace}"


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Settings that fit, their forecast and their speed on one GPU.

    Attributes:
        tokens_per_second: Estimated, on one GPU, with `utilisation` of its peak.
    """

    recipe: TrainRecipe
    forecast: Forecast
    tokens_per_second: float
    utilisation: float

    def hours(self, n_tokens: int) -> float:
        """Hours to train on `n_tokens`, padding counted, on all GPUs of the recipe."""
        return n_tokens / (self.tokens_per_second * self.recipe.world_size) / 3600


def tokens_per_second(recipe: TrainRecipe, f: Forecast, utilisation: float = UTILISATION) -> float:
    """Tokens per second of one GPU, padding counted: the GPU's pace or Python's, the slower one.

    Raises:
        ValueError: utilisation is not a fraction.
    """
    _check_utilisation(utilisation)
    tokens = recipe.tokens_per_step / recipe.world_size
    return tokens / max(f.ideal_seconds / utilisation, f.operations * LAUNCH_SECONDS)


def _check_utilisation(utilisation: float) -> None:
    if isinstance(utilisation, bool) or not 0 < utilisation <= 1:
        raise ValueError(
            f"utilisation must be above 0 and at most 1, got {utilisation!r}; 0.6 is "
            "what large steps reach"
        )


def single_changes(recipe: TrainRecipe, num_layers: int) -> dict[str, dict]:
    """Every single change that makes sense for a recipe: what it is called -> the fields."""
    k = num_layers if recipe.checkpointed_layers == "all" else recipe.checkpointed_layers
    changes: dict[str, dict] = {
        "explicit K/V attention": {"attention": "explicit_kv"},
        "stock attention": {"attention": "stock"},
        "chunked loss": {"loss": "chunked"},
        "native RMSNorm": {"norm": "native"},
        "lean MLP": {"mlp": "lean"},
        "lean rotary embedding": {"rotary": "lean"},
        "no dropout in adapters": {"lora_dropout": 0.0},
        "4-bit base": {"base": "nf4"},
        "double quantization": {"double_quant": True},
        "no k-bit upcast": {"kbit_upcast": False},
        "8-bit optimizer": {"optimizer": "adamw_8bit"},
        "paged 8-bit optimizer": {"optimizer": "paged_adamw_8bit"},
        "no padding": {"padded": False},
        "expandable segments": {"expandable_segments": True},
    }
    if recipe.lora_rank is not None:
        changes["lean adapters"] = {"adapters": "lean"}
        changes["lean loss"] = {"loss": "lean"}
        rank = max(1, recipe.lora_rank // 2)
        changes[f"rank {rank}"] = {"lora_rank": rank}
    if k:
        changes["checkpoints in host memory"] = {"offload_checkpoints": True}
        changes["keep attention's output"] = {"keep_attention": True}
    for wanted in (num_layers, num_layers // 2, 0):
        changes[f"{wanted} of {num_layers} layers checkpointed"] = {
            "checkpointed_layers": "all" if wanted == num_layers else wanted
        }
    if half := recipe.micro_batch_size // 2:
        changes[f"micro batch {half}, accumulated"] = {
            "micro_batch_size": half,
            "gradient_accumulation_steps": recipe.gradient_accumulation_steps * 2,
        }
    if (half := recipe.sequence_length // 2) > 1:
        changes[f"sequence {half}"] = {"sequence_length": half}
    return changes


def levers(
    recipe: TrainRecipe, gpu: Gpu = T4, progress: Callable[[str], None] = lambda text: None
) -> tuple[Lever, ...]:
    """Every single change of `recipe`, the one that saves most first.

    Args:
        progress: Told what is being weighed.

    Raises:
        ValueError: The recipe itself cannot run on `gpu`.
    """
    before = forecast(recipe, gpu)
    speed = tokens_per_second(recipe, before)
    found = []
    for name, fields in single_changes(recipe, checked_config(recipe).num_hidden_layers).items():
        try:
            changed = dataclasses.replace(recipe, **fields)
            if changed == recipe:
                continue
            progress(name)
            after = forecast(changed, gpu)
        except ValueError:  # a change that this recipe excludes, as offloading without checkpoints
            continue
        found.append(
            Lever(
                change=name,
                recipe=changed,
                forecast=after,
                saved_bytes=before.peak_allocated_bytes - after.peak_allocated_bytes,
                speedup=tokens_per_second(changed, after) / speed,
            )
        )
    return tuple(sorted(found, key=lambda lever: (-lever.saved_bytes, -lever.speedup)))


def fit(
    recipe: TrainRecipe,
    gpu: Gpu = T4,
    target_effective_batch: int | None = None,
    *,
    utilisation: float = UTILISATION,
    progress: Callable[[str], None] = lambda text: None,
) -> Fit:
    """The fastest micro batch, accumulation, k, loss, attention, kept attention, offload that fit.

    They fit even at the forecast's upper bound (`margin_bytes` is not negative). Only micro batches
    of 1, 2, 4, ... are tried. Segments are always expandable, and under LoRA the lean loss replaces
    the recipe's own, unless the model scales or caps its logits. Model, adapters, sequence length,
    precision and gradients stay: none of these settings changes what is learnt.

    Args:
        target_effective_batch: Sequences behind one optimizer step; by default the recipe's own.
        utilisation: Part of the GPU's peak that is reached, for times only.
        progress: Told what is being weighed.

    Raises:
        ValueError: The target is no multiple of world_size, or too large.
        DoesNotFit: Nothing fits.
    """
    _check_utilisation(utilisation)
    target = (
        recipe.effective_batch_size if target_effective_batch is None else target_effective_batch
    )
    world, (_, most) = recipe.world_size, WHOLE_NUMBERS["gradient_accumulation_steps"]
    if type(target) is not int or target not in range(world, world * most + 1, world):
        raise ValueError(
            f"target_effective_batch must be a multiple of world_size ({world}) up to "
            f"{world * most}, got {target!r}; try {world * 8}"
        )
    num_layers, per_gpu = checked_config(recipe).num_hidden_layers, target // world
    _, largest = WHOLE_NUMBERS["micro_batch_size"]
    tried: list[tuple[TrainRecipe, Forecast]] = []

    def weigh(candidate: TrainRecipe) -> Forecast:
        progress(
            f"micro batch {candidate.micro_batch_size}, {candidate.checkpointed_layers} "
            f"layers checkpointed, {candidate.loss} loss, {candidate.attention} attention"
        )
        tried.append((candidate, forecast(candidate, gpu)))
        return tried[-1][1]

    def sized(micro: int, **fields) -> TrainRecipe:
        return dataclasses.replace(
            recipe,
            micro_batch_size=micro,
            gradient_accumulation_steps=per_gpu // micro,
            expandable_segments=True,
            **fields,
        )

    def speed(pair: tuple[TrainRecipe, Forecast]) -> float:
        return tokens_per_second(*pair, utilisation)

    least = {"checkpointed_layers": "all", "keep_attention": False, "offload_checkpoints": False}
    attention = min(
        ("stock", "explicit_kv"),
        key=lambda kind: weigh(sized(1, attention=kind, **least)).ideal_seconds,
    )
    # The lean loss costs nothing beside the full one, and the head is frozen under adapters.
    losses = (
        ("full",)
        if odd_head(meta_model(checked_config(recipe)))
        else ("full", "chunked")
        if recipe.lora_rank is None
        else ("lean",)
    )
    for offload in (False, True):
        for loss, keep in itertools.product(losses, (False, True)):
            fields = {
                "attention": attention,
                "loss": loss,
                "keep_attention": keep,
                "offload_checkpoints": offload,
            }
            micro = 1
            while micro <= largest and per_gpu % micro == 0:
                margin = functools.cache(
                    lambda k, m=micro, f=fields: (
                        weigh(sized(m, checkpointed_layers=k, **f)).margin_bytes
                    )
                )
                if margin(num_layers) < 0:
                    break
                _fewest_checkpoints(margin, num_layers, int(offload or keep))
                micro *= 2
        fitting = [pair for pair in tried if pair[1].margin_bytes >= 0]
        if fitting:
            best = max(fitting, key=speed)
            return Fit(
                recipe=best[0],
                forecast=best[1],
                utilisation=utilisation,
                tokens_per_second=speed(best),
            )
    lowest = min(f.device_bytes[0] for _, f in tried)
    raise DoesNotFit(
        f"recipe must fit {show_bytes(gpu.total_bytes)} of {with_article(gpu.name)}, "
        f"got at least {show_bytes(lowest)} with one sequence of "
        f"{recipe.sequence_length} tokens; shorten it, or take a smaller model"
    )


def _fewest_checkpoints(margin: Callable[[int], int], high: int, low: int) -> None:
    """Find the smallest number of checkpointed layers, at least `low`, that fits; `high` does.

    Each layer costs about the same, so the next guess lies on the line between the two ends.
    """
    while low < high and margin(low) < 0:
        share = -margin(low) / (margin(high) - margin(low))
        guess = min(high - 1, max(low + 1, low + math.ceil(share * (high - low))))
        if high - low == 1:
            return
        low, high = (low, guess) if margin(guess) >= 0 else (guess, high)
        if margin(high - 1) < 0:
            return
        high -= 1
