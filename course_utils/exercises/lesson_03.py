"""The targets of lesson 03's exercises. Each is measured when the check runs, none is stored."""

from __future__ import annotations

import functools
import math
import operator
import random
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import torch

from course_utils.exercises.answers import describe, number, whole
from course_utils.exercises.checks import (
    Mistake,
    Verdict,
    call,
    check,
    judge_function,
    not_yet,
    right,
)
from course_utils.exercises.self_check import Question, SelfCheck
from course_utils.topics.trainer_log import scheduled
from fitcast import models
from fitcast.forecasting.forecast import Forecast, forecast
from fitcast.gpus import Gpu
from fitcast.memory.ledger import MemoryLedger
from fitcast.recipe import TrainRecipe
from fitcast.training.batching import accumulate, labelled_tokens, split
from fitcast.training.gradients import gradient, in_float64, relative_error
from fitcast.units import IGNORED, refusal, show_bytes

# examples, micro batch, accumulation, world size, epochs, warm-up, logging_steps
RUNS = ((32, 2, 4, 1, 1, 0.5, 1), (20, 2, 4, 1, 2, 0.1, 2), (27, 4, 2, 1, 2, 0.3, 3))
TWO_RANKS = (40, 2, 4, 2, 2, 0.25, 2)
# The largest size that trains, unknown to the search, and the largest that it may try.
SEARCHES = ((37, 64), (1, 64), (0, 64), (64, 64), (5, 64), (6, 10))

QUESTIONS = SelfCheck(
    Question(
        "per_device_train_batch_size=2, gradient_accumulation_steps=16, logging_steps=16. How "
        "often does Trainer write a line?",
        (
            "after each optimizer step",
            "after every 16 optimizer steps",
            "after each micro batch",
        ),
        "b",
        "logging_steps, save_steps, warmup_steps and max_steps all count optimizer steps.",
    ),
    Question(
        "Each micro batch's mean loss, divided by their number, backward. The gradient is that of "
        "the whole batch",
        (
            "always",
            "when all micro batches have equally many sequences",
            "when all micro batches have equally many labelled tokens",
            "never",
        ),
        "c",
        "A mean of means gives a token of a short answer more say; divide sums by all tokens.",
    ),
    Question(
        "From 32 x 1 to 2 x 16. Which part of the memory shrinks?",
        ("activations", "gradients", "optimizer state", "weights"),
        "a",
        "Only activations (and logits) follow the micro batch.",
    ),
    Question(
        "Your own compute_loss ignores `num_items_in_batch`, accumulation is 16. The gradient is",
        ("right", "16 times too short", "random", "16 times too long"),
        "d",
        "Trainer believes that the loss is divided already, and adds up 16 means.",
    ),
    Question(
        "per_device_train_batch_size=4, gradient_accumulation_steps=8, two GPUs. How many "
        "sequences are behind an update?",
        ("4", "8", "32", "64"),
        "d",
        "The effective batch: micro batch x accumulation steps x world size.",
    ),
)


