"""Instruction data: a prompt, an answer, and labels on the answer only.

The bundled set (customer messages answered by a ticket, written by this project) needs no network;
databricks-dolly-15k comes from the hub. Both are split by a hash of the prompt, so that an example
never changes sides when the set grows or its order changes.

Not modelled: several turns, packing of short examples into one row, streaming of large sets.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .units import IGNORED

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

DATA = Path(__file__).parent / "data"
REMEDY = "run `git checkout -- course_utils/data`, or reinstall the package"
SOURCES = ("bundled", "dolly")
DOLLY = "databricks/databricks-dolly-15k"
SPLITS = ("train", "heldout")
EXAMPLES = 900  # in the bundled file: one cut off between two lines would train in silence
HELDOUT_EVERY = 10  # one prompt in ten is held out
FIELDS = ("Customer", "Order", "Product", "Issue", "Priority", "Next step")


def bundled_model_dir() -> Path:
    """Folder of the bundled model and tokenizer, every file checked against its sha256.

    Raises FileNotFoundError for a missing file, ValueError for a damaged one.
    """
    manifest = DATA / "manifest.json"
    _require(manifest)
    try:
        digests = json.loads(manifest.read_bytes())
    except ValueError as error:
        raise ValueError(f"{manifest} must be JSON ({error}): it is damaged; {REMEDY}") from error
    for name, sha256 in digests.items():
        path = DATA / name
        _require(path)
        if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != sha256:
            raise ValueError(f"{path} must have sha256 {sha256[:12]}…, got {found[:12]}… "
                             f"({path.stat().st_size} bytes): the file is damaged; {REMEDY}")
    return DATA / "model"


def _require(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {REMEDY}")


def is_heldout(prompt: str) -> bool:
    """Whether the prompt belongs to the held-out split: its sha256 is a multiple of ten."""
    return int(hashlib.sha256(prompt.strip().encode()).hexdigest(), 16) % HELDOUT_EVERY == 0


def load_instructions(source: str = "bundled", split: str = "train") -> Dataset:
    """Examples of one split, columns `prompt` and `answer`.

    Args:
        source: "bundled" (in the package, offline) or "dolly" (databricks-dolly-15k, from the hub).
        split: "train" or "heldout".

    Raises ValueError for an unknown source or split and for a damaged line of the bundled file.
    """
    from datasets import Dataset, load_dataset

    for field, value, known in (("source", source, SOURCES), ("split", split, SPLITS)):
        if value not in known:
            raise ValueError(f"{field} must be one of {', '.join(known)}, got {value!r}; "
                             "choose one of them")
    if source == "bundled":
        rows = _read_examples(DATA / "instructions.jsonl")
    else:
        hub = load_dataset(DOLLY, split="train")
        rows = [{"prompt": f"{row['instruction']}\n\n{row['context']}".strip(),
                 "answer": row["response"].strip()} for row in hub if row["response"].strip()]
    return Dataset.from_list([row for row in rows
                              if is_heldout(row["prompt"]) == (split == "heldout")])


def _read_examples(path: Path) -> list[dict[str, str]]:
    """Examples of a JSONL file, each line checked, because one lost half line trains in silence."""
    _require(path)
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)  # bytes that are not UTF-8 raise a ValueError here, too
        except ValueError as error:
            raise ValueError(f"{path}, line {number} must be one JSON object, got {line[:60]!r} "
                             f"({error}); {REMEDY}") from error
        if not (isinstance(row, dict) and set(row) == {"prompt", "answer"}
                and all(isinstance(text, str) and text.strip() for text in row.values())):
            raise ValueError(f"{path}, line {number} must hold a prompt and an answer, both "
                             f"text, got {line[:60]!r}; {REMEDY}")
        rows.append(row)
    if len(rows) != EXAMPLES:
        raise ValueError(f"{path} must hold {EXAMPLES} examples, got {len(rows)}; {REMEDY}")
    return rows


def render_prompt(prompt: str, tokenizer: Any) -> str:
    """The prompt as the model sees it, up to the point where its answer begins."""
    return _render([{"role": "user", "content": prompt}], tokenizer, add_generation_prompt=True)


def _render(messages: list[dict], tokenizer: Any, **options: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"tokenizer must have a chat template, got {type(tokenizer).__name__} "
                         f"without one; load the tokenizer of an instruct model")
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
        raise ValueError(f"sequence_length must be a whole number of at least 2 tokens, got "
                         f"{sequence_length!r}; 256 suits the bundled set")
    rows = []
    for example in examples:
        prompt, answer = _encode_one(example, tokenizer)
        if len(prompt) < sequence_length:
            ids = (prompt + answer)[:sequence_length]
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids),
                         "labels": [IGNORED] * len(prompt) + ids[len(prompt):]})
    if not rows:
        raise ValueError(f"sequence_length must leave room for an answer, got {sequence_length}, "
                         f"which every prompt fills; raise it")
    if dropped := len(examples) - len(rows):
        print(f"encode: dropped {dropped} of {len(examples)} examples, whose prompt alone fills "
              f"{sequence_length} tokens")
    return Dataset.from_list(rows)


def _encode_one(example: dict[str, str], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of the answer up to the special token that ends it."""
    messages = [{"role": "user", "content": example["prompt"]},
                {"role": "assistant", "content": example["answer"]}]
    prompt, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (
        render_prompt(example["prompt"], tokenizer), _render(messages, tokenizer)))
    if whole[:len(prompt)] != prompt:
        raise ValueError("chat template must render the prompt as the beginning of the whole "
                         f"conversation, got other tokens for {example['prompt'][:40]!r}; use a "
                         "template whose generation prompt equals its assistant header")
    special = set(tokenizer.all_special_ids)
    end = len(whole)  # some templates add a line break after the end token: not worth learning
    while end > len(prompt) and whole[end - 1] not in special:
        end -= 1
    if end == len(prompt):
        raise ValueError("chat template must end an answer with a special token, got "
                         f"{tokenizer.decode(whole[-4:])!r}; without one generation never stops")
    return prompt, whole[len(prompt):end]


def collate(features: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows padded on the right to the longest: int64 tensors of shape (batch, tokens).

    Padding carries attention 0 and label -100, so it is neither read nor learned.
    """
    import torch

    length = max(len(row["input_ids"]) for row in features)
    padding = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORED}
    return {name: torch.tensor([list(row[name]) + [value] * (length - len(row[name]))
                                for row in features]) for name, value in padding.items()}


def shuffled_answers(dataset: Dataset, seed: int) -> Dataset:
    """The control: every prompt gets another prompt's answer (a cyclic permutation, Sattolo)."""
    if len(dataset) < 2:
        raise ValueError(f"dataset must hold at least 2 examples, got {len(dataset)}; one answer "
                         f"has nowhere else to go")
    answers, rng = list(dataset["answer"]), random.Random(seed)
    for last in range(len(answers) - 1, 0, -1):
        other = rng.randrange(last)  # below `last`: nothing stays where it was
        answers[last], answers[other] = answers[other], answers[last]
    return dataset.remove_columns("answer").add_column("answer", answers)


def parse_answer(text: str) -> dict[str, str] | None:
    """The ticket's six fields, or None when a field is missing, empty, extra or out of order."""
    pairs = [line.split(": ", 1) for line in text.strip().split("\n")]
    if any(len(pair) != 2 or not pair[1].strip() for pair in pairs):
        return None
    fields = {name: value.strip() for name, value in pairs}
    return fields if tuple(name for name, _ in pairs) == FIELDS else None
