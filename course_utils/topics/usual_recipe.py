"""The QLoRA recipe that most pages print for a T4, line by line: what breaks, wastes, is refused.

Each argument is given to the `TrainingArguments` installed here, each habit to the forecast; what
is accepted and breaks later is written down (`BREAKS_LATER`). Not judged: taste (learning rate,
epochs), which no T4 decides.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass, replace
from typing import Any

from fitcast.forecasting.forecast import Forecast, forecast
from fitcast.gpus import T4, Gpu
from fitcast.recipe import TrainRecipe
from fitcast.units import show_bytes

ARGUMENTS: dict[str, Any] = {  # of TrainingArguments, as they are copied from page to page
    "learning_rate": 2e-4,
    "num_train_epochs": 3,
    "warmup_ratio": 0.03,
    "optim": "paged_adamw_8bit",
    "logging_steps": 10,
    "save_strategy": "epoch",
    "evaluation_strategy": "epoch",
    "group_by_length": True,
    "gradient_checkpointing": True,
    "fp16_full_eval": True,
}
REMEDIES = {  # for what today's versions refuse or rename
    "warmup_ratio": "warmup_steps=0.03",
    "evaluation_strategy": "eval_strategy='epoch'",
    "group_by_length": "train_sampling_strategy='group_by_length'",
    "gradient_checkpointing": "activation_checkpointing=True",
}
BREAKS_LATER = {  # accepted here; `preflight.refuse_silent_failures` is what stops it
    "fp16_full_eval": "an evaluation before training makes adapters 16 bits (lesson 04)",
}


@dataclass(frozen=True)
class Line:
    """A line of the recipe, and what came of doing it: "works", "refused", "breaks", "wastes"."""

    line: str
    verdict: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.verdict:9}{self.line:43}{self.why}".rstrip()


def judge(usual: TrainRecipe, gpu: Gpu = T4) -> list[Line]:
    """The recipe's lines, each with its verdict on this GPU and these versions.

    Args:
        usual: The run whose memory is forecast.
        gpu: Where it should run.
    """
    return [
        _compute_dtype(usual, gpu),
        *_waste(usual, gpu),
        *(_argument(name, value) for name, value in ARGUMENTS.items()),
    ]


def _compute_dtype(usual: TrainRecipe, gpu: Gpu) -> Line:
    line = "bnb_4bit_compute_dtype=bfloat16, fp16=True"
    try:
        replace(usual, amp_dtype="bfloat16").check_on(gpu)
    except ValueError:
        return Line(line, "wastes", f"time: a {gpu.name} emulates it; float16, as autocast has")
    return Line(line, "works")


def _waste(usual: TrainRecipe, gpu: Gpu) -> list[Line]:
    """What two habits add to the peak, by forecast."""

    def step(**changes: Any) -> Forecast:
        return forecast(replace(usual, **changes), gpu)

    def less(before: Forecast, after: Forecast) -> str:
        return show_bytes(before.peak_allocated_bytes - after.peak_allocated_bytes)

    plain, upcast, other = step(), step(kbit_upcast=True), {"attention": "explicit_kv"}
    weights = upcast.composition["weights"] - plain.composition["weights"]
    return [
        Line(
            "prepare_model_for_kbit_training(model)",
            "wastes",
            f"{less(upcast, plain)}: "
            f"{show_bytes(weights)} of weights made float32, then what is computed from them",
        ),
        Line(
            "the loss that the model returns",
            "wastes",
            f"{less(plain, step(loss='chunked'))}"
            f", {less(step(**other), step(**other, loss='chunked'))} once attention is mended:"
            " all logits at once",
        ),
    ]


def _argument(name: str, value: Any) -> Line:
    """Give `TrainingArguments` this one argument, and listen."""
    from transformers import TrainingArguments

    line = f"{name}={value!r}"
    with warnings.catch_warnings(record=True) as heard, tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("always")
        try:
            TrainingArguments(output_dir=folder, report_to="none", **{name: value})
        except TypeError:
            return Line(line, "refused", f"now {REMEDIES[name]}")
    if any(name in str(warning.message) for warning in heard):
        return Line(line, "renamed", REMEDIES[name])
    return Line(line, "breaks" if name in BREAKS_LATER else "works", BREAKS_LATER.get(name, ""))
