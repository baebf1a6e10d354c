"""The targets of lesson 08's exercises: counted from PyTorch's own wrappers, or differentiated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

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
from course_utils.topics import bus
from fitcast.forecasting.ranks import pretended_group
from fitcast.training.gradients import relative_error

# strategy, micro batches of a step, ranks
STEPS = (("ddp", 2, 2), ("ddp", 3, 4), ("fsdp2", 2, 2), ("fsdp2", 3, 4))
TOKENS_OF_RANKS = ((3, 45), (7, 7, 50, 11))

QUESTIONS = SelfCheck(
    Question(
        "QLoRA of an 8B model, the same micro batch on each of two cards under DDP. A card holds",
        (
            "half of what one alone would",
            "what one alone would, and a little more",
            "twice as much",
            "two thirds of it",
        ),
        "b",
        "Every rank has the whole model; DDP adds buckets for the gradients that travel.",
    ),
    Question(
        "What does DDP send when adapters are trained?",
        (
            "the whole model, once a step",
            "activations, after each layer",
            "the adapters' gradients, once a step",
            "the adapters' gradients, once a layer",
        ),
        "c",
        "Only what is trained has gradients, and only the last micro batch's backward sends them.",
    ),
    Question(
        "FSDP2, a frozen base. The step's sequences are cut into 8 micro batches instead of 2. "
        "What is gathered grows",
        ("not at all", "by half", "twice", "four times"),
        "d",
        "Each micro batch gathers each layer, for forward and again for backward.",
    ),
    Question(
        "A chunked loss calls the model inside the DDP wrapper. What happens?",
        (
            "each rank trains a model of its own, without an error",
            "PyTorch raises",
            "the same, only slower",
        ),
        "a",
        "DDP prepares its exchange in its own forward; who passes it by exchanges nothing.",
    ),
    Question(
        "Two GPUs are visible. A script with transformers' own Trainer, a model in 16 bits, is "
        "started with plain python",
        (
            "it uses the first GPU",
            "it splits each batch between both, in one process, and the batch doubles",
            "it starts two processes",
            "it refuses",
        ),
        "b",
        "That is DataParallel: n_gpu is 2 and multiplies the batch. (TRL's trainers refuse.)",
    ),
)


@functools.cache
def counted(strategy: str, micro_batches: int, ranks: int) -> int:
    """Bytes that a rank sends in one step of the small model, by PyTorch's own wrappers.

    Args:
        strategy: "ddp" or "fsdp2".
        micro_batches: Of one step; gradients travel with the last one.
        ranks: How many; this process plays the first.
    """
    with pretended_group(ranks), bus.Bus() as seen:
        model = bus.wrapped(strategy, bus.small_model())
        if strategy == "ddp":
            model.register_comm_hook(None, _at_once)
        bus.backward(model, bus.my_batches(micro_batches))
        return seen.sent_bytes


def _at_once(_, bucket):  # DDP refuses a hook whose types it cannot read
    """A bucket of DDP all-reduced: a group that pretends has no futures that DDP could wait for."""
    dist.all_reduce(bucket.buffer())
    done: torch.futures.Future = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def sent(
    strategy: str,
    frozen: int,
    trained: int,
    micro_batches: int,
    ranks: int,
    *,
    passes: int = 2,
    gathers: tuple[int, int] = (1, 1),
    scatters: int = 1,
    reduces: int = 2,
    reduced: str = "trained",
    every: bool = False,
) -> float:
    """What a rank sends; the keywords make mistakes.

    Args:
        strategy: "ddp" or "fsdp2".
        frozen: Bytes of what is not trained.
        trained: Bytes of what is.
        micro_batches: Of one step.
        ranks: How many.
        passes: How often a micro batch gathers.
        gathers: Whether frozen and trained parameters are gathered.
        scatters: How often gradients are scattered.
        reduces: How often an all-reduce sends its share.
        reduced: "trained" or "all", what is all-reduced.
        every: Whether gradients travel with each micro batch.
    """
    share, times = (ranks - 1) / ranks, micro_batches if every else 1
    if strategy == "ddp":
        return reduces * share * times * (trained + frozen * (reduced == "all"))
    whole = gathers[0] * frozen + gathers[1] * trained
    return share * (micro_batches * passes * whole + scatters * times * trained)


MISTAKES = {
    "ddp": (
        ("that is sent for each micro batch; gradients travel with the last one.", {"every": True}),
        ("the frozen matrices have no gradient: nothing of them is sent.", {"reduced": "all"}),
        ("an all-reduce is two rounds, reduce-scatter and all-gather: twice the share.",
         {"reduces": 1}),
    ),
    "fsdp2": (
        ("that gathers once a micro batch; backward needs the layers again.", {"passes": 1}),
        ("adapters are cut as well, and gathered with their layer.", {"gathers": (1, 0)}),
        ("frozen matrices are cut as well, and gathered.", {"gathers": (0, 1)}),
        ("the gradients are missing: one reduce-scatter of what is trained.", {"scatters": 0}),
        ("gradients travel with the last micro batch only.", {"every": True}),
        ("gradients are reduce-scattered, one round; an all-reduce would be two.", {"scatters": 2}),
    ),
}  # fmt: skip


@check(asked=2)
def check_sent(answer: Callable) -> Verdict:
    """Exercise 08.1: bytes that a rank sends, for both strategies, as PyTorch's wrappers send."""
    frozen, trained = bus.FROZEN_BYTES, bus.TRAINED_BYTES
    for strategy, named in MISTAKES.items():
        steps = [step for step in STEPS if step[0] == strategy]
        verdict = judge_function(
            answer,
            [(strategy, frozen, trained, *step[1:]) for step in steps],
            [counted(*step) for step in steps],
            mistakes=[
                Mistake(f"{strategy}: {sentence}", functools.partial(sent, **slip))
                for sentence, slip in named
            ],
        )
        if not verdict.passed:
            return verdict
    return right("as PyTorch's wrappers sent, with 2 and with 4 ranks.")


