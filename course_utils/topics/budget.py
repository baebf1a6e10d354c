"""Memory budgets as people write them down, held against a forecast and a count, row by row.

Each budget here circulates (courses, forum answers, model pages); its numbers are quoted in GB, as
they are given, and are nobody's measurement. Not modelled: what a budget leaves out says "-".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from fitcast import models
from fitcast.forecasting.block import weight_bytes
from fitcast.forecasting.forecast import Forecast, forecast
from fitcast.forecasting.load import blueprint
from fitcast.memory.report import CATEGORIES
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.units import GB, show_bytes

LOGIT_BYTES = 12  # three float32 copies of each: lesson 01, section 6
# Rows of a quoted budget: holder -> (formula or remark, smallest and largest GB).
CIRCULATING: dict[str, dict[str, tuple[str, float, float]]] = {
    "llama-3.1-8b": {
        "weights": ("parameters x 0.5", 5, 5),
        "adapters": ("a few MB a layer", 0.1, 0.1),
        "gradients": ("trainable x 4", 0.1, 0.1),
        "optimizer state": ("trainable x 8", 0.2, 0.2),
        "activations": ("batch x seq x hidden x layers", 4, 8),
        "total": ("", 10, 14),
    },
    "phi-4-mini": {
        "weights": ("16 bits less 75 %", 3.5, 3.5),
        "adapters": ("r = 16", 0.05, 0.05),
        "gradients": ("as the adapters", 0.05, 0.05),
        "optimizer state": ("twice that", 0.1, 0.1),
        "activations": ("", 1, 2),
        "inputs": ("a batch of 4", 0.5, 1),
        "total": ("", 6, 7),
    },
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A holder of memory: the formula that people use, its result, and what it really is.

    Attributes:
        holder: As in `ledger`.
        formula: In words.
        formula_bytes: What the formula gives here; `None` when nobody gives one.
        forecast_bytes: On a T4, most at any time.
        counted_bytes: By the ledger on this machine, most at any time.
    """

    holder: str
    formula: str
    formula_bytes: int | None
    forecast_bytes: int
    counted_bytes: int


def checklist(
    recipe: TrainRecipe, model: torch.nn.Module, planned: Forecast, counted: Any
) -> list[Row]:
    """The budget of a QLoRA step, a row for each holder.

    Args:
        recipe: What ran.
        model: With its adapters; only sizes are read.
        planned: Its forecast.
        counted: The ledger's report of a step.
    """
    trainable, _ = qlora.count_parameters(model)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    in_4_bit = sum(p.quant_state.shape.numel() for p in frozen if hasattr(p, "quant_state"))
    others = sum(p.numel() * 2 for p in frozen if not hasattr(p, "quant_state"))
    config = models.config(recipe.model)
    tokens = recipe.micro_batch_size * recipe.sequence_length
    formulas = {
        "weights": ("0.516 x 4-bit + 2 x others", 0.516 * in_4_bit + others),
        "adapters": ("4 x trainable", 4 * trainable),
        "gradients": ("4 x trainable", 4 * trainable),
        "optimizer state": ("2.03 x trainable", 2.03 * trainable),
        "activations": (
            "layers x tokens x hidden x 2",
            config.num_hidden_layers * tokens * config.hidden_size * 2,
        ),
        "temporaries": (
            f"logits: {LOGIT_BYTES} x tokens x vocab",
            LOGIT_BYTES * tokens * config.vocab_size,
        ),
        "inputs": ("ids and labels: 16 x tokens", 16 * tokens * recipe.gradient_accumulation_steps),
    }
    return [
        Row(
            holder=holder,
            formula=formulas[holder][0],
            formula_bytes=int(formulas[holder][1]),
            forecast_bytes=max(planned.timeline[holder]),
            counted_bytes=max(counted.timeline[holder]),
        )
        for holder in CATEGORIES
    ]


def show_share(model: str) -> None:
    """Print what rank-16 adapters on q, k, v and o train of a model, and what 4 bits save of it."""
    recipe = TrainRecipe(model=model, base="float16", amp_dtype="float16", sequence_length=64)
    trainable, total = qlora.count_parameters(blueprint(recipe, models.config(model)))
    loaded, whole = forecast(replace(recipe, base="nf4")).loaded_bytes, weight_bytes(recipe)
    print(
        f"{model}, rank {recipe.lora_rank} on q, k, v, o: {trainable:,} of {total:,} parameters, "
        f"{trainable / total:.3%}\nits weights: {show_bytes(whole)} in 16 bits, "
        f"{show_bytes(loaded)} loaded in 4 bits ({1 - loaded / whole:.0%} less)"
    )


def show(rows: list[Row]) -> None:
    """Print a checklist."""
    print(f"{'':17}{'formula':32}{'gives':>11}{'forecast, T4':>14}{'counted here':>14}")
    for row in rows:
        print(
            f"{row.holder:17}{row.formula:32}{show_bytes(row.formula_bytes):>11}"
            f"{show_bytes(row.forecast_bytes):>14}{show_bytes(row.counted_bytes):>14}"
        )


def compare(model: str, planned: Forecast, measured: dict[str, Any]) -> None:
    """Print a circulating budget beside forecast and measurement at the peak, row by row.

    Args:
        model: A key of `CIRCULATING`.
        planned: Of the usual recipe.
        measured: The recorded row: `composition` by the ledger, the total by CUDA's allocator.
    """
    claims = CIRCULATING[model]
    print(f"{'':17}{'formula':29}{'claim':>8}{'forecast':>12}{'measured':>12}")
    for holder in (*CATEGORIES, "total"):
        formula, low, high = claims.get(holder, ("", None, None))
        said = "-" if low is None else f"{low:g} GB" if low == high else f"{low:g}-{high:g} GB"
        real, seen = (
            (planned.peak_bytes, measured["peak_allocated_bytes"])
            if holder == "total"
            else (planned.composition[holder], measured["composition"][holder])
        )
        print(
            f"{holder:17}{formula:29}{said:>8}{show_bytes(real):>12}{show_bytes(seen):>12}"
            f"{_verdict(low, high, real)}"
        )


def _verdict(low: float | None, high: float | None, real: int) -> str:
    """Whether a claim in GB holds, give or take a quarter; small rows do not matter."""
    if real < GB / 4 and (high or 0) < 0.25:
        return "   (small either way)"
    if low is None:
        return "   missing in the budget"
    if real > 1.25 * high * GB:
        return f"   {real / (high * GB):.1f} times the claim"
    if real < 0.75 * low * GB:
        return f"   claim {low * GB / real:,.0f} times too high"
    return "   holds, give or take a quarter"
