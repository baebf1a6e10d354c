"""Conversations as token ids, with labels on the assistant's words only; padded or packed.

Where an answer begins and ends, the model's own chat template says. Sets are split by a hash of
what is asked, so that an example never changes sides when the set grows or its order changes.

Not modelled: streaming of large sets; a mask between the examples of a packed row, which see those
before them, as in TRL's "wrapped" strategy.
"""

from __future__ import annotations

import bisect
import hashlib
import importlib
import os
import random
from array import array
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fitcast.training.conversations import conversation, question_of
from fitcast.units import IGNORED, Said, refusal

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

HELDOUT_EVERY = 10  # one prompt in ten is held out
FEW, EVERY_OF_FEW = 200, 5  # of a small set, one in five


def is_heldout(prompt: str, every: int = HELDOUT_EVERY) -> bool:
    """Whether the prompt belongs to the held-out split: its sha256 is a multiple of ten.

    Spaces around the prompt do not count.

    Args:
        prompt: What is asked.
        every: One prompt in so many, on average.
    """
    return int(hashlib.sha256(prompt.strip().encode()).hexdigest(), 16) % every == 0


def split_heldout(conversations: Dataset) -> tuple[Dataset, Dataset]:
    """Conversations to train on, and others held out: one in ten, of a small set one in five.

    Sides are taken by a hash of all that is said before the last answer, so the same question is
    never on both, and a set that grows past 200 only moves held-out ones to training.

    Args:
        conversations: Column `messages`, as from `conversations.read`.

    Raises:
        ValueError: Fewer than 2 on a side: no interval can be formed.
    """
    every = EVERY_OF_FEW if len(conversations) <= FEW else HELDOUT_EVERY
    out = [is_heldout(question_of(one), every) for one in conversations["messages"]]
    train, heldout = (
        conversations.select([n for n, held in enumerate(out) if held is side])
        for side in (False, True)
    )
    if min(len(train), len(heldout)) < 2:
        raise refusal(
            "data",
            "leave at least 2 examples on each side of the split",
            Said(f"{len(train)} to train on, {len(heldout)} held out"),
            "give some dozens of examples with different questions",
        )
    return train, heldout