class Waits(Exception):
    """A rank calls a collective that the others do not call."""


def together(answer: Callable, tokens: Sequence[int], data: Sequence[torch.Tensor]) -> torch.Tensor:
    """What DDP makes of each rank's loss: the mean over ranks of each one's own gradient.

    The ranks are played one after the other, again and again: in round n, the sums of the first n
    all-reduces are known.

    Args:
        answer: The learner's function.
        tokens: Of each rank.
        data: Of each rank, (tokens, width).

    Raises:
        Waits: Some ranks call `all_reduce` more often than others.
    """
    sums: list[torch.Tensor] = []
    while True:
        given: list[list[torch.Tensor]] = []
        grads = []
        for mine, rows in zip(tokens, data, strict=True):
            given.append([])

            def all_reduce(tensor: torch.Tensor, seen: list = given[-1]) -> None:
                seen.append(tensor.detach().clone())
                if len(seen) <= len(sums):
                    tensor.detach().copy_(sums[len(seen) - 1])

            weights = torch.ones(rows.shape[1], dtype=rows.dtype, requires_grad=True)
            loss = call(answer, (rows @ weights).square().sum(), mine, all_reduce, len(tokens))
            loss.sum().backward()
            grads.append(weights.grad)
        if len({len(seen) for seen in given}) > 1:
            raise Waits
        if len(given[0]) <= len(sums):
            return torch.stack(grads).mean(0)
        sums.append(sum(seen[len(sums)].double() for seen in given))  # type: ignore[arg-type]


def _loss(weigh: Callable) -> Callable:
    """A rank's loss with all ranks' tokens at hand: `weigh(sum, mine, all, ranks)`."""

    def loss_of_rank(loss_sum: Any, mine: int, all_reduce: Callable, ranks: int) -> Any:
        tokens = torch.tensor(float(mine))
        all_reduce(tokens)
        return weigh(loss_sum, mine, tokens, ranks)

    return loss_of_rank


SLIPS = (
    Mistake(
        "each rank divides by its own tokens: a rank with 3 counts as much as one with 45.",
        _loss(lambda loss, mine, every, ranks: loss / mine),
    ),
    Mistake(
        "DDP takes the mean: the update is {ranks} times too small.",
        _loss(lambda loss, mine, every, ranks: loss / every),
    ),
    Mistake(
        "multiplied by the ranks, but still divided by the rank's own tokens.",
        _loss(lambda loss, mine, every, ranks: loss * ranks / mine),
    ),
    Mistake(
        "that is a sum over tokens: it grows with the batch.",
        _loss(lambda loss, mine, every, ranks: loss),
    ),
)


@check(asked=2)
def check_loss(answer: Callable) -> Verdict:
    """Exercise 08.2: each rank's loss, so that DDP's mean is the gradient of all tokens' mean."""
    for tokens in TOKENS_OF_RANKS:
        random = torch.Generator().manual_seed(len(tokens))
        data = [torch.randn(n, 5, generator=random, dtype=torch.float64) for n in tokens]
        exact = together(_loss(lambda loss, mine, every, n: loss * n / every), tokens, data)
        try:
            found = together(answer, tokens, data)
        except Waits:
            return not_yet(
                "not all ranks call all_reduce equally often; those that do would wait for ever."
            )
        error = relative_error(found, exact)
        if error < 1e-6:  # token counts may be float32
            continue
        for sentence, slip in SLIPS:
            if relative_error(found, together(slip, tokens, data)) < 1e-6:
                return not_yet(sentence.format(ranks=len(tokens)))
        return not_yet(f"with {len(tokens)} ranks the gradient's relative error is {error:.2g}.")
    return right("the mean of the ranks' gradients is that of all tokens, with 2 and with 4 ranks.")
