"""What transformers' own Trainer logs and counts, read off real runs of the small model.

Nothing here computes what Trainer would do: it is asked. Not modelled: several processes (a rank is
run alone, on its share), evaluation, checkpoints.
"""

from __future__ import annotations

import functools
import tempfile
from types import SimpleNamespace
from typing import Any

import torch

from course_utils.data import BUNDLED
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.training import data


def trainer_log(
    recipe: TrainRecipe,
    rows: Any,
    tokenizer: Any,
    trainer_class: type | None = None,
    **overrides: Any,
) -> list[dict[str, float]]:
    """What transformers' own Trainer logs in a run of `recipe`: a dict a line.

    Args:
        recipe: Uses what `to_training_arguments` uses, and the model.
        rows: Encoded examples, as from `fitcast.training.data.encode`.
        tokenizer: Only its padding token is used.
        trainer_class: `transformers.Trainer`, or one of yours.
        overrides: Any field of TrainingArguments.
    """
    from transformers import PrinterCallback, Trainer

    with tempfile.TemporaryDirectory() as folder:
        arguments = recipe.to_training_arguments(folder, **{"save_strategy": "no"} | overrides)
        trainer = (trainer_class or Trainer)(
            qlora.load_base(recipe),
            arguments,
            train_dataset=rows,
            data_collator=functools.partial(data.collate, pad_token_id=tokenizer.pad_token_id),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


@functools.cache
def scheduled(
    examples: int,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    world_size: int,
    epochs: int,
    warmup: float,
    logging_steps: int,
) -> tuple[int, int, int]:
    """Optimizer steps, warm-up steps and lines of the log, read off real runs of Trainer.

    With several ranks the run is one rank's: its share of the examples.
    """
    from datasets import Dataset
    from torch.utils.data import DistributedSampler, TensorDataset

    every_example = TensorDataset(torch.empty(examples))
    share = len(DistributedSampler(every_example, world_size, rank=0))
    ids = list(range(8))
    rows = Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * 8, "labels": ids}] * share)
    recipe = TrainRecipe(
        model=BUNDLED,
        base="float32",
        lora_rank=None,
        optimizer="adamw",
        warmup_fraction=warmup,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    padding = SimpleNamespace(pad_token_id=0)
    each, asked = (
        trainer_log(
            recipe, rows, padding, max_steps=-1, num_train_epochs=epochs, logging_steps=every
        )
        for every in (1, logging_steps)
    )
    rates = [line["learning_rate"] for line in each]
    return len(each), rates.index(max(rates)), len(asked)