def render_prompt(prompt: str | list[dict], tokenizer: Any) -> str:
    """The prompt as the model sees it, up to the point where its answer begins.

    Args:
        prompt: What the user says, or all messages before the answer.
        tokenizer: With a chat template.

    Raises:
        ValueError: The tokenizer has no chat template.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return _render(messages, tokenizer, add_generation_prompt=True)


def _render(messages: list[dict], tokenizer: Any, **options: bool) -> str:
    TemplateError = importlib.import_module("jinja2").TemplateError  # comes with torch

    if not getattr(tokenizer, "chat_template", None):
        raise refusal(
            "tokenizer",
            "have a chat template",
            Said(f"{type(tokenizer).__name__} without one"),
            "load the tokenizer of an instruct model",
        )
    try:
        # Qwen3 would open its answers with an empty <think> block; others ignore the option.
        return tokenizer.apply_chat_template(
            messages, tokenize=False, enable_thinking=False, **options
        )
    except TemplateError as error:  # as Gemma's for a system message
        roles = ", ".join(message["role"] for message in messages)
        raise refusal(
            "messages",
            "have roles that this model's chat template takes",
            Said(f"{roles} ({error})"),
            "put what the system says into the first user message, and let user and assistant "
            "alternate",
        ) from error


def encode(
    examples: Iterable[Any], tokenizer: Any, sequence_length: int, last_answer_only: bool = False
) -> Dataset:
    """Token ids with labels on the assistant's words and the token that ends each of its turns.

    Long examples lose their tail. Those that would lose all that is labelled are dropped, because a
    row without labels makes a mean loss NaN; the counts are printed.

    Args:
        examples: Rows as `conversations.read` takes and returns them.
        tokenizer: With a chat template in which an answer ends in a special token.
        sequence_length: Tokens, at least 2.
        last_answer_only: Label the last turn only; see `conversations.one_answer_each`.

    Returns:
        Columns `input_ids`, `attention_mask`, `labels`: lists of whole numbers, unpadded.

    Raises:
        ValueError: No example keeps a labelled token; the template does not begin the whole with
            the prompt, or does not end an answer with a special token.
    """
    from datasets import Dataset

    if type(sequence_length) is not int or sequence_length < 2:
        raise refusal(
            "sequence_length",
            "be a whole number of at least 2 tokens",
            sequence_length,
            "256 suits short answers",
        )
    whole = [labelled(conversation(one), tokenizer, last_answer_only) for one in examples]
    rows = [
        {
            "input_ids": ids[:sequence_length],
            "attention_mask": [1] * len(ids[:sequence_length]),
            "labels": labels[:sequence_length],
        }
        for ids, labels in whole
        if max(labels[:sequence_length]) > IGNORED
    ]
    if not rows:
        raise refusal(
            "sequence_length",
            "leave room for an answer",
            Said(f"{sequence_length}, which every prompt fills"),
            "raise it",
        )
    _say_what_is_lost(whole, rows, sequence_length)
    return Dataset.from_list(rows)


def _say_what_is_lost(whole: list, rows: list, sequence_length: int) -> None:
    dropped = len(whole) - len(rows)
    cut = sum(len(ids) > sequence_length for ids, _ in whole) - dropped
    for count, why in (
        (dropped, f"dropped {{}}, whose prompt alone fills {sequence_length} tokens"),
        (cut, f"cut {{}}, longer than {sequence_length} tokens: they do not learn to stop"),
    ):
        if count:
            print(f"encode: {why.format(f'{count} of {len(whole)} examples')}")


def labelled(
    messages: list[dict], tokenizer: Any, last_answer_only: bool = False
) -> tuple[list[int], list[int]]:
    """A conversation's token ids, and its labels: -100 but for what the assistant says.

    A turn's answer begins where the rendered history, with the header of an answer, ends; it ends
    with the last special token that stands in the whole and in what is rendered up to this turn.

    Args:
        messages: Roles and contents, as from `conversations.conversation`.
        tokenizer: With a chat template.
        last_answer_only: Label the last turn only.

    Returns:
        Two lists of as many whole numbers.

    Raises:
        ValueError: The template renders a history otherwise once more follows it, or does not end
            an answer with a special token.
    """
    whole = _ids(messages, tokenizer)
    labels = [IGNORED] * len(whole)
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    for n in turns[-1:] if last_answer_only else turns:
        prompt = _ids(messages[:n], tokenizer, add_generation_prompt=True)
        if whole[: len(prompt)] != prompt:
            _refuse_template(messages, n, turns)
        said = whole if n == turns[-1] else _ids(messages[: n + 1], tokenizer)
        end = _end_of_answer(whole, said, len(prompt), tokenizer)
        labels[len(prompt) : end] = whole[len(prompt) : end]
    return whole, labels


def _ids(messages: list[dict], tokenizer: Any, **options: bool) -> list[int]:
    text = _render(messages, tokenizer, **options)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)  # `encode` says what it cuts
    return ids["input_ids"]


def _end_of_answer(whole: list[int], said: list[int], start: int, tokenizer: Any) -> int:
    """Where an answer ends: some templates add a line break there, which is not worth learning."""
    special = set(tokenizer.all_special_ids)
    end = len(os.path.commonprefix([whole, said]))
    while end > start and whole[end - 1] not in special:
        end -= 1
    if end <= start:
        raise refusal(
            "chat template",
            "end an answer with a special token",
            tokenizer.decode(said[-4:]),
            "without one generation never stops",
        )
    return end


def _refuse_template(messages: list[dict], turn: int, turns: list[int]) -> None:
    before = messages[turn - 1]["content"][:40] if turn else ""
    if turn != turns[-1]:
        raise refusal(
            "chat template",
            "render the history as the beginning of the whole conversation",
            Said(f"other tokens for what follows {before!r}"),
            "split the set with conversations.one_answer_each, and encode it with "
            "last_answer_only=True",
        )
    raise refusal(
        "chat template",
        "render the prompt as the beginning of the whole conversation",
        Said(f"other tokens for {before!r}"),
        "use a template whose generation prompt equals its assistant header",
    )


def pack(rows: Iterable[Any], sequence_length: int, pad_token_id: int) -> Dataset:
    """Whole examples side by side, in rows of equal length: no mask, hardly any padding.

    Best fit, longest first; what is left of a row is filled with `pad_token_id` on its right, where
    nothing that is learned can see it. An example does see those before it in its row.

    Args:
        rows: As from `encode`, none longer than `sequence_length`.
        sequence_length: Tokens of each row.
        pad_token_id: Any token.

    Returns:
        Columns `input_ids` and `labels`, lists of `sequence_length` whole numbers.
    """
    from datasets import Dataset

    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    packed: list[dict[str, list[int]]] = []
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        length = len(row["input_ids"])
        at = bisect.bisect_left(room, (length, -1))
        left, n = room.pop(at) if at < len(room) else (sequence_length, len(packed))
        if n == len(packed):
            packed.append({"input_ids": [], "labels": []})
        packed[n]["input_ids"] += row["input_ids"]
        packed[n]["labels"] += [IGNORED, *row["labels"][1:]]  # no example predicts the next one
        bisect.insort(room, (left - length, n))
    for left, n in room:
        packed[n]["input_ids"] += [pad_token_id] * left
        packed[n]["labels"] += [IGNORED] * left
    return Dataset.from_list(packed)


def collate(features: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows padded on the right to the longest: int64 tensors of shape (batch, tokens).

    Padding carries attention 0 and label -100, so it is neither read nor learned. Rows without a
    mask, as from `pack`, stay without one.

    Args:
        features: Rows with `input_ids`, `labels` and maybe `attention_mask`, as from `encode`.
        pad_token_id: What fills `input_ids`; any token does.

    Returns:
        The rows' columns, each of shape (batch, tokens).
    """
    import torch

    length = max(len(row["input_ids"]) for row in features)
    padding = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORED}
    return {
        name: torch.tensor(
            [list(row[name]) + [value] * (length - len(row[name])) for row in features]
        )
        for name, value in padding.items()
        if name in features[0]
    }