@check(asked=3)
def check_schedule(answer: Callable) -> Verdict:
    """Exercise 03.3: what Trainer counts, for runs with rests, epochs and two ranks."""

    def mistaken(
        steps: Callable = lambda batches, accumulation: math.ceil(batches / accumulation),
        runs_on: bool = False,
        one_rank: bool = False,
        floors: bool = False,
        warms_batches: bool = False,
        logs_batches: bool = False,
    ) -> Callable:
        def schedule(examples, micro, accumulation, ranks, epochs, warmup, logging):
            batches = math.ceil(examples / (micro * (1 if one_rank else ranks)))
            every = epochs * batches
            n = steps(every, accumulation) if runs_on else epochs * steps(batches, accumulation)
            warm = warmup * (every if warms_batches else n)
            lines = (every if logs_batches else n) // logging
            return n, math.floor(warm) if floors else math.ceil(warm), lines

        return schedule

    cases = [*RUNS, TWO_RANKS]
    call(answer, *cases[0])  # unfinished? then Trainer need not run
    return judge_function(
        answer,
        cases,
        [scheduled(*case) for case in cases],
        mistakes=[
            Mistake(
                "those are micro batches; an optimizer step comes after `accumulation` of them.",
                mistaken(lambda batches, accumulation: batches),
            ),
            Mistake(
                "the last micro batches of an epoch make a step too, even if fewer than "
                "`accumulation` are left: round up.",
                mistaken(lambda batches, accumulation: batches // accumulation),
            ),
            *(
                Mistake(
                    "accumulation does not run on into the next epoch: round up for each epoch, "
                    "then multiply.",
                    mistaken(*divides, runs_on=True, floors=floors),
                )
                for divides in ((), (operator.floordiv,))
                for floors in (False, True)
            ),
            Mistake(
                "warm-up is a share of the optimizer steps, not of the micro batches.",
                mistaken(warms_batches=True),
            ),
            Mistake("a share of a warm-up step is rounded up.", mistaken(floors=True)),
            Mistake(
                "`logging_steps` counts optimizer steps, not micro batches.",
                mistaken(logs_batches=True),
            ),
            Mistake(
                "each of the ranks has only its share of the examples.", mistaken(one_rank=True)
            ),
        ],
        takeaway="as transformers' Trainer counted, in four runs.",
    )


def keep_first_token(rows: Sequence[Mapping[str, Any]], of_answers: int) -> list[dict[str, Any]]:
    """Rows of which the first ones keep only the first label that is not -100.

    Args:
        rows: Encoded examples; they stay as they are.
        of_answers: How many of the rows lose the rest of their labels.
    """
    cut = [_keep_tokens(row, 1) for row in rows[:of_answers]]
    return cut + [dict(row) for row in rows[of_answers:]]


def cut_by_chance(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose answers are cut to random lengths, many short and few long.

    A length's logarithm is uniform, from one token to the whole answer; the same in each call.

    Args:
        rows: Encoded examples; they stay as they are.
    """
    chance = random.Random(0)
    lengths = [sum(label != IGNORED for label in row["labels"]) for row in rows]
    return [
        _keep_tokens(row, round(length ** chance.random()))
        for row, length in zip(rows, lengths, strict=True)
    ]


def _keep_tokens(row: Mapping[str, Any], number_of: int) -> dict[str, Any]:
    """The row with the first labels that are not -100, so many of them, and no others."""
    learned = [at for at, label in enumerate(row["labels"]) if label != IGNORED][:number_of]
    labels = [label if at in learned else IGNORED for at, label in enumerate(row["labels"])]
    return {**row, "labels": labels}


def small_model() -> torch.nn.Module:
    """A two-layer Llama in float64 with random weights, quick to differentiate."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return in_float64(
            LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=512,
                    hidden_size=64,
                    intermediate_size=128,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    use_cache=False,
                )
            )
        )


def uneven_batch(rows: int = 8, tokens: int = 64) -> dict[str, torch.Tensor]:
    """Random rows, (rows, tokens), of which the first half carries three labels each."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(512, (rows, tokens), generator=random)
    labels = ids.clone()
    labels[: rows // 2, 3:] = IGNORED
    return {"input_ids": ids, "labels": labels}


@check(asked=2)
def check_accumulation(answer: Callable) -> Verdict:
    """Exercise 03.1: gradients equal to the full batch's to 1e-12, one micro batch in memory."""
    model, batch = small_model(), uneven_batch()
    micro_batches = split(batch, 2)
    exact, whole_peak = _accumulated(accumulate, model, [batch])
    _, small_peak = _accumulated(accumulate, model, micro_batches)
    found, peak_bytes = _accumulated(answer, model, micro_batches)
    if not (error := relative_error(found, exact)) <= 1e-12:  # NaN is not either
        means = _gradients_of_means(model, micro_batches)
        for sentence, weights in _mistaken_weights(micro_batches):
            mistaken = means.new_tensor(weights) @ means
            if relative_error(found, mistaken) < 1e-9:
                return not_yet(sentence)
        return not_yet(
            f"the relative error of the gradient is {error:.2g}; at most 1e-12 is due to rounding."
        )
    budget_bytes = small_peak * 5 // 4
    if peak_bytes > budget_bytes:
        return not_yet(
            f"the gradient is equal, but the peak is {show_bytes(peak_bytes)}; at most "
            f"{show_bytes(budget_bytes)}: let each micro batch's graph go (backward) "
            "before the next one is built."
        )
    return right(
        f"equal to the full batch's gradient to 1e-12, at {peak_bytes / whole_peak:.0%} "
        "of its peak."
    )


