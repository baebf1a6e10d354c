"""Instruction data: a prompt, an answer, and labels on the answer only.

Sets are split by a hash of the prompt, so that an example never changes sides when the set grows or
its order changes.

Not modelled: several turns, packing of short examples into one row, streaming of large sets.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fitcast.units import IGNORED, Said, refusal

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

HELDOUT_EVERY = 10  # one prompt in ten is held out


def is_heldout(prompt: str) -> bool:
    """Whether the prompt belongs to the held-out split: its sha256 is a multiple of ten.

    Spaces around the prompt do not count.
    """
    return int(hashlib.sha256(prompt.strip().encode()).hexdigest(), 16) % HELDOUT_EVERY == 0


def render_prompt(prompt: str, tokenizer: Any) -> str:
    """The prompt as the model sees it, up to the point where its answer begins.

    Args:
        prompt: What the user says.
        tokenizer: With a chat template.

    Raises:
        ValueError: The tokenizer has no chat template.
    """
    return _render([{"role": "user", "content": prompt}], tokenizer, add_generation_prompt=True)


def _render(messages: list[dict], tokenizer: Any, **options: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise refusal(
            "tokenizer",
            "have a chat template",
            Said(f"{type(tokenizer).__name__} without one"),
            "load the tokenizer of an instruct model",
        )
    # Qwen3 would open its answers with an empty <think> block; others ignore the option.
    return tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False, **options)


def encode(examples: Dataset, tokenizer: Any, sequence_length: int) -> Dataset:
    """Token ids with labels on the answer and its end token only, at most `sequence_length` each.

    Long examples lose their tail. Those that would lose the whole answer are dropped, because a
    row without labels makes a mean loss NaN; the count is printed.

    Args:
        examples: Columns `prompt` and `answer`.
        tokenizer: With a chat template in which an answer ends in a special token.
        sequence_length: Tokens, at least 2.

    Returns:
        Columns `input_ids`, `attention_mask`, `labels`: lists of whole numbers, unpadded.

    Raises:
        ValueError: No example keeps an answer token; the template does not begin the whole with the
            prompt, or does not end an answer with a special token.
    """
    from datasets import Dataset

    if type(sequence_length) is not int or sequence_length < 2:
        raise refusal(
            "sequence_length",
            "be a whole number of at least 2 tokens",
            sequence_length,
            "256 suits short answers",
        )
    rows = []
    for example in examples:
        prompt, answer = _encode_one(example, tokenizer)
        if len(prompt) < sequence_length:
            ids = (prompt + answer)[:sequence_length]
            labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    if not rows:
        raise refusal(
            "sequence_length",
            "leave room for an answer",
            Said(f"{sequence_length}, which every prompt fills"),
            "raise it",
        )
    if dropped := len(examples) - len(rows):
        print(
            f"encode: dropped {dropped} of {len(examples)} examples, whose prompt alone fills "
            f"{sequence_length} tokens"
        )
    return Dataset.from_list(rows)


def _encode_one(example: Any, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of the answer up to the special token that ends it."""
    messages = [
        {"role": "user", "content": example["prompt"]},
        {"role": "assistant", "content": example["answer"]},
    ]
    prompt, whole = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (render_prompt(example["prompt"], tokenizer), _render(messages, tokenizer))
    )
    if whole[: len(prompt)] != prompt:
        raise refusal(
            "chat template",
            "render the prompt as the beginning of the whole conversation",
            Said(f"other tokens for {example['prompt'][:40]!r}"),
            "use a template whose generation prompt equals its assistant header",
        )
    special = set(tokenizer.all_special_ids)
    end = len(whole)  # some templates add a line break after the end token: not worth learning
    while end > len(prompt) and whole[end - 1] not in special:
        end -= 1
    if end == len(prompt):
        raise refusal(
            "chat template",
            "end an answer with a special token",
            tokenizer.decode(whole[-4:]),
            "without one generation never stops",
        )
    return prompt, whole[len(prompt) : end]


def collate(features: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows padded on the right to the longest: int64 tensors of shape (batch, tokens).

    Padding carries attention 0 and label -100, so it is neither read nor learned.

    Args:
        features: Rows with `input_ids`, `attention_mask` and `labels`, as from `encode`.
        pad_token_id: What fills `input_ids`; any token does.

    Returns:
        The three columns, each of shape (batch, tokens).
    """
    import torch

    length = max(len(row["input_ids"]) for row in features)
    padding = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORED}
    return {
        name: torch.tensor(
            [list(row[name]) + [value] * (length - len(row[name])) for row in features]
        )
        for name, value in padding.items()
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
    """The control: every prompt gets another prompt's answer (a cyclic permutation, Sattolo).

    Args:
        dataset: Columns `prompt` and `answer`.
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
    answers, rng = list(dataset["answer"]), random.Random(seed)
    for last in range(len(answers) - 1, 0, -1):
        other = rng.randrange(last)  # below `last`: nothing stays where it was
        answers[last], answers[other] = answers[other], answers[last]
    return dataset.remove_columns("answer").add_column("answer", answers)
