"""Models and data for tests: small enough to train in a second, or only a config on disk."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from fitcast.recipe import TrainRecipe

TOKENIZER = SimpleNamespace(pad_token_id=0)


def _rows(count: int = 50) -> Dataset:
    """Random tokens, lengths 8 to 23, the first four without labels."""
    random = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(count):
        length = int(torch.randint(8, 24, (1,), generator=random))
        ids = torch.randint(1, 128, (length,), generator=random).tolist()
        rows.append(
            {"input_ids": ids, "attention_mask": [1] * length, "labels": [-100] * 4 + ids[4:]}
        )
    return Dataset.from_list(rows)


ROWS = _rows()


def tiny_recipe(folder: Path, **changes) -> TrainRecipe:
    """A recipe of 12 steps, saved every 4, over a random two-layer Llama that it writes first.

    12 steps of 8 rows are almost two epochs of 50 rows, so that a resumed run crosses one's end.
    """
    if not folder.exists():
        torch.manual_seed(0)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=True,
                max_position_embeddings=128,
                pad_token_id=0,
            )
        ).save_pretrained(folder)
    return TrainRecipe(
        **dict(
            model=str(folder),
            micro_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=12,
            save_steps=4,
            sequence_length=64,
            learning_rate=1e-2,
            warmup_fraction=0.25,
            optimizer="adamw",
        )
        | changes
    )


SHAPE = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def write_config(folder: Path, **changes) -> None:
    """A config.json of a small Llama, for a forecast; no weights."""
    (folder / "config.json").write_text(json.dumps(SHAPE | changes))
