"""One question for every way to say a run: a recipe, or the objects that a script makes.

    forecast(TrainRecipe(model="llama-3.1-8b", amp_dtype="float16"), T4)
    forecast("llama-3.1-8b", TrainingArguments(...), peft_config=LoraConfig(...), gpu=T4)
    forecast("run.yaml", gpu=T4)

Nothing is forecast here: a recipe goes to `forecasting.forecast`, Hugging Face's objects to
`forecasting.huggingface`, a file of axolotl, LLaMA-Factory or TRL to `forecasting.files`; their
libraries are imported only then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

from fitcast.forecasting import files
from fitcast.forecasting.checks import check_card
from fitcast.gpus import T4, Gpu
from fitcast.recipe import TrainRecipe
from fitcast.units import Said, refusal

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments

    from fitcast.forecasting.verdict import Forecast

SCRIPT = "forecast(model, TrainingArguments(...), gpu=...)"


@overload
def forecast(
    run: TrainRecipe, arguments: Gpu = ..., *, gpu: Gpu = ..., **options: Any
) -> Forecast: ...


@overload
def forecast(run: str, arguments: Gpu = ..., *, gpu: Gpu = ..., **options: Any) -> Forecast: ...


@overload
def forecast(
    run: str | PretrainedConfig | PreTrainedModel,
    arguments: TrainingArguments,
    *,
    gpu: Gpu = ...,
    **options: Any,
) -> Forecast: ...


def forecast(run: Any, arguments: Any = None, *, gpu: Gpu | None = None, **options: Any):
    """What one optimizer step of a training run needs on a card: memory, verdict, time.

    Args:
        run: A `TrainRecipe`; or a script's model: a name, hub id, folder, config or model; or the
            .yaml or .json that axolotl, LLaMA-Factory or TRL trains from.
        arguments: Of a recipe or a file, the card; of a model, the script's `TrainingArguments`,
            `SFTConfig` or `DPOConfig`.
        gpu: The card; a T4 unless one is given.
        options: Of a model, what else its script says: `peft_config`, `quantization_config`,
            `dtype`, `attn_implementation`, `sequence_length`, `padded`, `images` (in each row),
            `trainer`, and what the trainer's class takes.
            `forecasting.huggingface.forecast_run` explains them. `levers` is
            True for a script that says `apply_levers(trainer.model)`, or that one's keywords.
            Of a recipe on several cards: `strategy` ("ddp", "fsdp2" or "device_map"),
            `world_size`, `offload`, as `forecasting.ranks.forecast_ranks` explains them.

    Returns:
        A `Forecast`; its `notes` say what was assumed and what is not modelled.

    Raises:
        ValueError: The run cannot be made, or is not said; the message names the field.

    Example:
        >>> recipe = TrainRecipe(model="llama-3.2-1b", amp_dtype="float16", sequence_length=64)
        >>> forecast(recipe, T4).fits
        True
    """
    _check_card(arguments, gpu)
    if isinstance(run, TrainRecipe):
        return _of_recipe(run, arguments if gpu is None else gpu, options)
    if files.names_one(run) and isinstance(arguments, Gpu | None):
        return files.forecast_file(run, gpu or arguments or T4, **options)
    if arguments is None or isinstance(arguments, Gpu):
        raise refusal(
            "arguments",
            "be the run's TrainingArguments, SFTConfig or DPOConfig",
            Said("none" if arguments is None else f"the card {arguments.name}"),
            f"write {SCRIPT}, or give a TrainRecipe alone",
        )
    from fitcast.forecasting.huggingface import forecast_run
    from fitcast.forecasting.lean_trainer import with_levers

    options = with_levers(arguments, options)
    return forecast_run(run, arguments, gpu=T4 if gpu is None else gpu, **options)


def _check_card(arguments: Any, gpu: Any) -> None:
    """A card is no name, neither as `gpu` nor in place of arguments."""
    if gpu is not None or isinstance(arguments, str):
        check_card(arguments if gpu is None else gpu)


def _of_recipe(recipe: TrainRecipe, gpu: Any, options: dict[str, Any]) -> Forecast:
    if "strategy" in options and set(options) <= {"strategy", "world_size", "offload"}:
        from fitcast.forecasting.ranks import forecast_ranks

        return forecast_ranks(recipe, T4 if gpu is None else gpu, **options)
    if options or not isinstance(gpu, Gpu | None):
        raise refusal(
            next(iter(options), "arguments"),
            "not be given beside a TrainRecipe, which says all of the run",
            Said(type(next(iter(options.values()), gpu)).__name__),
            f"change the recipe, or write {SCRIPT}",
        )
    from fitcast.forecasting.forecast import forecast as forecast_recipe

    return forecast_recipe(recipe, T4 if gpu is None else gpu)