def _accumulated(
    function: Callable, model: torch.nn.Module, micro_batches: Sequence[dict]
) -> tuple[torch.Tensor, int]:
    """The gradient that a function leaves behind, and its peak in bytes."""
    model.zero_grad()
    given = [dict(micro_batch) for micro_batch in micro_batches]  # it may pop the labels
    with MemoryLedger() as ledger:
        function(model, given)
    if all(p.grad is None for p in model.parameters()):
        raise ValueError("no parameter has a gradient, backward() was not called")
    return gradient(model), ledger.report().peak_bytes


def _gradients_of_means(model: torch.nn.Module, micro_batches: Sequence[dict]) -> torch.Tensor:
    """(micro batches, numbers): each mean loss's gradient; every weighing is a sum of these."""
    gradients = []
    for micro_batch in micro_batches:
        model.zero_grad()
        model(**micro_batch).loss.backward()
        gradients.append(gradient(model))
    return torch.stack(gradients)


def _mistaken_weights(micro_batches: Sequence[dict]) -> list[Mistake]:
    """Mistakes in weighing, each with the weights of the micro batches' means."""
    count = len(micro_batches)
    tokens = [labelled_tokens(m) for m in micro_batches]
    with_first = [int((m["labels"] != IGNORED).sum()) for m in micro_batches]
    return [
        Mistake(
            "that is the mean of the micro batches' means: weigh each by its labelled tokens.",
            [1 / count] * count,
        ),
        Mistake(
            "that adds the means up; divide, or more micro batches make longer steps.",
            [1] * count,
        ),
        Mistake(
            "a label at position 0 is nobody's target: count labels[:, 1:].",
            [n / sum(with_first) for n in with_first],
        ),
        Mistake(
            "only the last micro batch is left: clear gradients before the loop, not in it.",
            [0] * (count - 1) + [tokens[-1] / sum(tokens)],
        ),
        Mistake(
            "each mean is multiplied by its tokens, but nothing divides by all of them.", tokens
        ),
        Mistake(
            "each mean is divided by all tokens, but not multiplied by its own first.",
            [1 / sum(tokens)] * count,
        ),
    ]


class Endless(BaseException):
    """Ends a search that goes on for ever; no `except Exception` of a learner's holds it."""


class PretendedCard:
    """Trains any size up to a limit, and notes how it was asked.

    Attributes:
        limit: The largest size that trains.
        attempts: Sizes that were tried, in order.
        leaked: Whether an attempt found the tensors of an earlier one still alive.
        most: Attempts that a search by halving needs at most.
    """

    def __init__(self, limit: int, upper: int):
        self.limit, self.attempts, self.leaked = limit, [], False
        self.most = 2 * upper.bit_length()  # doubling and halving needs one less, halving half
        self._tensors: list[weakref.ref] = []

    def train(self, size: int) -> None:
        """One training step, which runs out of memory above the limit."""
        wanted = whole(size, least=1)
        if wanted is None:
            raise refusal(
                "size", "be a whole number of sequences from 1", size, "use // for halves"
            )
        self.leaked |= any(tensor() is not None for tensor in self._tensors)
        self.attempts.append(wanted)
        if len(self.attempts) > 4 * self.most:
            raise Endless
        activations = torch.zeros(wanted)
        self._tensors.append(weakref.ref(activations))
        if wanted > self.limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to train {wanted}")


@check(asked=3)
def check_search(answer: Callable) -> Verdict:
    """Exercise 03.4: the largest size that trains, in few attempts, nothing left alive."""
    for limit, upper in SEARCHES:
        fault = _fault_of_search(answer, limit, upper)
        if fault:
            return not_yet(fault)
    fault = _hidden_error(answer)
    if fault:
        return not_yet(fault)
    return right(
        "every limit found, in at most 14 attempts out of 64 sizes, and each failure was "
        "gone before the next attempt."
    )


def _fault_of_search(answer: Callable, limit: int, upper: int) -> str | None:
    """What is wrong with one search, in a sentence."""
    card = PretendedCard(limit, upper)
    try:
        found = call(answer, card.train, upper)
    except torch.OutOfMemoryError:
        return "an out-of-memory error came through: catch it."
    except Endless:
        return (
            f"{len(card.attempts)} attempts, the last one with {card.attempts[-1]}, and no "
            "end: after each, one end of the interval has to move past the size "
            "that was tried."
        )
    return _fault_of_attempts(card, upper) or _fault_of_result(found, limit)


