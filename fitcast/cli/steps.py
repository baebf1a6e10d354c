"""Other steps than training, on the command line: evaluation, resuming, generation, merging.

    fitcast forecast run.yaml --step evaluation --eval-rows 500
    fitcast forecast --model llama-3.1-8b --step generation --prompt-tokens 512 --new-tokens 256

They are those of the stock trainer and of the model's own `generate()`. A recipe becomes the
objects that a script would make of it; its levers are put on the trainer's model.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from fitcast.cli import options
from fitcast.gpus import Gpu
from fitcast.units import refusal

if TYPE_CHECKING:
    from fitcast.forecasting.files.script import Script
    from fitcast.forecasting.verdict import Forecast
    from fitcast.recipe import TrainRecipe

STEPS = ("train", "evaluation", "resume", "generation", "merge")
# Options of the steps: which step they belong to, its name in Python, what it is.
NUMBERS = {
    "eval_batch_size": ("evaluation", "per_device_eval_batch_size", "Rows in a batch of the "
                        "evaluation. (default: 8, as transformers has it)"),
    "eval_rows": ("evaluation", "eval_rows", "Rows of the evaluation's data set. (default: two "
                  "batches)"),
    "prompt_tokens": ("generation", "prompt_tokens", "Tokens of a prompt. (default: 512)"),
    "new_tokens": ("generation", "new_tokens", "Tokens to be made. (default: 256)"),
    "prompts": ("generation", "batch_size", "Prompts at once. (default: 1)"),
}  # fmt: skip
GENERATION: dict[str, Any] = {"prompt_tokens": 512, "new_tokens": 256}


def add_options(verb: argparse.ArgumentParser) -> None:
    """The options of `fitcast forecast` about another step than training."""
    group = verb.add_argument_group("step (what is forecast)")
    group.add_argument(
        "--step",
        default="train",
        metavar=f"{{{','.join(STEPS)}}}",
        help="A training step, the trainer's evaluation after one, training that is resumed from a "
        "checkpoint, generate(), or the merge of adapters into 16-bit weights. (default: train)",
    )
    for name, (_, _, text) in NUMBERS.items():
        group.add_argument(
            f"--{name.replace('_', '-')}", metavar="N", default=argparse.SUPPRESS, help=text
        )


def forecast_step_asked(
    asked: argparse.Namespace, gpu: Gpu, recipe: TrainRecipe | None
) -> Forecast:
    """The forecast of another step than training, of a recipe, or of a file where there is none.

    Raises:
        ValueError: No such step, an option of another step, a value that cannot be.
    """
    step = options.one_of("step", asked.step, STEPS)
    numbers = _numbers(asked, step)
    script, more = _script(asked, gpu, recipe)
    seen = _seen(step, script, more, numbers, gpu)
    return dataclasses.replace(seen, notes=(*script.notes, *seen.notes))


def _seen(
    step: str, script: Script, more: dict[str, Any], numbers: dict[str, Any], gpu: Gpu
) -> Forecast:
    run = script.options() | more
    model = run.pop("model", script.model)
    if step == "merge":
        return _merge(model, run, gpu)
    if step == "generation":
        from fitcast.forecasting.generation import forecast_generation

        wanted = ("peft_config", "quantization_config", "dtype", "attn_implementation")
        kept = {name: run[name] for name in wanted}
        return forecast_generation(model, gpu=gpu, **kept, **(GENERATION | numbers))
    from fitcast.forecasting.lean_trainer import with_levers
    from fitcast.forecasting.other_steps import forecast_evaluation, forecast_resume

    size = numbers.pop("per_device_eval_batch_size", None)
    script.arguments |= {} if size is None else {"per_device_eval_batch_size": size}
    arguments = script.training_arguments(gpu)
    run = with_levers(arguments, run)
    if step == "resume":
        return forecast_resume(model, arguments, gpu=gpu, **run)
    return forecast_evaluation(model, arguments, gpu=gpu, **run, **numbers)


def _merge(model: str, run: dict[str, Any], gpu: Gpu) -> Forecast:
    if run["peft_config"] is None:
        raise refusal(
            "step", "be another one for a run without adapters", "merge", "nothing is to be merged"
        )
    from fitcast.forecasting.merging import forecast_merge

    return forecast_merge(model, run["peft_config"], gpu=gpu, dtype=run["dtype"])


def refuse_numbers(asked: argparse.Namespace) -> None:
    """Raise for an option of another step where a training step is forecast."""
    _numbers(asked, "train")


def _numbers(asked: argparse.Namespace, step: str) -> dict[str, Any]:
    """The step's own numbers, by their names in Python."""
    found: dict[str, Any] = {}
    for option, (belongs, name, _) in NUMBERS.items():
        typed = getattr(asked, option, None)
        if typed is None:
            continue
        if belongs != step:
            raise refusal(
                f"--{option.replace('_', '-')}", f"be given with --step {belongs}", typed,
                "or be left out",
            )  # fmt: skip
        found[name] = options.number(option, typed, int, "8")
        if found[name] < 1:
            raise refusal(option, "be a whole number from 1", found[name], "for example 8")
    return found


def _script(
    asked: argparse.Namespace, gpu: Gpu, recipe: TrainRecipe | None
) -> tuple[Script, dict[str, Any]]:
    """What a script would say, and what was typed beside it."""
    from fitcast.forecasting import files

    if recipe is None:
        return files.read(asked.file, gpu), options.beside_file(asked)
    recipe.check_on(gpu)
    from fitcast.forecasting.by_trainer import levers_of, script_of

    return script_of(recipe), levers_of(recipe)
