"""The QLoRA recipe that most pages print for a T4, line by line: what breaks, wastes, is refused.

Each verdict is found by doing what the line says, with the versions installed here. Not judged:
taste (learning rate, epochs), which no T4 decides.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass, replace
from typing import Any

from .forecast import forecast
from .hardware import T4, Gpu
from .recipe import TrainRecipe
from .units import show_bytes

ARGUMENTS: dict[str, Any] = {  # of TrainingArguments, as they are copied from page to page
    "learning_rate": 2e-4, "num_train_epochs": 3, "warmup_ratio": 0.03, "optim": "paged_adamw_8bit",
    "logging_steps": 10, "save_strategy": "epoch", "evaluation_strategy": "epoch",
    "group_by_length": True, "gradient_checkpointing": True, "fp16_full_eval": True,
}
REMEDIES = {  # for what today's versions refuse or rename
    "warmup_ratio": "warmup_steps=0.03", "evaluation_strategy": "eval_strategy='epoch'",
    "group_by_length": "train_sampling_strategy='group_by_length'",
    "gradient_checkpointing": "activation_checkpointing=True",
}
BREAKS_LATER = {  # accepted here; `preflight.refuse_silent_failures` is what stops it
    "fp16_full_eval": "an evaluation makes the adapters 16 bits, in place: the next step raises",
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
    return [_compute_dtype(usual, gpu), *_waste(usual, gpu),
            *(_argument(name, value) for name, value in ARGUMENTS.items())]


def _compute_dtype(usual: TrainRecipe, gpu: Gpu) -> Line:
    line = "bnb_4bit_compute_dtype=bfloat16, fp16=True"
    try:
        replace(usual, amp_dtype="bfloat16").check_on(gpu)
    except ValueError:
        return Line(line, "wastes", f"time: a {gpu.name} emulates it; float16, as autocast has")
    return Line(line, "works")


def _waste(usual: TrainRecipe, gpu: Gpu) -> list[Line]:
    """What two habits add to the peak, by forecast."""
    plain = forecast(usual, gpu).peak_allocated_bytes
    upcast = forecast(replace(usual, kbit_upcast=True), gpu).peak_allocated_bytes - plain
    whole = plain - forecast(replace(usual, loss="chunked"), gpu).peak_allocated_bytes
    return [Line("prepare_model_for_kbit_training(model)", "wastes", f"{show_bytes(upcast)}: it "
                 "makes every weight that is not 4-bit float32"),
            Line("the loss that the model returns", "wastes", f"{show_bytes(whole)} of logits that "
                 "need not exist at once")]


def _argument(name: str, value: Any) -> Line:
    """Give `TrainingArguments` this one argument, and listen."""
    from transformers import TrainingArguments

    line = f"{name}={value!r}"
    with warnings.catch_warnings(record=True) as heard, \
            tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("always")
        try:
            TrainingArguments(output_dir=folder, report_to="none", **{name: value})
        except TypeError:
            return Line(line, "refused", f"now {REMEDIES[name]}")
    if any(name in str(warning.message) for warning in heard):
        return Line(line, "renamed", REMEDIES[name])
    return Line(line, "breaks" if name in BREAKS_LATER else "works", BREAKS_LATER.get(name, ""))
