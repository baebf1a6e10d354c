"""What a fine-tune changed: loss and answers on held-out examples, and how sure we are of it.

Not modelled: sampling (answers are greedy, so that they can be compared), judging free text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fitcast import gpus
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.step.levers import unwrap
from fitcast.step.losses import chunked_loss
from fitcast.training.data import collate, render_prompt
from fitcast.training.restoring import evaluating
from fitcast.units import IGNORED, Said, refusal

TAIL = 0.025  # of the experiments on each side of a 95 % interval


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that holds the true one in about 95 of 100 such experiments.

    How nearly 95, `paired_bootstrap` says.
    """

    mean: float
    low: float
    high: float

    def __str__(self):
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def answer_losses(model: torch.nn.Module, rows: Iterable[dict], recipe: TrainRecipe) -> list[float]:
    """Loss of each example's answer, in nats per token.

    As many examples at a time as the recipe trains at once, so that what could be trained can be
    evaluated. Padding is masked out; an example's loss is its own, whoever its neighbours are.

    Args:
        model: In any mode; each of its modules is back in its own mode afterwards.
        rows: input_ids and labels, lists of `tokens` numbers, of each example, as from
            `data.encode`.
        recipe: Uses micro_batch_size, loss, loss_chunk_tokens and amp_dtype.

    Returns:
        A number for each row, in order.
    """
    device, examples = gpus.device(), list(rows)
    losses = []
    with evaluating(model):
        for start in range(0, len(examples), recipe.micro_batch_size):
            batch = collate(examples[start : start + recipe.micro_batch_size], pad_token_id=0)
            batch = {name: column.to(device) for name, column in batch.items()}
            with qlora.autocast(recipe, device):
                losses += _losses_of_rows(model, batch, recipe)
    return torch.stack(losses).float().tolist()


def _losses_of_rows(
    model: Any, batch: dict[str, torch.Tensor], recipe: TrainRecipe
) -> list[torch.Tensor]:
    """Each row's mean loss, from one forward pass; the loss as the recipe builds it."""
    inputs = {name: column for name, column in batch.items() if name != "labels"}
    if recipe.loss == "full":
        logits = model(**inputs).logits.float()  # (batch, tokens, vocabulary)
        pairs = zip(logits[:, :-1], batch["labels"][:, 1:], strict=True)
        return [F.cross_entropy(*pair, ignore_index=IGNORED) for pair in pairs]
    base = unwrap(model)
    hidden = base.model(**inputs).last_hidden_state  # (batch, tokens, hidden)
    head, chunk = base.get_output_embeddings(), recipe.loss_chunk_tokens
    return [
        chunked_loss(row[None], head, own[None], chunk, skip_unlabelled=True)
        for row, own in zip(hidden, batch["labels"], strict=True)
    ]


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | list[dict]],
    recipe: TrainRecipe,
    max_new_tokens: int = 64,
    micro_batch_size: int = 64,
) -> list[str]:
    """The model's greedy answer to each prompt, without special tokens.

    Args:
        model: A causal language model, PEFT or not; each of its modules is back in its own mode
            afterwards.
        tokenizer: With a chat template and a padding token.
        prompts: What the user says, or messages up to the answer; the chat template is added
            here.
        recipe: Uses amp_dtype.
        max_new_tokens: Longest answer.
        micro_batch_size: Prompts at once, padded on the left.

    Returns:
        A text for each prompt, in order.
    """
    answers = []
    with evaluating(model):
        for start in range(0, len(prompts), micro_batch_size):
            some = prompts[start : start + micro_batch_size]
            texts = [render_prompt(prompt, tokenizer) for prompt in some]
            batch = tokenizer(
                texts,
                add_special_tokens=False,
                padding=True,
                padding_side="left",
                return_tensors="pt",
            ).to(gpus.device())  # (prompts, tokens)
            with qlora.autocast(recipe, gpus.device()):
                tokens = model.generate(
                    **{name: batch[name] for name in ("input_ids", "attention_mask")},
                    use_cache=True,
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=tokenizer.pad_token_id,
                )
            new = tokens[:, batch["input_ids"].shape[1] :]
            answers += tokenizer.batch_decode(new, skip_special_tokens=True)
    return answers


def largest_shift(one: Sequence[float], other: Sequence[float]) -> float:
    """Largest absolute difference between two lists of losses of the same examples.

    Args:
        one, other: Nats per token of each example, in the same order.
    """
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def paired_bootstrap(
    before: Sequence[float], after: Sequence[float], resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of after - before with its 95 % interval, by resampling the examples.

    Paired: an example that is hard before is hard after, and only the change of each one counts.
    Resampling shows the skew of the changes, and believes that their spread is known: with few
    examples it is too sure. So on each side the interval reaches at least as far as Student's t.

    How often it holds the true mean, of 100 (percentiles alone in brackets): for 2, 5, 20 and 200
    changes from a normal distribution 95 (50), 96 (83), 95 (92) and 95; from an exponential, which
    is skewed, 91 (44), 89 (77), 92 (90) and 94. Changes that are all equal leave no width, however
    few they are.

    Args:
        before, after: One number for each example, in the same order.
        resamples: How often as many examples are drawn, with replacement.
        seed: Of the draws.

    Raises:
        ValueError: Different lengths, or fewer than 2 examples.

    Sources: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13 (percentiles);
    Hesterberg 2015, "What Teachers Should Know About the Bootstrap" (percentiles too narrow for
    few examples).
    """
    if len(before) != len(after) or len(before) < 2:
        raise refusal(
            "before and after",
            "have the same length of at least 2",
            Said(f"{len(before)} and {len(after)}"),
            "evaluate the same examples twice",
        )
    change = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    draws = torch.randint(
        len(change), (resamples, len(change)), generator=torch.Generator().manual_seed(seed)
    )
    means = change[draws].mean(dim=1)  # (resamples,)
    quantiles = torch.tensor([TAIL, 1 - TAIL], dtype=torch.float64)
    low, high = torch.quantile(means, quantiles).tolist()
    mean, error = change.mean().item(), change.std().item() / math.sqrt(len(change))
    reach = student_quantile(len(change) - 1) * error
    return Interval(mean, min(low, mean - reach), max(high, mean + reach))


def student_quantile(degrees: int) -> float:
    """The number below which Student's t lies in 97.5 of 100 cases.

    Args:
        degrees: Of freedom, from 1. Those above 1000 count as 1000, 1.9623 instead of 1.9600.

    Example:
        >>> round(student_quantile(4), 3)  # as in every table
        2.776
    """
    low, high = 1.0, 13.0  # 12.706 for one degree is the largest
    while high - low > 1e-9:
        middle = (low + high) / 2
        if _student_within(middle, min(degrees, 1000)) < 1 - 2 * TAIL:
            low = middle
        else:
            high = middle
    return high


def _student_within(t: float, degrees: int) -> float:
    """Probability that Student's t lies between -t and t: a sum of `degrees` / 2 terms, exact.

    Source: Abramowitz & Stegun 1964, 26.7.3 (odd degrees) and 26.7.4 (even ones).
    """
    angle, odd = math.atan(t / math.sqrt(degrees)), degrees % 2
    total, term = 0.0, math.cos(angle) if odd else 1.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= math.cos(angle) ** 2 * k / (k + 1)
    inside = math.sin(angle) * total
    return 2 / math.pi * (angle + inside) if odd else inside
