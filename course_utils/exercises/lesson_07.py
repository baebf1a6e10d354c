"""The targets of lesson 07's exercises. Each is computed when the check runs, none is stored."""

from __future__ import annotations

import functools
from collections.abc import Callable

from course_utils.data import BUNDLED
from course_utils.exercises.answers import blanks
from course_utils.exercises.checks import (
    Mistake,
    Unfinished,
    Verdict,
    check,
    judge_function,
)
from course_utils.exercises.self_check import Question, SelfCheck
from fitcast import models
from fitcast.forecasting.load import blueprint
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.training import data

MODELS = (BUNDLED, "llama-3.2-1b", "llama-2-7b")
WITH_SYSTEM = [
    {"role": "system", "content": "You write tickets."},
    {"role": "user", "content": "Where is order 7?"},
    {"role": "assistant", "content": "On its way."},
]
CONVERSATIONS = (
    WITH_SYSTEM,
    [*WITH_SYSTEM, {"role": "user", "content": "Since?"}, {"role": "assistant", "content": "May."}],
    WITH_SYSTEM[1:],
)
QUESTIONS = SelfCheck(
    Question(
        "Your rows have different lengths. When does a run that is too large for the card die?",
        (
            "at the first step",
            "when its longest rows come, whenever that is",
            "at the first checkpoint",
            "it pages to the host",
        ),
        "b",
        "Memory follows the longest row of a micro batch; so try those first.",
    ),
    Question(
        "Which labels does a fine-tune on chats want?",
        (
            "-100 on all but the assistant's words and their end tokens",
            "every token",
            "-100 on the answers",
            "0 on all but the answers",
        ),
        "a",
        "The loss skips -100; 0 is a token; without the end token generation never stops.",
    ),
    Question(
        "The training loss fell from 7 to 1. The model learned what your answers say",
        (
            "certainly",
            "if it fell below 1",
            "if held-out answers got better than before, and than a control's",
        ),
        "c",
        "The look alone lowers it, too; and what the base had already, it did not learn.",
    ),
    Question(
        "A resumed run has the right weights, and a fresh optimizer. It is",
        ("the same run", "another run that looks alike", "refused by Trainer", "slower only"),
        "b",
        "Averages, schedule, scaler, random state and the place in the data belong to a run.",
    ),
    Question(
        "An 8B model is merged on a machine with 12 GB of memory",
        (
            "never",
            "in 4 bits only",
            "with a swap file only",
            "shard by shard, one file of the result at a time",
        ),
        "d",
        "Each weight needs its own adapter and nothing else of the model.",
    ),
)


@functools.cache
def _trainable(model: str, rank: int) -> int:
    """Numbers that PEFT's adapters of this rank have on a model's q, k, v and o."""
    recipe = TrainRecipe(model=model, base="float32", lora_rank=rank)
    return qlora.count_parameters(blueprint(recipe, models.config(model)))[0]


@check()
def check_trainable(answer: Callable) -> Verdict:
    """Exercise 07.2: trainable parameters of rank-r adapters on q, k, v and o."""
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
        counted.append(_trainable(model, rank))
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
        takeaway=f"{counted[1]:,} for Llama-3.2-1B: `print_trainable_parameters()` says so, too.",
    )


@check(asked=2)
def check_labels(answer: Callable, ids_of: Callable) -> Verdict:
    """Exercise 07.1: -100 but for the assistant's turns, each with the token that ends it.

    Args:
        answer: Takes messages, returns a label for each token.
        ids_of: Token ids of messages, by the chat template; with True and an answer's header.
    """

    if blanks(answer):  # a slice from `...` raises what says nothing of it
        raise Unfinished

    def spans(messages: list[dict], start_at: Callable, end_at: Callable) -> list[int]:
        ids = ids_of(messages)
        labels = [data.IGNORED] * len(ids)
        for n, message in enumerate(messages):
            if message["role"] == "assistant":
                start, end = start_at(messages, n), end_at(messages, n)
                labels[start:end] = ids[start:end]
        return labels

    def begin(messages: list[dict], n: int) -> int:
        return len(ids_of(messages[:n], True))

    def end(messages: list[dict], n: int) -> int:
        return len(ids_of(messages[: n + 1]))

    def wrong(start_at: Callable = begin, end_at: Callable = end) -> Callable:
        return lambda messages: spans(messages, start_at, end_at)

    def shifted(messages: list[dict]) -> list[int]:
        return [*spans(messages, begin, end)[1:], data.IGNORED]

    return judge_function(
        answer,
        [(one,) for one in CONVERSATIONS],
        [spans(one, begin, end) for one in CONVERSATIONS],
        mistakes=[
            Mistake(
                "the header is learned, too: the answer starts behind it, at "
                "len(ids_of(messages[:n], True)).",
                wrong(lambda messages, n: len(ids_of(messages[:n]))),
            ),
            Mistake(
                "the token that ends the answer is missing: without it generation never stops.",
                wrong(end_at=lambda messages, n: end(messages, n) - 1),
            ),
            Mistake(
                "all that follows the first answer is learned, later questions as well.",
                wrong(end_at=lambda messages, n: len(ids_of(messages))),
            ),
            Mistake(
                "labels are not shifted here: the model compares position i with label i + 1 "
                "itself.",
                shifted,
            ),
            Mistake("every token has a label: nothing is masked.", ids_of),
            Mistake(
                "no token has a label: start and end are the same place.",
                lambda messages: [data.IGNORED] * len(ids_of(messages)),
            ),
            Mistake(
                "the questions are learned, and the answers are not.",
                lambda messages: [
                    data.IGNORED if label != data.IGNORED else token
                    for token, label in zip(
                        ids_of(messages), spans(messages, begin, end), strict=True
                    )
                ],
            ),
        ],
        takeaway="the loss sees what the assistant says and where it ends, nothing else.",
    )