def _fault_of_attempts(card: PretendedCard, upper: int) -> str | None:
    if card.leaked:
        return (
            "an attempt began inside `except`, while the failed one's tensors were "
            "still alive: note what happened, leave `except`, then go on."
        )
    if len(card.attempts) > card.most:
        return (
            f"{len(card.attempts)} attempts to find {card.limit} in 0 to {upper}; halving the "
            f"interval needs at most {card.most}."
        )
    if max(card.attempts, default=0) > upper:
        return f"it tried {max(card.attempts)}, and {upper} was the largest allowed."
    return None


def _fault_of_result(answer: object, limit: int) -> str | None:
    found = number(answer)
    if found is None:
        return f"the largest size is asked for, a number, got {describe(answer)}."
    if found > limit:
        return (
            f"{found} runs out of memory where {limit} is the largest that trains: "
            "return the last one that did."
        )
    if found < limit:
        return (
            f"{found} trains, but so does {limit}: sizes between the last success and "
            "the first failure are left."
        )
    return None


def _hidden_error(answer: Callable) -> str | None:
    """Whether the search takes another error for a lack of memory."""
    for error in (ValueError("labels are missing"), RuntimeError("shapes cannot be multiplied")):
        try:
            answer(Mock(side_effect=error), 64)
        except type(error):
            continue
        return (
            f"a {type(error).__name__} is no lack of memory when it says {str(error)!r},"
            " and your search hides it: catch torch.OutOfMemoryError alone."
        )
    return None


@check()
def check_rank_loss(answer: Callable) -> Verdict:
    """Exercise 03.5: each rank's loss, so that the mean of ranks' gradients is the batch's."""
    for tokens_of_ranks in ((3, 45), (7, 7, 50, 11)):
        ranks, total = len(tokens_of_ranks), sum(tokens_of_ranks)
        random = torch.Generator().manual_seed(ranks)
        data = [torch.randn(n, 5, generator=random, dtype=torch.float64) for n in tokens_of_ranks]

        def averaged(loss_of: Callable, data: list = data, total: int = total) -> torch.Tensor:
            """What DDP makes of it: the mean over ranks of each one's own gradient."""
            grads = []
            for tokens in data:
                weights = torch.ones(5, dtype=torch.float64, requires_grad=True)
                loss_sum = (tokens @ weights).square().sum()
                call(loss_of, loss_sum, len(tokens), total, len(data)).backward()
                grads.append(weights.grad)
            return torch.stack(grads).mean(0)

        exact = averaged(lambda loss_sum, mine, total, ranks: loss_sum * ranks / total)
        found = averaged(answer)
        if relative_error(found, exact) < 1e-12:
            continue
        for sentence, mistaken in (
            Mistake(
                "that is each rank's own mean: a rank with 3 tokens counts as much as one with 45.",
                lambda loss_sum, mine, total, ranks: loss_sum / mine,
            ),
            Mistake(
                "DDP divides by the number of ranks once more: the update is "
                f"{ranks} times too small.",
                lambda loss_sum, mine, total, ranks: loss_sum / total,
            ),
            Mistake(
                "that is a sum over tokens: it grows with the batch.",
                lambda loss_sum, mine, total, ranks: loss_sum,
            ),
            Mistake(
                "multiplied by the ranks, but still divided by the rank's own tokens.",
                lambda loss_sum, mine, total, ranks: loss_sum * ranks / mine,
            ),
        ):
            if relative_error(found, averaged(mistaken)) < 1e-9:
                return not_yet(sentence)
        return not_yet(
            f"with {ranks} ranks the gradient's relative error is "
            f"{relative_error(found, exact):.2g}."
        )
    return right("the mean of the ranks' gradients is the gradient of the whole batch, to 1e-12.")


EFFECTIVE_BATCH = 32
SLOWER_AT_MOST = 1.10  # times the fastest plan that fits


def effective_batch_step(
    recipe: TrainRecipe, micro_batch_size: int, checkpointed_layers: int, gpu: Gpu
) -> Forecast:
    """Forecast a plan; two micro batches need as much memory as any larger number of them."""
    return forecast(
        replace(
            recipe,
            micro_batch_size=micro_batch_size,
            checkpointed_layers=checkpointed_layers,
            gradient_accumulation_steps=2,
        ),
        gpu,
    )


def seconds_an_update(step: Forecast, micro_batch_size: int) -> float:
    """Seconds for 32 sequences in such micro batches, at the card's peak rates."""
    return step.ideal_seconds * EFFECTIVE_BATCH / (2 * micro_batch_size)


