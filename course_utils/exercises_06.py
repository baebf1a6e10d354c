"""The targets of lesson 06's exercises. Each is computed when the check runs, none is stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from . import corpus, measurement, qlora, shapes, training
from .checks import Verdict, check, check_function, not_yet, right
from .fake import meta_model
from .recipe import TrainRecipe
from .units import show_bytes

MODELS = ("bundled", "llama-3.2-1b", "llama-2-7b")


@check
def check_trainable(answer: Callable) -> Verdict:
    """Exercise 06.1: trainable parameters of rank-r adapters on q, k, v and o."""
    cases, counted = [], []
    for model, rank in zip(MODELS, (16, 16, 8), strict=True):
        config = shapes.config(model)
        cases.append((config.num_hidden_layers, config.hidden_size,
                      config.num_key_value_heads * config.head_dim, rank))
        recipe = TrainRecipe(model=model, base="float32", lora_rank=rank)
        adapted = qlora.add_adapters(
            qlora.prepare_base(meta_model(config, torch.float32, "sdpa"), recipe), recipe)
        counted.append(qlora.count_parameters(adapted)[0])
    truth = dict(zip(cases, counted, strict=True))
    return check_function(answer, cases, counted, mistakes={
        "that is one layer; every layer has its own adapters.":
            lambda layers, hidden, kv, rank: truth[layers, hidden, kv, rank] // layers,
        "key and value come out kv wide, not hidden (grouped-query attention).":
            lambda layers, hidden, kv, rank: layers * rank * 8 * hidden,
        "an adapter is two matrices, A (rank x in) and B (out x rank); you counted A only.":
            lambda layers, hidden, kv, rank: layers * rank * 4 * hidden,
        "that is the size of the weights beside the adapters.":
            lambda layers, hidden, kv, rank: layers * 2 * (hidden * hidden + hidden * kv),
    }, takeaway=f"{counted[1]:,} for Llama-3.2-1B, the number that everybody quotes.")


@check
def check_labels(answer: Callable, rows: Sequence[dict], prompt_lengths: Sequence[int]) -> Verdict:
    """Exercise 06.2: labels that are -100 on the prompt, and the token ids from there on.

    Args:
        answer: Takes (token ids, prompt length), returns labels.
        rows: Encoded examples.
        prompt_lengths: Tokens of each one's prompt.
    """
    rows = list(rows)[:3]
    cases = [(list(row["input_ids"]), n) for row, n in zip(rows, prompt_lengths, strict=False)]
    ignored = corpus.IGNORED
    return check_function(answer, cases, [list(row["labels"]) for row in rows], mistakes={
        "the prompt's tokens are learned, the answer's are not: swap the two.":
            lambda ids, n: ids[:n] + [ignored] * (len(ids) - n),
        "labels are not shifted here: the model compares position i with label i + 1 itself.":
            lambda ids, n: [ignored] * (n - 1) + ids[n:] + [ignored],
        "0 is a token, and would be learned; -100 is what cross entropy skips.":
            lambda ids, n: [0] * n + ids[n:],
        "the answer's last token is missing: it says stop, and without it generation never ends.":
            lambda ids, n: [ignored] * n + ids[n:-1] + [ignored],
        "every token has a label: nothing is masked.": lambda ids, n: list(ids),
        "labels must be as many as tokens.": lambda ids, n: ids[n:],
    }, takeaway="the loss sees the answer and its end, nothing else.")


@check
def check_budget(answer: TrainRecipe, recipe: TrainRecipe, budget_bytes: int) -> Verdict:
    """Exercise 06.3: a recipe that learns the same from the same data in fewer bytes.

    Args:
        answer: The learner's recipe; one step of it runs under the ledger.
        recipe: The one to shrink.
        budget_bytes: Most bytes alive at once.
    """
    if not isinstance(answer, TrainRecipe):
        return not_yet(f"a TrainRecipe is asked for, got {type(answer).__name__}.")
    same: dict[str, Any] = {
        "effective_batch_size": "the optimizer would see another batch; raise "
                                "gradient_accumulation_steps as micro_batch_size falls",
        "sequence_length": "shorter sequences lose the ends of the answers",
        "lora_rank": "a lower rank can learn less, and saves almost nothing here",
        "lora_targets": "other targets are another model",
        "model": "that is another model",
    }
    for field, why in same.items():
        if getattr(answer, field) != getattr(recipe, field):
            return not_yet(f"{field} must stay {getattr(recipe, field)}: {why}.")
    step = replace(answer, gradient_accumulation_steps=min(2, answer.gradient_accumulation_steps))
    peak = measurement.measure_step(step, training.build_model(step), 1).report.peak_bytes
    if peak > budget_bytes:
        return not_yet(f"the peak is {show_bytes(peak)}; the target is at most "
                       f"{show_bytes(budget_bytes)}. What grows with the micro batch?")
    return right(f"{show_bytes(peak)} at the peak, and every step still sees "
                 f"{answer.effective_batch_size} sequences.")
