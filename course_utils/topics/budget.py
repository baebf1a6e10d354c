"""Memory budgets as people write them down, held against a forecast and a count, row by row.

Each budget here circulates (courses, forum answers, model pages); its numbers are quoted in GB, as
they are given, and are nobody's measurement. Not modelled: what a budget leaves out says "-".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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


class Claim(NamedTuple):
    """A row of a quoted budget: its formula or remark, the smallest and the largest GB."""

    formula: str
    least_gb: float
    most_gb: float

    def __str__(self) -> str:
        if self.least_gb == self.most_gb:
            return f"{self.least_gb:g} GB"
        return f"{self.least_gb:g}-{self.most_gb:g} GB"


CIRCULATING: dict[str, dict[str, Claim]] = {
    "llama-3.1-8b": {
        "weights": Claim("parameters x 0.5", 5, 5),
        "adapters": Claim("a few MB a layer", 0.1, 0.1),
        "gradients": Claim("trainable x 4", 0.1, 0.1),
        "optimizer state": Claim("trainable x 8", 0.2, 0.2),
        "activations": Claim("batch x seq x hidden x layers", 4, 8),
        "total": Claim("", 10, 14),
    },
    "phi-4-mini": {
        "weights": Claim("16 bits less 75 %", 3.5, 3.5),
        "adapters": Claim("r = 16", 0.05, 0.05),
        "gradients": Claim("as the adapters", 0.05, 0.05),
        "optimizer state": Claim("twice that", 0.1, 0.1),
        "activations": Claim("", 1, 2),
        "inputs": Claim("a batch of 4", 0.5, 1),
        "total": Claim("", 6, 7),
    },
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A holder of memory: the formula that people use, its result, and what it really is.

    Attributes:
        holder: One of `fitcast.memory.report.CATEGORIES`.
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
    states = [getattr(p, "quant_state", None) for p in frozen]  # it knows how many numbers it packs
    in_4_bit = sum(state.shape.numel() for state in states if state is not None)
    others = sum(2 * p.numel() for p, state in zip(frozen, states, strict=True) if state is None)
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
    whole, loaded = weight_bytes(recipe), forecast(replace(recipe, base="nf4")).loaded_bytes
    assert loaded is not None, "a forecast of a recipe loads its model"
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
        claim = claims.get(holder)
        if holder == "total":
            real, seen = planned.peak_bytes, measured["peak_allocated_bytes"]
        else:
            real, seen = planned.composition[holder], measured["composition"][holder]
        formula, said = (claim.formula, str(claim)) if claim else ("", "-")
        print(
            f"{holder:17}{formula:29}{said:>8}{show_bytes(real):>12}{show_bytes(seen):>12}"
            f"   {_verdict(claim, real)}"
        )


def _verdict(claim: Claim | None, real: int) -> str:
    """Whether a claim holds, give or take a quarter; small rows do not matter."""
    if real < GB / 4 and (claim is None or claim.most_gb < 0.25):
        return "(small either way)"
    if claim is None:
        return "missing in the budget"
    if real > 1.25 * claim.most_gb * GB:
        return f"{real / (claim.most_gb * GB):.1f} times the claim"
    if real < 0.75 * claim.least_gb * GB:
        return f"claim {claim.least_gb * GB / real:,.0f} times too high"
    return "holds, give or take a quarter"
