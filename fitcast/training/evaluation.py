"""What a fine-tune changed: loss and answers on held-out examples, and how sure we are of it.

Not modelled: sampling (answers are greedy, so that they can be compared), judging free text.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import corpus, hardware, qlora
from .recipe import TrainRecipe


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that holds the true one in 95 of 100 such experiments."""

    mean: float
    low: float
    high: float

    def __str__(self):
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


@dataclass(frozen=True)
class Score:
    """Shares (0 to 1) of answers that have the ticket's structure, and that are right entirely."""

    structure: float
    correct: float

    def __str__(self):
        return f"{self.structure:.0%} have the structure, {self.correct:.0%} are right"


@dataclass(frozen=True)
class Overlap:
    """For free text, where no answer is the only right one: mean share of words in common (F1)."""

    correct: float

    def __str__(self):
        return f"{self.correct:.0%} of the words in common with the expected answers"


@torch.no_grad()
def answer_losses(model: torch.nn.Module, rows: Sequence[dict], recipe: TrainRecipe) -> list[float]:
    """Loss of each example's answer, in nats per token.

    One example at a time, so that no result depends on its neighbours' padding.

    Args:
        model: In any mode; it is back in that mode afterwards.
        rows: input_ids and labels of each example, as from `corpus.encode`.
        recipe: Uses loss, loss_chunk_tokens and amp_dtype.
    """
    device, training = hardware.device(), model.training
    model.eval()
    losses = []
    for row in rows:
        batch = {name: torch.tensor([row[name]], device=device) for name in ("input_ids", "labels")}
        with qlora.autocast(recipe, device):
            losses.append(qlora.compute_loss(model, batch, recipe))
    model.train(training)
    return torch.stack(losses).float().tolist()


@torch.no_grad()
def generate(model: torch.nn.Module, tokenizer: Any, prompts: Sequence[str], recipe: TrainRecipe,
             max_new_tokens: int = 64, micro_batch_size: int = 64) -> list[str]:
    """The model's greedy answer to each prompt, without special tokens.

    Args:
        prompts: What the user says; the chat template is added here.
        recipe: Uses amp_dtype.
        max_new_tokens: Longest answer.
        micro_batch_size: Prompts at once, padded on the left.
    """
    training = model.training
    model.eval()
    answers = []
    for start in range(0, len(prompts), micro_batch_size):
        some = prompts[start:start + micro_batch_size]
        texts = [corpus.render_prompt(prompt, tokenizer) for prompt in some]
        batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left",
                          return_tensors="pt").to(hardware.device())
        with qlora.autocast(recipe, hardware.device()):
            tokens = model.generate(
                **{name: batch[name] for name in ("input_ids", "attention_mask")}, use_cache=True,
                do_sample=False, max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id)
        answers += tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1]:],
                                          skip_special_tokens=True)
    model.train(training)
    return answers


def score(answers: Sequence[str], expected: Sequence[str]) -> Score | Overlap:
    """How many answers are tickets and right in every field; for other data, words in common.

    Raises:
        ValueError: Not one answer for each expected one.

    Source of the F1: Rajpurkar et al. 2016, "SQuAD", section 6.1.
    """
    if len(answers) != len(expected) or not answers:
        raise ValueError(f"answers must be as many as expected ({len(expected)}, at least 1), got "
                         f"{len(answers)}; generate one answer for each example")
    wanted, found = ([corpus.parse_answer(text) for text in texts] for texts in (expected, answers))
    if None in wanted:
        return Overlap(sum(map(_f1, answers, expected)) / len(answers))
    structured = sum(ticket is not None for ticket in found)
    return Score(structured / len(answers), sum(map(operator.eq, found, wanted)) / len(answers))


def _f1(answer: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of an answer's words; 0 without one in common."""
    one, other = (Counter(re.findall(r"\w+", text.lower())) for text in (answer, wanted))
    common = (one & other).total()
    return 2 * common / (one.total() + other.total()) if common else 0.0


def largest_shift(one: Sequence[float], other: Sequence[float]) -> float:
    """Largest absolute difference between two lists of losses of the same examples."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def paired_bootstrap(before: Sequence[float], after: Sequence[float], resamples: int = 10_000,
                     seed: int = 0) -> Interval:
    """Mean of after - before with its 95 % interval, by resampling the examples.

    Paired: an example that is hard before is hard after, and only the change of each one counts.

    Args:
        before, after: One number for each example, in the same order.

    Raises:
        ValueError: Different lengths, or fewer than 2 examples.

    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13 (percentiles).
    """
    if len(before) != len(after) or len(before) < 2:
        raise ValueError(f"before and after must have the same length of at least 2, got "
                         f"{len(before)} and {len(after)}; evaluate the same examples twice")
    change = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    draws = torch.randint(len(change), (resamples, len(change)),
                          generator=torch.Generator().manual_seed(seed))
    means = change[draws].mean(dim=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(change.mean().item(), low, high)
