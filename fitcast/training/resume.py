"""Which checkpoint a run continues: the last whole one of the same run, or none.

The same run has the same rows, every field of the recipe that changes what is learned, and those of
TrainingArguments that do so beside it (`DECIDING`). Fields of the recipe that change only memory,
disk or what is printed (`FREE_TO_CHANGE`) may be others: whoever ran out of memory goes on with
more layers checkpointed.

Not modelled: going on with another recipe than the one that was saved.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitcast.recipe import TrainRecipe
from fitcast.training import checkpoints
from fitcast.units import Said, refusal

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Fields of a recipe that change no number of a run. sequence_length and padded say what the rows
# are like, and the rows themselves are compared.
FREE_TO_CHANGE = frozenset(
    {
        "sequence_length",
        "padded",
        "checkpointed_layers",
        "offload_checkpoints",
        "keep_attention",
        "causal_padding",
        "expandable_segments",
        "logging_steps",
        "save_steps",
    }
)

# Fields of TrainingArguments beyond the recipe's that change what is learned: the rate of each
# step, noise, which rows come when. Most others change files and words, so these are listed.
DECIDING = (
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "neftune_noise_alpha",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "ignore_data_skip",
    "accelerator_config",
)


def deciding(arguments: TrainingArguments) -> dict[str, Any]:
    """What a run's arguments have in `DECIDING`, as JSON: an override that is the default is none.

    Args:
        arguments: Of the run; names that this version of transformers lacks are left out.
    """
    values = arguments.to_dict()
    return _as_json({name: values[name] for name in DECIDING if name in values})


def checkpoint_to_resume(
    recipe: TrainRecipe,
    output_dir: Path,
    drive: Path | None,
    resume: bool | str | Path,
    rows_sha256: str | None = None,
    arguments: dict[str, Any] | None = None,
) -> Path | None:
    """The whole checkpoint that a run continues, or `None` for one that starts.

    Args:
        recipe: Of the run; it has to be the checkpoint's own, but for `FREE_TO_CHANGE`.
        output_dir, drive: Where checkpoints are looked for.
        resume: As for `training.train`.
        rows_sha256: Of the run's rows, as `data.summarize` says; `None` where nobody can.
        arguments: Of the run, as from `deciding`; `None` compares none.

    Raises:
        ValueError: It is not this run's, not the last one, or not asked for.
        FileNotFoundError: `resume` names a checkpoint that is not whole.
    """
    checkpoint = (
        checkpoints.find_last(output_dir, drive) if isinstance(resume, bool) else Path(resume)
    )
    if checkpoint is None:
        return None
    if resume is False:
        raise refusal(
            "output_dir",
            "hold no checkpoint when resume is False",
            Said(checkpoint),
            "choose another folder or delete that one",
        )
    saved = checkpoints.verify(checkpoint)
    if resume is not True:
        _refuse_going_back(checkpoint, output_dir, drive)
    _refuse_another_run(checkpoint, saved, recipe, rows_sha256)
    _refuse_other_arguments(checkpoint, saved.get("arguments", {}), arguments or {})
    print(f"Resuming from {checkpoint.name}.")
    return checkpoint


def _refuse_going_back(checkpoint: Path, output_dir: Path, drive: Path | None) -> None:
    last = checkpoints.find_last(output_dir, drive, say=lambda _: None)
    if last and checkpoints.step_of(last) > checkpoints.step_of(checkpoint):
        raise refusal(
            "resume",
            f"not go back behind {last}",
            Said(checkpoint),
            "move the later ones away, or train in another output_dir",
        )


def _refuse_another_run(
    checkpoint: Path, saved: dict[str, Any], recipe: TrainRecipe, rows_sha256: str | None
) -> None:
    if saved.get("recipe") is None:
        raise refusal(
            "resume",
            "be a checkpoint that train wrote",
            Said(f"{checkpoint} without a recipe"),
            "name another one",
        )
    wanted = _as_json(dataclasses.asdict(recipe))
    free = set(FREE_TO_CHANGE)
    if _sequences(wanted) == _sequences(saved["recipe"]):
        free |= {"world_size", "gradient_accumulation_steps"}  # more ranks, fewer micro batches
    for field, value in wanted.items():
        before = saved["recipe"].get(field)
        if before != value and field not in free:
            raise refusal(
                field,
                f"be {before!r} to resume {checkpoint}",
                value,
                "use that recipe, or another output_dir (and folder on the Drive)",
            )
    if rows_sha256 and saved.get("rows_sha256", rows_sha256) != rows_sha256:
        raise refusal(
            "rows",
            f"be those of {checkpoint} to resume it",
            Said("others"),
            "encode the same examples with the same sequence_length, or use another output_dir "
            "(and folder on the Drive)",
        )


def _refuse_other_arguments(
    checkpoint: Path, saved: dict[str, Any], arguments: dict[str, Any]
) -> None:
    """Only what both know is compared: older checkpoints and versions lack some, or all."""
    for name, value in arguments.items():
        if saved.get(name, value) != value:
            raise refusal(
                name,
                f"be {saved[name]!r} to resume {checkpoint}",
                value,
                "give train that override, or use another output_dir (and folder on the Drive)",
            )


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    """As a manifest gives them back: tuples are lists, for example."""
    return json.loads(json.dumps(values))


def _sequences(recipe: dict[str, Any]) -> int:
    """Micro batches of one optimizer step, over all ranks."""
    return recipe["world_size"] * recipe["gradient_accumulation_steps"]