@functools.cache
def fastest_plan(recipe: TrainRecipe, gpu: Gpu) -> tuple[int, int, float]:
    """Micro batch, layers that forget, and seconds of the fastest plan whose verdict is "fits"."""
    layers, plans = models.config(recipe.model).num_hidden_layers, []
    size = 1
    while size <= EFFECTIVE_BATCH:
        least, most = -1, layers  # `most` fits, `least` is not known to
        if effective_batch_step(recipe, size, layers, gpu).verdict != "fits":
            break  # a larger micro batch needs more
        while most - least > 1:
            middle = (least + most) // 2
            fits = effective_batch_step(recipe, size, middle, gpu).verdict == "fits"
            least, most = (least, middle) if fits else (middle, most)
        seconds = seconds_an_update(effective_batch_step(recipe, size, most, gpu), size)
        plans.append((seconds, size, most))
        size *= 2
    seconds, size, layers = min(plans)
    return size, layers, seconds


@check(asked=3)
def check_effective_batch(answer: Mapping[str, Any], recipe: TrainRecipe, gpu: Gpu) -> Verdict:
    """Exercise 03.2: 32 sequences behind an update of one card, that fit and lose little time.

    Args:
        answer: Whole numbers under "micro_batch_size", "gradient_accumulation_steps" and
            "checkpointed_layers".
        recipe: Model, length and all that the answer does not decide.
        gpu: The card.
    """
    layers = models.config(recipe.model).num_hidden_layers
    names = {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "checkpointed_layers": 0}
    plan = {name: whole(answer[name], least) for name, least in names.items()}
    for name, least in names.items():
        if plan[name] is None:
            return not_yet(f"{name} is a whole number from {least}, got {answer[name]!r}.")
    size, steps, forget = (plan[name] or 0 for name in names)
    if forget > layers:
        return not_yet(f"the model has {layers} layers, {forget} cannot forget.")
    if size * steps != EFFECTIVE_BATCH:
        return not_yet(
            f"{size} x {steps} x 1 card makes {size * steps} sequences behind an update; "
            f"{EFFECTIVE_BATCH} are asked for."
        )
    step = effective_batch_step(recipe, size, forget, gpu)
    if step.verdict != "fits":
        why = _why_not(
            step,
            gpu,
            lambda: effective_batch_step(recipe, size, layers - forget, gpu),
            forget,
            layers,
        )
        return not_yet(f"{size} x {steps}, {forget} layers forget: {why}")
    best_size, best_forget, best = fastest_plan(recipe, gpu)
    slower = seconds_an_update(step, size) / best
    if slower > SLOWER_AT_MOST:
        room = (
            "every layer forgets, and the room for layers that remember is not spent"
            if forget == layers and size == best_size
            else "fewer sequences at a time leave room for layers that remember, and each of those "
            "saves its second forward"
            if size > best_size
            else "more of the layers could remember"
        )
        return not_yet(f"it fits, and takes {slower - 1:.1%} longer than the fastest plan: {room}.")
    return right(
        f"{show_bytes(step.peak_allocated_bytes)} at the peak, fits, {slower - 1:.1%} longer than "
        f"the fastest plan ({best_size} x {EFFECTIVE_BATCH // best_size}, {best_forget} layers "
        "forget)."
    )


def _why_not(
    step: Forecast, gpu: Gpu, turned: Callable[[], Forecast], forget: int, layers: int
) -> str:
    """What is wrong with a plan that is tight or does not fit.

    Args:
        step: The plan's forecast.
        gpu: The card.
        turned: Forecasts the plan in which forgetting and remembering layers are exchanged.
        forget: How many layers forget.
        layers: How many there are.
    """
    peak = f"with {show_bytes(step.peak_allocated_bytes)} in tensors"
    if step.verdict == "tight":
        return f"tight, {peak}: let one or two layers more forget, and it fits."
    if step.peak_allocated_bytes < gpu.usable_bytes:
        peak += f", which with the allocator's gaps is more than {show_bytes(gpu.usable_bytes)}"
    if forget == layers:
        return f"does not fit, {peak}, and no layer is left to forget: smaller micro batches."
    if forget < layers - forget and turned().verdict == "fits":
        return (
            f"does not fit, {peak}. `checkpointed_layers` counts the layers that forget, not "
            "those that remember."
        )
    return f"does not fit, {peak}: let more layers forget."
