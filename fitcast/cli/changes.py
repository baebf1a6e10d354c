"""What a search changed, as lines that its reader can paste: our names, then Hugging Face's.

`fit` changes no result: batch, kernels, loss, what is kept where. What a stock trainer has an
argument for is shown as that; the rest is one call of `fitcast.apply_levers`.
"""

from __future__ import annotations

from fitcast.recipe import TrainRecipe

# Fields of a recipe under the names of TrainingArguments and SFTConfig.
ARGUMENTS = {
    "micro_batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
}
# Fields that `apply_levers` takes under these names, beside those that it pulls by itself.
BY_NAME = ("mlp_tile_tokens", "embedding", "causal_padding")
CHECKPOINTS = ("checkpointed_layers", "offload_checkpoints", "keep_attention")


def changed(before: TrainRecipe, after: TrainRecipe) -> dict[str, tuple[object, object]]:
    """Field -> its value before and after, of those that differ."""
    fields = ((name, getattr(before, name), getattr(after, name)) for name in vars(after))
    return {name: (old, new) for name, old, new in fields if old != new}


def in_our_names(before: TrainRecipe, after: TrainRecipe) -> list[str]:
    """A line a change: what it was and what it is."""
    return [f"{name}: {old} -> {new}" for name, (old, new) in changed(before, after).items()]


def in_a_script(before: TrainRecipe, after: TrainRecipe) -> list[str]:
    """The same for a script with a stock trainer: arguments as a diff, and the levers' line."""
    differs = changed(before, after)
    lines = []
    for field, argument in ARGUMENTS.items():
        if field in differs:
            old, new = differs[field]
            lines += [f"- {argument}={old},", f"+ {argument}={new},"]
    if "checkpointed_layers" in differs and after.checkpointed_layers == 0:
        lines += ["- gradient_checkpointing=True,", "+ gradient_checkpointing=False,"]
    if "expandable_segments" in differs:
        value = after.expandable_segments
        lines.append(f'+ os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:{value}"')
    if levers := _levers(after):
        lines.append(f"+ fitcast.apply_levers(trainer.model, {levers})")
    return lines


def _levers(recipe: TrainRecipe) -> str:
    """Arguments of `apply_levers` that make a stock model this recipe's; none for a stock one."""
    from fitcast.step.apply import PULLED  # with torch, which a search has brought by now

    plain = TrainRecipe(model=recipe.model)
    differs = {
        name
        for name in (*PULLED, *BY_NAME, *CHECKPOINTS)
        if getattr(recipe, name) != getattr(plain, name)
    }
    if recipe.checkpointed_layers == 0:  # the trainer's own switch says that
        differs -= set(CHECKPOINTS)
    if not differs:
        return ""
    checkpoints = [name for name in CHECKPOINTS if differs & set(CHECKPOINTS)]
    said = [name for name in checkpoints if name in differs or name == "checkpointed_layers"]
    named = [name for name in BY_NAME if name in differs]
    names = (*PULLED, *named, *said)
    return ", ".join(f"{name}={getattr(recipe, name)!r}" for name in names)
