"""The targets of lesson 03's exercises. Each is measured when the check runs, none is stored."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from unittest.mock import Mock

import torch

from course_utils.exercises.checks import (
    Mistake,
    Verdict,
    call,
    check,
    check_function,
    is_number,
    not_yet,
    right,
)
from course_utils.topics.trainer_log import scheduled
from fitcast.memory.ledger import MemoryLedger
from fitcast.training.batching import accumulate, labelled_tokens, split
from fitcast.training.gradients import gradient, in_float64, relative_error
from fitcast.units import IGNORED, show_bytes

# examples, micro batch, accumulation, world size, epochs, warm-up, logging_steps
RUNS = ((32, 2, 4, 1, 1, 0.5, 1), (20, 2, 4, 1, 2, 0.1, 2), (27, 4, 2, 1, 2, 0.3, 3))
TWO_RANKS = (40, 2, 4, 2, 2, 0.25, 2)
# The largest size that trains, unknown to the search, and the largest that it may try.
SEARCHES = ((37, 64), (1, 64), (0, 64), (64, 64), (5, 64), (6, 10))


@check
def check_schedule(answer: Callable) -> Verdict:
    """Exercise 03.1: what Trainer counts, for runs with rests, epochs and two ranks."""

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
    return check_function(
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
            Mistake(
                "accumulation does not run on into the next epoch: round up for each epoch, then "
                "multiply.",
                mistaken(runs_on=True),
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


@check
def check_accumulation(answer: Callable) -> Verdict:
    """Exercise 03.2: gradients equal to the full batch's to 1e-12, one micro batch in memory."""
    model, batch = small_model(), uneven_batch()
    micro_batches = split(batch, 2)

    def run(function: Callable, *batches: Sequence[dict]) -> tuple[torch.Tensor, int]:
        """The gradient that a function leaves behind, and its peak in bytes."""
        model.zero_grad()
        given = [[dict(one) for one in several] for several in batches]  # it may pop the labels
        with MemoryLedger() as ledger:
            function(model, *given)
        if all(p.grad is None for p in model.parameters()):
            raise ValueError("no parameter has a gradient, backward() was not called")
        return gradient(model), ledger.report().peak_bytes

    def weighted(weights: Sequence[float]) -> Callable:
        def function(model: torch.nn.Module) -> None:
            for weight, micro_batch in zip(weights, micro_batches, strict=True):
                (weight * model(**micro_batch).loss).backward()

        return function

    exact, whole_peak = run(accumulate, [batch])
    _, budget_bytes = run(accumulate, micro_batches)
    budget_bytes = budget_bytes * 5 // 4
    found, peak_bytes = run(answer, micro_batches)
    if not (error := relative_error(found, exact)) <= 1e-12:  # NaN is not either
        number = len(micro_batches)
        labelled = [int((m["labels"] != IGNORED).sum()) for m in micro_batches]
        last = labelled_tokens(micro_batches[-1]) / labelled_tokens(batch)
        for sentence, weights in (
            Mistake(
                "that is the mean of the micro batches' means: weigh each by its labelled tokens.",
                [1 / number] * number,
            ),
            Mistake(
                "that adds the means up; divide, or more micro batches make longer steps.",
                [1] * number,
            ),
            Mistake(
                "a label at position 0 is nobody's target: count labels[:, 1:].",
                [n / sum(labelled) for n in labelled],
            ),
            Mistake(
                "only the last micro batch is left: clear gradients before the loop, not in it.",
                [0] * (number - 1) + [last],
            ),
            Mistake(
                "each mean is multiplied by its tokens, but nothing divides by all of them.",
                [labelled_tokens(m) for m in micro_batches],
            ),
        ):
            if relative_error(found, run(weighted(weights))[0]) < 1e-9:
                return not_yet(sentence)
        return not_yet(
            f"the relative error of the gradient is {error:.2g}; at most 1e-12 is due to rounding."
        )
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


class Endless(BaseException):
    """Ends a search that goes on for ever; no `except Exception` of a learner's holds it."""


@check
def check_search(answer: Callable) -> Verdict:
    """Exercise 03.3: the largest size that trains, in few attempts, nothing left alive."""
    for limit, upper in SEARCHES:
        most = 2 * upper.bit_length()  # doubling and halving needs one less, halving alone half
        attempts: list[int] = []
        leftovers: list[weakref.ref] = []  # what each attempt had in memory
        leaks: list[weakref.ref] = []  # what the next one still found there

        def train(
            size: int,
            limit: int = limit,
            most: int = most,
            attempts: list = attempts,
            leftovers: list = leftovers,
            leaks: list = leaks,
        ) -> None:
            if not is_number(size) or size != int(size) or size < 1:
                raise ValueError(f"a micro batch is a whole number from 1, got {size!r}")
            leaks.extend(tensor for tensor in leftovers if tensor() is not None)
            attempts.append(size)
            if len(attempts) > 4 * most:
                raise Endless
            activations = torch.zeros(size)
            leftovers.append(weakref.ref(activations))
            if size > limit:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to train {size}")

        try:
            found = call(answer, train, upper)
        except torch.OutOfMemoryError:
            return not_yet("an out-of-memory error came through: catch it.")
        except Endless:
            return not_yet(
                f"{len(attempts)} attempts, the last one with {attempts[-1]}, and no "
                "end: after each, one end of the interval has to move past the size "
                "that was tried."
            )
        if leaks:
            return not_yet(
                "an attempt began inside `except`, while the failed one's tensors were "
                "still alive: note what happened, leave `except`, then go on."
            )
        if len(attempts) > most:
            return not_yet(
                f"{len(attempts)} attempts to find {limit} in 0 to {upper}; halving the "
                f"interval needs at most {most}."
            )
        if max(attempts, default=0) > upper:
            return not_yet(f"it tried {max(attempts)}, and {upper} was the largest allowed.")
        if found == limit:
            continue
        if not is_number(found) or found > limit:
            return not_yet(
                f"{found} runs out of memory where {limit} is the largest that trains: "
                "return the last one that did."
            )
        return not_yet(
            f"{found} trains, but so does {limit}: sizes between the last success and "
            "the first failure are left."
        )
    return _only_memory(answer)


def _only_memory(answer: Callable) -> Verdict:
    for error in (ValueError("labels are missing"), RuntimeError("shapes cannot be multiplied")):
        try:
            answer(Mock(side_effect=error), 64)
        except type(error):
            continue
        return not_yet(
            f"a {type(error).__name__} is no lack of memory when it says {str(error)!r},"
            " and your search hides it: catch torch.OutOfMemoryError alone."
        )
    return right(
        "every limit found, in at most 14 attempts out of 64 sizes, and each failure was "
        "gone before the next attempt."
    )


@check
def check_rank_loss(answer: Callable) -> Verdict:
    """Exercise 03.4: each rank's loss, so that the mean of ranks' gradients is the batch's."""
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
