"""The targets of lesson 07's exercises. Each is computed when the check runs, none is stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from course_utils.data import BUNDLED
from course_utils.exercises.checks import (
    Mistake,
    Verdict,
    check,
    judge_function,
    not_yet,
    right,
)
from fitcast import models
from fitcast.forecasting.forecast import forecast
from fitcast.forecasting.load import blueprint
from fitcast.forecasting.search import tokens_per_second
from fitcast.gpus import T4
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.training import data
from fitcast.units import show_bytes

MODELS = (BUNDLED, "llama-3.2-1b", "llama-2-7b")
# What exercise 07.3 starts from: the usual recipe, too large for a T4.
PHI = TrainRecipe(
    model="phi-4-mini",
    lora_targets=("qkv_proj", "o_proj"),
    amp_dtype="float16",
    micro_batch_size=4,
    gradient_accumulation_steps=8,
    sequence_length=2048,
)
# Choices that take time and change nothing that is learned: the faster one, what to ask oneself.
FASTER: dict[str, tuple[Any, str]] = {
    "attention": ("explicit_kv", "Which kernel does attention take on a T4?"),
    "norm": ("native", "In how many steps, and in which format, is a norm computed?"),
    "lora_dropout": (0.0, "What does dropout draw, and write, for each adapter?"),
}


@check()
def check_trainable(answer: Callable) -> Verdict:
    """Exercise 07.1: trainable parameters of rank-r adapters on q, k, v and o."""
    cases, counted = [], []
    for model, rank in zip(MODELS, (16, 16, 8), strict=True):
        config = models.config(model)
        cases.append(
            (
                config.num_hidden_layers,
                config.hidden_size,
                config.num_key_value_heads * config.head_dim,
                rank,
            )
        )
        recipe = TrainRecipe(model=model, base="float32", lora_rank=rank)
        counted.append(qlora.count_parameters(blueprint(recipe, config))[0])
    truth = dict(zip(cases, counted, strict=True))
    return judge_function(
        answer,
        cases,
        counted,
        mistakes=[
            Mistake(
                "that is one layer; every layer has its own adapters.",
                lambda layers, *rest: truth[layers, *rest] // layers,
            ),
            Mistake(
                "key and value come out kv wide, not hidden (grouped-query attention).",
                lambda layers, hidden, kv, rank: layers * rank * 8 * hidden,
            ),
            Mistake(
                "an adapter is two matrices, A (rank x in) and B (out x rank); you counted A only.",
                lambda layers, hidden, kv, rank: layers * rank * 4 * hidden,
            ),
            Mistake(
                "that is the size of the weights beside the adapters.",
                lambda layers, hidden, kv, rank: layers * 2 * (hidden * hidden + hidden * kv),
            ),
        ],
        takeaway=f"{counted[1]:,} for Llama-3.2-1B, the number that everybody quotes.",
    )


@check()
def check_labels(answer: Callable, rows: Sequence[dict], prompt_lengths: Sequence[int]) -> Verdict:
    """Exercise 07.2: labels that are -100 on the prompt, and the token ids from there on.

    Args:
        answer: Takes (token ids, prompt length), returns labels.
        rows: Encoded examples.
        prompt_lengths: Tokens of each one's prompt.
    """
    rows = list(rows)[:3]
    cases = [(list(row["input_ids"]), n) for row, n in zip(rows, prompt_lengths, strict=False)]
    ignored = data.IGNORED
    return judge_function(
        answer,
        cases,
        [list(row["labels"]) for row in rows],
        mistakes=[
            Mistake(
                "the prompt's tokens are learned, the answer's are not: swap the two.",
                lambda ids, n: ids[:n] + [ignored] * (len(ids) - n),
            ),
            Mistake(
                "labels are not shifted here: the model compares position i with label i + 1 "
                "itself.",
                lambda ids, n: [ignored] * (n - 1) + ids[n:] + [ignored],
            ),
            Mistake(
                "0 is a token, and would be learned; -100 is what cross entropy skips.",
                lambda ids, n: [0] * n + ids[n:],
            ),
            Mistake(
                "the answer's last token is missing: it says stop, and without it generation never "
                "ends.",
                lambda ids, n: [ignored] * n + ids[n:-1] + [ignored],
            ),
            Mistake("every token has a label: nothing is masked.", lambda ids, n: list(ids)),
            Mistake("labels must be as many as tokens.", lambda ids, n: ids[n:]),
        ],
        takeaway="the loss sees the answer and its end, nothing else.",
    )


@check()
def check_budget(
    answer: TrainRecipe, recipe: TrainRecipe, budget_bytes: int, speedup: float
) -> Verdict:
    """Exercise 07.3: a recipe that learns the same, in fewer bytes and less time.

    Args:
        answer: The learner's recipe; forecast for a T4.
        recipe: The one to improve.
        budget_bytes: Most bytes in tensors.
        speedup: At least so many times the tokens per second of `recipe`.
    """
    if not isinstance(answer, TrainRecipe):
        return not_yet(f"a TrainRecipe is asked for, got {type(answer).__name__}.")
    same: dict[str, Any] = {
        "effective_batch_size": "the optimizer would see another batch; raise "
        "gradient_accumulation_steps as micro_batch_size falls",
        "world_size": "there is one T4",
        "sequence_length": "shorter sequences lose the ends of the answers",
        "lora_rank": "a lower rank can learn less, and saves almost nothing here",
        "lora_targets": "other targets are another model",
        "lora_alpha": "another alpha scales what the adapters add",
        "learning_rate": "another rate is another training",
        "weight_decay": "another decay is another training",
        "max_grad_norm": "another clipping is another training",
        "warmup_fraction": "another warm-up is another training",
        "max_steps": "fewer steps learn less",
        "padded": "that is a property of the data",
        "model": "that is another model",
        "base": "that is another base",
        "amp_dtype": "a T4 computes in float16",
    }
    for field, why in same.items():
        if getattr(answer, field) != getattr(recipe, field):
            return not_yet(f"{field} must stay {getattr(recipe, field)}: {why}.")
    planned, before = (forecast(one, T4) for one in (answer, recipe))
    if planned.peak_allocated_bytes > budget_bytes:
        return not_yet(
            f"the peak is {show_bytes(planned.peak_allocated_bytes)}; the target is at "
            f"most {show_bytes(budget_bytes)}. It stands in {planned.peak_phase}, at "
            f"{planned.peak_operation}."
        )
    ratio = tokens_per_second(answer, planned) / tokens_per_second(recipe, before)
    if ratio < speedup:
        return not_yet(
            f"it fits, but trains {ratio:.1f} times as fast as before; the target is at "
            f"least {speedup:g}. {_largest_gain(answer)}"
        )
    return right(
        f"{show_bytes(planned.peak_allocated_bytes)} at the peak, {ratio:.1f} times as "
        f"fast, and every step still sees {answer.effective_batch_size} sequences."
    )


def _largest_gain(recipe: TrainRecipe) -> str:
    """What to ask oneself about the one choice of a recipe that costs the most time."""

    def speed(field: str) -> float:
        faster = replace(recipe, **{field: FASTER[field][0]})
        return tokens_per_second(faster, forecast(faster, T4))

    left = [field for field, (value, _) in FASTER.items() if getattr(recipe, field) != value]
    if not left:
        return "Fewer layers that forget are fewer that run forward twice."
    return FASTER[max(left, key=speed)][1]
