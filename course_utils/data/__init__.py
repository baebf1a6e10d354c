"""What the course brings along: a small Llama with its tokenizer, and instructions to train on.

The bundled set (customer messages answered by a ticket, written by this project) needs no network;
databricks-dolly-15k comes from the hub.

    TrainRecipe(model=BUNDLED)
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitcast.training.data import is_heldout
from fitcast.units import Said, refusal

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

DATA = Path(__file__).parent
BUNDLED = str(DATA / "model")  # a folder, as `TrainRecipe.model` and `from_pretrained` take it
REMEDY = "run `git checkout -- course_utils/data`, or reinstall the package"
SOURCES = ("bundled", "dolly")
DOLLY = "databricks/databricks-dolly-15k"
SPLITS = ("train", "heldout")
EXAMPLES = 900  # in the bundled file: one cut off between two lines would train in silence
FIELDS = ("Customer", "Order", "Product", "Issue", "Priority", "Next step")


def named(model: str) -> str:
    """A model as a sentence names it: "bundled" for the course's own folder."""
    return "bundled" if model == BUNDLED else model


def bundled_model_dir() -> Path:
    """Folder of the bundled model and tokenizer, every file checked against its sha256.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: One is damaged.
    """
    manifest = DATA / "manifest.json"
    _require(manifest)
    try:
        digests = json.loads(manifest.read_bytes())
    except ValueError as error:
        raise refusal(
            str(manifest), "be JSON", Said(f"a damaged file ({error})"), REMEDY
        ) from error
    for name, sha256 in digests.items():
        path = DATA / name
        _require(path)
        if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != sha256:
            got = Said(f"{found[:12]}… ({path.stat().st_size} bytes): the file is damaged")
            raise refusal(str(path), f"have sha256 {sha256[:12]}…", got, REMEDY)
    return Path(BUNDLED)


def load_instructions(source: str = "bundled", split: str = "train") -> Dataset:
    """Examples of one split, columns `prompt` and `answer`.

    Args:
        source: "bundled" (in the package, offline) or "dolly" (databricks-dolly-15k, from the hub).
        split: "train" or "heldout".

    Raises:
        ValueError: No such source or split; a damaged line of the bundled file.
    """
    from datasets import Dataset, load_dataset

    for field, value, known in (("source", source, SOURCES), ("split", split, SPLITS)):
        if value not in known:
            raise refusal(field, f"be one of {', '.join(known)}", value, "choose one of them")
    if source == "bundled":
        rows = _read_examples(DATA / "instructions.jsonl")
    else:
        hub: Any = load_dataset(DOLLY, split="train")  # its rows are dicts of text
        rows = [
            {
                "prompt": f"{row['instruction']}\n\n{row['context']}".strip(),
                "answer": row["response"].strip(),
            }
            for row in hub
            if row["response"].strip()
        ]
    return Dataset.from_list(
        [row for row in rows if is_heldout(row["prompt"]) == (split == "heldout")]
    )


@functools.cache
def tokenizer() -> Any:
    """The bundled model's tokenizer, with its chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(bundled_model_dir())


def encoded(sequence_length: int) -> Dataset:
    """The bundled training examples as token ids, with labels on the answers alone.

    Args:
        sequence_length: Tokens of the longest row; longer ones are cut.
    """
    from fitcast.training.data import encode

    return encode(load_instructions(), tokenizer(), sequence_length)


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Encoded rows as one batch, each column (batch, tokens), padded on the right."""
    from fitcast.training.data import collate as pad

    return pad(rows, tokenizer().pad_token_id)


def to_batch(rows: list[dict]) -> dict[str, torch.Tensor]:
    """`collate`, on the device that the lessons train on."""
    from fitcast import gpus

    return {name: tensor.to(gpus.device()) for name, tensor in collate(rows).items()}


def parse_answer(text: str) -> dict[str, str] | None:
    """The ticket's six fields; `None` when one is missing, empty, extra or out of order."""
    pairs = [line.split(": ", 1) for line in text.strip().split("\n")]
    if any(len(pair) != 2 or not pair[1].strip() for pair in pairs):
        return None
    fields = {name: value.strip() for name, value in pairs}
    return fields if tuple(name for name, _ in pairs) == FIELDS else None


def _require(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {REMEDY}")


def _read_examples(path: Path) -> list[dict[str, str]]:
    """Examples of a JSONL file, each line checked, because one lost half line trains in silence."""
    _require(path)
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)  # bytes that are not UTF-8 raise a ValueError here, too
        except ValueError as error:
            got = Said(f"{line[:60]!r} ({error})")
            raise refusal(f"{path}, line {number}", "be one JSON object", got, REMEDY) from error
        if not (
            isinstance(row, dict)
            and set(row) == {"prompt", "answer"}
            and all(isinstance(text, str) and text.strip() for text in row.values())
        ):
            rule = "hold a prompt and an answer, both text"
            raise refusal(f"{path}, line {number}", rule, line[:60], REMEDY)
        rows.append(row)
    if len(rows) != EXAMPLES:
        raise refusal(str(path), f"hold {EXAMPLES} examples", len(rows), REMEDY)
    return rows