@dataclass(frozen=True)
class RowSummary:
    """What a run needs to know about its rows.

    Attributes:
        shortest, longest: Tokens of a row.
        sha256: Of all token ids and labels, in order: other rows, other numbers.
    """

    shortest: int
    longest: int
    sha256: str


def summarize(rows: Any) -> RowSummary | None:
    """Lengths and checksum of encoded rows; `None` for a stream, which can be read only once.

    Reads every row: about 0.1 ms for one of 512 tokens.

    Args:
        rows: Mappings with `input_ids` and maybe `labels`, as from `encode`.
    """
    if not isinstance(rows, Sized) or not len(rows) or not isinstance(rows, Iterable):
        return None
    lengths, digest = [], hashlib.sha256()
    for row in rows:
        lengths.append(len(row["input_ids"]))
        for numbers in (row["input_ids"], row.get("labels", ())):
            digest.update(array("q", numbers).tobytes() + b"\n")
    return RowSummary(min(lengths), max(lengths), digest.hexdigest())


def shuffled_answers(dataset: Dataset, seed: int) -> Dataset:
    """The control: every question gets another one's answer (a cyclic permutation, Sattolo).

    Args:
        dataset: Columns `prompt` and `answer`; or `messages`, whose last answers change places.
        seed: Of the permutation.

    Raises:
        ValueError: Fewer than 2 examples.
    """
    if len(dataset) < 2:
        raise refusal(
            "dataset",
            "hold at least 2 examples",
            len(dataset),
            "one answer has nowhere else to go",
        )
    if "messages" in dataset.column_names:
        said = list(dataset["messages"])
        answers = _cycle([messages[-1]["content"] for messages in said], seed)
        mixed = [
            [*messages[:-1], {"role": "assistant", "content": answer}]
            for messages, answer in zip(said, answers, strict=True)
        ]
        return type(dataset).from_list([{"messages": messages} for messages in mixed])
    answers = _cycle(list(dataset["answer"]), seed)
    return dataset.remove_columns("answer").add_column("answer", answers)


def _cycle(answers: list[str], seed: int) -> list[str]:
    rng = random.Random(seed)
    for last in range(len(answers) - 1, 0, -1):
        other = rng.randrange(last)  # below `last`: nothing stays where it was
        answers[last], answers[other] = answers[other], answers[last]
    return answers
