"""The targets of lesson 06's exercises. Each is computed when the check runs, none is stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from course_utils.exercises.answers import blanks
from course_utils.exercises.checks import (
    Mistake,
    Unfinished,
    Verdict,
    call,
    check,
    not_yet,
    right,
)
from course_utils.exercises.self_check import Question, SelfCheck
from fitcast.forecasting.forecast import forecast
from fitcast.forecasting.search import tokens_per_second
from fitcast.gpus import T4
from fitcast.memory.ledger import MemoryLedger
from fitcast.recipe import TrainRecipe
from fitcast.units import GIB, IGNORED, MIB, show_bytes

QUESTIONS = SelfCheck(
    Question(
        "8B by QLoRA, 4 x 2048 tokens, every layer forgets. What is largest at the peak?",
        ("the 4-bit weights", "what belongs to the logits", "adapters and their optimizer state"),
        "b",
        "Tokens x vocabulary numbers, in float32, in several copies: more than the weights.",
    ),
    Question(
        "On a T4, attention of a model with grouped queries is slow. When?",
        (
            "when rows are padded",
            "when no mask is given",
            "always",
        ),
        "b",
        "Without a mask transformers leaves the repeating of heads to the kernel, and the only "
        "one on a T4 that can do it writes out all scores. With a mask it repeats them first.",
    ),
    Question(
        "You sum the loss over chunks of rows, in a plain loop. Whose logits wait for backward?",
        ("one chunk's", "every chunk's", "those of half the chunks"),
        "b",
        "Autograd keeps a copy of each chunk's logits (of the usual three copies two are gone); "
        "the chunk must forget it, as a checkpoint does.",
    ),
    Question(
        "Padded rows, a T4, 8B. Which single change makes the usual recipe fit?",
        ("a lower rank", "repeated keys and values", "the loss in chunks", "native RMSNorm"),
        "c",
        "It takes the logits off the peak. The rank moves megabytes, the kernel is the fast one "
        "already.",
    ),
    Question(
        "Your run fits with 4 GiB to spare. What do you do with them?",
        (
            "let some layers keep their activations",
            "leave them: less memory is always better",
            "raise the rank until they are used",
        ),
        "a",
        "Each layer that remembers saves its second forward. Memory left over is speed not bought.",
    ),
)
TOLERANCE = 1e-6  # relative, of the loss and of its gradient
VOCABULARY, CHUNK = 4096, 64
LOSS_BYTES = 6 * MIB  # a chunk's logits are 1 MiB; all of them 8, and the usual loss has three
# What exercise 06.2 starts from: the usual recipe, too large for a T4.
PHI = TrainRecipe(
    model="phi-4-mini",
    lora_targets=("qkv_proj", "o_proj"),
    amp_dtype="float16",
    micro_batch_size=4,
    gradient_accumulation_steps=8,
    sequence_length=2048,
)
PHI_BYTES, PHI_SPEEDUP = 6 * GIB, 2
# Choices that take time and change nothing that is learned: the faster one, what to ask oneself.
FASTER: dict[str, tuple[Any, str]] = {
    "attention": ("explicit_kv", "Which kernel does attention take on a T4?"),
    "norm": ("native", "In how many steps, and in which format, is a norm computed?"),
    "lora_dropout": (0.0, "What does dropout draw, and write, for each adapter?"),
}
SAME: dict[str, str] = {  # what exercise 06.2 must leave, and why
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


@dataclass(frozen=True)
class Batch:
    """Hidden states, a frozen head and labels, and the chunk that a loss of them may build.

    Shapes: hidden (B, S, H), labels (B, S); the head goes from H to the vocabulary.
    """

    hidden: torch.Tensor
    head: torch.nn.Linear
    labels: torch.Tensor
    chunk_tokens: int

    @property
    def logits(self) -> torch.Tensor:
        """(B, S, V)."""
        return self.head(self.hidden)


def _batch(rows: int, length: int, vocabulary: int, dtype: torch.dtype, chunk: int) -> Batch:
    """Numbers that are the same every time; the first row's prompt is two thirds of it."""
    random = torch.Generator().manual_seed(rows + length)
    hidden = torch.randn(rows, length, 64, generator=random, dtype=dtype)
    head = torch.nn.Linear(64, vocabulary, bias=False, dtype=dtype).requires_grad_(False)
    head.weight.copy_(torch.randn(vocabulary, 64, generator=random, dtype=dtype) / 8)
    labels = torch.randint(vocabulary, (rows, length), generator=random)
    labels[0, : 2 * length // 3] = IGNORED
    return Batch(hidden.requires_grad_(), head, labels, chunk)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, **how: Any) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, **how)


def _shifted(batch: Batch, **how: Any) -> torch.Tensor:
    """The loss of all rows at once, each position against the next one's label."""
    return _cross_entropy(batch.logits[:, :-1], batch.labels[:, 1:], **how)


def _mean_of_means(batch: Batch) -> torch.Tensor:
    """Each chunk's mean with the same weight; a chunk without a label counts as 0."""
    logits = batch.logits[:, :-1].flatten(0, 1).split(batch.chunk_tokens)
    targets = batch.labels[:, 1:].flatten().split(batch.chunk_tokens)
    each = [
        _cross_entropy(one, wanted).nan_to_num()
        for one, wanted in zip(logits, targets, strict=True)
    ]
    return torch.stack(each).mean()


def _without_the_rest(batch: Batch) -> torch.Tensor:
    """Only whole chunks."""
    logits, targets = batch.logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()
    whole = len(targets) // batch.chunk_tokens * batch.chunk_tokens
    total = _cross_entropy(logits[:whole], targets[:whole], reduction="sum")
    return total / (targets != IGNORED).sum()


