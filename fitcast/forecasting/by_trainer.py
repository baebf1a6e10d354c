"""A recipe as the objects of a script, and its forecast where only a stock trainer can run it.

`qlora`, the step of a recipe, knows dense decoders built like Llama. Mixtures of experts, models
with a vision tower, families without SDPA and checkpoints that are stored in few bits go through
transformers' Trainer, with the recipe's levers on its model.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from typing import TYPE_CHECKING, Any

from fitcast.forecasting import base, layers
from fitcast.gpus import Gpu
from fitcast.recipe import TRAINER_OPTIM, TrainRecipe
from fitcast.step import qlora
from fitcast.step.apply import PULLED
from fitcast.step.targets import PROJECTIONS, attention_targets

if TYPE_CHECKING:
    from fitcast.forecasting.files.script import Script
    from fitcast.forecasting.verdict import Forecast

PLAIN = ("llama", "mistral", "qwen2", "qwen3")  # families whose projections a recipe names
STOCK = ("stock", "full", "eager")


def forecast_by_trainer(recipe: TrainRecipe, gpu: Gpu, why: str, images: int = 0) -> Forecast:
    """The recipe's step as transformers' Trainer takes it.

    Args:
        recipe: Of a model that its own step does not run.
        gpu: The card.
        why: Said in the forecast's notes.
        images: In each row, for a model with a vision tower.

    Raises:
        ValueError: Trainer cannot either, or the model cannot take a lever of the recipe, or sees
            no images.
    """
    from fitcast.forecasting.huggingface import forecast_run
    from fitcast.forecasting.lean_trainer import with_levers

    script = script_of(recipe)
    config = base.read_config(recipe.model)
    notes = [f"forecast as a stock Trainer runs it: {why}", *script.notes]
    if base.quantization_of(config, None) is not None:
        notes.append(f"base is not {recipe.base} but as the checkpoint is stored")
        script.quantization = None
    if script.lora and recipe.lora_targets == PROJECTIONS:
        script.lora |= {"target_modules": list(family_targets(recipe.model))}
    arguments = script.training_arguments(gpu)
    options = with_levers(arguments, script.options() | levers_of(recipe))
    options |= {"expandable_segments": recipe.expandable_segments, "images": images}
    seen = forecast_run(script.model, arguments, gpu=gpu, **options)
    return dataclasses.replace(seen, notes=(*notes, *seen.notes))


def levers_of(recipe: TrainRecipe) -> dict[str, Any]:
    """Those of a recipe that `apply_levers` knows, as an option of `forecast`."""
    named = {name: getattr(recipe, name) for name in PULLED}
    named = {name: value for name, value in named.items() if value not in STOCK}
    left = dict.fromkeys((name for name in PULLED if name not in named), "stock")
    left |= {"loss": "full"} if "loss" in left else {}
    return {"levers": left | named} if named else {}


def family_targets(model: str) -> tuple[str, ...]:
    """The linear layers of attention, by the names that the model's family has for them.

    Args:
        model: As `TrainRecipe.model`.
    """
    config = base.read_config(model)
    if config.model_type in PLAIN:
        return PROJECTIONS
    small = copy.deepcopy(config)
    for part in (small, base.text_config(small)):
        part.num_hidden_layers = min(getattr(part, "num_hidden_layers", 4), 4)
        if types := getattr(part, "layer_types", None):
            with contextlib.suppress(AttributeError):  # Mamba and Jamba work theirs out
                part.layer_types = types[: part.num_hidden_layers]
    try:
        decoder = layers.decoder(base.meta_base(small, base.dtype_of("float16", model, small)))
    except ValueError:  # said where the whole model is made
        return PROJECTIONS
    return tuple(attention_targets(decoder)) or PROJECTIONS


def script_of(recipe: TrainRecipe) -> Script:
    """A recipe as the objects of a script with a stock trainer."""
    from fitcast.forecasting.files.script import Script

    quantization = qlora.quantization(recipe)
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": recipe.micro_batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        "optim": TRAINER_OPTIM[recipe.optimizer],
        "fp16": recipe.amp_dtype == "float16",
        "bf16": recipe.amp_dtype == "bfloat16",
        "gradient_checkpointing": recipe.checkpointed_layers != 0,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    targets = recipe.lora_targets
    adapters = {
        "r": recipe.lora_rank,
        "lora_alpha": recipe.lora_alpha,
        "lora_dropout": recipe.lora_dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "task_type": "CAUSAL_LM",
    }
    return Script(
        tool="recipe",
        model=recipe.model,
        arguments=arguments,
        lora=adapters if recipe.lora_rank else None,
        quantization=None if quantization is None else quantization.to_dict(),
        dtype=str(qlora.storage_dtype(recipe)).removeprefix("torch."),
        attention="eager" if recipe.attention == "eager" else None,
        sequence_length=recipe.sequence_length,
        padded=recipe.has_mask,
        notes=_not_followed(recipe),
    )


def _not_followed(recipe: TrainRecipe) -> list[str]:
    """What a recipe says of a training step and a stock trainer has no argument for."""
    said = []
    if recipe.checkpointed_layers not in (0, "all"):
        said.append(f"checkpointed_layers: {recipe.checkpointed_layers} is taken as all here")
    for name in ("offload_checkpoints", "keep_attention", "kbit_upcast", "flat_optimizer"):
        if getattr(recipe, name):
            said.append(f"{name} is not followed in this step")
    return said
