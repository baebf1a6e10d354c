"""Instruction data: a prompt, an answer, and labels on the answer only.

Sets are split by a hash of the prompt, so that an example never changes sides when the set grows or
its order changes.

Not modelled: several turns, packing of short examples into one row, streaming of large sets.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING, Any

from fitcast.units import IGNORED

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

HELDOUT_EVERY = 10  # one prompt in ten is held out


def is_heldout(prompt: str) -> bool:
    """Whether the prompt belongs to the held-out split: its sha256 is a multiple of ten."""
    return int(hashlib.sha256(prompt.strip().encode()).hexdigest(), 16) % HELDOUT_EVERY == 0


def render_prompt(prompt: str, tokenizer: Any) -> str:
    """The prompt as the model sees it, up to the point where its answer begins."""
    return _render([{"role": "user", "content": prompt}], tokenizer, add_generation_prompt=True)


def _render(messages: list[dict], tokenizer: Any, **options: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"tokenizer must have a chat template, got {type(tokenizer).__name__} "
            f"without one; load the tokenizer of an instruct model"
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

    Returns columns `input_ids`, `attention_mask`, `labels`, unpadded. Raises ValueError when no
    example keeps an answer token, or the template does not begin the whole with the prompt.
    """
    from datasets import Dataset

    if type(sequence_length) is not int or sequence_length < 2:
        raise ValueError(
            f"sequence_length must be a whole number of at least 2 tokens, got "
            f"{sequence_length!r}; 256 suits short answers"
        )
    rows = []
    for example in examples:
        prompt, answer = _encode_one(example, tokenizer)
        if len(prompt) < sequence_length:
            ids = (prompt + answer)[:sequence_length]
            rows.append(
                {
                    "input_ids": ids,
                    "attention_mask": [1] * len(ids),
                    "labels": [IGNORED] * len(prompt) + ids[len(prompt) :],
                }
            )
    if not rows:
        raise ValueError(
            f"sequence_length must leave room for an answer, got {sequence_length}, "
            f"which every prompt fills; raise it"
        )
    if dropped := len(examples) - len(rows):
        print(
            f"encode: dropped {dropped} of {len(examples)} examples, whose prompt alone fills "
            f"{sequence_length} tokens"
        )
    return Dataset.from_list(rows)


def _encode_one(example: dict[str, str], tokenizer: Any) -> tuple[list[int], list[int]]:
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
        raise ValueError(
            "chat template must render the prompt as the beginning of the whole "
            f"conversation, got other tokens for {example['prompt'][:40]!r}; use a "
            "template whose generation prompt equals its assistant header"
        )
    special = set(tokenizer.all_special_ids)
    end = len(whole)  # some templates add a line break after the end token: not worth learning
    while end > len(prompt) and whole[end - 1] not in special:
        end -= 1
    if end == len(prompt):
        raise ValueError(
            "chat template must end an answer with a special token, got "
            f"{tokenizer.decode(whole[-4:])!r}; without one generation never stops"
        )
    return prompt, whole[len(prompt) : end]


def collate(features: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows padded on the right to the longest: int64 tensors of shape (batch, tokens).

    Padding carries attention 0 and label -100, so it is neither read nor learned.
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


def shuffled_answers(dataset: Dataset, seed: int) -> Dataset:
    """The control: every prompt gets another prompt's answer (a cyclic permutation, Sattolo)."""
    if len(dataset) < 2:
        raise ValueError(
            f"dataset must hold at least 2 examples, got {len(dataset)}; one answer "
            f"has nowhere else to go"
        )
    answers, rng = list(dataset["answer"]), random.Random(seed)
    for last in range(len(answers) - 1, 0, -1):
        other = rng.randrange(last)  # below `last`: nothing stays where it was
        answers[last], answers[other] = answers[other], answers[last]
    return dataset.remove_columns("answer").add_column("answer", answers)
