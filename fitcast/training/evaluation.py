"""What a fine-tune changed: loss and answers on held-out examples, and how sure we are of it.

Not modelled: sampling (answers are greedy, so that they can be compared), judging free text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fitcast import gpus
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.training.data import render_prompt


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that holds the true one in 95 of 100 such experiments."""

    mean: float
    low: float
    high: float

    def __str__(self):
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


@torch.no_grad()
def answer_losses(model: torch.nn.Module, rows: Sequence[dict], recipe: TrainRecipe) -> list[float]:
    """Loss of each example's answer, in nats per token.

    One example at a time, so that no result depends on its neighbours' padding.

    Args:
        model: In any mode; it is back in that mode afterwards.
        rows: input_ids and labels of each example, as from `data.encode`.
        recipe: Uses loss, loss_chunk_tokens and amp_dtype.
    """
    device, training = gpus.device(), model.training
    model.eval()
    losses = []
    for row in rows:
        batch = {name: torch.tensor([row[name]], device=device) for name in ("input_ids", "labels")}
        with qlora.autocast(recipe, device):
            losses.append(qlora.compute_loss(model, batch, recipe))
    model.train(training)
    return torch.stack(losses).float().tolist()


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    recipe: TrainRecipe,
    max_new_tokens: int = 64,
    micro_batch_size: int = 64,
) -> list[str]:
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
        some = prompts[start : start + micro_batch_size]
        texts = [render_prompt(prompt, tokenizer) for prompt in some]
        batch = tokenizer(
            texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        ).to(gpus.device())
        with qlora.autocast(recipe, gpus.device()):
            tokens = model.generate(
                **{name: batch[name] for name in ("input_ids", "attention_mask")},
                use_cache=True,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
        answers += tokenizer.batch_decode(
            tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
    model.train(training)
    return answers


def largest_shift(one: Sequence[float], other: Sequence[float]) -> float:
    """Largest absolute difference between two lists of losses of the same examples."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def paired_bootstrap(
    before: Sequence[float], after: Sequence[float], resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of after - before with its 95 % interval, by resampling the examples.

    Paired: an example that is hard before is hard after, and only the change of each one counts.

    Args:
        before, after: One number for each example, in the same order.

    Raises:
        ValueError: Different lengths, or fewer than 2 examples.

    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13 (percentiles).
    """
    if len(before) != len(after) or len(before) < 2:
        raise ValueError(
            f"before and after must have the same length of at least 2, got "
            f"{len(before)} and {len(after)}; evaluate the same examples twice"
        )
    change = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    draws = torch.randint(
        len(change), (resamples, len(change)), generator=torch.Generator().manual_seed(seed)
    )
    means = change[draws].mean(dim=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(change.mean().item(), low, high)