LOSS_MISTAKES: tuple[Mistake, ...] = (
    Mistake(
        "each position is compared with its own label; it must predict the next one's: "
        "`hidden[:, :-1]` and `labels[:, 1:]`.",
        lambda batch: _cross_entropy(batch.logits, batch.labels),
    ),
    Mistake(
        "a mean of the chunks' means gives a chunk of few labels as much say as a full one "
        "(lesson 03): sum, and divide once, at the end.",
        _mean_of_means,
    ),
    Mistake(
        "the sum is divided by all positions; divide by those whose label is not -100.",
        lambda batch: _shifted(batch, reduction="sum") / batch.labels[:, 1:].numel(),
    ),
    Mistake(
        "that is the sum; the mean over the labelled positions is asked for.",
        lambda batch: _shifted(batch, reduction="sum"),
    ),
    Mistake(
        "a row's last position predicts the first token of the next row: shift inside the rows, "
        "then flatten.",
        lambda batch: _cross_entropy(batch.logits.flatten(0, 1)[:-1], batch.labels.flatten()[1:]),
    ),
    Mistake("the rows behind the last whole chunk are left out.", _without_the_rest),
)


@check(asked=5)
def check_chunked(answer: Callable) -> Verdict:
    """Exercise 06.1: the mean cross entropy, equal with its gradient *and* in few bytes.

    Args:
        answer: Takes (hidden, head, labels, chunk_tokens), returns a scalar tensor.
    """
    if blanks(answer):
        raise Unfinished
    for batch in (
        _batch(2, 33, 96, torch.float64, 20),
        _batch(3, 32, 96, torch.float64, 31),
    ):
        if found := _unequal(answer, batch):
            return not_yet(found)
    used = _peak_bytes(answer, _batch(2, 257, VOCABULARY, torch.float32, CHUNK))
    if used > LOSS_BYTES:
        return not_yet(
            f"loss and gradient are equal, but {show_bytes(used)} are in use at once; the target "
            f"is at most {show_bytes(LOSS_BYTES)}. {_why_so_much(used)}"
        )
    usual = _peak_bytes(lambda *given: _shifted(Batch(*given)), _batch(2, 257, VOCABULARY,
                        torch.float32, CHUNK))  # fmt: skip
    return right(
        f"the same loss and the same gradient in {show_bytes(used)}, where the usual loss takes "
        f"{show_bytes(usual)}."
    )


def _unequal(answer: Callable, batch: Batch) -> str:
    """What is wrong with a loss, in value or gradient; "" when nothing is."""
    loss = call(answer, batch.hidden, batch.head, batch.labels, batch.chunk_tokens)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        return f"a tensor with one number is asked for, got {type(loss).__name__}."
    wanted = _shifted(batch)
    if not _close(loss, wanted):
        for sentence, mistaken in LOSS_MISTAKES:
            if _close(loss, mistaken(batch)):
                return sentence
        return f"the loss is {loss.item():.6g}, the usual one's {wanted.item():.6g}."
    if not loss.requires_grad:
        return "the loss is right, but no gradient leads back: keep it a tensor, do not detach."
    gradients = []
    for one in (loss, wanted):
        batch.hidden.grad = None
        one.sum().backward()
        gradients.append(batch.hidden.grad)
    if gradients[0] is None or not _close(*gradients):
        return "the loss is right, its gradient is not the usual one's."
    return ""


def _close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether the difference is small beside what is wanted."""
    return bool((found.double() - wanted.double()).norm() <= TOLERANCE * wanted.double().norm())


def _peak_bytes(loss_of: Callable, batch: Batch) -> int:
    """Most bytes that forward and backward of a loss add to what was there."""
    given = (batch.hidden, batch.head, batch.labels, batch.chunk_tokens)
    with MemoryLedger(batch.head, inputs=given[0::2]) as ledger:
        before = ledger.live_bytes
        call(loss_of, *given).sum().backward()
    return ledger.report().peak_bytes - before


def _why_so_much(used: int) -> str:
    """What a loss that uses so much keeps; all logits are 8 MiB here."""
    if used < 20 * MIB:
        return (
            "Each chunk's logits still wait for backward: let the chunk forget them "
            "(`checkpoint`, lesson 02)."
        )
    return "All logits are there at once: hand the head one chunk's rows, not all of them."


@check()
def check_phi(answer: TrainRecipe) -> Verdict:
    """Exercise 06.2: a recipe that learns the same as `PHI`, in fewer bytes and less time.

    Args:
        answer: The learner's recipe; forecast for a T4.
    """
    if not isinstance(answer, TrainRecipe):
        return not_yet(f"a TrainRecipe is asked for, got {type(answer).__name__}.")
    for field, why in SAME.items():
        if getattr(answer, field) != getattr(PHI, field):
            return not_yet(f"{field} must stay {getattr(PHI, field)}: {why}.")
    planned, before = (forecast(one, T4) for one in (answer, PHI))
    if planned.peak_allocated_bytes > PHI_BYTES:
        return not_yet(
            f"the peak is {show_bytes(planned.peak_allocated_bytes)}; the target is at "
            f"most {show_bytes(PHI_BYTES)}. It stands in {planned.peak_phase}, at "
            f"{planned.peak_operation}."
        )
    ratio = tokens_per_second(answer, planned) / tokens_per_second(PHI, before)
    if ratio < PHI_SPEEDUP:
        return not_yet(
            f"it fits, but trains {ratio:.1f} times as fast as before; the target is at "
            f"least {PHI_SPEEDUP}. {_largest_gain(answer)}"
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
