"""Which checkpoint a run continues: the last whole one of the same recipe, or none.

Not modelled: going on with another recipe than the one that was saved.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from fitcast.recipe import TrainRecipe
from fitcast.training import checkpoints


def checkpoint_to_resume(
    recipe: TrainRecipe, output_dir: Path, drive: Path | None, resume: bool | str | Path
) -> Path | None:
    """The whole checkpoint that a run continues, or `None` for one that starts.

    Args:
        recipe: Of the run; it has to be the checkpoint's own.
        output_dir, drive: Where checkpoints are looked for.
        resume: As for `training.train`.

    Raises:
        ValueError: It is not this recipe's, not the last one, or not asked for.
        FileNotFoundError: `resume` names a checkpoint that is not whole.
    """
    checkpoint = (
        checkpoints.find_last(output_dir, drive) if isinstance(resume, bool) else Path(resume)
    )
    if checkpoint is None:
        return None
    if resume is False:
        raise ValueError(
            f"output_dir must hold no checkpoint when resume is False, got "
            f"{checkpoint}; choose another folder or delete that one"
        )
    saved = checkpoints.verify(checkpoint).get("recipe")
    last = None if resume is True else checkpoints.find_last(output_dir, drive, say=lambda _: None)
    if last and checkpoints.step_of(last) > checkpoints.step_of(checkpoint):
        raise ValueError(
            f"resume must not go back behind {last}, got {checkpoint}; move the later "
            "ones away, or train in another output_dir"
        )
    if saved is None:
        raise ValueError(
            f"resume must be a checkpoint that train wrote, got {checkpoint} without "
            "a recipe; name another one"
        )
    wanted = json.loads(json.dumps(dataclasses.asdict(recipe)))
    for field, value in wanted.items():
        if saved.get(field) != value:
            raise ValueError(
                f"{field} must be {saved.get(field)!r} to resume {checkpoint}, got "
                f"{value!r}; use that recipe, or another output_dir"
            )
    print(f"Resuming from {checkpoint.name}.")
    return checkpoint
