"""Memory budgets on paper, held against a forecast and a count, row by row.

Each is made of rules of thumb, in GB, before anything was counted: an opponent to learn from, and
nobody's measurement. Not modelled: what a budget leaves out says "-".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fitcast import models
from fitcast.forecasting.forecast import Forecast
from fitcast.memory.report import CATEGORIES
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.units import GB, show_bytes

LOGIT_BYTES = 12  # three float32 copies of each: lesson 01, section 4


class Guess(NamedTuple):
    """A row of a budget on paper: its rule of thumb, the smallest and the largest GB."""

    rule: str
    least_gb: float
    most_gb: float

    def __str__(self) -> str:
        if self.least_gb == self.most_gb:
            return f"{self.least_gb:g} GB"
        return f"{self.least_gb:g}-{self.most_gb:g} GB"


ON_PAPER: dict[str, dict[str, Guess]] = {
    "llama-3.1-8b": {
        "weights": Guess("parameters x 0.5", 5, 5),
        "adapters": Guess("a few MB a layer", 0.1, 0.1),
        "gradients": Guess("trainable x 4", 0.1, 0.1),
        "optimizer state": Guess("trainable x 8", 0.2, 0.2),
        "activations": Guess("batch x seq x hidden x layers", 4, 8),
        "total": Guess("", 10, 14),
    },
    "phi-4-mini": {
        "weights": Guess("16 bits less 75 %", 3.5, 3.5),
        "adapters": Guess("r = 16", 0.05, 0.05),
        "gradients": Guess("as the adapters", 0.05, 0.05),
        "optimizer state": Guess("twice that", 0.1, 0.1),
        "activations": Guess("", 1, 2),
        "inputs": Guess("a batch of 4", 0.5, 1),
        "total": Guess("", 6, 7),
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


def show(rows: list[Row]) -> None:
    """Print a checklist."""
    print(f"{'':17}{'formula':32}{'gives':>11}{'forecast, T4':>14}{'counted here':>14}")
    for row in rows:
        print(
            f"{row.holder:17}{row.formula:32}{show_bytes(row.formula_bytes):>11}"
            f"{show_bytes(row.forecast_bytes):>14}{show_bytes(row.counted_bytes):>14}"
        )


def compare(model: str, planned: Forecast, measured: dict[str, Any]) -> None:
    """Print a budget on paper beside forecast and measurement at the peak, row by row.

    Args:
        model: A key of `ON_PAPER`.
        planned: Of the usual recipe.
        measured: The recorded row: `composition` by the ledger, the total by CUDA's allocator.
    """
    guesses = ON_PAPER[model]
    print(f"{'':17}{'rule of thumb':29}{'on paper':>9}{'forecast':>12}{'measured':>12}")
    for holder in (*CATEGORIES, "total"):
        guess = guesses.get(holder)
        if holder == "total":
            real, seen = planned.peak_bytes, measured["peak_allocated_bytes"]
        else:
            real, seen = planned.composition[holder], measured["composition"][holder]
        rule, said = (guess.rule, str(guess)) if guess else ("", "-")
        print(
            f"{holder:17}{rule:29}{said:>9}{show_bytes(real):>12}{show_bytes(seen):>12}"
            f"   {_verdict(guess, real)}"
        )


def _verdict(guess: Guess | None, real: int) -> str:
    """Whether a guess holds, give or take a quarter; small rows do not matter."""
    if real < GB / 4 and (guess is None or guess.most_gb < 0.25):
        return "(small either way)"
    if guess is None:
        return "missing on paper"
    if real > 1.25 * guess.most_gb * GB:
        return f"{real / (guess.most_gb * GB):.1f} times as much"
    if real < 0.75 * guess.least_gb * GB:
        return f"{guess.least_gb * GB / real:,.0f} times too much on paper"
    return "holds, give or take a quarter"
